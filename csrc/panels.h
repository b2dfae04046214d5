// Panels: parts of a matrix in the order in which the innermost loop of a product reads them. A panel of P rows (or
// columns) x holds, unit by unit of the terms, P numbers of 32 bits: a float, or two bf16 terms side by side.
#pragma once

#include "vectors.h"

namespace gptfast::GPTFAST_LEVEL {

// What a unit is: TERMS terms of x, made one `Number`.
struct Floats {
  typedef float T;
  static constexpr int64_t TERMS = 1;
  static float number(const float* x, int64_t, int64_t) { return *x; }
  static vf numbers(const float* x) { return load(x); }  // W units of one row, whose terms lie side by side
};
// bf16, widened to fp32.
struct Widened {
  typedef bf16 T;
  static constexpr int64_t TERMS = 1;
  static float number(const bf16* x, int64_t, int64_t) {
    const uint32_t bits = (uint32_t)x->bits << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
  }
  static vf numbers(const bf16* x) { return load(x); }
};
// fp32, rounded to bf16.
struct Rounded {
  typedef float T;
  static constexpr int64_t TERMS = 1;
  static float number(const float* x, int64_t, int64_t) {
    uint32_t bits;
    memcpy(&bits, x, 4);
    bits = *x == *x ? (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u : 0x7FC00000u;
    float rounded;
    memcpy(&rounded, &bits, 4);
    return rounded;
  }
  static vf numbers(const float* x) { return (vf)(round_bits_or_nan(load(x)) & 0xFFFF0000u); }
};
// Pairs of bf16: the lower half of a number has the term with the lower index. The last pair of an odd number of terms
// ends in 0.
struct Pairs {
  typedef bf16 T;
  static constexpr int64_t TERMS = 2;
  static uint32_t number(const bf16* x, int64_t x_k, int64_t terms) {
    return x->bits | (terms > 1 ? (uint32_t)x[x_k].bits << 16 : 0);
  }
  static vf numbers(const bf16* x) {
    vf pairs;  // x may have an odd address, counted in pairs
    memcpy(&pairs, x, sizeof pairs);
    return pairs;
  }
};

// Loads the first n <= W numbers, `stride` apart; the other lanes are 0.
static inline vf load_apart(const float* x, int64_t stride, int64_t n) {
  if (stride == 1) return load_n(x, n);
  float numbers[W] = {};
  for (int64_t i = 0; i < n; ++i) numbers[i] = x[i * stride];
  return load(numbers);
}

// Transposes W x W floats in registers by interleaving the halves log2(W) times.
static inline void transpose(vf* x) {
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    vf y[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = interleave<1, false>(x[i], x[i + W / 2]);
      y[2 * i + 1] = interleave<1, true>(x[i], x[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
}

// Sets to[u * P + p] to unit u of row p, whose terms are x_k apart, for the K terms of rows p < n, else to 0. Rows are
// x_p apart. May write W numbers past the panel: where P < W, it stores whole vectors in order, and each overwrites the
// surplus of the one before.
template <int64_t P, class Unit>
static void pack(const typename Unit::T* x, int64_t x_p, int64_t x_k, int64_t n, int64_t K, float* to) {
  constexpr int64_t TERMS = Unit::TERMS;
  typedef decltype(Unit::number(x, 0, 0)) Number;
  static_assert(sizeof(Number) == sizeof(float));
  const int64_t whole = K / TERMS, units = (K + TERMS - 1) / TERMS;
  int64_t u = 0;
  if (n == P && x_p == 1)
    for (; u < whole; ++u) {
      Number numbers[P];
      for (int64_t p = 0; p < P; ++p) numbers[p] = Unit::number(x + u * TERMS * x_k + p, x_k, TERMS);
      memcpy(to + u * P, numbers, sizeof numbers);
    }
  if (n == P && x_k == 1)
    for (; u + W <= whole; u += W)
      for (int64_t p = 0; p < P; p += W) {
        vf block[W];
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) block[i] = p + i < P ? Unit::numbers(x + (p + i) * x_p + u * TERMS) : vf{};
        transpose(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) store(to + (u + i) * P + p, block[i]);
      }
  for (; u < units; ++u)
    for (int64_t p = 0; p < P; ++p) {
      const Number number = p < n ? Unit::number(x + p * x_p + u * TERMS * x_k, x_k, K - u * TERMS) : Number{};
      memcpy(to + u * P + p, &number, sizeof number);
    }
}

}  // namespace gptfast::GPTFAST_LEVEL
