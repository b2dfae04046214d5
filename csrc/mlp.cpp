// The MLP of a block: layer norm, linear, GELU, linear. The forward keeps its input and the input of GELU for the
// backward, which computes the rest again.
#include "arena.h"
#include "matmul.h"
#include "norm.h"

namespace gptfast {
namespace {

constexpr int64_t ELEMENTS_PER_SHARE = 1 << 12;  // whole vectors at every level

template <class F>
void for_each_share(int64_t size, F f) {
  parallel_for(0, (size + ELEMENTS_PER_SHARE - 1) / ELEMENTS_PER_SHARE, 1, [&](int64_t begin, int64_t end) {
    f(begin * ELEMENTS_PER_SHARE, std::min(size, end * ELEMENTS_PER_SHARE));
  });
}

void check(const Tensor& x, const Tensor& fc_weight, const Tensor& fc_bias, const Tensor& proj_weight,
           const Tensor& proj_bias, OptionalDtype dtype) {
  CHECK_VALUE(x.dim() == 2 && fc_weight.dim() == 2 && proj_weight.dim() == 2 && x.size(1) == fc_weight.size(1) &&
                  proj_weight.size(1) == fc_weight.size(0) && fc_bias.numel() == fc_weight.size(0) &&
                  proj_bias.numel() == proj_weight.size(0),
              "mlp: x ", x.sizes(), ", fc_weight ", fc_weight.sizes(), " and proj_weight ", proj_weight.sizes(),
              " or their biases ", fc_bias.sizes(), " and ", proj_bias.sizes(), " do not fit");
  for (const Tensor& t : {fc_bias, proj_weight, proj_bias})
    CHECK_VALUE(dtype || t.scalar_type() == fc_weight.scalar_type(), "mlp: weights and biases need one dtype, got ",
                fc_weight.scalar_type(), " and ", t.scalar_type());
  dtype_of(x);
  dtype_of(fc_weight);
}

void check_residual(bool residual, const Tensor& x, const Tensor& proj_weight, ScalarType dtype) {
  CHECK_VALUE(
      !residual || (x.size(1) == proj_weight.size(0) && (x.scalar_type() == dtype || x.scalar_type() == kFloat)),
      "mlp: a residual needs x in the shape of the result, in ", dtype, " or float32, got ", x.sizes(), " ",
      x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> mlp_fwd(const Tensor& x, const OptionalTensor& norm_weight,
                                           const OptionalTensor& norm_bias, double eps, const Tensor& fc_weight,
                                           const Tensor& fc_bias, const Tensor& proj_weight, const Tensor& proj_bias,
                                           bool residual, OptionalDtype dtype_in) {
  const ScalarType dtype = dtype_in.value_or(fc_weight.scalar_type());
  if (dtype == kDouble)
    return reference<decltype(mlp_fwd)>("mlp_fwd", x, norm_weight, norm_bias, eps, fc_weight, fc_bias, proj_weight,
                                        proj_bias, residual, dtype_in);
  check(x, fc_weight, fc_bias, proj_weight, proj_bias, dtype_in);
  check_residual(residual, x, proj_weight, dtype);
  const Norm norm = make_norm(x, norm_weight, norm_bias, eps, dtype);
  Tensor stats = new_stats(norm, x), h = make_tensor({x.size(0), fc_weight.size(0)}, dtype);
  const auto y_dtype = residual ? x.scalar_type() : dtype;
  Tensor y = make_tensor({x.size(0), proj_weight.size(0)}, y_dtype);
  matmul(h, norm_fwd(norm, x, stats, Stats::compute), fc_weight.t(), fc_bias);
  const Tensor gelu = make_tensor(h.sizes(), h.scalar_type());
  for_each_share(h.numel(), [&](int64_t begin, int64_t end) {
    loops().mlp->gelu_fwd(dtype_of(h), h.const_data_ptr(), gelu.data_ptr(), begin, end);
  });
  linear(y, gelu, proj_weight.t(), proj_bias, residual ? x : Tensor());
  return {y, h, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlp_bwd(
    const Tensor& dy_in, const Tensor& x, const Tensor& h, const Tensor& stats, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double eps, const Tensor& fc_weight, const Tensor& fc_bias,
    const Tensor& proj_weight, const Tensor& proj_bias, bool residual, bool need_dx, bool need_dfc, bool need_dproj,
    OptionalDtype dtype_in) {
  const ScalarType dtype = dtype_in.value_or(fc_weight.scalar_type());
  if (dtype == kDouble)
    return reference<decltype(mlp_bwd)>("mlp_bwd", dy_in, x, h, stats, norm_weight, norm_bias, eps, fc_weight, fc_bias,
                                        proj_weight, proj_bias, residual, need_dx, need_dfc, need_dproj, dtype_in);
  check_residual(residual, x, proj_weight, dtype);
  check(x, fc_weight, fc_bias, proj_weight, proj_bias, dtype_in);
  const Norm norm = make_norm(x, norm_weight, norm_bias, eps, dtype);
  const Tensor dy = contiguous(to(dy_in, dtype));
  CHECK_VALUE(dy.dim() == 2 && dy.size(0) == x.size(0) && dy.size(1) == proj_weight.size(0) && h.size(0) == x.size(0) &&
                  h.size(1) == fc_weight.size(0) && h.is_contiguous() && h.scalar_type() == dy.scalar_type() &&
                  (!norm_weight || stats.numel() == 2 * x.size(0)),
              "mlp: dy ", dy.sizes(), " or h ", h.sizes(), " does not fit");
  Tensor dx, dnorm_weight, dnorm_bias, dfc, dfc_bias, dproj, dproj_bias;
  Tensor dh = make_tensor(h.sizes(), h.scalar_type());
  matmul(dh, dy, proj_weight);
  {
    const Tensor gelu = make_tensor(h.sizes(), h.scalar_type());
    for_each_share(h.numel(), [&](int64_t begin, int64_t end) {
      loops().mlp->gelu_bwd(dtype_of(h), h.const_data_ptr(), gelu.data_ptr(), dh.data_ptr(), begin, end);
    });
    if (need_dproj) {
      dproj = make_tensor(proj_weight.sizes(), proj_weight.scalar_type());
      matmul(dproj, dy.t(), gelu);
      dproj_bias = sum_rows(dy, proj_bias.scalar_type());
    }
  }
  if (need_dfc) {
    dfc = make_tensor(fc_weight.sizes(), fc_weight.scalar_type());
    matmul(dfc, dh.t(), norm_fwd(norm, x, stats, Stats::read));
    dfc_bias = sum_rows(dh, fc_bias.scalar_type());
  }
  if (need_dx) {
    Tensor dnormal = make_tensor(x.sizes(), dh.scalar_type());
    const Tensor passed = residual ? contiguous(to(dy_in, x.scalar_type())) : Tensor();
    matmul(dnormal, dh, fc_weight);
    std::tie(dx, dnorm_weight, dnorm_bias) = norm_bwd(norm, dnormal, x, stats, passed);
  }
  const auto output = [&](const Tensor& t) { return or_empty(t, fc_weight.scalar_type()); };
  return {output(dx),       output(dnorm_weight), output(dnorm_bias), output(dfc),
          output(dfc_bias), output(dproj),        output(dproj_bias)};
}

const Kernels kernels = Kernels("CPU").add<mlp_fwd>("mlp_fwd").add<mlp_bwd>("mlp_bwd");

}  // namespace
}  // namespace gptfast
