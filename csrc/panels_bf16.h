// Panels of bf16 matrices and the product of two of them. The innermost loop is what the level has: tiles, dot products
// of pairs, or products in fp32 of numbers that are widened as they are packed.
#pragma once

#include "four_tiles.h"
#include "panels.h"
#include "tile.h"

namespace gptfast::GPTFAST_LEVEL {

// How panels of A (ROWS) and B (COLUMNS) are laid out and multiplied, in units of UNIT terms. A unit of a panel has
// A_FLOATS or B_FLOATS numbers of 32 bits. KC terms of a panel of B stay in the first-level cache. MAX_PARTS is the
// largest number of bf16 parts of an fp32 number (matmul_parts_loops.cpp) with which a product is faster than in fp32.
#if defined(GPTFAST_HAS_TILES)

struct PanelProduct {
  static constexpr int64_t ROWS = 2 * TILE_ROWS, COLUMNS = 2 * TILE_ROWS, UNIT = 32, KC = 512;
  static constexpr int64_t TILE_FLOATS = TILE_ROWS * TILE_BYTES / 4;
  static constexpr int64_t A_FLOATS = 2 * TILE_FLOATS, B_FLOATS = A_FLOATS;
  // Six products of bf16 take less time than one of fp32. (By their rates, 7 to 1: not measured with these loops.)
  static constexpr int MAX_PARTS = 3;
  typedef TileScope Scope;

  // Two panels of 16 columns, one after the other: a tile is 16 pairs of terms, for 16 columns each.
  static void pack_b(const bf16* x, int64_t x_p, int64_t x_k, int64_t n, int64_t K, float* to) {
    const int64_t pairs = round_up(K, UNIT) / 2, used = (K + 1) / 2;
    for (int64_t p = 0; p < COLUMNS; p += TILE_ROWS, to += pairs * TILE_ROWS) {
      pack<TILE_ROWS, Pairs>(x + p * x_p, x_p, x_k, smaller<int64_t>(TILE_ROWS, larger<int64_t>(n - p, 0)), K, to);
      memset(to + used * TILE_ROWS, 0, (pairs - used) * TILE_BYTES);
    }
  }
  // Two panels of 16 rows: a tile is 32 terms of 16 rows.
  static void pack_a(const bf16* x, int64_t x_p, int64_t x_k, int64_t n, int64_t K, float* to) {
    for (int64_t p = 0; p < ROWS; p += TILE_ROWS) {
      const int64_t rows = smaller<int64_t>(TILE_ROWS, larger<int64_t>(n - p, 0));
      for (int64_t k = 0; k < K; k += UNIT, to += TILE_FLOATS)
        pack_tile(x + p * x_p + k * x_k, x_p, x_k, rows, smaller<int64_t>(UNIT, K - k), to);
    }
  }
  static void multiply(int64_t units, const float* a, const float* b, float* sums, bool accumulate) {
    multiply_parts<1>(units, a, b, sums, accumulate);
  }
  // Panels of PARTS parts, one after the other.
  template <int PARTS>
  static void multiply_parts(int64_t units, const float* a, const float* b, float* sums, bool accumulate) {
    const int64_t part_bytes = units * A_FLOATS * 4, half_bytes = units * TILE_FLOATS * 4;
    load_four_tiles(sums, COLUMNS, accumulate);
    for (int64_t u = 0; u < units; ++u, a += TILE_FLOATS, b += TILE_FLOATS)
      add_products_of_parts<PARTS>({(const char*)a, half_bytes, TILE_BYTES, part_bytes},
                                   {(const char*)b, half_bytes, TILE_BYTES, part_bytes});
    store_four_tiles(sums, COLUMNS);
  }

 private:
  static void pack_tile(const bf16* x, int64_t x_p, int64_t x_k, int64_t rows, int64_t K, float* to) {
    if (x_k == 1 && rows == TILE_ROWS && K == UNIT) {
      for (int64_t p = 0; p < TILE_ROWS; ++p) memcpy(to + p * UNIT / 2, x + p * x_p, TILE_BYTES);
      return;
    }
    float columns[TILE_FLOATS + W] = {};
    pack<TILE_ROWS, Pairs>(x, x_p, x_k, rows, K, columns);
    for (int64_t p = 0; p < TILE_ROWS; p += W)
      for (int64_t pair = 0; pair < UNIT / 2; pair += W) {
        vf block[W];
        for (int64_t i = 0; i < W; ++i) block[i] = load(columns + (pair + i) * TILE_ROWS + p);
        transpose(block);
        for (int64_t i = 0; i < W; ++i) store(to + (p + i) * UNIT / 2 + pair, block[i]);
      }
  }
};

#else

struct NoScope {};

struct PanelProduct {
  static constexpr int NV = 3, MR = REGISTERS == 32 ? 8 : 4;  // as in matmul_loops.cpp
  static constexpr int64_t ROWS = MR, COLUMNS = NV * W, A_FLOATS = ROWS, B_FLOATS = COLUMNS;
  typedef NoScope Scope;

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  typedef Pairs Unit;
  static constexpr int64_t KC = 512;
  static constexpr int MAX_PARTS = 1;

  [[gnu::always_inline]] static inline void add_products(vf (&acc)[MR][NV], int64_t units, const float* a,
                                                         const float* b) {
    for (int m = 0; m < MR; ++m)
      for (int n = 0; n < NV; ++n) acc[m][n] = vf{};
    for (int64_t u = 0; u < units; ++u, a += ROWS, b += COLUMNS) {
      vf row[NV];
#pragma GCC unroll 3
      for (int n = 0; n < NV; ++n) row[n] = load(b + n * W);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 3
        for (int n = 0; n < NV; ++n) acc[m][n] = add_pairs(acc[m][n], row[n], a + m);
      }
    }
  }
  // Adds the products of the pairs of a row with the pair at a.
  static vf add_pairs(vf sum, vf row, const float* a) {
#ifdef __AVX512BF16__
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)row, (__m512bh)_mm512_set1_ps(*a));
#else
    return (vf)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)row, (bfloat16x8_t)vld1q_dup_f32(a));
#endif
  }
#else
  typedef Widened Unit;
  static constexpr int64_t KC = 192;
  static constexpr int MAX_PARTS = 0;

  [[gnu::always_inline]] static inline void add_products(vf (&acc)[MR][NV], int64_t units, const float* a,
                                                         const float* b) {
    sum_products(acc, units, a, 1, ROWS, b, COLUMNS);
  }
#endif
  static constexpr int64_t UNIT = Unit::TERMS;

  static void pack_a(const bf16* x, int64_t x_p, int64_t x_k, int64_t n, int64_t K, float* to) {
    pack<ROWS, Unit>(x, x_p, x_k, n, K, to);
  }
  static void pack_b(const bf16* x, int64_t x_p, int64_t x_k, int64_t n, int64_t K, float* to) {
    pack<COLUMNS, Unit>(x, x_p, x_k, n, K, to);
  }
  static void multiply(int64_t units, const float* a, const float* b, float* sums, bool accumulate) {
    vf acc[MR][NV];
    add_products(acc, units, a, b);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 3
      for (int n = 0; n < NV; ++n) {
        float* to = sums + m * COLUMNS + n * W;
        store(to, accumulate ? acc[m][n] + load(to) : acc[m][n]);
      }
  }
  template <int PARTS>
  static void multiply_parts(int64_t units, const float* a, const float* b, float* sums, bool accumulate) {
    static_assert(PARTS == 1);
    multiply(units, a, b, sums, accumulate);
  }
};

#endif

}  // namespace gptfast::GPTFAST_LEVEL
