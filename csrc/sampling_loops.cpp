// Sampling without a sort; kernels/reference/sampling.py is the definition.
//
// top_k: the k-th largest of many strided maxima is a lower bound of the k-th largest logit. The few logits above the
// bound are copied out, and the exact k-th is selected among them.
// top_p: a quickselect that follows the mass instead of the rank.
// Weights are whole numbers up to 2^40 in fp32. 4096 of them add up exactly in double, and these sums add up in int64,
// so no order of summation can change a token.
#include "maths.h"
#include "philox.h"
#include "scratch.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t WEIGHTS_PER_DOUBLE_SUM = 4096;

// Returns the lanes of a mask, each 0 or -1, as bits: lane i is bit i.
inline uint32_t bits_of(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}

// Stores the lanes of x that the bits select, in order, and returns their number. May write W floats.
inline int64_t compress(float* to, vf x, uint32_t bits) {
#if defined(__AVX512F__)
  store(to, (vf)_mm512_maskz_compress_ps((__mmask16)bits, (__m512)x));
#else
  int64_t n = 0;
  for (int i = 0; i < W; ++i) {
    to[n] = x[i];
    n += bits >> i & 1;
  }
#endif
  return __builtin_popcount(bits);
}

// Rounds to the nearest whole number, ties to even. From 2^23 on, every fp32 number is whole.
inline vf round_weight(vf x) {
  const vf whole = (x + 8388608.0f) - 8388608.0f;
  return x < splat(8388608.0f) ? whole : x;
}

// Returns the sum of n weights; n is a multiple of W.
int64_t mass(const float* w, int64_t n) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += WEIGHTS_PER_DOUBLE_SUM) {
    const int64_t end = smaller(n, begin + WEIGHTS_PER_DOUBLE_SUM);
    vd part[2] = {};
    int64_t j = begin;
    for (; j + 2 * W <= end; j += 2 * W)
      for (int i = 0; i < 2; ++i) part[i] += __builtin_convertvector(load(w + j + i * W), vd);
    if (j < end) part[0] += __builtin_convertvector(load(w + j), vd);
    part[0] += part[1];
    total += (int64_t)add_lanes(0, part[0]);
  }
  return total;
}

inline float median(float a, float b, float c) { return larger(smaller(a, b), smaller(larger(a, b), c)); }

// Returns the k-th largest (k >= 1) of n numbers. Overwrites x.
float kth_largest(float* x, int64_t n, int64_t k) {
  int64_t lo = 0, hi = n - 1;
  while (lo < hi) {
    const float pivot = median(x[lo], x[lo + (hi - lo) / 2], x[hi]);
    int64_t i = lo, j = hi;
    while (i <= j) {
      while (x[i] > pivot) ++i;
      while (x[j] < pivot) --j;
      if (i <= j) {
        const float swap = x[i];
        x[i++] = x[j];
        x[j--] = swap;
      }
    }
    if (k - 1 <= j)
      hi = j;
    else if (k - 1 >= i)
      lo = i;
    else
      break;
  }
  return x[k - 1];
}

// The tokens that can still be drawn, in the order of their ids: logits, padded with -inf to a multiple of W, and
// weights.
struct Tokens {
  float *x, *w;
  int32_t* id;  // null: a token's id is its index
  int64_t n;
};

inline vi id_lanes(int64_t first) { return (vi)(iota() + (uint32_t)first); }

// Fills x from n to the next multiple of W.
void pad(float* x, int64_t n, float value) {
  for (int64_t j = n; j < round_up(n, W); ++j) x[j] = value;
}

constexpr int64_t GROUPS = 16;
constexpr int64_t PREFETCH_LOGITS = 2048;  // from what is read now to what is prefetched

// The maxima of a row of logits, found in one pass.
struct Maxima {
  vf best[GROUPS];  // of GROUPS * W strided parts
  float top;        // of all
  bool invalid;     // whether the row has NaN, +inf or nothing but -inf

  template <class T>
  Maxima(const T* logits, int64_t V) {
    vi nan[2] = {};
    for (auto& lanes : best) lanes = splat(-INFINITY);
    int64_t j = 0;
    for (; j + GROUPS * W <= V; j += GROUPS * W)
#pragma GCC unroll 16
      for (int64_t g = 0; g < GROUPS; ++g) {
        // Logits that a product has just written lie in the caches of all cores that computed it.
        __builtin_prefetch(logits + j + g * W + PREFETCH_LOGITS);
        const vf x = load(logits + j + g * W);
        best[g] = max(x, best[g]);
        nan[g % 2] |= x != x;
      }
    for (int64_t g = 0; j < V; j += W, ++g) {
      const vf x = j + W <= V ? load(logits + j) : load_part(logits + j, V - j, -INFINITY);
      best[g] = max(x, best[g]);
      nan[0] |= x != x;
    }
    vf all = best[0];
    for (const vf& lanes : best) all = max(lanes, all);
    top = max(all);
    invalid = top == INFINITY || top == -INFINITY || bits_of(nan[0] | nan[1]);
  }

  // Returns a lower bound of the k-th largest logit.
  float lower_bound(int64_t k) const {
    if (k > GROUPS * W / 2) return -INFINITY;
    float lanes[GROUPS * W];
    memcpy(lanes, best, sizeof lanes);
    return kth_largest(lanes, GROUPS * W, k);
  }
};

// Copies the k tokens with the largest logits to `to`, which has room for all tokens, and returns them. Among tokens
// equal to the k-th, the lower ids stay.
template <class T>
Tokens keep_top_k(const T* logits, int64_t V, int64_t k, float bound, Tokens to, float* space) {
  int64_t n = 0;
  for (int64_t j = 0; j < V; j += W) {
    const int64_t lanes = smaller<int64_t>(W, V - j);
    const vf x = load_n(logits + j, lanes);
    const uint32_t bits = bits_of(x >= splat(bound)) & (uint32_t)((uint64_t{1} << lanes) - 1);
    if (!bits) continue;
    compress((float*)to.id + n, (vf)id_lanes(j), bits);
    n += compress(to.x + n, x, bits);
  }
  memcpy(space, to.x, sizeof(float) * n);
  const float kth = kth_largest(space, n, k);
  int64_t above = 0;
  for (int64_t j = 0; j < n; ++j) above += to.x[j] > kth;
  int64_t ties = k - above, kept = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (to.x[j] < kth || (to.x[j] == kth && ties-- <= 0)) continue;
    to.x[kept] = to.x[j];
    to.id[kept++] = to.id[j];
  }
  to.n = kept;
  pad(to.x, kept, -INFINITY);
  return to;
}

inline vf weight_of(vf x, float top, float temperature) { return round_weight(exp((x - top) / temperature) * 0x1p40f); }
inline vf weight_of(vf x, float top) { return round_weight(exp(x - top) * 0x1p40f); }

// Writes the weights of all tokens, and their logits too if keep_logits.
template <class T>
void compute_weights(const T* logits, const Tokens& t, float top, float temperature, bool keep_logits) {
  for (int64_t j = 0; j < t.n; j += W) {
    const vf x = j + W <= t.n ? load(logits + j) : load_part(logits + j, t.n - j, -INFINITY);
    // A division by 1 changes nothing and costs as much as all the rest.
    store(t.w + j, temperature == 1.0f ? weight_of(x, top) : weight_of(x, top, temperature));
    if (keep_logits) store(t.x + j, x);
  }
}

struct Threshold {
  float x;       // tokens with a larger logit stay
  int64_t ties;  // so many of the tokens with this logit stay, the lower ids
};

// Returns the logit of the last token in descending order that has less than `limit` of mass before it. space: 4 arrays
// of round_up(n, W) + W floats.
Threshold find_top_p(const Tokens& t, double limit, float* space) {
  const int64_t size = round_up(t.n, W) + W;
  const float *x = t.x, *w = t.w;
  float* free_x[2] = {space, space + size};
  float* free_w[2] = {space + 2 * size, space + 3 * size};
  int64_t n = t.n, above = 0;
  for (int side = 0;; side ^= 1) {
    const float pivot = median(x[0], x[n / 2], x[n - 1]);
    // Copy the tokens above the pivot to the front of a buffer. If their mass is too small, a second pass copies those
    // below.
    float *to_x = free_x[side], *to_w = free_w[side];
    int64_t more = 0, equal = 0;
    float tie = 0;
    for (int64_t j = 0; j < n; j += W) {
      const vf value = load(x + j), weight = load(w + j);
      const uint32_t over = bits_of(value > splat(pivot)), same = bits_of(value == splat(pivot));
      compress(to_w + more, weight, over);
      more += compress(to_x + more, value, over);
      if (same) {
        equal += __builtin_popcount(same);
        tie = weight[__builtin_ctz(same)];
      }
    }
    pad(to_x, more, -INFINITY);
    pad(to_w, more, 0);
    const int64_t front = above + mass(to_w, round_up(more, W));
    if ((double)front >= limit) {
      x = to_x, w = to_w, n = more;
      continue;
    }
    const int64_t each = (int64_t)tie;
    int64_t less = 0;
    if ((double)(front + equal * each) < limit) {
      for (int64_t j = 0; j < n; j += W) {
        const vf value = load(x + j), weight = load(w + j);
        const uint32_t inside = (uint32_t)((uint64_t{1} << smaller<int64_t>(W, n - j)) - 1);
        const uint32_t under = bits_of(value < splat(pivot)) & inside;
        compress(to_w + less, weight, under);
        less += compress(to_x + less, value, under);
      }
    }
    if (less == 0) {
      int64_t ties = 0;
      while (ties < equal && (double)(front + ties * each) < limit) ++ties;
      return {pivot, ties};
    }
    pad(to_x, less, -INFINITY);
    pad(to_w, less, 0);
    x = to_x, w = to_w, n = less, above = front + equal * each;
  }
}

void keep_top_p(const Tokens& t, double limit, float* space) {
  Threshold cut = find_top_p(t, limit, space);
  for (int64_t j = 0; j < t.n; j += W) {
    const vf x = load(t.x + j);
    vf w = x > splat(cut.x) ? load(t.w + j) : vf{};
    for (uint32_t equal = bits_of(x == splat(cut.x)); equal && cut.ties > 0; equal &= equal - 1, --cut.ties) {
      const int i = __builtin_ctz(equal);
      w[i] = t.w[j + i];
    }
    store(t.w + j, w);
  }
}

void keep_min_p(const Tokens& t, float min_p) {
  const double limit = (double)min_p * 0x1p40;
  for (int64_t j = 0; j < t.n; ++j)
    if ((double)t.w[j] < limit) t.w[j] = 0;
}

float draw_uniform(int64_t seed, int64_t position) {
  const vu low = splat((uint32_t)position), high = splat((uint32_t)((uint64_t)position >> 32));
  return uniform(philox(low, high, vu{}, vu{}, (uint64_t)seed).word[0])[0];
}

// Returns the first token, in the order of ids, at which the running mass exceeds u times the whole. space: round_up(n,
// W) floats.
int64_t draw(const Tokens& t, float u, float* space) {
  constexpr int64_t TOKENS_PER_PART = 512;
  int64_t* parts = (int64_t*)space;
  const int64_t padded = round_up(t.n, W);
  int64_t total = 0;
  for (int64_t j = 0; j < padded; j += TOKENS_PER_PART)
    total += parts[j / TOKENS_PER_PART] = mass(t.w + j, smaller(TOKENS_PER_PART, padded - j));
  const int64_t target = (int64_t)((double)u * (double)total);
  int64_t before = 0, j = 0;
  for (; j < padded && before + parts[j / TOKENS_PER_PART] <= target; j += TOKENS_PER_PART)
    before += parts[j / TOKENS_PER_PART];
  for (;; ++j) {
    before += (int64_t)t.w[j];
    if (before > target) return t.id ? t.id[j] : j;
  }
}

// Returns the first index of the largest logit.
template <class T>
int64_t argmax(const T* logits, int64_t V, float top) {
  for (int64_t j = 0;; j += W)
    if (const uint32_t same = bits_of(load_n(logits + j, smaller<int64_t>(W, V - j)) == splat(top)))
      return j + __builtin_ctz(same);
}

template <class T>
void sample_row(const SamplingArgs& args, int64_t row, Scratch& scratch) {
  const int64_t V = args.V, size = round_up(V, W) + W;
  float* base = scratch.take(0);
  Tokens tokens{base, base + size, nullptr, V};
  const Tokens survivors{base + 2 * size, base + size, (int32_t*)(base + 3 * size), 0};
  float* space = base + 4 * size;

  const T* logits = (const T*)args.logits + row * args.row_stride;
  const Maxima maxima(logits, V);
  const float top = maxima.top, temperature = args.temperature[row];
  args.ids[row] = -1;
  if (maxima.invalid) return;
  if (temperature == 0) {
    args.ids[row] = argmax(logits, V, top);
    return;
  }
  if (args.top_k[row] < V) {
    const int64_t k = args.top_k[row];
    tokens = keep_top_k(logits, V, k, maxima.lower_bound(k), survivors, space);
    compute_weights(tokens.x, tokens, top, temperature, false);
  } else {
    compute_weights(logits, tokens, top, temperature, args.top_p[row] < 1);
  }
  if (args.top_p[row] < 1)
    keep_top_p(tokens, (double)args.top_p[row] * (double)mass(tokens.w, round_up(tokens.n, W)), space);
  if (args.min_p[row] > 0) keep_min_p(tokens, args.min_p[row]);
  args.ids[row] = draw(tokens, draw_uniform(args.seed[row], args.position[row]), space);
}

template <class T>
void sample_rows(const SamplingArgs& args, int64_t begin, int64_t end) {
  Scratch scratch(8 * (round_up(args.V, W) + W) + 64);
  for (int64_t row = begin; row < end; ++row) sample_row<T>(args, row, scratch);
}

void sample(const SamplingArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto type) { sample_rows<decltype(type)>(args, begin, end); });
}

}  // namespace

extern const SamplingLoops sampling = {sample};

}  // namespace gptfast::GPTFAST_LEVEL
