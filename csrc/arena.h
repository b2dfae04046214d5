// Memory for the tensors that operations make, kept from step to step.
//
// Memory fresh from the system costs a page fault every 4 KB, 0.2 s for each GB: malloc asks for large
// tensors anew each time and gives them back. These come from one range of addresses as large as the machine's
// memory, of which only what was once in use takes any, and stay there.
#pragma once

#include <ATen/core/Tensor.h>

namespace gptfast {

// As at::empty, for a CPU tensor; small ones are at::empty's.
at::Tensor make_tensor(at::IntArrayRef sizes, const at::TensorOptions& options);

// Gives the memory of tensors that are gone back to the system.
void empty_cache();

}  // namespace gptfast
