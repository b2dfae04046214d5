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
inline vf update(const AdamWTensor& t, const AdamWArgs& args, vf p, vf g, M* exp_avg, M* exp_avg_sq) {
  g = g * args.clip;
  const vf m = load(exp_avg) * args.beta1 + g * args.one_minus_beta1;
  const vf v = load(exp_avg_sq) * args.beta2 + g * g * args.one_minus_beta2;
  store(exp_avg, m);
  store(exp_avg_sq, v);
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

// Steps the first n elements of t, a multiple of W. index: of the first one in the parameter, a multiple of W.
// Compiled once, for the last vector too: which products are fused with a sum must not depend on an element's place.
template <class T, class M>
[[gnu::noipa]] void step_vectors(const AdamWTensor t, const AdamWArgs args, int64_t index, int64_t n) {
  T* param = (T*)t.param;
  const T* grad = (const T*)t.grad;
  M *exp_avg = (M*)t.exp_avg, *exp_avg_sq = (M*)t.exp_avg_sq;
  uint32_t random[ELEMENTS_PER_PHILOX];
  for (int64_t j = 0; j < n; j += W) {
    prefetch(param + j);
    prefetch(grad + j);
    prefetch(exp_avg + j);
    prefetch(exp_avg_sq + j);
    vf p = load(param + j);
    if (t.master) {
      // Where the parameter is not the rounded master, somebody else has written to it.
      const vf master = load(t.master + j);
      p = is_rounded(p, master, T{}) ? master : p;
    }
    p = update(t, args, p, load(grad + j), exp_avg + j, exp_avg_sq + j);
    if (t.master) store(t.master + j, p);
    if (args.stochastic) {
      const int64_t at = j % ELEMENTS_PER_PHILOX;
      if (at == 0) random_words(index + j, t, args.seed, random);
      vu words;
      memcpy(&words, random + at, sizeof words);
      p = round_stochastic(p, words);  // now a bf16 value, which the store keeps exactly
    }
    store(param + j, p);
  }
}

// begin is a multiple of W.
template <class T, class M>
void step_elements(const AdamWTensor& t, const AdamWArgs& args, int64_t begin, int64_t end) {
  const int64_t n = (end - begin) % W;
  AdamWTensor at = t;
  const auto move_to = [&](int64_t j) {
    at.param = (T*)t.param + j;
    at.grad = (const T*)t.grad + j;
    at.exp_avg = (M*)t.exp_avg + j;
    at.exp_avg_sq = (M*)t.exp_avg_sq + j;
    at.master = t.master ? t.master + j : nullptr;
  };
  move_to(begin);
  step_vectors<T, M>(at, args, begin, end - begin - n);
  if (!n) return;
  // The last elements, in a copy as long as a vector.
  move_to(end - n);
  AdamWTensor copy = at;
  T param[W] = {}, grad[W] = {};
  M exp_avg[W] = {}, exp_avg_sq[W] = {};
  float master[W] = {};
  memcpy(copy.param = param, at.param, n * sizeof(T));
  memcpy(grad, at.grad, n * sizeof(T));
  memcpy(copy.exp_avg = exp_avg, at.exp_avg, n * sizeof(M));
  memcpy(copy.exp_avg_sq = exp_avg_sq, at.exp_avg_sq, n * sizeof(M));
  if (t.master) memcpy(copy.master = master, at.master, n * sizeof(float));
  copy.grad = grad;
  step_vectors<T, M>(copy, args, end - n, W);
  memcpy(at.param, param, n * sizeof(T));
  memcpy(at.exp_avg, exp_avg, n * sizeof(M));
  memcpy(at.exp_avg_sq, exp_avg_sq, n * sizeof(M));
  if (t.master) memcpy(at.master, master, n * sizeof(float));
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
