// Sampling without a sort; kernels/reference/sampling.py is the definition.
//
// top_k: the k-th largest of many strided maxima bounds the k-th logit from below; the few logits
// above the bound are compressed out and the exact k-th is selected among them.
// top_p: a quickselect that follows the mass instead of the rank.
// Weights are whole numbers up to 2^40 held in fp32; 4096 of them add up exactly in double, and
// blocks add up in int64, so no order of summation can change a token.
#include "philox.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t EXACT = 4096;

// Stores the lanes of x that mask (0 or -1 each) selects, in order; may write W floats. Returns their count.
inline int64_t compress(float* to, vf x, vi mask) {
#if defined(__AVX512F__)
  const __mmask16 bits = _mm512_movepi32_mask((__m512i)mask);
  store(to, (vf)_mm512_maskz_compress_ps(bits, (__m512)x));
  return __builtin_popcount(bits);
#else
  int64_t n = 0;
  for (int i = 0; i < W; ++i) {
    to[n] = x[i];
    n -= mask[i];
  }
  return n;
#endif
}

inline vf round_weight(vf x) {  // to nearest even; from 2^23 on, fp32 is whole anyway
  const vf whole = (x + 8388608.0f) - 8388608.0f;
  return x < splat(8388608.0f) ? whole : x;
}

int64_t mass(const float* w, int64_t n) {  // n a multiple of W
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += EXACT) {
    vd part = {};
    for (int64_t j = begin; j < smaller(n, begin + EXACT); j += W) part += __builtin_convertvector(load(w + j), vd);
    double block = 0;
    for (int i = 0; i < W; ++i) block += part[i];
    total += (int64_t)block;
  }
  return total;
}

inline float median(float a, float b, float c) { return larger(smaller(a, b), smaller(larger(a, b), c)); }

// The k-th largest (k >= 1) of x, which is overwritten.
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

// Logits of the tokens still in play, in id order, padded with -inf to a multiple of W.
struct Tokens {
  float *x, *w;
  int32_t* id;  // null: the token's index
  int64_t n;
};

inline vi id_lanes(int64_t first) {
  vi id;
  for (int i = 0; i < W; ++i) id[i] = (int32_t)first + i;
  return id;
}

void pad(float* x, int64_t n) {
  for (int64_t j = n; j < round_up(n, W); ++j) x[j] = -INFINITY;
}

float top_k_bound(const float* x, int64_t V, int64_t k) {
  constexpr int64_t GROUPS = 16;
  if (k > GROUPS * W / 2 || V < 2 * GROUPS * W) return -INFINITY;
  vf best[GROUPS];
  for (auto& lane : best) lane = splat(-INFINITY);
  int64_t j = 0;
  for (; j + GROUPS * W <= V; j += GROUPS * W)
    for (int64_t g = 0; g < GROUPS; ++g) best[g] = max(load(x + j + g * W), best[g]);
  float lanes[GROUPS * W];
  memcpy(lanes, best, sizeof lanes);
  return kth_largest(lanes, GROUPS * W, k);
}

// Exactly k tokens, ties at the k-th logit by the lower id. `to` has room for every token.
Tokens keep_top_k(const Tokens& from, int64_t k, Tokens to, float* space) {
  const float bound = top_k_bound(from.x, from.n, k);
  int64_t n = 0;
  for (int64_t j = 0; j < from.n; j += W) {
    const vf x = load(from.x + j);
    vi mask = x >= splat(bound);
    if (j + W > from.n)
      for (int64_t i = from.n - j; i < W; ++i) mask[i] = 0;
    compress((float*)to.id + n, (vf)id_lanes(j), mask);
    n += compress(to.x + n, x, mask);
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
  pad(to.x, kept);
  return to;
}

void weigh(const Tokens& t, float top, float temperature) {
  for (int64_t j = 0; j < t.n; j += W) store(t.w + j, round_weight(exp((load(t.x + j) - top) / temperature) * 0x1p40f));
}

struct Threshold {
  float x;       // tokens above it stay
  int64_t ties;  // and so many of those equal to it
};

// The last rank with less than `limit` of mass before it. space: 4 arrays of round_up(n, W) + W.
Threshold find_top_p(const Tokens& t, double limit, float* space) {
  const int64_t size = round_up(t.n, W) + W;
  const float *x = t.x, *w = t.w;
  float* free_x[2] = {space, space + size};
  float* free_w[2] = {space + 2 * size, space + 3 * size};
  int64_t n = t.n, above = 0;
  for (int side = 0;; side ^= 1) {
    const float pivot = median(x[0], x[n / 2], x[n - 1]);
    // Tokens above the pivot go to the front of a buffer; if they weigh too little, a second pass takes those below.
    float *to_x = free_x[side], *to_w = free_w[side];
    int64_t more = 0, equal = 0;
    float tie = 0;
    for (int64_t j = 0; j < n; j += W) {
      const vf value = load(x + j), weight = load(w + j);
      compress(to_w + more, weight, value > splat(pivot));
      more += compress(to_x + more, value, value > splat(pivot));
      const vi same = value == splat(pivot);
      for (int i = 0; i < W; ++i)
        if (same[i]) ++equal, tie = weight[i];
    }
    pad(to_x, more);
    for (int64_t j = more; j < round_up(more, W); ++j) to_w[j] = 0;
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
        vi mask = value < splat(pivot);
        if (j + W > n)
          for (int64_t i = n - j; i < W; ++i) mask[i] = 0;
        compress(to_w + less, weight, mask);
        less += compress(to_x + less, value, mask);
      }
    }
    if (less == 0) {
      int64_t ties = 0;
      while (ties < equal && (double)(front + ties * each) < limit) ++ties;
      return {pivot, ties};
    }
    pad(to_x, less);
    for (int64_t j = less; j < round_up(less, W); ++j) to_w[j] = 0;
    x = to_x, w = to_w, n = less, above = front + equal * each;
  }
}

void keep_top_p(const Tokens& t, double limit, float* space) {
  Threshold cut = find_top_p(t, limit, space);
  for (int64_t j = 0; j < t.n; j += W) {
    const vf x = load(t.x + j);
    const vi equal = x == splat(cut.x);
    vf w = x > splat(cut.x) ? load(t.w + j) : vf{};
    for (int i = 0; i < W; ++i)
      if (equal[i] && cut.ties-- > 0) w[i] = t.w[j + i];
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

// The first token, in id order, whose running mass exceeds u times the whole.
int64_t draw(const Tokens& t, float u) {
  constexpr int64_t STRIDE = 512;
  const int64_t padded = round_up(t.n, W), target = (int64_t)((double)u * (double)mass(t.w, padded));
  int64_t before = 0, j = 0;
  for (; j < padded; j += STRIDE) {
    const int64_t next = before + mass(t.w + j, smaller(STRIDE, padded - j));
    if (next > target) break;
    before = next;
  }
  for (;; ++j) {
    before += (int64_t)t.w[j];
    if (before > target) return t.id ? t.id[j] : j;
  }
}

template <class T>
void sample_row(const SamplingArgs& args, int64_t row, Scratch& scratch) {
  const int64_t V = args.V, size = round_up(V, W) + W;
  float* base = scratch.take(0);
  Tokens tokens{base, base + size, nullptr, V};
  const Tokens survivors{base + 2 * size, base + size, (int32_t*)(base + 3 * size), 0};
  float* space = base + 4 * size;

  const T* logits = (const T*)args.logits + row * args.row_stride;
  vf best = splat(-INFINITY);
  vi nan = {};
  pad(tokens.x, V);
  for (int64_t j = 0; j < V; j += W) {
    const vf x = j + W <= V ? load(logits + j) : load_part(logits + j, V - j, -INFINITY);
    store(tokens.x + j, x);
    best = max(x, best);
    nan |= x != x;
  }
  const float top = max(best);
  bool bad = top == INFINITY || top == -INFINITY;
  for (int i = 0; i < W; ++i) bad |= nan[i] != 0;
  args.ids[row] = -1;
  if (bad) return;
  if (args.temperature[row] == 0) {
    int64_t j = 0;
    while (tokens.x[j] != top) ++j;
    args.ids[row] = j;
    return;
  }
  if (args.top_k[row] < V) tokens = keep_top_k(tokens, args.top_k[row], survivors, space);
  weigh(tokens, top, args.temperature[row]);
  if (args.top_p[row] < 1)
    keep_top_p(tokens, (double)args.top_p[row] * (double)mass(tokens.w, round_up(tokens.n, W)), space);
  if (args.min_p[row] > 0) keep_min_p(tokens, args.min_p[row]);
  args.ids[row] = draw(tokens, draw_uniform(args.seed[row], args.position[row]));
}

template <class T>
void sample_rows(const SamplingArgs& args, int64_t begin, int64_t end) {
  Scratch scratch(8 * (round_up(args.V, W) + W) + 64);
  for (int64_t row = begin; row < end; ++row) sample_row<T>(args, row, scratch);
}

void sample(const SamplingArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::fp32:
      return sample_rows<float>(args, begin, end);
    case Dtype::bf16:
      return sample_rows<bf16>(args, begin, end);
    case Dtype::fp16:
      return sample_rows<fp16>(args, begin, end);
  }
}

}  // namespace

const SamplingLoops sampling = {sample};

}  // namespace gptfast::GPTFAST_LEVEL
