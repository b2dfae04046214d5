// Code that every wrapper needs: the loops of the level in use, dtypes, and the call of the reference for float64.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>

#include "level.h"

namespace gptfast {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;

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

// Returns t with a contiguous last dimension, as the loops need it.
inline at::Tensor contiguous_rows(const at::Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
}

// Returns t, or an empty tensor: an operator must not return an undefined one.
inline at::Tensor or_empty(const at::Tensor& t, const at::TensorOptions& options) {
  return t.defined() ? t : at::empty({0}, options);
}

// Calls the PyTorch reference of an operator, which is registered as CompositeExplicitAutograd, from its CPU kernel.
template <class Signature, class... Args>
auto reference(const char* name, const Args&... args) {
  using Result = typename c10::guts::function_traits<Signature>::return_type;
  torch::jit::Stack stack;
  torch::jit::push(stack, args...);
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxedForDispatchKey(
      c10::DispatchKey::CompositeExplicitAutograd, stack);
  if constexpr (!std::is_void_v<Result>) return c10::impl::PopResult<Result>::call(stack);
}

}  // namespace gptfast
