// What the wrappers (compiled once, with ATen) and the loops (compiled per level, without) share.
#pragma once

#include <stdint.h>

#include "engine.h"

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
  // marks[j] = whether a row of x (N, V) has an entry |x_j| above its limit, columns begin .. end
  void (*mark)(Dtype, const void* x, int64_t N, int64_t V, const float* limits, uint8_t* marks, int64_t begin,
               int64_t end);
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

// c (M x N) = a (M x K) b (K x N), strides in elements; then + bias (N,), or added to c.
struct MatmulArgs {
  int64_t M, N, K;
  const float* a;
  int64_t a_row, a_col;
  const float* b;
  int64_t b_row, b_col;
  float* c;
  int64_t ldc;
  const float* bias;  // or null
  bool accumulate;
};
struct MatmulLoops {
  int64_t tile_rows, tile_columns;
  void (*run)(const MatmulArgs&, int64_t m0, int64_t m1, int64_t n0, int64_t n1);  // a rectangle of c
};

// Layer norm of x (N, C) to y (N, C). Backward, y is the gradient of the output.
struct NormArgs {
  Dtype x_dtype, y_dtype;  // the same, or x is fp32
  int64_t N, C;
  float eps;
  bool fresh;  // whether stats are to be computed
  const void* x;
  const float *weight, *bias;  // (C,)
  float* stats;                // (N, 2): mean, 1 / standard deviation
  void* y;
  void* dx;
  const void* residual;  // (N, C) as x, added to dx; or null
  float *dweight, *dbias;
};
struct NormLoops {
  void (*normalize)(const NormArgs&, int64_t begin, int64_t end);    // rows
  void (*bwd_columns)(const NormArgs&, int64_t begin, int64_t end);  // columns from a multiple of 64 on
  void (*bwd_rows)(const NormArgs&, int64_t begin, int64_t end);     // rows; dx may be y
  void (*sum_columns)(Dtype, const void* x, int64_t N, int64_t C, float* to, int64_t begin, int64_t end);
};

struct MlpLoops {
  void (*gelu_fwd)(Dtype, const void* x, void* y, int64_t begin, int64_t end);            // elements
  void (*gelu_bwd)(Dtype, const void* x, void* y, void* dy, int64_t begin, int64_t end);  // elements
};

// Each level's loops, by the name of the operation; without x86's levels every name is the generic one.
namespace generic {
extern const AttentionFwdLoops attention_fwd;
extern const AttentionBwdLoops attention_bwd;
extern const CrossEntropyLoops cross_entropy;
extern const AdamWLoops adamw;
extern const SamplingLoops sampling;
extern const MatmulLoops matmul;
extern const NormLoops norm;
extern const MlpLoops mlp;
extern const EngineLoops engine;
}  // namespace generic
#ifdef __x86_64__
namespace avx2 {
extern const AttentionFwdLoops attention_fwd;
extern const AttentionBwdLoops attention_bwd;
extern const CrossEntropyLoops cross_entropy;
extern const AdamWLoops adamw;
extern const SamplingLoops sampling;
extern const MatmulLoops matmul;
extern const NormLoops norm;
extern const MlpLoops mlp;
extern const EngineLoops engine;
}  // namespace avx2
namespace avx512 {
extern const AttentionFwdLoops attention_fwd;
extern const AttentionBwdLoops attention_bwd;
extern const CrossEntropyLoops cross_entropy;
extern const AdamWLoops adamw;
extern const SamplingLoops sampling;
extern const MatmulLoops matmul;
extern const NormLoops norm;
extern const MlpLoops mlp;
extern const EngineLoops engine;
}  // namespace avx512
// Of these only the engine makes use.
namespace avx512_vnni {
extern const EngineLoops engine;
}
namespace avx512_bf16 {
extern const EngineLoops engine;
}
#else
namespace avx2 = generic;
namespace avx512 = generic;
namespace avx512_vnni = generic;
namespace avx512_bf16 = generic;
#endif

}  // namespace gptfast
