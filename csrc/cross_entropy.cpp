#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "common.h"

namespace gptfast {
namespace {

using at::Tensor;

const CrossEntropyLoops& loops() { return pick(generic::cross_entropy, avx2::cross_entropy, avx512::cross_entropy); }

void check_targets(const Tensor& target, int64_t N, int64_t V, int64_t ignore_index) {
  TORCH_CHECK_VALUE(target.scalar_type() == at::kLong && target.dim() == 1 && target.size(0) == N,
                    "target must be int64 of shape (", N, ",), got ", target.sizes());
  const int64_t* t = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < N; ++i)
    TORCH_CHECK_INDEX((t[i] >= 0 && t[i] < V) || t[i] == ignore_index, "target ", t[i],
                      " is out of range for a vocabulary of ", V, "; targets lie in [0, ", V,
                      ") or equal ignore_index (", ignore_index, ")");
}

CrossEntropyArgs arguments(const Tensor& logits, const Tensor& target, int64_t ignore_index, double label_smoothing,
                           double z_loss) {
  CrossEntropyArgs args{};
  args.dtype = dtype_of(logits);
  args.V = logits.size(1);
  args.row_stride = logits.stride(0);
  args.ignore_index = ignore_index;
  args.label_smoothing = static_cast<float>(label_smoothing);
  args.z_loss = static_cast<float>(z_loss);
  args.logits = logits.const_data_ptr();
  args.target = target.const_data_ptr<int64_t>();
  return args;
}

using Rows = void (*)(const CrossEntropyArgs&, int64_t, int64_t);
void each_row(Rows f, const CrossEntropyArgs& args, int64_t N) {
  at::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) { f(args, begin, end); });
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& logits_in, const Tensor& target_in, int64_t ignore_index,
                                             double label_smoothing, double z_loss) {
  if (logits_in.scalar_type() == at::kDouble)
    return reference<decltype(cross_entropy_fwd)>("gptfast::cross_entropy_fwd", logits_in, target_in, ignore_index,
                                                  label_smoothing, z_loss);
  const Tensor logits = rows(logits_in), target = target_in.contiguous();
  const int64_t N = logits.size(0);
  check_targets(target, N, logits.size(1), ignore_index);
  Tensor loss = at::empty({N}, logits.options().dtype(at::kFloat)), lse = at::empty_like(loss, at::kDouble);
  CrossEntropyArgs args = arguments(logits, target, ignore_index, label_smoothing, z_loss);
  args.loss = loss.data_ptr<float>();
  args.lse = lse.data_ptr<double>();
  each_row(loops().fwd, args, N);
  return {loss, lse};
}

Tensor cross_entropy_bwd(const Tensor& dloss_in, const Tensor& logits_in, const Tensor& target_in, const Tensor& lse_in,
                         int64_t ignore_index, double label_smoothing, double z_loss) {
  if (logits_in.scalar_type() == at::kDouble)
    return reference<decltype(cross_entropy_bwd)>("gptfast::cross_entropy_bwd", dloss_in, logits_in, target_in, lse_in,
                                                  ignore_index, label_smoothing, z_loss);
  const Tensor logits = rows(logits_in), target = target_in.contiguous();
  const Tensor dloss = dloss_in.to(at::kFloat).contiguous(), lse = lse_in.contiguous();
  const int64_t N = logits.size(0);
  check_targets(target, N, logits.size(1), ignore_index);
  TORCH_CHECK_VALUE(dloss.numel() == N && lse.numel() == N && lse.scalar_type() == at::kDouble,
                    "cross_entropy: dloss and lse must hold one number per row");
  Tensor dlogits = at::empty(logits.sizes(), logits.options());
  CrossEntropyArgs args = arguments(logits, target, ignore_index, label_smoothing, z_loss);
  args.dloss = dloss.const_data_ptr<float>();
  args.lse = lse.data_ptr<double>();
  args.dlogits = dlogits.data_ptr();
  each_row(loops().bwd, args, N);
  return dlogits;
}

// Rows of logits that fit in CHUNK bytes: enough for the matrix products to run at full speed, while
// the logits never take more memory than that.
constexpr int64_t CHUNK = 104 << 20;
int64_t chunk_rows(int64_t N, int64_t V, int64_t itemsize) {
  const int64_t fit = std::max<int64_t>(1, CHUNK / (V * itemsize)), chunks = (N + fit - 1) / fit;
  return chunks ? (N + chunks - 1) / chunks : 1;
}

void check_linear(const Tensor& input, const Tensor& weight) {
  TORCH_CHECK_VALUE(input.dim() == 2 && weight.dim() == 2 && weight.size(0) > 0 && input.size(1) == weight.size(1),
                    "linear_cross_entropy: input ", input.sizes(), " and linear_weight ", weight.sizes(),
                    " do not fit");
}

// The logits' memory, kept from call to call: a fresh 100 MB is page-faulted anew each time (30 ms).
Tensor workspace(int64_t rows, int64_t V, const at::TensorOptions& options) {
  thread_local Tensor kept;
  const c10::InferenceMode normal(false);  // else a first call under inference_mode bars later training
  const int64_t bytes = rows * V * static_cast<int64_t>(options.dtype().itemsize());
  if (!kept.defined() || kept.numel() < bytes) kept = at::empty({bytes}, options.dtype(at::kByte));
  return kept.narrow(0, 0, bytes).view(c10::typeMetaToScalarType(options.dtype())).view({rows, V});
}

// f(first row, rows, logits of those rows) for each chunk, the logits in one reused buffer.
template <class F>
void each_chunk(const Tensor& input, const Tensor& weight, F f) {
  const int64_t N = input.size(0), V = weight.size(0), step = chunk_rows(N, V, input.element_size());
  const Tensor buffer = workspace(std::min(step, N), V, input.options());
  for (int64_t row = 0; row < N; row += step) {
    const int64_t n = std::min(step, N - row);
    Tensor logits = buffer.narrow(0, 0, n);
    at::mm_out(logits, input.narrow(0, row, n), weight.t());
    f(row, n, logits);
  }
}

Tensor linear_cross_entropy_fwd(const Tensor& input, const Tensor& weight_in, const Tensor& target_in,
                                int64_t ignore_index, double label_smoothing, double z_loss) {
  if (input.scalar_type() == at::kDouble)
    return reference<decltype(linear_cross_entropy_fwd)>("gptfast::linear_cross_entropy_fwd", input, weight_in,
                                                         target_in, ignore_index, label_smoothing, z_loss);
  check_linear(input, weight_in);
  at::AutoDispatchBelowAutograd guard;
  const Tensor weight = weight_in.to(input.scalar_type());
  const Tensor target = target_in.contiguous();
  check_targets(target, input.size(0), weight.size(0), ignore_index);
  Tensor loss = at::empty({input.size(0)}, input.options().dtype(at::kFloat)), lse = at::empty_like(loss, at::kDouble);
  each_chunk(input, weight, [&](int64_t row, int64_t n, const Tensor& logits) {
    CrossEntropyArgs args = arguments(logits, target, ignore_index, label_smoothing, z_loss);
    args.target += row;
    args.loss = loss.data_ptr<float>() + row;
    args.lse = lse.data_ptr<double>() + row;
    each_row(loops().fwd, args, n);
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_fwd_bwd(const Tensor& input, const Tensor& weight_in,
                                                                const Tensor& target_in, const Tensor& dloss_in,
                                                                int64_t ignore_index, double label_smoothing,
                                                                double z_loss) {
  if (input.scalar_type() == at::kDouble)
    return reference<decltype(linear_cross_entropy_fwd_bwd)>("gptfast::linear_cross_entropy_fwd_bwd", input, weight_in,
                                                             target_in, dloss_in, ignore_index, label_smoothing,
                                                             z_loss);
  check_linear(input, weight_in);
  at::AutoDispatchBelowAutograd guard;
  const Tensor weight = weight_in.to(input.scalar_type());
  const Tensor target = target_in.contiguous(), dloss = dloss_in.to(at::kFloat).contiguous();
  const int64_t N = input.size(0);
  check_targets(target, N, weight.size(0), ignore_index);
  TORCH_CHECK_VALUE(dloss.dim() == 1 && dloss.size(0) == N, "linear_cross_entropy: dloss must be (", N, ",)");
  Tensor loss = at::empty({N}, input.options().dtype(at::kFloat)), lse = at::empty_like(loss, at::kDouble);
  Tensor dinput = at::empty(input.sizes(), input.options());
  // Several chunks add up in fp32: a 16-bit sum would round away what each one adds.
  const bool one_chunk = N <= chunk_rows(N, weight.size(0), input.element_size());
  // So does the gradient of a weight that is not of the input's dtype, as under autocast.
  const bool widens =
      weight.scalar_type() != at::kFloat && !(one_chunk && weight_in.scalar_type() == weight.scalar_type());
  const auto options = widens ? weight.options().dtype(at::kFloat) : weight.options();
  Tensor dweight = N ? at::empty(weight.sizes(), options) : at::zeros(weight.sizes(), options);
  each_chunk(input, weight, [&](int64_t row, int64_t n, const Tensor& logits) {
    CrossEntropyArgs args = arguments(logits, target, ignore_index, label_smoothing, z_loss);
    args.target += row;
    args.loss = loss.data_ptr<float>() + row;
    args.lse = lse.data_ptr<double>() + row;
    args.dloss = dloss.const_data_ptr<float>() + row;
    args.dlogits = logits.data_ptr();
    each_row(loops().fwd_bwd, args, n);
    Tensor dx = dinput.narrow(0, row, n);
    at::mm_out(dx, logits, weight);
    const Tensor x = input.narrow(0, row, n);
    if (widens && row)
      dweight.add_(at::mm(logits.t(), x));
    else if (widens)
      dweight.copy_(at::mm(logits.t(), x));
    else if (row)
      at::addmm_out(dweight, dweight, logits.t(), x);
    else
      at::mm_out(dweight, logits.t(), x);
  });
  double total = 0;
  for (int64_t i = 0; i < N; ++i) total += static_cast<double>(loss.data_ptr<float>()[i]) * dloss.data_ptr<float>()[i];
  return {at::empty({}, loss.options()).fill_(total), dinput, dweight.to(weight_in.scalar_type())};
}

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("cross_entropy_fwd", cross_entropy_fwd);
  m.impl("cross_entropy_bwd", cross_entropy_bwd);
  m.impl("linear_cross_entropy_fwd", linear_cross_entropy_fwd);
  m.impl("linear_cross_entropy_fwd_bwd", linear_cross_entropy_fwd_bwd);
}

}  // namespace
}  // namespace gptfast
