// Rows times a packed matrix (engine.h), for one row and for hundreds.
//
// Every sum is taken in the same order whatever the rows beside it: products of BLOCK inputs one after
// the other, block after block. So a token's numbers are the same alone, in a batch, in a prompt or as
// one of several that are tried at once.
#pragma once

#include "gelu.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int NV = PANEL / W;                      // vectors across a panel
constexpr int MR = W == 16 ? 12 : W == 8 ? 3 : 1;  // rows whose sums fit the registers
constexpr int64_t AHEAD = 4096;  // bytes from what is read to what is asked for: beyond a page's end too

#if defined(__AVX512VNNI__)
constexpr bool VNNI = true;
typedef int8_t quant;
#else
constexpr bool VNNI = false;
typedef int16_t quant;
#endif
#if defined(__AVX512BF16__)
constexpr bool BF16 = true;
#else
constexpr bool BF16 = false;
#endif

inline void ask_ahead(const char* p) {
#pragma GCC unroll 2
  for (int64_t line = 0; line < NV * W * 4; line += 64) __builtin_prefetch(p + line + AHEAD);
}

template <class T>
inline T peek(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

// total[m][n] += parts[m][n]
template <int M>
inline void add(vf (&total)[M][NV], const vf (&parts)[M][NV]) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) total[m][n] += parts[m][n];
}

// ---- The three types of weights: how a row of inputs is laid out, and the sums of M rows across a panel.

struct Fp32 {
  static constexpr int64_t BLOCK = 128, UNIT = 1, SIZE = 4;
  static constexpr bool AS_IS = true;  // floats need no conversion
  static int64_t bytes(int64_t K) { return round_up(K, 16) * 4; }

  static void convert(const float* x, int64_t K, char* row) { memcpy(row, x, K * 4); }

  template <int M>
  static void sums(vf (&total)[M][NV], const char* panel, int64_t K, const char* rows, int64_t stride) {
    for (int64_t begin = 0; begin < K; begin += BLOCK) {
      vf parts[M][NV] = {};
      for (int64_t k = begin; k < smaller(K, begin + BLOCK); ++k, panel += PANEL * 4) {
        ask_ahead(panel);
        vf w[NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) w[n] = load((const float*)panel + n * W);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          const vf x = splat(peek<float>(rows + m * stride + k * 4));
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
  static constexpr bool AS_IS = false;
  static int64_t bytes(int64_t K) { return round_up(K, 32) * 2; }

  static void convert(const float* x, int64_t K, char* row) {
    for (int64_t k = 0; k < K; k += W) store((bf16*)row + k, load_n(x + k, smaller<int64_t>(W, K - k)));
  }

  // sum += the two products of each output's pair of weights with the pair of inputs
  static vf pair(vf sum, vu w, uint32_t x) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#else
    sum += (vf)splat(x << 16) * (vf)(w << 16);
    return sum + (vf)splat(x & 0xFFFF0000u) * (vf)(w & 0xFFFF0000u);
#endif
  }
  template <int M>
  static void sums(vf (&total)[M][NV], const char* panel, int64_t K, const char* rows, int64_t stride) {
    for (int64_t begin = 0; begin < K; begin += BLOCK) {
      vf parts[M][NV] = {};
      for (int64_t k = begin; k < smaller(K, begin + BLOCK); k += 2, panel += PANEL * 4) {
        ask_ahead(panel);
        vu w[NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) w[n] = (vu)load((const float*)panel + n * W);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          const uint32_t x = peek<uint32_t>(rows + m * stride + k * 2);
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n) parts[m][n] = pair(parts[m][n], w[n], x);
        }
      }
      add(total, parts);
    }
  }
  static float weight(const char* panel, int64_t lane, int64_t k) {
    return load_one((const bf16*)panel + k / 2 * 2 * PANEL + lane * 2 + k % 2);
  }
};

// GROUP inputs as whole numbers from -127 to 127 times one scale. Weights are stored + 128, which the products of
// unsigned with signed bytes want; what that adds to a sum, 128 times the inputs, `shift` takes off.
struct QuantGroup {
  float scale;
  int32_t shift;
  quant x[GROUP];  // in fours; as 16 bits, in the order 0 2 1 3
};

struct Int8 {
  static constexpr int64_t UNIT = GROUP, SIZE = 1;
  static constexpr bool AS_IS = false;
  static int64_t bytes(int64_t K) { return (K + GROUP - 1) / GROUP * (int64_t)sizeof(QuantGroup); }

  // Whole numbers as bytes, or as 16 bits in the order 0 2 1 3.
  static void put(quant* to, vi q) {
#if defined(__AVX512VNNI__)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)q));
#else
    *(vh_any*)to = narrow((vu)in_pairs(q, std::make_index_sequence<W>()));
#endif
  }
  template <size_t... I>
  static vi in_pairs(vi q, std::index_sequence<I...>) {
    return __builtin_shufflevector(q, q, (I / 4 * 4 + I % 2 * 2 + I % 4 / 2)...);
  }

  static void quantize(const float* x, int64_t n, QuantGroup& group) {
    vf largest = {}, values[GROUP / W];
    vi wrong = {}, sum = {};
    for (int64_t i = 0; i < GROUP / W; ++i) {
      const int64_t left = n - i * W;
      values[i] = left >= W ? load(x + i * W) : left > 0 ? load_part(x + i * W, left) : vf{};
      largest = max((vf)((vu)values[i] & 0x7FFFFFFFu), largest);
      wrong |= values[i] != values[i];
    }
    const float top = max(largest), inverse = top > 1e-30f && top < INFINITY ? 127.0f / top : 0.0f;
    for (int64_t i = 0; i < GROUP / W; ++i) {
      const vf scaled = values[i] * inverse;
      const vi q = ((vi)(scaled + MAGIC) - (vi)splat(MAGIC)) & (scaled == scaled);
      sum += q;
      put(group.x + i * W, q);
    }
    group.scale = any(wrong) ? NAN : top / 127.0f;
    group.shift = -128 * total(sum);
  }
  static void convert(const float* x, int64_t K, char* row) {
    for (int64_t k = 0; k < K; k += GROUP, row += sizeof(QuantGroup)) quantize(x + k, K - k, *(QuantGroup*)row);
  }

#if defined(__AVX512VNNI__)
  static vi four(vi sum, vi w, const quant* x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(peek<int>(x)));
  }
#else
  // The sums of two neighbouring products of 16 bits.
  static vi pairs(vi a, vi b) {
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
  static vi four(vi sum, vi w, const quant* x) {
    const vi even = (vi)((vu)w & 0x00FF00FFu), odd = (vi)(((vu)w >> 8) & 0x00FF00FFu);
    return sum + pairs(even, (vi)splat(peek<uint32_t>(x))) + pairs(odd, (vi)splat(peek<uint32_t>(x + 2)));
  }
#endif
  template <int M>
  static void sums(vf (&total)[M][NV], const char* panel, int64_t K, const char* rows, int64_t stride) {
    for (int64_t begin = 0; begin < K; begin += GROUP, rows += sizeof(QuantGroup)) {
      vi parts[M][NV];
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const vu shift = splat((uint32_t)((const QuantGroup*)(rows + m * stride))->shift);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) parts[m][n] = (vi)shift;
      }
      for (int64_t k = 0; k < GROUP; k += 4, panel += PANEL * 4) {
        ask_ahead(panel);
        vi w[NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) w[n] = (vi)load((const float*)panel + n * W);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n)
            parts[m][n] = four(parts[m][n], w[n], ((const QuantGroup*)(rows + m * stride))->x + k);
      }
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const vf scale = splat(((const QuantGroup*)(rows + m * stride))->scale);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) total[m][n] += __builtin_convertvector(parts[m][n], vf) * scale;
      }
    }
  }
  static float weight(const char* panel, int64_t lane, int64_t k) {
    return (float)((uint8_t)panel[k / 4 * 4 * PANEL + lane * 4 + k % 4] - 128);
  }
};

// ---- A product: y = rows W^T + bias, added to y, or through GELU.

enum class Into { store, add, gelu };

struct Product {
  const EngineMatrix* matrix;
  const char* rows;
  int64_t stride, N;  // of inputs: bytes from row to row, and how many
  float* y;
  int64_t ldy;
  Into into;
};

template <class Type, int M>
void some_rows(const Product& p, int64_t panel_bytes, int64_t panel, int64_t m) {
  vf total[M][NV] = {};
  const EngineMatrix& matrix = *p.matrix;
  Type::template sums<M>(total, matrix.panels + panel * panel_bytes, matrix.K, p.rows + m * p.stride, p.stride);
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      const int64_t column = panel * PANEL + n * W;
      float* y = p.y + (m + i) * p.ldy + column;
      vf value = total[i][n];
      if (matrix.scale) value *= load(matrix.scale + column);
      if (matrix.bias) value += load(matrix.bias + column);
      if (p.into == Into::add) value += load(y);
      if (p.into == Into::gelu) value = value * Gelu(value).s;
      store(y, value);
    }
}

constexpr int fewer(int M) { return M == 12 ? 8 : M == 3 ? 2 : M / 2; }

template <class Type, int M = MR>
void all_rows(const Product& p, int64_t panel_bytes, int64_t panel, int64_t m, int64_t end) {
  for (; m + M <= end; m += M) some_rows<Type, M>(p, panel_bytes, panel, m);
  if constexpr (M > 1) all_rows<Type, fewer(M)>(p, panel_bytes, panel, m, end);
}

// Panels begin .. end, for blocks of rows whose inputs stay in the second cache.
template <class Type>
void multiply(const Product& p, int64_t panel_bytes, int64_t begin, int64_t end) {
  const int64_t block = larger<int64_t>(1, (1 << 18) / p.stride / MR) * MR;
  for (int64_t m = 0; m < p.N; m += block)
    for (int64_t panel = begin; panel < end; ++panel) all_rows<Type>(p, panel_bytes, panel, m, smaller(p.N, m + block));
}

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
