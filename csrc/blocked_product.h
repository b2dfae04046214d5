// The blocks of a product of packed panels: which parts of A and B are packed when, and who adds what. KC terms of a
// panel of B stay in the first-level cache, MC rows of A in the second one.
//
// Sums are fp32 from the first term to the last; between the blocks of K they wait in scratch memory. How the work is
// divided changes no bit.
//
// A product P has these members:
//   ROWS, COLUMNS                      of a tile of C: of a panel of A and of B
//   UNIT, A_FLOATS, B_FLOATS           terms of a unit, and how many floats a unit takes of a panel of A and of B
//   KC, MAX_PACKED_BLOCKS              terms of a block, and how many blocks of B are packed at once
//   pack_a(m, rows, k, K, to)          packs K terms, from k on, of at most ROWS rows of A, from m on
//   pack_b(n, columns, k, K, to)       packs K terms, from k on, of at most COLUMNS columns of B, from n on
//   multiply(units, a, b, sums, add)   sets sums (ROWS x COLUMNS) to the product of two panels, or adds it
//   finish(m, n, rows, columns, sums)  takes the sums of a tile of C, which may change them
#pragma once

#include "scratch.h"

namespace gptfast::GPTFAST_LEVEL {

// The blocks of K > 0 terms, all of `terms` terms but the last. They depend on K alone.
template <class P>
struct Blocks {
  int64_t K, n, terms;
  explicit Blocks(int64_t K)
      // A sum of more than half a block is two, which rounds less.
      : K(K),
        n(larger<int64_t>((K + P::KC - 1) / P::KC, K > P::KC / 2 ? 2 : 1)),
        terms(round_up((K + n - 1) / n, P::UNIT)) {}
  int64_t terms_of(int64_t block) const { return smaller(terms, K - block * terms); }
  static int64_t units(int64_t terms) { return (terms + P::UNIT - 1) / P::UNIT; }
};

template <class P>
class BlockedProduct {
 public:
  BlockedProduct(const P& product, int64_t K) : product_(product), blocks_(K) {}

  // Computes rows m0 .. m1 and columns n0 .. n1 of C.
  void run(int64_t m0, int64_t m1, int64_t n0, int64_t n1) const {
    const int64_t block_units = blocks_.units(blocks_.terms),
                  packed_blocks = smaller<int64_t>(blocks_.n, P::MAX_PACKED_BLOCKS);
    const int64_t panel_floats = packed_blocks * block_units * P::B_FLOATS;
    const int64_t panels = larger<int64_t>(MAX_PACKED_FLOATS / panel_floats, 1);
    const int64_t packed_columns = smaller(panels * P::COLUMNS, round_up(n1 - n0, P::COLUMNS));
    // With all of K packed, each block of rows is finished before the next one begins.
    const bool all_packed = packed_blocks == blocks_.n;
    const int64_t sum_rows = all_packed ? MC : round_up(m1 - m0, P::ROWS);
    const int64_t b_floats = packed_columns / P::COLUMNS * panel_floats,
                  a_floats = MC / P::ROWS * block_units * P::A_FLOATS;
    Scratch scratch(b_floats + a_floats + sum_rows * packed_columns + 6 * W);
    float *b = scratch.take(b_floats + W), *a = scratch.take(a_floats + W);
    const Sums sums{scratch.take(sum_rows * packed_columns), packed_columns};
    for (int64_t n = n0; n < n1; n += packed_columns) {
      const int64_t columns = smaller(packed_columns, n1 - n);
      const int64_t packed_floats = (columns + P::COLUMNS - 1) / P::COLUMNS * block_units * P::B_FLOATS;  // of a block
      for (int64_t first = 0; first < blocks_.n; first += packed_blocks) {
        const int64_t last = smaller(blocks_.n, first + packed_blocks);
        for (int64_t block = first; block < last; ++block) {
          const int64_t K = blocks_.terms_of(block);
          for (int64_t j = 0; j < columns; j += P::COLUMNS)
            product_.pack_b(n + j, smaller<int64_t>(P::COLUMNS, columns - j), block * blocks_.terms, K,
                            b + (block - first) * packed_floats + j / P::COLUMNS * blocks_.units(K) * P::B_FLOATS);
        }
        for (int64_t m = m0; m < m1; m += MC)
          for (int64_t block = first; block < last; ++block)
            multiply_block(block, m, smaller(MC, m1 - m), n, columns, a, b + (block - first) * packed_floats,
                           {sums.data + (all_packed ? 0 : (m - m0) * packed_columns), packed_columns});
      }
    }
  }

 private:
  static constexpr int64_t MC = 96;                               // rows of A that are packed at once
  static constexpr int64_t MAX_PACKED_FLOATS = int64_t{1} << 20;  // of B at once: a share of the last-level cache
  static_assert(MC % P::ROWS == 0);

  // The sums of a block of C: tile by tile, the columns of a row of tiles side by side.
  struct Sums {
    float* data;
    int64_t columns;
    float* at(int64_t row, int64_t column) const { return data + row * columns + column * P::ROWS; }
  };

  // Multiplies at most MC rows of A, from m on, with the packed panels of B for one block of K.
  void multiply_block(int64_t block, int64_t m, int64_t rows, int64_t n, int64_t columns, float* a, const float* b,
                      const Sums& sums) const {
    const int64_t K = blocks_.terms_of(block), units = blocks_.units(K);
    for (int64_t i = 0; i < rows; i += P::ROWS)
      product_.pack_a(m + i, smaller<int64_t>(P::ROWS, rows - i), block * blocks_.terms, K,
                      a + i / P::ROWS * units * P::A_FLOATS);
    for (int64_t j = 0; j < columns; j += P::COLUMNS)
      for (int64_t i = 0; i < rows; i += P::ROWS) {
        float* tile = sums.at(i, j);
        product_.multiply(units, a + i / P::ROWS * units * P::A_FLOATS, b + j / P::COLUMNS * units * P::B_FLOATS, tile,
                          block > 0);
        if (block == blocks_.n - 1)
          product_.finish(m + i, n + j, smaller<int64_t>(P::ROWS, rows - i), smaller<int64_t>(P::COLUMNS, columns - j),
                          tile);
      }
  }

  const P& product_;
  const Blocks<P> blocks_;
};

// Writes sums (rows of COLUMNS), with all that is added to them, to the rows x columns of C from (m, n) on. Args is
// MatmulBf16Args or MatmulPartsArgs, T the type of C.
template <class T, int64_t COLUMNS, class Args>
void store_tile(const Args& args, int64_t m, int64_t n, int64_t rows, int64_t columns, const float* sums) {
  for (int64_t i = 0; i < rows; ++i) {
    T* c = (T*)args.c + (m + i) * args.c_row_stride + n;
    for (int64_t j = 0; j < columns; j += W) {
      const int64_t lanes = smaller<int64_t>(W, columns - j);
      vf sum = load(sums + i * COLUMNS + j);
      if (args.bias) sum += load_n(args.bias + n + j, lanes);
      if (args.residual) sum += load_n((const T*)args.residual + (m + i) * args.residual_row_stride + n + j, lanes);
      if (args.accumulate) sum += load_n(c + j, lanes);
      store_n(c + j, sum, lanes);
    }
  }
}

}  // namespace gptfast::GPTFAST_LEVEL
