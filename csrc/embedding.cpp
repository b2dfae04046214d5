// The rows of a weight that ids name, and their gradient: per token the sum of its rows, in order of
// position, in fp32, added once to the token's row. Bound by memory, so that the plain loops here
// are as good as any instruction-set level's.
#include <ATen/Dispatch.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "common.h"

namespace gptfast {
namespace {

using at::Tensor;

// Columns whose sums stay in the first-level cache; a piece of work is a token and these.
constexpr int64_t BLOCK = 256;
constexpr int64_t GRAIN = 16;

void check_ids(const Tensor& idx, int64_t V) {
  TORCH_CHECK_VALUE(idx.scalar_type() == at::kLong, "idx must be int64, got ", idx.scalar_type());
  const int64_t* id = idx.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(id, id + idx.numel());
  TORCH_CHECK_INDEX(!idx.numel() || (*low >= 0 && *high < V), "token ids must lie in [0, ", V, "), got ", *low, " to ",
                    *high);
}

Tensor embedding_fwd(const Tensor& weight_in, const Tensor& idx_in) {
  if (weight_in.scalar_type() == at::kDouble)
    return reference<decltype(embedding_fwd)>("gptfast::embedding_fwd", weight_in, idx_in);
  dtype_of(weight_in);
  TORCH_CHECK_VALUE(weight_in.dim() == 2, "embedding: weight must be (V, C), got ", weight_in.sizes());
  const Tensor weight = weight_in.contiguous(), idx = idx_in.contiguous();
  check_ids(idx, weight.size(0));
  std::vector<int64_t> shape = idx.sizes().vec();
  shape.push_back(weight.size(1));
  Tensor x = at::empty(shape, weight.options());
  const int64_t row_bytes = weight.size(1) * weight.element_size();
  if (row_bytes == 0) return x;  // memcpy must not be given null pointers, even for no bytes
  const int64_t* id = idx.const_data_ptr<int64_t>();
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  char* to = static_cast<char*>(x.data_ptr());
  at::parallel_for(0, idx.numel(), GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) memcpy(to + n * row_bytes, from + id[n] * row_bytes, row_bytes);
  });
  return x;
}

using Place = std::pair<int64_t, int64_t>;  // id and position
std::vector<Place> sorted(const Tensor& idx) {
  const int64_t* id = idx.const_data_ptr<int64_t>();
  std::vector<Place> places(idx.numel());
  for (int64_t n = 0; n < idx.numel(); ++n) places[n] = {id[n], n};
  std::sort(places.begin(), places.end());
  return places;
}

// Columns begin .. end of the run of one token that starts at `place`.
template <class T>
void add_run(T* dweight, const T* dx, const std::vector<Place>& places, size_t place, int64_t C, int64_t begin,
             int64_t end) {
  float sums[BLOCK] = {};
  const int64_t token = places[place].first, n = end - begin;
  for (; place < places.size() && places[place].first == token; ++place) {
    const T* row = dx + places[place].second * C + begin;
    for (int64_t c = 0; c < n; ++c) sums[c] += static_cast<float>(row[c]);
  }
  T* row = dweight + token * C + begin;
  for (int64_t c = 0; c < n; ++c) row[c] = static_cast<T>(static_cast<float>(row[c]) + sums[c]);
}

void embedding_bwd(const Tensor& dweight, const Tensor& dx_in, const Tensor& idx_in) {
  if (dweight.scalar_type() == at::kDouble)
    return reference<decltype(embedding_bwd)>("gptfast::embedding_bwd", dweight, dx_in, idx_in);
  dtype_of(dweight);
  const Tensor dx = dx_in.contiguous(), idx = idx_in.contiguous();
  TORCH_CHECK_VALUE(dweight.dim() == 2 && dweight.is_contiguous() && dx.dim() == idx.dim() + 1 &&
                        dx.sizes().slice(0, idx.dim()) == idx.sizes() && dx.size(-1) == dweight.size(1) &&
                        dx.scalar_type() == dweight.scalar_type(),
                    "embedding: dweight ", dweight.sizes(), ", contiguous, dx ", dx.sizes(), " and idx ", idx.sizes(),
                    " do not fit");
  check_ids(idx, dweight.size(0));
  const std::vector<Place> places = sorted(idx);
  const int64_t N = idx.numel(), C = dweight.size(1), blocks = (C + BLOCK - 1) / BLOCK;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dweight.scalar_type(), "embedding_bwd", [&] {
    scalar_t* to = dweight.data_ptr<scalar_t>();
    const scalar_t* from = dx.const_data_ptr<scalar_t>();
    at::parallel_for(0, blocks * N, GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t place = item % N, column = item / N * BLOCK;
        if (!place || places[place - 1].first != places[place].first)
          add_run(to, from, places, place, C, column, std::min(C, column + BLOCK));
      }
    });
  });
}

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("embedding_fwd", embedding_fwd);
  m.impl("embedding_bwd", embedding_bwd);
}

}  // namespace
}  // namespace gptfast
