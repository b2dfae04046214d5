// The interface between the wrappers (<op>.cpp: tensors, compiled once) and the loops (<op>_loops.cpp: pointers,
// compiled once per instruction-set level). A wrapper fills an Args struct and calls a function of loops() in level.h.
//
// begin and end limit a call to a share of the work, which the wrapper gives to one thread.
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

// A tensor (B, H, T, D). Strides are in elements; those of D are contiguous.
struct Heads {
  void* data;
  int64_t batch_stride, head_stride, time_stride;
};

struct AttentionArgs {
  Dtype dtype;
  int parts;  // of bf16 that make an fp32 number as exact as asked for: 1, 2, or 3 for all of it
  int64_t B, H, Tq, Tk, D;
  double scale, dropout_p;
  uint64_t seed;
  const int64_t* kv_len;  // (B,) or null
  Heads q, k, v, out;
  double* lse;  // (B, H, Tq); fp32 would be off by |lse| * 6e-8, and every P of a backward that reads it
  Heads dout, dq, dk, dv;
};
struct AttentionFwdLoops {
  int64_t (*count_items)(const AttentionArgs&);
  void (*run)(const AttentionArgs&, int64_t begin, int64_t end);  // items
};
struct AttentionBwdLoops {
  void (*run)(const AttentionArgs&, int64_t begin, int64_t end);  // heads, of B * H
};

struct CrossEntropyArgs {
  Dtype dtype;
  int64_t V, row_stride;
  int64_t ignore_index;
  float label_smoothing, z_loss;
  const void* logits;     // (N, V), rows row_stride apart
  const int64_t* target;  // (N,)
  float* loss;            // (N,)
  double* stats;          // (N, STATS); of an ignored row both are 0
  const float* dloss;     // (N,)
  void* dlogits;          // (N, V) contiguous; bwd may write over the logits
};
// The columns of stats: a row's maximum m and sum_j exp(x_j - m). Their logarithm m + log(sum) would round the sum away
// where |m| is large.
constexpr int64_t STAT_TOP = 0, STAT_EXP_SUM = 1, STATS = 2;

struct CrossEntropyLoops {
  void (*fwd)(const CrossEntropyArgs&, int64_t begin, int64_t end);      // rows
  void (*bwd)(const CrossEntropyArgs&, int64_t begin, int64_t end);      // rows
  void (*fwd_bwd)(const CrossEntropyArgs&, int64_t begin, int64_t end);  // rows, each while it is in cache
  // Sets marks[j] to whether column j of x (N, V) has an entry |x_j| above its row's limit; columns begin .. end.
  void (*mark_columns)(Dtype, const void* x, int64_t N, int64_t V, const float* limits, uint8_t* marks, int64_t begin,
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

// c (M x N) = a (M x K) b (K x N) + bias (N,), or c += a b. Strides are in elements.
struct MatmulArgs {
  int64_t M, N, K;
  const float* a;
  int64_t a_row_stride, a_col_stride;
  const float* b;
  int64_t b_row_stride, b_col_stride;
  float* c;
  int64_t c_row_stride;
  const float* bias;  // or null
  bool accumulate;
};
struct MatmulLoops {
  int64_t vector_floats;            // in a register of this level
  int64_t tile_rows, tile_columns;  // a thread's share of c should be a multiple of these
  void (*run)(const MatmulArgs&, int64_t m0, int64_t m1, int64_t n0, int64_t n1);  // a rectangle of c
};

// c (M x N) = a (M x K) b (K x N) + bias (N,) + residual (M, N) + c if accumulate, summed in fp32 and rounded once. A b
// of fp32 is rounded to bf16 as it is read.
struct MatmulBf16Args {
  int64_t M, N, K;
  const bf16* a;
  int64_t a_row_stride, a_col_stride;
  const void* b;
  int64_t b_row_stride, b_col_stride;
  Dtype b_dtype, c_dtype;  // bf16 or fp32
  void* c;
  int64_t c_row_stride;
  const bf16* bias;      // or null
  const void* residual;  // in c's dtype; or null
  int64_t residual_row_stride;
  bool accumulate;
};
struct MatmulBf16Loops {
  int64_t tile_rows, tile_columns;  // a thread's share of c should be a multiple of these
  void (*run)(const MatmulBf16Args&, int64_t m0, int64_t m1, int64_t n0, int64_t n1);  // a rectangle of c
};

// c (M x N) = a (M x K) b (K x N) + bias (N,) + residual (M, N) + c if accumulate, of fp32 numbers. Each number of a
// and b counts as the sum of its first `parts` bf16 parts: x rounded to bf16, what is left of it rounded to bf16, and
// so on.
struct MatmulPartsArgs {
  int64_t M, N, K;
  const float* a;
  int64_t a_row_stride, a_col_stride;
  const float* b;
  int64_t b_row_stride, b_col_stride;
  float* c;
  int64_t c_row_stride;
  const float* bias;      // or null
  const float* residual;  // or null
  int64_t residual_row_stride;
  bool accumulate;
  int parts;  // 1 to max_parts
};
struct MatmulPartsLoops {
  int max_parts;                    // with more parts, or where this is 0, fp32 products are faster
  int64_t tile_rows, tile_columns;  // a thread's share of c should be a multiple of these
  void (*run)(const MatmulPartsArgs&, int64_t m0, int64_t m1, int64_t n0, int64_t n1);  // a rectangle of c
};

// Layer norm of x (N, C) to y (N, C). In the backward, y is the gradient of the output.
struct NormArgs {
  Dtype x_dtype, y_dtype;  // equal, or x is fp32
  int64_t N, C;
  float eps;
  bool compute_stats;  // or read them
  const void* x;
  const float *weight, *bias;  // (C,)
  float* stats;                // (N, 2): mean, 1 / standard deviation
  void* y;
  void* dx;
  const void* residual;  // (N, C) in x's dtype, added to dx; or null
  float *dweight, *dbias;
};
struct NormLoops {
  void (*normalize)(const NormArgs&, int64_t begin, int64_t end);    // rows
  void (*bwd_columns)(const NormArgs&, int64_t begin, int64_t end);  // columns; begin is a multiple of 64
  void (*bwd_rows)(const NormArgs&, int64_t begin, int64_t end);     // rows; dx may be y
  // Sets sums[c] to the sum of column c of x (N, C); columns begin .. end, begin a multiple of 64.
  void (*sum_columns)(Dtype, const void* x, int64_t N, int64_t C, float* sums, int64_t begin, int64_t end);
};

struct MlpLoops {
  void (*gelu_fwd)(Dtype, const void* x, void* y, int64_t begin, int64_t end);  // elements
  // Writes y = gelu(x) and replaces dy by dx.
  void (*gelu_bwd)(Dtype, const void* x, void* y, void* dy, int64_t begin, int64_t end);  // elements
};

struct EngineLoops;  // engine.h

// The loops of one instruction-set level. Where a level has none of its own, a null pointer in loops_table.cpp, it
// runs those of the level below.
struct Loops {
  const AttentionFwdLoops* attention_fwd;
  const AttentionBwdLoops* attention_bwd;
  const CrossEntropyLoops* cross_entropy;
  const AdamWLoops* adamw;
  const SamplingLoops* sampling;
  const MatmulLoops* matmul;
  const MatmulBf16Loops* matmul_bf16;
  const MatmulPartsLoops* matmul_parts;
  const NormLoops* norm;
  const MlpLoops* mlp;
  const EngineLoops* engine;
};

}  // namespace gptfast
