#include "sampling.h"

#include "common.h"

namespace gptfast {
namespace {

// Returns the data of a parameter with one value per row.
template <class T>
const T* row_values(const Tensor& t, int64_t B, const char* name) {
  CHECK_VALUE(t.dim() == 1 && t.size(0) == B && t.is_contiguous(), name, " must be contiguous of shape (", B,
              ",), got ", t.sizes());
  return t.const_data_ptr<T>();
}

}  // namespace

Tensor sample(const Tensor& logits_in, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
              const Tensor& min_p, const Tensor& seed, const Tensor& position) {
  if (logits_in.scalar_type() == kDouble)
    return reference<decltype(sample)>("sample", logits_in, temperature, top_k, top_p, min_p, seed, position);
  CHECK_VALUE(logits_in.dim() == 2 && logits_in.size(1) > 0, "logits must be (B, V), got ", logits_in.sizes());
  const Tensor logits = contiguous_rows(logits_in);
  const int64_t B = logits.size(0);
  SamplingArgs args{};
  args.dtype = dtype_of(logits);
  args.V = logits.size(1);
  args.row_stride = logits.stride(0);
  args.logits = logits.const_data_ptr();
  args.temperature = row_values<float>(temperature, B, "temperature");
  args.top_k = row_values<int64_t>(top_k, B, "top_k");
  args.top_p = row_values<float>(top_p, B, "top_p");
  args.min_p = row_values<float>(min_p, B, "min_p");
  args.seed = row_values<int64_t>(seed, B, "seed");
  args.position = row_values<int64_t>(position, B, "position");
  for (int64_t b = 0; b < B; ++b) {
    const float t = args.temperature[b], p = args.top_p[b], m = args.min_p[b];
    CHECK_VALUE(t >= 0 && t < INFINITY, "temperature must be a finite number >= 0, got ", t, " in row ", b);
    CHECK_VALUE(args.top_k[b] >= 1, "top_k must be an integer >= 1, got ", args.top_k[b], " in row ", b);
    CHECK_VALUE(p > 0 && p <= 1, "top_p must be in (0, 1], got ", p, " in row ", b);
    CHECK_VALUE(m >= 0 && m <= 1, "min_p must be in [0, 1], got ", m, " in row ", b);
    CHECK_VALUE(args.position[b] >= 0, "position must be an integer >= 0, got ", args.position[b], " in row ", b);
  }
  Tensor ids = empty({B}, kLong);
  args.ids = ids.data_ptr<int64_t>();
  parallel_for(0, B, 1, [&](int64_t begin, int64_t end) { loops().sampling->sample(args, begin, end); });
  for (int64_t b = 0; b < B; ++b)
    CHECK_VALUE(args.ids[b] >= 0, "logits row ", b, " has NaN, +inf or nothing but -inf; check the model's output");
  return ids;
}

const Kernels kernels = Kernels("CPU").add<sample>("sample");

}  // namespace gptfast
