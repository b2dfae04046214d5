// Matrix products for the operations: the library's, or our own where the library is slow.
#pragma once

#include <string>

#include "tensor.h"
#include "torch_settings.h"

namespace gptfast {

// Computes out (M, N) = a (M, K) b (K, N) + bias (N,), or out += a b. All have one dtype, but out, b and bias may be
// fp32 if a has 16 bits: b and bias are then rounded to a's dtype as they are read. out's rows are contiguous, a and b
// have any strides. Sums of 16-bit products are fp32 and rounded to their dtype once; not at all on the way to an fp32
// out, except by the library.
void matmul(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias = {}, bool accumulate = false);

// Computes out (M, N) = a b + bias (N,) + residual (M, N) in out's dtype. The last two may be undefined.
void linear(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias, const Tensor& residual);

// Returns who multiplies fp32 matrices: "gptfast" or "library".
const char* matmul_provider();

// name: "gptfast", "library", or "" to let the CPU decide. Throws ValueError for another.
void set_matmul_provider(const std::string& name);

}  // namespace gptfast
