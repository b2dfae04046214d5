// Attention computes in fp32, or in fp64 where few queries decide the largest error: vectors of both, under one name.
#pragma once

#include "maths.h"

namespace gptfast::GPTFAST_LEVEL {

typedef double vdouble __attribute__((vector_size(4 * W)));  // one register
typedef double vdouble_any __attribute__((vector_size(4 * W), aligned(8), may_alias));
typedef int64_t vlong __attribute__((vector_size(4 * W)));
typedef uint64_t vulong __attribute__((vector_size(4 * W)));
typedef float vfhalf __attribute__((vector_size(2 * W), aligned(4), may_alias));

template <class R>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = vf;
};
template <>
struct VectorOf<double> {
  using type = vdouble;
};
template <class R>
using Vec = typename VectorOf<R>::type;
template <class R>
constexpr int LANES = sizeof(Vec<R>) / sizeof(R);

static inline vdouble load(const double* p) { return *(const vdouble_any*)p; }
static inline void store(double* p, vdouble x) { *(vdouble_any*)p = x; }
static inline vdouble splat(double x) { return x - vdouble{}; }
static inline vdouble max(vdouble a, vdouble b) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (vdouble)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// 16-bit numbers become doubles only where fp32 overflows, so speed does not count.
template <class T>
static inline vdouble load_each(const T* p) {
  vdouble x;
  for (int i = 0; i < LANES<double>; ++i) x[i] = load_one(p + i);
  return x;
}

// Loads as many numbers as a register holds of R.
template <class R, class T>
static inline Vec<R> load_as(const T* p) {
  return load(p);
}
template <>
inline vdouble load_as<double, float>(const float* p) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
  return (vdouble)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  return __builtin_convertvector(*(const vfhalf*)p, vdouble);
#endif
}
template <>
inline vdouble load_as<double, bf16>(const bf16* p) {
  return load_each(p);
}
template <>
inline vdouble load_as<double, fp16>(const fp16* p) {
  return load_each(p);
}
template <class R, class T>
static inline Vec<R> load_part_as(const T* p, int64_t n) {
  T lanes[LANES<R>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load_as<R>(lanes);
}
template <class R, class T>
static inline Vec<R> load_n_as(const T* p, int64_t n) {
  return n == LANES<R> ? load_as<R>(p) : load_part_as<R>(p, n);
}

static inline double sum(vdouble x) {
  double lanes[LANES<double>];
  memcpy(lanes, &x, sizeof lanes);
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}
static inline double max(vdouble x) {
  double best = x[0];
  for (int i = 1; i < LANES<double>; ++i) best = best > x[i] ? best : x[i];
  return best;
}

template <bool UPPER, size_t... I>
static inline vdouble interleave(vdouble a, vdouble b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, ((UPPER ? sizeof...(I) / 2 : 0) + I / 2 + I % 2 * sizeof...(I))...);
}
// Returns the sums of as many vectors as a vector has lanes. Overwrites x.
static inline vdouble sum_each(vdouble* x) {
  constexpr auto lanes = std::make_index_sequence<LANES<double>>();
#pragma GCC unroll 4
  for (int n = LANES<double> / 2; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      x[i] = interleave<false>(x[i], x[i + n], lanes) + interleave<true>(x[i], x[i + n], lanes);
  return x[0];
}

// Returns 2^x for x <= 1023, and 0 below -1022. Taylor's polynomial of degree 11 on [-1/2, 1/2]; its error is 1e-14.
static inline vdouble exp2(vdouble x) {
  constexpr double terms[] = {4.45553827187081e-10,   7.054911620801121e-09,  1.0178086009239696e-07,
                              1.3215486790144305e-06, 1.5252733804059838e-05, 0.00015403530393381606,
                              0.0013333558146428441,  0.009618129107628477,   0.055504108664821576,
                              0.2402265069591007,     0.6931471805599453,     1.0};
  const double magic = 6755399441055744.0;  // 1.5 * 2^52, as MAGIC
  const vdouble z = x + magic, f = x - (z - magic);
  vdouble p = splat(terms[0]);
#pragma GCC unroll 12
  for (int i = 1; i < 12; ++i) p = p * f + terms[i];
  return x < splat(-1022.0) ? vdouble{} : (vdouble)((vulong)p + ((vulong)z << 52));
}

// Writes a row of D numbers times factor. A lane of `zeros` becomes NaN where one of them is not finite.
template <class T>
static inline void write_row(T* to, const float* from, float factor, int64_t D, vf& zeros) {
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    const vf x = load(from + d) * factor;
    zeros += x * 0.0f;
    store(to + d, x);
  }
  if (d == D) return;
  const vf x = keep_lanes(load(from + d) * factor, D - d);
  zeros += x * 0.0f;
  store_part(to + d, x, D - d);
}
template <class T>
static inline void write_row(T* to, const double* from, double factor, int64_t D, vf&) {
  for (int64_t d = 0; d < D; ++d) store_part(to + d, splat((float)(from[d] * factor)), 1);
}

template <class T>
static inline void widen_row(float* to, const T* from, int64_t D) {
  int64_t d = 0;
  for (; d + W <= D; d += W) store(to + d, load(from + d));
  if (d < D) store(to + d, load_part(from + d, D - d));
}
template <class T>
static inline void widen_row(double* to, const T* from, int64_t D) {
  for (int64_t d = 0; d < D; ++d) to[d] = load_one(from + d);
  for (int64_t d = D; d % W; ++d) to[d] = 0;
}

// Multiplies W numbers by the lanes of factor.
static inline void scale_lanes(float* x, vf factor, float keep) { store(x, load(x) * (factor * keep)); }
static inline void scale_lanes(double* x, vf factor, double keep) {
  for (int i = 0; i < W; ++i) x[i] *= factor[i] * keep;
}

}  // namespace gptfast::GPTFAST_LEVEL
