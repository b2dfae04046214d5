// Attention backward, in two sweeps over the keys of a block of queries: the first computes S^T, dP^T and the sums of
// the softmax, the second normalises and multiplies. One sweep with the saved lse would be less exact: in fp32, lse is
// off by |lse| * 6e-8, and with it every P of the query, which makes up to 8 times the error of PyTorch's gradients.
// With the maximum instead, the P of a single key is exactly 1.
#include "attention_tiles.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

struct BwdSpace {
  float *q, *k, *v, *dout, *dk, *dv;  // (T x DP)
  float *q_t, *dout_t;                // (DP x BQ)
  float *p, *ds;                      // (Tk x BQ)
  float *shift, *dq;                  // (runs x BQ), (BQ x DP)
};

struct QuerySums {
  float max[BQ], p[BQ], p_dp[BQ];
};

// Replaces S^T by exp2((S^T - shift) * log2), where shift is the maximum so far, and adds to sum P and sum P dP.
void softmax_bwd_sums(float* p, const float* dp, float log2, float* shift, QuerySums& sums, int64_t keys,
                      int64_t column, int64_t end) {
  for (int64_t i = column; i < end; i += W) {
    const vf old = load(sums.max + i);
    vf best = old;
    for (int64_t j = 0; j < keys; ++j) best = max(load(p + j * BQ + i), best);
    const vf zero_at = best == -INFINITY ? vf{} : best;
    vf total = {}, weighted = {};
    for (int64_t j = 0; j < keys; ++j) {
      const vf probability = exp2((load(p + j * BQ + i) - zero_at) * log2);
      store(p + j * BQ + i, probability);
      total += probability;
      weighted += probability * load(dp + j * BQ + i);
    }
    const vf rescale = exp2((old - zero_at) * log2);
    store(shift + i, best);
    store(sums.max + i, best);
    store(sums.p + i, load(sums.p + i) * rescale + total);
    store(sums.p_dp + i, load(sums.p_dp + i) * rescale + weighted);
  }
}

// Normalises P^T and replaces dP^T by dS^T = P (dP - delta).
void softmax_bwd(float* p, float* ds, float log2, const float* shift, const QuerySums& sums, int64_t keys,
                 int64_t column, int64_t end) {
  for (int64_t i = column; i < end; i += W) {
    const vf best = load(sums.max + i), sum = load(sums.p + i);
    const vf inverse = sum == 0 ? vf{} : 1.0f / sum;  // a query that saw nothing: P = 0
    const vf factor = exp2((load(shift + i) - (best == -INFINITY ? vf{} : best)) * log2) * inverse;
    const vf delta = load(sums.p_dp + i) * inverse;
    for (int64_t j = 0; j < keys; ++j) {
      const vf probability = load(p + j * BQ + i) * factor;
      store(p + j * BQ + i, probability);
      store(ds + j * BQ + i, probability * (load(ds + j * BQ + i) - delta));
    }
  }
}

template <class T>
void bwd_head(const AttentionArgs& args, int64_t b, int64_t h, const BwdSpace& space) {
  const int64_t D = args.D, DP = round_up(D, W), head = b * args.H + h;
  const Matrix q = head_matrix<T>(args.q, b, h, args.Tq, D, space.q),
               k = head_matrix<T>(args.k, b, h, args.Tk, D, space.k);
  const Matrix v = head_matrix<T>(args.v, b, h, args.Tk, D, space.v);
  const Matrix dout = head_matrix<T>(args.dout, b, h, args.Tq, D, space.dout);
  const Scale scale = split_scale(args.scale);
  memset(space.dk, 0, sizeof(float) * args.Tk * DP);
  memset(space.dv, 0, sizeof(float) * args.Tk * DP);
  for (int64_t q0 = 0; q0 < args.Tq; q0 += BQ) {
    const int64_t rows = smaller(BQ, args.Tq - q0), first_query = args.Tk - args.Tq + q0;
    transpose({q.row(q0), q.row_stride}, rows, D, scale.sign, space.q_t);
    transpose({dout.row(q0), dout.row_stride}, rows, D, 1.0f, space.dout_t);
    QuerySums sums = {};
    for (float& best : sums.max) best = -INFINITY;
    float* shift = space.shift;
    const int64_t end = columns_used(rows);
    const Span keys_seen = keys_seen_by(args, b, q0, rows);
    for_each_run(keys_seen, [&](int64_t key, int64_t keys, int64_t column) {
      if (column >= end) return;
      float *p = space.p + key * BQ, *dp = space.ds + key * BQ;
      gemm(keys, end - column, D, k.row(key), k.row_stride, 1, space.q_t + column, BQ, p + column, BQ, false);
      gemm(keys, end - column, D, v.row(key), v.row_stride, 1, space.dout_t + column, BQ, dp + column, BQ, false);
      if (key >= keys_seen.full) mask_diagonal(p, keys_seen, key, keys, column);
      if (args.dropout_p > 0) apply_dropout(dp, args, head, first_query, key, keys, column, end);
      softmax_bwd_sums(p, dp, scale.log2, shift, sums, keys, column, end);
      shift += BQ;
    });
    memset(space.dq, 0, sizeof(float) * BQ * DP);
    shift = space.shift;
    for_each_run(keys_seen, [&](int64_t key, int64_t keys, int64_t column) {
      if (column >= end) return;
      float *p = space.p + key * BQ, *ds = space.ds + key * BQ;
      softmax_bwd(p, ds, scale.log2, shift, sums, keys, column, end);
      shift += BQ;
      if (args.dropout_p > 0) apply_dropout(p, args, head, first_query, key, keys, column, end);
      const int64_t n = rows - column, t = q0 + column;
      gemm(keys, DP, n, p + column, BQ, 1, dout.row(t), dout.row_stride, space.dv + key * DP, DP, true);
      gemm(keys, DP, n, ds + column, BQ, 1, q.row(t), q.row_stride, space.dk + key * DP, DP, true);
      gemm(n, DP, keys, ds + column, 1, BQ, k.row(key), k.row_stride, space.dq + column * DP, DP, true);
    });
    T* dq = head_data<T>(args.dq, b, h) + q0 * args.dq.time_stride;
    for (int64_t i = 0; i < rows; ++i) write_row(dq + i * args.dq.time_stride, space.dq + i * DP, args.scale, D);
  }
  for (int64_t t = 0; t < args.Tk; ++t) {
    write_row(head_data<T>(args.dk, b, h) + t * args.dk.time_stride, space.dk + t * DP, args.scale, D);
    write_row(head_data<T>(args.dv, b, h) + t * args.dv.time_stride, space.dv + t * DP, 1.0f, D);
  }
}

template <class T>
void bwd_range(const AttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t DP = round_up(args.D, W), query_floats = args.Tq * DP, key_floats = args.Tk * DP;
  const int64_t runs = args.Tk / DIAGONAL_KEYS + 2;
  Scratch scratch(2 * query_floats + 4 * key_floats + 3 * BQ * DP + (2 * args.Tk + runs) * BQ + 256);
  const BwdSpace space{.q = scratch.take(query_floats),
                       .k = scratch.take(key_floats),
                       .v = scratch.take(key_floats),
                       .dout = scratch.take(query_floats),
                       .dk = scratch.take(key_floats),
                       .dv = scratch.take(key_floats),
                       .q_t = scratch.take(BQ * DP),
                       .dout_t = scratch.take(BQ * DP),
                       .p = scratch.take(args.Tk * BQ),
                       .ds = scratch.take(args.Tk * BQ),
                       .shift = scratch.take(runs * BQ),
                       .dq = scratch.take(BQ * DP)};
  for (int64_t head = begin; head < end; ++head) bwd_head<T>(args, head / args.H, head % args.H, space);
}

void bwd(const AttentionArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto type) { bwd_range<decltype(type)>(args, begin, end); });
}

}  // namespace

extern const AttentionBwdLoops attention_bwd = {bwd};

}  // namespace gptfast::GPTFAST_LEVEL
