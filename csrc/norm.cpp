#include "norm.h"

#include "arena.h"

namespace gptfast {
namespace {

// The smallest shares of work that a thread gets.
constexpr int64_t COLUMNS_PER_STRIP = 64;  // whole vectors at every level
constexpr int64_t ROWS_PER_SHARE = 16;

template <class F>
void for_each_strip(int64_t C, F f) {
  parallel_for(0, (C + COLUMNS_PER_STRIP - 1) / COLUMNS_PER_STRIP, 1,
               [&](int64_t begin, int64_t end) { f(begin * COLUMNS_PER_STRIP, std::min(C, end * COLUMNS_PER_STRIP)); });
}

// Returns x as the loops take it: in the result's dtype or in fp32.
Tensor loop_input(const Norm& norm, const Tensor& x) {
  return contiguous(x.scalar_type() == norm.dtype ? x : to(x, kFloat));
}

NormArgs arguments(const Norm& norm, const Tensor& x, const Tensor& y, const Tensor& stats) {
  NormArgs args{};
  args.x_dtype = dtype_of(x);
  args.y_dtype = dtype_of(y);
  args.N = x.size(0);
  args.C = x.size(1);
  args.eps = static_cast<float>(norm.eps);
  args.x = x.const_data_ptr();
  args.weight = norm.weight.const_data_ptr<float>();
  args.bias = norm.bias.const_data_ptr<float>();
  args.stats = stats.data_ptr<float>();
  args.y = y.data_ptr();
  return args;
}

}  // namespace

Norm make_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
               ScalarType dtype) {
  if (!weight) return {{}, {}, eps, dtype};
  CHECK_VALUE(bias && weight->dim() == 1 && bias->sizes() == weight->sizes() && weight->size(0) == x.size(1),
              "norm's weight and bias must both be (", x.size(1), ",), got weight ", weight->sizes());
  return {contiguous(to(*weight, kFloat)),
          contiguous(to(*bias, kFloat)),
          eps,
          dtype,
          weight->scalar_type(),
          bias->scalar_type()};
}

Tensor new_stats(const Norm& norm, const Tensor& x) {
  return empty({norm.weight.defined() ? x.size(0) : 0, 2}, kFloat);
}

Tensor norm_fwd(const Norm& norm, const Tensor& x_in, const Tensor& stats, Stats use) {
  if (!norm.weight.defined()) return to(x_in, norm.dtype);
  const Tensor x = loop_input(norm, x_in), y = make_tensor(x.sizes(), norm.dtype);
  NormArgs args = arguments(norm, x, y, stats);
  args.compute_stats = use == Stats::compute;
  parallel_for(0, args.N, ROWS_PER_SHARE,
               [&](int64_t begin, int64_t end) { loops().norm->normalize(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> norm_bwd(const Norm& norm, const Tensor& dy, const Tensor& x_in, const Tensor& stats,
                                            const Tensor& residual) {
  if (!norm.weight.defined()) {
    const Tensor dx = to(dy, x_in.scalar_type());
    if (residual.defined()) add(dx, dx, residual);
    return {dx, Tensor(), Tensor()};
  }
  const Tensor x = loop_input(norm, x_in);
  const Tensor dx = dy.scalar_type() == x.scalar_type() ? dy : make_tensor(x.sizes(), x.scalar_type());
  const Tensor dweight = empty(norm.weight.sizes(), kFloat), dbias = empty(norm.weight.sizes(), kFloat);
  NormArgs args = arguments(norm, x, dy, stats);
  args.dx = dx.data_ptr();
  args.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
  args.dweight = dweight.data_ptr<float>();
  args.dbias = dbias.data_ptr<float>();
  for_each_strip(args.C, [&](int64_t begin, int64_t end) { loops().norm->bwd_columns(args, begin, end); });
  parallel_for(0, args.N, ROWS_PER_SHARE,
               [&](int64_t begin, int64_t end) { loops().norm->bwd_rows(args, begin, end); });
  return {to(dx, x_in.scalar_type()), to(dweight, norm.weight_dtype), to(dbias, norm.bias_dtype)};
}

Tensor sum_rows(const Tensor& x, ScalarType dtype) {
  const Tensor sums = empty({x.size(1)}, kFloat);
  for_each_strip(x.size(1), [&](int64_t begin, int64_t end) {
    loops().norm->sum_columns(dtype_of(x), x.const_data_ptr(), x.size(0), x.size(1), sums.data_ptr<float>(), begin,
                              end);
  });
  return to(sums, dtype);
}

}  // namespace gptfast
