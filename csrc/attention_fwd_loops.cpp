// Attention forward: blocks of queries with an online softmax, or dot products where there are few queries.
#include "attention_tiles.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

struct Softmax {
  float max[BQ], sum[BQ], rescale[BQ];
};

// Replaces S^T by exp2((S^T - max) * log2) and updates max and sum of each query. Returns whether an earlier max
// changed.
bool online_softmax(float* s, float log2, int64_t keys, int64_t column, int64_t end, Softmax& state) {
  bool changed = false;
  for (int64_t i = 0; i < BQ; i += W) store(state.rescale + i, splat(1.0f));
  for (int64_t i = column; i < end; i += W) {
    const vf old = load(state.max + i);
    vf best = old;
    for (int64_t j = 0; j < keys; ++j) best = max(load(s + j * BQ + i), best);
    const vf zero_at = best == -INFINITY ? vf{} : best;
    vf total = {};
    for (int64_t j = 0; j < keys; ++j) {
      const vf p = exp2((load(s + j * BQ + i) - zero_at) * log2);
      store(s + j * BQ + i, p);
      total += p;
    }
    const vf rescale = exp2((old - zero_at) * log2);
    store(state.max + i, best);
    store(state.rescale + i, rescale);
    store(state.sum + i, load(state.sum + i) * rescale + total);
    for (int lane = 0; lane < W; ++lane) changed |= old[lane] != best[lane] && old[lane] != -INFINITY;
  }
  return changed;
}

template <class T>
void fwd_block(const AttentionArgs& args, int64_t b, int64_t h, int64_t q0, Matrix k, Matrix v, float* space) {
  const int64_t rows = smaller(BQ, args.Tq - q0), D = args.D, DP = round_up(D, W);
  const Scale scale = split_scale(args.scale);
  float* queries = space;
  float* q_t = queries + BQ * DP;
  float* s = q_t + DP * BQ;
  float* out = s + BK * BQ;
  widen_rows(head_data<T>(args.q, b, h) + q0 * args.q.time_stride, args.q.time_stride, rows, D, {queries, DP});
  transpose({queries, DP}, rows, D, scale.sign, q_t);
  memset(out, 0, sizeof(float) * BQ * DP);
  Softmax state;
  for (int64_t i = 0; i < BQ; ++i) state.max[i] = -INFINITY, state.sum[i] = 0.0f;

  const Span keys_seen = keys_seen_by(args, b, q0, rows);
  const int64_t end = columns_used(rows);
  for_each_run(keys_seen, [&](int64_t key, int64_t keys, int64_t column) {
    if (column >= end) return;
    gemm(keys, end - column, D, k.row(key), k.row_stride, 1, q_t + column, BQ, s + column, BQ, false);
    if (key >= keys_seen.full) mask_diagonal(s, keys_seen, key, keys, column);
    if (online_softmax(s, scale.log2, keys, column, end, state))
      for (int64_t i = column; i < rows; ++i)
        for (int64_t d = 0; d < DP; d += W) store(out + i * DP + d, load(out + i * DP + d) * state.rescale[i]);
    if (args.dropout_p > 0) apply_dropout(s, args, b * args.H + h, args.Tk - args.Tq + q0, key, keys, column, end);
    gemm(rows - column, DP, keys, s + column, 1, BQ, v.row(key), v.row_stride, out + column * DP, DP, true);
  });
  float* lse = args.lse + (b * args.H + h) * args.Tq + q0;
  T* to = head_data<T>(args.out, b, h) + q0 * args.out.time_stride;
  for (int64_t i = 0; i < rows; ++i) {
    const bool sees = state.sum[i] > 0 || state.sum[i] != state.sum[i];
    write_row(to + i * args.out.time_stride, out + i * DP, sees ? 1.0f / state.sum[i] : 0.0f, D);
    lse[i] = sees ? (float)((state.max[i] * (double)scale.log2 + log2((double)state.sum[i])) * LN2) : -INFINITY;
  }
}

// A few queries against a long cache use dot products and a weighted sum, no tiles.

// Returns the dot products of the query with W keys, the rows from k on, over the first NV * W dimensions.
template <int NV, class T>
vf dots(const float* query, const T* k, int64_t stride) {
  vf q[NV], dot[W];
  for (int i = 0; i < NV; ++i) q[i] = load(query + i * W);
#pragma GCC unroll 16
  for (int64_t j = 0; j < W; ++j) {
    dot[j] = q[0] * load(k + j * stride);
    for (int i = 1; i < NV; ++i) dot[j] += q[i] * load(k + j * stride + i * W);
  }
  return sum_each(dot);
}
template <class T>
float dot_one(const float* query, const T* k, int64_t D) {
  const int64_t whole = D / W * W;
  vf dot = {};
  for (int64_t d = 0; d < whole; d += W) dot += load(query + d) * load(k + d);
  if (whole < D) dot += load(query + whole) * load_part(k + whole, D - whole);
  return sum(dot);
}
// Returns the dot products of the query with n <= W keys over all D dimensions.
template <class T>
vf scores_of(const float* query, const T* k, int64_t stride, int64_t D, int64_t n) {
  vf score = {};
  int64_t d = 0;
  if (n == W) {
    for (; d + 4 * W <= D; d += 4 * W) score += dots<4>(query + d, k + d, stride);
    for (; d + W <= D; d += W) score += dots<1>(query + d, k + d, stride);
  }
  if (d < D)
    for (int64_t j = 0; j < n; ++j) score[j] += dot_one(query + d, k + j * stride + d, D - d);
  return score;
}

// Computes out[0 .. NV * W] = sum_j s[j] v[j], in blocks of BK keys: one long sum would round more.
template <int NV, class T>
void weighted_sum(const float* s, const T* v, int64_t stride, int64_t n, int64_t lanes, float* out) {
  vf total[NV] = {};
  for (int64_t begin = 0; begin < n; begin += BK) {
    const int64_t end = smaller(n, begin + BK);
    vf even[NV] = {}, odd[NV] = {};
    int64_t j = begin;
    for (; j + 2 <= end; j += 2)
      for (int i = 0; i < NV; ++i) {
        even[i] += s[j] * load_n(v + j * stride + i * W, lanes);
        odd[i] += s[j + 1] * load_n(v + (j + 1) * stride + i * W, lanes);
      }
    for (int i = 0; i < NV; ++i) {
      if (j < end) even[i] += s[j] * load_n(v + j * stride + i * W, lanes);
      total[i] += even[i] + odd[i];
    }
  }
  for (int i = 0; i < NV; ++i) store(out + i * W, total[i]);
}

template <class T>
void fwd_decode(const AttentionArgs& args, int64_t b, int64_t h, int64_t i, float* s) {
  const int64_t D = args.D, DP = round_up(D, W);
  const T* q = head_data<T>(args.q, b, h) + i * args.q.time_stride;
  const T* k = head_data<T>(args.k, b, h);
  const T* v = head_data<T>(args.v, b, h);
  float* out = s + round_up(args.Tk, W);
  float* query = out + DP;
  widen_rows(q, 0, 1, D, {query, DP});
  const Scale scale = split_scale(args.scale);
  const int64_t n = keys_seen_by(args, b, i, 1).end;
  vf best = splat(-INFINITY), total = {};
  for (int64_t j = 0; j < n; j += W) {
    const int64_t keys = smaller<int64_t>(W, n - j);
    vf score = scores_of(query, k + j * args.k.time_stride, args.k.time_stride, D, keys) * scale.sign;
    for (int64_t lane = keys; lane < W; ++lane) score[lane] = -INFINITY;
    store(s + j, score);
    best = max(score, best);
  }
  const float top = max(best), zero_at = top == -INFINITY ? 0.0f : top;
  for (int64_t j = 0; j < n; j += W) {
    const vf p = exp2((load(s + j) - zero_at) * scale.log2);
    store(s + j, p);
    total += p;
  }
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W) weighted_sum<4>(s, v + d, args.v.time_stride, n, W, out + d);
  for (; d < D; d += W) weighted_sum<1>(s, v + d, args.v.time_stride, n, smaller<int64_t>(W, D - d), out + d);
  const float weight = sum(total);
  const bool sees = n > 0;
  write_row(head_data<T>(args.out, b, h) + i * args.out.time_stride, out, sees ? 1.0f / weight : 0.0f, D);
  args.lse[(b * args.H + h) * args.Tq + i] =
      sees ? (float)((zero_at * (double)scale.log2 + log2((double)weight)) * LN2) : -INFINITY;
}

// Whether there are so few queries that dot products beat tiles.
bool decodes(const AttentionArgs& args) { return args.Tq <= 8 && args.dropout_p == 0; }

// An item is a query where attention decodes, else a block of queries.
int64_t count_items(const AttentionArgs& args) {
  return args.B * args.H * (decodes(args) ? args.Tq : (args.Tq + BQ - 1) / BQ);
}

template <class T>
void fwd_range(const AttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t DP = round_up(args.D, W), blocks = count_items(args) / (args.B * args.H);
  if (decodes(args)) {
    Scratch scores(args.Tk + 2 * DP + 256);
    for (int64_t item = begin; item < end; ++item)
      fwd_decode<T>(args, item / blocks / args.H, item / blocks % args.H, item % blocks, scores.take(0));
    return;
  }
  Scratch scratch(2 * args.Tk * DP + 3 * BQ * DP + BK * BQ + 256);
  float* keys = scratch.take(args.Tk * DP);
  float* values = scratch.take(args.Tk * DP);
  float* space = scratch.take(0);
  Matrix k{}, v{};
  for (int64_t item = begin, last = -1; item < end; ++item) {
    const int64_t head = item / blocks, b = head / args.H, h = head % args.H, turn = item % blocks;
    if (head != last) {
      k = head_matrix<T>(args.k, b, h, args.Tk, args.D, keys);
      v = head_matrix<T>(args.v, b, h, args.Tk, args.D, values);
      last = head;
    }
    // A short block alternates with a long one, so equal shares of items are equal work.
    const int64_t block = turn % 2 ? blocks - 1 - turn / 2 : turn / 2;
    fwd_block<T>(args, b, h, block * BQ, k, v, space);
  }
}

void fwd(const AttentionArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto type) { fwd_range<decltype(type)>(args, begin, end); });
}

}  // namespace

extern const AttentionFwdLoops attention_fwd = {count_items, fwd};

}  // namespace gptfast::GPTFAST_LEVEL
