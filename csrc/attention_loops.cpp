// Causal attention on the CPU. One thread takes a (batch, head) at a time and 64 queries of it.
//
// Scores are kept transposed, S^T (keys x queries): the softmax then runs down the rows with no
// horizontal reduction, and every product of forward and backward is one `gemm` on row-major tiles:
//   S^T = K Q^T     O = P V      dP^T = V dO^T     dV += P'^T dO     dK += dS^T Q     dQ = dS K
// where P is read transposed by strides. Keys before the diagonal are taken in blocks with no mask;
// the diagonal itself in groups of 16 keys that skip the queries before them.
#include "philox.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t BQ = 64;   // queries a block
constexpr int64_t BK = 128;  // keys a block
constexpr int64_t GROUP = 16;
constexpr float LOG2E = 1.44269504088896341f;
constexpr double LN2 = 0.693147180559945309;

// ---- C (M x N) = or += A B: A(m, k) = a[m * a_row + k * a_col], B and C row-major, N a multiple of W.

template <int MR, int NV>
void tile(int64_t K, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c, int64_t ldc,
          bool accumulate) {
  vf acc[MR][NV];
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
  // C is added last, not first: sums of sums of K terms round less than one long sum.
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      float* to = c + m * ldc + n * W;
      store(to, accumulate ? load(to) + acc[m][n] : acc[m][n]);
    }
}

using Tile = void (*)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);
constexpr int MR = 6;
constexpr int NV = W == 16 ? 4 : 2;  // 24 of 32 or 12 of 16 registers hold the tile
constexpr Tile tiles[6][4] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>}, {tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>},
    {tile<5, 1>, tile<5, 2>, tile<5, 3>, tile<5, 4>}, {tile<6, 1>, tile<6, 2>, tile<6, 3>, tile<6, 4>},
};

void gemm(int64_t M, int64_t N, int64_t K, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb,
          float* c, int64_t ldc, bool accumulate) {
  for (int64_t n = 0; n < N; n += NV * W) {
    const int64_t vectors = smaller<int64_t>(NV, (N - n) / W);
    for (int64_t m = 0; m < M; m += MR)
      tiles[smaller<int64_t>(MR, M - m) - 1][vectors - 1](K, a + m * a_row, a_row, a_col, b + n, ldb, c + m * ldc + n,
                                                          ldc, accumulate);
  }
}

// ---- Rows of one head as fp32, padded with zeros to a whole number of vectors.

struct Matrix {
  float* data;
  int64_t ld;
  float* row(int64_t t) const { return data + t * ld; }
};

template <class T>
T* head_data(const Heads& x, int64_t b, int64_t h) {
  return (T*)x.data + b * x.batch + h * x.head;
}

template <class T>
void widen_rows(const T* from, int64_t stride, int64_t rows, int64_t D, Matrix to) {
  for (int64_t t = 0; t < rows; ++t) {
    int64_t d = 0;
    for (; d + W <= D; d += W) store(to.row(t) + d, load(from + t * stride + d));
    if (d < D) store(to.row(t) + d, load_part(from + t * stride + d, D - d));
  }
}

template <class T>
Matrix matrix(const Heads& x, int64_t b, int64_t h, int64_t rows, int64_t D, float* space) {
  const Matrix packed{space, round_up(D, W)};
  widen_rows(head_data<T>(x, b, h), x.time, rows, D, packed);
  return packed;
}
// fp32 rows of whole vectors are read where they lie.
template <>
Matrix matrix<float>(const Heads& x, int64_t b, int64_t h, int64_t rows, int64_t D, float* space) {
  if (D % W == 0) return {head_data<float>(x, b, h), x.time};
  const Matrix packed{space, round_up(D, W)};
  widen_rows(head_data<float>(x, b, h), x.time, rows, D, packed);
  return packed;
}

template <class T>
void write_row(T* to, const float* from, float factor, int64_t D) {
  int64_t d = 0;
  for (; d + W <= D; d += W) store(to + d, load(from + d) * factor);
  if (d < D) store_part(to + d, load(from + d) * factor, D - d);
}

// (rows x D) -> (D x BQ), times factor; columns past rows are zero.
void transpose(Matrix from, int64_t rows, int64_t D, float factor, float* to) {
  if (rows < BQ) memset(to, 0, sizeof(float) * D * BQ);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t d = 0; d < D; ++d) to[d * BQ + t] = from.row(t)[d] * factor;
}

// ---- Which keys a block of queries sees.

// Query i of the block sees key j iff j <= i + diagonal; keys before `full` are seen by all.
struct Span {
  int64_t diagonal, full, end;
};
Span span(const AttentionArgs& args, int64_t b, int64_t q0, int64_t rows) {
  const int64_t length = args.kv_len ? smaller(larger<int64_t>(args.kv_len[b], 0), args.Tk) : args.Tk;
  const int64_t kept = args.kv_len ? args.kv_len[b] : args.Tk;
  const int64_t diagonal = kept - args.Tq + q0;
  const int64_t full = smaller(larger<int64_t>(diagonal, 0), length);
  return {diagonal, full, smaller(larger(diagonal + rows, full), length)};
}

// Calls f(key, keys, first column) for each run of keys; columns before the first see none of them.
template <class F>
void each_run(const Span& s, F f) {
  for (int64_t key = 0; key < s.full; key += BK) f(key, smaller(BK, s.full - key), (int64_t)0);
  for (int64_t key = s.full; key < s.end; key += GROUP) {
    const int64_t column = larger<int64_t>(key - s.diagonal, 0) / W * W;
    if (column < BQ) f(key, smaller(GROUP, s.end - key), column);
  }
}

// -inf where query < key, in S^T rows of a run on the diagonal.
void mask_diagonal(float* s, const Span& span, int64_t key, int64_t keys, int64_t column) {
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t i = column; i < smaller(BQ, key + j - span.diagonal); ++i) s[j * BQ + i] = -INFINITY;
}

// Multiplies S^T rows of keys [key, key + keys) by 0 or 1 / (1 - p).
void apply_dropout(float* s, const AttentionArgs& args, int64_t head, int64_t query, int64_t key, int64_t keys,
                   int64_t column) {
  const float keep = 1.0f / (1.0f - args.dropout_p);
  vu lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  for (int64_t quad = key >> 2; quad <= (key + keys - 1) >> 2; ++quad)
    for (int64_t i = column; i < BQ; i += W) {
      const vu position = lane + (uint32_t)(query + i);
      const Words words = philox(splat((uint32_t)quad), position, splat((uint32_t)head), splat(1u), args.seed);
      for (int64_t w = 0; w < 4; ++w) {
        const int64_t j = quad * 4 + w - key;
        if (j < 0 || j >= keys) continue;
        const vf factor = uniform(words.word[w]) >= splat(args.dropout_p) ? splat(keep) : vf{};
        store(s + j * BQ + i, load(s + j * BQ + i) * factor);
      }
    }
}

// ---- Forward

struct Softmax {
  float max[BQ], sum[BQ], rescale[BQ];
};

// S^T -> exp2(S^T - max), keeping max and sum per query; true if an earlier max moved.
bool online_softmax(float* s, int64_t keys, int64_t column, Softmax& state) {
  bool moved = false;
  for (int64_t i = 0; i < BQ; i += W) store(state.rescale + i, splat(1.0f));
  for (int64_t i = column; i < BQ; i += W) {
    const vf old = load(state.max + i);
    vf best = old;
    for (int64_t j = 0; j < keys; ++j) best = max(load(s + j * BQ + i), best);
    const vf shift = best == -INFINITY ? vf{} : best;
    vf total = {};
    for (int64_t j = 0; j < keys; ++j) {
      const vf p = exp2(load(s + j * BQ + i) - shift);
      store(s + j * BQ + i, p);
      total += p;
    }
    const vf rescale = exp2(old - shift);
    store(state.max + i, best);
    store(state.rescale + i, rescale);
    store(state.sum + i, load(state.sum + i) * rescale + total);
    for (int lane = 0; lane < W; ++lane) moved |= old[lane] != best[lane] && old[lane] != -INFINITY;
  }
  return moved;
}

template <class T>
void fwd_block(const AttentionArgs& args, int64_t b, int64_t h, int64_t q0, Matrix k, Matrix v, float* space) {
  const int64_t rows = smaller(BQ, args.Tq - q0), D = args.D, DP = round_up(D, W);
  float* queries = space;
  float* qt = queries + BQ * DP;
  float* s = qt + DP * BQ;
  float* out = s + BK * BQ;
  widen_rows(head_data<T>(args.q, b, h) + q0 * args.q.time, args.q.time, rows, D, {queries, DP});
  transpose({queries, DP}, rows, D, args.scale * LOG2E, qt);
  memset(out, 0, sizeof(float) * BQ * DP);
  Softmax state;
  for (int64_t i = 0; i < BQ; ++i) state.max[i] = -INFINITY, state.sum[i] = 0.0f;

  const Span keys_seen = span(args, b, q0, rows);
  each_run(keys_seen, [&](int64_t key, int64_t keys, int64_t column) {
    gemm(keys, BQ - column, D, k.row(key), k.ld, 1, qt + column, BQ, s + column, BQ, false);
    if (key >= keys_seen.full) mask_diagonal(s, keys_seen, key, keys, column);
    if (online_softmax(s, keys, column, state))
      for (int64_t i = column; i < rows; ++i)
        for (int64_t d = 0; d < DP; d += W) store(out + i * DP + d, load(out + i * DP + d) * state.rescale[i]);
    if (args.dropout_p > 0) apply_dropout(s, args, b * args.H + h, args.Tk - args.Tq + q0, key, keys, column);
    if (column < rows) gemm(rows - column, DP, keys, s + column, 1, BQ, v.row(key), v.ld, out + column * DP, DP, true);
  });
  float* lse = args.lse + (b * args.H + h) * args.Tq + q0;
  T* to = head_data<T>(args.out, b, h) + q0 * args.out.time;
  for (int64_t i = 0; i < rows; ++i) {
    const bool sees = state.sum[i] > 0 || state.sum[i] != state.sum[i];
    write_row(to + i * args.out.time, out + i * DP, sees ? 1.0f / state.sum[i] : 0.0f, D);
    lse[i] = sees ? (float)((state.max[i] + log2((double)state.sum[i])) * LN2) : -INFINITY;
  }
}

// A few queries against a long cache: dot products and a weighted sum, no tiles.

// Halves segments of 2 * HALF lanes of a, then of b, by adding their two halves.
template <int HALF, size_t... I>
vf fold(vf a, vf b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / HALF * 2 * HALF + I % HALF)...) +
         __builtin_shufflevector(a, b, (I / HALF * 2 * HALF + I % HALF + HALF)...);
}
// The sums of the lanes of W vectors, as the lanes of one.
template <int HALF>
vf lane_sums(vf* x) {
  for (int i = 0; i < HALF; ++i) x[i] = fold<HALF>(x[2 * i], x[2 * i + 1], std::make_index_sequence<W>());
  if constexpr (HALF == 1)
    return x[0];
  else
    return lane_sums<HALF / 2>(x);
}

// query . k[j] for W keys from row k on, over the first NV * W dimensions
template <int NV, class T>
vf dots(const float* query, const T* k, int64_t stride) {
  vf q[NV], dot[W];
  for (int i = 0; i < NV; ++i) q[i] = load(query + i * W);
#pragma GCC unroll 16
  for (int64_t j = 0; j < W; ++j) {
    dot[j] = q[0] * load(k + j * stride);
    for (int i = 1; i < NV; ++i) dot[j] += q[i] * load(k + j * stride + i * W);
  }
  return lane_sums<W / 2>(dot);
}
template <class T>
float dot_one(const float* query, const T* k, int64_t D) {
  const int64_t whole = D / W * W;
  vf dot = {};
  for (int64_t d = 0; d < whole; d += W) dot += load(query + d) * load(k + d);
  if (whole < D) dot += load(query + whole) * load_part(k + whole, D - whole);
  return sum(dot);
}
// the same over all D dimensions, for n <= W keys
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

// out[0 .. NV * W) = sum_j s[j] v[j]
template <int NV, class T>
void weighted_sum(const float* s, const T* v, int64_t stride, int64_t n, float* out) {
  vf even[NV] = {}, odd[NV] = {};
  int64_t j = 0;
  for (; j + 2 <= n; j += 2)
    for (int i = 0; i < NV; ++i) {
      even[i] += s[j] * load(v + j * stride + i * W);
      odd[i] += s[j + 1] * load(v + (j + 1) * stride + i * W);
    }
  for (int i = 0; i < NV; ++i) {
    if (j < n) even[i] += s[j] * load(v + j * stride + i * W);
    store(out + i * W, even[i] + odd[i]);
  }
}

template <class T>
void fwd_decode(const AttentionArgs& args, int64_t b, int64_t h, int64_t i, float* s) {
  const int64_t D = args.D, DP = round_up(D, W);
  const T* q = head_data<T>(args.q, b, h) + i * args.q.time;
  const T* k = head_data<T>(args.k, b, h);
  const T* v = head_data<T>(args.v, b, h);
  float* out = s + round_up(args.Tk, W);
  float* query = out + DP;
  widen_rows(q, 0, 1, D, {query, DP});
  const int64_t n = span(args, b, i, 1).end;
  vf best = splat(-INFINITY), total = {};
  for (int64_t j = 0; j < n; j += W) {
    const int64_t keys = smaller<int64_t>(W, n - j);
    vf score = scores_of(query, k + j * args.k.time, args.k.time, D, keys) * (args.scale * LOG2E);
    for (int64_t lane = keys; lane < W; ++lane) score[lane] = -INFINITY;
    store(s + j, score);
    best = max(score, best);
  }
  const float top = max(best), shift = top == -INFINITY ? 0.0f : top;
  for (int64_t j = 0; j < n; j += W) {
    const vf p = exp2(load(s + j) - shift);
    store(s + j, p);
    total += p;
  }
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W) weighted_sum<4>(s, v + d, args.v.time, n, out + d);
  for (; d + W <= D; d += W) weighted_sum<1>(s, v + d, args.v.time, n, out + d);
  if (d < D) {
    vf rest = {};
    for (int64_t j = 0; j < n; ++j) rest += s[j] * load_part(v + j * args.v.time + d, D - d);
    store(out + d, rest);
  }
  const float weight = sum(total);
  const bool sees = n > 0;
  write_row(head_data<T>(args.out, b, h) + i * args.out.time, out, sees ? 1.0f / weight : 0.0f, D);
  args.lse[(b * args.H + h) * args.Tq + i] = sees ? (float)((shift + log2((double)weight)) * LN2) : -INFINITY;
}

bool decodes(const AttentionArgs& args) { return args.Tq <= 8 && args.dropout_p == 0; }

int64_t fwd_items(const AttentionArgs& args) {
  return args.B * args.H * (decodes(args) ? args.Tq : (args.Tq + BQ - 1) / BQ);
}

template <class T>
void fwd_range(const AttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t DP = round_up(args.D, W), blocks = fwd_items(args) / (args.B * args.H);
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
      k = matrix<T>(args.k, b, h, args.Tk, args.D, keys);
      v = matrix<T>(args.v, b, h, args.Tk, args.D, values);
      last = head;
    }
    // A short block, then a long one, so that equal shares of items are equal work.
    const int64_t block = turn % 2 ? blocks - 1 - turn / 2 : turn / 2;
    fwd_block<T>(args, b, h, block * BQ, k, v, space);
  }
}

void fwd(const AttentionArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::fp32:
      return fwd_range<float>(args, begin, end);
    case Dtype::bf16:
      return fwd_range<bf16>(args, begin, end);
    case Dtype::fp16:
      return fwd_range<fp16>(args, begin, end);
  }
}

// ---- Backward
//
// Two sweeps over the keys of a block of queries: the first fills S^T and dP^T and takes the softmax's sums
// anew, the second normalises. The saved lse would do in one sweep, but rounded to fp32 it is off by
// |lse| * 6e-8, and every P of the query with it: up to 8 times the error of PyTorch's own gradients.

struct BwdSpace {
  float *q, *k, *v, *dout, *dk, *dv;  // (T x DP)
  float *qt, *doutt;                  // (DP x BQ)
  float *p, *ds;                      // (Tk x BQ)
  float *shift, *dq;                  // (runs x BQ), (BQ x DP)
};

struct QuerySums {
  float max[BQ], p[BQ], p_dp[BQ];
};

// S^T -> exp2(S^T - shift), shift being the maximum so far; adds to sum P and sum P dP.
void softmax_bwd_sums(float* p, const float* dp, float* shift, QuerySums& sums, int64_t keys, int64_t column) {
  for (int64_t i = column; i < BQ; i += W) {
    const vf old = load(sums.max + i);
    vf best = old;
    for (int64_t j = 0; j < keys; ++j) best = max(load(p + j * BQ + i), best);
    const vf zero_at = best == -INFINITY ? vf{} : best;
    vf total = {}, weighted = {};
    for (int64_t j = 0; j < keys; ++j) {
      const vf probability = exp2(load(p + j * BQ + i) - zero_at);
      store(p + j * BQ + i, probability);
      total += probability;
      weighted += probability * load(dp + j * BQ + i);
    }
    const vf rescale = exp2(old - zero_at);
    store(shift + i, best);
    store(sums.max + i, best);
    store(sums.p + i, load(sums.p + i) * rescale + total);
    store(sums.p_dp + i, load(sums.p_dp + i) * rescale + weighted);
  }
}

// P^T normalised, and dP^T -> dS^T = P (dP - delta).
void softmax_bwd(float* p, float* ds, const float* shift, const QuerySums& sums, int64_t keys, int64_t column) {
  for (int64_t i = column; i < BQ; i += W) {
    const vf best = load(sums.max + i), sum = load(sums.p + i);
    const vf inverse = sum == 0 ? vf{} : 1.0f / sum;  // a query that saw nothing: P = 0
    const vf factor = exp2(load(shift + i) - (best == -INFINITY ? vf{} : best)) * inverse;
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
  const Matrix q = matrix<T>(args.q, b, h, args.Tq, D, space.q), k = matrix<T>(args.k, b, h, args.Tk, D, space.k);
  const Matrix v = matrix<T>(args.v, b, h, args.Tk, D, space.v);
  const Matrix dout = matrix<T>(args.dout, b, h, args.Tq, D, space.dout);
  memset(space.dk, 0, sizeof(float) * args.Tk * DP);
  memset(space.dv, 0, sizeof(float) * args.Tk * DP);
  for (int64_t q0 = 0; q0 < args.Tq; q0 += BQ) {
    const int64_t rows = smaller(BQ, args.Tq - q0), first_query = args.Tk - args.Tq + q0;
    transpose({q.row(q0), q.ld}, rows, D, args.scale * LOG2E, space.qt);
    transpose({dout.row(q0), dout.ld}, rows, D, 1.0f, space.doutt);
    QuerySums sums = {};
    for (float& best : sums.max) best = -INFINITY;
    float* shift = space.shift;
    const Span keys_seen = span(args, b, q0, rows);
    each_run(keys_seen, [&](int64_t key, int64_t keys, int64_t column) {
      float *p = space.p + key * BQ, *dp = space.ds + key * BQ;
      gemm(keys, BQ - column, D, k.row(key), k.ld, 1, space.qt + column, BQ, p + column, BQ, false);
      gemm(keys, BQ - column, D, v.row(key), v.ld, 1, space.doutt + column, BQ, dp + column, BQ, false);
      if (key >= keys_seen.full) mask_diagonal(p, keys_seen, key, keys, column);
      if (args.dropout_p > 0) apply_dropout(dp, args, head, first_query, key, keys, column);
      softmax_bwd_sums(p, dp, shift, sums, keys, column);
      shift += BQ;
    });
    memset(space.dq, 0, sizeof(float) * BQ * DP);
    shift = space.shift;
    each_run(keys_seen, [&](int64_t key, int64_t keys, int64_t column) {
      float *p = space.p + key * BQ, *ds = space.ds + key * BQ;
      softmax_bwd(p, ds, shift, sums, keys, column);
      shift += BQ;
      if (column >= rows) return;
      if (args.dropout_p > 0) apply_dropout(p, args, head, first_query, key, keys, column);
      const int64_t n = rows - column, t = q0 + column;
      gemm(keys, DP, n, p + column, BQ, 1, dout.row(t), dout.ld, space.dv + key * DP, DP, true);
      gemm(keys, DP, n, ds + column, BQ, 1, q.row(t), q.ld, space.dk + key * DP, DP, true);
      gemm(n, DP, keys, ds + column, 1, BQ, k.row(key), k.ld, space.dq + column * DP, DP, true);
    });
    T* dq = head_data<T>(args.dq, b, h) + q0 * args.dq.time;
    for (int64_t i = 0; i < rows; ++i) write_row(dq + i * args.dq.time, space.dq + i * DP, args.scale, D);
  }
  for (int64_t t = 0; t < args.Tk; ++t) {
    write_row(head_data<T>(args.dk, b, h) + t * args.dk.time, space.dk + t * DP, args.scale, D);
    write_row(head_data<T>(args.dv, b, h) + t * args.dv.time, space.dv + t * DP, 1.0f, D);
  }
}

template <class T>
void bwd_range(const AttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t DP = round_up(args.D, W), query_floats = args.Tq * DP, key_floats = args.Tk * DP;
  const int64_t runs = args.Tk / GROUP + 2;
  Scratch scratch(2 * query_floats + 4 * key_floats + 3 * BQ * DP + (2 * args.Tk + runs) * BQ + 256);
  const BwdSpace space{.q = scratch.take(query_floats),
                       .k = scratch.take(key_floats),
                       .v = scratch.take(key_floats),
                       .dout = scratch.take(query_floats),
                       .dk = scratch.take(key_floats),
                       .dv = scratch.take(key_floats),
                       .qt = scratch.take(BQ * DP),
                       .doutt = scratch.take(BQ * DP),
                       .p = scratch.take(args.Tk * BQ),
                       .ds = scratch.take(args.Tk * BQ),
                       .shift = scratch.take(runs * BQ),
                       .dq = scratch.take(BQ * DP)};
  for (int64_t head = begin; head < end; ++head) bwd_head<T>(args, head / args.H, head % args.H, space);
}

void bwd(const AttentionArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::fp32:
      return bwd_range<float>(args, begin, end);
    case Dtype::bf16:
      return bwd_range<bf16>(args, begin, end);
    case Dtype::fp16:
      return bwd_range<fp16>(args, begin, end);
  }
}

}  // namespace

const AttentionLoops attention = {fwd_items, fwd, bwd};

}  // namespace gptfast::GPTFAST_LEVEL
