// Packing a model for the engine, one parameter at a time.
#include <sys/mman.h>

#include "common.h"
#include "engine_layout.h"

namespace gptfast {
namespace {

constexpr int64_t HUGE_PAGE = int64_t{1} << 21;
constexpr int64_t FLOATS_PER_CACHE_LINE = 16;
constexpr float MIN_SCALE = 1e-30f;  // a row with a smaller scale becomes zeros: 1 / scale would overflow

// Returns the scale at which a row of weights becomes whole numbers from -127 to 127; NaN if a weight is not finite.
float row_scale(const float* w, int64_t K) {
  float largest = 0, zero_or_nan = 0;  // 0 times NaN or infinity is NaN
  for (int64_t k = 0; k < K; ++k) {
    largest = std::abs(w[k]) > largest ? std::abs(w[k]) : largest;
    zero_or_nan += w[k] * 0;
  }
  return largest / 127.0f + zero_or_nan;
}

// Calls f(lane, k, weight) for each weight of a panel, a cache line of each row at a time.
template <class F>
void for_each_weight(const float* w, int64_t rows, int64_t K, F f) {
  for (int64_t begin = 0; begin < K; begin += FLOATS_PER_CACHE_LINE)
    for (int64_t lane = 0; lane < rows; ++lane)
      for (int64_t k = begin; k < std::min(K, begin + FLOATS_PER_CACHE_LINE); ++k) f(lane, k, w[lane * K + k]);
}

// Whole numbers from 0 to 15, whose products with a scale plus a minimum are near to a group of weights.
struct Int4Numbers {
  c10::BFloat16 scale, minimum;
  uint8_t q[INT4_GROUP];
  double error;  // the sum of squares

  Int4Numbers(const float* w, int64_t n, float exact_scale, float exact_minimum)
      : scale(exact_scale), minimum(exact_minimum), q(), error(0) {
    const float s = scale, m = minimum;
    for (int64_t i = 0; i < n; ++i) {
      const float number = s > 0 ? std::nearbyint((w[i] - m) / s) : 0;
      q[i] = static_cast<uint8_t>(std::clamp(number, 0.0f, 15.0f));
      const double difference = double{w[i]} - (double{s} * q[i] + double{m});
      error += difference * difference;
    }
  }
  // Returns the numbers for the scale and minimum that suit these q best: the least squares.
  Int4Numbers refitted(const float* w, int64_t n) const {
    double sum_q = 0, sum_qq = 0, sum_w = 0, sum_qw = 0;
    for (int64_t i = 0; i < n; ++i) {
      sum_q += q[i];
      sum_qq += q[i] * q[i];
      sum_w += w[i];
      sum_qw += q[i] * double{w[i]};
    }
    const double variance = static_cast<double>(n) * sum_qq - sum_q * sum_q;
    if (variance <= 0) return *this;
    const double s = (static_cast<double>(n) * sum_qw - sum_q * sum_w) / variance;
    return {w, n, static_cast<float>(s), static_cast<float>((sum_w - s * sum_q) / static_cast<double>(n))};
  }
};

// Packs a group of n weights of one output.
void pack_int4(const float* w, int64_t n, int64_t lane, char* group) {
  constexpr int MAX_REFITS = 4;
  float zero_or_nan = 0;  // 0 times NaN or infinity is NaN
  for (int64_t i = 0; i < n; ++i) zero_or_nan += w[i] * 0;
  const auto [low, high] = std::minmax_element(w, w + n);
  Int4Numbers best(w, n, zero_or_nan == 0 ? (*high - *low) / 15 : zero_or_nan, zero_or_nan == 0 ? *low : zero_or_nan);
  for (int i = 0; i < MAX_REFITS; ++i) {
    const Int4Numbers next = best.refitted(w, n);
    if (!(next.error < best.error)) break;
    best = next;
  }
  for (int64_t k = 0; k < n; ++k)
    group[k / 8 * 4 * PANEL + lane * 4 + k % 4] |= static_cast<char>(best.q[k] << (k % 8 / 4 * 4));
  auto* scales = reinterpret_cast<c10::BFloat16*>(group + INT4_GROUP / 2 * PANEL);
  scales[lane] = best.scale;
  scales[PANEL + lane] = best.minimum;
}

void pack_panel(WeightType type, const float* w, int64_t rows, int64_t K, char* to, float* scale) {
  if (type == WeightType::fp32) {
    auto* x = reinterpret_cast<float*>(to);
    for_each_weight(w, rows, K, [&](int64_t lane, int64_t k, float value) { x[k * PANEL + lane] = value; });
  } else if (type == WeightType::bf16) {
    auto* x = reinterpret_cast<c10::BFloat16*>(to);
    for_each_weight(w, rows, K,
                    [&](int64_t lane, int64_t k, float value) { x[k / 2 * 2 * PANEL + lane * 2 + k % 2] = value; });
  } else if (type == WeightType::int4) {
    for (int64_t k = 0; k < K; k += INT4_GROUP, to += INT4_GROUP_BYTES)
      for (int64_t lane = 0; lane < rows; ++lane) pack_int4(w + lane * K + k, std::min(INT4_GROUP, K - k), lane, to);
  } else {
    float inverse[PANEL];
    for (int64_t lane = 0; lane < rows; ++lane) {
      scale[lane] = row_scale(w + lane * K, K);
      inverse[lane] = scale[lane] > MIN_SCALE ? 1 / scale[lane] : 0;  // 0 for NaN too, which the scale keeps
    }
    for_each_weight(w, rows, K, [&](int64_t lane, int64_t k, float value) {
      const float q = inverse[lane] > 0 ? value * inverse[lane] : 0;
      to[k / 4 * 4 * PANEL + lane * 4 + k % 4] = static_cast<char>(static_cast<int>(std::nearbyint(q)) + 128);
    });
  }
}

void pack(const Tensor& packed, const Ints& shape_fields, const std::string& name, const Tensor& weight_in) {
  const ModelShape shape(shape_fields);
  const Layout layout(shape);
  const Part& part = layout.find(name);
  const Tensor weight = contiguous(to(weight_in, kFloat));
  CHECK_VALUE(weight.numel() == part.rows * part.columns, "engine: parameter ", name, " has shape ", weight.sizes(),
              ", the model needs ", part.rows, " x ", part.columns);
  layout.check(packed);
  char* to = static_cast<char*>(packed.data_ptr()) + part.offset;
  const float* w = weight.const_data_ptr<float>();
  if (!part.packed) {
    memcpy(to, w, sizeof(float) * weight.numel());
    return;
  }
  auto* scale = reinterpret_cast<float*>(to + layout.panels_bytes(part));
  const int64_t K = part.columns, panel_bytes = layout.panel_bytes(K);
  const bool int8 = shape.type() == WeightType::int8;
  parallel_for(0, Layout::panels(part), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t rows = std::min(PANEL, part.rows - p * PANEL);
      // The padding is 0, which int8 stores as 128.
      memset(to + p * panel_bytes, int8 ? 128 : 0, panel_bytes);
      pack_panel(shape.type(), w + p * PANEL * K, rows, K, to + p * panel_bytes, scale + p * PANEL);
    }
  });
}

struct Mapping {
  void* start;
  size_t bytes;
};

// Returns zeros, on huge pages where the system has them: a step reads model and cache from end to end, and the
// hardware's prefetching stops at a page's end.
Tensor new_bytes(int64_t bytes) {
  CHECK_VALUE(bytes >= 0, "engine: bytes must be >= 0, got ", bytes);
  const int64_t mapped = round_up(bytes, HUGE_PAGE) + HUGE_PAGE;
  void* all = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED)
    throw std::runtime_error(text("engine: no memory for ", bytes, " bytes; choose a smaller model, dtype or batch"));
  auto* start = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(all), HUGE_PAGE));
#ifdef MADV_HUGEPAGE
  madvise(start, round_up(bytes, HUGE_PAGE), MADV_HUGEPAGE);
#endif
  const auto unmap = [](void*, void* context) {
    const std::unique_ptr<Mapping> mapping(static_cast<Mapping*>(context));
    munmap(mapping->start, mapping->bytes);
  };
  return from_memory(start, {bytes}, kByte, unmap, new Mapping{all, static_cast<size_t>(mapped)});
}

int64_t packed_bytes(const Ints& shape) { return Layout(ModelShape(shape)).bytes(); }

const Kernels kernels = Kernels("CPU").add<pack>("engine_pack");
// These two take no tensor, so there is no backend to choose by.
const Kernels without_tensors =
    Kernels("CompositeExplicitAutograd").add<new_bytes>("engine_new").add<packed_bytes>("engine_bytes");

}  // namespace
}  // namespace gptfast
