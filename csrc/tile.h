// The heart of every matrix product: a tile of sums in registers.
#pragma once

#include "simd.h"

namespace gptfast::GPTFAST_LEVEL {

// acc[m][n] = the sum over k of a[m * a_row + k * a_col] b[k * ldb + n * W ...]. In line, so that steps that are
// constants where it is called stay constants.
template <int MR, int NV>
[[gnu::always_inline]] static inline void sum_products(vf (&acc)[MR][NV], int64_t K, const float* a, int64_t a_row,
                                                       int64_t a_col, const float* b, int64_t ldb) {
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[m][n] = vf{};
  for (int64_t k = 0; k < K; ++k, a += a_col, b += ldb) {
    vf row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) row[n] = load(b + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const vf x = splat(a[m * a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] += x * row[n];
    }
  }
}

}  // namespace gptfast::GPTFAST_LEVEL
