// Layer normalisation for the operations that begin with it, as tensors; and sums over rows.
#pragma once

#include <tuple>

#include "common.h"

namespace gptfast {

using OptionalTensor = std::optional<at::Tensor>;

// What an operation may do to its input x (N, C) first. Without a weight: nothing.
struct Norm {
  at::Tensor weight, bias;  // (C,)
  double eps = 0;
  at::ScalarType dtype;                                               // of the result
  at::ScalarType weight_dtype = at::kFloat, bias_dtype = at::kFloat;  // of the gradients
};
Norm make_norm(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
               at::ScalarType dtype);

// x normalised and scaled, in norm.dtype; stats (N, 2) fp32 are written if fresh, else read.
at::Tensor norm_fwd(const Norm& norm, const at::Tensor& x, const at::Tensor& stats, bool fresh);
// dx + residual in x's dtype, dweight and dbias in their own; may write dx over dy. residual is of x's shape and dtype,
// or undefined.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_bwd(const Norm& norm, const at::Tensor& dy, const at::Tensor& x,
                                                        const at::Tensor& stats, const at::Tensor& residual = {});
at::Tensor new_stats(const Norm& norm, const at::Tensor& x);

at::Tensor sum_rows(const at::Tensor& x);  // (N, C) -> (C,), fp32 sums in x's dtype

}  // namespace gptfast
