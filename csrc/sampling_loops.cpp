// Sampling without a sort; kernels/reference/sampling.py is the definition.
//
// top_k: the k-th largest of many strided maxima is a lower bound of the k-th largest logit. The few logits above the
// bound are copied out, and the exact k-th is selected among them.
// top_p: a quickselect that follows the mass instead of the rank, among the few logits that are near enough to the
// largest.
// Where no token is cut, no weight is stored: those around the token that is drawn are computed twice.
// Weights are whole numbers up to 2^40 in fp32. 4096 of them add up exactly in double, and these sums add up in int64,
// so no order of summation can change a token.
#include "philox.h"
#include "sampling_tokens.h"
#include "scratch.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t GROUPS = 16;
constexpr int64_t PREFETCH_LOGITS = 2048;  // from what is read now to what is prefetched

// Whether vectors had a NaN.
class NanSeen {
 public:
#if defined(__AVX512F__)
  void add(vf a, vf b) { seen_ |= _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q); }
  bool any() const { return seen_ != 0; }

 private:
  __mmask16 seen_ = 0;
#else
  void add(vf a, vf b) { seen_ |= (a != a) | (b != b); }
  bool any() const { return bits_of(seen_) != 0; }

 private:
  vi seen_ = {};
#endif
};

// The maxima of a row of logits, found in one pass.
struct Maxima {
  vf best[GROUPS];  // of GROUPS * W strided parts
  float top;        // of all
  bool invalid;     // whether the row has NaN, +inf or nothing but -inf

  template <class T>
  Maxima(const T* logits, int64_t V) {
    NanSeen nan;
    vf sofar[GROUPS];  // in registers, as members would not be
    for (auto& lanes : sofar) lanes = splat(-INFINITY);
    int64_t j = 0;
    for (; j + GROUPS * W <= V; j += GROUPS * W)
#pragma GCC unroll 8
      for (int64_t g = 0; g < GROUPS; g += 2) {
        const T* at = logits + j + g * W;
        // Logits that a product has just written lie in the caches of all cores that computed it.
        __builtin_prefetch(at + PREFETCH_LOGITS);
        __builtin_prefetch(at + W + PREFETCH_LOGITS);
        const vf x = load(at), y = load(at + W);
        sofar[g] = max(x, sofar[g]);
        sofar[g + 1] = max(y, sofar[g + 1]);
        nan.add(x, y);
      }
    memcpy(best, sofar, sizeof best);
    for (int64_t g = 0; j < V; j += W, ++g) {
      const vf x = j + W <= V ? load(logits + j) : load_part(logits + j, V - j, -INFINITY);
      best[g] = max(x, best[g]);
      nan.add(x, x);
    }
    vf all = best[0];
    for (const vf& lanes : best) all = max(lanes, all);
    top = max(all);
    invalid = top == INFINITY || top == -INFINITY || nan.any();
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
  const auto keep = [&](int64_t j, vf x, uint32_t inside) {
    const uint32_t bits = (bits_above(x, splat(bound)) | bits_equal(x, splat(bound))) & inside;
    if (!bits) return;
    compress((float*)to.id + n, (vf)id_lanes(j), bits);
    n += compress(to.x + n, x, bits);
  };
  int64_t j = 0;
  for (; j + W <= V; j += W) keep(j, load(logits + j), ~0u);
  if (j < V) keep(j, load_part(logits + j, V - j), (1u << (V - j)) - 1);
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

// Writes all tokens to `to`, which has room for them, and returns their mass.
template <class T>
int64_t keep_all(const T* logits, float top, float temperature, const Tokens& to) {
  return weigh(logits, 0, to.n, top, temperature, [&](int64_t j, vf x, vf w) {
    store(to.x + j, x);
    store(to.w + j, w);
  });
}

// Writes the tokens whose logit is above the bound to `to`, which has room for all, and returns the mass of all tokens.
template <class T>
int64_t keep_above(const T* logits, int64_t V, float top, float temperature, float bound, Tokens& to) {
  int64_t n = 0;
  const int64_t total = weigh(logits, 0, V, top, temperature, [&](int64_t j, vf x, vf w) {
    const uint32_t bits = bits_above(x, splat(bound));
    if (!bits) return;
    compress((float*)to.id + n, (vf)id_lanes(j), bits);
    compress(to.w + n, w, bits);
    n += compress(to.x + n, x, bits);
  });
  pad(to.x, n, -INFINITY);
  pad(to.w, n, 0);
  to.n = n;
  return total;
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
      const uint32_t over = bits_above(value, splat(pivot)), same = bits_equal(value, splat(pivot));
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
        const uint32_t under = bits_above(splat(pivot), value) & inside;
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

// Sets the weights to 0 of tokens that have `limit` of mass before them. space: as for find_top_p.
void cut_top_p(const Tokens& t, double limit, float* space) {
  Threshold cut = find_top_p(t, limit, space);
  for (int64_t j = 0; j < t.n; j += W) {
    const vf x = load(t.x + j);
    vf w = x > splat(cut.x) ? load(t.w + j) : vf{};
    for (uint32_t equal = bits_equal(x, splat(cut.x)); equal && cut.ties > 0; equal &= equal - 1, --cut.ties) {
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

constexpr int64_t TOKENS_PER_PART = 512;

// Returns the index of the first of n tokens at which the running mass exceeds u times the whole. mass_of(begin, end)
// and weights_of(begin, end) return the mass and the weights of some tokens. parts: room for the masses of the parts.
template <class Mass, class Weights>
int64_t draw(int64_t n, float u, int64_t* parts, Mass mass_of, Weights weights_of) {
  const auto end_of = [&](int64_t begin) { return smaller(n, begin + TOKENS_PER_PART); };
  int64_t total = 0;
  for (int64_t j = 0; j < n; j += TOKENS_PER_PART) total += parts[j / TOKENS_PER_PART] = mass_of(j, end_of(j));
  const int64_t target = (int64_t)((double)u * (double)total);
  int64_t before = 0, j = 0;
  for (; before + parts[j / TOKENS_PER_PART] <= target; j += TOKENS_PER_PART) before += parts[j / TOKENS_PER_PART];
  const float* w = weights_of(j, end_of(j));
  for (int64_t i = 0;; ++i) {
    before += (int64_t)w[i];
    if (before > target) return j + i;
  }
}

// Draws among tokens whose weights are stored. space: round_up(n, W) floats.
int64_t draw_among(const Tokens& t, float u, float* space) {
  const int64_t drawn = draw(
      t.n, u, (int64_t*)space, [&](int64_t begin, int64_t end) { return mass(t.w + begin, round_up(end - begin, W)); },
      [&](int64_t begin, int64_t) { return t.w + begin; });
  return t.id ? t.id[drawn] : drawn;
}

// Draws among all tokens. space: round_up(V, W) floats.
template <class T>
int64_t draw_among_all(const T* logits, int64_t V, float top, float temperature, float u, float* space) {
  float weights[TOKENS_PER_PART];
  return draw(
      V, u, (int64_t*)space,
      [&](int64_t begin, int64_t end) { return weigh(logits, begin, end, top, temperature, [](int64_t, vf, vf) {}); },
      [&](int64_t begin, int64_t end) {
        weigh(logits, begin, end, top, temperature, [&](int64_t j, vf, vf w) { store(weights + j - begin, w); });
        return (const float*)weights;
      });
}

// Returns the first index of the largest logit.
template <class T>
int64_t argmax(const T* logits, int64_t V, float top) {
  for (int64_t j = 0;; j += W)
    if (const uint32_t same = bits_equal(load_n(logits + j, smaller<int64_t>(W, V - j)), splat(top)))
      return j + __builtin_ctz(same);
}

// Keeps the smallest set of the likeliest tokens whose mass is at least top_p of all. all, few: room for all tokens.
template <class T>
Tokens keep_top_p(const T* logits, float top, float temperature, float top_p, const Tokens& all, Tokens few,
                  float* space) {
  // If no token below the bound is kept, as is usual, the others are few. Were all tokens at the bound, they would
  // weigh 1 - top_p of the likeliest alone; NATS_ABOVE cuts more than that.
  constexpr float NATS_ABOVE = 3;
  const float nats = logf((float)all.n / (1 - top_p)) - NATS_ABOVE;
  const int64_t total = keep_above(logits, all.n, top, temperature, top - nats * temperature, few);
  const double limit = (double)top_p * (double)total;
  const bool enough = (double)mass(few.w, round_up(few.n, W)) >= limit;
  if (!enough) keep_all(logits, top, temperature, all);
  const Tokens& tokens = enough ? few : all;
  cut_top_p(tokens, limit, space);
  return tokens;
}

template <class T>
void sample_row(const SamplingArgs& args, int64_t row, Scratch& scratch) {
  const int64_t V = args.V, size = round_up(V, W) + W;
  float* base = scratch.take(0);
  const Tokens all{base, base + size, nullptr, V};
  const Tokens few{base + 2 * size, base + 3 * size, (int32_t*)(base + 4 * size), 0};
  float* space = base + 5 * size;

  const T* logits = (const T*)args.logits + row * args.row_stride;
  const Maxima maxima(logits, V);
  const float top = maxima.top, temperature = args.temperature[row], top_p = args.top_p[row];
  args.ids[row] = -1;
  if (maxima.invalid) return;
  if (temperature == 0) {
    args.ids[row] = argmax(logits, V, top);
    return;
  }
  const float u = draw_uniform(args.seed[row], args.position[row]);
  Tokens tokens = all;
  if (args.top_k[row] < V) {
    const int64_t k = args.top_k[row];
    tokens = keep_top_k(logits, V, k, maxima.lower_bound(k), few, space);
    const int64_t total =
        weigh(tokens.x, 0, tokens.n, top, temperature, [&](int64_t j, vf, vf w) { store(tokens.w + j, w); });
    if (top_p < 1) cut_top_p(tokens, (double)top_p * (double)total, space);
  } else if (top_p < 1) {
    tokens = keep_top_p(logits, top, temperature, top_p, all, few, space);
  } else if (args.min_p[row] > 0) {
    keep_all(logits, top, temperature, all);
  } else {
    args.ids[row] = draw_among_all(logits, V, top, temperature, u, space);
    return;
  }
  if (args.min_p[row] > 0) keep_min_p(tokens, args.min_p[row]);
  args.ids[row] = draw_among(tokens, u, space);
}

template <class T>
void sample_rows(const SamplingArgs& args, int64_t begin, int64_t end) {
  Scratch scratch(9 * (round_up(args.V, W) + W) + 64);
  for (int64_t row = begin; row < end; ++row) sample_row<T>(args, row, scratch);
}

void sample(const SamplingArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto type) { sample_rows<decltype(type)>(args, begin, end); });
}

}  // namespace

extern const SamplingLoops sampling = {sample};

}  // namespace gptfast::GPTFAST_LEVEL
