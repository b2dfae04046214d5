// int4 weights (engine.h): half the bytes of int8 for the same inputs. Where few rows wait for the weights, that is
// what counts; a prompt takes as long as in int8 by vectors.
#pragma once

#include "engine_weights.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

struct Int4 {
  static int64_t panel_bytes(int64_t K) { return round_up(K, INT8_GROUP) / INT4_GROUP * INT4_GROUP_BYTES; }
  static const bf16* scales(const char* group) { return (const bf16*)(group + INT4_GROUP / 2 * PANEL); }

  static float weight(const char* panel, int64_t lane, int64_t k) {
    const char* group = panel + k / INT4_GROUP * INT4_GROUP_BYTES;
    const int in_group = (int)(k % INT4_GROUP);
    const int both = (uint8_t)group[in_group / 8 * 4 * PANEL + lane * 4 + in_group % 4];
    const float number = (float)(in_group % 8 < 4 ? both & 15 : both >> 4);
    return number * load_one(scales(group) + lane) + load_one(scales(group) + PANEL + lane);
  }

  struct Vectors : Int8Rows<Int8::Quant> {
    static constexpr int ROWS = W == 16 ? 8 : W == 8 || REGISTERS == 32 ? 2 : 1;
    static constexpr int MIN_ROWS = 1;
    typedef NoScope Scope;

    template <int M>
    static void add(float* sums, const char* panel, int64_t K, const char* rows, int64_t row_bytes) {
      const GroupScale* of_row[M];
      for (int m = 0; m < M; ++m) of_row[m] = Int8Rows::scales(rows + m * row_bytes, K);
      for (int64_t group = 0; group < groups(K); ++group)
        for (int half = 0; half < 2; ++half, panel += INT4_GROUP_BYTES, rows += GROUP_BYTES / 2) {
          vi parts[M][NV];
          multiply<M>(parts, panel, rows, row_bytes);
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n) {
            const vf scale = load(Int4::scales(panel) + n * W), minimum = load(Int4::scales(panel) + PANEL + n * W);
#pragma GCC unroll 12
            for (int m = 0; m < M; ++m) {
              const GroupScale& of_inputs = of_row[m][group];
              const vf of_minimum = minimum * splat(of_inputs.sums[half]);
              const vf value = fused(__builtin_convertvector(parts[m][n], vf), scale, of_minimum);
              float* sum = sums + m * PANEL + n * W;
              store(sum, fused(value, splat(of_inputs.scale), load(sum)));
            }
          }
        }
    }

   private:
    // Sets parts to the products of whole numbers of a group.
    template <int M>
    static void multiply(vi (&parts)[M][NV], const char* panel, const char* rows, int64_t row_bytes) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) parts[m][n] = vi{};
#pragma GCC unroll 4
      for (int64_t k = 0; k < INT4_GROUP; k += 8) {
        const char* eight = panel + k / 2 * PANEL;
        prefetch_weights<INT4_GROUP_BYTES / 4>(panel + k / 8 * (INT4_GROUP_BYTES / 4));
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) {
          const vu both = (vu)load((const float*)(eight) + n * W);
          const vi lower = (vi)(both & 0x0F0F0F0Fu), upper = (vi)(both >> 4 & 0x0F0F0F0Fu);
#pragma GCC unroll 12
          for (int m = 0; m < M; ++m) {
            const auto* x = (const Int8::Quant*)(rows + m * row_bytes) + k;
            parts[m][n] = Int8::Vectors::add_four(Int8::Vectors::add_four(parts[m][n], lower, x), upper, x + 4);
          }
        }
      }
    }
  };
};

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
