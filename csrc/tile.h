// The innermost loop of every matrix product in fp32 or fp64: a tile of sums in registers.
#pragma once

#include "vectors.h"

namespace gptfast::GPTFAST_LEVEL {

// Sets acc[m][n] to the sum over k of a[m * a_row_stride + k * a_col_stride] times the vector at
// b + k * b_row_stride + n registers. Always inlined: a stride that the caller knows at compile time stays a constant.
template <int MR, int NV, class V, class R>
[[gnu::always_inline]] static inline void sum_products(V (&acc)[MR][NV], int64_t K, const R* a, int64_t a_row_stride,
                                                       int64_t a_col_stride, const R* b, int64_t b_row_stride) {
  constexpr int lanes = sizeof(V) / sizeof(R);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[m][n] = V{};
  for (int64_t k = 0; k < K; ++k, a += a_col_stride, b += b_row_stride) {
    V row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) memcpy(row + n, b + n * lanes, sizeof(V));
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const V x = a[m * a_row_stride] - V{};
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] += x * row[n];
    }
  }
}

}  // namespace gptfast::GPTFAST_LEVEL
