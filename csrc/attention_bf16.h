// Attention of bf16 by the CPU's matrix engine: packed operands, and their product on tiles.
//
// Scores are fp32 and transposed as in attention_tiles.h, so that masks, dropout and the softmax are the same code. A
// tile of a product's first operand has 16 rows of 32 terms; one of the second has 16 pairs of terms, for 16 columns.
// Outputs and dQ are computed transposed: then neither P nor dS is ever transposed itself.
//   S^T = K Q^T    O^T = V^T P^T    dP^T = V dO^T    dV += P'^T dO    dK += dS^T Q    dQ^T = K^T dS^T
// P and dS are rounded to bf16, their sums are not. Keys, queries and dimensions are padded with zeros to multiples of
// TILE_TERMS.
#pragma once

#include "attention_tiles.h"
#include "tiles.h"

#ifdef GPTFAST_HAS_TILES

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t TILE_TERMS = 32;  // also the rows and the columns of four tiles
static_assert(BQ % TILE_TERMS == 0 && BK % TILE_TERMS == 0);

// Tile i of block b of the terms is at data + i * tile_bytes + b * block_bytes; its rows are row_bytes apart.
struct TileOperand {
  const char* data;
  int64_t tile_bytes, block_bytes, row_bytes;
};
// A first operand: rows of n numbers, whose terms lie side by side.
inline TileOperand rows_operand(const bf16* x, int64_t n) {
  return {(const char*)x, TILE_ROWS * n * 2, TILE_TERMS * 2, n * 2};
}
// A second operand: rows of n pairs, one row for each pair of terms.
inline TileOperand pairs_operand(const float* x, int64_t n) {
  return {(const char*)x, TILE_BYTES, TILE_TERMS / 2 * n * 4, n * 4};
}
// A first operand of n rows that transpose_to_tiles() wrote, from block b of the terms on.
inline TileOperand tiles_operand(const bf16* x, int64_t n, int64_t b) {
  return {(const char*)(x + b * n * TILE_TERMS), TILE_ROWS * TILE_BYTES, n * TILE_BYTES, TILE_BYTES};
}

// Computes four tiles of C, 32 x 32: the sum over K terms, added to C or not.
inline void multiply_four_tiles(int64_t K, const TileOperand& a, const TileOperand& b, float* c, int64_t c_stride,
                                bool accumulate) {
  float* lower = c + TILE_ROWS * c_stride;
  const int64_t c_bytes = c_stride * 4;
  if (accumulate) {
    tile_load<0>(c, c_bytes);
    tile_load<1>(c + TILE_ROWS, c_bytes);
    tile_load<2>(lower, c_bytes);
    tile_load<3>(lower + TILE_ROWS, c_bytes);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  const char *a_block = a.data, *b_block = b.data;
  for (int64_t k = 0; k < K; k += TILE_TERMS, a_block += a.block_bytes, b_block += b.block_bytes) {
    tile_load<4>(a_block, a.row_bytes);
    tile_load<6>(b_block, b.row_bytes);
    tile_dot_bf16<0, 4, 6>();
    tile_load<7>(b_block + b.tile_bytes, b.row_bytes);
    tile_dot_bf16<1, 4, 7>();
    tile_load<5>(a_block + a.tile_bytes, a.row_bytes);
    tile_dot_bf16<2, 5, 6>();
    tile_dot_bf16<3, 5, 7>();
  }
  tile_store<0>(c, c_bytes);
  tile_store<1>(c + TILE_ROWS, c_bytes);
  tile_store<2>(lower, c_bytes);
  tile_store<3>(lower + TILE_ROWS, c_bytes);
}

// Computes C (M x N) = A B or C += A B, of K terms. M, N and K are rounded up to multiples of TILE_TERMS. The caller
// has a TileScope. Fetches rows ahead meanwhile.
inline void multiply(int64_t M, int64_t N, int64_t K, TileOperand a, const TileOperand& b, float* c, int64_t c_stride,
                     bool accumulate, RowsAhead& ahead) {
  for (int64_t m = 0; m < M; m += TILE_TERMS, a.data += 2 * a.tile_bytes)
    for (int64_t n = 0; n < N; n += TILE_TERMS) {
      for (int i = 0; i < 4; ++i) ahead.fetch_some();
      TileOperand columns = b;
      columns.data += n / TILE_ROWS * b.tile_bytes;
      multiply_four_tiles(K, a, columns, c + m * c_stride + n, c_stride, accumulate);
    }
}

// Rows of numbers, all padded with zeros to multiples of TILE_TERMS.
struct PaddedRows {
  bf16* data;
  int64_t rows, n;
  bf16* row(int64_t t) const { return data + t * n; }
  // Copies `rows` rows of D numbers, times a factor, and returns whether all of them are finite.
  bool copy(const bf16* from, int64_t stride, int64_t rows_used, int64_t D, float factor) const {
    vf zeros = {};
    for (int64_t t = 0; t < rows_used; ++t)
      for (int64_t d = 0; d < n; d += W) {
        const int64_t lanes = smaller<int64_t>(W, D - d);
        const vf x = lanes > 0 ? load_n(from + t * stride + d, lanes) * factor : vf{};
        zeros += x * 0.0f;
        store(row(t) + d, x);
      }
    memset(row(rows_used), 0, (rows - rows_used) * n * sizeof(bf16));
    return sum(zeros) == 0;
  }
};

// Writes the rows, at most BQ, as a second operand whose terms are the numbers of a row: (n / 2 x BQ) pairs.
inline void pair_numbers(const PaddedRows& x, float* pairs) { pack<BQ, Pairs>(x.data, x.n, 1, BQ, x.n, pairs); }

// Returns pairs of terms: of each, the lower half is from `even`, the upper half from `odd`.
inline vf paired(vh even, vh odd) { return (vf)(widen(even) | widen(odd) << 16); }

// Writes the rows as a second operand whose terms are the rows: (rows / 2 x n) pairs.
inline void pair_rows(const PaddedRows& x, float* pairs) {
  for (int64_t t = 0; t < x.rows; t += 2)
    for (int64_t d = 0; d < x.n; d += W)
      store(pairs + t / 2 * x.n + d, paired(*(const vh_any*)(x.row(t) + d), *(const vh_any*)(x.row(t + 1) + d)));
}

// Writes the transpose of the rows as a first operand whose terms are the rows: tiles of 16 numbers and 32 rows.
inline void transpose_to_tiles(const PaddedRows& x, bf16* tiles) {
  float* to = (float*)tiles;
  for (int64_t t = 0; t < x.rows; t += TILE_TERMS)
    for (int64_t d = 0; d < x.n; d += TILE_ROWS, to += TILE_ROWS * TILE_BYTES / 4)
      for (int64_t pair = 0; pair < TILE_TERMS / 2; pair += W)
        for (int64_t part = 0; part < TILE_ROWS; part += W) {
          vf square[W];
          for (int64_t i = 0; i < W; ++i) {
            const int64_t row = t + 2 * (pair + i);
            square[i] = paired(*(const vh_any*)(x.row(row) + d + part), *(const vh_any*)(x.row(row + 1) + d + part));
          }
          transpose(square);
          for (int64_t i = 0; i < W; ++i) store(to + (part + i) * TILE_BYTES / 4 + pair, square[i]);
        }
}

// Writes rows of scores (keys x BQ), columns begin to end, as bf16, and rows of zeros up to a multiple of TILE_TERMS:
// a first operand whose terms are the queries.
inline void narrow_scores(const float* s, int64_t keys, int64_t begin, int64_t end, bf16* to) {
  for (int64_t j = 0; j < round_up(keys, TILE_TERMS); ++j)
    for (int64_t i = begin; i < end; i += W) store(to + j * BQ + i, j < keys ? load(s + j * BQ + i) : vf{});
}
// The same as a second operand whose terms are the keys. All numbers are finite, or round to a number that is not.
inline void pair_scores(const float* s, int64_t keys, int64_t begin, int64_t end, float* pairs) {
  for (int64_t j = 0; j < round_up(keys, TILE_TERMS); j += 2)
    for (int64_t i = begin; i < end; i += W) {
      const vu even = j < keys ? round_bits(load(s + j * BQ + i)) >> 16 : vu{};
      const vu odd = j + 1 < keys ? round_bits(load(s + (j + 1) * BQ + i)) & 0xFFFF0000u : vu{};
      store(pairs + j / 2 * BQ + i, (vf)(even | odd));
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

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL

#endif
