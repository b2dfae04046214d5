// What the wrappers (compiled once, with ATen) and the loops (compiled per level, without) share.
#pragma once

#include <stdint.h>

namespace gptfast {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
enum class Dtype { fp32, bf16, fp16 };

// Strides in elements, for batch, head and time; the last dimension is contiguous.
struct Heads {
  void* data;
  int64_t batch, head, time;
};

struct AttentionArgs {
  Dtype dtype;
  int64_t B, H, Tq, Tk, D;
  float scale, dropout_p;
  uint64_t seed;
  const int64_t* kv_len;  // (B,) or null
  Heads q, k, v, out;
  float* lse;  // (B, H, Tq)
  Heads dout, dq, dk, dv;
};
struct AttentionFwdLoops {
  int64_t (*items)(const AttentionArgs&);  // how many pieces of work there are
  void (*run)(const AttentionArgs&, int64_t begin, int64_t end);
};
struct AttentionBwdLoops {
  void (*run)(const AttentionArgs&, int64_t begin, int64_t end);  // heads of B * H
};

struct CrossEntropyArgs {
  Dtype dtype;
  int64_t V, row_stride;
  int64_t ignore_index;
  float label_smoothing, z_loss;
  const void* logits;     // (N, V), rows row_stride apart
  const int64_t* target;  // (N,)
  float* loss;            // (N,)
  double* lse;            // (N,); in fp32 it would be off by |lse| * 6e-8, and every gradient with it
  const float* dloss;     // (N,)
  void* dlogits;          // (N, V) contiguous; bwd may write over the logits
};
struct CrossEntropyLoops {
  void (*fwd)(const CrossEntropyArgs&, int64_t begin, int64_t end);      // rows
  void (*bwd)(const CrossEntropyArgs&, int64_t begin, int64_t end);      // rows
  void (*fwd_bwd)(const CrossEntropyArgs&, int64_t begin, int64_t end);  // each row while it is in cache
};

struct AdamWTensor {
  Dtype dtype, moment_dtype;
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  float* master;  // or null
  float step_size, inv_sqrt_bias2;
  uint32_t param_id, step;
};
struct AdamWArgs {
  float clip, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  bool stochastic;
  uint64_t seed;
};
struct AdamWLoops {
  void (*step)(const AdamWTensor&, const AdamWArgs&, int64_t begin, int64_t end);  // elements
  double (*square_sum)(Dtype, const void* grad, int64_t begin, int64_t end);       // elements
};

struct SamplingArgs {
  Dtype dtype;
  int64_t V, row_stride;
  const void* logits;
  const float* temperature;
  const int64_t* top_k;
  const float *top_p, *min_p;
  const int64_t *seed, *position;
  int64_t* ids;
};
struct SamplingLoops {
  void (*sample)(const SamplingArgs&, int64_t begin, int64_t end);  // rows
};

// Each level's loops, by the name of the operation; without x86's levels every name is the generic one.
namespace generic {
extern const AttentionFwdLoops attention_fwd;
extern const AttentionBwdLoops attention_bwd;
extern const CrossEntropyLoops cross_entropy;
extern const AdamWLoops adamw;
extern const SamplingLoops sampling;
}  // namespace generic
#ifdef __x86_64__
namespace avx2 {
extern const AttentionFwdLoops attention_fwd;
extern const AttentionBwdLoops attention_bwd;
extern const CrossEntropyLoops cross_entropy;
extern const AdamWLoops adamw;
extern const SamplingLoops sampling;
}  // namespace avx2
namespace avx512 {
extern const AttentionFwdLoops attention_fwd;
extern const AttentionBwdLoops attention_bwd;
extern const CrossEntropyLoops cross_entropy;
extern const AdamWLoops adamw;
extern const SamplingLoops sampling;
}  // namespace avx512
#else
namespace avx2 = generic;
namespace avx512 = generic;
#endif

}  // namespace gptfast
