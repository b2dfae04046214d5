// Attention of a few queries against a long cache: dot products and a weighted sum, no tiles.
#pragma once

#include "attention_tiles.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Returns the dot products of the query with as many keys as a vector has lanes, the rows from k on, over the first
// NV vectors of dimensions.
template <int NV, class R, class T>
Vec<R> dots(const R* query, const T* k, int64_t stride) {
  constexpr int lanes = LANES<R>;
  Vec<R> q[NV], dot[lanes];
  for (int i = 0; i < NV; ++i) q[i] = load(query + i * lanes);
#pragma GCC unroll 16
  for (int64_t j = 0; j < lanes; ++j) {
    dot[j] = q[0] * load_as<R>(k + j * stride);
    for (int i = 1; i < NV; ++i) dot[j] += q[i] * load_as<R>(k + j * stride + i * lanes);
  }
  return sum_each(dot);
}
template <class R, class T>
R dot_one(const R* query, const T* k, int64_t D) {
  constexpr int lanes = LANES<R>;
  const int64_t whole = D / lanes * lanes;
  Vec<R> dot = {};
  for (int64_t d = 0; d < whole; d += lanes) dot += load(query + d) * load_as<R>(k + d);
  if (whole < D) dot += load(query + whole) * load_part_as<R>(k + whole, D - whole);
  return sum(dot);
}
// Returns the dot products of the query with n keys, at most the lanes of a vector, over all D dimensions.
template <class R, class T>
Vec<R> scores_of(const R* query, const T* k, int64_t stride, int64_t D, int64_t n) {
  constexpr int lanes = LANES<R>;
  Vec<R> score = {};
  int64_t d = 0;
  if (n == lanes) {
    for (; d + 4 * lanes <= D; d += 4 * lanes) score += dots<4>(query + d, k + d, stride);
    for (; d + lanes <= D; d += lanes) score += dots<1>(query + d, k + d, stride);
  }
  if (d < D)
    for (int64_t j = 0; j < n; ++j) score[j] += dot_one(query + d, k + j * stride + d, D - d);
  return score;
}

// Computes NV vectors of out = sum_j s[j] v[j], in blocks of BK keys: one long sum would round more.
template <int NV, class R, class T>
void weighted_sum(const R* s, const T* v, int64_t stride, int64_t n, int64_t in_use, R* out) {
  constexpr int lanes = LANES<R>;
  Vec<R> total[NV] = {};
  for (int64_t begin = 0; begin < n; begin += BK) {
    const int64_t end = smaller(n, begin + BK);
    Vec<R> even[NV] = {}, odd[NV] = {};
    int64_t j = begin;
    for (; j + 2 <= end; j += 2)
      for (int i = 0; i < NV; ++i) {
        even[i] += s[j] * load_n_as<R>(v + j * stride + i * lanes, in_use);
        odd[i] += s[j + 1] * load_n_as<R>(v + (j + 1) * stride + i * lanes, in_use);
      }
    for (int i = 0; i < NV; ++i) {
      if (j < end) even[i] += s[j] * load_n_as<R>(v + j * stride + i * lanes, in_use);
      total[i] += even[i] + odd[i];
    }
  }
  for (int i = 0; i < NV; ++i) store(out + i * lanes, total[i]);
}

// Returns whether all numbers were finite.
template <class T, class R>
bool fwd_decode(const AttentionArgs& args, int64_t b, int64_t h, int64_t i, R* s) {
  constexpr int lanes = LANES<R>;
  const int64_t D = args.D, DP = round_up(D, W);
  const T* k = head_data<T>(args.k, b, h);
  const T* v = head_data<T>(args.v, b, h);
  R *out = s + round_up(args.Tk, W), *query = out + DP;
  widen_row(query, head_data<T>(args.q, b, h) + i * args.q.time_stride, D);
  const Scale<R> scale = split_scale<R>(args.scale);
  const int64_t n = keys_seen_by(args, b, i, 1).end;
  Vec<R> best = splat((R)-INFINITY), total = {};
  for (int64_t j = 0; j < n; j += lanes) {
    const int64_t keys = smaller<int64_t>(lanes, n - j);
    Vec<R> score = scores_of(query, k + j * args.k.time_stride, args.k.time_stride, D, keys) * scale.sign;
    for (int64_t lane = keys; lane < lanes; ++lane) score[lane] = -INFINITY;
    store(s + j, score);
    best = max(score, best);
  }
  const R top = max(best), zero_at = top == -INFINITY ? 0 : top;
  for (int64_t j = 0; j < n; j += lanes) {
    const Vec<R> p = exp2((load(s + j) - zero_at) * scale.log2);
    store(s + j, p);
    total += p;
  }
  int64_t d = 0;
  for (; d + 4 * lanes <= D; d += 4 * lanes) weighted_sum<4>(s, v + d, args.v.time_stride, n, lanes, out + d);
  for (; d < D; d += lanes) weighted_sum<1>(s, v + d, args.v.time_stride, n, smaller<int64_t>(lanes, D - d), out + d);
  const R weight = sum(total);
  const bool sees = weight != 0;  // else there is no key, or only keys whose score is -inf
  if (!sees) memset(out, 0, sizeof(R) * DP);
  vf zeros = {};
  write_row(head_data<T>(args.out, b, h) + i * args.out.time_stride, out, sees ? 1 / weight : (R)0, D, zeros);
  args.lse[(b * args.H + h) * args.Tq + i] = sees ? lse_of(zero_at, weight, args.scale) : -INFINITY;
  return sum(zeros) == 0 && (n == 0 || top * 0 == 0);
}

// Whether there are so few queries that dot products beat tiles.
bool decodes(const AttentionArgs& args) { return args.Tq <= 8 && args.dropout_p == 0; }

// The products of keys and dimensions up to which a query computes in fp64. More keys take time, and average errors.
constexpr int64_t FP64_DECODE_WORK = 1 << 15;

bool fwd_in_fp64(const AttentionArgs& args) {
  if (!decodes(args)) return computes_in_fp64(args);
  return args.dtype == Dtype::fp32 && args.Tk * args.D <= FP64_DECODE_WORK;
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
