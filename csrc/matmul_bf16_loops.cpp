// The product of bf16 matrices, summed in fp32 and rounded once. Tiles add in the order that products_bf16.h describes;
// the other levels add along K, which costs less there.
#include "blocked_product.h"
#include "panels_bf16.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Sets to[0 .. n) to n numbers, `stride` apart, rounded to bf16.
void round_to_bf16(const float* x, int64_t stride, int64_t n, bf16* to) {
  for (int64_t i = 0; i < n; i += W) {
    const int64_t lanes = smaller<int64_t>(W, n - i);
    store_n(to + i, load_apart(x + i * stride, stride, lanes), lanes);
  }
}

struct Bf16Product : PanelProduct {
  static constexpr int64_t MAX_PACKED_BLOCKS = 4;
  const MatmulBf16Args& args;

  void pack_a(int64_t m, int64_t rows, int64_t k, int64_t K, float* to) const {
    PanelProduct::pack_a(args.a + m * args.a_row_stride + k * args.a_col_stride, args.a_row_stride, args.a_col_stride,
                         rows, K, to);
  }
  void pack_b(int64_t n, int64_t columns, int64_t k, int64_t K, float* to) const {
    const int64_t start = n * args.b_col_stride + k * args.b_row_stride;
    if (args.b_dtype == Dtype::bf16)
      PanelProduct::pack_b((const bf16*)args.b + start, args.b_col_stride, args.b_row_stride, columns, K, to);
    else
      round_and_pack((const float*)args.b + start, columns, K, to);
  }
  void round_and_pack(const float* x, int64_t columns, int64_t K, float* to) const {
    if constexpr (UNIT == 1)
      pack<COLUMNS, Rounded>(x, args.b_col_stride, args.b_row_stride, columns, K, to);
    else
      round_apart_and_pack(x, columns, K, to);
  }
  // Rounds in memory that stays in the cache; strides that are no power of two spread it there.
  void round_apart_and_pack(const float* x, int64_t columns, int64_t K, float* to) const {
    constexpr int64_t TERM_STRIDE = COLUMNS, COLUMN_STRIDE = KC + 32;
    bf16 rounded[COLUMNS * COLUMN_STRIDE];
    if (args.b_col_stride == 1) {
      for (int64_t i = 0; i < K; ++i) round_to_bf16(x + i * args.b_row_stride, 1, columns, rounded + i * TERM_STRIDE);
      PanelProduct::pack_b(rounded, 1, TERM_STRIDE, columns, K, to);
      return;
    }
    for (int64_t j = 0; j < columns; ++j)
      round_to_bf16(x + j * args.b_col_stride, args.b_row_stride, K, rounded + j * COLUMN_STRIDE);
    PanelProduct::pack_b(rounded, COLUMN_STRIDE, 1, columns, K, to);
  }
  void finish(int64_t m, int64_t n, int64_t rows, int64_t columns, float* sums) const {
    if (args.c_dtype == Dtype::fp32)
      store_tile<float, COLUMNS>(args, m, n, rows, columns, sums);
    else
      store_tile<bf16, COLUMNS>(args, m, n, rows, columns, sums);
  }
};

// Computes rows m0 .. m1 and columns n0 .. n1 of C.
void run(const MatmulBf16Args& args, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  if (m0 >= m1 || n0 >= n1) return;
  [[maybe_unused]] const PanelProduct::Scope scope;
  const Bf16Product product{{}, args};
  BlockedProduct<Bf16Product>(product, args.K).run(m0, m1, n0, n1);
}

}  // namespace

extern const MatmulBf16Loops matmul_bf16 = {PanelProduct::ROWS, PanelProduct::COLUMNS, run};

}  // namespace gptfast::GPTFAST_LEVEL
