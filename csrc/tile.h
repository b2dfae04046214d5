// The innermost loop of every fp32 matrix product: a tile of sums in registers.
#pragma once

#include "vectors.h"

namespace gptfast::GPTFAST_LEVEL {

// Sets acc[m][n] to the sum over k of a[m * a_row_stride + k * a_col_stride] times the vector at
// b + k * b_row_stride + n * W. Always inlined: a stride that the caller knows at compile time stays a constant.
template <int MR, int NV>
[[gnu::always_inline]] static inline void sum_products(vf (&acc)[MR][NV], int64_t K, const float* a,
                                                       int64_t a_row_stride, int64_t a_col_stride, const float* b,
                                                       int64_t b_row_stride) {
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[m][n] = vf{};
  for (int64_t k = 0; k < K; ++k, a += a_col_stride, b += b_row_stride) {
    vf row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) row[n] = load(b + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const vf x = splat(a[m * a_row_stride]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] += x * row[n];
    }
  }
}

}  // namespace gptfast::GPTFAST_LEVEL
