// Layer normalisation of one row, for the operations and for the engine.
#pragma once

#include "vectors.h"

namespace gptfast::GPTFAST_LEVEL {

struct RowStats {
  float mean, inverse_std;
};

// Returns mean and 1 / standard deviation of C elements. CHAINS vectors of sums run side by side, which hides the
// latency of an addition; their number decides how the sums round.
template <int CHAINS, class X>
static inline RowStats row_stats(const X* x, int64_t C, double eps) {
  vf totals[CHAINS] = {}, squares[CHAINS] = {};
  int64_t c = 0;
  for (; c + CHAINS * W <= C; c += CHAINS * W)
    for (int i = 0; i < CHAINS; ++i) totals[i] += load(x + c + i * W);
  for (; c < C; c += W) totals[0] += load_n(x + c, smaller<int64_t>(W, C - c));
  for (int i = 1; i < CHAINS; ++i) totals[0] += totals[i];
  const float mean = (float)((double)sum(totals[0]) / (double)C);
  for (c = 0; c + CHAINS * W <= C; c += CHAINS * W)
    for (int i = 0; i < CHAINS; ++i) {
      const vf d = load(x + c + i * W) - mean;
      squares[i] += d * d;
    }
  for (; c < C; c += W) {
    const int64_t n = smaller<int64_t>(W, C - c);
    const vf d = keep_lanes(load_n(x + c, n) - mean, n);
    squares[0] += d * d;
  }
  for (int i = 1; i < CHAINS; ++i) squares[0] += squares[i];
  return {mean, (float)(1 / sqrt((double)sum(squares[0]) / (double)C + eps))};
}

// Writes y = (x - mean) / standard deviation * weight + bias.
template <class X, class Y>
static inline void normalize_row(const X* x, RowStats stats, const float* weight, const float* bias, int64_t C, Y* y) {
  for (int64_t c = 0; c < C; c += W) {
    const int64_t n = smaller<int64_t>(W, C - c);
    const vf normal = (load_n(x + c, n) - stats.mean) * stats.inverse_std;
    store_n(y + c, normal * load_n(weight + c, n) + load_n(bias + c, n), n);
  }
}

}  // namespace gptfast::GPTFAST_LEVEL
