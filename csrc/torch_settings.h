// What PyTorch is set to.
//
// Its stable interface does not tell. These are functions of its C++ library, looked up by name when the module is
// loaded; PyTorch 2.11 to 2.15 have them. With a PyTorch that lacks one, gptfast computes as with PyTorch's defaults.
#pragma once

namespace gptfast {

// Whether PyTorch has the functions that the two below ask.
bool torch_tells_precision();
bool torch_tells_filling();

// Whether PyTorch writes NaN to new memory: torch.utils.deterministic.fill_uninitialized_memory.
bool torch_fills_new_memory();

// Returns the number of bf16 parts, 1 to 3, that make an fp32 number as exact as PyTorch's setting for CPUs asks for:
// that of torch.set_float32_matmul_precision, or of torch.backends.mkldnn.matmul.fp32_precision.
int parts_asked_for();

}  // namespace gptfast
