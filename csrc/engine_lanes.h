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
#ifdef __SSE__
 public:
  WithoutDenormals() : before_(_mm_getcsr()) { set(before_ | FLUSH_TO_ZERO | DENORMALS_ARE_ZERO); }
  ~WithoutDenormals() { set(before_); }
  WithoutDenormals(const WithoutDenormals&) = delete;
  WithoutDenormals& operator=(const WithoutDenormals&) = delete;

 private:
  static constexpr unsigned FLUSH_TO_ZERO = 0x8000, DENORMALS_ARE_ZERO = 0x0040;
  static void set(unsigned control) {
    asm volatile("" ::: "memory");  // what reads and writes numbers stays on its side of the change
    _mm_setcsr(control);
    asm volatile("" ::: "memory");
  }
  const unsigned before_;
#else
 public:
  WithoutDenormals() {}
#endif
};

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
