// exp, exp2 and the square root of vectors.
#pragma once

#include "vectors.h"

namespace gptfast::GPTFAST_LEVEL {

// 1.5 * 2^23. Added to a float n, it rounds n to an integer, which the low bits of the sum then hold.
constexpr float MAGIC = 12582912.0f;

// Returns p times 2^n, where z = MAGIC + n. Unsigned: for arguments at which exp returns 0, the sum of the bits may
// exceed 2^31.
static inline vf scale_by_power(vf p, vf z) { return (vf)((vu)p + ((vu)z << 23)); }

// Returns exp(x) for x <= 88, and 0 below -87.3. NaN stays NaN. Cephes' range reduction; the error is about 1 ulp.
static inline vf exp(vf x) {
  const vf z = x * 1.44269504088896341f + MAGIC, n = z - MAGIC;
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return x < splat(-87.3f) ? vf{} : scale_by_power(p, z);
}

// Returns 2^x for x <= 127, and 0 below -126. A minimax polynomial of degree 6 on [-1/2, 1/2]; its error is 1e-8.
static inline vf exp2(vf x) {
  const vf z = x + MAGIC, f = x - (z - MAGIC);
  vf p = f * 1.5353361330e-04f + 1.3398874608e-03f;
  p = p * f + 9.6184373615e-03f;
  p = p * f + 5.5503324705e-02f;
  p = p * f + 2.4022647914e-01f;
  p = p * f + 6.9314720286e-01f;
  p = p * f + 1.0f;
  return x < splat(-126.0f) ? vf{} : scale_by_power(p, z);
}

static inline vf square_root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__aarch64__)
  return (vf)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < W; ++i) x[i] = sqrtf(x[i]);
  return x;
#endif
}

}  // namespace gptfast::GPTFAST_LEVEL
