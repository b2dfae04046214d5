// Tokens that can be drawn and their weights: sums, selection by lanes, and what a logit weighs.
#pragma once

#include "maths.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t WEIGHTS_PER_DOUBLE_SUM = 4096;

#if !defined(__AVX512F__)
// Returns the lanes of a mask, each 0 or -1, as bits: lane i is bit i.
inline uint32_t bits_of(vi mask) {
#if defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}
#endif

// Return the lanes in which x is above y, or equal to y, as bits.
inline uint32_t bits_above(vf x, vf y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GT_OQ);
#else
  return bits_of(x > y);
#endif
}
inline uint32_t bits_equal(vf x, vf y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_EQ_OQ);
#else
  return bits_of(x == y);
#endif
}

// Stores the lanes of x that the bits select, in order, and returns their number. May write W floats.
inline int64_t compress(float* to, vf x, uint32_t bits) {
#if defined(__AVX512F__)
  store(to, (vf)_mm512_maskz_compress_ps((__mmask16)bits, (__m512)x));
#else
  int64_t n = 0;
  for (int i = 0; i < W; ++i) {
    to[n] = x[i];
    n += bits >> i & 1;
  }
#endif
  return __builtin_popcount(bits);
}

// Rounds to the nearest whole number, ties to even. From 2^23 on, every fp32 number is whole.
inline vf round_weight(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_roundscale_ps((__m512)x, 0);
#elif defined(__AVX2__)
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf whole = (x + 8388608.0f) - 8388608.0f;
  return x < splat(8388608.0f) ? whole : x;
#endif
}

typedef double vdhalf __attribute__((vector_size(4 * W)));  // one register

// Return the first or the last W / 2 lanes in double. __builtin_convertvector works on quarters and takes twice as
// long.
#if defined(__AVX512F__)
inline vdhalf first_half(vf x) { return (vdhalf)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)); }
inline vdhalf last_half(vf x) { return (vdhalf)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1)); }
#elif defined(__AVX2__)
inline vdhalf first_half(vf x) { return (vdhalf)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)); }
inline vdhalf last_half(vf x) { return (vdhalf)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1)); }
#else
inline vdhalf first_half(vf x) { return vdhalf{x[0], x[1]}; }
inline vdhalf last_half(vf x) { return vdhalf{x[2], x[3]}; }
#endif

// The sum of up to WEIGHTS_PER_DOUBLE_SUM weights. GCC would keep a vector of two registers in memory.
class WeightSum {
 public:
  void add(vf w) {
    first_ += first_half(w);
    last_ += last_half(w);
  }
  int64_t total() const {
    const vdhalf both = first_ + last_;
    double sum = 0;
    for (int i = 0; i < W / 2; ++i) sum += both[i];
    return (int64_t)sum;
  }

 private:
  vdhalf first_ = {}, last_ = {};
};

// Returns the sum of n weights; n is a multiple of W.
inline int64_t mass(const float* w, int64_t n) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += WEIGHTS_PER_DOUBLE_SUM) {
    WeightSum sum;
    for (int64_t j = begin; j < smaller(n, begin + WEIGHTS_PER_DOUBLE_SUM); j += W) sum.add(load(w + j));
    total += sum.total();
  }
  return total;
}

inline float median(float a, float b, float c) { return larger(smaller(a, b), smaller(larger(a, b), c)); }

// Returns the k-th largest (k >= 1) of n numbers. Overwrites x.
inline float kth_largest(float* x, int64_t n, int64_t k) {
  int64_t lo = 0, hi = n - 1;
  while (lo < hi) {
    const float pivot = median(x[lo], x[lo + (hi - lo) / 2], x[hi]);
    int64_t i = lo, j = hi;
    while (i <= j) {
      while (x[i] > pivot) ++i;
      while (x[j] < pivot) --j;
      if (i <= j) {
        const float swap = x[i];
        x[i++] = x[j];
        x[j--] = swap;
      }
    }
    if (k - 1 <= j)
      hi = j;
    else if (k - 1 >= i)
      lo = i;
    else
      break;
  }
  return x[k - 1];
}

// The tokens that can still be drawn, in the order of their ids: logits, padded with -inf to a multiple of W, and
// weights.
struct Tokens {
  float *x, *w;
  int32_t* id;  // null: a token's id is its index
  int64_t n;
};

inline vi id_lanes(int64_t first) { return (vi)(iota() + (uint32_t)first); }

// Fills x from n to the next multiple of W.
inline void pad(float* x, int64_t n, float value) {
  for (int64_t j = n; j < round_up(n, W); ++j) x[j] = value;
}

// Calls each(token, logits, weights) for each vector of the tokens from begin to end, and returns the sum of the
// weights, which weight_of(logits) computes. Past the end, logits are -inf and weights are 0.
template <class T, class Weight, class F>
int64_t weigh_by(const T* logits, int64_t begin, int64_t end, Weight weight_of, F each) {
  int64_t total = 0;
  for (; begin < end; begin += WEIGHTS_PER_DOUBLE_SUM) {
    const int64_t stop = smaller(end, begin + WEIGHTS_PER_DOUBLE_SUM);
    WeightSum sum;
    const auto weigh_vector = [&](int64_t j, vf x) {
      const vf w = weight_of(x);
      sum.add(w);
      each(j, x, w);
    };
    int64_t j = begin;
    for (; j + W <= stop; j += W) weigh_vector(j, load(logits + j));
    if (j < stop) weigh_vector(j, load_part(logits + j, stop - j, -INFINITY));
    total += sum.total();
  }
  return total;
}
template <class T, class F>
int64_t weigh(const T* logits, int64_t begin, int64_t end, float top, float temperature, F each) {
  const auto weight_of = [](vf x) { return round_weight(exp(x) * 0x1p40f); };
  // A division by 1 changes nothing and costs as much as all the rest.
  if (temperature == 1.0f) return weigh_by(logits, begin, end, [&](vf x) { return weight_of(x - top); }, each);
  return weigh_by(logits, begin, end, [&](vf x) { return weight_of((x - top) / temperature); }, each);
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
