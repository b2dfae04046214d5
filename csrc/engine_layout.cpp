#include "engine_layout.h"

#include <charconv>

namespace gptfast {
namespace {

struct Field {
  const char* name;
  int64_t ModelShape::* member;
  int64_t min, max;  // within these bounds no number of bytes overflows
};
constexpr int64_t MAX_WIDTH = int64_t{1} << 20, MAX_INT32 = (int64_t{1} << 31) - 1;
constexpr Field FIELDS[] = {
    {"weight_type", &ModelShape::weight_type, 0, 3},
    {"n_layer", &ModelShape::n_layer, 1, 10000},
    {"n_head", &ModelShape::n_head, 1, MAX_WIDTH},
    {"n_embd", &ModelShape::n_embd, 1, MAX_WIDTH},
    {"vocab_size", &ModelShape::vocab_size, 1, MAX_INT32},
    {"block_size", &ModelShape::block_size, 1, MAX_INT32},
    {"tied", &ModelShape::tied, 0, 1},
};

}  // namespace

ModelShape::ModelShape(const Ints& fields) {
  CHECK_VALUE(fields.size() == std::size(FIELDS), "engine: a model's shape has ", std::size(FIELDS), " numbers, got ",
              fields.size());
  for (size_t i = 0; i < std::size(FIELDS); ++i) {
    const Field& field = FIELDS[i];
    CHECK_VALUE(fields[i] >= field.min && fields[i] <= field.max, "engine: ", field.name, " must be in [", field.min,
                ", ", field.max, "], got ", fields[i]);
    this->*field.member = fields[i];
  }
  CHECK_VALUE(n_embd % n_head == 0, "engine: n_embd must be a multiple of n_head, got ", n_embd, " and ", n_head);
}

ScalarType ModelShape::cache_dtype() const {
  switch (type()) {
    case WeightType::fp32:
      return kFloat;
    case WeightType::bf16:
      return kBFloat16;
    default:
      return kHalf;
  }
}

Layout::Layout(const ModelShape& shape) : shape_(shape) {
  const int64_t C = shape.n_embd, V = shape.vocab_size;
  wte_ = matrix(V, C);
  wpe_ = table(shape.block_size, C);
  layers_.reserve(shape.n_layer);
  for (int64_t i = 0; i < shape.n_layer; ++i)
    layers_.push_back({.ln_1 = norm(C),
                       .c_attn = linear(3 * C, C),
                       .attn_c_proj = linear(C, C),
                       .ln_2 = norm(C),
                       .c_fc = linear(4 * C, C),
                       .mlp_c_proj = linear(C, 4 * C)});
  ln_f_ = norm(C);
  if (!shape.tied) lm_head_ = matrix(V, C);
}

int64_t Layout::panel_bytes(int64_t K) const {
  switch (shape_.type()) {
    case WeightType::fp32:
      return K * PANEL * 4;
    case WeightType::bf16:
      return round_up(K, BF16_BLOCK) * PANEL * 2;
    case WeightType::int8:
      return round_up(K, INT8_GROUP) * PANEL;
    default:
      return round_up(K, INT8_GROUP) / INT4_GROUP * INT4_GROUP_BYTES;
  }
}

Part Layout::place(Part part, int64_t bytes) {
  part.offset = bytes_;
  bytes_ += round_up(bytes, 64);
  return part;
}
Part Layout::matrix(int64_t N, int64_t K) {
  const Part part{0, N, K, true};
  const int64_t scale_bytes = shape_.type() == WeightType::int8 ? round_up(N, PANEL) * 4 : 0;
  return place(part, panels_bytes(part) + scale_bytes);
}
Part Layout::table(int64_t rows, int64_t columns) { return place({0, rows, columns, false}, rows * columns * 4); }
Part Layout::vector(int64_t n) { return place({0, n, 1, false}, round_up(n, PANEL) * 4); }
NormParts Layout::norm(int64_t C) { return {.weight = vector(C), .bias = vector(C)}; }
LinearParts Layout::linear(int64_t N, int64_t K) { return {.weight = matrix(N, K), .bias = vector(N)}; }

const Part& Layout::find(std::string_view name) const {
  const std::string_view whole_name = name;
  const auto is = [&](std::string_view other) { return name == other; };
  const auto leaf = [&](const auto& parts, std::string_view module) -> const Part* {
    if (!name.starts_with(module)) return nullptr;
    const std::string_view rest = name.substr(module.size());
    return rest == ".weight" ? &parts.weight : rest == ".bias" ? &parts.bias : nullptr;
  };
  if (is("wte.weight")) return wte_;
  if (is("wpe.weight")) return wpe_;
  if (is("lm_head.weight") && !shape_.tied) return lm_head_;
  if (const Part* part = leaf(ln_f_, "ln_f")) return *part;
  size_t i = 0;
  if (name.starts_with("h.")) {
    const auto [end, error] = std::from_chars(name.data() + 2, name.data() + name.size(), i);
    if (error == std::errc() && i < layers_.size()) {
      const LayerParts& layer = layers_[i];
      name.remove_prefix(end - name.data());
      for (const Part* part :
           {leaf(layer.ln_1, ".ln_1"), leaf(layer.c_attn, ".attn.c_attn"), leaf(layer.attn_c_proj, ".attn.c_proj"),
            leaf(layer.ln_2, ".ln_2"), leaf(layer.c_fc, ".mlp.c_fc"), leaf(layer.mlp_c_proj, ".mlp.c_proj")})
        if (part) return *part;
    }
  }
  CHECK_VALUE(false, "engine: the model has no parameter ", whole_name);
}

void Layout::check(const Tensor& packed) const {
  CHECK_VALUE(packed.numel() == bytes_ && packed.is_contiguous() && packed.scalar_type() == kByte,
              "engine: the packed model must be ", bytes_, " contiguous bytes, got ", packed.sizes(), " ",
              packed.scalar_type());
}

const float* Layout::floats_at(const char* packed, const Part& part) {
  return reinterpret_cast<const float*>(packed + part.offset);
}
EngineNorm Layout::norm_at(const char* packed, const NormParts& parts) {
  return {floats_at(packed, parts.weight), floats_at(packed, parts.bias)};
}
EngineMatrix Layout::matrix_at(const char* packed, const Part& weight) const {
  const char* panels = packed + weight.offset;
  const auto* scale =
      shape_.type() == WeightType::int8 ? reinterpret_cast<const float*>(panels + panels_bytes(weight)) : nullptr;
  return {.panels = panels, .scale = scale, .bias = nullptr, .N = weight.rows, .K = weight.columns};
}
EngineMatrix Layout::linear_at(const char* packed, const LinearParts& parts) const {
  EngineMatrix matrix = matrix_at(packed, parts.weight);
  matrix.bias = floats_at(packed, parts.bias);
  return matrix;
}

std::vector<EngineLayer> Layout::layers(const char* packed) const {
  std::vector<EngineLayer> layers;
  layers.reserve(layers_.size());
  for (const LayerParts& parts : layers_)
    layers.push_back({.ln_1 = norm_at(packed, parts.ln_1),
                      .c_attn = linear_at(packed, parts.c_attn),
                      .attn_c_proj = linear_at(packed, parts.attn_c_proj),
                      .ln_2 = norm_at(packed, parts.ln_2),
                      .c_fc = linear_at(packed, parts.c_fc),
                      .mlp_c_proj = linear_at(packed, parts.mlp_c_proj)});
  return layers;
}

}  // namespace gptfast
