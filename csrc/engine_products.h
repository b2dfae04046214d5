// Products of rows with a packed matrix (engine.h), for one row and for hundreds.
//
// The order of every sum is the same, whatever other rows are in the call. So a token gets the same numbers alone, in a
// batch, in a prompt, or as one of several guesses that are checked at once.
#pragma once

#include "engine_weights.h"
#include "gelu.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// The inputs of a block of rows, which stay in the second-level cache.
constexpr int64_t INPUT_BYTES_PER_BLOCK = 256 * 1024;

// A product y = rows W^T + bias, and its epilogue.

enum class Epilogue { store, add_to_y, gelu };

struct Product {
  const EngineMatrix* matrix;
  const char* rows;
  int64_t row_bytes, N;  // from one row of inputs to the next, and the number of rows
  float* y;
  int64_t y_row_stride;
  Epilogue epilogue;
};

// Writes the sums of `rows` rows from row m on, PANEL for each.
inline void finish(const Product& p, const float* sums, int64_t panel, int64_t m, int64_t rows) {
  const EngineMatrix& matrix = *p.matrix;
  for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      const int64_t column = panel * PANEL + n * W;
      float* y = p.y + (m + i) * p.y_row_stride + column;
      vf value = load(sums + i * PANEL + n * W);
      if (matrix.scale) value *= load(matrix.scale + column);
      if (matrix.bias) value += load(matrix.bias + column);
      if (p.epilogue == Epilogue::add_to_y) value += load(y);
      if (p.epilogue == Epilogue::gelu) value = value * Gelu(value).s;
      store(y, value);
    }
}

// Multiplies M rows from row m on with one panel. The last of them may be padding.
template <class Way, int M>
void multiply_rows(const Product& p, int64_t panel_bytes, int64_t panel, int64_t m) {
  alignas(64) float sums[M * PANEL] = {};
  const EngineMatrix& matrix = *p.matrix;
  Way::template add<M>(sums, matrix.panels + panel * panel_bytes, matrix.K, p.rows + m * p.row_bytes, p.row_bytes);
  finish(p, sums, panel, m, smaller<int64_t>(M, p.N - m));
}

constexpr int next_fewer_rows(int M) { return M == 12 ? 8 : M == 6 ? 4 : M == 3 ? 2 : M / 2; }

// Multiplies rows m .. end with one panel, M at a time and then fewer.
template <class Way, int M = Way::ROWS>
void multiply_all_rows(const Product& p, int64_t panel_bytes, int64_t panel, int64_t m, int64_t end) {
  for (; m + (M == Way::MIN_ROWS ? 1 : M) <= end; m += M) multiply_rows<Way, M>(p, panel_bytes, panel, m);
  if constexpr (M > Way::MIN_ROWS)
    if (m < end) multiply_all_rows<Way, next_fewer_rows(M)>(p, panel_bytes, panel, m, end);
}

// Multiplies all rows with panels begin .. end, in blocks of rows.
template <class Way>
void multiply_panels(const Product& p, int64_t panel_bytes, int64_t begin, int64_t end) {
  const int64_t block = larger<int64_t>(1, INPUT_BYTES_PER_BLOCK / p.row_bytes / Way::ROWS) * Way::ROWS;
  for (int64_t m = 0; m < p.N; m += block)
    for (int64_t panel = begin; panel < end; ++panel)
      multiply_all_rows<Way>(p, panel_bytes, panel, m, smaller(p.N, m + block));
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
