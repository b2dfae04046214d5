// Layer normalisation of tensors, for the operations that begin with it; and sums over rows.
#pragma once

#include <tuple>

#include "common.h"

namespace gptfast {

// The layer norm of an operation's input x (N, C). Without a weight there is none.
struct Norm {
  at::Tensor weight, bias;  // (C,)
  double eps = 0;
  at::ScalarType dtype;                                               // of the result
  at::ScalarType weight_dtype = at::kFloat, bias_dtype = at::kFloat;  // of the gradients
};
Norm make_norm(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
               at::ScalarType dtype);

enum class Stats { compute, read };

// Returns x normalised and scaled, in norm.dtype. Computes stats (N, 2) fp32 and writes them, or reads them.
at::Tensor norm_fwd(const Norm& norm, const at::Tensor& x, const at::Tensor& stats, Stats use);

// Returns dx + residual in x's dtype, dweight and dbias in their own. May write dx over dy. residual has x's shape and
// dtype, or is undefined.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_bwd(const Norm& norm, const at::Tensor& dy, const at::Tensor& x,
                                                        const at::Tensor& stats, const at::Tensor& residual = {});
at::Tensor new_stats(const Norm& norm, const at::Tensor& x);

// Returns the sums of the columns of x (N, C) as (C,): summed in fp32, rounded to the dtype.
at::Tensor sum_rows(const at::Tensor& x, at::ScalarType dtype);

}  // namespace gptfast
