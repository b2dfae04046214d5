// fp32: PyTorch's library MKL reaches 95% of the peak on Intel's CPUs. On others with AVX-512 it uses only AVX2 and
// reaches half of the peak; there, our own loops multiply matrices of some size.
//
// bf16: our own loops multiply matrices of some size on every CPU. PyTorch's library oneDNN takes five times as long on
// CPUs without arithmetic in bf16, and on the others it needs passes for what our loops do as they store.
//
// fp32 by bf16 parts: where the level multiplies so many parts of each number faster than fp32 numbers. PyTorch's
// setting says how many there are: torch.set_float32_matmul_precision, in whose words "highest" is as exact as fp32.
//
// Only the CPU, the level, the sizes and that setting decide this, so runs repeat bit for bit.
#include "matmul.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <climits>

#include "arena.h"
#include "common.h"

// The BLAS in PyTorch's library, if it shows it: c = op(a) op(b) + beta c, with columns one after the other.
extern "C" [[gnu::weak]] void sgemm_(const char* op_a, const char* op_b, const int* m, const int* n, const int* k,
                                     const float* alpha, const float* a, const int* a_stride, const float* b,
                                     const int* b_stride, const float* beta, float* c, const int* c_stride);

namespace gptfast {
namespace {

bool is_intel() {
#ifdef __x86_64__
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

constexpr int64_t AVX512_FLOATS = 16;  // in a vector
constexpr int64_t MIN_SIZE = 32;       // of M, N and K: for a smaller product, packing costs more than it gains
// The same of products by 1, 2 and 3 bf16 parts. Counted, not measured, in cycles of a core: M N K products take 1/32
// each in fp32, and 1/224 for each of 1, 3 or 6 products of parts, by the rates of whole products on tiles and MKL's.
// To split and pack a number takes 0.2 more for each part, to finish a sum 0.2. So three parts gain where M N K (1/32 -
// 6/224) > 0.5 (M K + K N) + 0.2 M N: from 270 on if M = N = K, two parts from 50 on, one from 15 on.
constexpr int64_t MIN_SIZE_BY_PARTS[] = {0, MIN_SIZE, 64, 256};

std::optional<bool>& chosen_by_user() {
  static std::optional<bool> use_own;
  return use_own;
}
bool use_own_fp32() {
  static const bool library_is_fast = is_intel();
  return chosen_by_user().value_or(loops().matmul->vector_floats >= AVX512_FLOATS && !library_is_fast);
}

// The loops of products by bf16 parts and the number of parts, or no loops where such products are slower.
struct Parts {
  const MatmulPartsLoops* loops;
  int n;
};
Parts parts_in_use() {
  const MatmulPartsLoops* parts = loops().matmul_parts;
  const int n = parts_asked_for();
  return chosen_by_user().value_or(true) && n <= parts->max_parts ? Parts{parts, n} : Parts{};
}

bool is_fp32_or_bf16(const Tensor& t) { return t.scalar_type() == kFloat || t.scalar_type() == kBFloat16; }

enum class Product { library, fp32, bf16, parts };

// The parts are read once, here: another thread may change the level or PyTorch's setting at any time.
struct Choice {
  Product product;
  Parts parts = {};
};

Choice choose_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  const int64_t size = std::min({a.size(0), a.size(1), b.size(1)});
  if (size < MIN_SIZE) return {Product::library};
  switch (a.scalar_type()) {
    case kFloat: {
      if (b.scalar_type() != kFloat || out.scalar_type() != kFloat) return {Product::library};
      const Parts parts = parts_in_use();
      if (parts.loops && (chosen_by_user() || size >= MIN_SIZE_BY_PARTS[parts.n])) return {Product::parts, parts};
      return {use_own_fp32() ? Product::fp32 : Product::library};
    }
    case kBFloat16: {
      const bool own = is_fp32_or_bf16(b) && is_fp32_or_bf16(out) && chosen_by_user().value_or(true);
      return {own ? Product::bf16 : Product::library};
    }
    default:
      return {Product::library};
  }
}

// A division of M x N among the threads.
struct Grid {
  int64_t rows, columns;
};

// Returns the grid at which the threads pack the least in total.
Grid best_grid(int64_t M, int64_t N, int64_t threads) {
  Grid best{1, threads};
  for (int64_t rows = 2; rows <= threads; ++rows)
    if (threads % rows == 0 && M * (threads / rows) + N * rows < M * best.columns + N * best.rows)
      best = {rows, threads / rows};
  return best;
}

// Returns size / parts, rounded up to a multiple.
int64_t share(int64_t size, int64_t parts, int64_t multiple) {
  return (size + parts * multiple - 1) / (parts * multiple) * multiple;
}

template <class Loops, class Args>
void multiply(const Loops& product, const Args& args) {
  const Grid grid = best_grid(args.M, args.N, available_threads());
  const int64_t m = share(args.M, grid.rows, product.tile_rows), n = share(args.N, grid.columns, product.tile_columns);
  parallel_for(0, grid.rows * grid.columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t m0 = part / grid.columns * m, n0 = part % grid.columns * n;
      product.run(args, m0, std::min(args.M, m0 + m), n0, std::min(args.N, n0 + n));
    }
  });
}

const bf16* bf16_data(const Tensor& t) { return t.defined() ? static_cast<const bf16*>(t.const_data_ptr()) : nullptr; }

void multiply_fp32(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias, bool accumulate) {
  multiply(*loops().matmul,
           MatmulArgs{a.size(0), b.size(1), a.size(1), a.const_data_ptr<float>(), a.stride(0), a.stride(1),
                      b.const_data_ptr<float>(), b.stride(0), b.stride(1), out.data_ptr<float>(), out.stride(0),
                      bias.defined() ? bias.const_data_ptr<float>() : nullptr, accumulate});
}

// bias and residual may be undefined.
void multiply_parts(const Parts& parts, const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias,
                    const Tensor& residual, bool accumulate) {
  MatmulPartsArgs args{a.size(0),
                       b.size(1),
                       a.size(1),
                       a.const_data_ptr<float>(),
                       a.stride(0),
                       a.stride(1),
                       b.const_data_ptr<float>(),
                       b.stride(0),
                       b.stride(1)};
  args.c = out.data_ptr<float>();
  args.c_row_stride = out.stride(0);
  args.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  args.residual = residual.defined() ? residual.const_data_ptr<float>() : nullptr;
  args.residual_row_stride = residual.defined() ? residual.stride(0) : 0;
  args.accumulate = accumulate;
  args.parts = parts.n;
  multiply(*parts.loops, args);
}

// out and b are bf16 or fp32. bias and residual may be undefined; residual has out's dtype.
void multiply_bf16(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias, const Tensor& residual,
                   bool accumulate) {
  MatmulBf16Args args{a.size(0),   b.size(1),          a.size(1),   bf16_data(a), a.stride(0),
                      a.stride(1), b.const_data_ptr(), b.stride(0), b.stride(1)};
  args.b_dtype = dtype_of(b);
  args.c_dtype = dtype_of(out);
  args.c = out.data_ptr();
  args.c_row_stride = out.stride(0);
  args.bias = bf16_data(bias);
  args.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
  args.residual_row_stride = residual.defined() ? residual.stride(0) : 0;
  args.accumulate = accumulate;
  multiply(*loops().matmul_bf16, args);
}

// A matrix as BLAS takes it: rows, or with `transposed` columns, `stride` apart.
struct BlasMatrix {
  Tensor t;
  bool transposed;
  int stride;
  explicit BlasMatrix(const Tensor& x) : t(x) {
    const auto fits = [&](int64_t inner, int64_t outer) {
      return t.stride(inner) == 1 && t.stride(outer) >= t.size(inner) && t.stride(outer) <= INT_MAX;
    };
    // Not contiguous(): it leaves the stride of a dimension of size 1 as it is.
    if (!fits(1, 0) && !fits(0, 1)) {
      t = empty(x.sizes(), x.scalar_type());
      copy(t, x);
    }
    transposed = !fits(1, 0);
    stride = static_cast<int>(t.stride(transposed ? 1 : 0));
  }
  const char* op() const { return transposed ? "T" : "N"; }
};

// Computes out = a b, or out += a b, in fp32 whatever PyTorch is set to.
void multiply_by_blas(const Tensor& out, const Tensor& a_in, const Tensor& b_in, bool accumulate) {
  const BlasMatrix a(a_in), b(b_in);
  const int m = static_cast<int>(out.size(0)), n = static_cast<int>(out.size(1)), k = static_cast<int>(a_in.size(1)),
            out_stride = static_cast<int>(std::max(out.stride(0), out.size(1)));
  const float one = 1, beta = accumulate ? 1 : 0;
  // Columns one after the other are the rows of the transposed product, b^T a^T.
  sgemm_(b.op(), a.op(), &n, &m, &k, &one, b.t.const_data_ptr<float>(), &b.stride, a.t.const_data_ptr<float>(),
         &a.stride, &beta, out.data_ptr<float>(), &out_stride);
}

// Whether to go around PyTorch's own product: with "medium" it rounds to bf16 on every CPU with AVX-512, which takes
// twice as long on one without arithmetic in bf16.
bool avoids_library(const Tensor& a, const Tensor& b) {
  return sgemm_ != nullptr && a.scalar_type() == kFloat && parts_asked_for() == 1 && a.numel() > 0 && b.numel() > 0 &&
         std::max({a.size(0), a.size(1), b.size(1)}) <= INT_MAX;
}

// Returns t, which may be undefined, contiguous and in a dtype.
Tensor contiguous_in(const Tensor& t, ScalarType dtype) { return t.defined() ? contiguous(to(t, dtype)) : t; }

// Returns a row as n rows, without a copy.
Tensor repeated(const Tensor& row, int64_t n) { return row.view(0, {n, row.size(0)}, {0, 1}); }

// Computes out = a b + added by PyTorch's own product; added is a row, out itself or undefined.
void multiply_by_torch(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& added) {
  out.with_plain([&](AtenTensorHandle c) {
    a.with_plain([&](AtenTensorHandle left) {
      b.with_plain([&](AtenTensorHandle right) {
        if (!added.defined()) return check_torch(aoti_torch_cpu_mm_out(c, left, right));
        // Given another tensor of the same memory, PyTorch would copy it onto itself.
        if (added.const_data_ptr() == out.const_data_ptr())
          return check_torch(aoti_torch_cpu_addmm_out(c, c, left, right, 1, 1));
        added.with_plain(
            [&](AtenTensorHandle sum) { check_torch(aoti_torch_cpu_addmm_out(c, sum, left, right, 1, 1)); });
      });
    });
  });
}

}  // namespace

const char* matmul_provider() { return parts_in_use().loops || use_own_fp32() ? "gptfast" : "library"; }

void set_matmul_provider(const std::string& name) {
  CHECK_VALUE(name == "gptfast" || name == "library" || name.empty(),
              "matmul provider must be 'gptfast', 'library' or '' (by the CPU), got '", name, "'");
  chosen_by_user() = name.empty() ? std::nullopt : std::optional(name == "gptfast");
}

void matmul(const Tensor& out, const Tensor& a, const Tensor& b_in, const Tensor& bias_in, bool accumulate) {
  const Tensor bias = contiguous_in(bias_in, a.scalar_type());
  const Choice choice = choose_product(out, a, b_in);
  switch (choice.product) {
    case Product::fp32:
      return multiply_fp32(out, a, b_in, bias, accumulate);
    case Product::bf16:
      return multiply_bf16(out, a, b_in, bias, {}, accumulate);
    case Product::parts:
      return multiply_parts(choice.parts, out, a, b_in, bias, {}, accumulate);
    case Product::library:
      break;
  }
  const Tensor b = to(b_in, a.scalar_type());
  if (out.scalar_type() != a.scalar_type()) {
    const Tensor product = make_tensor(out.sizes(), a.scalar_type());
    matmul(product, a, b, bias);
    accumulate ? add(out, out, product) : copy(out, product);
  } else if (avoids_library(a, b)) {
    if (bias.defined()) copy(out, repeated(bias, out.size(0)));
    multiply_by_blas(out, a, b, accumulate || bias.defined());
  } else {
    multiply_by_torch(out, a, b, accumulate ? out : bias);
  }
}

void linear(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias_in, const Tensor& residual) {
  if (!residual.defined()) return matmul(out, a, b, bias_in);
  const Tensor bias = contiguous_in(bias_in, a.scalar_type());
  const Choice choice = choose_product(out, a, b);
  if (choice.product == Product::bf16) return multiply_bf16(out, a, b, bias, contiguous_rows(residual), false);
  if (choice.product == Product::parts)
    return multiply_parts(choice.parts, out, a, b, bias, contiguous_rows(residual), false);
  if (bias.defined())
    add(out, to(residual, out.scalar_type()), repeated(bias, out.size(0)));
  else
    copy(out, residual);
  matmul(out, a, b, {}, true);
}

}  // namespace gptfast
