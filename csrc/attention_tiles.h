// Shared by the forward and the backward of attention: matrix products on tiles, and which keys a query sees.
//
// One thread takes a (batch, head) at a time and 64 queries of it. Scores are kept transposed, S^T (keys x queries):
// the softmax then runs down the rows with no sum across lanes, and every product of forward and backward is one `gemm`
// on row-major tiles:
//   S^T = K Q^T     O = P V      dP^T = V dO^T     dV += P'^T dO     dK += dS^T Q     dQ = dS K
// where P is read transposed by strides. Keys before the diagonal are taken in blocks without a mask. The diagonal is
// taken in groups of 16 keys, which skip the queries that see none of the group.
#pragma once

#include "maths.h"
#include "philox.h"
#include "scratch.h"
#include "tile.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t BQ = 64;             // queries in a block
constexpr int64_t BK = 128;            // keys in a block
constexpr int64_t DIAGONAL_KEYS = 16;  // keys in a group on the diagonal
constexpr float LOG2E = 1.44269504088896341f;
constexpr double LN2 = 0.693147180559945309;

// Sets c to the product of a tile, or adds it.
template <int MR, int NV>
void tile(int64_t K, const float* a, int64_t a_row_stride, int64_t a_col_stride, const float* b, int64_t b_row_stride,
          float* c, int64_t c_row_stride, bool accumulate) {
  vf acc[MR][NV];
  sum_products(acc, K, a, a_row_stride, a_col_stride, b, b_row_stride);
  // c is added last: a sum of sums of K terms rounds less than one long sum.
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      float* to = c + m * c_row_stride + n * W;
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

// Terms in a block of a sum; a longer sum is a sum of blocks, which rounds less. A single vector of columns (few
// queries) leaves registers and time for short blocks.
constexpr int64_t KB = 128;
constexpr int64_t KB_NARROW = 8;

// Computes C (M x N) = A B or C += A B, where A(m, k) = a[m * a_row_stride + k * a_col_stride], B and C are row-major,
// and N is a multiple of W.
inline void gemm(int64_t M, int64_t N, int64_t K, const float* a, int64_t a_row_stride, int64_t a_col_stride,
                 const float* b, int64_t b_row_stride, float* c, int64_t c_row_stride, bool accumulate) {
  const int64_t terms = N == W ? KB_NARROW : KB;
  for (int64_t k = 0; k < K; k += terms)
    for (int64_t n = 0; n < N; n += NV * W) {
      const int64_t vectors = smaller<int64_t>(NV, (N - n) / W);
      for (int64_t m = 0; m < M; m += MR)
        tiles[smaller<int64_t>(MR, M - m) - 1][vectors - 1](
            smaller(terms, K - k), a + m * a_row_stride + k * a_col_stride, a_row_stride, a_col_stride,
            b + k * b_row_stride + n, b_row_stride, c + m * c_row_stride + n, c_row_stride, accumulate || k > 0);
    }
}

// Rows of one head as fp32, padded with zeros to a whole number of vectors.
struct Matrix {
  float* data;
  int64_t row_stride;
  float* row(int64_t t) const { return data + t * row_stride; }
};

template <class T>
T* head_data(const Heads& x, int64_t b, int64_t h) {
  return (T*)x.data + b * x.batch_stride + h * x.head_stride;
}

template <class T>
void widen_rows(const T* from, int64_t stride, int64_t rows, int64_t D, Matrix to) {
  for (int64_t t = 0; t < rows; ++t) {
    int64_t d = 0;
    for (; d + W <= D; d += W) store(to.row(t) + d, load(from + t * stride + d));
    if (d < D) store(to.row(t) + d, load_part(from + t * stride + d, D - d));
  }
}

// Copies a head to `space` as fp32. fp32 rows of whole vectors stay in place.
template <class T>
Matrix head_matrix(const Heads& x, int64_t b, int64_t h, int64_t rows, int64_t D, float* space) {
  const Matrix packed{space, round_up(D, W)};
  widen_rows(head_data<T>(x, b, h), x.time_stride, rows, D, packed);
  return packed;
}
template <>
inline Matrix head_matrix<float>(const Heads& x, int64_t b, int64_t h, int64_t rows, int64_t D, float* space) {
  if (D % W == 0) return {head_data<float>(x, b, h), x.time_stride};
  const Matrix packed{space, round_up(D, W)};
  widen_rows(head_data<float>(x, b, h), x.time_stride, rows, D, packed);
  return packed;
}

template <class T>
void write_row(T* to, const float* from, float factor, int64_t D) {
  int64_t d = 0;
  for (; d + W <= D; d += W) store(to + d, load(from + d) * factor);
  if (d < D) store_part(to + d, load(from + d) * factor, D - d);
}

// Writes the transpose of from (rows x D), times factor, to `to` (D x BQ). Columns past `rows` are zero.
inline void transpose(Matrix from, int64_t rows, int64_t D, float factor, float* to) {
  if (rows < BQ) memset(to, 0, sizeof(float) * D * BQ);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t d = 0; d < D; ++d) to[d * BQ + t] = from.row(t)[d] * factor;
}

// The keys that a block of queries sees: query i sees key j if j <= i + diagonal and j < end. All queries see the keys
// before `full`.
struct Span {
  int64_t diagonal, full, end;
};
inline Span keys_seen_by(const AttentionArgs& args, int64_t b, int64_t q0, int64_t rows) {
  const int64_t length = args.kv_len ? smaller(larger<int64_t>(args.kv_len[b], 0), args.Tk) : args.Tk;
  const int64_t kept = args.kv_len ? args.kv_len[b] : args.Tk;
  const int64_t diagonal = kept - args.Tq + q0;
  const int64_t full = smaller(larger<int64_t>(diagonal, 0), length);
  return {diagonal, full, smaller(larger(diagonal + rows, full), length)};
}

// The scale in two parts: S^T is K times (sign Q)^T, and P is exp2((S^T - max) * log2), so that no query is rounded,
// the subtraction is exact where P is large, and the P of a single key is exactly 1.
struct Scale {
  float sign, log2;
};
inline Scale split_scale(float scale) {
  const float log2 = fabsf(scale) * LOG2E;
  if (log2 == 0) return {0.0f, 1.0f};
  return {scale < 0 ? -1.0f : 1.0f, log2};
}

// Returns the number of columns of S^T that a block of `rows` queries uses.
inline int64_t columns_used(int64_t rows) { return round_up(rows, W); }

// Calls f(key, keys, first column) for each run of keys. The queries in columns before the first see none of the run.
template <class F>
void for_each_run(const Span& s, F f) {
  for (int64_t key = 0; key < s.full; key += BK) f(key, smaller(BK, s.full - key), (int64_t)0);
  for (int64_t key = s.full; key < s.end; key += DIAGONAL_KEYS) {
    const int64_t column = larger<int64_t>(key - s.diagonal, 0) / W * W;
    if (column < BQ) f(key, smaller(DIAGONAL_KEYS, s.end - key), column);
  }
}

// Sets scores to -inf where the query comes before the key, in S^T rows of a run on the diagonal.
inline void mask_diagonal(float* s, const Span& span, int64_t key, int64_t keys, int64_t column) {
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t i = column; i < smaller(BQ, key + j - span.diagonal); ++i) s[j * BQ + i] = -INFINITY;
}

// Multiplies S^T rows of keys key .. key + keys, columns column .. end, by 0 or 1 / (1 - p).
inline void apply_dropout(float* s, const AttentionArgs& args, int64_t head, int64_t query, int64_t key, int64_t keys,
                          int64_t column, int64_t end) {
  const float keep = 1.0f / (1.0f - args.dropout_p);
  for (int64_t quad = key >> 2; quad <= (key + keys - 1) >> 2; ++quad)
    for (int64_t i = column; i < end; i += W) {
      const vu position = iota() + (uint32_t)(query + i);
      const Words words = philox(splat((uint32_t)quad), position, splat((uint32_t)head), splat(1u), args.seed);
      for (int64_t w = 0; w < 4; ++w) {
        const int64_t j = quad * 4 + w - key;
        if (j < 0 || j >= keys) continue;
        const vf factor = uniform(words.word[w]) >= splat(args.dropout_p) ? splat(keep) : vf{};
        store(s + j * BQ + i, load(s + j * BQ + i) * factor);
      }
    }
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
