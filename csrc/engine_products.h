// Products of rows with a packed matrix (engine.h), for one row and for hundreds.
//
// The order of every sum is the same, whatever other rows are in the call: the products of BLOCK inputs are added one
// after the other, then the sums of the blocks. So a token gets the same numbers alone, in a batch, in a prompt, or as
// one of several guesses that are checked at once.
#pragma once

#include "engine.h"
#include "gelu.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int NV = PANEL / W;                      // vectors across a panel
constexpr int MR = W == 16 ? 12 : W == 8 ? 3 : 1;  // rows whose sums fit in the registers
// From what is read now to what is prefetched: a page, at whose end the hardware's prefetching stops.
constexpr int64_t PREFETCH_BYTES = 4096;
// The inputs of a block of rows, which stay in the second-level cache.
constexpr int64_t INPUT_BYTES_PER_BLOCK = 256 * 1024;

#if defined(__AVX512VNNI__)
typedef int8_t quant;
#else
typedef int16_t quant;
#endif

inline void prefetch_weights(const char* p) {
#pragma GCC unroll 2
  for (int64_t line = 0; line < NV * W * 4; line += 64) __builtin_prefetch(p + line + PREFETCH_BYTES);
}

template <class T>
inline T load_as(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

// Adds parts to total, vector by vector.
template <int M>
inline void add(vf (&total)[M][NV], const vf (&parts)[M][NV]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) total[m][n] += parts[m][n];
}

// The three types of weights: the form of a row of inputs, and the sums of M rows across a panel.

struct Fp32 {
  static constexpr int64_t BLOCK = 128, UNIT = 1, SIZE = 4;
  static constexpr bool TAKES_FLOATS = true;  // its inputs need no conversion
  static int64_t bytes(int64_t K) { return round_up(K, 16) * 4; }

  static void convert(const float* x, int64_t K, char* row) { memcpy(row, x, K * 4); }

  template <int M>
  static void sums(vf (&total)[M][NV], const char* panel, int64_t K, const char* rows, int64_t row_bytes) {
    for (int64_t begin = 0; begin < K; begin += BLOCK) {
      vf parts[M][NV] = {};
      for (int64_t k = begin; k < smaller(K, begin + BLOCK); ++k, panel += PANEL * 4) {
        prefetch_weights(panel);
        vf w[NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) w[n] = load((const float*)panel + n * W);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          const vf x = splat(load_as<float>(rows + m * row_bytes + k * 4));
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n) parts[m][n] += x * w[n];
        }
      }
      add(total, parts);
    }
  }
  static float weight(const char* panel, int64_t lane, int64_t k) { return ((const float*)panel)[k * PANEL + lane]; }
};

struct Bf16 {
  static constexpr int64_t BLOCK = 128, UNIT = 2, SIZE = 2;
  static constexpr bool TAKES_FLOATS = false;
  static int64_t bytes(int64_t K) { return round_up(K, 32) * 2; }

  static void convert(const float* x, int64_t K, char* row) {
    for (int64_t k = 0; k < K; k += W) store((bf16*)row + k, load_n(x + k, smaller<int64_t>(W, K - k)));
  }

  // Returns sum + the two products of each output's pair of weights with the pair of inputs.
  static vf add_pair(vf sum, vu w, uint32_t x) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#else
    sum += (vf)splat(x << 16) * (vf)(w << 16);
    return sum + (vf)splat(x & 0xFFFF0000u) * (vf)(w & 0xFFFF0000u);
#endif
  }
  template <int M>
  static void sums(vf (&total)[M][NV], const char* panel, int64_t K, const char* rows, int64_t row_bytes) {
    for (int64_t begin = 0; begin < K; begin += BLOCK) {
      vf parts[M][NV] = {};
      for (int64_t k = begin; k < smaller(K, begin + BLOCK); k += 2, panel += PANEL * 4) {
        prefetch_weights(panel);
        vu w[NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) w[n] = (vu)load((const float*)panel + n * W);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          const uint32_t x = load_as<uint32_t>(rows + m * row_bytes + k * 2);
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n) parts[m][n] = add_pair(parts[m][n], w[n], x);
        }
      }
      add(total, parts);
    }
  }
  static float weight(const char* panel, int64_t lane, int64_t k) {
    return load_one((const bf16*)panel + k / 2 * 2 * PANEL + lane * 2 + k % 2);
  }
};

// INT8_GROUP inputs as whole numbers from -127 to 127 times one scale. Weights are stored + 128, because the CPU
// multiplies unsigned with signed bytes. This adds 128 times the inputs to each sum, and `shift` subtracts it.
struct QuantGroup {
  float scale;
  int32_t shift;
  quant x[INT8_GROUP];  // in fours; if 16 bits wide, each four is in the order 0 2 1 3
};

struct Int8 {
  static constexpr int64_t UNIT = INT8_GROUP, SIZE = 1;
  static constexpr bool TAKES_FLOATS = false;
  static int64_t bytes(int64_t K) { return (K + INT8_GROUP - 1) / INT8_GROUP * (int64_t)sizeof(QuantGroup); }

  // Stores whole numbers as bytes, or as 16 bits in the order 0 2 1 3.
  static void store_quants(quant* to, vi q) {
#if defined(__AVX512VNNI__)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)q));
#else
    *(vh_any*)to = narrow((vu)order_0213(q, std::make_index_sequence<W>()));
#endif
  }
  template <size_t... I>
  static vi order_0213(vi q, std::index_sequence<I...>) {
    return __builtin_shufflevector(q, q, (I / 4 * 4 + I % 2 * 2 + I % 4 / 2)...);
  }

  static void quantize(const float* x, int64_t n, QuantGroup& group) {
    vf largest = {}, values[INT8_GROUP / W];
    vi nan = {}, quant_sum = {};
    for (int64_t i = 0; i < INT8_GROUP / W; ++i) {
      const int64_t left = n - i * W;
      values[i] = left >= W ? load(x + i * W) : left > 0 ? load_part(x + i * W, left) : vf{};
      largest = max((vf)((vu)values[i] & 0x7FFFFFFFu), largest);
      nan |= values[i] != values[i];
    }
    const float top = max(largest), inverse = top > 1e-30f && top < INFINITY ? 127.0f / top : 0.0f;
    for (int64_t i = 0; i < INT8_GROUP / W; ++i) {
      const vf scaled = values[i] * inverse;
      const vi q = ((vi)(scaled + MAGIC) - (vi)splat(MAGIC)) & (scaled == scaled);
      quant_sum += q;
      store_quants(group.x + i * W, q);
    }
    group.scale = any(nan) ? NAN : top / 127.0f;
    group.shift = -128 * sum(quant_sum);
  }
  static void convert(const float* x, int64_t K, char* row) {
    for (int64_t k = 0; k < K; k += INT8_GROUP, row += sizeof(QuantGroup)) quantize(x + k, K - k, *(QuantGroup*)row);
  }

#if defined(__AVX512VNNI__)
  static vi add_four(vi sum, vi w, const quant* x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(load_as<int>(x)));
  }
#else
  // Multiplies 16-bit numbers and adds neighbouring products.
  static vi multiply_pairs(vi a, vi b) {
#if defined(__AVX512F__)
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
  }
  static vi add_four(vi sum, vi w, const quant* x) {
    const vi even = (vi)((vu)w & 0x00FF00FFu), odd = (vi)(((vu)w >> 8) & 0x00FF00FFu);
    return sum + multiply_pairs(even, (vi)splat(load_as<uint32_t>(x))) +
           multiply_pairs(odd, (vi)splat(load_as<uint32_t>(x + 2)));
  }
#endif
  template <int M>
  static void sums(vf (&total)[M][NV], const char* panel, int64_t K, const char* rows, int64_t row_bytes) {
    for (int64_t begin = 0; begin < K; begin += INT8_GROUP, rows += sizeof(QuantGroup)) {
      vi parts[M][NV];
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const vu shift = splat((uint32_t)((const QuantGroup*)(rows + m * row_bytes))->shift);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) parts[m][n] = (vi)shift;
      }
      for (int64_t k = 0; k < INT8_GROUP; k += 4, panel += PANEL * 4) {
        prefetch_weights(panel);
        vi w[NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) w[n] = (vi)load((const float*)panel + n * W);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n)
            parts[m][n] = add_four(parts[m][n], w[n], ((const QuantGroup*)(rows + m * row_bytes))->x + k);
      }
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const vf scale = splat(((const QuantGroup*)(rows + m * row_bytes))->scale);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) total[m][n] += __builtin_convertvector(parts[m][n], vf) * scale;
      }
    }
  }
  static float weight(const char* panel, int64_t lane, int64_t k) {
    return (float)((uint8_t)panel[k / 4 * 4 * PANEL + lane * 4 + k % 4] - 128);
  }
};

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

// Multiplies M rows from row m on with one panel.
template <class Type, int M>
void multiply_rows(const Product& p, int64_t panel_bytes, int64_t panel, int64_t m) {
  vf total[M][NV] = {};
  const EngineMatrix& matrix = *p.matrix;
  Type::template sums<M>(total, matrix.panels + panel * panel_bytes, matrix.K, p.rows + m * p.row_bytes, p.row_bytes);
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      const int64_t column = panel * PANEL + n * W;
      float* y = p.y + (m + i) * p.y_row_stride + column;
      vf value = total[i][n];
      if (matrix.scale) value *= load(matrix.scale + column);
      if (matrix.bias) value += load(matrix.bias + column);
      if (p.epilogue == Epilogue::add_to_y) value += load(y);
      if (p.epilogue == Epilogue::gelu) value = value * Gelu(value).s;
      store(y, value);
    }
}

constexpr int next_fewer_rows(int M) { return M == 12 ? 8 : M == 3 ? 2 : M / 2; }

// Multiplies rows m .. end with one panel, M at a time and then fewer.
template <class Type, int M = MR>
void multiply_all_rows(const Product& p, int64_t panel_bytes, int64_t panel, int64_t m, int64_t end) {
  for (; m + M <= end; m += M) multiply_rows<Type, M>(p, panel_bytes, panel, m);
  if constexpr (M > 1) multiply_all_rows<Type, next_fewer_rows(M)>(p, panel_bytes, panel, m, end);
}

// Multiplies all rows with panels begin .. end, in blocks of rows.
template <class Type>
void multiply_panels(const Product& p, int64_t panel_bytes, int64_t begin, int64_t end) {
  const int64_t block = larger<int64_t>(1, INPUT_BYTES_PER_BLOCK / p.row_bytes / MR) * MR;
  for (int64_t m = 0; m < p.N; m += block)
    for (int64_t panel = begin; panel < end; ++panel)
      multiply_all_rows<Type>(p, panel_bytes, panel, m, smaller(p.N, m + block));
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
