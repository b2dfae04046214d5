// GELU and its gradient, element by element.
#include "gelu.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

template <class T>
void fwd(const void* from, void* to, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += W) {
    const int64_t n = smaller<int64_t>(W, end - j);
    const vf x = load_n((const T*)from + j, n);
    store_n((T*)to + j, x * Gelu(x).s, n);
  }
}

// y = gelu(x), and dy becomes dx = dy (s + x s (1 - s) 2 u')
template <class T>
void bwd(const void* from, void* y, void* dy, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += W) {
    const int64_t n = smaller<int64_t>(W, end - j);
    const vf x = load_n((const T*)from + j, n);
    const Gelu gelu(x);
    const vf value = x * gelu.s;
    store_n((T*)y + j, value, n);
    store_n((T*)dy + j, load_n((const T*)dy + j, n) * (gelu.s + value * gelu.one_minus_s * gelu.du), n);
  }
}

void gelu_fwd(Dtype dtype, const void* x, void* y, int64_t begin, int64_t end) {
  by_dtype(dtype, [&](auto type) { fwd<decltype(type)>(x, y, begin, end); });
}
void gelu_bwd(Dtype dtype, const void* x, void* y, void* dy, int64_t begin, int64_t end) {
  by_dtype(dtype, [&](auto type) { bwd<decltype(type)>(x, y, dy, begin, end); });
}

}  // namespace

const MlpLoops mlp = {gelu_fwd, gelu_bwd};

}  // namespace gptfast::GPTFAST_LEVEL
