// Sampling of tokens, for the operator and for the engine.
#pragma once

#include "tensor.h"

namespace gptfast {

// Returns the sampled ids (B,) int64 of logits (B, V). Each parameter is (B,); see gptfast/ops/sampling.py.
Tensor sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
              const Tensor& min_p, const Tensor& seed, const Tensor& position);

}  // namespace gptfast
