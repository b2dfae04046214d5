// Sampling of tokens, for the operator and for the engine.
#pragma once

#include <ATen/core/Tensor.h>

namespace gptfast {

// Returns the sampled ids (B,) int64 of logits (B, V). Each parameter is (B,); see gptfast/ops/sampling.py.
at::Tensor sample(const at::Tensor& logits, const at::Tensor& temperature, const at::Tensor& top_k,
                  const at::Tensor& top_p, const at::Tensor& min_p, const at::Tensor& seed, const at::Tensor& position);

}  // namespace gptfast
