// Attention backward, in two sweeps over the keys of a block of queries: the first computes S^T, dP^T and the sums of
// the softmax, the second normalises and multiplies. One sweep with the saved lse would be less exact: the
// scores are off by |score| * 6e-8, and with them every P of the query. With the maximum and the sum of the very scores
// that the second sweep reads, P sums to 1, and the P of a single key is exactly 1.
#include "attention_tiles.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

template <class R>
struct BwdSpace {
  R *k, *v, *dk, *dv;  // (Tk x DP)
  R *q, *dout, *dq;    // (BQ x DP)
  R *q_t, *dout_t;     // (DP x BQ)
  R *p, *ds;           // (Tk x BQ)
  R* shift;            // (runs x BQ)
};

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

// A head's keys and values, and which of them are finite.
template <class R>
struct BwdHead {
  int64_t b, h;
  Matrix<R> k, v;
  bool k_finite, v_finite;
};
template <class T, class R>
BwdHead<R> bwd_head_of(const AttentionArgs& args, int64_t b, int64_t h, const BwdSpace<R>& space) {
  const int64_t D = args.D, DP = round_up(D, W), length = keys_seen_by(args, b, 0, args.Tq).end;
  BwdHead<R> head{b, h};
  head.k = head_matrix<T>(args.k, b, h, args.Tk, D, space.k);
  head.v = head_matrix<T>(args.v, b, h, args.Tk, D, space.v);
  head.k_finite = all_finite(head.k, length, DP);
  head.v_finite = all_finite(head.v, length, DP);
  return head;
}

// The first sweep over the keys of a block of queries.
template <class R>
void sum_block(const AttentionArgs& args, const BwdHead<R>& head, int64_t q0, int64_t end, const Span& keys_seen,
               const BwdSpace<R>& space, RowsAhead& ahead, QuerySums<R>& sums) {
  const R log2 = split_scale<R>(args.scale).log2;
  const int64_t D = args.D, terms = terms_of(args), first_query = args.Tk - args.Tq + q0;
  const auto& [b, h, k, v, k_finite, v_finite] = head;
  R* shift = space.shift;
  for_each_run(keys_seen, [&](const Run& run) {
    const auto [key, keys, column] = run;
    if (column >= end) return;
    R *p = space.p + key * BQ, *dp = space.ds + key * BQ;
    gemm(terms, keys, end - column, D, k.row(key), k.row_stride, 1, space.q_t + column, BQ, p + column, BQ, false,
         ahead);
    gemm(terms, keys, end - column, D, v.row(key), v.row_stride, 1, space.dout_t + column, BQ, dp + column, BQ, false,
         ahead);
    mask_diagonal(p, keys_seen, run, (R)-INFINITY);
    if (!v_finite) mask_diagonal(dp, keys_seen, run, (R)0);
    if (args.dropout_p > 0) apply_dropout(dp, args, b * args.H + h, first_query, run, end);
    softmax_bwd_sums(p, dp, log2, shift, sums, run, end);
    shift += BQ;
  });
}

// The second sweep: adds to dk and dv of the head, and sets dq of the block.
template <class R>
void multiply_block(const AttentionArgs& args, const BwdHead<R>& head, int64_t q0, int64_t rows, const Span& keys_seen,
                    const BwdSpace<R>& space, RowsAhead& ahead, const QuerySums<R>& sums) {
  const R log2 = split_scale<R>(args.scale).log2;
  const int64_t DP = round_up(args.D, W), terms = terms_of(args), end = columns_used<R>(rows);
  const auto& [b, h, k, v, k_finite, v_finite] = head;
  const Matrix<R> q{space.q, DP}, dout{space.dout, DP};
  const bool finite = k_finite && all_finite(q, rows, DP) && all_finite(Matrix<R>{(R*)sums.p, BQ}, 2, end);
  memset(space.dq, 0, sizeof(R) * BQ * DP);
  const R* shift = space.shift;
  for_each_run(keys_seen, [&](const Run& run) {
    const auto [key, keys, column] = run;
    if (column >= end) return;
    R *p = space.p + key * BQ, *ds = space.ds + key * BQ, *dk = space.dk + key * DP, *dv = space.dv + key * DP;
    softmax_bwd(p, ds, log2, shift, sums, run, end);
    shift += BQ;
    if (args.dropout_p > 0) apply_dropout(p, args, b * args.H + h, args.Tk - args.Tq + q0, run, end);
    const int64_t n = rows - column;
    if (finite) {
      gemm(terms, keys, DP, n, p + column, BQ, 1, dout.row(column), DP, dv, DP, true, ahead);
      gemm(terms, keys, DP, n, ds + column, BQ, 1, q.row(column), DP, dk, DP, true, ahead);
      gemm(terms, n, DP, keys, ds + column, 1, BQ, k.row(key), k.row_stride, space.dq + column * DP, DP, true, ahead);
      return;
    }
    for_each_visible(p, keys_seen, run, rows,
                     [&](R x, int64_t j, int64_t i) { add_row(dv + j * DP, x, dout.row(i), DP); });
    for_each_visible(ds, keys_seen, run, rows, [&](R x, int64_t j, int64_t i) {
      add_row(dk + j * DP, x, q.row(i), DP);
      add_row(space.dq + i * DP, x, k.row(key + j), DP);
    });
  });
}

// Returns the rows to fetch during a block of queries: those of its dq and the next block's q and dout. The last block
// of a head fetches those of dk and dv, and the next head's.
template <class T>
RowsAhead rows_ahead(const AttentionArgs& args, int64_t head, int64_t q0, int64_t end) {
  RowsAhead ahead;
  const int64_t D = args.D, b = head / args.H, h = head % args.H;
  const bool last = q0 + BQ >= args.Tq;
  const int64_t next = last ? head + 1 : head, next_b = next / args.H, next_h = next % args.H;
  const int64_t next_q0 = last ? 0 : q0 + BQ, next_rows = smaller(BQ, args.Tq - next_q0);
  if (last && next < end) {
    add_ahead<T>(ahead, args.k, next_b, next_h, 0, args.Tk, D);
    add_ahead<T>(ahead, args.v, next_b, next_h, 0, args.Tk, D);
  }
  if (next < end) {
    add_ahead<T>(ahead, args.q, next_b, next_h, next_q0, next_rows, D);
    add_ahead<T>(ahead, args.dout, next_b, next_h, next_q0, next_rows, D);
  }
  if (last) {
    add_ahead<T>(ahead, args.dk, b, h, 0, args.Tk, D);
    add_ahead<T>(ahead, args.dv, b, h, 0, args.Tk, D);
  }
  add_ahead<T>(ahead, args.dq, b, h, q0, smaller(BQ, args.Tq - q0), D);
  return ahead;
}

// Computes head b, h, one of those before head `end`. Returns whether all numbers were finite.
template <class T, class R>
bool bwd_head(const AttentionArgs& args, int64_t b, int64_t h, int64_t end, const BwdSpace<R>& space) {
  const int64_t D = args.D, DP = round_up(D, W);
  bool finite = true;
  vf zeros = {};
  const BwdHead<R> head = bwd_head_of<T>(args, b, h, space);
  memset(space.dk, 0, sizeof(R) * args.Tk * DP);
  memset(space.dv, 0, sizeof(R) * args.Tk * DP);
  for (int64_t q0 = 0; q0 < args.Tq; q0 += BQ) {
    const int64_t rows = smaller(BQ, args.Tq - q0);
    const Span keys_seen = keys_seen_by(args, b, q0, rows);
    const Matrix<R> q{space.q, DP}, dout{space.dout, DP};
    widen_rows(head_data<T>(args.q, b, h) + q0 * args.q.time_stride, args.q.time_stride, rows, D, q);
    widen_rows(head_data<T>(args.dout, b, h) + q0 * args.dout.time_stride, args.dout.time_stride, rows, D, dout);
    RowsAhead ahead = rows_ahead<T>(args, b * args.H + h, q0, end);
    transpose_rows(q, rows, DP, split_scale<R>(args.scale).sign, space.q_t);
    transpose_rows(dout, rows, DP, (R)1, space.dout_t);
    QuerySums<R> sums = {};
    for (R& best : sums.max) best = -INFINITY;
    sum_block(args, head, q0, columns_used<R>(rows), keys_seen, space, ahead, sums);
    finite = finite && finite_where_seen(sums.max, keys_seen, rows);
    multiply_block(args, head, q0, rows, keys_seen, space, ahead, sums);
    T* dq = head_data<T>(args.dq, b, h) + q0 * args.dq.time_stride;
    for (int64_t i = 0; i < rows; ++i)
      write_row(dq + i * args.dq.time_stride, space.dq + i * DP, (R)args.scale, D, zeros);
  }
  for (int64_t t = 0; t < args.Tk; ++t) {
    write_row(head_data<T>(args.dk, b, h) + t * args.dk.time_stride, space.dk + t * DP, (R)args.scale, D, zeros);
    write_row(head_data<T>(args.dv, b, h) + t * args.dv.time_stride, space.dv + t * DP, (R)1, D, zeros);
  }
  return finite && sum(zeros) == 0;
}

// Computes heads up to the first with a number that is not finite, and returns that head, or end.
template <class T, class R>
int64_t bwd_range(const AttentionArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t size = sizeof(R) / sizeof(float);
  const int64_t DP = round_up(args.D, W), key_numbers = args.Tk * DP, block_numbers = BQ * DP;
  const int64_t runs = args.Tk / DIAGONAL_KEYS + 2;
  Scratch scratch(size * (4 * key_numbers + 5 * block_numbers + (2 * args.Tk + runs) * BQ) + 256);
  const auto take = [&](int64_t numbers) { return (R*)scratch.take(size * numbers); };
  const BwdSpace<R> space{.k = take(key_numbers),
                          .v = take(key_numbers),
                          .dk = take(key_numbers),
                          .dv = take(key_numbers),
                          .q = take(block_numbers),
                          .dout = take(block_numbers),
                          .dq = take(block_numbers),
                          .q_t = take(block_numbers),
                          .dout_t = take(block_numbers),
                          .p = take(args.Tk * BQ),
                          .ds = take(args.Tk * BQ),
                          .shift = take(runs * BQ)};
  for (int64_t head = begin; head < end; ++head)
    if (!bwd_head<T>(args, head / args.H, head % args.H, end, space)) return head;
  return end;
}

template <class T, class R>
void bwd_items(const AttentionArgs& args, int64_t begin, int64_t end) {
  for_items<R>(begin, end,
               [&](auto number, int64_t from, int64_t to) { return bwd_range<T, decltype(number)>(args, from, to); });
}

void bwd(const AttentionArgs& args, int64_t begin, int64_t end) {
  if (computes_in_fp64(args)) return bwd_items<float, double>(args, begin, end);
  by_dtype(args.dtype, [&](auto type) { bwd_items<decltype(type), float>(args, begin, end); });
}

}  // namespace

extern const AttentionBwdLoops attention_bwd = {bwd};

}  // namespace gptfast::GPTFAST_LEVEL
