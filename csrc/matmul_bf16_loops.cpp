// The product of bf16 matrices, by the blocks of matmul_loops.cpp.
//
// Sums are fp32 from the first term to the last, and rounded once. Between the blocks of K they wait in scratch memory.
// How the work is divided changes no bit. Tiles add in the order that products_bf16.h describes; the other levels add
// along K, which costs less there.
#include "panels_bf16.h"
#include "scratch.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t MC = 96;                               // rows of A that are packed at once
constexpr int64_t MAX_PACKED_FLOATS = int64_t{1} << 20;  // of B at once: a share of the last-level cache
constexpr int64_t MAX_PACKED_BLOCKS = 4;                 // of KC terms, of B at once

constexpr int64_t ROWS = Product::ROWS, COLUMNS = Product::COLUMNS;
static_assert(MC % ROWS == 0);

// The blocks of K > 0, all of `terms` terms but the last. They depend on K alone.
struct Blocks {
  int64_t K, n, terms;
  explicit Blocks(int64_t K)
      // A sum of more than half a block is two, which rounds less.
      : K(K),
        n(larger<int64_t>((K + Product::KC - 1) / Product::KC, K > Product::KC / 2 ? 2 : 1)),
        terms(round_up((K + n - 1) / n, Product::UNIT)) {}
  int64_t terms_of(int64_t block) const { return smaller(terms, K - block * terms); }
  static int64_t units(int64_t terms) { return (terms + Product::UNIT - 1) / Product::UNIT; }
};

// Writes sums (ROWS x COLUMNS), with all that is added to them, to the rows x columns of C from (m, n) on.
template <class T>
void finish(const MatmulBf16Args& args, int64_t m, int64_t n, int64_t rows, int64_t columns, const float* sums) {
  for (int64_t i = 0; i < rows; ++i) {
    T* c = (T*)args.c + (m + i) * args.c_row_stride + n;
    for (int64_t j = 0; j < columns; j += W) {
      const int64_t lanes = smaller<int64_t>(W, columns - j);
      vf sum = load(sums + i * COLUMNS + j);
      if (args.bias) sum += load_n(args.bias + n + j, lanes);
      if (args.residual) sum += load_n(args.residual + (m + i) * args.residual_row_stride + n + j, lanes);
      if (args.accumulate) sum += load_n(c + j, lanes);
      store_n(c + j, sum, lanes);
    }
  }
}
void finish(const MatmulBf16Args& args, int64_t m, int64_t n, int64_t rows, int64_t columns, const float* sums) {
  if (args.c_dtype == Dtype::fp32)
    finish<float>(args, m, n, rows, columns, sums);
  else
    finish<bf16>(args, m, n, rows, columns, sums);
}

// The sums of a block of C: tile by tile, the columns of a row of tiles side by side.
struct Sums {
  float* data;
  int64_t columns;
  float* at(int64_t row, int64_t column) const { return data + row * columns + column * ROWS; }
};

// Multiplies at most MC rows of A, from m on, with the packed panels of B for one block of K.
void multiply_block(const MatmulBf16Args& args, const Blocks& blocks, int64_t block, int64_t m, int64_t rows, int64_t n,
                    int64_t columns, float* a, const float* b, const Sums& sums) {
  const int64_t K = blocks.terms_of(block), units = Blocks::units(K);
  for (int64_t i = 0; i < rows; i += ROWS)
    Product::pack_a(args.a + (m + i) * args.a_row_stride + block * blocks.terms * args.a_col_stride, args.a_row_stride,
                    args.a_col_stride, smaller(ROWS, rows - i), K, a + i / ROWS * units * Product::A_FLOATS);
  for (int64_t j = 0; j < columns; j += COLUMNS)
    for (int64_t i = 0; i < rows; i += ROWS) {
      float* tile = sums.at(i, j);
      Product::multiply(units, a + i / ROWS * units * Product::A_FLOATS, b + j / COLUMNS * units * Product::B_FLOATS,
                        tile, block > 0);
      if (block == blocks.n - 1)
        finish(args, m + i, n + j, smaller(ROWS, rows - i), smaller(COLUMNS, columns - j), tile);
    }
}

// Computes rows m0 .. m1 and columns n0 .. n1 of C.
void run(const MatmulBf16Args& args, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  if (m0 >= m1 || n0 >= n1) return;
  [[maybe_unused]] const Product::Scope scope;
  const Blocks blocks(args.K);
  const int64_t block_units = Blocks::units(blocks.terms), packed_blocks = smaller(blocks.n, MAX_PACKED_BLOCKS);
  const int64_t panel_floats = packed_blocks * block_units * Product::B_FLOATS;
  const int64_t panels = MAX_PACKED_FLOATS / panel_floats;
  const int64_t packed_columns = smaller(panels * COLUMNS, round_up(n1 - n0, COLUMNS));
  // With all of K packed, each block of rows is finished before the next one begins.
  const bool all_packed = packed_blocks == blocks.n;
  const int64_t sum_rows = all_packed ? MC : round_up(m1 - m0, ROWS);
  const int64_t b_floats = packed_columns / COLUMNS * panel_floats,
                a_floats = MC / ROWS * block_units * Product::A_FLOATS;
  Scratch scratch(b_floats + a_floats + sum_rows * packed_columns + 6 * W);
  float *b = scratch.take(b_floats + W), *a = scratch.take(a_floats + W);
  const Sums sums{scratch.take(sum_rows * packed_columns), packed_columns};
  for (int64_t n = n0; n < n1; n += packed_columns) {
    const int64_t columns = smaller(packed_columns, n1 - n);
    const int64_t packed_floats = (columns + COLUMNS - 1) / COLUMNS * block_units * Product::B_FLOATS;  // of a block
    for (int64_t first = 0; first < blocks.n; first += packed_blocks) {
      const int64_t last = smaller(blocks.n, first + packed_blocks);
      for (int64_t block = first; block < last; ++block) {
        const int64_t K = blocks.terms_of(block), k = block * blocks.terms;
        for (int64_t j = 0; j < columns; j += COLUMNS)
          Product::pack_b(args.b + (n + j) * args.b_col_stride + k * args.b_row_stride, args.b_col_stride,
                          args.b_row_stride, smaller(COLUMNS, columns - j), K,
                          b + (block - first) * packed_floats + j / COLUMNS * Blocks::units(K) * Product::B_FLOATS);
      }
      for (int64_t m = m0; m < m1; m += MC)
        for (int64_t block = first; block < last; ++block)
          multiply_block(args, blocks, block, m, smaller(MC, m1 - m), n, columns, a,
                         b + (block - first) * packed_floats,
                         {sums.data + (all_packed ? 0 : (m - m0) * packed_columns), packed_columns});
    }
  }
}

}  // namespace

extern const MatmulBf16Loops matmul_bf16 = {ROWS, COLUMNS, run};

}  // namespace gptfast::GPTFAST_LEVEL
