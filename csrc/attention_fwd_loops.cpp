// Attention forward: blocks of queries with an online softmax, or dot products where there are few queries.
#include "attention_tiles.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Returns log sum exp(scale S) from the maximum of sign S and sum exp2((sign S - max) * log2).
inline double lse_of(double max, double sum, double scale) { return max * fabs(scale) + log(sum); }

template <class R>
struct Softmax {
  R max[BQ], sum[BQ], rescale[BQ];
};

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

// A head's keys and values.
template <class R>
struct Keys {
  Matrix<R> k, v;
  bool v_finite;
};
template <class T, class R>
Keys<R> keys_of(const AttentionArgs& args, int64_t b, int64_t h, R* k_space, R* v_space) {
  const Matrix<R> v = head_matrix<T>(args.v, b, h, args.Tk, args.D, v_space);
  const int64_t length = keys_seen_by(args, b, 0, args.Tq).end;
  return {head_matrix<T>(args.k, b, h, args.Tk, args.D, k_space), v, all_finite(v, length, round_up(args.D, W))};
}

// Writes out and lse of a block of queries. Returns whether out is finite, or fp64.
template <class T, class R>
bool write_block(const AttentionArgs& args, int64_t b, int64_t h, int64_t q0, int64_t rows, R* out,
                 const Softmax<R>& state) {
  const int64_t DP = round_up(args.D, W);
  double* lse = args.lse + (b * args.H + h) * args.Tq + q0;
  T* to = head_data<T>(args.out, b, h) + q0 * args.out.time_stride;
  vf zeros = {};
  for (int64_t i = 0; i < rows; ++i) {
    // The sum is 0 for a query that sees no key, or only keys whose score is -inf.
    const bool sees = state.sum[i] != 0;
    if (!sees) memset(out + i * DP, 0, sizeof(R) * DP);
    write_row(to + i * args.out.time_stride, out + i * DP, sees ? 1 / state.sum[i] : (R)0, args.D, zeros);
    lse[i] = sees ? lse_of(state.max[i], state.sum[i], args.scale) : -INFINITY;
  }
  return sum(zeros) == 0;
}

// Returns whether all numbers were finite.
template <class T, class R>
bool fwd_block(const AttentionArgs& args, int64_t b, int64_t h, int64_t q0, int64_t rows, const Keys<R>& keys,
               RowsAhead& ahead, R* space) {
  const int64_t D = args.D, DP = round_up(D, W), terms = terms_of(args);
  const Scale<R> scale = split_scale<R>(args.scale);
  const auto [k, v, v_finite] = keys;
  R *queries = space, *q_t = queries + BQ * DP, *s = q_t + DP * BQ, *out = s + BK * BQ;
  widen_rows(head_data<T>(args.q, b, h) + q0 * args.q.time_stride, args.q.time_stride, rows, D, Matrix<R>{queries, DP});
  transpose_rows({queries, DP}, rows, DP, scale.sign, q_t);
  memset(out, 0, sizeof(R) * BQ * DP);
  Softmax<R> state;
  for (int64_t i = 0; i < BQ; ++i) state.max[i] = -INFINITY, state.sum[i] = 0;

  const Span keys_seen = keys_seen_by(args, b, q0, rows);
  const int64_t end = columns_used<R>(rows);
  for_each_run(keys_seen, [&](const Run& run) {
    const auto [key, n, column] = run;
    if (column >= end) return;
    gemm(terms, n, end - column, D, k.row(key), k.row_stride, 1, q_t + column, BQ, s + column, BQ, false, ahead);
    mask_diagonal(s, keys_seen, run, (R)-INFINITY);
    if (online_softmax(s, scale.log2, run, end, state))
      for (int64_t i = column; i < rows; ++i)
        for (int64_t d = 0; d < DP; ++d) out[i * DP + d] *= state.rescale[i];
    if (args.dropout_p > 0) apply_dropout(s, args, b * args.H + h, args.Tk - args.Tq + q0, run, end);
    if (v_finite)
      gemm(terms, rows - column, DP, n, s + column, 1, BQ, v.row(key), v.row_stride, out + column * DP, DP, true,
           ahead);
    else
      for_each_visible(s, keys_seen, run, rows,
                       [&](R p, int64_t j, int64_t i) { add_row(out + i * DP, p, v.row(key + j), DP); });
  });
  return write_block<T>(args, b, h, q0, rows, out, state) && finite_where_seen(state.max, keys_seen, rows);
}

// A few queries against a long cache use dot products and a weighted sum, no tiles.

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

// An item is a query where attention decodes, else a block of queries.
int64_t count_items(const AttentionArgs& args) {
  return args.B * args.H * (decodes(args) ? args.Tq : (args.Tq + BQ - 1) / BQ);
}

// A block of queries of one head.
struct QueryBlock {
  int64_t head, b, h, q0, rows;
};
QueryBlock block_of(const AttentionArgs& args, int64_t item) {
  const int64_t blocks = (args.Tq + BQ - 1) / BQ, head = item / blocks, turn = item % blocks;
  // A short block alternates with a long one, so equal shares of items are equal work.
  const int64_t q0 = (turn % 2 ? blocks - 1 - turn / 2 : turn / 2) * BQ;
  return {head, head / args.H, head % args.H, q0, smaller(BQ, args.Tq - q0)};
}

// Returns the rows to fetch during an item: those of its output, the queries of the next item, and this item's share of
// the next head's keys and values.
template <class T>
RowsAhead rows_ahead(const AttentionArgs& args, int64_t item, int64_t end) {
  RowsAhead ahead;
  const int64_t blocks = (args.Tq + BQ - 1) / BQ, turn = item % blocks, D = args.D;
  if (item - turn + blocks < end) {
    const QueryBlock next = block_of(args, item - turn + blocks);
    const int64_t from = args.Tk * turn / blocks, keys = args.Tk * (turn + 1) / blocks - from;
    add_ahead<T>(ahead, args.k, next.b, next.h, from, keys, D);
    add_ahead<T>(ahead, args.v, next.b, next.h, from, keys, D);
  }
  if (item + 1 < end) {
    const QueryBlock next = block_of(args, item + 1);
    add_ahead<T>(ahead, args.q, next.b, next.h, next.q0, next.rows, D);
  }
  const QueryBlock block = block_of(args, item);
  add_ahead<T>(ahead, args.out, block.b, block.h, block.q0, block.rows, D);
  return ahead;
}

// Computes items up to the first with a number that is not finite, and returns that item, or end.
template <class T, class R>
int64_t fwd_range(const AttentionArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t size = sizeof(R) / sizeof(float);
  const int64_t DP = round_up(args.D, W), blocks = count_items(args) / (args.B * args.H);
  if (decodes(args)) {
    Scratch scratch(size * (args.Tk + 2 * DP) + 256);
    R* scores = (R*)scratch.take(0);
    for (int64_t item = begin; item < end; ++item)
      if (!fwd_decode<T>(args, item / blocks / args.H, item / blocks % args.H, item % blocks, scores)) return item;
    return end;
  }
  Scratch scratch(size * (2 * args.Tk * DP + 3 * BQ * DP + BK * BQ) + 256);
  R* k_space = (R*)scratch.take(size * args.Tk * DP);
  R* v_space = (R*)scratch.take(size * args.Tk * DP);
  R* space = (R*)scratch.take(0);
  Keys<R> keys{};
  for (int64_t item = begin, last = -1; item < end; ++item) {
    const auto [head, b, h, q0, rows] = block_of(args, item);
    if (head != last) keys = keys_of<T>(args, b, h, k_space, v_space);
    last = head;
    RowsAhead ahead = rows_ahead<T>(args, item, end);
    if (!fwd_block<T>(args, b, h, q0, rows, keys, ahead, space)) return item;
  }
  return end;
}

template <class T, class R>
void fwd_items(const AttentionArgs& args, int64_t begin, int64_t end) {
  for_items<R>(begin, end,
               [&](auto number, int64_t from, int64_t to) { return fwd_range<T, decltype(number)>(args, from, to); });
}

void fwd(const AttentionArgs& args, int64_t begin, int64_t end) {
  if (fwd_in_fp64(args)) return fwd_items<float, double>(args, begin, end);
  by_dtype(args.dtype, [&](auto type) { fwd_items<decltype(type), float>(args, begin, end); });
}

}  // namespace

extern const AttentionFwdLoops attention_fwd = {count_items, fwd};

}  // namespace gptfast::GPTFAST_LEVEL
