// Copies the rows of a weight that ids name. The gradient of a token's row is the sum of its gradients in the order of
// their positions, in fp32, added to the row once. Memory bandwidth is the limit, so there are no loops per
// instruction-set level.

#include <algorithm>
#include <compare>
#include <vector>

#include "common.h"

namespace gptfast {
namespace {

constexpr int64_t COLUMNS_PER_BLOCK = 256;  // whose sums stay in the first-level cache
constexpr int64_t ITEMS_PER_SHARE = 16;     // the smallest share of work that a thread gets

void check_ids(const Tensor& idx, int64_t V) {
  CHECK_VALUE(idx.scalar_type() == kLong, "idx must be int64, got ", idx.scalar_type());
  const int64_t* id = idx.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(id, id + idx.numel());
  CHECK_INDEX(!idx.numel() || (*low >= 0 && *high < V), "token ids must lie in [0, ", V, "), got ", *low, " to ",
              *high);
}

Tensor embedding_fwd(const Tensor& weight_in, const Tensor& idx_in) {
  if (weight_in.scalar_type() == kDouble) return reference<decltype(embedding_fwd)>("embedding_fwd", weight_in, idx_in);
  dtype_of(weight_in);
  CHECK_VALUE(weight_in.dim() == 2, "embedding: weight must be (V, C), got ", weight_in.sizes());
  const Tensor weight = contiguous(weight_in), idx = contiguous(idx_in);
  check_ids(idx, weight.size(0));
  std::vector<int64_t> shape(idx.sizes().begin(), idx.sizes().end());
  shape.push_back(weight.size(1));
  Tensor x = empty(shape, weight.scalar_type());
  const int64_t row_bytes = weight.size(1) * weight.element_size();
  if (row_bytes == 0) return x;  // memcpy must not be given null pointers, even for no bytes
  const int64_t* id = idx.const_data_ptr<int64_t>();
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  char* to = static_cast<char*>(x.data_ptr());
  parallel_for(0, idx.numel(), ITEMS_PER_SHARE, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) memcpy(to + n * row_bytes, from + id[n] * row_bytes, row_bytes);
  });
  return x;
}

struct Occurrence {
  int64_t id, position;
  auto operator<=>(const Occurrence&) const = default;
};

// Returns the ids of all positions, sorted by id and then by position.
std::vector<Occurrence> sorted_occurrences(const Tensor& idx) {
  const int64_t* id = idx.const_data_ptr<int64_t>();
  std::vector<Occurrence> found(idx.numel());
  for (int64_t n = 0; n < idx.numel(); ++n) found[n] = {id[n], n};
  std::sort(found.begin(), found.end());
  return found;
}

// Adds the gradients of one token, whose occurrences start at index i, to its row; columns begin .. end.
template <class T>
void add_token(T* dweight, const T* dx, const std::vector<Occurrence>& all, size_t i, int64_t C, int64_t begin,
               int64_t end) {
  float sums[COLUMNS_PER_BLOCK] = {};
  const int64_t id = all[i].id, n = end - begin;
  for (; i < all.size() && all[i].id == id; ++i) {
    const T* row = dx + all[i].position * C + begin;
    for (int64_t c = 0; c < n; ++c) sums[c] += static_cast<float>(row[c]);
  }
  T* row = dweight + id * C + begin;
  for (int64_t c = 0; c < n; ++c) row[c] = static_cast<T>(static_cast<float>(row[c]) + sums[c]);
}

void embedding_bwd(const Tensor& dweight, const Tensor& dx_in, const Tensor& idx_in) {
  if (dweight.scalar_type() == kDouble)
    return reference<decltype(embedding_bwd)>("embedding_bwd", dweight, dx_in, idx_in);
  dtype_of(dweight);
  const Tensor dx = contiguous(dx_in), idx = contiguous(idx_in);
  CHECK_VALUE(dweight.dim() == 2 && dweight.is_contiguous() && dx.dim() == idx.dim() + 1 &&
                  std::equal(idx.sizes().begin(), idx.sizes().end(), dx.sizes().begin()) &&
                  dx.size(-1) == dweight.size(1) && dx.scalar_type() == dweight.scalar_type(),
              "embedding: contiguous dweight ", dweight.sizes(), ", dx ", dx.sizes(), " and idx ", idx.sizes(),
              " do not fit");
  check_ids(idx, dweight.size(0));
  const std::vector<Occurrence> all = sorted_occurrences(idx);
  const int64_t N = idx.numel(), C = dweight.size(1), blocks = (C + COLUMNS_PER_BLOCK - 1) / COLUMNS_PER_BLOCK;
  with_type(dweight.scalar_type(), [&](auto number) {
    using T = decltype(number);
    T* to = dweight.data_ptr<T>();
    const T* from = dx.const_data_ptr<T>();
    parallel_for(0, blocks * N, ITEMS_PER_SHARE, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t i = item % N, column = item / N * COLUMNS_PER_BLOCK;
        if (i == 0 || all[i - 1].id != all[i].id)
          add_token(to, from, all, i, C, column, std::min(C, column + COLUMNS_PER_BLOCK));
      }
    });
  });
}

const Kernels kernels = Kernels("CPU").add<embedding_fwd>("embedding_fwd").add<embedding_bwd>("embedding_bwd");

}  // namespace
}  // namespace gptfast
