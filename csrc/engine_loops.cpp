// GPT-2's forward over a packed model and a cache of keys and values, run by a team of threads.
//
// A call takes any tokens of any rows: prompts, one token of each row, or several guesses that are checked at once. A
// token gets the same numbers whatever other tokens are in the call: see engine_products.h. Attention keeps to this
// too: it goes through the keys of a query in one order, 16 of them at a time, and adds values one after the other.
//
// With weights in bf16, int8 and int4, those numbers are the same at every instruction-set level too. So the compiler
// must not fuse a product and a sum where the CPU can: another CPU could not.
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <sched.h>

#include "engine_int4.h"
#include "engine_products.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t QUERIES_PER_PASS = W == 16 ? 4 : 1;  // that attention computes side by side
constexpr int VALUE_VECTORS = W == 16 ? 4 : 8;         // of a head that attention adds up side by side
constexpr int SPINS_BEFORE_YIELD = 500;
constexpr double LAYER_NORM_EPS = 1e-5;

// Returns when all threads have called it.
void wait(EngineBarrier& barrier, int64_t threads) {
  if (threads == 1) return;
  const int32_t phase = __atomic_load_n(&barrier.phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) == threads) {
    __atomic_store_n(&barrier.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&barrier.phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&barrier.phase, __ATOMIC_ACQUIRE) == phase;) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
    if (++spins > SPINS_BEFORE_YIELD) sched_yield();  // another process may have the core that a thread needs
  }
}

// One thread's part of n items.
struct Share {
  int64_t begin, end;
  Share(int64_t n, int64_t thread, int64_t threads) : begin(n * thread / threads), end(n * (thread + 1) / threads) {}
};

// Returns the bytes of one row of K inputs.
template <class Way>
int64_t row_bytes(int64_t K) {
  return round_up(Way::bytes(K), 64);
}

template <class Type, class Cached>
class Forward {
 public:
  Forward(const EngineArgs& args, int64_t thread, int64_t threads)
      : args_(args), thread_(thread), threads_(threads), D_(round_up(args.D, CACHE_UNIT)) {}

  void run() {
    const int64_t C = args_.C;
    embed();
    wait();
    for (int64_t i = 0; i < args_.n_layer; ++i) {
      const EngineLayer& layer = args_.layers[i];
      product(layer.c_attn, args_.x, &layer.ln_1, args_.N, args_.qkv, Epilogue::store);
      attend(i);
      wait();
      product(layer.attn_c_proj, args_.attended, nullptr, args_.N, args_.x, Epilogue::add_to_y);
      product(layer.c_fc, args_.x, &layer.ln_2, args_.N, args_.fc, Epilogue::gelu);
      product(layer.mlp_c_proj, args_.fc, nullptr, args_.N, args_.x, Epilogue::add_to_y);
    }
    if (args_.n_wanted == 0) return;
    // The wanted rows go where attention wrote its result, which is not needed any more.
    const Share rows(args_.n_wanted, thread_, threads_);
    const int64_t x_row_stride = round_up(C, PANEL);
    for (int64_t m = rows.begin; m < rows.end; ++m)
      memcpy(args_.attended + m * x_row_stride, args_.x + args_.wanted[m] * x_row_stride, sizeof(float) * C);
    wait();
    product(args_.head, args_.attended, &args_.ln_f, args_.n_wanted, args_.logits, Epilogue::store);
  }

 private:
  void wait() { GPTFAST_LEVEL::wait(*args_.barrier, threads_); }

  void embed() {
    const int64_t C = args_.C, x_row_stride = round_up(C, PANEL);
    const Share rows(args_.N, thread_, threads_);
    for (int64_t t = rows.begin; t < rows.end; ++t) {
      const int64_t id = args_.ids[t], lane = id % PANEL;
      const char* panel = args_.wte.panels + id / PANEL * panel_bytes(C);
      const float scale = args_.wte.scale ? args_.wte.scale[id] : 1.0f;
      for (int64_t c = 0; c < C; ++c)
        args_.x[t * x_row_stride + c] = Type::weight(panel, lane, c) * scale + args_.wpe[args_.positions[t] * C + c];
    }
  }

  static int64_t panel_bytes(int64_t K) { return Type::panel_bytes(K); }

  static bool is_private(int64_t N) { return N <= MAX_PRIVATE_ROWS; }

  // Computes y = x W^T for N rows, after a layer norm of x if there is one. All threads can read y afterwards.
  void product(const EngineMatrix& matrix, const float* x, const EngineNorm* norm, int64_t N, float* y,
               Epilogue epilogue) {
    // Few rows wait for the weights, not for their products.
    if constexpr (requires { typename Type::Tiles; })
      if (!is_private(N)) return product_by<typename Type::Tiles>(matrix, x, norm, N, y, epilogue);
    product_by<typename Type::Vectors>(matrix, x, norm, N, y, epilogue);
  }
  template <class Way>
  void product_by(const EngineMatrix& matrix, const float* x, const EngineNorm* norm, int64_t N, float* y,
                  Epilogue epilogue) {
    const int64_t x_row_stride = round_up(matrix.K, PANEL);
    Product p{&matrix, (const char*)x, x_row_stride * 4, N, y, round_up(matrix.N, PANEL), epilogue};
    if (norm || !Way::TAKES_FLOATS) {
      p.row_bytes = row_bytes<Way>(matrix.K);
      p.rows = convert_inputs<Way>(matrix.K, x, x_row_stride, norm, N, p.row_bytes);
    }
    const Share panels((matrix.N + PANEL - 1) / PANEL, thread_, threads_);
    {
      [[maybe_unused]] const typename Way::Scope scope;
      multiply_panels<Way>(p, panel_bytes(matrix.K), panels.begin, panels.end);
    }
    wait();
  }

  // Converts N rows of x to the inputs of a product, after a layer norm if there is one.
  template <class Way>
  const char* convert_inputs(int64_t K, const float* x, int64_t x_row_stride, const EngineNorm* norm, int64_t N,
                             int64_t row_bytes) {
    const bool private_rows = is_private(N);
    char* to = args_.inputs + (private_rows ? thread_ * args_.private_inputs_bytes : 0);
    const Share rows = private_rows ? Share(N, 0, 1) : Share(N, thread_, threads_);
    float* normal = scratch();
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      const float* row = x + m * x_row_stride;
      // Other threads wrote parts of the row, which lie in the caches of their cores.
      for (int64_t i = 0; i < K; i += 16) __builtin_prefetch(row + i);
      if (norm) normalize_row(row, row_stats_of_16_lanes(row, K, LAYER_NORM_EPS), norm->weight, norm->bias, K, normal);
      Way::convert(norm ? normal : row, K, to + m * row_bytes);
    }
    // Tiles read 16 rows at a time.
    const int64_t padded = round_up(N, Way::MIN_ROWS);
    if (rows.end == N && padded > N) memset(to + N * row_bytes, 0, (padded - N) * row_bytes);
    if (!private_rows) wait();
    return to;
  }

  float* scratch() const { return args_.scratch + thread_ * args_.scratch_floats; }

  // Attention. One thread takes one head of a row: it writes the new keys and values, then computes each query.

  void attend(int64_t layer) {
    const int64_t H = args_.n_head;
    // The weights have displaced keys and values from the CPU's caches, so those of the thread's next head are
    // prefetched while this head is computed.
    to_next_head_ = threads_ * args_.n_slots * D_;
    for (int64_t item = thread_; item < args_.n_segments * H; item += threads_) {
      const EngineSegment& segment = args_.segments[item / H];
      const int64_t h = item % H;
      Cached* keys = (Cached*)args_.cache + (2 * layer * H + h) * args_.n_slots * D_;
      Cached* values = keys + H * args_.n_slots * D_;
      write_cache(segment, h, keys, values);
      D_ == 64 ? attend_head<64>(segment, h, keys, values) : attend_head<0>(segment, h, keys, values);
    }
  }

  template <int D>
  void attend_head(const EngineSegment& segment, int64_t h, const Cached* keys, const Cached* values) {
    int64_t i = 0;
    for (; i + QUERIES_PER_PASS <= segment.n; i += QUERIES_PER_PASS)
      attend_queries<QUERIES_PER_PASS, D>(segment, i, h, keys, values);
    for (; i < segment.n; ++i) attend_queries<1, D>(segment, i, h, keys, values);
  }

  enum Part { QUERY, KEY, VALUE };
  const float* qkv_of(int64_t token, Part part, int64_t h) const {
    return args_.qkv + token * round_up(3 * args_.C, PANEL) + part * args_.C + h * args_.D;
  }

  void write_cache(const EngineSegment& segment, int64_t h, Cached* keys, Cached* values) {
    for (int64_t i = 0; i < segment.n; ++i) {
      const int64_t place = segment.slots[segment.start + i] * D_;
      for (int64_t d = 0; d < D_; d += W) {
        store(keys + place + d, load_head(qkv_of(segment.first + i, KEY, h), d));
        store(values + place + d, load_head(qkv_of(segment.first + i, VALUE, h), d));
      }
    }
  }
  // Loads a vector of a head from dimension d on; lanes past the head's end are 0.
  vf load_head(const float* x, int64_t d) const {
    const int64_t n = args_.D - d;
    return n >= W ? load(x + d) : n > 0 ? load_part(x + d, n) : vf{};
  }

  // Computes attention for Q queries, from the segment's token `first` on.
  template <int Q, int D>
  void attend_queries(const EngineSegment& segment, int64_t first, int64_t h, const Cached* keys,
                      const Cached* values) {
    const int64_t seen = segment.start + first + Q, padded = round_up(seen, LANES);
    const int32_t* slots = segment.slots;
    float* scores = scratch();       // (Q, padded)
    float* q = scores + Q * padded;  // (Q, D_)
    float* out = q + Q * D_;         // (Q, D_)
    const float scale = (float)(1.4426950408889634 / sqrt((double)args_.D));
    for (int i = 0; i < Q; ++i)
      for (int64_t d = 0; d < D_; d += W)
        store(q + i * D_ + d, load_head(qkv_of(segment.first + first + i, QUERY, h), d));
    vf most[Q], total[Q][PARTS] = {};
    for (vf& lanes : most) lanes = splat(-INFINITY);
    for (int64_t t = 0; t < padded; t += W) {
      vf products[Q][W];
      for (int j = 0; j < W; ++j) {
        vf one_key[Q][PARTS] = {};
        add_products<Q, D>(one_key, q, keys + slots[smaller(t + j, seen - 1)] * D_);
        for (int i = 0; i < Q; ++i) products[i][j] = add_parts(one_key[i]);
      }
      for (int i = 0; i < Q; ++i) {
        const vi after = (vi)iota() + (int32_t)(t - (seen - Q + i));  // > 0: the key comes after the query
        const vf score = after > 0 ? splat(-INFINITY) : sum_each(products[i]);
        most[i] = max(most[i], score);
        store(scores + i * padded + t, score);
      }
    }
    for (int i = 0; i < Q; ++i) {
      const float top = max(most[i]);
      for (int64_t t = 0; t < padded; t += W) {
        const vf p = exp2((load(scores + i * padded + t) - top) * scale);  // no query is rounded by the scale
        total[i][t / W % PARTS] += p;
        store(scores + i * padded + t, p);
      }
    }
    int64_t d = 0;
    for (; d + VALUE_VECTORS * W <= D_; d += VALUE_VECTORS * W)
      weighted_values<Q, VALUE_VECTORS>(scores, padded, values + d, slots, seen, out + d);
    for (; d < D_; d += W) weighted_values<Q, 1>(scores, padded, values + d, slots, seen, out + d);
    for (int i = 0; i < Q; ++i) {
      const float probabilities = sum(add_parts(total[i]));
      float* to = args_.attended + (segment.first + first + i) * round_up(args_.C, PANEL) + h * args_.D;
      for (int64_t e = 0; e < args_.D; e += W)
        store_n(to + e, load(out + i * D_ + e) / probabilities, smaller<int64_t>(W, args_.D - e));
    }
  }

  // Adds the products of the key with each query, lane by lane, to sums[i]. D is 64, or 0 for any other size.
  template <int Q, int D>
  void add_products(vf (&sums)[Q][PARTS], const float* q, const Cached* key) const {
    const int64_t size = D ? D : D_;
#pragma GCC unroll 16
    for (int64_t d = 0; d < size; d += LANES) {
      if (d * sizeof(Cached) % 64 == 0) __builtin_prefetch(key + d + to_next_head_);
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; ++part) {
        const vf k = load(key + d + part * W);
#pragma GCC unroll 4
        for (int i = 0; i < Q; ++i) sums[i][part] = fused(k, load(q + i * size + d + part * W), sums[i][part]);
      }
    }
  }

  // Computes out = sum_t p[t] values[t] over the keys that a query sees, for V vectors of the head. Some queries do not
  // see all of the last Q - 1 keys. Their p is 0 there, but the value may be NaN or infinite, so it is left out.
  template <int Q, int V>
  void weighted_values(const float* p, int64_t padded, const Cached* values, const int32_t* slots, int64_t seen,
                       float* out) const {
    vf sum[Q][V] = {};
    for (int64_t t = 0; t < seen; ++t) {
      const Cached* value = values + slots[t] * D_;
      vf v[V];
#pragma GCC unroll 8
      for (int n = 0; n < V; ++n) {
        v[n] = load(value + n * W);
        if (n * W * sizeof(Cached) % 64 == 0) __builtin_prefetch(value + n * W + to_next_head_);
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
    for (int n = 0; n < V; ++n) sum[n] = fused(splat(p), v[n], sum[n]);
  }

  const EngineArgs& args_;
  const int64_t thread_, threads_, D_;
  int64_t to_next_head_ = 0;
};

template <class Type>
int64_t input_bytes_of(int64_t K) {
  int64_t bytes = row_bytes<typename Type::Vectors>(K);
  if constexpr (requires { typename Type::Tiles; }) bytes = larger(bytes, row_bytes<typename Type::Tiles>(K));
  return bytes;
}

int64_t input_bytes(WeightType type, int64_t K) {
  switch (type) {
    case WeightType::fp32:
      return input_bytes_of<Fp32>(K);
    case WeightType::bf16:
      return input_bytes_of<Bf16>(K);
    case WeightType::int8:
      return input_bytes_of<Int8>(K);
    default:
      return input_bytes_of<Int4>(K);
  }
}

void forward(const EngineArgs& args, int64_t thread, int64_t threads) {
  switch (args.type) {
    case WeightType::fp32:
      return Forward<Fp32, float>(args, thread, threads).run();
    case WeightType::bf16:
      return Forward<Bf16, bf16>(args, thread, threads).run();
    case WeightType::int8:
      return Forward<Int8, fp16>(args, thread, threads).run();
    default:
      return Forward<Int4, fp16>(args, thread, threads).run();
  }
}

}  // namespace

extern const EngineLoops engine = {input_bytes, QUERIES_PER_PASS, forward};

}  // namespace gptfast::GPTFAST_LEVEL
