// Sums over the lanes of vectors, with the same bits at every level: the engine adds as if each vector had 16 lanes.
//
// engine_loops.cpp turns off the compiler's own fusing of products with sums: a level without fused instructions has
// the same steps, and fused() is a step of its own.
#pragma once

#include "layer_norm.h"
#include "multiply_add.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int LANES = 16, PARTS = LANES / W;  // vectors of this level that are one of 16 lanes

// Adds the parts of a vector of 16 lanes into one of W lanes, as the sum of all lanes begins.
inline vf add_parts(vf (&part)[PARTS]) {
#pragma GCC unroll 2
  for (int half = PARTS / 2; half; half /= 2)
#pragma GCC unroll 2
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// Returns mean and 1 / standard deviation of C elements.
inline RowStats row_stats_of_16_lanes(const float* x, int64_t C, double eps) {
  vf totals[PARTS] = {}, squares[PARTS] = {};
  const auto each = [&](auto f) {
    for (int64_t c = 0; c < C; c += LANES)
#pragma GCC unroll 4
      for (int i = 0; i < PARTS; ++i)
        if (const int64_t n = smaller<int64_t>(W, C - c - i * W); n > 0) f(i, x + c + i * W, n);
  };
  each([&](int i, const float* at, int64_t n) { totals[i] += load_n(at, n); });
  const float mean = (float)((double)sum(add_parts(totals)) / (double)C);
  each([&](int i, const float* at, int64_t n) {
    const vf d = keep_lanes(load_n(at, n) - mean, n);
    squares[i] += d * d;
  });
  return {mean, (float)(1 / sqrt((double)sum(add_parts(squares)) / (double)C + eps))};
}

// While it lives, the thread takes numbers below the smallest normal one for 0, in and out, as tiles and dot products
// of bf16 always do.
class WithoutDenormals {
#if defined(__SSE__) || defined(__aarch64__)
 public:
  WithoutDenormals() : before_(control()) { set(before_ | DENORMALS_ARE_ZERO); }
  ~WithoutDenormals() { set(before_); }
  WithoutDenormals(const WithoutDenormals&) = delete;
  WithoutDenormals& operator=(const WithoutDenormals&) = delete;

 private:
#ifdef __SSE__
  static constexpr uint64_t DENORMALS_ARE_ZERO = 0x8000 | 0x0040;  // FTZ and DAZ: out and in
  static uint64_t control() { return _mm_getcsr(); }
  static void write(uint64_t control) { _mm_setcsr((unsigned)control); }
#else
  // FZ: in and out. A result just below the smallest normal number is 0 here even where it would round up to that
  // number, which other CPUs return.
  static constexpr uint64_t DENORMALS_ARE_ZERO = 1 << 24;
  static uint64_t control() {
    uint64_t fpcr;
    asm volatile("mrs %0, fpcr" : "=r"(fpcr));
    return fpcr;
  }
  static void write(uint64_t control) { asm volatile("msr fpcr, %0" ::"r"(control)); }
#endif
  static void set(uint64_t control) {
    asm volatile("" ::: "memory");  // what reads and writes numbers stays on its side of the change
    write(control);
    asm volatile("" ::: "memory");
  }
  const uint64_t before_;
#else
 public:
  WithoutDenormals() {}
#endif
};

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
