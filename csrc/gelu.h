// GELU in its tanh form: x s with s = 1 / (1 + e), e = exp(-2 u), u = sqrt(2 / pi) (x + 0.044715 x^3). This equals
// x (1 + tanh u) / 2 without its cancellation. 1 - s is computed as e s for the same reason.
#pragma once

#include "maths.h"

namespace gptfast::GPTFAST_LEVEL {

struct Gelu {
  static constexpr float SLOPE = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  static constexpr float CUBIC = 0.044715f;
  vf s, one_minus_s, du;  // du: the derivative of 2 u

  explicit Gelu(vf x) {
    // Beyond these limits s is 0 or 1 to every digit, while exp and x^2 would overflow. NaN stays NaN.
    const vf low = splat(-10.0f), high = splat(12.0f), clamped = x < low ? low : x > high ? high : x;
    const vf square = clamped * clamped, e = exp(-SLOPE * clamped * (1.0f + CUBIC * square));
    const vf sigmoid = 1.0f / (1.0f + e);
    s = x < low ? vf{} : sigmoid;
    one_minus_s = e * sigmoid;
    du = SLOPE * (1.0f + 3.0f * CUBIC * square);
  }
};

}  // namespace gptfast::GPTFAST_LEVEL
