// Matrix products for the operations: the library's, or our own where the library's is slow.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace gptfast {

// out (M, N) = a (M, K) b (K, N) + bias (N,), or out += a b. One dtype; out's rows are contiguous, a and b have any
// strides. Sums of 16-bit products are fp32, rounded once.
void matmul(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias = {},
            bool accumulate = false);

// out (M, N) = a b + bias (N,) + residual (M, N), the latter two where defined.
void affine(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias,
            const at::Tensor& residual);

const char* matmul_provider();  // "gptfast" or "library", for fp32
void set_matmul_provider(const std::string& name);

}  // namespace gptfast
