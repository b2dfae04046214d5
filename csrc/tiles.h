// Tiles: the eight registers of a CPU's matrix engine, 16 rows of 64 bytes each. Two implementations of one interface
// give the same bits: the instructions (Intel's AMX), and an emulation that any CPU runs, for tests.
//
// A thread makes a TileScope before it touches a tile: the shapes of tiles belong to a thread, and PyTorch's own
// products (oneDNN) change them on the threads that we share with it.
#pragma once

#include "vectors.h"

#if defined(GPTFAST_TILES) || defined(GPTFAST_EMULATED_TILES)
#define GPTFAST_HAS_TILES 1

namespace gptfast::GPTFAST_LEVEL {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;  // of a row
constexpr int N_TILES = 8;

// What `ldtilecfg` reads: all tiles have 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  constexpr TileShapes() {
    for (int i = 0; i < N_TILES; ++i) {
      row_bytes[i] = TILE_BYTES;
      rows[i] = TILE_ROWS;
    }
  }
};
static_assert(sizeof(TileShapes) == 64);

#if defined(GPTFAST_TILES)

static constexpr TileShapes TILE_SHAPES;

class TileScope {
 public:
  TileScope() { asm volatile("ldtilecfg %0" ::"m"(TILE_SHAPES)); }
  ~TileScope() { asm volatile("tilerelease" ::); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// Sets tile T to 0.
template <int T>
static inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// Reads or writes the 16 rows of tile T, `stride` bytes apart.
template <int T>
static inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// Adds the product of tiles A and B to tile C. Of A, row m has 32 terms of bf16 (or 64 bytes) of output row m; of B,
// row k has terms 2 k and 2 k + 1 (or 4 k to 4 k + 3) of the 16 output columns, next to each other.
template <int C, int A, int B>
static inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// The bytes of A have a sign, those of B have none.
template <int C, int A, int B>
static inline void tile_dot_int8_uint8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct alignas(64) EmulatedTile {
  uint8_t bytes[TILE_ROWS][TILE_BYTES];
};
inline static thread_local EmulatedTile emulated_tiles[N_TILES];

class TileScope {
 public:
  // Contents that were left behind are no number that anyone could mistake for a sum.
  TileScope() { memset(emulated_tiles, 0xFF, sizeof emulated_tiles); }
  ~TileScope() {}
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <int T>
static inline void tile_zero() {
  memset(emulated_tiles + T, 0, sizeof(EmulatedTile));
}
template <int T>
static inline void tile_load(const void* from, int64_t stride) {
  for (int row = 0; row < TILE_ROWS; ++row)
    memcpy(emulated_tiles[T].bytes[row], (const char*)from + row * stride, TILE_BYTES);
}
template <int T>
static inline void tile_store(void* to, int64_t stride) {
  for (int row = 0; row < TILE_ROWS; ++row) memcpy((char*)to + row * stride, emulated_tiles[T].bytes[row], TILE_BYTES);
}

// What computes with tiles reads and writes nothing else. Sanitizers, under which it would take most of the time, have
// nothing to find there.
#define GPTFAST_ONLY_TILES [[gnu::no_sanitize("address", "undefined")]]

// Returns a number of bf16, or 0 for one below the smallest normal number.
GPTFAST_ONLY_TILES static inline float tile_term(const uint8_t* at) {
  uint16_t bits;
  memcpy(&bits, at, 2);
  const uint32_t wide = (bits & 0x7F80) ? (uint32_t)bits << 16 : (uint32_t)(bits & 0x8000) << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}
GPTFAST_ONLY_TILES static inline float without_denormals(float x) {
  return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x;
}
// Writes the terms of a row, first the even ones, then the odd ones.
GPTFAST_ONLY_TILES static inline void tile_terms(const uint8_t* row, float (&terms)[2][TILE_ROWS]) {
  for (int i = 0; i < TILE_ROWS; ++i)
    for (int odd = 0; odd < 2; ++odd) terms[odd][i] = tile_term(row + 4 * i + 2 * odd);
}

// The hardware's order: a chain of fused products and sums over the even terms from 0, one over the odd terms, their
// sum, and that plus C. Denormals are 0 going in and coming out.
template <int C, int A, int B>
GPTFAST_ONLY_TILES static inline void tile_dot_bf16() {
  float a[2][TILE_ROWS], b[TILE_ROWS][2][TILE_ROWS];
  for (int k = 0; k < TILE_ROWS; ++k) tile_terms(emulated_tiles[B].bytes[k], b[k]);
  for (int m = 0; m < TILE_ROWS; ++m) {
    float sums[2][TILE_ROWS] = {};
    tile_terms(emulated_tiles[A].bytes[m], a);
    for (int k = 0; k < TILE_ROWS; ++k)
      for (int odd = 0; odd < 2; ++odd)
        for (int n = 0; n < TILE_ROWS; ++n)
          sums[odd][n] = without_denormals(__builtin_fmaf(a[odd][k], b[k][odd][n], sums[odd][n]));
    for (int n = 0; n < TILE_ROWS; ++n) {
      float c;
      memcpy(&c, emulated_tiles[C].bytes[m] + 4 * n, 4);
      c = without_denormals(without_denormals(c) + without_denormals(sums[0][n] + sums[1][n]));
      memcpy(emulated_tiles[C].bytes[m] + 4 * n, &c, 4);
    }
  }
}
template <int C, int A, int B>
GPTFAST_ONLY_TILES static inline void tile_dot_int8_uint8() {
  for (int m = 0; m < TILE_ROWS; ++m)
    for (int n = 0; n < TILE_ROWS; ++n) {
      int32_t c;
      memcpy(&c, emulated_tiles[C].bytes[m] + 4 * n, 4);
      for (int k = 0; k < TILE_ROWS; ++k)
        for (int i = 0; i < 4; ++i)
          c += (int8_t)emulated_tiles[A].bytes[m][4 * k + i] * emulated_tiles[B].bytes[k][4 * n + i];
      memcpy(emulated_tiles[C].bytes[m] + 4 * n, &c, 4);
    }
}

#undef GPTFAST_ONLY_TILES

#endif

}  // namespace gptfast::GPTFAST_LEVEL

#endif
