// GELU in its tanh form: x s with s = 1 / (1 + e), e = exp(-2 u), u = sqrt(2 / pi) (x + 0.044715 x^3),
// which is x (1 + tanh u) / 2 without its cancellation. 1 - s is e s, for the same reason.
#include "simd.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr float SLOPE = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float CUBIC = 0.044715f;

struct Gelu {
  vf s, one_minus_s, du;  // du: the derivative of 2 u

  explicit Gelu(vf x) {
    // Beyond, s is 0 or 1 to every digit, while exp and x^2 would overflow. NaN stays.
    const vf low = splat(-10.0f), high = splat(12.0f), near = x < low ? low : x > high ? high : x;
    const vf square = near * near, e = exp(-SLOPE * near * (1.0f + CUBIC * square));
    const vf sigmoid = 1.0f / (1.0f + e);
    s = x < low ? vf{} : sigmoid;
    one_minus_s = e * sigmoid;
    du = SLOPE * (1.0f + 3.0f * CUBIC * square);
  }
};

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
