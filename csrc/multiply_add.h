// a b + c, said exactly: compilers join a product and a sum into one rounding where the CPU can, and not elsewhere.
#pragma once

#include "vectors.h"

namespace gptfast::GPTFAST_LEVEL {

#if defined(__AVX512F__)

// Returns a b + c with one rounding.
static inline vf fused(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
// Returns a b + c with as few roundings as are fast.
static inline vf multiply_add(vf a, vf b, vf c) { return fused(a, b, c); }

#elif defined(__AVX2__)

static inline vf fused(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline vf multiply_add(vf a, vf b, vf c) { return fused(a, b, c); }

#elif defined(__aarch64__)

static inline vf fused(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
static inline vf multiply_add(vf a, vf b, vf c) { return fused(a, b, c); }

#else

// In fp64 the product is exact. So that the second rounding, to fp32, is right, the first one goes to the neighbour
// with an odd last bit where the sum is inexact (Boldo and Melquiond, Emulation of FMA and correctly rounded sums,
// 2008).
static inline vf fused(vf a, vf b, vf c) {
  typedef int64_t vlong __attribute__((vector_size(8 * W)));
  const vd product = __builtin_convertvector(a, vd) * __builtin_convertvector(b, vd);
  const vd addend = __builtin_convertvector(c, vd), sum = product + addend, of_product = sum - addend;
  const vd error = (addend - (sum - of_product)) + (product - of_product);
  const vlong up = error > 0.0, down = error < 0.0, positive = sum > 0.0;
  const vlong even = ((vlong)sum & 1) - 1, step = (up ^ positive) | 1;
  return __builtin_convertvector((vd)((vlong)sum + ((up | down) & even & step)), vf);
}
static inline vf multiply_add(vf a, vf b, vf c) { return a * b + c; }

#endif

}  // namespace gptfast::GPTFAST_LEVEL
