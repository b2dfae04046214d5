// The interface between the engine's wrapper (engine_step.cpp: tensors) and its loops (engine_loops.cpp: pointers,
// compiled once per instruction-set level).
//
// A matrix (N outputs, K inputs) is stored in panels of 32 outputs. A step reads each panel from front to back:
//   fp32: [K][32]    bf16: [K / 2][32][2]    int8: [K / 4][32][4], stored + 128    int4: [K / 32] groups
// A group of int4 is whole numbers from 0 to 15, [32 / 8][32][4] bytes with the first four of eight inputs in the lower
// halves; then a scale and a minimum for each output, [2][32] in bf16: a weight is number x scale + minimum.
// K is padded with zeros to a multiple of 1, 32, 64 or 64 inputs, N to a multiple of 32. Vectors of any width can read
// this order, and so can tiles, so one packed model serves every level.
#pragma once

#include <stdint.h>

namespace gptfast {

constexpr int64_t PANEL = 32;       // outputs in a panel
constexpr int64_t BF16_BLOCK = 32;  // inputs of a product with bf16 weights whose products are added up together
constexpr int64_t INT8_GROUP = 64;  // inputs of a product with int8 weights that share a scale
constexpr int64_t INT4_GROUP = 32;  // int4 weights of an output that share a scale and a minimum
constexpr int64_t INT4_GROUP_BYTES = PANEL * (INT4_GROUP / 2 + 2 * 2);  // in a panel
constexpr int64_t ROW_UNIT = 16;    // rows of converted inputs are padded to a multiple of this
constexpr int64_t CACHE_UNIT = 16;  // a head's keys and values in the cache are padded to a multiple of this

// Up to this number of rows, each thread converts the inputs of a product for itself, which saves a wait.
constexpr int64_t MAX_PRIVATE_ROWS = 4;

enum class WeightType : int64_t { fp32, bf16, int8, int4 };

struct EngineMatrix {
  const char* panels;
  const float *scale, *bias;  // (N padded,); scale is null unless int8, bias may be null
  int64_t N, K;
};
struct EngineNorm {
  const float *weight, *bias;  // (C,)
};
struct EngineLayer {
  EngineNorm ln_1;
  EngineMatrix c_attn, attn_c_proj;
  EngineNorm ln_2;
  EngineMatrix c_fc, mlp_c_proj;
};

// New tokens at consecutive positions of one row.
struct EngineSegment {
  const int32_t* slots;  // the place in the cache of each of the row's tokens, by position
  int64_t start;         // position of the first new token
  int64_t first;         // its index among all tokens of this call
  int64_t n;             // number of new tokens
};

// A barrier at which the threads of one forward wait for each other. The two counters are on cache lines of their own.
struct alignas(128) EngineBarrier {
  alignas(64) int32_t arrived = 0;
  alignas(64) int32_t phase = 0;
};

struct EngineArgs {
  WeightType type;
  int64_t n_layer, n_head, C, D, N;  // N: tokens of this call
  const EngineLayer* layers;
  EngineNorm ln_f;
  EngineMatrix wte, head;
  const float* wpe;  // (block_size, C)
  const EngineSegment* segments;
  int64_t n_segments;
  const int64_t *ids, *positions;  // (N,)
  const int64_t* wanted;           // (n_wanted,): the tokens whose logits are wanted
  int64_t n_wanted;
  char* cache;  // (n_layer, 2, n_head, n_slots, D padded): fp32, bf16, or fp16 beside int8 and int4 weights
  int64_t n_slots;
  float* logits;                   // (n_wanted, V padded to 32)
  float *x, *qkv, *attended, *fc;  // rows padded to 32: N x (C, 3 C, C, 4 C); attended has n_wanted rows if more
  char* inputs;                    // rows converted to the type that a product takes
  float* scratch;                  // scratch_floats for each thread
  int64_t private_inputs_bytes;    // each thread's part of inputs where rows are private
  int64_t scratch_floats;          // of each thread
  EngineBarrier* barrier;
};
struct EngineLoops {
  int64_t (*input_bytes)(WeightType, int64_t K);  // of one converted row of K inputs
  int64_t queries_per_pass;                       // that attention computes side by side
  void (*forward)(const EngineArgs&, int64_t thread, int64_t threads);
};

}  // namespace gptfast
