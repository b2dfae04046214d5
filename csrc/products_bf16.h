// Sums of products of bf16, in the one order of summation that all levels share, so that a product has the same bits on
// every CPU, for one row or hundreds.
//
// Terms come in blocks of 32, the last one padded with zeros. Of each block, the products of the even terms are added
// one after the other, from 0; so are those of the odd terms; the sum of both is added to the total. This is the order
// of Intel's tiles. Tiles and dot products take numbers below the smallest normal one for 0; other levels do not.
//
// A panel holds the weights of 32 outputs. A block of it is [16 pairs of terms][32 outputs][2], so two tiles side by
// side. Rows of inputs have the form that their reader takes.
#pragma once

#include "multiply_add.h"
#include "tiles.h"

namespace gptfast::GPTFAST_LEVEL {

constexpr int BLOCK_TERMS = 32, BLOCK_PAIRS = BLOCK_TERMS / 2;
constexpr int PANEL_COLUMNS = 32;
constexpr int64_t PANEL_BLOCK_BYTES = BLOCK_TERMS * PANEL_COLUMNS * 2;

// Rows of inputs: block b of row m is at data + m * row_bytes + b * block_bytes.
struct ProductRows {
  const char* data;
  int64_t row_bytes, block_bytes;
};
// The sums of row m, 32 of them, are at data + m * row_stride.
struct ProductSums {
  float* data;
  int64_t row_stride;
};

static inline vu load_pairs(const char* p) { return (vu)load((const float*)p); }
static inline void store_pairs(char* p, vu pairs) { store((float*)p, (vf)pairs); }

// The arithmetic of vectors: `Chains` has STEPS vector products in each of a block's two chains, 0 (even) and 1 (odd).
#if defined(__AVX512BF16__)

// `vdpbf16ps` adds the product of the upper halves of a pair, then that of the lower halves. So its pairs are terms 2
// and 0, 6 and 4 ... for the even chain, then 3 and 1, 7 and 5 ... for the odd chain.
struct Chains {
  typedef vu Number;
  static constexpr int STEPS = 8;
  static constexpr int64_t INPUT_BYTES = 64;  // of a block
  // Returns which term is in the lower or upper half of each of the 16 pairs of a row of inputs.
  static constexpr int term(int pair, bool upper) { return pair % STEPS * 4 + (upper ? 0 : 2) + pair / STEPS; }

  static vf add_product(vf sum, Number input, Number weights, int) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)input);
  }
  static Number input(const char* block, int chain, int step) {
    uint32_t pair;
    memcpy(&pair, block + (chain * STEPS + step) * 4, sizeof pair);
    return splat(pair);
  }
  static Number weights_of(const char* block, int chain, int step) {
    const vu first = load_pairs(block + 2 * step * PANEL_COLUMNS * 4);
    const vu second = load_pairs(block + (2 * step + 1) * PANEL_COLUMNS * 4);
    const __mmask32 upper = 0xAAAAAAAA;
    return chain ? (vu)_mm512_mask_mov_epi16((__m512i)(second >> 16), upper, (__m512i)first)
                 : (vu)_mm512_mask_mov_epi16((__m512i)second, upper, (__m512i)(first << 16));
  }
  // Returns the W pairs from `pair` on, of the 32 terms at x.
  static vu regrouped(const bf16* x, int) {
    vh_pairs order;
    for (int i = 0; i < 2 * W; ++i) order[i] = term(i / 2, i % 2);
    return (vu)_mm512_permutexvar_epi16((__m512i)order, (__m512i)load_pairs((const char*)x));
  }
  static void store_inputs(char* block, int pair, vu pairs) { store_pairs(block + pair * 4, pairs); }

 private:
  typedef uint16_t vh_pairs __attribute__((vector_size(4 * W)));
};

#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

// `bfmlalb` multiplies the lower halves of pairs, `bfmlalt` the upper ones, and each rounds once: a step of the even or
// of the odd chain, of pairs as they lie in memory. (`bfdot`, which takes both, rounds otherwise.)
struct Chains {
  typedef vu Number;
  static constexpr int STEPS = 16;
  static constexpr int64_t INPUT_BYTES = 64;  // of a block

  static vf add_product(vf sum, Number input, Number weights, int chain) {
    const auto w = (bfloat16x8_t)weights, x = (bfloat16x8_t)input;
    return chain ? (vf)vbfmlaltq_f32((float32x4_t)sum, w, x) : (vf)vbfmlalbq_f32((float32x4_t)sum, w, x);
  }
  static Number input(const char* block, int, int step) {
    uint32_t pair;
    memcpy(&pair, block + step * 4, sizeof pair);
    return splat(pair);
  }
  static Number weights_of(const char* block, int, int step) { return load_pairs(block + step * PANEL_COLUMNS * 4); }
  static vu regrouped(const bf16* x, int pair) { return load_pairs((const char*)(x + 2 * pair)); }
  static void store_inputs(char* block, int pair, vu pairs) { store_pairs(block + pair * 4, pairs); }
};

#else

// Multiply-adds of numbers widened to fp32. Fused or not, their bits are the same: a product of two bf16 is exact.
struct Chains {
  typedef vf Number;
  static constexpr int STEPS = 16;
  static constexpr int64_t INPUT_BYTES = 128;  // of a block

  static vf add_product(vf sum, Number input, Number weights, int) { return multiply_add(input, weights, sum); }
  static Number input(const char* block, int chain, int step) {
    return splat(((const float*)block)[chain * STEPS + step]);
  }
  static Number weights_of(const char* block, int chain, int step) {
    return half(load_pairs(block + step * PANEL_COLUMNS * 4), chain);
  }
  static vu regrouped(const bf16* x, int pair) { return load_pairs((const char*)(x + 2 * pair)); }
  static void store_inputs(char* block, int pair, vu pairs) {
    for (int chain = 0; chain < 2; ++chain) store((float*)block + chain * STEPS + pair, half(pairs, chain));
  }

 private:
  static vf half(vu pairs, int upper) { return (vf)(upper ? pairs & 0xFFFF0000u : pairs << 16); }
};

#endif

// Products by vectors: any number of rows up to ROWS, which is the fastest.
struct VectorProducts {
  static constexpr int ROWS = REGISTERS == 32 ? 8 : 6;  // two chains of these rows keep the multipliers busy
  // Up to this number, the registers hold the sums of both chains, which reads each part of a panel once.
  static constexpr int MAX_ROWS_OF_TWO_CHAINS = REGISTERS == 32 ? 4 : 2;
  static constexpr int64_t INPUT_BYTES = Chains::INPUT_BYTES;

  // Writes a block of a row of inputs: its 32 terms are at x.
  static void convert_inputs(const bf16* x, char* block) {
    for (int pair = 0; pair < BLOCK_PAIRS; pair += W) Chains::store_inputs(block, pair, Chains::regrouped(x, pair));
  }

  // Adds the products of M rows with `blocks` blocks of a panel. The panel is prefetched PREFETCH bytes ahead.
  template <int M, int64_t PREFETCH = 0>
  static void add(ProductSums sums, ProductRows rows, int64_t blocks, const char* panel) {
    for (int64_t b = 0; b < blocks; ++b) {
      for (int column = 0; column < PANEL_COLUMNS; column += NV * W)
        add_block<M, PREFETCH>({sums.data + column, sums.row_stride}, rows, panel + column * 4);
      rows.data += rows.block_bytes;
      panel += PANEL_BLOCK_BYTES;
    }
  }

 private:
  static constexpr int NV = 2;

  template <int CHAINS, int M>
  using Sums = vf[CHAINS][M][NV];

  template <int M, int64_t PREFETCH, int FIRST, int CHAINS>
  [[gnu::always_inline]] static inline void sum_chains(Sums<CHAINS, M>& sum, const ProductRows& rows,
                                                       const char* panel) {
#pragma GCC unroll 2
    for (int chain = 0; chain < CHAINS; ++chain)
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) sum[chain][m][n] = vf{};
#pragma GCC unroll 2
    for (int step = 0; step < Chains::STEPS; ++step) {
#pragma GCC unroll 2
      for (int chain = FIRST; chain < FIRST + CHAINS; ++chain) {
        if constexpr (PREFETCH > 0) prefetch(panel + PREFETCH, chain, step);
        Chains::Number weights[NV];
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) weights[n] = Chains::weights_of(panel + n * W * 4, chain, step);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          const Chains::Number input = Chains::input(rows.data + m * rows.row_bytes, chain, step);
#pragma GCC unroll 2
          for (int n = 0; n < NV; ++n)
            sum[chain - FIRST][m][n] = Chains::add_product(sum[chain - FIRST][m][n], input, weights[n], chain);
        }
      }
    }
  }
  // Prefetches a part of a block at each step: many lines at once would keep the loads of this block waiting.
  static void prefetch(const char* block, int chain, int step) {
    constexpr int STEPS_PER_ROW = 2 * Chains::STEPS / BLOCK_PAIRS;
    if (step % STEPS_PER_ROW) return;
    const char* row = block + (chain * Chains::STEPS + step) / STEPS_PER_ROW * PANEL_COLUMNS * 4;
#pragma GCC unroll 2
    for (int line = 0; line < NV * W * 4; line += 64) __builtin_prefetch(row + line);
  }
  template <int M, int64_t PREFETCH>
  static void add_block(ProductSums sums, const ProductRows& rows, const char* panel) {
    // Rearranging terms costs least where both chains share it.
    if constexpr (REGISTERS == 32 && M > MAX_ROWS_OF_TWO_CHAINS) {
      constexpr int FIRST = MAX_ROWS_OF_TWO_CHAINS;
      add_block<FIRST, PREFETCH>(sums, rows, panel);
      add_block<M - FIRST, 0>({sums.data + FIRST * sums.row_stride, sums.row_stride},
                              {rows.data + FIRST * rows.row_bytes, rows.row_bytes, rows.block_bytes}, panel);
    } else if constexpr (M <= MAX_ROWS_OF_TWO_CHAINS) {
      Sums<2, M> chains;
      sum_chains<M, PREFETCH, 0, 2>(chains, rows, panel);
      add_chains<M>(sums, chains[0], chains[1]);
    } else {  // one chain at a time: the registers hold its sums
      Sums<1, M> even, odd;
      sum_chains<M, PREFETCH, 0, 1>(even, rows, panel);
      sum_chains<M, PREFETCH, 1, 1>(odd, rows, panel);
      add_chains<M>(sums, even[0], odd[0]);
    }
  }
  template <int M>
  [[gnu::always_inline]] static inline void add_chains(ProductSums sums, const vf (&even)[M][NV],
                                                       const vf (&odd)[M][NV]) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) {
        float* total = sums.data + m * sums.row_stride + n * W;
        store(total, load(total) + (even[m][n] + odd[m][n]));
      }
  }
};

#ifdef GPTFAST_HAS_TILES

// Products by tiles: 16 rows, or ROWS. The caller has a TileScope. Rows of inputs are plain bf16.
struct TileProducts {
  static constexpr int ROWS = 2 * TILE_ROWS;
  static constexpr int64_t INPUT_BYTES = 64;

  static void convert_inputs(const bf16* x, char* block) { memcpy(block, x, INPUT_BYTES); }

  template <int M>
  static void add(ProductSums sums, ProductRows rows, int64_t blocks, const char* panel) {
    static_assert(M == TILE_ROWS || M == ROWS);
    constexpr bool TWO = M == ROWS;
    constexpr int64_t PANEL_ROW_BYTES = PANEL_COLUMNS * 4;
    float *c0 = sums.data, *c1 = c0 + TILE_ROWS * sums.row_stride;
    const int64_t c_bytes = sums.row_stride * 4;
    tile_load<0>(c0, c_bytes);
    tile_load<1>(c0 + 16, c_bytes);
    if constexpr (TWO) {
      tile_load<2>(c1, c_bytes);
      tile_load<3>(c1 + 16, c_bytes);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      tile_load<4>(rows.data, rows.row_bytes);
      tile_load<6>(panel, PANEL_ROW_BYTES);
      tile_dot_bf16<0, 4, 6>();
      tile_load<7>(panel + TILE_BYTES, PANEL_ROW_BYTES);
      tile_dot_bf16<1, 4, 7>();
      if constexpr (TWO) {
        tile_load<5>(rows.data + TILE_ROWS * rows.row_bytes, rows.row_bytes);
        tile_dot_bf16<2, 5, 6>();
        tile_dot_bf16<3, 5, 7>();
      }
      rows.data += rows.block_bytes;
      panel += PANEL_BLOCK_BYTES;
    }
    tile_store<0>(c0, c_bytes);
    tile_store<1>(c0 + 16, c_bytes);
    if constexpr (TWO) {
      tile_store<2>(c1, c_bytes);
      tile_store<3>(c1 + 16, c_bytes);
    }
  }
};
#endif

}  // namespace gptfast::GPTFAST_LEVEL
