// A linear layer, after a layer norm of its input if there is one. The forward does not keep the normalised input: the
// backward computes it again from the input and two numbers per row. A weight of another dtype than the product's is
// converted as the product reads it, so no converted copy of it is kept.
#include "arena.h"
#include "matmul.h"
#include "norm.h"

namespace gptfast {
namespace {

void check(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, OptionalDtype dtype) {
  CHECK_VALUE(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) &&
                  (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0))),
              "linear: x ", x.sizes(), " and weight ", weight.sizes(), " or the bias do not fit");
  CHECK_VALUE(dtype || !bias || bias->scalar_type() == weight.scalar_type(),
              "linear: weight and bias need one dtype, got ", weight.scalar_type(), " and ", bias->scalar_type());
  dtype_of(x);
  dtype_of(weight);
}

std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x, const OptionalTensor& norm_weight,
                                      const OptionalTensor& norm_bias, double eps, const Tensor& weight,
                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                      OptionalDtype dtype_in) {
  const ScalarType dtype = dtype_in.value_or(weight.scalar_type());
  if (dtype == kDouble)
    return reference<decltype(linear_fwd)>("linear_fwd", x, norm_weight, norm_bias, eps, weight, bias, residual,
                                           dtype_in);
  check(x, weight, bias, dtype_in);
  const Norm norm = make_norm(x, norm_weight, norm_bias, eps, dtype);
  const auto y_dtype = residual ? residual->scalar_type() : dtype;
  Tensor stats = new_stats(norm, x), y = make_tensor({x.size(0), weight.size(0)}, y_dtype);
  CHECK_VALUE(!residual || (residual->sizes() == y.sizes() && (y_dtype == dtype || y_dtype == kFloat)),
              "linear: residual must be ", y.sizes(), " in ", dtype, " or float32, got ", residual->sizes(), " ",
              y_dtype);
  linear(y, norm_fwd(norm, x, stats, Stats::compute), weight.t(), bias.value_or(Tensor()), residual.value_or(Tensor()));
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_bwd(const Tensor& dy_in, const Tensor& x,
                                                              const OptionalTensor& norm_weight,
                                                              const OptionalTensor& norm_bias, double eps,
                                                              const Tensor& weight, const OptionalTensor& bias,
                                                              const Tensor& stats, bool need_dx, bool need_dweight,
                                                              OptionalDtype dtype_in) {
  const ScalarType dtype = dtype_in.value_or(weight.scalar_type());
  if (dtype == kDouble)
    return reference<decltype(linear_bwd)>("linear_bwd", dy_in, x, norm_weight, norm_bias, eps, weight, bias, stats,
                                           need_dx, need_dweight, dtype_in);
  check(x, weight, bias, dtype_in);
  const Norm norm = make_norm(x, norm_weight, norm_bias, eps, dtype);
  const Tensor dy = contiguous(to(dy_in, dtype));
  CHECK_VALUE(dy.dim() == 2 && dy.size(0) == x.size(0) && dy.size(1) == weight.size(0) &&
                  (!norm_weight || stats.numel() == 2 * x.size(0)),
              "linear: dy ", dy.sizes(), " does not fit");
  Tensor dx, dnorm_weight, dnorm_bias, dweight, dbias;
  if (need_dweight) {
    dweight = make_tensor(weight.sizes(), weight.scalar_type());
    matmul(dweight, dy.t(), norm_fwd(norm, x, stats, Stats::read));
    if (bias) dbias = sum_rows(dy, bias->scalar_type());
  }
  if (need_dx) {
    Tensor dnormal = make_tensor(x.sizes(), dy.scalar_type());
    matmul(dnormal, dy, weight);
    std::tie(dx, dnorm_weight, dnorm_bias) = norm_bwd(norm, dnormal, x, stats);
  }
  const auto output = [&](const Tensor& t) { return or_empty(t, weight.scalar_type()); };
  return {output(dx), output(dnorm_weight), output(dnorm_bias), output(dweight), output(dbias)};
}

const Kernels kernels = Kernels("CPU").add<linear_fwd>("linear_fwd").add<linear_bwd>("linear_bwd");

}  // namespace
}  // namespace gptfast
