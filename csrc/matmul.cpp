// Who multiplies: MKL, in PyTorch, reaches 95% of the peak on Intel's CPUs and half of it on others with
// AVX-512, where it stays with AVX2. There, fp32 products of some size are ours. The choice is made by the
// CPU and the level alone, so that runs repeat bit for bit.
#include "matmul.h"

#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "common.h"

namespace gptfast {
namespace {

using at::Tensor;

bool intel() {
#ifdef __x86_64__
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

std::optional<bool>& chosen() {
  static std::optional<bool> ours;
  return ours;
}
bool ours() {
  static const bool library_is_fast = intel();
  return chosen().value_or(level() >= Level::avx512 && !library_is_fast);
}

// Below, packing costs more than it gains.
constexpr int64_t SMALLEST = 32;

// How to split M x N among the threads so that little is packed twice: rows of parts, columns of parts.
std::pair<int64_t, int64_t> grid(int64_t M, int64_t N, int64_t threads) {
  std::pair<int64_t, int64_t> best{1, threads};
  for (int64_t rows = 2; rows <= threads; ++rows)
    if (threads % rows == 0 && M * (threads / rows) + N * rows < M * best.second + N * best.first)
      best = {rows, threads / rows};
  return best;
}

int64_t share(int64_t size, int64_t parts, int64_t multiple) {
  return (size + parts * multiple - 1) / (parts * multiple) * multiple;
}

void multiply(const MatmulArgs& args) {
  const auto& loops = pick(generic::matmul, avx2::matmul, avx512::matmul);
  const auto [rows, columns] = grid(args.M, args.N, at::in_parallel_region() ? 1 : at::get_num_threads());
  const int64_t m = share(args.M, rows, loops.tile_rows), n = share(args.N, columns, loops.tile_columns);
  const int64_t across = columns;  // a structured binding cannot be captured
  at::parallel_for(0, rows * columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t m0 = part / across * m, n0 = part % across * n;
      loops.run(args, m0, std::min(args.M, m0 + m), n0, std::min(args.N, n0 + n));
    }
  });
}

}  // namespace

const char* matmul_provider() { return ours() ? "gptfast" : "library"; }

void set_matmul_provider(const std::string& name) {
  TORCH_CHECK_VALUE(name == "gptfast" || name == "library" || name.empty(),
                    "matmul provider must be 'gptfast', 'library' or '' (by the CPU), got '", name, "'");
  chosen() = name.empty() ? std::nullopt : std::optional(name == "gptfast");
}

void matmul(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias, bool accumulate) {
  const at::AutoDispatchBelowAutograd guard;
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  if (ours() && out.scalar_type() == at::kFloat && std::min({M, N, K}) >= SMALLEST)
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

void affine(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias, const Tensor& residual) {
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
