// What the engine's wrapper (engine.cpp, with ATen) and its loops (per level, without) share.
//
// A matrix (N outputs, K inputs) lies in panels of 32 outputs, each read from front to back once a token:
//   fp32: [K][32]    bf16: [K / 2][32][2]    int8: [K / 4][32][4], stored + 128
// K is padded with zeros to a multiple of UNIT of its type, N to 32. These are in the order in which
// vectors of any width take them, so one packed model serves every instruction-set level.
#pragma once

#include <stdint.h>

namespace gptfast {

constexpr int64_t PANEL = 32;
constexpr int64_t GROUP = 64;  // of int8's inputs that share a scale

constexpr int64_t ENGINE_ALONE =
    4;  // up to so many rows, each thread makes a product's inputs for itself: that saves a meeting

enum class WeightType : int64_t { fp32, bf16, int8 };

struct EngineMatrix {
  const char* panels;
  const float *scale, *bias;  // (N padded,); scale for int8 only, bias or null
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

// Tokens that follow one another in a row of the cache.
struct EngineSegment {
  const int32_t* slots;     // of the row's tokens, in their order: where in the cache each one is
  int64_t start, first, n;  // position of the first; its index among this call's tokens; how many
};

// Threads that run one forward meet here. On lines of their own.
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
  const int64_t* wanted;           // (n_wanted,): of which tokens logits are wanted
  int64_t n_wanted;
  char* cache;  // (n_layer, 2, n_head, n_slots, D padded to 16): fp32, bf16, or fp16 for int8
  int64_t n_slots;
  float* logits;                        // (n_wanted, V padded to 32)
  float *x, *qkv, *mixed, *fc;          // rows padded to 32: N x (C, 3 C, C, 4 C)
  char* inputs;                         // rows as a product takes them
  float* scores;                        // per thread
  int64_t inputs_bytes, scores_floats;  // per thread; inputs of all threads lie side by side
  EngineBarrier* barrier;
};
struct EngineLoops {
  int64_t (*input_bytes)(WeightType, int64_t K);  // of one row of a product's inputs
  int64_t queries;                                // that attention takes at a time
  void (*forward)(const EngineArgs&, int64_t thread, int64_t threads);
};

}  // namespace gptfast
