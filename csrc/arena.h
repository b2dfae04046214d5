// Memory for the tensors that operations make, kept from step to step.
//
// New memory from the system costs a page fault every 4 KB, 0.2 s per GB, and malloc asks the system for each large
// tensor anew. These tensors come from one range of addresses instead, as large as the machine's memory. Only the parts
// that were once in use take memory, and they keep it.
#pragma once

#include "tensor.h"

namespace gptfast {

// Returns an uninitialised tensor. Small ones are torch's.
Tensor make_tensor(IntArrayRef sizes, ScalarType dtype);

// Gives the memory of freed tensors back to the system.
void empty_cache();

}  // namespace gptfast
