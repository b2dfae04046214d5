// GPT-2 packed for generation: its weights as one tensor of bytes, and a step of any tokens of any rows through
// all layers, the head and the draw, in one call. engine.h says how matrices are packed.
#include "engine.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <omp.h>
#include <sys/mman.h>

#include "arena.h"
#include "common.h"
#include "sampling.h"

namespace gptfast {
namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t HUGE_PAGE = int64_t{1} << 21;

int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Shape {
  WeightType type;
  int64_t n_layer, n_head, n_embd, vocab_size, block_size;
  bool tied;

  explicit Shape(IntArrayRef s) {
    // Bounds within which no count of bytes overflows.
    constexpr int64_t most[] = {2, 10000, 1 << 20, 1 << 20, (int64_t{1} << 31) - 1, (int64_t{1} << 31) - 1, 1};
    bool fits = s.size() == 7;
    for (size_t i = 0; fits && i < 7; ++i) fits = s[i] >= (i == 0 || i == 6 ? 0 : 1) && s[i] <= most[i];
    TORCH_CHECK_VALUE(fits && s[3] % s[2] == 0, "engine: no such shape of a model: ", s);
    type = static_cast<WeightType>(s[0]);
    n_layer = s[1], n_head = s[2], n_embd = s[3], vocab_size = s[4], block_size = s[5], tied = s[6] != 0;
  }
  int64_t head_dim() const { return n_embd / n_head; }
  int64_t cache_floats() const { return n_layer * 2 * n_head * padded(head_dim(), 16); }  // per token
  at::ScalarType cache_dtype() const {
    return type == WeightType::fp32 ? at::kFloat : type == WeightType::bf16 ? at::kBFloat16 : at::kHalf;
  }
};

// A parameter's place in the packed model. Vectors and wpe are fp32; of int8 matrices the scales follow the panels.
struct Part {
  int64_t offset, N, K;  // K = 0: a vector
  bool matrix;
};

// In the order of GPT's parameters: wte, wpe, per layer ln_1, c_attn, c_proj, ln_2, c_fc, c_proj (each weight and
// bias), ln_f, and the head if it is not wte.
class Layout {
 public:
  explicit Layout(const Shape& shape) : shape_(shape) {
    const int64_t C = shape.n_embd, V = shape.vocab_size;
    matrix(V, C);
    place({0, shape.block_size, C, false}, shape.block_size * C * 4);
    for (int64_t i = 0; i < shape.n_layer; ++i) {
      for (const auto& [n, k] : {std::pair{C, int64_t{0}}, {3 * C, C}, {C, C}, {C, 0}, {4 * C, C}, {C, 4 * C}}) {
        if (k)
          matrix(n, k);
        else
          vector(n);
        vector(n);
      }
    }
    vector(C);
    vector(C);
    if (!shape.tied) matrix(V, C);
  }
  int64_t panel_bytes(int64_t K) const {
    switch (shape_.type) {
      case WeightType::fp32:
        return K * PANEL * 4;
      case WeightType::bf16:
        return padded(K, 2) * PANEL * 2;
      default:
        return padded(K, GROUP) * PANEL;
    }
  }
  int64_t panels_bytes(const Part& part) const { return panel_bytes(part.K) * (padded(part.N, PANEL) / PANEL); }
  const std::vector<Part>& parts() const { return parts_; }
  int64_t bytes() const { return bytes_; }

  EngineMatrix matrix_at(const char* packed, int64_t i, bool biased) const {
    const Part& part = parts_[i];
    const auto* panels = packed + part.offset;
    const auto* scale =
        shape_.type == WeightType::int8 ? reinterpret_cast<const float*>(panels + panels_bytes(part)) : nullptr;
    return {panels, scale, biased ? vector_at(packed, i + 1) : nullptr, part.N, part.K};
  }
  const float* vector_at(const char* packed, int64_t i) const {
    return reinterpret_cast<const float*>(packed + parts_[i].offset);
  }
  EngineNorm norm_at(const char* packed, int64_t i) const { return {vector_at(packed, i), vector_at(packed, i + 1)}; }
  EngineLayer layer_at(const char* packed, int64_t layer) const {
    const int64_t i = 2 + 12 * layer;
    return {norm_at(packed, i),     matrix_at(packed, i + 2, true), matrix_at(packed, i + 4, true),
            norm_at(packed, i + 6), matrix_at(packed, i + 8, true), matrix_at(packed, i + 10, true)};
  }

 private:
  void place(Part part, int64_t bytes) {
    part.offset = bytes_;
    parts_.push_back(part);
    bytes_ += padded(bytes, 64);
  }
  void matrix(int64_t N, int64_t K) {
    const Part part{0, N, K, true};
    const int64_t scales = shape_.type == WeightType::int8 ? padded(N, PANEL) * 4 : 0;
    place(part, panels_bytes(part) + scales);
  }
  void vector(int64_t n) { place({0, n, 0, false}, padded(n, PANEL) * 4); }

  Shape shape_;
  std::vector<Part> parts_;
  int64_t bytes_ = 0;
};

// ---- Packing

// The scale by which a row of weights becomes whole numbers; NaN if one of them is not finite.
float row_scale(const float* w, int64_t K) {
  float largest = 0, nothing = 0;  // 0 times what is not finite is NaN
  for (int64_t k = 0; k < K; ++k) {
    largest = std::abs(w[k]) > largest ? std::abs(w[k]) : largest;
    nothing += w[k] * 0;
  }
  return largest / 127.0f + nothing;
}

// A panel's weights through f, a cache line of each row at a time: f(lane, k, weight).
template <class F>
void each(const float* w, int64_t rows, int64_t K, F f) {
  constexpr int64_t LINE = 16;
  for (int64_t begin = 0; begin < K; begin += LINE)
    for (int64_t lane = 0; lane < rows; ++lane)
      for (int64_t k = begin; k < std::min(K, begin + LINE); ++k) f(lane, k, w[lane * K + k]);
}

void pack_panel(WeightType type, const float* w, int64_t rows, int64_t K, char* to, float* scale) {
  if (type == WeightType::fp32) {
    auto* x = reinterpret_cast<float*>(to);
    each(w, rows, K, [&](int64_t lane, int64_t k, float value) { x[k * PANEL + lane] = value; });
  } else if (type == WeightType::bf16) {
    auto* x = reinterpret_cast<c10::BFloat16*>(to);
    each(w, rows, K, [&](int64_t lane, int64_t k, float value) { x[k / 2 * 2 * PANEL + lane * 2 + k % 2] = value; });
  } else {
    float inverse[PANEL];
    for (int64_t lane = 0; lane < rows; ++lane) {
      scale[lane] = row_scale(w + lane * K, K);
      inverse[lane] = scale[lane] > 1e-30f ? 1 / scale[lane] : 0;  // for NaN too, which the scale keeps
    }
    each(w, rows, K, [&](int64_t lane, int64_t k, float value) {
      const float q = inverse[lane] > 0 ? value * inverse[lane] : 0;
      to[k / 4 * 4 * PANEL + lane * 4 + k % 4] = static_cast<char>(static_cast<int>(std::nearbyint(q)) + 128);
    });
  }
}

void pack(const Tensor& packed, IntArrayRef shape_in, int64_t index, const Tensor& weight_in) {
  const Shape shape(shape_in);
  const Layout layout(shape);
  TORCH_CHECK_VALUE(index >= 0 && index < static_cast<int64_t>(layout.parts().size()), "engine: no parameter ", index);
  const Part part = layout.parts()[index];
  const Tensor weight = weight_in.to(at::kFloat).contiguous();
  TORCH_CHECK_VALUE(weight.numel() == part.N * std::max(part.K, int64_t{1}), "engine: parameter ", index, " has shape ",
                    weight.sizes(), ", the model needs ", part.N, " x ", part.K);
  TORCH_CHECK_VALUE(packed.numel() == layout.bytes() && packed.is_contiguous() && packed.scalar_type() == at::kByte,
                    "engine: the packed model needs ", layout.bytes(), " bytes, got ", packed.sizes());
  char* to = static_cast<char*>(packed.data_ptr()) + part.offset;
  const float* w = weight.const_data_ptr<float>();
  if (!part.matrix) {
    memcpy(to, w, sizeof(float) * weight.numel());
    return;
  }
  auto* scale = reinterpret_cast<float*>(to + layout.panels_bytes(part));
  const int64_t panel_bytes = layout.panel_bytes(part.K);
  at::parallel_for(0, padded(part.N, PANEL) / PANEL, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t rows = std::min(PANEL, part.N - p * PANEL);
      // Padding is 0, which as a whole number is stored as 128.
      if (rows < PANEL || shape.type == WeightType::int8)
        memset(to + p * panel_bytes, shape.type == WeightType::int8 ? 128 : 0, panel_bytes);
      pack_panel(shape.type, w + p * PANEL * part.K, rows, part.K, to + p * panel_bytes, scale + p * PANEL);
    }
  });
}

// Zeros, on large pages where the system has them: a step reads model and cache from end to end, and the hardware's
// prefetching stops at a page's end.
Tensor new_bytes(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "engine: no memory of ", bytes, " bytes");
  const int64_t mapped = padded(bytes, HUGE_PAGE) + HUGE_PAGE;
  void* all = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(all != MAP_FAILED, "engine: no memory for ", bytes, " bytes");
  auto* start = reinterpret_cast<char*>(padded(reinterpret_cast<int64_t>(all), HUGE_PAGE));
  madvise(start, padded(bytes, HUGE_PAGE), MADV_HUGEPAGE);
  return at::from_blob(start, {bytes}, [all, mapped](void*) { munmap(all, mapped); }, at::TensorOptions(at::kByte));
}

int64_t packed_bytes(IntArrayRef shape) { return Layout(Shape(shape)).bytes(); }

// ---- A step

const EngineLoops& loops() {
  switch (level()) {
    case Level::avx512_bf16:
      return avx512_bf16::engine;
    case Level::avx512_vnni:
      return avx512_vnni::engine;
    default:
      return pick(generic::engine, avx2::engine, avx512::engine);
  }
}

std::vector<EngineSegment> segments(const Tensor& slots, int64_t n_slots, IntArrayRef rows, IntArrayRef starts,
                                    IntArrayRef counts, int64_t N) {
  TORCH_CHECK_VALUE(slots.dim() == 2 && slots.scalar_type() == at::kInt && slots.is_contiguous(),
                    "engine: slots must be (rows, tokens) int32, got ", slots.sizes());
  TORCH_CHECK_VALUE(rows.size() == starts.size() && rows.size() == counts.size(),
                    "engine: rows, starts and counts need one length");
  std::vector<EngineSegment> all;
  int64_t first = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    TORCH_CHECK_INDEX(rows[i] >= 0 && rows[i] < slots.size(0) && starts[i] >= 0 && counts[i] > 0 &&
                          counts[i] <= slots.size(1) && starts[i] <= slots.size(1) - counts[i],
                      "engine: row ", rows[i], " has no ", counts[i], " tokens from ", starts[i], " on");
    const int32_t* row = slots.const_data_ptr<int32_t>() + rows[i] * slots.size(1);
    for (int64_t t = 0; t < starts[i] + counts[i]; ++t)
      TORCH_CHECK_INDEX(row[t] >= 0 && row[t] < n_slots, "engine: no slot ", row[t], " in a cache of ", n_slots);
    all.push_back({row, starts[i], first, counts[i]});
    first += counts[i];
  }
  TORCH_CHECK_VALUE(first == N, "engine: counts add up to ", first, ", there are ", N, " ids");
  return all;
}

// One tensor for all buffers, each on cache lines of its own.
class Buffers {
 public:
  int64_t add(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += padded(bytes, 128);
    return at;
  }
  void make() {
    memory_ = make_tensor({bytes_ + 128}, at::TensorOptions(at::kByte));
    start_ = reinterpret_cast<char*>(padded(reinterpret_cast<int64_t>(memory_.data_ptr()), 128));
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(start_ + offset);
  }

 private:
  Tensor memory_;
  char* start_ = nullptr;
  int64_t bytes_ = 0;
};

void run(EngineArgs& args) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t C = args.C, N = args.N, most = std::max(N, args.n_wanted);
  const auto& engine = loops();
  int64_t longest = 0;
  for (int64_t i = 0; i < args.n_segments; ++i)
    longest = std::max(longest, args.segments[i].start + args.segments[i].n);
  const int64_t stride = std::max(engine.input_bytes(args.type, C), engine.input_bytes(args.type, 4 * C));
  args.inputs_bytes = ENGINE_ALONE * stride;
  args.scores_floats =
      padded(std::max(engine.queries * (padded(longest, 16) + 2 * padded(args.D, 16)), 4 * padded(C, 16)), 32);
  Buffers buffers;
  const int64_t x = buffers.add(N * padded(C, PANEL) * 4), qkv = buffers.add(N * padded(3 * C, PANEL) * 4);
  const int64_t mixed = buffers.add(most * padded(C, PANEL) * 4), fc = buffers.add(N * padded(4 * C, PANEL) * 4);
  const int64_t inputs = buffers.add(std::max(threads * args.inputs_bytes, most * stride));
  const int64_t scores = buffers.add(threads * args.scores_floats * 4);
  buffers.make();
  args.x = buffers.at<float>(x), args.qkv = buffers.at<float>(qkv), args.mixed = buffers.at<float>(mixed);
  args.fc = buffers.at<float>(fc), args.inputs = buffers.at<char>(inputs), args.scores = buffers.at<float>(scores);
  EngineBarrier barrier;
  args.barrier = &barrier;
  if (threads == 1) return engine.forward(args, 0, 1);
  // Not at::parallel_for: all of the team must be there at once, however many it turns out to be.
#pragma omp parallel num_threads(static_cast<int>(threads))
  engine.forward(args, omp_get_thread_num(), omp_get_num_threads());
}

std::tuple<Tensor, Tensor> step(const Tensor& packed, IntArrayRef shape_in, const Tensor& cache, const Tensor& slots,
                                IntArrayRef rows, IntArrayRef starts, IntArrayRef counts, IntArrayRef ids,
                                IntArrayRef wanted, at::TensorList sampling, IntArrayRef positions) {
  const Shape shape(shape_in);
  const Layout layout(shape);
  const int64_t N = static_cast<int64_t>(ids.size()), M = static_cast<int64_t>(wanted.size()), V = shape.vocab_size;
  TORCH_CHECK_VALUE(packed.numel() == layout.bytes() && packed.is_contiguous() && packed.scalar_type() == at::kByte,
                    "engine: the packed model needs ", layout.bytes(), " bytes, got ", packed.sizes());
  TORCH_CHECK_VALUE(
      cache.is_contiguous() && cache.scalar_type() == shape.cache_dtype() && cache.numel() % shape.cache_floats() == 0,
      "engine: no cache of this model: ", cache.sizes(), " ", cache.scalar_type());
  TORCH_CHECK_VALUE(sampling.empty() || (sampling.size() == 5 && positions.size() == wanted.size()),
                    "engine: to draw takes temperature, top_k, top_p, min_p, seed, and a position a row");
  for (const int64_t id : ids)
    TORCH_CHECK_INDEX(id >= 0 && id < V, "engine: token id ", id, " is out of range for a vocabulary of ", V);
  for (const int64_t t : wanted) TORCH_CHECK_INDEX(t >= 0 && t < N, "engine: no token ", t, " among ", N);
  const int64_t n_slots = cache.numel() / shape.cache_floats();
  const auto all = segments(slots, n_slots, rows, starts, counts, N);
  std::vector<int64_t> at(ids.size());
  for (const auto& segment : all)
    for (int64_t i = 0; i < segment.n; ++i) {
      at[segment.first + i] = segment.start + i;
      TORCH_CHECK_INDEX(segment.start + i < shape.block_size, "engine: position ", segment.start + i,
                        " is beyond block_size=", shape.block_size);
    }
  const char* model = static_cast<const char*>(packed.const_data_ptr());
  std::vector<EngineLayer> layers;
  for (int64_t i = 0; i < shape.n_layer; ++i) layers.push_back(layout.layer_at(model, i));
  const int64_t last = 2 + 12 * shape.n_layer;

  Tensor logits = make_tensor({M, padded(V, PANEL)}, at::TensorOptions(at::kFloat));
  EngineArgs args{};
  args.type = shape.type;
  args.n_layer = shape.n_layer, args.n_head = shape.n_head, args.C = shape.n_embd, args.D = shape.head_dim();
  args.N = N, args.layers = layers.data(), args.ln_f = layout.norm_at(model, last);
  args.wte = layout.matrix_at(model, 0, false);
  args.head = shape.tied ? args.wte : layout.matrix_at(model, last + 2, false);
  args.wpe = layout.vector_at(model, 1);
  args.segments = all.data(), args.n_segments = static_cast<int64_t>(all.size());
  args.ids = ids.data(), args.positions = at.data();
  args.wanted = wanted.data(), args.n_wanted = M;
  args.cache = static_cast<char*>(cache.data_ptr()), args.n_slots = n_slots;
  args.logits = logits.data_ptr<float>();
  if (N) run(args);
  logits = logits.narrow(1, 0, V);
  if (sampling.empty() || M == 0) return {logits, at::empty({0}, at::TensorOptions(at::kLong))};
  Tensor where = at::empty({M}, at::TensorOptions(at::kLong));
  std::copy(positions.begin(), positions.end(), where.data_ptr<int64_t>());
  return {logits, sample(logits, sampling[0], sampling[1], sampling[2], sampling[3], sampling[4], where)};
}

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("engine_pack", pack);
  m.impl("engine_step", step);
}
TORCH_LIBRARY_IMPL(gptfast, CompositeExplicitAutograd, m) {
  m.impl("engine_new", new_bytes);
  m.impl("engine_bytes", packed_bytes);
}

}  // namespace
}  // namespace gptfast
