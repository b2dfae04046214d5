// One AdamW step over a run of elements of one tensor, and a run's share of the gradient norm.
#include "philox.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// fp32 bits to the bf16 above or below, chosen by 16 random bits; inf and NaN stay.
inline void store_stochastic(bf16* p, vf x, vu random, int64_t n) {
  const vu bits = (vu)x, finite = (bits & 0x7F800000u) != 0x7F800000u;
  const vu rounded = (bits + (finite & (random >> 16))) & 0xFFFF0000u;
  store_part(p, (vf)rounded, n);  // exact: the low half is zero
}

// W random words for elements [index, index + W): word index & 3 of counter index >> 2.
inline vu random_words(int64_t index, const AdamWTensor& t, uint64_t seed) {
  vu quad, out;
  for (int i = 0; i < W; ++i) quad[i] = (uint32_t)((index + i) >> 2);
  const Words words = philox(quad, splat(t.param_id), splat(t.step), splat(2u), seed);
  for (int i = 0; i < W; ++i) out[i] = words.word[(index + i) & 3][i];
  return out;
}

template <class M>
inline vf update(const AdamWTensor& t, const AdamWArgs& args, vf p, vf g, M* exp_avg, M* exp_avg_sq, int64_t n) {
  g = g * args.clip;
  vf m = n == W ? load(exp_avg) : load_part(exp_avg, n);
  vf v = n == W ? load(exp_avg_sq) : load_part(exp_avg_sq, n);
  m = m * args.beta1 + g * args.one_minus_beta1;
  v = v * args.beta2 + g * g * args.one_minus_beta2;
  if (n == W) {
    store(exp_avg, m);
    store(exp_avg_sq, v);
  } else {
    store_part(exp_avg, m, n);
    store_part(exp_avg_sq, v, n);
  }
  vf root;
#if defined(__AVX512F__)
  root = (vf)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  root = (vf)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < W; ++i) root[i] = sqrtf(v[i]);
#endif
  return p * args.decay - t.step_size * (m / (root * t.inv_sqrt_bias2 + args.eps));
}

template <class T, class M>
void run(const AdamWTensor& t, const AdamWArgs& args, int64_t begin, int64_t end) {
  T* param = (T*)t.param;
  const T* grad = (const T*)t.grad;
  M *exp_avg = (M*)t.exp_avg, *exp_avg_sq = (M*)t.exp_avg_sq;
  for (int64_t j = begin; j < end; j += W) {
    const int64_t n = smaller<int64_t>(W, end - j);
    const vf g = n == W ? load(grad + j) : load_part(grad + j, n);
    vf p;
    if (t.master)
      p = n == W ? load(t.master + j) : load_part(t.master + j, n);
    else
      p = n == W ? load(param + j) : load_part(param + j, n);
    p = update(t, args, p, g, exp_avg + j, exp_avg_sq + j, n);
    if (t.master) store_part(t.master + j, p, n);
    if (args.stochastic)
      store_stochastic((bf16*)t.param + j, p, random_words(j, t, args.seed), n);
    else if (n == W)
      store(param + j, p);
    else
      store_part(param + j, p, n);
  }
}

void step(const AdamWTensor& t, const AdamWArgs& args, int64_t begin, int64_t end) {
  const bool narrow = t.moment_dtype == Dtype::bf16;
  switch (t.dtype) {
    case Dtype::fp32:
      return run<float, float>(t, args, begin, end);
    case Dtype::bf16:
      return narrow ? run<bf16, bf16>(t, args, begin, end) : run<bf16, float>(t, args, begin, end);
    case Dtype::fp16:
      return run<fp16, float>(t, args, begin, end);
  }
}

template <class T>
double squares(const T* grad, int64_t begin, int64_t end) {
  double total = 0;
  constexpr int64_t BLOCK = 2048;
  for (int64_t from = begin; from < end; from += BLOCK) {
    const int64_t to = smaller(end, from + BLOCK);
    vf part[4] = {};
    int64_t j = from;
    for (; j + 4 * W <= to; j += 4 * W)
      for (int i = 0; i < 4; ++i) {
        const vf g = load(grad + j + i * W);
        part[i] += g * g;
      }
    for (; j < to; j += W) {
      const vf g = to - j >= W ? load(grad + j) : load_part(grad + j, to - j);
      part[0] += g * g;
    }
    total += sum((part[0] + part[1]) + (part[2] + part[3]));
  }
  return total;
}

double square_sum(Dtype dtype, const void* grad, int64_t begin, int64_t end) {
  switch (dtype) {
    case Dtype::fp32:
      return squares((const float*)grad, begin, end);
    case Dtype::bf16:
      return squares((const bf16*)grad, begin, end);
    case Dtype::fp16:
      return squares((const fp16*)grad, begin, end);
  }
  return 0;
}

}  // namespace

const AdamWLoops adamw = {step, square_sum};

}  // namespace gptfast::GPTFAST_LEVEL
