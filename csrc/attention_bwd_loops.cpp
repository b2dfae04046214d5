// Attention backward, in two sweeps over the keys of a block of queries: the first computes S^T, dP^T and the sums of
// the softmax, the second normalises and multiplies. One sweep with the saved lse would be less exact: the
// scores are off by |score| * 6e-8, and with them every P of the query. With the maximum and the sum of the very scores
// that the second sweep reads, P sums to 1, and the P of a single key is exactly 1.
#include "attention_bf16.h"
#include "attention_softmax.h"

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

// Writes the gradients of keys and values, which are `unit` times dk and dv. A lane of `zeros` becomes NaN where a
// number is not finite.
template <class T, class R>
void write_key_gradients(const AttentionArgs& args, int64_t b, int64_t h, Matrix<R> dk, Matrix<R> dv, R unit,
                         vf& zeros) {
  const R scale = (R)args.scale * unit;
  for (int64_t t = 0; t < args.Tk; ++t) {
    write_row(head_data<T>(args.dk, b, h) + t * args.dk.time_stride, dk.row(t), scale, args.D, zeros);
    write_row(head_data<T>(args.dv, b, h) + t * args.dv.time_stride, dv.row(t), unit, args.D, zeros);
  }
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
    transpose_rows(q, rows, DP, split_scale<R>(args.scale).sign, {space.q_t, BQ});
    transpose_rows(dout, rows, DP, (R)1, {space.dout_t, BQ});
    QuerySums<R> sums = {};
    for (R& best : sums.max) best = -INFINITY;
    sum_block(args, head, q0, columns_used<R>(rows), keys_seen, space, ahead, sums);
    finite = finite && finite_where_seen(sums.max, keys_seen, rows);
    multiply_block(args, head, q0, rows, keys_seen, space, ahead, sums);
    T* dq = head_data<T>(args.dq, b, h) + q0 * args.dq.time_stride;
    for (int64_t i = 0; i < rows; ++i)
      write_row(dq + i * args.dq.time_stride, space.dq + i * DP, (R)args.scale, D, zeros);
  }
  write_key_gradients<T>(args, b, h, Matrix<R>{space.dk, DP}, Matrix<R>{space.dv, DP}, (R)1, zeros);
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

#ifdef GPTFAST_HAS_TILES

struct TileBwdSpace {
  PaddedRows k, v;                  // (Tk x DP), in parts, as all of bf16 and all pairs
  bf16* k_tiles;                    // k transposed
  float *dk, *dv;                   // (Tk x DP)
  PaddedRows q, dout;               // (BQ x DP)
  float *q_t_pairs, *dout_t_pairs;  // (DP / 2 x BQ)
  float *q_pairs, *dout_pairs;      // (BQ / 2 x DP)
  float *dq_t, *dq;                 // (DP x BQ), (BQ x DP)
  float *p, *ds;                    // (Tk x BQ)
  bf16* narrow;                     // (BK x BQ)
  float* ds_pairs;                  // (BK / 2 x BQ)
  float* shift;                     // (runs x BQ)
};

// Packs a block of queries and its dout. Returns whether all numbers are finite.
template <class T>
bool pack_queries(const AttentionArgs& args, int64_t b, int64_t h, int64_t q0, int64_t rows,
                  const TileBwdSpace& space) {
  const float sign = split_scale<float>(args.scale).sign;
  const T* q = head_data<T>(args.q, b, h) + q0 * args.q.time_stride;
  const T* dout = head_data<T>(args.dout, b, h) + q0 * args.dout.time_stride;
  const bool q_finite = space.q.copy(q, args.q.time_stride, rows, args.D, SCALE<T>);
  pair_rows(space.q, space.q_pairs);
  if (sign != 1) space.q.copy(q, args.q.time_stride, rows, args.D, sign * SCALE<T>);
  pair_numbers(space.q, space.q_t_pairs);
  const bool dout_finite = space.dout.copy(dout, args.dout.time_stride, rows, args.D, SCALE<T>);
  pair_numbers(space.dout, space.dout_t_pairs);
  pair_rows(space.dout, space.dout_pairs);
  return q_finite && dout_finite;
}

// Computes a block of queries: sets dq_t, and adds to dk and dv. Returns whether all numbers before those were finite.
template <class T>
bool bwd_block_on_tiles(const AttentionArgs& args, int64_t b, int64_t h, int64_t q0, int64_t rows, RowsAhead& ahead,
                        const TileBwdSpace& space) {
  const float log2 = split_scale<float>(args.scale).log2 * UNSCALE<T>;
  const int64_t DP = space.q.n, end = round_up(rows, TILE_TERMS), first_query = args.Tk - args.Tq + q0;
  const int64_t block_pairs = BQ * DP / 2;
  const int parts = space.q.parts;
  const auto drop = [&](float* s, const Run& run) {
    if (args.dropout_p > 0) apply_dropout(s, args, b * args.H + h, first_query, run, end);
  };
  const Span keys_seen = tiles_seen_by(args, b, q0, rows);
  QuerySums<float> sums = {};
  for (float& best : sums.max) best = -INFINITY;
  float* shift = space.shift;
  for_each_run_of_tiles(keys_seen, [&](const Run& run) {
    const auto [key, keys, column] = run;
    if (column >= end) return;
    float *p = space.p + key * BQ, *dp = space.ds + key * BQ;
    multiply(parts, keys, end - column, DP, space.k.operand(key),
             pairs_operand(space.q_t_pairs + column, BQ, block_pairs), p + column, BQ, false, ahead);
    multiply(parts, keys, end - column, DP, space.v.operand(key),
             pairs_operand(space.dout_t_pairs + column, BQ, block_pairs), dp + column, BQ, false, ahead);
    mask_diagonal(p, keys_seen, run, -INFINITY);
    drop(dp, run);
    softmax_bwd_sums(p, dp, log2, shift, sums, run, end);
    shift += BQ;
  });
  if (!finite_where_seen(sums.max, keys_seen, rows) || !all_finite(Matrix<float>{sums.p, BQ}, 2, end)) return false;
  memset(space.dq_t, 0, sizeof(float) * DP * BQ);
  shift = space.shift;
  for_each_run_of_tiles(keys_seen, [&](const Run& run) {
    const auto [key, keys, column] = run;
    if (column >= end) return;
    float *p = space.p + key * BQ, *ds = space.ds + key * BQ;
    softmax_bwd(p, ds, log2, shift, sums, run, end);
    shift += BQ;
    drop(p, run);
    const auto add_over_queries = [&](const Scores& factors, const float* pairs, float* to) {
      narrow_scores(factors, space.narrow);
      multiply(parts, keys, DP, end - column, rows_operand(space.narrow + column, BQ, SCORES_SIZE),
               pairs_operand(pairs + column / 2 * DP, DP, block_pairs), to + key * DP, DP, true, ahead);
    };
    // dS is a product of two operands already.
    const Scores p_factors{p, keys, column, end, SCALE<T>, parts};
    const Scores ds_factors{ds, keys, column, end, SCALE<T> * UNSCALE<T>, parts};
    add_over_queries(p_factors, space.dout_pairs, space.dv);
    add_over_queries(ds_factors, space.q_pairs, space.dk);
    pair_scores(ds_factors, space.ds_pairs);
    multiply(parts, DP, end - column, keys, tiles_operand(space.k_tiles, DP, key / TILE_TERMS, space.k.size()),
             pairs_operand(space.ds_pairs + column, BQ, SCORES_SIZE / 2), space.dq_t + column, BQ, true, ahead);
  });
  return true;
}

// As bwd_head, on tiles. A head with a number that is not finite is left to bwd_head.
template <class T>
bool bwd_head_on_tiles(const AttentionArgs& args, int64_t b, int64_t h, int64_t end, const TileBwdSpace& space) {
  const int64_t D = args.D, DP = space.k.n, length = keys_seen_by(args, b, 0, args.Tq).end;
  const bool k_finite = space.k.copy(head_data<T>(args.k, b, h), args.k.time_stride, length, D, SCALE<T>);
  const bool v_finite = space.v.copy(head_data<T>(args.v, b, h), args.v.time_stride, length, D, SCALE<T>);
  if (!k_finite || !v_finite) return false;
  transpose_to_tiles(space.k, space.k_tiles);
  memset(space.dk, 0, sizeof(float) * space.k.rows * DP);
  memset(space.dv, 0, sizeof(float) * space.v.rows * DP);
  vf zeros = {};
  for (int64_t q0 = 0; q0 < args.Tq; q0 += BQ) {
    const int64_t rows = smaller(BQ, args.Tq - q0);
    RowsAhead ahead = rows_ahead<T>(args, b * args.H + h, q0, end);
    if (!pack_queries<T>(args, b, h, q0, rows, space) || !bwd_block_on_tiles<T>(args, b, h, q0, rows, ahead, space))
      return false;
    transpose_rows({space.dq_t, BQ}, DP, round_up(rows, TILE_TERMS), UNSCALE<T>, {space.dq, DP});
    T* dq = head_data<T>(args.dq, b, h) + q0 * args.dq.time_stride;
    for (int64_t i = 0; i < rows; ++i)
      write_row(dq + i * args.dq.time_stride, space.dq + i * DP, (float)args.scale, D, zeros);
  }
  write_key_gradients<T>(args, b, h, Matrix<float>{space.dk, DP}, Matrix<float>{space.dv, DP}, UNSCALE<T>, zeros);
  return sum(zeros) == 0;
}

// As bwd_range, on tiles.
template <class T>
int64_t bwd_range_on_tiles(const AttentionArgs& args, int64_t begin, int64_t end) {
  const TileScope scope;
  const int parts = parts_on_tiles<T>(args);
  const int64_t DP = round_up(args.D, TILE_TERMS), TkP = round_up(args.Tk, TILE_TERMS);
  const int64_t key_numbers = TkP * DP, block_numbers = BQ * DP, runs = TkP / TILE_TERMS + 1;
  Scratch scratch(parts * (key_numbers * 3 / 2 + block_numbers * 3 + BK * BQ) + 2 * (key_numbers + block_numbers) +
                  TkP * BQ * 2 + runs * BQ);
  const auto take_parts = [&](int64_t numbers) { return (bf16*)scratch.take(parts * numbers / 2); };
  const TileBwdSpace space{.k = {take_parts(key_numbers), TkP, DP, parts},
                           .v = {take_parts(key_numbers), TkP, DP, parts},
                           .k_tiles = take_parts(key_numbers),
                           .dk = scratch.take(key_numbers),
                           .dv = scratch.take(key_numbers),
                           .q = {take_parts(block_numbers), BQ, DP, parts},
                           .dout = {take_parts(block_numbers), BQ, DP, parts},
                           .q_t_pairs = (float*)take_parts(block_numbers),
                           .dout_t_pairs = (float*)take_parts(block_numbers),
                           .q_pairs = (float*)take_parts(block_numbers),
                           .dout_pairs = (float*)take_parts(block_numbers),
                           .dq_t = scratch.take(block_numbers),
                           .dq = scratch.take(block_numbers),
                           .p = scratch.take(TkP * BQ),
                           .ds = scratch.take(TkP * BQ),
                           .narrow = take_parts(BK * BQ),
                           .ds_pairs = (float*)take_parts(BK * BQ),
                           .shift = scratch.take(runs * BQ)};
  for (int64_t head = begin; head < end; ++head)
    if (!bwd_head_on_tiles<T>(args, head / args.H, head % args.H, end, space)) return head;
  return end;
}

#endif

// Computes heads in T, at first in R.
template <class T, class R>
int64_t bwd_range_by(const AttentionArgs& args, int64_t begin, int64_t end) {
#ifdef GPTFAST_HAS_TILES
  if constexpr (std::is_same_v<R, float> && HAS_PARTS<T>)
    if (parts_on_tiles<T>(args)) return bwd_range_on_tiles<T>(args, begin, end);
#endif
  return bwd_range<T, R>(args, begin, end);
}

template <class T, class R>
void bwd_items(const AttentionArgs& args, int64_t begin, int64_t end) {
  for_items<R>(begin, end, [&](auto number, int64_t from, int64_t to) {
    return bwd_range_by<T, decltype(number)>(args, from, to);
  });
}

void bwd(const AttentionArgs& args, int64_t begin, int64_t end) {
  if (computes_in_fp64(args) && !multiplies_parts(args)) return bwd_items<float, double>(args, begin, end);
  by_dtype(args.dtype, [&](auto type) { bwd_items<decltype(type), float>(args, begin, end); });
}

}  // namespace

extern const AttentionBwdLoops attention_bwd = {bwd};

}  // namespace gptfast::GPTFAST_LEVEL
