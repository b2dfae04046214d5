// Layer normalisation of tensors, for the operations that begin with it; and sums over rows.
#pragma once

#include <tuple>

#include "common.h"

namespace gptfast {

// The layer norm of an operation's input x (N, C). Without a weight there is none.
struct Norm {
  Tensor weight, bias;  // (C,)
  double eps = 0;
  ScalarType dtype;                                       // of the result
  ScalarType weight_dtype = kFloat, bias_dtype = kFloat;  // of the gradients
};
Norm make_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps, ScalarType dtype);

enum class Stats { compute, read };

// Returns x normalised and scaled, in norm.dtype. Computes stats (N, 2) fp32 and writes them, or reads them.
Tensor norm_fwd(const Norm& norm, const Tensor& x, const Tensor& stats, Stats use);

// Returns dx + residual in x's dtype, dweight and dbias in their own. May write dx over dy. residual has x's shape and
// dtype, or is undefined.
std::tuple<Tensor, Tensor, Tensor> norm_bwd(const Norm& norm, const Tensor& dy, const Tensor& x, const Tensor& stats,
                                            const Tensor& residual = {});
Tensor new_stats(const Norm& norm, const Tensor& x);

// Returns the sums of the columns of x (N, C) as (C,): summed in fp32, rounded to the dtype.
Tensor sum_rows(const Tensor& x, ScalarType dtype);

}  // namespace gptfast
