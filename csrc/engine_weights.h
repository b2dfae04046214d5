// The types of weights: fp32, bf16 and int8; engine_int4.h has int4. Each has ways to multiply, by vectors and perhaps
// by tiles. A way says what form a row of inputs has, how many rows it takes at a time, and how it adds their products
// with a panel (engine.h) to sums in memory, PANEL for each row. All ways of bf16 give the same bits at every level,
// and so do those of int8.
#pragma once

#include "engine.h"
#include "engine_lanes.h"
#include "maths.h"
#include "products_bf16.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int NV = PANEL / W;  // vectors across a panel
static_assert(PANEL == PANEL_COLUMNS && BF16_BLOCK == BLOCK_TERMS);
#ifdef GPTFAST_HAS_TILES
static_assert(ROW_UNIT == TILE_ROWS);
#endif
// The rows of inputs whose sums, NV vectors each, fit in the registers.
constexpr int ROWS_IN_REGISTERS = W == 16 ? 12 : W == 8 ? 3 : REGISTERS == 32 ? 2 : 1;
// From what is read now to what is prefetched: a page, at whose end the hardware's prefetching stops.
constexpr int64_t PREFETCH_BYTES = 4096;

template <int64_t BYTES>
inline void prefetch_weights(const char* p) {
#pragma GCC unroll 32
  for (int64_t line = 0; line < BYTES; line += 64) __builtin_prefetch(p + line + PREFETCH_BYTES);
}

struct NoScope {
  NoScope() {}
};

template <class T>
inline T load_as(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

struct Fp32 {
  static int64_t panel_bytes(int64_t K) { return K * PANEL * 4; }
  static float weight(const char* panel, int64_t lane, int64_t k) { return ((const float*)panel)[k * PANEL + lane]; }

  struct Vectors {
    static constexpr int ROWS = ROWS_IN_REGISTERS;
    static constexpr int MIN_ROWS = 1;
    typedef NoScope Scope;
    static constexpr int64_t BLOCK = 128;       // inputs whose products are added up before they join the sums
    static constexpr bool TAKES_FLOATS = true;  // its inputs need no conversion
    static int64_t bytes(int64_t K) { return round_up(K, 16) * 4; }
    static void convert(const float* x, int64_t K, char* row) { memcpy(row, x, K * 4); }

    template <int M>
    static void add(float* sums, const char* panel, int64_t K, const char* rows, int64_t row_bytes) {
      for (int64_t begin = 0; begin < K; begin += BLOCK) {
        vf parts[M][NV] = {};
        for (int64_t k = begin; k < smaller(K, begin + BLOCK); ++k, panel += PANEL * 4) {
          prefetch_weights<PANEL * 4>(panel);
          vf w[NV];
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n) w[n] = load((const float*)panel + n * W);
#pragma GCC unroll 12
          for (int m = 0; m < M; ++m) {
            const vf x = splat(load_as<float>(rows + m * row_bytes + k * 4));
#pragma GCC unroll 8
            for (int n = 0; n < NV; ++n) parts[m][n] = multiply_add(x, w[n], parts[m][n]);
          }
        }
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n) store(sums + m * PANEL + n * W, load(sums + m * PANEL + n * W) + parts[m][n]);
      }
    }
  };
};

struct Bf16 {
  static int64_t panel_bytes(int64_t K) { return round_up(K, BLOCK_TERMS) * PANEL * 2; }
  static float weight(const char* panel, int64_t lane, int64_t k) {
    return load_one((const bf16*)panel + k / 2 * 2 * PANEL + lane * 2 + k % 2);
  }

  template <class Products>
  struct Way {
    static constexpr int ROWS = Products::ROWS;
    static constexpr bool TAKES_FLOATS = false;
    static constexpr int64_t INPUT_BYTES = Products::INPUT_BYTES;  // of a block
    static int64_t blocks(int64_t K) { return (K + BLOCK_TERMS - 1) / BLOCK_TERMS; }
    static int64_t bytes(int64_t K) { return blocks(K) * INPUT_BYTES; }

    static void convert(const float* x, int64_t K, char* row) {
      for (int64_t k = 0; k < K; k += BLOCK_TERMS, row += INPUT_BYTES) {
        alignas(64) bf16 terms[BLOCK_TERMS] = {};
        for (int64_t i = 0; i < smaller<int64_t>(BLOCK_TERMS, K - k); i += W)
          store(terms + i, load_n(x + k + i, smaller<int64_t>(W, K - k - i)));
        Products::convert_inputs(terms, row);
      }
    }
  };
  struct Vectors : Way<VectorProducts> {
    static constexpr int MIN_ROWS = 1;
    typedef WithoutDenormals Scope;

    template <int M>
    static void add(float* sums, const char* panel, int64_t K, const char* rows, int64_t row_bytes) {
      VectorProducts::add<M, PREFETCH_BYTES>({sums, PANEL}, {rows, row_bytes, INPUT_BYTES}, blocks(K), panel);
    }
  };
#ifdef GPTFAST_HAS_TILES
  struct Tiles : Way<TileProducts> {
    static constexpr int MIN_ROWS = TILE_ROWS;
    struct Scope {
      TileScope tiles;
      WithoutDenormals epilogue;
      Scope() {}
    };

    template <int M>
    static void add(float* sums, const char* panel, int64_t K, const char* rows, int64_t row_bytes) {
      TileProducts::add<M>({sums, PANEL}, {rows, row_bytes, INPUT_BYTES}, blocks(K), panel);
    }
  };
#endif
};

// The inputs of a row are whole numbers from -127 to 127; each INT8_GROUP of them has a scale. int8 weights are stored
// + 128, because vectors multiply unsigned with signed bytes. This adds 128 times the inputs to each sum, and `shift`
// takes it away again. The row's groups come first, then their scales.
struct GroupScale {
  float scale;
  int32_t shift;
  float sums[2];  // of each half of the group
};

// Rows of inputs as int8_t, or as int16_t with each four in the order 0 2 1 3.
template <class Quant>
struct Int8Rows {
  static constexpr bool TAKES_FLOATS = false;
  static constexpr int64_t GROUP_BYTES = INT8_GROUP * sizeof(Quant);
  static int64_t groups(int64_t K) { return (K + INT8_GROUP - 1) / INT8_GROUP; }
  static int64_t bytes(int64_t K) { return groups(K) * (GROUP_BYTES + (int64_t)sizeof(GroupScale)); }
  static GroupScale* scales(char* row, int64_t K) { return (GroupScale*)(row + groups(K) * GROUP_BYTES); }
  static const GroupScale* scales(const char* row, int64_t K) { return scales((char*)row, K); }

  static void convert(const float* x, int64_t K, char* row) {
    for (int64_t group = 0; group < groups(K); ++group)
      scales(row, K)[group] =
          quantize(x + group * INT8_GROUP, K - group * INT8_GROUP, (Quant*)(row + group * GROUP_BYTES));
  }

 private:
  static GroupScale quantize(const float* x, int64_t n, Quant* to) {
    vf largest = {}, values[INT8_GROUP / W];
    vi nan = {}, quant_sums[2] = {};
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
      quant_sums[i / (INT8_GROUP / W / 2)] += q;
      store_quants(to + i * W, q);
    }
    const int32_t first = sum(quant_sums[0]), second = sum(quant_sums[1]);
    return {any(nan) ? NAN : top / 127.0f, -128 * (first + second), {(float)first, (float)second}};
  }
  static void store_quants(int8_t* to, vi q) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)q));
#else
    for (int i = 0; i < W; ++i) to[i] = (int8_t)q[i];
#endif
  }
  static void store_quants(int16_t* to, vi q) {
    *(vh_any*)to = narrow((vu)order_0213(q, std::make_index_sequence<W>()));
  }
  template <size_t... I>
  static vi order_0213(vi q, std::index_sequence<I...>) {
    return __builtin_shufflevector(q, q, (I / 4 * 4 + I % 2 * 2 + I % 4 / 2)...);
  }
};

struct Int8 {
  static int64_t panel_bytes(int64_t K) { return round_up(K, INT8_GROUP) * PANEL; }
  static constexpr int64_t PANEL_GROUP_BYTES = INT8_GROUP * PANEL;
  static float weight(const char* panel, int64_t lane, int64_t k) {
    return (float)((uint8_t)panel[k / 4 * 4 * PANEL + lane * 4 + k % 4] - 128);
  }
  // Adds the products of a group, as whole numbers, to a vector of sums.
  static void add_group(float* sums, vi products, float scale) {
    store(sums, fused(__builtin_convertvector(products, vf), splat(scale), load(sums)));
  }

#if defined(__AVX512VNNI__) || defined(__aarch64__)
  typedef int8_t Quant;
#else
  typedef int16_t Quant;
#endif
  struct Vectors : Int8Rows<Quant> {
    static constexpr int ROWS = ROWS_IN_REGISTERS;
    static constexpr int MIN_ROWS = 1;
    typedef NoScope Scope;

    template <int M>
    static void add(float* sums, const char* panel, int64_t K, const char* rows, int64_t row_bytes) {
      const GroupScale* scale[M];
      for (int m = 0; m < M; ++m) scale[m] = scales(rows + m * row_bytes, K);
      for (int64_t group = 0; group < groups(K); ++group, rows += GROUP_BYTES) {
        vi parts[M][NV];
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n)
            parts[m][n] = TAKES_SIGNED_WEIGHTS ? vi{} : (vi)splat((uint32_t)scale[m][group].shift);
        for (int64_t k = 0; k < INT8_GROUP; k += 4, panel += PANEL * 4) {
          prefetch_weights<PANEL * 4>(panel);
          vi w[NV];
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n) {
            const vu stored = (vu)load((const float*)panel + n * W);
            w[n] = (vi)(TAKES_SIGNED_WEIGHTS ? stored ^ 0x80808080u : stored);  // - 128, or as it is
          }
#pragma GCC unroll 12
          for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int n = 0; n < NV; ++n)
              parts[m][n] = add_four(parts[m][n], w[n], (const Quant*)(rows + m * row_bytes) + k);
        }
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n) add_group(sums + m * PANEL + n * W, parts[m][n], scale[m][group].scale);
      }
    }

    // Adds the products of four inputs with four weights of each output, bytes with or without a sign. int4's weights,
    // which are small, have the same bytes either way.
#if defined(__aarch64__) && !defined(__ARM_FEATURE_MATMUL_INT8)
    static constexpr bool TAKES_SIGNED_WEIGHTS = true;
#else
    static constexpr bool TAKES_SIGNED_WEIGHTS = false;
#endif
#if defined(__aarch64__)
    static vi add_four(vi sum, vi w, const Quant* x) {
      const auto inputs = (int8x16_t)splat(load_as<uint32_t>(x));
#if defined(__ARM_FEATURE_MATMUL_INT8)
      return (vi)vusdotq_s32((int32x4_t)sum, (uint8x16_t)w, inputs);
#elif defined(__ARM_FEATURE_DOTPROD)
      return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)w, inputs);
#else
      // Two products fit in 16 bits: no input is -128.
      const int16x8_t lower = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8(inputs));
      const int16x8_t upper = vmull_high_s8((int8x16_t)w, inputs);
      return (vi)vpadalq_s16((int32x4_t)sum, vpaddq_s16(lower, upper));
#endif
    }
#elif defined(__AVX512VNNI__)
    static vi add_four(vi sum, vi w, const Quant* x) {
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
    static vi add_four(vi sum, vi w, const Quant* x) {
      const vi even = (vi)((vu)w & 0x00FF00FFu), odd = (vi)(((vu)w >> 8) & 0x00FF00FFu);
      return sum + multiply_pairs(even, (vi)splat(load_as<uint32_t>(x))) +
             multiply_pairs(odd, (vi)splat(load_as<uint32_t>(x + 2)));
    }
#endif
  };
#ifdef GPTFAST_HAS_TILES
  struct Tiles;
#endif
};

#ifdef GPTFAST_HAS_TILES

// A group of inputs is one row of a tile. Tiles and vectors work at the same time: while tiles multiply a group,
// vectors scale the products of the group before.
struct Int8::Tiles : Int8Rows<int8_t> {
  static constexpr int ROWS = 2 * TILE_ROWS, MIN_ROWS = TILE_ROWS;
  typedef TileScope Scope;
  typedef int32_t GroupProducts[ROWS][PANEL];

  template <int M>
  static void add(float* sums, const char* panel, int64_t K, const char* rows, int64_t row_bytes) {
    alignas(64) GroupProducts products[2];
    for (int64_t group = 0; group < groups(K); ++group) {
      multiply<M>(panel + group * PANEL_GROUP_BYTES, rows + group * GROUP_BYTES, row_bytes);
      if (group > 0) scale_products<M>(sums, products[(group - 1) % 2], group - 1, K, rows, row_bytes);
      store_products<M>(products[group % 2]);
    }
    scale_products<M>(sums, products[(groups(K) - 1) % 2], groups(K) - 1, K, rows, row_bytes);
  }

 private:
  template <int M>
  static void multiply(const char* panel, const char* rows, int64_t row_bytes) {
    tile_zero<0>();
    tile_zero<1>();
    tile_load<4>(rows, row_bytes);
    tile_load<6>(panel, PANEL * 4);
    tile_dot_int8_uint8<0, 4, 6>();
    tile_load<7>(panel + TILE_BYTES, PANEL * 4);
    tile_dot_int8_uint8<1, 4, 7>();
    if constexpr (M == ROWS) {
      tile_zero<2>();
      tile_zero<3>();
      tile_load<5>(rows + TILE_ROWS * row_bytes, row_bytes);
      tile_dot_int8_uint8<2, 5, 6>();
      tile_dot_int8_uint8<3, 5, 7>();
    }
  }
  template <int M>
  static void store_products(GroupProducts& products) {
    tile_store<0>(products[0], PANEL * 4);
    tile_store<1>(products[0] + TILE_ROWS, PANEL * 4);
    if constexpr (M == ROWS) {
      tile_store<2>(products[TILE_ROWS], PANEL * 4);
      tile_store<3>(products[TILE_ROWS] + TILE_ROWS, PANEL * 4);
    }
  }
  template <int M>
  static void scale_products(float* sums, const GroupProducts& products, int64_t group, int64_t K, const char* rows,
                             int64_t row_bytes) {
    for (int m = 0; m < M; ++m) {
      const GroupScale& of_row = scales(rows + m * row_bytes, K)[group];
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        const vi whole = (vi)load((const float*)(products[m] + n * W)) + of_row.shift;
        add_group(sums + m * PANEL + n * W, whole, of_row.scale);
      }
    }
  }
};

#endif

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
