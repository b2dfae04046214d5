// Attention on the tiles of the CPU's matrix engine, of bf16 or of the bf16 parts of fp32: packed operands, and their
// product.
//
// Scores are fp32 and transposed as in attention_tiles.h, so that masks, dropout and the softmax are the same code. A
// tile of a product's first operand has 16 rows of 32 terms; one of the second has 16 pairs of terms, for 16 columns.
// Outputs and dQ are computed transposed: then neither P nor dS is ever transposed itself.
//   S^T = K Q^T    O^T = V^T P^T    dP^T = V dO^T    dV += P'^T dO    dK += dS^T Q    dQ^T = K^T dS^T
// P and dS are rounded to bf16, their sums are not. Keys, queries and dimensions are padded with zeros to multiples of
// TILE_TERMS.
//
// fp32: every operand, P and dS too, is split into one or two parts as in matmul_parts_loops.cpp. The parts of an
// operand are whole matrices, one after the other.
#pragma once

#include "attention_tiles.h"
#include "four_tiles.h"

#ifdef GPTFAST_HAS_TILES

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t TILE_TERMS = 32;  // also the rows and the columns of four tiles
static_assert(BQ % TILE_TERMS == 0 && BK % TILE_TERMS == 0);

// Operands of T are multiplied by SCALE before they are split, so that no part of an fp32 number is below the smallest
// normal number, which tiles take for 0. Scores, dP and all sums are then 1 / UNSCALE times what they should be.
template <class T>
constexpr float SCALE = std::is_same_v<T, float> ? 0x1p24f : 1.0f;
template <class T>
constexpr float UNSCALE = 1 / (SCALE<T> * SCALE<T>);
// A scaled number that overflows when it is multiplied by this counts as not finite: a sum of products of two such
// numbers might overflow to -inf on the way to a finite score.
template <class T>
constexpr float HEADROOM = std::is_same_v<T, float> ? 0x1p68f : 1.0f;

template <class T>
constexpr bool HAS_PARTS = !std::is_same_v<T, fp16>;
// Six products of three parts, with the time to split P and dS, take as long as one in fp32. (Counted, not measured.)
constexpr int MAX_PARTS = 2;
constexpr double MIN_SCALE = 0x1p-64;  // with a smaller one, UNSCALE times it would lose bits

// Returns how many bf16 parts a number of T has, or 0 where vectors compute in fp32.
template <class T>
int parts_on_tiles(const AttentionArgs& args) {
  if (std::is_same_v<T, bf16>) return 1;
  const bool fits = args.scale == 0 || fabs(args.scale) >= MIN_SCALE;
  return args.parts <= MAX_PARTS && fits ? args.parts : 0;
}

// Tile i of block b of the terms is at data + i * tile_bytes + b * block_bytes; its rows are row_bytes apart.
struct TileOperand {
  const char* data;
  int64_t tile_bytes, block_bytes, row_bytes, part_bytes;
};
// A first operand: rows of n numbers, whose terms lie side by side; `size` numbers make a part.
inline TileOperand rows_operand(const bf16* x, int64_t n, int64_t size) {
  return {(const char*)x, TILE_ROWS * n * 2, TILE_TERMS * 2, n * 2, size * 2};
}
// A second operand: rows of n pairs, one row for each pair of terms; `size` pairs make a part.
inline TileOperand pairs_operand(const float* x, int64_t n, int64_t size) {
  return {(const char*)x, TILE_BYTES, TILE_TERMS / 2 * n * 4, n * 4, size * 4};
}
// A first operand of n rows that transpose_to_tiles() wrote, from block b of the terms on; `size` numbers make a part.
inline TileOperand tiles_operand(const bf16* x, int64_t n, int64_t b, int64_t size) {
  return {(const char*)(x + b * n * TILE_TERMS), TILE_ROWS * TILE_BYTES, n * TILE_BYTES, TILE_BYTES, size * 2};
}

// Computes four tiles of C, 32 x 32: the sum over K terms, added to C or not.
template <int PARTS>
void multiply_four_tiles(int64_t K, const TileOperand& a, const TileOperand& b, float* c, int64_t c_stride,
                         bool accumulate) {
  TwoTiles rows{a.data, a.tile_bytes, a.row_bytes, a.part_bytes};
  TwoTiles columns{b.data, b.tile_bytes, b.row_bytes, b.part_bytes};
  load_four_tiles(c, c_stride, accumulate);
  for (int64_t k = 0; k < K; k += TILE_TERMS, rows.data += a.block_bytes, columns.data += b.block_bytes)
    add_products_of_parts<PARTS>(rows, columns);
  store_four_tiles(c, c_stride);
}

// Computes C (M x N) = A B or C += A B, of K terms in a number of parts. M, N and K are rounded up to multiples of
// TILE_TERMS. The caller has a TileScope. Fetches rows ahead meanwhile.
inline void multiply(int parts, int64_t M, int64_t N, int64_t K, TileOperand a, const TileOperand& b, float* c,
                     int64_t c_stride, bool accumulate, RowsAhead& ahead) {
  const auto product = parts == 2 ? multiply_four_tiles<2> : multiply_four_tiles<1>;
  for (int64_t m = 0; m < M; m += TILE_TERMS, a.data += 2 * a.tile_bytes)
    for (int64_t n = 0; n < N; n += TILE_TERMS) {
      for (int i = 0; i < 4; ++i) ahead.fetch_some();
      TileOperand columns = b;
      columns.data += n / TILE_ROWS * b.tile_bytes;
      product(K, a, columns, c + m * c_stride + n, c_stride, accumulate);
    }
}

// Stores x in bf16 parts, each part `size` numbers after the one before.
inline void store_parts(vf x, int parts, bf16* to, int64_t size) {
  store(to, x);
  for (int part = 1; part < parts; ++part) {
    x -= load(to);
    store(to += size, x);
  }
}

// Rows of numbers in bf16 parts, all padded with zeros to multiples of TILE_TERMS.
struct PaddedRows {
  bf16* data;
  int64_t rows, n;
  int parts;
  int64_t size() const { return rows * n; }  // of a part
  bf16* row(int64_t t, int part = 0) const { return data + part * size() + t * n; }
  // Copies rows of D numbers, times a factor, and returns whether all of them are finite.
  template <class T>
  bool copy(const T* from, int64_t stride, int64_t rows_used, int64_t D, float factor) const {
    vf zeros = {};
    for (int64_t t = 0; t < rows_used; ++t)
      for (int64_t d = 0; d < n; d += W) {
        const int64_t lanes = smaller<int64_t>(W, D - d);
        const vf x = lanes > 0 ? load_n(from + t * stride + d, lanes) * factor : vf{};
        zeros += x * HEADROOM<T> * 0.0f;
        store_parts(x, parts, row(t) + d, size());
      }
    for (int part = 0; part < parts; ++part) memset(row(rows_used, part), 0, (rows - rows_used) * n * sizeof(bf16));
    return sum(zeros) == 0;
  }
  // As an operand whose terms are the numbers of a row, from row t on.
  TileOperand operand(int64_t t) const { return rows_operand(row(t), n, size()); }
};

// Writes the rows, BQ of them, as a second operand whose terms are the numbers of a row: (n / 2 x BQ) pairs.
inline void pair_numbers(const PaddedRows& x, float* pairs) {
  for (int part = 0; part < x.parts; ++part, pairs += x.size() / 2)
    pack<BQ, Pairs>(x.row(0, part), x.n, 1, BQ, x.n, pairs);
}

// Returns pairs of terms: of each, the lower half is from `even`, the upper half from `odd`.
inline vf paired(vh even, vh odd) { return (vf)(widen(even) | widen(odd) << 16); }

// Writes the rows as a second operand whose terms are the rows: (rows / 2 x n) pairs.
inline void pair_rows(const PaddedRows& x, float* pairs) {
  for (int part = 0; part < x.parts; ++part)
    for (int64_t t = 0; t < x.rows; t += 2, pairs += x.n)
      for (int64_t d = 0; d < x.n; d += W)
        store(pairs + d, paired(*(const vh_any*)(x.row(t, part) + d), *(const vh_any*)(x.row(t + 1, part) + d)));
}

// Writes the transpose of the rows as a first operand whose terms are the rows: tiles of 16 numbers and 32 rows.
inline void transpose_to_tiles(const PaddedRows& x, bf16* tiles) {
  float* to = (float*)tiles;
  for (int part = 0; part < x.parts; ++part)
    for (int64_t t = 0; t < x.rows; t += TILE_TERMS)
      for (int64_t d = 0; d < x.n; d += TILE_ROWS, to += TILE_ROWS * TILE_BYTES / 4)
        for (int64_t pair = 0; pair < TILE_TERMS / 2; pair += W)
          for (int64_t column = 0; column < TILE_ROWS; column += W) {
            vf square[W];
            for (int64_t i = 0; i < W; ++i) {
              const bf16 *even = x.row(t + 2 * (pair + i), part) + d + column, *odd = even + x.n;
              square[i] = paired(*(const vh_any*)even, *(const vh_any*)odd);
            }
            transpose(square);
            for (int64_t i = 0; i < W; ++i) store(to + (column + i) * TILE_BYTES / 4 + pair, square[i]);
          }
}

// Columns begin to end of some rows of scores (keys x BQ), which become an operand times a factor, in bf16 parts.
struct Scores {
  const float* data;
  int64_t keys, begin, end;
  float factor;
  int parts;
  vf at(int64_t key, int64_t i) const { return key < keys ? load(data + key * BQ + i) * factor : vf{}; }
};
constexpr int64_t SCORES_SIZE = BK * BQ;  // of a part

// Writes scores, and rows of zeros up to a multiple of TILE_TERMS, as a first operand whose terms are the queries.
inline void narrow_scores(const Scores& s, bf16* to) {
  for (int64_t j = 0; j < round_up(s.keys, TILE_TERMS); ++j)
    for (int64_t i = s.begin; i < s.end; i += W) store_parts(s.at(j, i), s.parts, to + j * BQ + i, SCORES_SIZE);
}
// The same as a second operand whose terms are the keys. All numbers are finite, or round to a number that is not.
inline void pair_scores(const Scores& s, float* pairs) {
  for (int64_t j = 0; j < round_up(s.keys, TILE_TERMS); j += 2)
    for (int64_t i = s.begin; i < s.end; i += W) {
      vf even = s.at(j, i), odd = s.at(j + 1, i);
      for (int part = 0; part < s.parts; ++part) {
        const vu upper = round_bits(even) & 0xFFFF0000u, lower = round_bits(odd) & 0xFFFF0000u;
        store(pairs + part * SCORES_SIZE / 2 + j / 2 * BQ + i, (vf)(upper >> 16 | lower));
        even -= (vf)upper;
        odd -= (vf)lower;
      }
    }
}

// The keys that a block of queries sees, in runs of whole tiles.
inline Span tiles_seen_by(const AttentionArgs& args, int64_t b, int64_t q0, int64_t rows) {
  Span seen = keys_seen_by(args, b, q0, rows);
  seen.full = seen.full / TILE_TERMS * TILE_TERMS;
  return seen;
}
template <class F>
void for_each_run_of_tiles(const Span& s, F f) {
  for_each_run<TILE_TERMS, TILE_TERMS>(s, f);
}

// Whether fp32 numbers are multiplied by parts. fp64, which keeps few numbers as exact as fp32, is then of no use.
inline bool multiplies_parts(const AttentionArgs& args) {
  return args.dtype == Dtype::fp32 && parts_on_tiles<float>(args) > 0;
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL

#else

namespace gptfast::GPTFAST_LEVEL {
inline bool multiplies_parts(const AttentionArgs&) { return false; }
}  // namespace gptfast::GPTFAST_LEVEL

#endif
