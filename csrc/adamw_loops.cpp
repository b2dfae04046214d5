// One AdamW step over a range of elements of one tensor, and the range's share of the gradient norm.
#include "maths.h"
#include "philox.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t PREFETCH_BYTES = 2048;        // from what is read now to what is prefetched
constexpr int64_t ELEMENTS_PER_PHILOX = 4 * W;  // W counters of four words
constexpr int64_t SQUARES_PER_FP32_SUM = 2048;  // whose sum is then added in double

// Rounds to the bf16 above or below, chosen by 16 random bits; inf and NaN stay.
inline vf round_stochastic(vf x, vu random) {
  const vu bits = (vu)x, finite = (bits & 0x7F800000u) != 0x7F800000u;
  return finite ? (vf)((bits + (random >> 16)) & 0xFFFF0000u) : x;
}

// Writes the random words of elements index .. index + ELEMENTS_PER_PHILOX: word e & 3 of counter e >> 2 for element e.
inline void random_words(int64_t index, const AdamWTensor& t, uint64_t seed, uint32_t* out) {
  const Words words = philox(iota() + (uint32_t)(index >> 2), splat(t.param_id), splat(t.step), splat(2u), seed);
  // out[4 * i + w] = word w of counter i: interleave words to pairs, then pairs to fours.
  const vu* w = words.word;
  const vu low01 = interleave<1, false>(w[0], w[1]), low23 = interleave<1, false>(w[2], w[3]);
  const vu high01 = interleave<1, true>(w[0], w[1]), high23 = interleave<1, true>(w[2], w[3]);
  const vu fours[4] = {interleave<2, false>(low01, low23), interleave<2, true>(low01, low23),
                       interleave<2, false>(high01, high23), interleave<2, true>(high01, high23)};
  memcpy(out, fours, sizeof fours);
}

// Whether lanes of param are master rounded to T. Where both are NaN, this does not matter.
inline vi is_rounded(vf param, vf master, float) { return (vi)param == (vi)master; }
inline vi is_rounded(vf param, vf master, fp16) { return (vi)param == (vi)widen_half(narrow_half(master)); }
inline vi is_rounded(vf param, vf master, bf16) {
  return (((vu)param ^ round_bits(master)) < 0x10000u) & (master == master);
}

// Returns the updated parameters and writes the updated moments.
template <class M>
inline vf update(const AdamWTensor& t, const AdamWArgs& args, vf p, vf g, M* exp_avg, M* exp_avg_sq, int64_t n) {
  g = g * args.clip;
  const vf m = load_n(exp_avg, n) * args.beta1 + g * args.one_minus_beta1;
  const vf v = load_n(exp_avg_sq, n) * args.beta2 + g * g * args.one_minus_beta2;
  store_n(exp_avg, m, n);
  store_n(exp_avg_sq, v, n);
  return p * args.decay - t.step_size * (m / (square_root(v) * t.inv_sqrt_bias2 + args.eps));
}

// Four streams are read and written. The hardware's prefetchers stop at the end of each page.
template <class T>
inline void prefetch(T* p) {
  __builtin_prefetch((const char*)p + PREFETCH_BYTES, 1);
}
template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch((const char*)p + PREFETCH_BYTES);
}

// Steps n <= W elements from element j. random: a word for each.
template <class T, class M>
[[gnu::always_inline]] inline void step_vector(const AdamWTensor& t, const AdamWArgs& args, const uint32_t* random,
                                               int64_t j, int64_t n) {
  T* param = (T*)t.param + j;
  const T* grad = (const T*)t.grad + j;
  M *exp_avg = (M*)t.exp_avg + j, *exp_avg_sq = (M*)t.exp_avg_sq + j;
  prefetch(param);
  prefetch(grad);
  prefetch(exp_avg);
  prefetch(exp_avg_sq);
  vf p = load_n(param, n);
  if (t.master) {
    // Where the parameter is not the rounded master, somebody else has written to it.
    const vf master = load_n(t.master + j, n);
    p = is_rounded(p, master, T{}) ? master : p;
  }
  p = update(t, args, p, load_n(grad, n), exp_avg, exp_avg_sq, n);
  if (t.master) store_n(t.master + j, p, n);
  if (args.stochastic) {
    vu words;
    memcpy(&words, random, sizeof words);
    p = round_stochastic(p, words);  // now a bf16 value, which the store keeps exactly
  }
  store_n(param, p, n);
}

// begin is a multiple of ELEMENTS_PER_PHILOX. By value: a store could change what is in memory.
template <class T, class M>
void step_elements(const AdamWTensor t, const AdamWArgs args, int64_t begin, int64_t end) {
  uint32_t random[ELEMENTS_PER_PHILOX];
  for (int64_t j = begin; j < end; j += ELEMENTS_PER_PHILOX) {
    if (args.stochastic) random_words(j, t, args.seed, random);
    const int64_t n = smaller(ELEMENTS_PER_PHILOX, end - j);
    int64_t i = 0;
    for (; n - i >= W; i += W) step_vector<T, M>(t, args, random + i, j + i, W);
    if (n - i > 0) step_vector<T, M>(t, args, random + i, j + i, n - i);
  }
}

void step(const AdamWTensor& t, const AdamWArgs& args, int64_t begin, int64_t end) {
  if (t.moment_dtype == Dtype::bf16) return step_elements<bf16, bf16>(t, args, begin, end);
  by_dtype(t.dtype, [&](auto type) { step_elements<decltype(type), float>(t, args, begin, end); });
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
        const vf g = load(grad + j + i * W);
        part[i] += g * g;
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
