// The product of bf16 matrices, summed in fp32 and rounded once. Tiles add in the order that products_bf16.h describes;
// the other levels add along K, which costs less there.
#include "blocked_product.h"
#include "panels_bf16.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

struct Bf16Product : PanelProduct {
  static constexpr int64_t MAX_PACKED_BLOCKS = 4;
  const MatmulBf16Args& args;

  void pack_a(int64_t m, int64_t rows, int64_t k, int64_t K, float* to) const {
    PanelProduct::pack_a(args.a + m * args.a_row_stride + k * args.a_col_stride, args.a_row_stride, args.a_col_stride,
                         rows, K, to);
  }
  void pack_b(int64_t n, int64_t columns, int64_t k, int64_t K, float* to) const {
    PanelProduct::pack_b(args.b + n * args.b_col_stride + k * args.b_row_stride, args.b_col_stride, args.b_row_stride,
                         columns, K, to);
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
