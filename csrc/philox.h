// Philox-4x32-10 (Salmon et al., SC 2011) on W counters at once; see kernels/reference/philox.py.
#pragma once

#include "vectors.h"

namespace gptfast::GPTFAST_LEVEL {

typedef uint64_t vq __attribute__((vector_size(4 * W)));  // W / 2 lanes

constexpr int PHILOX_ROUNDS = 10;

// The keys of two successive rounds in one word: the first round's in the upper half.
struct PhiloxKeys {
  uint64_t k0[PHILOX_ROUNDS / 2], k1[PHILOX_ROUNDS / 2];
};

static inline PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int i = 0; i < PHILOX_ROUNDS / 2; ++i) {
    keys.k0[i] = (uint64_t)k0 << 32 | (k0 + 0x9E3779B9u);
    keys.k1[i] = (uint64_t)k1 << 32 | (k1 + 0xBB67AE85u);
    k0 += 2 * 0x9E3779B9u;
    k1 += 2 * 0xBB67AE85u;
  }
  return keys;
}

// Multiplies the lower half of each lane by the constant.
static inline vq multiply_low(vq a, uint32_t constant) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(constant));
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(constant));
#elif defined(__SSE2__)
  return (vq)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(constant));
#elif defined(__aarch64__)
  return (vq)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(constant));
#else
  return (a & 0xFFFFFFFFu) * constant;
#endif
}

// The four words of W counters, each in the lower half of a 64-bit lane: there a product of 32 by 32 bits reads it, and
// one shift brings the product's upper half there. The lanes' upper halves are never read.
struct Counters {
  vq c0[2], c1[2], c2[2], c3[2];
};

// Runs two rounds on the counters i. k0 and k1: of PhiloxKeys.
static inline void run_two_rounds(Counters& c, int i, uint64_t k0, uint64_t k1) {
  const vq a0 = multiply_low(c.c0[i], 0xD2511F53u), a1 = multiply_low(c.c2[i], 0xCD9E8D57u);
#ifdef __AVX512F__
  // One instruction computes the exclusive or of three.
  const vq b0 = multiply_low((a1 >> 32) ^ c.c1[i] ^ (k0 >> 32), 0xD2511F53u);
  const vq b1 = multiply_low((a0 >> 32) ^ c.c3[i] ^ (k1 >> 32), 0xCD9E8D57u);
  c.c0[i] = (b1 >> 32) ^ a1 ^ k0;
  c.c2[i] = (b0 >> 32) ^ a0 ^ k1;
#else
  // A product's upper half goes into the next round, its lower half into the one after: both keys are applied at once.
  const vq keyed0 = a0 ^ k1, keyed1 = a1 ^ k0;
  const vq b0 = multiply_low((keyed1 >> 32) ^ c.c1[i], 0xD2511F53u);
  const vq b1 = multiply_low((keyed0 >> 32) ^ c.c3[i], 0xCD9E8D57u);
  c.c0[i] = (b1 >> 32) ^ keyed1;
  c.c2[i] = (b0 >> 32) ^ keyed0;
#endif
  c.c1[i] = b1;
  c.c3[i] = b0;
}

static inline void run_rounds(Counters& c, const PhiloxKeys& keys) {
#pragma GCC unroll 5
  for (int pair = 0; pair < PHILOX_ROUNDS / 2; ++pair) {
    run_two_rounds(c, 0, keys.k0[pair], keys.k1[pair]);
    run_two_rounds(c, 1, keys.k0[pair], keys.k1[pair]);
  }
}

template <size_t... I>
static inline vu join_halves(vq lower, vq upper, std::index_sequence<I...>) {
  return __builtin_shufflevector((vu)lower, (vu)(upper << 32), (I + I % 2 * W)...);
}
// Returns the lower halves of the lanes of two vectors, in turn.
static inline vu join_halves(vq lower, vq upper) { return join_halves(lower, upper, std::make_index_sequence<W>()); }

// Four random words for each counter; a lane is a counter.
struct Words {
  vu word[4];
};

static inline Words philox(vu c0, vu c1, vu c2, vu c3, uint64_t seed) {
  Counters c = {{(vq)c0, (vq)c0 >> 32}, {(vq)c1, (vq)c1 >> 32}, {(vq)c2, (vq)c2 >> 32}, {(vq)c3, (vq)c3 >> 32}};
  run_rounds(c, philox_keys(seed));
  return {{join_halves(c.c0[0], c.c0[1]), join_halves(c.c1[0], c.c1[1]), join_halves(c.c2[0], c.c2[1]),
           join_halves(c.c3[0], c.c3[1])}};
}

// Returns the even or the odd 64-bit lanes of a and b, in turn.
template <bool ODD, size_t... I>
static inline vu alternate(vu a, vu b, std::index_sequence<I...>) {
  return (vu)__builtin_shufflevector((vq)a, (vq)b, ((I & ~(size_t)1) + ODD + I % 2 * (W / 2))...);
}

// Writes the words of the counters (first + i, c1, c2, c3), i < W: word w of counter i is element 4 * i + w.
static inline void philox_in_order(uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, const PhiloxKeys& keys,
                                   vu* words) {
  Counters c;
  for (int half = 0; half < 2; ++half) {
    // Even lanes take the first quarter of the counters, odd ones the next: alternate() then puts them in order.
    for (int lane = 0; lane < W / 2; ++lane) c.c0[half][lane] = lane / 2 + lane % 2 * (W / 4);
    c.c0[half] += first + half * (W / 2);
    c.c1[half] = (vq)splat(c1);
    c.c2[half] = (vq)splat(c2);
    c.c3[half] = (vq)splat(c3);
  }
  run_rounds(c, keys);
  for (int half = 0; half < 2; ++half) {
    const vu words01 = join_halves(c.c0[half], c.c1[half]), words23 = join_halves(c.c2[half], c.c3[half]);
    words[2 * half] = alternate<false>(words01, words23, std::make_index_sequence<W / 2>());
    words[2 * half + 1] = alternate<true>(words01, words23, std::make_index_sequence<W / 2>());
  }
}

// Maps random words to [0, 1) as Triton's uint_to_uniform_float does.
static inline vf uniform(vu word) {
  const vi x = (vi)word;
  return __builtin_convertvector(x < 0 ? ~x : x, vf) * 4.6566127342e-10f;
}

}  // namespace gptfast::GPTFAST_LEVEL
