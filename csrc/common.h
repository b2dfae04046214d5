// What every wrapper needs: the level in use, dtypes, and the way to the reference for float64.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "loops.h"

namespace gptfast {

enum class Level { generic, avx2, avx512, avx512_vnni, avx512_bf16 };
Level level();  // of this process: the best the CPU has, or what set_isa chose

// The same loops at each level; a machine without x86's levels has the default one only.
template <class Table>
const Table& pick(const Table& generic, const Table& avx2, const Table& avx512) {
  switch (level()) {
    case Level::generic:
      return generic;
    case Level::avx2:
      return avx2;
    default:
      return avx512;
  }
}

inline Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::fp32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::fp16;
    default:
      TORCH_CHECK_VALUE(false, "gptfast's C++ kernels take float32, bfloat16 and float16, got ", t.scalar_type());
  }
}

// Rows a kernel can walk: the last dimension contiguous.
inline at::Tensor rows(const at::Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

// An operator's outputs are defined: where there is nothing to give, an empty tensor.
inline at::Tensor or_empty(const at::Tensor& t, const at::TensorOptions& options) {
  return t.defined() ? t : at::empty({0}, options);
}

// Calls the PyTorch reference, registered for every backend as CompositeExplicitAutograd: under a
// backend key that has no kernel of its own, that is what the dispatcher finds.
template <class Signature, class... Args>
auto reference(const char* name, const Args&... args) {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return op.redispatch(c10::DispatchKeySet(c10::DispatchKey::MAIA), args...);
}

}  // namespace gptfast
