// The softmax of attention's scores and its gradient, over the keys of one run at a time.
#pragma once

#include "attention_tiles.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

template <class R>
struct Softmax {
  R max[BQ], sum[BQ], rescale[BQ];
};

template <class R>
Softmax<R> nothing_seen() {
  Softmax<R> state;
  for (int64_t i = 0; i < BQ; ++i) state.max[i] = -INFINITY, state.sum[i] = 0;
  return state;
}

// Replaces S^T by exp2((S^T - max) * log2) and updates max and sum of each query. Returns whether an earlier max
// changed.
template <class R>
bool online_softmax(R* s, R log2, const Run& run, int64_t end, Softmax<R>& state) {
  using V = Vec<R>;
  V changed = {};
  for (int64_t i = 0; i < BQ; i += LANES<R>) store(state.rescale + i, splat((R)1));
  for (int64_t i = run.column; i < end; i += LANES<R>) {
    const V old = load(state.max + i);
    V best = old;
    for (int64_t j = 0; j < run.keys; ++j) best = max(load(s + j * BQ + i), best);
    const V zero_at = best == -INFINITY ? V{} : best;
    V total = {};
    for (int64_t j = 0; j < run.keys; ++j) {
      const V p = exp2((load(s + j * BQ + i) - zero_at) * log2);
      store(s + j * BQ + i, p);
      total += p;
    }
    const V rescale = exp2((old - zero_at) * log2);
    store(state.max + i, best);
    store(state.rescale + i, rescale);
    store(state.sum + i, load(state.sum + i) * rescale + total);
    changed = old == best || old == -INFINITY ? changed : splat((R)1);
  }
  return sum(changed) != 0;
}

template <class R>
struct QuerySums {
  R max[BQ], p[BQ], p_dp[BQ];
};

// Replaces S^T by exp2((S^T - shift) * log2), where shift is the maximum so far, and adds to sum P and sum P dP.
template <class R>
void softmax_bwd_sums(R* p, const R* dp, R log2, R* shift, QuerySums<R>& sums, const Run& run, int64_t end) {
  using V = Vec<R>;
  for (int64_t i = run.column; i < end; i += LANES<R>) {
    const V old = load(sums.max + i);
    V best = old;
    for (int64_t j = 0; j < run.keys; ++j) best = max(load(p + j * BQ + i), best);
    const V zero_at = best == -INFINITY ? V{} : best;
    V total = {}, weighted = {};
    for (int64_t j = 0; j < run.keys; ++j) {
      const V probability = exp2((load(p + j * BQ + i) - zero_at) * log2);
      store(p + j * BQ + i, probability);
      total += probability;
      weighted += probability * load(dp + j * BQ + i);
    }
    const V rescale = exp2((old - zero_at) * log2);
    store(shift + i, best);
    store(sums.max + i, best);
    store(sums.p + i, load(sums.p + i) * rescale + total);
    store(sums.p_dp + i, load(sums.p_dp + i) * rescale + weighted);
  }
}

// Normalises P^T and replaces dP^T by dS^T = P (dP - delta).
template <class R>
void softmax_bwd(R* p, R* ds, R log2, const R* shift, const QuerySums<R>& sums, const Run& run, int64_t end) {
  using V = Vec<R>;
  for (int64_t i = run.column; i < end; i += LANES<R>) {
    const V best = load(sums.max + i), sum = load(sums.p + i);
    // For a query that sees no key, or only keys whose score is -inf, P = 0.
    const V inverse = sum == 0 ? V{} : (R)1 / sum;
    const V factor = exp2((load(shift + i) - (best == -INFINITY ? V{} : best)) * log2) * inverse;
    const V delta = load(sums.p_dp + i) * inverse;
    for (int64_t j = 0; j < run.keys; ++j) {
      const V probability = load(p + j * BQ + i) * factor;
      store(p + j * BQ + i, probability);
      store(ds + j * BQ + i, probability * (load(ds + j * BQ + i) - delta));
    }
  }
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
