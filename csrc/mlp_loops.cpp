// GELU and its gradient, element by element.
#include "gelu.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

template <class T>
void fwd(const T* x, T* y, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += W) {
    const int64_t n = smaller<int64_t>(W, end - j);
    const vf value = load_n(x + j, n);
    store_n(y + j, value * Gelu(value).s, n);
  }
}

// Writes y = gelu(x) and replaces dy by dx = dy (s + x s (1 - s) 2 u').
template <class T>
void bwd(const T* x, T* y, T* dy, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += W) {
    const int64_t n = smaller<int64_t>(W, end - j);
    const vf value = load_n(x + j, n);
    const Gelu gelu(value);
    const vf result = value * gelu.s;
    store_n(y + j, result, n);
    store_n(dy + j, load_n(dy + j, n) * (gelu.s + result * gelu.one_minus_s * gelu.du), n);
  }
}

void gelu_fwd(Dtype dtype, const void* x, void* y, int64_t begin, int64_t end) {
  by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    fwd((const T*)x, (T*)y, begin, end);
  });
}
void gelu_bwd(Dtype dtype, const void* x, void* y, void* dy, int64_t begin, int64_t end) {
  by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    bwd((const T*)x, (T*)y, (T*)dy, begin, end);
  });
}

}  // namespace

extern const MlpLoops mlp = {gelu_fwd, gelu_bwd};

}  // namespace gptfast::GPTFAST_LEVEL
