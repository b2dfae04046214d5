// Code that every wrapper needs: tensors, the loops of the level in use, and their dtypes.
#pragma once

#include <cmath>
#include <cstring>

#include "level.h"
#include "operators.h"
#include "tensor.h"

namespace gptfast {

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case kFloat:
      return Dtype::fp32;
    case kBFloat16:
      return Dtype::bf16;
    case kHalf:
      return Dtype::fp16;
    default:
      throw_value_error(text("gptfast's C++ kernels take float32, bfloat16 and float16, got ", t.scalar_type()));
  }
}

// Returns t, or an empty tensor: an operator must not return an undefined one.
inline Tensor or_empty(const Tensor& t, ScalarType dtype) { return t.defined() ? t : empty({0}, dtype); }

}  // namespace gptfast
