// Products on four tiles of sums, 32 x 32: of bf16 numbers, or of the bf16 parts of fp32 numbers.
#pragma once

#include "tiles.h"

#ifdef GPTFAST_HAS_TILES

namespace gptfast::GPTFAST_LEVEL {

// Loads the sums, tiles 0 to 3, whose rows are `stride` floats apart, or sets them to 0.
static inline void load_four_tiles(const float* c, int64_t stride, bool accumulate) {
  const float* lower = c + TILE_ROWS * stride;
  if (accumulate) {
    tile_load<0>(c, stride * 4);
    tile_load<1>(c + TILE_ROWS, stride * 4);
    tile_load<2>(lower, stride * 4);
    tile_load<3>(lower + TILE_ROWS, stride * 4);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
}
static inline void store_four_tiles(float* c, int64_t stride) {
  float* lower = c + TILE_ROWS * stride;
  tile_store<0>(c, stride * 4);
  tile_store<1>(c + TILE_ROWS, stride * 4);
  tile_store<2>(lower, stride * 4);
  tile_store<3>(lower + TILE_ROWS, stride * 4);
}

// Two tiles of an operand, `second` bytes apart. The tiles of the next part are part_bytes on.
struct TwoTiles {
  const char* data;
  int64_t second, row_bytes, part_bytes;
};

// Adds the product of a part of A and a part of B to the sums. Of what is not NEW, tiles 4 and 5 (A) or 6 and 7 (B) are
// loaded already.
template <bool NEW_A, bool NEW_B>
static inline void add_product(const TwoTiles& a, int a_part, const TwoTiles& b, int b_part) {
  const char *upper = a.data + a_part * a.part_bytes, *left = b.data + b_part * b.part_bytes;
  if constexpr (NEW_A) tile_load<4>(upper, a.row_bytes);
  if constexpr (NEW_B) tile_load<6>(left, b.row_bytes);
  tile_dot_bf16<0, 4, 6>();
  if constexpr (NEW_B) tile_load<7>(left + b.second, b.row_bytes);
  tile_dot_bf16<1, 4, 7>();
  if constexpr (NEW_A) tile_load<5>(upper + a.second, a.row_bytes);
  tile_dot_bf16<2, 5, 6>();
  tile_dot_bf16<3, 5, 7>();
}

// Adds the largest products of PARTS parts, 1, 3 or 6 of them, in an order in which few tiles are loaded twice.
// kernels/reference/matmul.py has the same order.
template <int PARTS>
static inline void add_products_of_parts(const TwoTiles& a, const TwoTiles& b) {
  if constexpr (PARTS == 1) {
    add_product<true, true>(a, 0, b, 0);
  } else if constexpr (PARTS == 2) {
    add_product<true, true>(a, 0, b, 1);
    add_product<false, true>(a, 0, b, 0);
    add_product<true, false>(a, 1, b, 0);
  } else {
    static_assert(PARTS == 3);
    add_product<true, true>(a, 0, b, 2);
    add_product<false, true>(a, 0, b, 1);
    add_product<true, false>(a, 1, b, 1);
    add_product<false, true>(a, 1, b, 0);
    add_product<true, false>(a, 2, b, 0);
    add_product<true, false>(a, 0, b, 0);
  }
}

}  // namespace gptfast::GPTFAST_LEVEL

#endif
