// Shared by the forward and the backward of attention: matrix products on tiles, and which keys a query sees.
//
// One thread takes a (batch, head) at a time and 64 queries of it. Scores are kept transposed, S^T (keys x queries):
// the softmax then runs down the rows with no sum across lanes, and every product of forward and backward is one `gemm`
// on row-major tiles:
//   S^T = K Q^T     O = P V      dP^T = V dO^T     dV += P'^T dO     dK += dS^T Q     dQ = dS K
// where P is read transposed by strides. Keys before the diagonal are taken in blocks without a mask. The diagonal is
// taken in groups of 16 keys, which skip the queries that see none of the group.
#pragma once

#include <type_traits>

#include "attention_numbers.h"
#include "panels.h"
#include "philox.h"
#include "scratch.h"
#include "tile.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t BQ = 64;             // queries in a block
constexpr int64_t BK = 128;            // keys in a block
constexpr int64_t DIAGONAL_KEYS = 16;  // keys in a group on the diagonal
constexpr double LOG2E = 1.44269504088896341;
// fp32 attention computes in fp64 up to this many queries, and below this many products of queries, keys and dimensions
// if there are few dimensions. With short vectors, whose sums are longer, it does so below more.
constexpr int64_t FP64_QUERIES = 32;
constexpr int64_t FP64_WORK = W == 4 ? 1 << 20 : 1 << 18;
constexpr int64_t FEW_DIMENSIONS = W == 4 ? 128 : 24;

// Sets c to the product of a tile, or adds it.
template <class R, int MR, int NV>
void tile(int64_t K, const R* a, int64_t a_row_stride, int64_t a_col_stride, const R* b, int64_t b_row_stride, R* c,
          int64_t c_row_stride, bool accumulate) {
  Vec<R> acc[MR][NV];
  sum_products(acc, K, a, a_row_stride, a_col_stride, b, b_row_stride);
  // c is added last: a sum of sums of K terms rounds less than one long sum.
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      R* to = c + m * c_row_stride + n * LANES<R>;
      store(to, accumulate ? load(to) + acc[m][n] : acc[m][n]);
    }
}

template <class R>
using Tile = void (*)(int64_t, const R*, int64_t, int64_t, const R*, int64_t, R*, int64_t, bool);
constexpr int MR = 6;
constexpr int NV = REGISTERS == 32 ? 4 : 2;  // 24 of 32 or 12 of 16 registers hold the tile
template <class R>
constexpr Tile<R> tiles[6][4] = {
    {tile<R, 1, 1>, tile<R, 1, 2>, tile<R, 1, 3>, tile<R, 1, 4>},
    {tile<R, 2, 1>, tile<R, 2, 2>, tile<R, 2, 3>, tile<R, 2, 4>},
    {tile<R, 3, 1>, tile<R, 3, 2>, tile<R, 3, 3>, tile<R, 3, 4>},
    {tile<R, 4, 1>, tile<R, 4, 2>, tile<R, 4, 3>, tile<R, 4, 4>},
    {tile<R, 5, 1>, tile<R, 5, 2>, tile<R, 5, 3>, tile<R, 5, 4>},
    {tile<R, 6, 1>, tile<R, 6, 2>, tile<R, 6, 3>, tile<R, 6, 4>},
};

// Terms in a block of a sum; a longer sum is a sum of blocks, which rounds less. Short blocks take more time, except
// where a single vector of columns (few queries) leaves registers for them. They are for few queries, where single
// roundings decide the largest error.
constexpr int64_t KB = 128;
constexpr int64_t KB_SHORT = 16;
constexpr int64_t KB_NARROW = 8;
constexpr int64_t SHORT_SUM_QUERIES = 256;

inline int64_t terms_of(const AttentionArgs& args) { return args.Tq < SHORT_SUM_QUERIES ? KB_SHORT : KB; }

// Rows of memory that are needed soon: each tile of a product asks for a few of them, so that they arrive while the CPU
// multiplies. A row of a packed projection is on a page of its own, which no hardware prefetcher foresees.
class RowsAhead {
 public:
  // The rows that were added last come first. Ignores a matrix that would push out of the cache what is in use.
  template <class T>
  void add(const T* first, int64_t stride, int64_t rows, int64_t n) {
    const int64_t bytes = n * sizeof(T);
    if (rows * bytes <= MAX_BYTES) rows_[size_++] = {(const char*)first, stride * (int64_t)sizeof(T), rows, bytes};
  }
  void fetch_some() {
    for (int i = 0; i < ROWS_AT_ONCE && size_; ++i) {
      Rows& rows = rows_[size_ - 1];
      for (int64_t byte = 0; byte < rows.bytes; byte += 64) __builtin_prefetch(rows.next + byte);
      rows.next += rows.stride;
      if (--rows.left <= 0) --size_;
    }
  }

 private:
  static constexpr int64_t MAX_BYTES = 128 << 10;
  static constexpr int ROWS_AT_ONCE = 3, MOST = 8;
  struct Rows {
    const char* next;
    int64_t stride, left, bytes;
  };
  Rows rows_[MOST];
  int size_ = 0;
};

// Computes C (M x N) = A B or C += A B, where A(m, k) = a[m * a_row_stride + k * a_col_stride], B and C are row-major,
// and N is a multiple of the lanes. `terms` is the length of a block of a sum. Fetches rows ahead meanwhile.
template <class R>
void gemm(int64_t terms, int64_t M, int64_t N, int64_t K, const R* a, int64_t a_row_stride, int64_t a_col_stride,
          const R* b, int64_t b_row_stride, R* c, int64_t c_row_stride, bool accumulate, RowsAhead& ahead) {
  constexpr int lanes = LANES<R>;
  if (N == lanes) terms = KB_NARROW;
  for (int64_t k = 0; k < K; k += terms)
    for (int64_t n = 0; n < N; n += NV * lanes) {
      const int64_t vectors = smaller<int64_t>(NV, (N - n) / lanes);
      for (int64_t m = 0; m < M; m += MR) {
        ahead.fetch_some();
        tiles<R>[smaller<int64_t>(MR, M - m) - 1][vectors - 1](
            smaller(terms, K - k), a + m* a_row_stride + k* a_col_stride, a_row_stride, a_col_stride,
            b + k* b_row_stride + n, b_row_stride, c + m* c_row_stride + n, c_row_stride, accumulate || k > 0);
      }
    }
}

// Whether to compute in fp64. A few numbers have no largest error to speak of but that of single roundings, which may
// then be many times PyTorch's. 16-bit results hide all this.
inline bool computes_in_fp64(const AttentionArgs& args) {
  const bool little = args.D <= FEW_DIMENSIONS && args.Tq * args.Tk * args.D < FP64_WORK;
  return args.dtype == Dtype::fp32 && (args.Tq <= FP64_QUERIES || little);
}

// Rows of one head as fp32 or fp64, padded with zeros to a multiple of W numbers.
template <class R>
struct Matrix {
  R* data;
  int64_t row_stride;
  R* row(int64_t t) const { return data + t * row_stride; }
};

template <class T>
T* head_data(const Heads& x, int64_t b, int64_t h) {
  return (T*)x.data + b * x.batch_stride + h * x.head_stride;
}

// Copies rows of D numbers, `stride` apart, to rows of R.
template <class T, class R>
void widen_rows(const T* from, int64_t stride, int64_t rows, int64_t D, Matrix<R> to) {
  constexpr int64_t PREFETCH_ROWS = 8, LINE = 64 / sizeof(T);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t d = 0; d < D; d += LINE) __builtin_prefetch(from + (t + PREFETCH_ROWS) * stride + d);
    widen_row(to.row(t), from + t * stride, D);
  }
}

template <class T>
void add_ahead(RowsAhead& ahead, const Heads& x, int64_t b, int64_t h, int64_t t, int64_t rows, int64_t D) {
  ahead.add(head_data<T>(x, b, h) + t * x.time_stride, x.time_stride, rows, D);
}

// Copies a head to `space` as R, unless it is a contiguous matrix of R in whole vectors. In place, rows that are a
// multiple of 1 KB apart, as in a packed projection, share a few sets of the caches and push each other out.
template <class T, class R>
Matrix<R> head_matrix(const Heads& x, int64_t b, int64_t h, int64_t rows, int64_t D, R* space) {
  if constexpr (std::is_same_v<T, R>)
    if (D % W == 0 && x.time_stride == D) return {head_data<R>(x, b, h), D};
  const Matrix<R> packed{space, round_up(D, W)};
  widen_rows(head_data<T>(x, b, h), x.time_stride, rows, D, packed);
  return packed;
}

// Returns whether no number is infinite or NaN. n is a multiple of W.
template <class R>
bool all_finite(Matrix<R> x, int64_t rows, int64_t n) {
  Vec<R> zeros[4] = {};
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4)
    for (int64_t d = 0; d < n; d += LANES<R>)
      for (int64_t i = 0; i < 4; ++i) zeros[i] += load(x.row(t + i) + d) * (R)0;
  for (; t < rows; ++t)
    for (int64_t d = 0; d < n; d += LANES<R>) zeros[0] += load(x.row(t) + d) * (R)0;
  return sum((zeros[0] + zeros[1]) + (zeros[2] + zeros[3])) == 0;
}

// Writes the transpose of from (rows x n), times factor, to `to` (n x rows). Columns up to a multiple of W are zero
// past `rows`. n is a multiple of W.
inline void transpose_rows(Matrix<float> from, int64_t rows, int64_t n, float factor, Matrix<float> to) {
  for (int64_t t = 0; t < rows; t += W)
    for (int64_t d = 0; d < n; d += W) {
      vf square[W];
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) square[i] = t + i < rows ? load(from.row(t + i) + d) * factor : vf{};
      transpose(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) store(to.row(d + i) + t, square[i]);
    }
}
inline void transpose_rows(Matrix<double> from, int64_t rows, int64_t n, double factor, Matrix<double> to) {
  for (int64_t d = 0; d < n; ++d)
    for (int64_t t = 0; t < round_up(rows, W); ++t) to.row(d)[t] = t < rows ? from.row(t)[d] * factor : 0;
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

// Returns whether each of `rows` queries that sees a key has a finite maximum.
template <class R>
bool finite_where_seen(R* max, const Span& keys_seen, int64_t rows) {
  if (all_finite(Matrix<R>{max, BQ}, 1, round_up(rows, W))) return true;
  for (int64_t i = larger<int64_t>(-keys_seen.diagonal, 0); i < rows && keys_seen.end > 0; ++i)
    if (max[i] * 0 != 0) return false;
  return true;
}

// Computes items in R by compute(R, from, to), which returns the first item with a number that is not finite, or `to`.
// Such an item is computed again in fp64: fp32 overflows first, and a score that is -inf by overflow would be taken
// for one that is -inf by its inputs, whose key counts for nothing.
template <class R, class F>
void for_items(int64_t begin, int64_t end, F compute) {
  for (; begin < end; ++begin) {
    begin = compute(R{}, begin, end);
    if (begin < end && std::is_same_v<R, float>) compute(double{}, begin, begin + 1);
  }
}

// The scale in two parts: S^T is K times (sign Q)^T, and P is exp2((S^T - max) * log2), so that no query is rounded,
// the subtraction is exact where P is large, and the P of a single key is exactly 1.
template <class R>
struct Scale {
  R sign, log2;
};
template <class R>
Scale<R> split_scale(double scale) {
  const R log2 = (R)(fabs(scale) * LOG2E);
  if (log2 == 0) return {0, 1};
  return {scale < 0 ? (R)-1 : (R)1, log2};
}

// Returns the number of columns of S^T that a block of `rows` queries uses.
template <class R>
int64_t columns_used(int64_t rows) {
  return round_up(rows, LANES<R>);
}

// Returns log sum exp(scale S) from the maximum of sign S and sum exp2((sign S - max) * log2).
inline double lse_of(double max, double sum, double scale) { return max * fabs(scale) + log(sum); }

// A run of keys. The queries in columns before the first see none of them.
struct Run {
  int64_t key, keys, column;
};
// On the diagonal, a run has at most KEYS keys, and its first column is a multiple of COLUMNS.
template <int64_t KEYS = DIAGONAL_KEYS, int64_t COLUMNS = W, class F>
void for_each_run(const Span& s, F f) {
  for (int64_t key = 0; key < s.full; key += BK) f(Run{key, smaller(BK, s.full - key), 0});
  for (int64_t key = s.full; key < s.end; key += KEYS) {
    const int64_t column = larger<int64_t>(key - s.diagonal, 0) / COLUMNS * COLUMNS;
    if (column < BQ) f(Run{key, smaller(KEYS, s.end - key), column});
  }
}

// Sets S^T rows of a run to `value` where the query comes before the key.
template <class R>
void mask_diagonal(R* s, const Span& span, const Run& run, R value) {
  if (run.key < span.full) return;
  for (int64_t j = 0; j < run.keys; ++j)
    for (int64_t i = run.column; i < smaller(BQ, run.key + j - span.diagonal); ++i) s[j * BQ + i] = value;
}

// Calls add(factor, key of the run, query) for each key and each of `rows` queries that sees it. In place of a product
// of tiles where a number is not finite: there the factor 0 of a query that does not see the key would make NaN.
template <class R, class F>
void for_each_visible(const R* factors, const Span& span, const Run& run, int64_t rows, F add) {
  for (int64_t j = 0; j < run.keys; ++j)
    for (int64_t i = larger(run.column, run.key + j - span.diagonal); i < rows; ++i) add(factors[j * BQ + i], j, i);
}
template <class R>
void add_row(R* to, R factor, const R* from, int64_t n) {
  for (int64_t d = 0; d < n; ++d) to[d] += factor * from[d];
}

// Multiplies S^T rows of a run, up to column `end`, by 0 or 1 / (1 - p).
template <class R>
void apply_dropout(R* s, const AttentionArgs& args, int64_t head, int64_t query, const Run& run, int64_t end) {
  // In fp32, 1 - p would be off by 3e-8 / (1 - p).
  const R keep = (R)(1.0 / (1.0 - args.dropout_p));
  const float p = (float)args.dropout_p;
  for (int64_t quad = run.key >> 2; quad <= (run.key + run.keys - 1) >> 2; ++quad)
    for (int64_t i = run.column; i < end; i += W) {
      const vu position = iota() + (uint32_t)(query + i);
      const Words words = philox(splat((uint32_t)quad), position, splat((uint32_t)head), splat(1u), args.seed);
      for (int64_t w = 0; w < 4; ++w) {
        const int64_t j = quad * 4 + w - run.key;
        if (j < 0 || j >= run.keys) continue;
        const vf kept = uniform(words.word[w]) >= splat(p) ? splat(1.0f) : vf{};
        scale_lanes(s + j * BQ + i, kept, keep);
      }
    }
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
