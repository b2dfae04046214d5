// Vectors as wide as one instruction-set level allows: loads, stores, shuffles, sums and maxima over their lanes.
//
// Every *_loops.cpp is compiled once per level, with the level's flags and GPTFAST_LEVEL as its namespace, and
// includes nothing of ATen. No function here or there may become a symbol that two levels share (an inline std::
// function would): the linker would keep one copy for all levels, perhaps one that this CPU cannot run.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "loops.h"

namespace gptfast::GPTFAST_LEVEL {

// The lanes of a vector, and the number of vectors that the registers hold.
#if defined(__AVX512F__)
constexpr int W = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int W = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int W = 4, REGISTERS = 32;
#else
constexpr int W = 4, REGISTERS = 16;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef double vd __attribute__((vector_size(8 * W)));
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * W), aligned(2), may_alias));

template <class T>
static inline T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
static inline T larger(T a, T b) {
  return a > b ? a : b;
}
static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static inline vu iota() {  // 0, 1, 2, ...
  vu lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane;
}

// Interleaves the lower or the upper halves of a and b, by groups of SIZE lanes.
template <int SIZE, bool UPPER, class V, size_t... I>
static inline V interleave(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, ((UPPER ? W / 2 : 0) + I / (2 * SIZE) * SIZE + I % SIZE + I / SIZE % 2 * W)...);
}
template <int SIZE, bool UPPER, class V>
static inline V interleave(V a, V b) {
  return interleave<SIZE, UPPER>(a, b, std::make_index_sequence<W>());
}

static inline vf splat(float x) { return x - vf{}; }
static inline vu splat(uint32_t x) { return x - vu{}; }

// Returns the larger lanes. The result is NaN where b is NaN; a NaN in a is dropped.
static inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Combines all lanes of x into one, the upper half with the lower half until one lane is left.
template <class V, class F>
static inline auto reduce_lanes(V x, F combine) {
  std::remove_reference_t<decltype(x[0])> lanes[W];
  memcpy(lanes, &x, sizeof lanes);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}
static inline float sum(vf x) {
  return reduce_lanes(x, [](float a, float b) { return a + b; });
}
static inline int32_t sum(vi x) {
  return reduce_lanes(x, [](int32_t a, int32_t b) { return a + b; });
}
static inline float max(vf x) {
  return reduce_lanes(x, [](float a, float b) { return a > b ? a : b; });
}

// Adds the lanes of x to total, from the first to the last.
static inline double add_lanes(double total, vd x) {
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}

// Returns the sums of W vectors: lane j is sum(x[j]), to the same bits. Overwrites x.
static inline vf sum_each(vf* x) {
#pragma GCC unroll 4
  for (int n = W / 2; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) x[i] = interleave<1, false>(x[i], x[i + n]) + interleave<1, true>(x[i], x[i + n]);
  return x[0];
}

static inline bool any(vi mask) {  // each lane is 0 or -1
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  return sum(mask) != 0;
#endif
}

// Keeps the first n lanes and makes the others 0.
static inline vf keep_lanes(vf x, int64_t n) {
  for (int64_t i = n; i < W; ++i) x[i] = 0.0f;
  return x;
}

// Conversions between 16 and 32 bits. For these, __builtin_convertvector works on halves and takes three times as long.
#if defined(__AVX512F__)
static inline vu widen(vh x) { return (vu)_mm512_cvtepu16_epi32((__m256i)x); }
static inline vh narrow(vu x) { return (vh)_mm512_cvtepi32_epi16((__m512i)x); }
#elif defined(__AVX2__)
static inline vu widen(vh x) { return (vu)_mm256_cvtepu16_epi32((__m128i)x); }
static inline vh narrow(vu x) { return __builtin_convertvector(x, vh); }
#elif defined(__aarch64__)
static inline vu widen(vh x) { return (vu)vmovl_u16((uint16x4_t)x); }
static inline vh narrow(vu x) { return (vh)vmovn_u32((uint32x4_t)x); }
#else
static inline vu widen(vh x) { return __builtin_convertvector(x, vu); }
static inline vh narrow(vu x) { return __builtin_convertvector(x, vh); }
#endif

// Conversions between fp16 and fp32: by the CPU where the level can, else on the bits, rounding to nearest even.
#if defined(__AVX512F__)
static inline vf widen_half(vh x) { return (vf)_mm512_cvtph_ps((__m256i)x); }
static inline vh narrow_half(vf x) { return (vh)_mm512_cvtps_ph((__m512)x, 0); }
#elif defined(__AVX2__)
static inline vf widen_half(vh x) { return (vf)_mm256_cvtph_ps((__m128i)x); }
static inline vh narrow_half(vf x) { return (vh)_mm256_cvtps_ph((__m256)x, 0); }
#elif defined(__aarch64__)
static inline vf widen_half(vh x) { return (vf)vcvt_f32_f16((float16x4_t)x); }
static inline vh narrow_half(vf x) { return (vh)vcvt_f16_f32((float32x4_t)x); }
#else
static inline vf widen_half(vh x) {
  const vu bits = widen(x), sign = (bits & 0x8000u) << 16, rest = (bits & 0x7FFFu) << 13;
  const vu finite = (vu)((vf)rest * 0x1p112f);  // rebiases the exponent, of subnormals too
  const vu special = rest | 0x7F800000u;
  return (vf)(sign | (rest >= splat(0x0F800000u) ? special : finite));
}
static inline vh narrow_half(vf x) {
  const vu bits = (vu)x, sign = (bits >> 16) & 0x8000u, rest = bits & 0x7FFFFFFFu;
  const vu normal = (rest - 0x38000000u + 0x0FFFu + ((rest >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal half in the low bits, rounded by the addition itself.
  const vu subnormal = (vu)((vf)rest + 0.5f) - 0x3F000000u;
  vu half = rest < splat(0x38800000u) ? subnormal : normal;
  half = rest >= splat(0x477FF000u) ? splat(0x7C00u) : half;
  half = rest > splat(0x7F800000u) ? splat(0x7E00u) : half;
  return narrow(half | sign);
}
#endif

static inline vf load(const float* p) { return *(const vf_any*)p; }
static inline vf load(const bf16* p) { return (vf)(widen(*(const vh_any*)p) << 16); }
static inline vf load(const fp16* p) { return widen_half(*(const vh_any*)p); }

static inline void store(float* p, vf x) { *(vf_any*)p = x; }
// Return bits whose upper half is x as bf16, rounded to nearest even; the first for an x that is not NaN.
static inline vu round_bits(vf x) { return (vu)x + 0x7FFFu + (((vu)x >> 16) & 1u); }
static inline vu round_bits_or_nan(vf x) { return x == x ? round_bits(x) : splat(0x7FC00000u); }
static inline void store(bf16* p, vf x) { *(vh_any*)p = narrow(round_bits_or_nan(x) >> 16); }
static inline void store(fp16* p, vf x) { *(vh_any*)p = narrow_half(x); }

// Load or store only the first n < W elements. The other lanes of a load are `fill`.
template <class T>
static inline vf load_part(const T* p, int64_t n, float fill = 0.0f) {
  T lanes[W] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  vf x = load(lanes);
  for (int64_t i = n; i < W; ++i) x[i] = fill;
  return x;
}
template <class T>
static inline void store_part(T* p, vf x, int64_t n) {
  T lanes[W];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// Load or store the first n <= W elements, of which there are fewer than W at the end of a row.
template <class T>
static inline vf load_n(const T* p, int64_t n) {
  return n == W ? load(p) : load_part(p, n);
}
template <class T>
static inline void store_n(T* p, vf x, int64_t n) {
  if (n == W)
    store(p, x);
  else
    store_part(p, x, n);
}

template <class T>
static inline float load_one(const T* p) {
  return load_part(p, 1)[0];
}

// Calls f with an element of the dtype's type.
template <class F>
static inline auto by_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::fp32:
      return f(float{});
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::fp16:
      return f(fp16{});
  }
  __builtin_unreachable();
}

}  // namespace gptfast::GPTFAST_LEVEL
