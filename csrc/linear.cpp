// A linear layer, after a layer norm of its input if there is one. The forward does not keep the normalised input: the
// backward computes it again from the input and two numbers per row.
#include "arena.h"
#include "matmul.h"
#include "norm.h"

namespace gptfast {
namespace {

using at::Tensor;

void check(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) &&
                        (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0))),
                    "linear: x ", x.sizes(), " and weight ", weight.sizes(), " or the bias do not fit");
  TORCH_CHECK_VALUE(!bias || bias->scalar_type() == weight.scalar_type(),
                    "linear: weight and bias need one dtype, got ", weight.scalar_type(), " and ", bias->scalar_type());
  dtype_of(x);
  dtype_of(weight);
}

std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x, const OptionalTensor& norm_weight,
                                      const OptionalTensor& norm_bias, double eps, const Tensor& weight,
                                      const OptionalTensor& bias, const OptionalTensor& residual) {
  if (weight.scalar_type() == at::kDouble)
    return reference<decltype(linear_fwd)>("gptfast::linear_fwd", x, norm_weight, norm_bias, eps, weight, bias,
                                           residual);
  check(x, weight, bias);
  const Norm norm = make_norm(x, norm_weight, norm_bias, eps, weight.scalar_type());
  Tensor stats = new_stats(norm, x), y = make_tensor({x.size(0), weight.size(0)}, weight.options());
  TORCH_CHECK_VALUE(!residual || (residual->sizes() == y.sizes() && residual->scalar_type() == y.scalar_type()),
                    "linear: residual must be ", y.sizes(), " in the weight's dtype, got ", residual->sizes(), " ",
                    residual->scalar_type());
  linear(y, norm_fwd(norm, x, stats, Stats::compute), weight.t(), bias.value_or(Tensor()), residual.value_or(Tensor()));
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_bwd(const Tensor& dy_in, const Tensor& x,
                                                              const OptionalTensor& norm_weight,
                                                              const OptionalTensor& norm_bias, double eps,
                                                              const Tensor& weight, const OptionalTensor& bias,
                                                              const Tensor& stats, bool need_dx, bool need_dweight) {
  if (weight.scalar_type() == at::kDouble)
    return reference<decltype(linear_bwd)>("gptfast::linear_bwd", dy_in, x, norm_weight, norm_bias, eps, weight, bias,
                                           stats, need_dx, need_dweight);
  check(x, weight, bias);
  const Norm norm = make_norm(x, norm_weight, norm_bias, eps, weight.scalar_type());
  const Tensor dy = dy_in.to(weight.scalar_type()).contiguous();
  TORCH_CHECK_VALUE(dy.dim() == 2 && dy.size(0) == x.size(0) && dy.size(1) == weight.size(0) &&
                        (!norm_weight || stats.numel() == 2 * x.size(0)),
                    "linear: dy ", dy.sizes(), " does not fit");
  Tensor dx, dnorm_weight, dnorm_bias, dweight, dbias;
  if (need_dweight) {
    dweight = make_tensor(weight.sizes(), weight.options());
    matmul(dweight, dy.t(), norm_fwd(norm, x, stats, Stats::read));
    if (bias) dbias = sum_rows(dy);
  }
  if (need_dx) {
    Tensor dnormal = make_tensor(x.sizes(), weight.options());
    matmul(dnormal, dy, weight);
    std::tie(dx, dnorm_weight, dnorm_bias) = norm_bwd(norm, dnormal, x, stats);
  }
  const auto output = [&](const Tensor& t) { return or_empty(t, weight.options()); };
  return {output(dx), output(dnorm_weight), output(dnorm_bias), output(dweight), output(dbias)};
}

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("linear_fwd", linear_fwd);
  m.impl("linear_bwd", linear_bwd);
}

}  // namespace
}  // namespace gptfast
