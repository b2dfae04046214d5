#include "common.h"

namespace gptfast {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

const AdamWLoops& loops() { return pick(generic::adamw, avx2::adamw, avx512::adamw); }

constexpr int64_t CHUNK = 1 << 15;  // elements; also the fixed grouping of the norm's sum

struct Chunk {
  int64_t tensor, begin, end;
};
std::vector<Chunk> chunks(TensorList tensors) {
  std::vector<Chunk> all;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t begin = 0; begin < tensors[i].numel(); begin += CHUNK)
      all.push_back({static_cast<int64_t>(i), begin, std::min(begin + CHUNK, tensors[i].numel())});
  return all;
}

bool any_double(TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.scalar_type() == at::kDouble; });
}

Tensor grad_norm(TensorList grads) {
  TORCH_CHECK_VALUE(!grads.empty(), "grad_norm needs at least one gradient");
  if (any_double(grads)) return reference<Tensor(TensorList)>("gptfast::grad_norm", grads);
  std::vector<Tensor> dense;
  for (const Tensor& g : grads) dense.push_back(g.is_non_overlapping_and_dense() ? g : g.contiguous());
  const std::vector<Chunk> all = chunks(dense);
  std::vector<double> parts(all.size());
  at::parallel_for(0, static_cast<int64_t>(all.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tensor& g = dense[all[i].tensor];
      parts[i] = loops().square_sum(dtype_of(g), g.const_data_ptr(), all[i].begin, all[i].end);
    }
  });
  // In the order of the chunks: the same bits with any number of threads.
  double total = 0;
  for (double part : parts) total += part;
  return at::empty({}, grads[0].options().dtype(at::kFloat)).fill_(std::sqrt(total));
}

// Whether the elements of all of a parameter's tensors lie in the same order in memory.
bool same_layout(const Tensor& a, const Tensor& b) { return a.sizes() == b.sizes() && a.strides() == b.strides(); }

void adamw(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters,
           TensorList steps, const Tensor& lr, const OptionalTensor& norm, double max_norm, double beta1, double beta2,
           double eps, double weight_decay, at::IntArrayRef param_ids, bool stochastic, int64_t seed) {
  const size_t n = params.size();
  TORCH_CHECK_VALUE(grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n && steps.size() == n &&
                        param_ids.size() == n && (masters.empty() || masters.size() == n),
                    "adamw: every list needs one entry per parameter");
  bool usual = !any_double(params);
  for (size_t i = 0; i < n; ++i)
    // Stochastic rounding counts elements in logical order, the loops in memory order.
    usual = usual && (stochastic ? params[i].is_contiguous() : params[i].is_non_overlapping_and_dense()) &&
            same_layout(params[i], exp_avgs[i]) && same_layout(params[i], exp_avg_sqs[i]) &&
            (masters.empty() || same_layout(params[i], masters[i]));
  if (!usual)
    return reference<void(TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, const Tensor&,
                          const OptionalTensor&, double, double, double, double, double, at::IntArrayRef, bool,
                          int64_t)>("gptfast::adamw", params, grads, exp_avgs, exp_avg_sqs, masters, steps, lr, norm,
                                    max_norm, beta1, beta2, eps, weight_decay, param_ids, stochastic, seed);

  AdamWArgs args{};
  args.clip = 1;
  if (norm) {
    const double value = norm->item<double>();
    if (!std::isfinite(value)) return;
    args.clip = static_cast<float>(std::min(1.0, max_norm / (value + 1e-6)));
  }
  const double rate = lr.item<double>();
  args.decay = static_cast<float>(1 - rate * weight_decay);
  args.beta1 = static_cast<float>(beta1);
  args.one_minus_beta1 = static_cast<float>(1 - beta1);
  args.beta2 = static_cast<float>(beta2);
  args.one_minus_beta2 = static_cast<float>(1 - beta2);
  args.eps = static_cast<float>(eps);
  args.stochastic = stochastic;
  args.seed = static_cast<uint64_t>(seed);

  std::vector<Tensor> ordered;  // gradients in their parameters' memory order
  std::vector<AdamWTensor> tensors(n);
  for (size_t i = 0; i < n; ++i) {
    TORCH_CHECK_VALUE(grads[i].scalar_type() == params[i].scalar_type() && grads[i].sizes() == params[i].sizes(),
                      "adamw: gradient ", i, " does not fit its parameter");
    TORCH_CHECK_VALUE(exp_avgs[i].scalar_type() == exp_avg_sqs[i].scalar_type(), "adamw: moments need one dtype");
    TORCH_CHECK_VALUE(steps[i].numel() == 1 && steps[i].scalar_type() == at::kFloat, "adamw: step must be 0-d fp32");
    TORCH_CHECK_VALUE(!stochastic || params[i].scalar_type() == at::kBFloat16,
                      "adamw: stochastic rounding is for bfloat16 parameters");
    ordered.push_back(same_layout(params[i], grads[i]) ? grads[i] : at::empty_like(params[i]).copy_(grads[i]));
    const double step = steps[i].item<double>() + 1;
    AdamWTensor& t = tensors[i];
    t.dtype = dtype_of(params[i]);
    t.moment_dtype = dtype_of(exp_avgs[i]);
    TORCH_CHECK_VALUE(t.moment_dtype == Dtype::fp32 || (t.dtype == Dtype::bf16 && t.moment_dtype == Dtype::bf16),
                      "adamw: moments must be float32, or bfloat16 beside bfloat16 parameters");
    t.param = params[i].data_ptr();
    t.grad = ordered[i].const_data_ptr();
    t.exp_avg = exp_avgs[i].data_ptr();
    t.exp_avg_sq = exp_avg_sqs[i].data_ptr();
    t.master = masters.empty() ? nullptr : masters[i].data_ptr<float>();
    t.step_size = static_cast<float>(rate / (1 - std::pow(beta1, step)));
    t.inv_sqrt_bias2 = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
    t.param_id = static_cast<uint32_t>(param_ids[i]);
    t.step = static_cast<uint32_t>(step);
  }
  // Only now that nothing can be refused any more.
  for (size_t i = 0; i < n; ++i) steps[i].data_ptr<float>()[0] = static_cast<float>(tensors[i].step);
  const std::vector<Chunk> all = chunks(params);
  at::parallel_for(0, static_cast<int64_t>(all.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) loops().step(tensors[all[i].tensor], args, all[i].begin, all[i].end);
  });
}

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("grad_norm", grad_norm);
  m.impl("adamw", adamw);
}

}  // namespace
}  // namespace gptfast
