// Memory for the tensors that operations make, kept from step to step.
//
// New memory from the system costs a page fault every 4 KB, 0.2 s per GB, and malloc asks the system for each large
// tensor anew. These tensors come from one range of addresses instead, as large as the machine's memory. Only the parts
// that were once in use take memory, and they keep it.
#pragma once

#include <ATen/core/Tensor.h>

namespace gptfast {

// Returns an uninitialised CPU tensor, as at::empty does. Small ones do come from at::empty.
at::Tensor make_tensor(at::IntArrayRef sizes, const at::TensorOptions& options);

// Gives the memory of freed tensors back to the system.
void empty_cache();

}  // namespace gptfast
