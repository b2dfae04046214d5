// The packed model: one tensor of bytes with all of GPT's parameters. engine.h describes how a matrix is stored.
#pragma once

#include <string_view>
#include <vector>

#include "engine.h"
#include "tensor.h"

namespace gptfast {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A model's shape. The operators take it as integers in this order; Shape in Python's packed.py has the same fields.
struct ModelShape {
  int64_t weight_type, n_layer, n_head, n_embd, vocab_size, block_size, tied;

  explicit ModelShape(const Ints& fields);  // checks each field

  WeightType type() const { return static_cast<WeightType>(weight_type); }
  int64_t head_dim() const { return n_embd / n_head; }
  int64_t cache_elements_per_token() const { return n_layer * 2 * n_head * round_up(head_dim(), CACHE_UNIT); }
  ScalarType cache_dtype() const;
};

// A parameter's place in the packed model. Vectors and wpe are plain fp32. A matrix with int8 weights has the scales of
// its outputs after its panels.
struct Part {
  int64_t offset, rows, columns;
  bool packed;  // in panels, or plain fp32
};
struct NormParts {
  Part weight, bias;
};
struct LinearParts {
  Part weight, bias;
};
struct LayerParts {
  NormParts ln_1;
  LinearParts c_attn, attn_c_proj;
  NormParts ln_2;
  LinearParts c_fc, mlp_c_proj;
};

// The places of all parameters, in the order of GPT's own: wte, wpe, the layers, ln_f, and lm_head if it is not tied.
class Layout {
 public:
  explicit Layout(const ModelShape& shape);

  int64_t bytes() const { return bytes_; }
  int64_t panel_bytes(int64_t K) const;
  int64_t panels_bytes(const Part& part) const { return panel_bytes(part.columns) * panels(part); }
  static int64_t panels(const Part& part) { return (part.rows + PANEL - 1) / PANEL; }

  // Returns the place of a parameter of GPT, such as "h.0.attn.c_attn.weight". Throws ValueError for another name.
  const Part& find(std::string_view name) const;
  void check(const Tensor& packed) const;  // throws ValueError unless it has the layout's size

  EngineMatrix wte(const char* packed) const { return matrix_at(packed, wte_); }
  const float* wpe(const char* packed) const { return floats_at(packed, wpe_); }
  std::vector<EngineLayer> layers(const char* packed) const;
  EngineNorm ln_f(const char* packed) const { return norm_at(packed, ln_f_); }
  EngineMatrix head(const char* packed) const { return matrix_at(packed, shape_.tied ? wte_ : lm_head_); }

 private:
  Part place(Part part, int64_t bytes);
  Part matrix(int64_t N, int64_t K);
  Part table(int64_t rows, int64_t columns);
  Part vector(int64_t n);
  NormParts norm(int64_t C);
  LinearParts linear(int64_t N, int64_t K);

  static const float* floats_at(const char* packed, const Part& part);
  static EngineNorm norm_at(const char* packed, const NormParts& parts);
  EngineMatrix matrix_at(const char* packed, const Part& weight) const;
  EngineMatrix linear_at(const char* packed, const LinearParts& parts) const;

  ModelShape shape_;
  int64_t bytes_ = 0;
  Part wte_, wpe_;
  std::vector<LayerParts> layers_;
  NormParts ln_f_;
  Part lm_head_{};
};

}  // namespace gptfast
