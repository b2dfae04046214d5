// The matrix product of GotoBLAS (Goto and van de Geijn, 2008): operands are repacked into panels that a register tile
// of MR x NR reads in order. KC terms of a panel of B stay in the first-level cache, a block of A in the second; C is
// read and written once per block of K.
//
// Every element of C is the sum of the same chains of KC terms however the work is divided, so the number of threads
// changes no bit.
#include "panels.h"
#include "scratch.h"
#include "tile.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int NV = 3;                        // with MR: 24 of 32 or 12 of 16 registers hold the tile
constexpr int MR = REGISTERS == 32 ? 8 : 4;  // 8 x 48 divides every width of GPT-2's layers
constexpr int64_t NR = NV * W;
constexpr int64_t KC = 256;
constexpr int64_t MC = 96;
constexpr int64_t MAX_PACKED_TERMS = 4 * KC;             // of B at once
constexpr int64_t MAX_PACKED_FLOATS = int64_t{1} << 20;  // of B at once: a share of the last-level cache

// Sets C (MR x NR) to the product of two panels of K terms, plus C if accumulate, plus the bias if there is one.
void tile(int64_t K, const float* a, const float* b, float* c, int64_t c_row_stride, bool accumulate,
          const float* bias) {
#pragma GCC unroll 8
  for (int64_t m = 0; m < MR; ++m)
#pragma GCC unroll 3
    for (int64_t n = 0; n < NV; ++n) __builtin_prefetch(c + m * c_row_stride + n * W, 1);
  vf acc[MR][NV];
  sum_products(acc, K, a, 1, MR, b, NR);
#pragma GCC unroll 8
  for (int64_t m = 0; m < MR; ++m)
#pragma GCC unroll 3
    for (int64_t n = 0; n < NV; ++n) {
      float* to = c + m * c_row_stride + n * W;
      vf sum = acc[m][n];
      if (accumulate) sum += load(to);
      if (bias) sum += load(bias + n * W);
      store(to, sum);
    }
}

// Does the same for the rows x columns that are left at C's border.
void border(int64_t rows, int64_t columns, int64_t K, const float* a, const float* b, float* c, int64_t c_row_stride,
            bool accumulate, const float* bias) {
  float sums[MR * NR];
  tile(K, a, b, sums, NR, false, nullptr);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < columns; ++n) {
      float sum = sums[m * NR + n];
      if (accumulate) sum += c[m * c_row_stride + n];
      if (bias) sum += bias[n];
      c[m * c_row_stride + n] = sum;
    }
}

// Multiplies at most MC rows of A with the packed panels of B, for K terms.
void multiply_block(const MatmulArgs& args, int64_t m, int64_t rows, int64_t n, int64_t columns, int64_t k, int64_t K,
                    float* a, const float* b) {
  for (int64_t i = 0; i < rows; i += MR)
    pack<MR, Floats>(args.a + (m + i) * args.a_row_stride + k * args.a_col_stride, args.a_row_stride, args.a_col_stride,
                     smaller<int64_t>(MR, rows - i), K, a + i * K);
  const bool accumulate = args.accumulate || k > 0;
  for (int64_t j = 0; j < columns; j += NR) {
    const float* bias = args.bias && k == 0 ? args.bias + n + j : nullptr;
    for (int64_t i = 0; i < rows; i += MR) {
      float* c = args.c + (m + i) * args.c_row_stride + n + j;
      if (columns - j >= NR && rows - i >= MR)
        tile(K, a + i * K, b + j * K, c, args.c_row_stride, accumulate, bias);
      else
        border(smaller<int64_t>(MR, rows - i), smaller<int64_t>(NR, columns - j), K, a + i * K, b + j * K, c,
               args.c_row_stride, accumulate, bias);
    }
  }
}

// Computes rows m0 .. m1 and columns n0 .. n1 of C.
void run(const MatmulArgs& args, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  if (m0 >= m1 || n0 >= n1) return;
  // A sum of more than half a block is two, which rounds less.
  const int64_t blocks = larger<int64_t>((args.K + KC - 1) / KC, args.K > KC / 2 ? 2 : 1);
  const int64_t terms = (args.K + blocks - 1) / blocks;
  const int64_t packed_terms = smaller(blocks, MAX_PACKED_TERMS / KC) * terms;
  const int64_t packed_columns = smaller(MAX_PACKED_FLOATS / packed_terms / NR * NR, round_up(n1 - n0, NR));
  Scratch scratch(packed_terms * packed_columns + MC * terms + 4 * W);
  float *b = scratch.take(packed_terms * packed_columns + W), *a = scratch.take(MC * terms + W);
  for (int64_t n = n0; n < n1; n += packed_columns) {
    const int64_t columns = smaller(packed_columns, n1 - n), padded = round_up(columns, NR);
    for (int64_t k0 = 0; k0 < args.K; k0 += packed_terms) {
      const int64_t k1 = smaller(args.K, k0 + packed_terms);
      for (int64_t k = k0; k < k1; k += terms)
        for (int64_t j = 0; j < columns; j += NR) {
          const int64_t K = smaller(terms, k1 - k);
          pack<NR, Floats>(args.b + (n + j) * args.b_col_stride + k * args.b_row_stride, args.b_col_stride,
                           args.b_row_stride, smaller<int64_t>(NR, columns - j), K, b + (k - k0) * padded + j * K);
        }
      for (int64_t m = m0; m < m1; m += MC)
        for (int64_t k = k0; k < k1; k += terms)
          multiply_block(args, m, smaller(MC, m1 - m), n, columns, k, smaller(terms, k1 - k), a, b + (k - k0) * padded);
    }
  }
}

}  // namespace

extern const MatmulLoops matmul = {W, MR, NR, run};

}  // namespace gptfast::GPTFAST_LEVEL
