// Philox-4x32-10 (Salmon et al., SC 2011) on W lanes at once; see kernels/reference/philox.py.
#pragma once

#include "vectors.h"

namespace gptfast::GPTFAST_LEVEL {

// Multiplies each lane by the constant: the product's upper and lower 32 bits.
static inline void multiply(vu a, uint32_t constant, vu& hi, vu& lo) {
#if defined(__AVX512F__)
  const __m512i m = _mm512_set1_epi32((int)constant), x = (__m512i)a;
  const __m512i even = _mm512_mul_epu32(x, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), m);
  hi = (vu)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  lo = (vu)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i m = _mm256_set1_epi32((int)constant), x = (__m256i)a;
  const __m256i even = _mm256_mul_epu32(x, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), m);
  hi = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  lo = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#else
  for (int i = 0; i < W; ++i) {
    const uint64_t product = (uint64_t)a[i] * constant;
    hi[i] = (uint32_t)(product >> 32);
    lo[i] = (uint32_t)product;
  }
#endif
}

// Four random words for each counter; a lane is a counter.
struct Words {
  vu word[4];
};

static inline Words philox(vu c0, vu c1, vu c2, vu c3, uint64_t seed) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vu hi0, lo0, hi1, lo1;
    multiply(c0, 0xD2511F53u, hi0, lo0);
    multiply(c2, 0xCD9E8D57u, hi1, lo1);
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Maps random words to [0, 1) as Triton's uint_to_uniform_float does.
static inline vf uniform(vu word) {
  const vi x = (vi)word;
  return __builtin_convertvector(x < 0 ? ~x : x, vf) * 4.6566127342e-10f;
}

}  // namespace gptfast::GPTFAST_LEVEL
