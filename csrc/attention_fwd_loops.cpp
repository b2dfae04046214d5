// Attention forward: blocks of queries with an online softmax. attention_decode.h takes a few queries.
#include "attention_bf16.h"
#include "attention_decode.h"
#include "attention_softmax.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

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

// Writes out and lse of a block of queries, whose scores are `score_unit` times those of the state. Returns whether out
// is finite, or fp64.
template <class T, class R>
bool write_block(const AttentionArgs& args, int64_t b, int64_t h, int64_t q0, int64_t rows, Matrix<R> out,
                 const Softmax<R>& state, double score_unit = 1) {
  double* lse = args.lse + (b * args.H + h) * args.Tq + q0;
  T* to = head_data<T>(args.out, b, h) + q0 * args.out.time_stride;
  vf zeros = {};
  for (int64_t i = 0; i < rows; ++i) {
    // The sum is 0 for a query that sees no key, or only keys whose score is -inf.
    const bool sees = state.sum[i] != 0;
    if (!sees) memset(out.row(i), 0, sizeof(R) * out.row_stride);
    write_row(to + i * args.out.time_stride, out.row(i), sees ? 1 / state.sum[i] : (R)0, args.D, zeros);
    lse[i] = sees ? lse_of(state.max[i], state.sum[i], args.scale * score_unit) : -INFINITY;
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
  transpose_rows({queries, DP}, rows, DP, scale.sign, {q_t, BQ});
  memset(out, 0, sizeof(R) * BQ * DP);
  Softmax<R> state = nothing_seen<R>();

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
  return write_block<T>(args, b, h, q0, rows, Matrix<R>{out, DP}, state) &&
         finite_where_seen(state.max, keys_seen, rows);
}

#ifdef GPTFAST_HAS_TILES

// A head's keys, and its values transposed, as operands of products on tiles.
struct TileKeys {
  PaddedRows k;
  bf16* v_tiles;
  bool finite;
};
// v_rows: space for the values before they are transposed.
template <class T>
void pack_keys(const AttentionArgs& args, int64_t b, int64_t h, const PaddedRows& v_rows, TileKeys& keys) {
  const int64_t length = keys_seen_by(args, b, 0, args.Tq).end;
  const bool k_finite = keys.k.copy(head_data<T>(args.k, b, h), args.k.time_stride, length, args.D, SCALE<T>);
  const bool v_finite = v_rows.copy(head_data<T>(args.v, b, h), args.v.time_stride, length, args.D, SCALE<T>);
  keys.finite = k_finite && v_finite;
  transpose_to_tiles(v_rows, keys.v_tiles);
}

struct TileFwdSpace {
  PaddedRows q;    // (BQ x DP)
  float* q_pairs;  // (DP / 2 x BQ)
  float* s;        // (BK x BQ)
  float* p_pairs;  // (BK / 2 x BQ)
  float* out_t;    // (DP x BQ)
  float* out;      // (BQ x DP)
};

// Returns whether all numbers were finite.
template <class T>
bool fwd_block_on_tiles(const AttentionArgs& args, int64_t b, int64_t h, int64_t q0, int64_t rows, const TileKeys& keys,
                        RowsAhead& ahead, const TileFwdSpace& space) {
  const int64_t DP = space.q.n, end = round_up(rows, TILE_TERMS);
  const int parts = space.q.parts;
  const Scale<float> scale = split_scale<float>(args.scale);
  const T* q = head_data<T>(args.q, b, h) + q0 * args.q.time_stride;
  if (!space.q.copy(q, args.q.time_stride, rows, args.D, scale.sign * SCALE<T>) || !keys.finite) return false;
  pair_numbers(space.q, space.q_pairs);
  memset(space.out_t, 0, sizeof(float) * DP * BQ);
  Softmax<float> state = nothing_seen<float>();
  const Span keys_seen = tiles_seen_by(args, b, q0, rows);
  for_each_run_of_tiles(keys_seen, [&](const Run& run) {
    const auto [key, n, column] = run;
    if (column >= end) return;
    multiply(parts, n, end - column, DP, keys.k.operand(key), pairs_operand(space.q_pairs + column, BQ, DP / 2 * BQ),
             space.s + column, BQ, false, ahead);
    mask_diagonal(space.s, keys_seen, run, -INFINITY);
    if (online_softmax(space.s, scale.log2 * UNSCALE<T>, run, end, state))
      for (int64_t d = 0; d < DP; ++d)
        for (int64_t i = column; i < end; i += W) {
          float* sums = space.out_t + d * BQ + i;
          store(sums, load(sums) * load(state.rescale + i));
        }
    if (args.dropout_p > 0) apply_dropout(space.s, args, b * args.H + h, args.Tk - args.Tq + q0, run, end);
    pair_scores({space.s, n, column, end, SCALE<T>, parts}, space.p_pairs);
    multiply(parts, DP, end - column, n, tiles_operand(keys.v_tiles, DP, key / TILE_TERMS, keys.k.size()),
             pairs_operand(space.p_pairs + column, BQ, SCORES_SIZE / 2), space.out_t + column, BQ, true, ahead);
  });
  transpose_rows({space.out_t, BQ}, DP, end, UNSCALE<T>, {space.out, DP});
  return write_block<T>(args, b, h, q0, rows, Matrix<float>{space.out, DP}, state, UNSCALE<T>) &&
         finite_where_seen(state.max, keys_seen, rows);
}

#endif

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

#ifdef GPTFAST_HAS_TILES

// As fwd_range, on tiles.
template <class T>
int64_t fwd_range_on_tiles(const AttentionArgs& args, int64_t begin, int64_t end) {
  const TileScope scope;
  const int parts = parts_on_tiles<T>(args);
  const int64_t DP = round_up(args.D, TILE_TERMS), TkP = round_up(args.Tk, TILE_TERMS);
  Scratch scratch(parts * (3 * TkP * DP / 2 + BQ * DP + BK * BQ / 2) + 2 * BQ * DP + BK * BQ);
  const auto take_parts = [&](int64_t numbers) { return (bf16*)scratch.take(parts * numbers / 2); };
  TileKeys keys{{take_parts(TkP * DP), TkP, DP, parts}, take_parts(TkP * DP), false};
  const PaddedRows v_rows{take_parts(TkP * DP), TkP, DP, parts};
  const TileFwdSpace space{.q = {take_parts(BQ * DP), BQ, DP, parts},
                           .q_pairs = (float*)take_parts(BQ * DP),
                           .s = scratch.take(BK * BQ),
                           .p_pairs = (float*)take_parts(BK * BQ),
                           .out_t = scratch.take(DP * BQ),
                           .out = scratch.take(BQ * DP)};
  for (int64_t item = begin, last = -1; item < end; ++item) {
    const auto [head, b, h, q0, rows] = block_of(args, item);
    if (head != last) pack_keys<T>(args, b, h, v_rows, keys);
    last = head;
    RowsAhead ahead = rows_ahead<T>(args, item, end);
    if (!fwd_block_on_tiles<T>(args, b, h, q0, rows, keys, ahead, space)) return item;
  }
  return end;
}

#endif

// Computes items in T, at first in R.
template <class T, class R>
int64_t fwd_range_by(const AttentionArgs& args, int64_t begin, int64_t end) {
#ifdef GPTFAST_HAS_TILES
  if constexpr (std::is_same_v<R, float> && HAS_PARTS<T>)
    if (!decodes(args) && parts_on_tiles<T>(args)) return fwd_range_on_tiles<T>(args, begin, end);
#endif
  return fwd_range<T, R>(args, begin, end);
}

template <class T, class R>
void fwd_items(const AttentionArgs& args, int64_t begin, int64_t end) {
  for_items<R>(begin, end, [&](auto number, int64_t from, int64_t to) {
    return fwd_range_by<T, decltype(number)>(args, from, to);
  });
}

void fwd(const AttentionArgs& args, int64_t begin, int64_t end) {
  if (fwd_in_fp64(args) && (decodes(args) || !multiplies_parts(args)))
    return fwd_items<float, double>(args, begin, end);
  by_dtype(args.dtype, [&](auto type) { fwd_items<decltype(type), float>(args, begin, end); });
}

}  // namespace

extern const AttentionFwdLoops attention_fwd = {count_items, fwd};

}  // namespace gptfast::GPTFAST_LEVEL
