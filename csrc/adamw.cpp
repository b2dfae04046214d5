// AdamW for all parameters in one call, and the norm of all gradients.
#include "common.h"

namespace gptfast {
namespace {

// A share of work. The norm is the sum of the chunks' sums, so this size must not depend on the number of threads.
constexpr int64_t ELEMENTS_PER_CHUNK = 1 << 15;

struct Chunk {
  int64_t tensor, begin, end;
};
std::vector<Chunk> make_chunks(const TensorList& tensors) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t begin = 0; begin < tensors[i].numel(); begin += ELEMENTS_PER_CHUNK)
      chunks.push_back({static_cast<int64_t>(i), begin, std::min(begin + ELEMENTS_PER_CHUNK, tensors[i].numel())});
  return chunks;
}

bool any_double(const TensorList& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.scalar_type() == kDouble; });
}

Tensor grad_norm(const TensorList& grads) {
  CHECK_VALUE(!grads.empty(), "grad_norm needs at least one gradient");
  if (any_double(grads)) return reference<decltype(grad_norm)>("grad_norm", grads);
  std::vector<Tensor> dense;
  for (const Tensor& g : grads) dense.push_back(g.is_non_overlapping_and_dense() ? g : contiguous(g));
  const std::vector<Chunk> chunks = make_chunks(dense);
  std::vector<double> parts(chunks.size());
  parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tensor& g = dense[chunks[i].tensor];
      parts[i] = loops().adamw->square_sum(dtype_of(g), g.const_data_ptr(), chunks[i].begin, chunks[i].end);
    }
  });
  // In the order of the chunks: any number of threads gives the same bits.
  double total = 0;
  for (double part : parts) total += part;
  return scalar(static_cast<float>(std::sqrt(total)));
}

// The lists of the operator, one entry per parameter; masters may be empty.
struct Lists {
  const TensorList &params, &grads, &exp_avgs, &exp_avg_sqs, &masters, &steps;
};

// Whether the elements of two tensors lie in memory in the same order.
bool same_layout(const Tensor& a, const Tensor& b) { return a.sizes() == b.sizes() && a.strides() == b.strides(); }

// Returns t, or a copy, with its elements in the order in memory of another tensor's.
Tensor in_layout_of(const Tensor& other, const Tensor& t) {
  if (same_layout(other, t)) return t;
  Tensor ordered = empty_like(other, t.scalar_type());
  copy(ordered, t);
  return ordered;
}

// Whether the loops can walk all tensors of each parameter together, in the order of memory.
bool loops_can_walk(const Lists& lists, bool stochastic) {
  if (any_double(lists.params)) return false;
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const Tensor& param = lists.params[i];
    // Stochastic rounding counts elements in logical order.
    const bool ordered = stochastic ? param.is_contiguous() : param.is_non_overlapping_and_dense();
    if (!ordered || !same_layout(param, lists.exp_avgs[i]) || !same_layout(param, lists.exp_avg_sqs[i]) ||
        !(lists.masters.empty() || same_layout(param, lists.masters[i])))
      return false;
  }
  return true;
}

// Checks parameter i and returns its data for the loops. grad is its gradient in the parameter's layout.
AdamWTensor loop_tensor(const Lists& lists, size_t i, const Tensor& grad, double rate, double beta1, double beta2,
                        int64_t param_id, bool stochastic) {
  const Tensor &param = lists.params[i], &exp_avg = lists.exp_avgs[i], &exp_avg_sq = lists.exp_avg_sqs[i];
  const Tensor& steps = lists.steps[i];
  CHECK_VALUE(exp_avg.scalar_type() == exp_avg_sq.scalar_type(), "adamw: exp_avg and exp_avg_sq need one dtype, got ",
              exp_avg.scalar_type(), " and ", exp_avg_sq.scalar_type());
  CHECK_VALUE(steps.numel() == 1 && steps.scalar_type() == kFloat, "adamw: step must be 0-d float32, got ",
              steps.sizes(), " ", steps.scalar_type());
  CHECK_VALUE(!stochastic || param.scalar_type() == kBFloat16,
              "adamw: stochastic rounding is for bfloat16 parameters, got ", param.scalar_type());
  AdamWTensor t{};
  t.dtype = dtype_of(param);
  t.moment_dtype = dtype_of(exp_avg);
  CHECK_VALUE(t.moment_dtype == Dtype::fp32 || (t.dtype == Dtype::bf16 && t.moment_dtype == Dtype::bf16),
              "adamw: moments must be float32, or bfloat16 beside bfloat16 parameters, got ", exp_avg.scalar_type(),
              " beside ", param.scalar_type());
  const double step = item(steps) + 1;
  t.param = param.data_ptr();
  t.grad = grad.const_data_ptr();
  t.exp_avg = exp_avg.data_ptr();
  t.exp_avg_sq = exp_avg_sq.data_ptr();
  t.master = lists.masters.empty() ? nullptr : lists.masters[i].data_ptr<float>();
  t.step_size = static_cast<float>(rate / (1 - std::pow(beta1, step)));
  t.inv_sqrt_bias2 = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
  t.param_id = static_cast<uint32_t>(param_id);
  t.step = static_cast<uint32_t>(step);
  return t;
}

void adamw(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
           const TensorList& masters, const TensorList& steps, const Tensor& lr, const OptionalTensor& norm,
           double max_norm, double beta1, double beta2, double eps, double weight_decay, const Ints& param_ids,
           bool stochastic, int64_t seed) {
  const size_t n = params.size();
  CHECK_VALUE(grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n && steps.size() == n &&
                  param_ids.size() == n && (masters.empty() || masters.size() == n),
              "adamw: every list needs one entry per parameter, ", n, " in all");
  const Lists lists{params, grads, exp_avgs, exp_avg_sqs, masters, steps};
  if (!loops_can_walk(lists, stochastic))
    return reference<decltype(adamw)>("adamw", params, grads, exp_avgs, exp_avg_sqs, masters, steps, lr, norm, max_norm,
                                      beta1, beta2, eps, weight_decay, param_ids, stochastic, seed);

  AdamWArgs args{};
  args.clip = 1;
  if (norm) {
    const double value = item(*norm);
    if (!std::isfinite(value)) return;
    args.clip = static_cast<float>(std::min(1.0, max_norm / (value + 1e-6)));
  }
  const double rate = item(lr);
  args.decay = static_cast<float>(1 - rate * weight_decay);
  args.beta1 = static_cast<float>(beta1);
  args.one_minus_beta1 = static_cast<float>(1 - beta1);
  args.beta2 = static_cast<float>(beta2);
  args.one_minus_beta2 = static_cast<float>(1 - beta2);
  args.eps = static_cast<float>(eps);
  args.stochastic = stochastic;
  args.seed = static_cast<uint64_t>(seed);

  std::vector<Tensor> ordered;  // the gradients, each in its parameter's layout
  std::vector<AdamWTensor> tensors;
  for (size_t i = 0; i < n; ++i) {
    CHECK_VALUE(grads[i].scalar_type() == params[i].scalar_type() && grads[i].sizes() == params[i].sizes(),
                "adamw: gradient ", i, " is ", grads[i].sizes(), " ", grads[i].scalar_type(), ", its parameter is ",
                params[i].sizes(), " ", params[i].scalar_type());
    ordered.push_back(in_layout_of(params[i], grads[i]));
    tensors.push_back(loop_tensor(lists, i, ordered[i], rate, beta1, beta2, param_ids[i], stochastic));
  }
  // Nothing is written before all checks have passed.
  for (size_t i = 0; i < n; ++i) steps[i].data_ptr<float>()[0] = static_cast<float>(tensors[i].step);
  const std::vector<Chunk> chunks = make_chunks(params);
  parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      loops().adamw->step(tensors[chunks[i].tensor], args, chunks[i].begin, chunks[i].end);
  });
}

const Kernels kernels = Kernels("CPU").add<grad_norm>("grad_norm").add<adamw>("adamw");

}  // namespace
}  // namespace gptfast
