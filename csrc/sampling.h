// Drawing tokens, for other wrappers too.
#pragma once

#include <ATen/core/Tensor.h>

namespace gptfast {

// logits (B, V), each parameter (B,) -> (B,) int64; see gptfast/ops/sampling.py.
at::Tensor sample(const at::Tensor& logits, const at::Tensor& temperature, const at::Tensor& top_k,
                  const at::Tensor& top_p, const at::Tensor& min_p, const at::Tensor& seed, const at::Tensor& position);

}  // namespace gptfast
