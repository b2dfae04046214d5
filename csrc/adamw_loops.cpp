// One AdamW step over a range of elements of one tensor, and the range's share of the gradient norm.
#include <type_traits>

#include "maths.h"
#include "philox.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t PREFETCH_BYTES = 2048;  // from what is read now to what is prefetched
constexpr int64_t PAIR = 2 * W;
constexpr int64_t SQUARES_PER_FP32_SUM = 2048;  // whose sum is then added in double

// The loops work on two vectors at once: converting 2 W elements of bf16 takes fewer instructions than twice W.
struct Pair {
  vf of[2];
};

// The (un)packing instructions of bf16 work on each 128 bits alone. IN_ORDER: lanes have the order of memory, which
// takes a permutation of 64-bit lanes. Where all tensors are bf16, any order does.
template <bool IN_ORDER, class T>
inline Pair load_pair(const T* p) {
  return {{load(p), load(p + W)}};
}
template <bool IN_ORDER, class T>
inline void store_pair(T* p, const Pair& x) {
  store(p, x.of[0]);
  store(p + W, x.of[1]);
}
#ifdef __AVX2__
#ifdef __AVX512F__
template <bool IN_ORDER>
inline vu before_unpacking(vu x) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  return IN_ORDER ? (vu)_mm512_permutexvar_epi64(order, (__m512i)x) : x;
}
template <bool IN_ORDER>
inline vu packed(vu a, vu b) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), x = _mm512_packus_epi32((__m512i)a, (__m512i)b);
  return (vu)(IN_ORDER ? _mm512_permutexvar_epi64(order, x) : x);
}
inline vu unpack_lower(vu a, vu b) { return (vu)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
inline vu unpack_upper(vu a, vu b) { return (vu)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
#else
template <bool IN_ORDER>
inline vu before_unpacking(vu x) {
  return IN_ORDER ? (vu)_mm256_permute4x64_epi64((__m256i)x, 0xD8) : x;
}
template <bool IN_ORDER>
inline vu packed(vu a, vu b) {
  return before_unpacking<IN_ORDER>((vu)_mm256_packus_epi32((__m256i)a, (__m256i)b));
}
inline vu unpack_lower(vu a, vu b) { return (vu)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
inline vu unpack_upper(vu a, vu b) { return (vu)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
#endif
template <bool IN_ORDER>
inline Pair load_pair(const bf16* p) {
  const vu halves = before_unpacking<IN_ORDER>((vu)load((const float*)p));
  return {{(vf)unpack_lower(vu{}, halves), (vf)unpack_upper(vu{}, halves)}};
}
template <bool IN_ORDER>
inline void store_upper_halves(bf16* p, vu a, vu b) {
  store((float*)p, (vf)packed<IN_ORDER>(a >> 16, b >> 16));
}
// Widens 2 W halves of 32 bits, in their order in memory.
template <bool IN_ORDER>
inline void widen_halves(vu x, vu (&wide)[2]) {
  const vu halves = before_unpacking<IN_ORDER>(x);
  wide[0] = unpack_lower(halves, vu{});
  wide[1] = unpack_upper(halves, vu{});
}
#else
template <bool IN_ORDER>
inline void store_upper_halves(bf16* p, vu a, vu b) {
  *(vh_any*)p = narrow(a >> 16);
  *(vh_any*)(p + W) = narrow(b >> 16);
}
template <bool IN_ORDER>
inline void widen_halves(vu x, vu (&wide)[2]) {
  vh halves[2];
  memcpy(halves, &x, sizeof halves);
  for (int i = 0; i < 2; ++i) wide[i] = widen(halves[i]);
}
#endif

inline bool any_nan(const Pair& x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x.of[0], (__m512)x.of[1], _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x.of[0], (__m256)x.of[1], _CMP_UNORD_Q)) != 0;
#else
  return any((x.of[0] != x.of[0]) | (x.of[1] != x.of[1]));
#endif
}

// Stores what is nearest to x. Without NAN_TOO, no element is NaN: adding to the bits of one could make a number of it.
template <bool IN_ORDER, bool NAN_TOO, class T>
inline void store_nearest(T* p, const Pair& x) {
  const auto bits = [](vf x) { return NAN_TOO ? round_bits_or_nan(x) : round_bits(x); };
  if constexpr (!std::is_same_v<T, bf16>)
    store_pair<IN_ORDER>(p, x);
  else
    store_upper_halves<IN_ORDER>(p, bits(x.of[0]), bits(x.of[1]));
}

// Stores the bf16 above or below, chosen by 16 random bits. Infinity stays: its lower half is 0.
template <bool IN_ORDER, bool NAN_TOO>
inline void store_stochastic(bf16* p, const Pair& x, vu random) {
  const auto rounded = [](vf x, vu bits) {
    const vu sum = (vu)x + bits;
    return NAN_TOO ? (x == x ? sum : splat(0x7FC00000u)) : sum;
  };
  vu bits[2];
  widen_halves<IN_ORDER>(random, bits);
  store_upper_halves<IN_ORDER>(p, rounded(x.of[0], bits[0]), rounded(x.of[1], bits[1]));
}

// Whether lanes of param are master rounded to T. Where both are NaN, this does not matter.
inline vi is_rounded(vf param, vf master, float) { return (vi)param == (vi)master; }
inline vi is_rounded(vf param, vf master, fp16) { return (vi)param == (vi)widen_half(narrow_half(master)); }
inline vi is_rounded(vf param, vf master, bf16) {
  return (((vu)param ^ round_bits(master)) < 0x10000u) & (master == master);
}

struct Updated {
  Pair param, exp_avg, exp_avg_sq;
};

// A NaN in the moments returned is one in the parameters returned, too.
inline Updated update(const AdamWTensor& t, const AdamWArgs& args, Pair p, const Pair& grad, Pair m, Pair v) {
  for (int i = 0; i < 2; ++i) {
    const vf g = grad.of[i] * args.clip;
    m.of[i] = m.of[i] * args.beta1 + g * args.one_minus_beta1;
    v.of[i] = v.of[i] * args.beta2 + g * g * args.one_minus_beta2;
    const vf denominator = square_root(v.of[i]) * t.inv_sqrt_bias2 + args.eps;
    p.of[i] = p.of[i] * args.decay - t.step_size * (m.of[i] / denominator);
  }
  return {p, m, v};
}

// Four streams are read and written. The hardware's prefetchers stop at the end of each page.
template <class T>
inline void prefetch_pair(T* p) {
  for (size_t byte = 0; byte < PAIR * sizeof(T); byte += 64)
    __builtin_prefetch((const char*)p + PREFETCH_BYTES + byte, !std::is_const_v<T>);
}

#ifdef __clang__
#define COMPILED_ONCE [[gnu::noinline]]
#else
#define COMPILED_ONCE [[gnu::noipa]]
#endif

// Steps the first n elements of t, a multiple of PAIR. index: of the first one in the parameter, a multiple of PAIR.
// Compiled once, for the last pair too: which products are fused with a sum must not depend on an element's place.
template <class T, class M, bool MASTER, bool STOCHASTIC>
COMPILED_ONCE void step_vectors(const AdamWTensor t, const AdamWArgs args, int64_t index, int64_t n) {
  T* param = (T*)t.param;
  const T* grad = (const T*)t.grad;
  M *exp_avg = (M*)t.exp_avg, *exp_avg_sq = (M*)t.exp_avg_sq;
  constexpr bool IN_ORDER = MASTER || !std::is_same_v<M, bf16>;
  const PhiloxKeys keys = philox_keys(args.seed);
  vu random[4];
  for (int64_t j = 0; j < n; j += PAIR) {
    prefetch_pair(param + j);
    prefetch_pair(grad + j);
    prefetch_pair(exp_avg + j);
    prefetch_pair(exp_avg_sq + j);
    Pair p = load_pair<IN_ORDER>(param + j);
    if (MASTER) {
      // Where the parameter is not the rounded master, somebody else has written to it.
      const Pair master = load_pair<IN_ORDER>(t.master + j);
      for (int i = 0; i < 2; ++i) p.of[i] = is_rounded(p.of[i], master.of[i], T{}) ? master.of[i] : p.of[i];
    }
    const Updated to = update(t, args, p, load_pair<IN_ORDER>(grad + j), load_pair<IN_ORDER>(exp_avg + j),
                              load_pair<IN_ORDER>(exp_avg_sq + j));
    if (MASTER) store_pair<IN_ORDER>(t.master + j, to.param);
    // Element e takes a half of word (e & 7) >> 1 of counter e >> 3: the lower one if e is even.
    const int64_t pair = j / PAIR % 4;
    if (STOCHASTIC && pair == 0) philox_in_order((uint32_t)((index + j) >> 3), t.param_id, t.step, 2u, keys, random);
    const auto store_all = [&]<bool NAN_TOO>(std::bool_constant<NAN_TOO>) {
      store_nearest<IN_ORDER, NAN_TOO>(exp_avg + j, to.exp_avg);
      store_nearest<IN_ORDER, NAN_TOO>(exp_avg_sq + j, to.exp_avg_sq);
      if constexpr (STOCHASTIC)
        store_stochastic<IN_ORDER, NAN_TOO>(param + j, to.param, random[pair]);
      else
        store_nearest<IN_ORDER, NAN_TOO>(param + j, to.param);
    };
    if (any_nan(to.param)) [[unlikely]]
      store_all(std::true_type());
    else
      store_all(std::false_type());
  }
}

// begin is a multiple of PAIR.
template <class T, class M, bool MASTER, bool STOCHASTIC>
void step_elements(const AdamWTensor& t, const AdamWArgs& args, int64_t begin, int64_t end) {
  const int64_t n = (end - begin) % PAIR;
  AdamWTensor at = t;
  const auto move_to = [&](int64_t j) {
    at.param = (T*)t.param + j;
    at.grad = (const T*)t.grad + j;
    at.exp_avg = (M*)t.exp_avg + j;
    at.exp_avg_sq = (M*)t.exp_avg_sq + j;
    if (MASTER) at.master = t.master + j;
  };
  move_to(begin);
  step_vectors<T, M, MASTER, STOCHASTIC>(at, args, begin, end - begin - n);
  if (!n) return;
  // The last elements, in a copy as long as a pair.
  move_to(end - n);
  AdamWTensor copy = at;
  T param[PAIR] = {}, grad[PAIR] = {};
  M exp_avg[PAIR] = {}, exp_avg_sq[PAIR] = {};
  float master[PAIR] = {};
  memcpy(copy.param = param, at.param, n * sizeof(T));
  memcpy(grad, at.grad, n * sizeof(T));
  memcpy(copy.exp_avg = exp_avg, at.exp_avg, n * sizeof(M));
  memcpy(copy.exp_avg_sq = exp_avg_sq, at.exp_avg_sq, n * sizeof(M));
  if (MASTER) memcpy(copy.master = master, at.master, n * sizeof(float));
  copy.grad = grad;
  step_vectors<T, M, MASTER, STOCHASTIC>(copy, args, end - n, PAIR);
  memcpy(at.param, param, n * sizeof(T));
  memcpy(at.exp_avg, exp_avg, n * sizeof(M));
  memcpy(at.exp_avg_sq, exp_avg_sq, n * sizeof(M));
  if (MASTER) memcpy(at.master, master, n * sizeof(float));
}

// The loops are compiled for each answer: a branch in them would keep constants out of registers.
template <class T, class M, bool STOCHASTIC>
void step_rounded(const AdamWTensor& t, const AdamWArgs& args, int64_t begin, int64_t end) {
  if (t.master) return step_elements<T, M, true, STOCHASTIC>(t, args, begin, end);
  step_elements<T, M, false, STOCHASTIC>(t, args, begin, end);
}

void step(const AdamWTensor& t, const AdamWArgs& args, int64_t begin, int64_t end) {
  const bool moments_bf16 = t.moment_dtype == Dtype::bf16;
  if (args.stochastic && moments_bf16) return step_rounded<bf16, bf16, true>(t, args, begin, end);
  if (args.stochastic) return step_rounded<bf16, float, true>(t, args, begin, end);
  if (moments_bf16) return step_rounded<bf16, bf16, false>(t, args, begin, end);
  by_dtype(t.dtype, [&](auto type) { step_rounded<decltype(type), float, false>(t, args, begin, end); });
}

template <class T>
double sum_squares(const T* grad, int64_t begin, int64_t end) {
  double total = 0;
  for (int64_t from = begin; from < end; from += SQUARES_PER_FP32_SUM) {
    const int64_t to = smaller(end, from + SQUARES_PER_FP32_SUM);
    vf part[4] = {};
    int64_t j = from;
    for (; j + 4 * W <= to; j += 4 * W)
      for (int i = 0; i < 4; ++i) {
        const Pair g = load_pair<true>(grad + j + i / 2 * PAIR);
        part[i] += g.of[i % 2] * g.of[i % 2];
      }
    for (; j < to; j += W) {
      const vf g = load_n(grad + j, smaller<int64_t>(W, to - j));
      part[0] += g * g;
    }
    total += sum((part[0] + part[1]) + (part[2] + part[3]));
  }
  return total;
}

double square_sum(Dtype dtype, const void* grad, int64_t begin, int64_t end) {
  return by_dtype(dtype, [&](auto type) { return sum_squares((const decltype(type)*)grad, begin, end); });
}

}  // namespace

extern const AdamWLoops adamw = {step, square_sum};

}  // namespace gptfast::GPTFAST_LEVEL
