// The blocks of a product of packed panels: which parts of A and B are packed when, and who adds what. KC terms of a
// panel of B stay in the first-level cache while all packed rows of A, which stay in the second one, are multiplied by
// them. Meanwhile the next panel of B is fetched: waiting for the last-level cache took a tenth of the time.
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
  BlockedProduct(const P& product, int64_t K)
      : product_(product),
        blocks_(K),
        a_panel_(blocks_.units(blocks_.terms) * P::A_FLOATS),
        b_panel_(blocks_.units(blocks_.terms) * P::B_FLOATS) {}

  // Computes rows m0 .. m1 and columns n0 .. n1 of C.
  void run(int64_t m0, int64_t m1, int64_t n0, int64_t n1) const {
    const int64_t packed_blocks = smaller<int64_t>(blocks_.n, P::MAX_PACKED_BLOCKS);
    const int64_t panels = larger<int64_t>(MAX_B_FLOATS / (packed_blocks * b_panel_), 1);
    const int64_t packed_columns = smaller(panels * P::COLUMNS, round_up(n1 - n0, P::COLUMNS));
    const int64_t packed_rows = rows_at_once(packed_blocks, m1 - m0);
    // With all of K packed, a panel of columns is finished for these rows before the next one begins.
    const bool all_packed = packed_blocks == blocks_.n;
    const int64_t sum_rows = all_packed ? packed_rows : round_up(m1 - m0, P::ROWS);
    const int64_t a_floats = packed_blocks * (packed_rows / P::ROWS) * a_panel_,
                  b_floats = packed_blocks * (packed_columns / P::COLUMNS) * b_panel_,
                  sum_floats = sum_rows * (all_packed ? P::COLUMNS : packed_columns);
    Scratch scratch(a_floats + b_floats + sum_floats + 6 * W);
    Packed packed{scratch.take(b_floats + W), scratch.take(a_floats + W)};
    float* sums = scratch.take(sum_floats);
    for (packed.n = n0; packed.n < n1; packed.n += packed_columns) {
      packed.columns = smaller(packed_columns, n1 - packed.n);
      for (packed.first = 0; packed.first < blocks_.n; packed.first += packed_blocks) {
        packed.blocks = smaller(packed_blocks, blocks_.n - packed.first);
        pack_b(packed);
        for (packed.m = m0; packed.m < m1; packed.m += packed_rows) {
          packed.rows = smaller(packed_rows, m1 - packed.m);
          pack_a(packed);
          multiply(packed, all_packed ? sums : sums + (packed.m - m0) * P::COLUMNS, all_packed ? 0 : sum_rows);
        }
      }
    }
  }

 private:
  static constexpr int64_t MAX_A_FLOATS = 12 * 1024 * W;  // of A at once, with sums: a share of the second-level cache
  static constexpr int64_t MAX_B_FLOATS = int64_t{1} << 20;  // of B at once: a share of the last-level cache

  // What is packed: blocks of K, rows of A, columns of B. Panels of B are in the order in which they are read; those of
  // A are in the order in which they are written, since a panel may be written past its end.
  struct Packed {
    float *b, *a;
    int64_t first = 0, blocks = 0, m = 0, rows = 0, n = 0, columns = 0;
  };

  float* b_panel(const Packed& packed, int64_t j, int64_t block) const {
    return packed.b + (j / P::COLUMNS * packed.blocks + block) * b_panel_;
  }
  float* a_panel(const Packed& packed, int64_t i, int64_t block) const {
    return packed.a + (block * ((packed.rows + P::ROWS - 1) / P::ROWS) + i / P::ROWS) * a_panel_;
  }
  int64_t rows_at_once(int64_t packed_blocks, int64_t rows) const {
    const int64_t floats = packed_blocks * a_panel_ + P::ROWS * P::COLUMNS;  // for the rows of a panel
    return smaller(larger<int64_t>(MAX_A_FLOATS / floats, 1) * P::ROWS, round_up(rows, P::ROWS));
  }

  void pack_b(const Packed& packed) const {
    for (int64_t j = 0; j < packed.columns; j += P::COLUMNS)
      for (int64_t block = 0; block < packed.blocks; ++block)
        product_.pack_b(packed.n + j, smaller<int64_t>(P::COLUMNS, packed.columns - j),
                        (packed.first + block) * blocks_.terms, blocks_.terms_of(packed.first + block),
                        b_panel(packed, j, block));
  }
  void pack_a(const Packed& packed) const {
    for (int64_t block = 0; block < packed.blocks; ++block)
      for (int64_t i = 0; i < packed.rows; i += P::ROWS)
        product_.pack_a(packed.m + i, smaller<int64_t>(P::ROWS, packed.rows - i),
                        (packed.first + block) * blocks_.terms, blocks_.terms_of(packed.first + block),
                        a_panel(packed, i, block));
  }

  // Multiplies the packed panels. The sums of a panel of columns are tile by tile; those of the next panel are
  // `sum_rows` rows further on.
  void multiply(const Packed& packed, float* sums, int64_t sum_rows) const {
    for (int64_t j = 0; j < packed.columns; j += P::COLUMNS)
      for (int64_t block = 0; block < packed.blocks; ++block) {
        const int64_t k = packed.first + block, units = blocks_.units(blocks_.terms_of(k));
        const float* b = b_panel(packed, j, block);
        for (int64_t i = 0; i < packed.rows; i += P::ROWS) {
          float* tile = sums + j * sum_rows + i * P::COLUMNS;
          fetch_part(b + b_panel_, i, packed.rows);
          product_.multiply(units, a_panel(packed, i, block), b, tile, k > 0);
          if (k == blocks_.n - 1)
            product_.finish(packed.m + i, packed.n + j, smaller<int64_t>(P::ROWS, packed.rows - i),
                            smaller<int64_t>(P::COLUMNS, packed.columns - j), tile);
        }
      }
  }
  // Fetches the part of a panel of B that falls to a panel of A, from row i on, into the second-level cache.
  void fetch_part(const float* panel, int64_t i, int64_t rows) const {
    constexpr int64_t LINE = 16;  // floats
    const int64_t lines = (b_panel_ / LINE * P::ROWS + rows - 1) / rows, first = i / P::ROWS * lines;
    for (int64_t line = first; line < first + lines; ++line) __builtin_prefetch(panel + line * LINE, 0, 2);
  }

  const P& product_;
  const Blocks<P> blocks_;
  const int64_t a_panel_, b_panel_;  // floats of a panel of a block
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
