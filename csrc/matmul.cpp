// PyTorch's library MKL reaches 95% of the peak on Intel's CPUs. On others with AVX-512 it uses only AVX2 and reaches
// half of the peak; there, our own loops multiply fp32 matrices of some size. Only the CPU and the level decide this,
// so runs repeat bit for bit.
#include "matmul.h"

#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "common.h"

namespace gptfast {
namespace {

using at::Tensor;

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

std::optional<bool>& chosen_by_user() {
  static std::optional<bool> use_own;
  return use_own;
}
bool use_own_product() {
  static const bool library_is_fast = is_intel();
  return chosen_by_user().value_or(loops().matmul->vector_floats >= AVX512_FLOATS && !library_is_fast);
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

void multiply(const MatmulArgs& args) {
  const MatmulLoops& product = *loops().matmul;
  const Grid grid = best_grid(args.M, args.N, at::in_parallel_region() ? 1 : at::get_num_threads());
  const int64_t m = share(args.M, grid.rows, product.tile_rows), n = share(args.N, grid.columns, product.tile_columns);
  at::parallel_for(0, grid.rows * grid.columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t m0 = part / grid.columns * m, n0 = part % grid.columns * n;
      product.run(args, m0, std::min(args.M, m0 + m), n0, std::min(args.N, n0 + n));
    }
  });
}

}  // namespace

const char* matmul_provider() { return use_own_product() ? "gptfast" : "library"; }

void set_matmul_provider(const std::string& name) {
  TORCH_CHECK_VALUE(name == "gptfast" || name == "library" || name.empty(),
                    "matmul provider must be 'gptfast', 'library' or '' (by the CPU), got '", name, "'");
  chosen_by_user() = name.empty() ? std::nullopt : std::optional(name == "gptfast");
}

void matmul(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias, bool accumulate) {
  const at::AutoDispatchBelowAutograd guard;
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  if (use_own_product() && out.scalar_type() == at::kFloat && std::min({M, N, K}) >= MIN_SIZE)
    return multiply({M, N, K, a.const_data_ptr<float>(), a.stride(0), a.stride(1), b.const_data_ptr<float>(),
                     b.stride(0), b.stride(1), out.data_ptr<float>(), out.stride(0),
                     bias.defined() ? bias.const_data_ptr<float>() : nullptr, accumulate});
  Tensor to = out;
  if (accumulate)
    at::addmm_out(to, to, a, b);
  else if (bias.defined())
    at::addmm_out(to, bias, a, b);
  else
    at::mm_out(to, a, b);
}

void linear(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias, const Tensor& residual) {
  if (!residual.defined()) return matmul(out, a, b, bias);
  const at::AutoDispatchBelowAutograd guard;
  Tensor to = out;
  if (bias.defined())
    at::add_out(to, residual, bias);
  else
    to.copy_(residual);
  matmul(out, a, b, {}, true);
}

}  // namespace gptfast
