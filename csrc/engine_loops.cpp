// GPT-2's forward over a packed model and a cache of keys and values, run by a team of threads.
//
// A call takes any tokens of any rows: prompts, one token of each row, or several that are tried at once.
// Whatever a token is computed beside, its numbers are the same: see engine_products.h; attention too
// takes a query's keys in one order, sixteen or fewer at a time, and sums values one after the other.
#include <sched.h>

#include "engine_products.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t QUERIES = W == 16 ? 4 : 1;  // that attention takes at a time
constexpr int WIDE = W == 16 ? 4 : 8;         // vectors of a head's values that are summed at a time
constexpr int SPINS = 500;

void meet(EngineBarrier& barrier, int64_t threads) {
  if (threads == 1) return;
  const int32_t phase = __atomic_load_n(&barrier.phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) == threads) {
    __atomic_store_n(&barrier.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&barrier.phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&barrier.phase, __ATOMIC_ACQUIRE) == phase;) {
#ifdef __x86_64__
    _mm_pause();
#endif
    if (++spins > SPINS) sched_yield();  // someone else has the other thread's core
  }
}

// Of n pieces the ones for this thread.
struct Share {
  int64_t begin, end;
  Share(int64_t n, int64_t thread, int64_t threads) : begin(n * thread / threads), end(n * (thread + 1) / threads) {}
};

void layer_norm(const float* x, const EngineNorm& norm, int64_t C, float* y) {
  vf total = {}, squares = {};
  for (int64_t c = 0; c < C; c += W) total += load_n(x + c, smaller<int64_t>(W, C - c));
  const float mean = sum(total) / (float)C;
  for (int64_t c = 0; c < C; c += W) {
    const int64_t n = smaller<int64_t>(W, C - c);
    vf d = load_n(x + c, n) - mean;
    for (int64_t i = n; i < W; ++i) d[i] = 0.0f;
    squares += d * d;
  }
  const float inverse = (float)(1 / sqrt((double)sum(squares) / (double)C + 1e-5));
  for (int64_t c = 0; c < C; c += W) {
    const int64_t n = smaller<int64_t>(W, C - c);
    const vf normal = (load_n(x + c, n) - mean) * inverse;
    store_n(y + c, normal * load_n(norm.weight + c, n) + load_n(norm.bias + c, n), n);
  }
}

template <class Type>
int64_t bytes_of(int64_t K) {
  return round_up(Type::bytes(K), 64);
}

template <class Type, class Cached>
class Forward {
 public:
  Forward(const EngineArgs& args, int64_t thread, int64_t threads)
      : args_(args), thread_(thread), threads_(threads), D_(round_up(args.D, 16)) {}

  void run() {
    const int64_t C = args_.C;
    embed();
    meet();
    for (int64_t i = 0; i < args_.n_layer; ++i) {
      const EngineLayer& layer = args_.layers[i];
      product(layer.c_attn, args_.x, &layer.ln_1, args_.N, args_.qkv, Into::store);
      attend(i);
      meet();
      product(layer.attn_c_proj, args_.mixed, nullptr, args_.N, args_.x, Into::add);
      product(layer.c_fc, args_.x, &layer.ln_2, args_.N, args_.fc, Into::gelu);
      product(layer.mlp_c_proj, args_.fc, nullptr, args_.N, args_.x, Into::add);
    }
    if (args_.n_wanted == 0) return;
    // The wanted rows' place is that of the attention's result, which nobody needs any more.
    const Share rows(args_.n_wanted, thread_, threads_);
    const int64_t ld = round_up(C, PANEL);
    for (int64_t m = rows.begin; m < rows.end; ++m)
      memcpy(args_.mixed + m * ld, args_.x + args_.wanted[m] * ld, sizeof(float) * C);
    meet();
    product(args_.head, args_.mixed, &args_.ln_f, args_.n_wanted, args_.logits, Into::store);
  }

 private:
  void meet() { GPTFAST_LEVEL::meet(*args_.barrier, threads_); }

  void embed() {
    const int64_t C = args_.C, ld = round_up(C, PANEL);
    const Share rows(args_.N, thread_, threads_);
    for (int64_t t = rows.begin; t < rows.end; ++t) {
      const int64_t id = args_.ids[t], lane = id % PANEL;
      const char* panel = args_.wte.panels + id / PANEL * panel_bytes(C);
      const float scale = args_.wte.scale ? args_.wte.scale[id] : 1.0f;
      for (int64_t c = 0; c < C; ++c)
        args_.x[t * ld + c] = Type::weight(panel, lane, c) * scale + args_.wpe[args_.positions[t] * C + c];
    }
  }

  static int64_t panel_bytes(int64_t K) { return round_up(K, Type::UNIT) * PANEL * (int64_t)Type::SIZE; }

  // y = x W^T behind a layer norm or not, for N rows; all threads have it afterwards.
  void product(const EngineMatrix& matrix, const float* x, const EngineNorm* norm, int64_t N, float* y, Into into) {
    const int64_t ld = round_up(matrix.K, PANEL), stride = bytes_of<Type>(matrix.K);
    Product p{&matrix, (const char*)x, ld * 4, N, y, round_up(matrix.N, PANEL), into};
    if (norm || !Type::AS_IS) {
      p.rows = make_inputs(matrix.K, x, ld, norm, N, stride);
      p.stride = stride;
    }
    const Share panels((matrix.N + PANEL - 1) / PANEL, thread_, threads_);
    multiply<Type>(p, panel_bytes(matrix.K), panels.begin, panels.end);
    meet();
  }

  const char* make_inputs(int64_t K, const float* x, int64_t ld, const EngineNorm* norm, int64_t N, int64_t stride) {
    const bool alone = N <= ENGINE_ALONE;
    char* to = args_.inputs + (alone ? thread_ * args_.inputs_bytes : 0);
    const Share rows = alone ? Share(N, 0, 1) : Share(N, thread_, threads_);
    float* normal = args_.scores + thread_ * args_.scores_floats;
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      // Half of it is in another core's cache.
      for (int64_t i = 0; i < K; i += 16) __builtin_prefetch(x + m * ld + i);
      if (norm) layer_norm(x + m * ld, *norm, K, normal);
      Type::convert(norm ? normal : x + m * ld, K, to + m * stride);
    }
    if (!alone) meet();
    return to;
  }

  // ---- Attention: one thread takes a head of a row, writes its new keys and values, and goes through its queries.

  void attend(int64_t layer) {
    const int64_t H = args_.n_head;
    // Keys and values lie where the weights have driven them from the caches: those of the next head are asked for
    // beside those of this one.
    next_head_ = threads_ * args_.n_slots * D_;
    for (int64_t item = thread_; item < args_.n_segments * H; item += threads_) {
      const EngineSegment& segment = args_.segments[item / H];
      const int64_t h = item % H;
      Cached* keys = (Cached*)args_.cache + (2 * layer * H + h) * args_.n_slots * D_;
      Cached* values = keys + H * args_.n_slots * D_;
      remember(segment, h, keys, values);
      D_ == 64 ? head<64>(segment, h, keys, values) : head<0>(segment, h, keys, values);
    }
  }

  template <int D>
  void head(const EngineSegment& segment, int64_t h, const Cached* keys, const Cached* values) {
    int64_t i = 0;
    for (; i + QUERIES <= segment.n; i += QUERIES) queries<QUERIES, D>(segment, i, h, keys, values);
    for (; i < segment.n; ++i) queries<1, D>(segment, i, h, keys, values);
  }

  const float* of_token(int64_t t, int64_t part, int64_t h) const {
    return args_.qkv + t * round_up(3 * args_.C, PANEL) + part * args_.C + h * args_.D;
  }

  void remember(const EngineSegment& segment, int64_t h, Cached* keys, Cached* values) {
    for (int64_t i = 0; i < segment.n; ++i) {
      const int64_t at = segment.slots[segment.start + i] * D_;
      for (int64_t d = 0; d < D_; d += W) {
        store(keys + at + d, head_part(of_token(segment.first + i, 1, h), d));
        store(values + at + d, head_part(of_token(segment.first + i, 2, h), d));
      }
    }
  }
  vf head_part(const float* x, int64_t d) const {  // 0 past the head's end
    const int64_t n = args_.D - d;
    return n >= W ? load(x + d) : n > 0 ? load_part(x + d, n) : vf{};
  }

  // Lane j becomes the sum of x[j]'s lanes.
  static vf sums(vf* x) {
#pragma GCC unroll 4
    for (int n = W / 2; n; n /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) x[i] = interleave<1, false>(x[i], x[i + n]) + interleave<1, true>(x[i], x[i + n]);
    return x[0];
  }

  template <int Q, int D>
  void queries(const EngineSegment& segment, int64_t first, int64_t h, const Cached* keys, const Cached* values) {
    const int64_t seen = segment.start + first + Q, padded = round_up(seen, W);
    const int32_t* slots = segment.slots;
    float* scores = args_.scores + thread_ * args_.scores_floats;  // (Q, padded)
    float* q = scores + Q * padded;                                // (Q, D_)
    float* out = q + Q * D_;                                       // (Q, D_)
    const float scale = (float)(1.4426950408889634 / sqrt((double)args_.D));
    for (int i = 0; i < Q; ++i)
      for (int64_t d = 0; d < D_; d += W)
        store(q + i * D_ + d, head_part(of_token(segment.first + first + i, 0, h), d) * scale);
    vf most[Q], total[Q] = {};
    for (vf& lanes : most) lanes = splat(-INFINITY);
    for (int64_t t = 0; t < padded; t += W) {
      vf products[Q][W];
      for (int j = 0; j < W; ++j) {
        vf one[Q] = {};
        dot<Q, D>(one, q, keys + slots[smaller(t + j, seen - 1)] * D_);
        for (int i = 0; i < Q; ++i) products[i][j] = one[i];
      }
      for (int i = 0; i < Q; ++i) {
        const vi after = (vi)iota() + (int32_t)(t - (seen - Q + i));
        const vf score = after > 0 ? splat(-INFINITY) : sums(products[i]);
        most[i] = max(most[i], score);
        store(scores + i * padded + t, score);
      }
    }
    for (int i = 0; i < Q; ++i) {
      const float top = max(most[i]);
      for (int64_t t = 0; t < padded; t += W) {
        const vf p = exp2(load(scores + i * padded + t) - top);
        total[i] += p;
        store(scores + i * padded + t, p);
      }
    }
    int64_t d = 0;
    for (; d + WIDE * W <= D_; d += WIDE * W) mix<Q, WIDE>(scores, padded, values + d, slots, seen, out + d);
    for (; d < D_; d += W) mix<Q, 1>(scores, padded, values + d, slots, seen, out + d);
    for (int i = 0; i < Q; ++i) {
      const float whole = sum(total[i]);
      float* to = args_.mixed + (segment.first + first + i) * round_up(args_.C, PANEL) + h * args_.D;
      for (int64_t e = 0; e < args_.D; e += W)
        store_n(to + e, load(out + i * D_ + e) / whole, smaller<int64_t>(W, args_.D - e));
    }
  }

  // one[i] += key q[i], lane by lane; D is 64 or, of any other size, 0.
  template <int Q, int D>
  void dot(vf (&one)[Q], const float* q, const Cached* key) const {
    const int64_t size = D ? D : D_;
#pragma GCC unroll 16
    for (int64_t d = 0; d < size; d += W) {
      const vf k = load(key + d);
      if (d * sizeof(Cached) % 64 == 0) __builtin_prefetch(key + d + next_head_);
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) one[i] += k * load(q + i * size + d);
    }
  }

  // out = the sum of p[t] values[t] over the keys that a query sees, V vectors of it. The last Q - 1 of `seen` some do
  // not see: there p is 0, but the value may be no number.
  template <int Q, int V>
  void mix(const float* p, int64_t padded, const Cached* values, const int32_t* slots, int64_t seen, float* out) const {
    vf sum[Q][V] = {};
    for (int64_t t = 0; t < seen; ++t) {
      const Cached* value = values + slots[t] * D_;
      vf v[V];
#pragma GCC unroll 8
      for (int n = 0; n < V; ++n) {
        v[n] = load(value + n * W);
        if (n * W * sizeof(Cached) % 64 == 0) __builtin_prefetch(value + n * W + next_head_);
      }
      const int64_t first = t - (seen - Q);
      if (first <= 0) {
#pragma GCC unroll 4
        for (int i = 0; i < Q; ++i) add_value<V>(sum[i], p[i * padded + t], v);
      } else {
        for (int64_t i = first; i < Q; ++i) add_value<V>(sum[i], p[i * padded + t], v);
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int n = 0; n < V; ++n) store(out + i * D_ + n * W, sum[i][n]);
  }
  template <int V>
  static void add_value(vf (&sum)[V], float p, const vf (&v)[V]) {
#pragma GCC unroll 8
    for (int n = 0; n < V; ++n) sum[n] += p * v[n];
  }

  const EngineArgs& args_;
  const int64_t thread_, threads_, D_;
  int64_t next_head_ = 0;
};

int64_t input_bytes(WeightType type, int64_t K) {
  switch (type) {
    case WeightType::fp32:
      return bytes_of<Fp32>(K);
    case WeightType::bf16:
      return bytes_of<Bf16>(K);
    default:
      return bytes_of<Int8>(K);
  }
}

void forward(const EngineArgs& args, int64_t thread, int64_t threads) {
  switch (args.type) {
    case WeightType::fp32:
      return Forward<Fp32, float>(args, thread, threads).run();
    case WeightType::bf16:
      return Forward<Bf16, bf16>(args, thread, threads).run();
    default:
      return Forward<Int8, fp16>(args, thread, threads).run();
  }
}

}  // namespace

const EngineLoops engine = {input_bytes, QUERIES, forward};

}  // namespace gptfast::GPTFAST_LEVEL
