// The product of fp32 matrices by bf16 parts: x = x1 + x2 + x3, where each part is what is left of x, rounded to bf16.
// Of the products of the parts, panels_bf16.h adds the largest: with three parts, the result is as exact as that of
// fp32 products. kernels/reference/matmul.py is the same in PyTorch.
//
// Numbers are multiplied by 2^24 before they are split, so that no part is below the smallest normal number, which
// tiles take for 0. A number so large that a part or a sum is inf or NaN, or that is so itself, makes sums that are not
// finite; these sums are then computed once more, by products in fp32. The others keep their bits.
#include "blocked_product.h"
#include "panels_bf16.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int MAX_PARTS = PanelProduct::MAX_PARTS;
constexpr float SCALE = 0x1p24f, UNSCALE = 0x1p-48f;

// Writes the parts of n numbers, `stride` apart, each to its own matrix of `size` numbers.
template <int PARTS>
void split(const float* x, int64_t stride, int64_t n, bf16* to, int64_t size) {
  for (int64_t i = 0; i < n; i += W) {
    const int64_t lanes = smaller<int64_t>(W, n - i);
    vf rest = load_apart(x + i * stride, stride, lanes) * SCALE;
#pragma GCC unroll 3
    for (int part = 0; part < PARTS; ++part) {
      bf16* p = to + part * size + i;
      store_n(p, rest, lanes);
      rest -= load_n(p, lanes);
    }
  }
}

template <int PARTS>
struct PartsProduct : PanelProduct {
  static constexpr int64_t KC = PanelProduct::KC / PARTS / UNIT * UNIT;
  static constexpr int64_t A_FLOATS = PARTS * PanelProduct::A_FLOATS, B_FLOATS = PARTS * PanelProduct::B_FLOATS;
  static constexpr int64_t MAX_PACKED_BLOCKS = 4 * PARTS;
  const MatmulPartsArgs& args;

  // A panel is the panels of its parts, one after the other.
  void pack_a(int64_t m, int64_t rows, int64_t k, int64_t K, float* to) const {
    alignas(64) bf16 parts[PARTS * ROWS * KC + W];
    const Layout layout = split_panel(a(m, k), args.a_row_stride, args.a_col_stride, rows, K, parts);
    const int64_t floats = Blocks<PartsProduct>::units(K) * PanelProduct::A_FLOATS;
    for (int part = 0; part < PARTS; ++part)
      PanelProduct::pack_a(parts + part * rows * K, layout.x_p, layout.x_k, rows, K, to + part * floats);
  }
  void pack_b(int64_t n, int64_t columns, int64_t k, int64_t K, float* to) const {
    alignas(64) bf16 parts[PARTS * COLUMNS * KC + W];
    const Layout layout = split_panel(b(k, n), args.b_col_stride, args.b_row_stride, columns, K, parts);
    const int64_t floats = Blocks<PartsProduct>::units(K) * PanelProduct::B_FLOATS;
    for (int part = 0; part < PARTS; ++part)
      PanelProduct::pack_b(parts + part * columns * K, layout.x_p, layout.x_k, columns, K, to + part * floats);
  }
  static void multiply(int64_t units, const float* a, const float* b, float* sums, bool accumulate) {
    multiply_parts<PARTS>(units, a, b, sums, accumulate);
  }
  void finish(int64_t m, int64_t n, int64_t rows, int64_t columns, float* sums) const {
    vi infinite{};
    for (int64_t i = 0; i < ROWS * COLUMNS; i += W) {
      const vf sum = load(sums + i);
      infinite |= ~(sum - sum == 0.0f);
      store(sums + i, sum * UNSCALE);
    }
    if (any(infinite)) replace_infinite(m, n, rows, columns, sums);
    store_tile<float, COLUMNS>(args, m, n, rows, columns, sums);
  }

 private:
  struct Layout {
    int64_t x_p, x_k;  // strides of the rows (or columns) of a panel, and of its terms
  };

  const float* a(int64_t m, int64_t k) const { return args.a + m * args.a_row_stride + k * args.a_col_stride; }
  const float* b(int64_t k, int64_t n) const { return args.b + k * args.b_row_stride + n * args.b_col_stride; }

  // Splits n rows (or columns) of K terms. Their parts lie side by side along what lies side by side in x.
  static Layout split_panel(const float* x, int64_t x_p, int64_t x_k, int64_t n, int64_t K, bf16* parts) {
    if (x_k == 1) {
      for (int64_t p = 0; p < n; ++p) split<PARTS>(x + p * x_p, 1, K, parts + p * K, n * K);
      return {K, 1};
    }
    for (int64_t k = 0; k < K; ++k) split<PARTS>(x + k * x_k, x_p, n, parts + k * n, n * K);
    return {1, n};
  }

  // Replaces the sums that are not finite by those of products in fp32.
  void replace_infinite(int64_t m, int64_t n, int64_t rows, int64_t columns, float* sums) const {
    alignas(64) float fp32[ROWS * COLUMNS];
    multiply_fp32(m, n, rows, columns, fp32);
    for (int64_t i = 0; i < ROWS * COLUMNS; i += W) {
      const vf sum = load(sums + i);
      store(sums + i, sum - sum == 0.0f ? sum : load(fp32 + i));
    }
  }

  // Sets sums to the product in fp32.
  void multiply_fp32(int64_t m, int64_t n, int64_t rows, int64_t columns, float* sums) const {
    constexpr int64_t TERMS = 128;
    alignas(64) float panel_a[TERMS * ROWS + W], panel_b[TERMS * COLUMNS + W];
    memset(sums, 0, ROWS * COLUMNS * sizeof(float));
    for (int64_t k0 = 0; k0 < args.K; k0 += TERMS) {
      const int64_t K = smaller(TERMS, args.K - k0);
      pack<ROWS, Floats>(a(m, k0), args.a_row_stride, args.a_col_stride, rows, K, panel_a);
      pack<COLUMNS, Floats>(b(k0, n), args.b_col_stride, args.b_row_stride, columns, K, panel_b);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < COLUMNS; j += W) {
          vf sum{};
          for (int64_t k = 0; k < K; ++k) sum += panel_a[k * ROWS + i] * load(panel_b + k * COLUMNS + j);
          float* total = sums + i * COLUMNS + j;
          store(total, load(total) + sum);
        }
    }
  }
};

template <int PARTS>
void run_parts(const MatmulPartsArgs& args, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  if constexpr (PARTS <= MAX_PARTS) {
    [[maybe_unused]] const PanelProduct::Scope scope;
    const PartsProduct<PARTS> product{{}, args};
    BlockedProduct<PartsProduct<PARTS>>(product, args.K).run(m0, m1, n0, n1);
  }
}

// Computes rows m0 .. m1 and columns n0 .. n1 of C.
void run(const MatmulPartsArgs& args, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  if (m0 >= m1 || n0 >= n1) return;
  switch (args.parts) {
    case 1:
      return run_parts<1>(args, m0, m1, n0, n1);
    case 2:
      return run_parts<2>(args, m0, m1, n0, n1);
    case 3:
      return run_parts<3>(args, m0, m1, n0, n1);
  }
}

}  // namespace

extern const MatmulPartsLoops matmul_parts = {MAX_PARTS, PanelProduct::ROWS, PanelProduct::COLUMNS, run};

}  // namespace gptfast::GPTFAST_LEVEL
