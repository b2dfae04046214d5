// Cross entropy of logits, and of a linear layer whose logits are never held in memory all at once.

#include "arena.h"
#include "common.h"
#include "matmul.h"

namespace gptfast {
namespace {

void check_targets(const Tensor& target, int64_t N, int64_t V, int64_t ignore_index) {
  CHECK_VALUE(target.scalar_type() == kLong && target.dim() == 1 && target.size(0) == N,
              "target must be int64 of shape (", N, ",), got ", target.sizes());
  const int64_t* t = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < N; ++i)
    CHECK_INDEX((t[i] >= 0 && t[i] < V) || t[i] == ignore_index, "target ", t[i],
                " is out of range for a vocabulary of ", V, "; targets lie in [0, ", V, ") or equal ignore_index (",
                ignore_index, ")");
}

CrossEntropyArgs arguments(const Tensor& logits, const Tensor& target, int64_t ignore_index, double label_smoothing,
                           double z_loss) {
  CrossEntropyArgs args{};
  args.dtype = dtype_of(logits);
  args.V = logits.size(1);
  args.row_stride = logits.stride(0);
  args.ignore_index = ignore_index;
  args.label_smoothing = static_cast<float>(label_smoothing);
  args.z_loss = static_cast<float>(z_loss);
  args.logits = logits.const_data_ptr();
  args.target = target.const_data_ptr<int64_t>();
  return args;
}

Tensor make_stats(const Tensor& loss) { return empty({loss.size(0), STATS}, kDouble); }

using RowLoop = void (*)(const CrossEntropyArgs&, int64_t, int64_t);
void for_each_row(RowLoop f, const CrossEntropyArgs& args, int64_t N) {
  parallel_for(0, N, 1, [&](int64_t begin, int64_t end) { f(args, begin, end); });
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& logits_in, const Tensor& target_in, int64_t ignore_index,
                                             double label_smoothing, double z_loss) {
  if (logits_in.scalar_type() == kDouble)
    return reference<decltype(cross_entropy_fwd)>("cross_entropy_fwd", logits_in, target_in, ignore_index,
                                                  label_smoothing, z_loss);
  const Tensor logits = contiguous_rows(logits_in), target = contiguous(target_in);
  const int64_t N = logits.size(0);
  check_targets(target, N, logits.size(1), ignore_index);
  Tensor loss = empty({N}, kFloat), stats = make_stats(loss);
  CrossEntropyArgs args = arguments(logits, target, ignore_index, label_smoothing, z_loss);
  args.loss = loss.data_ptr<float>();
  args.stats = stats.data_ptr<double>();
  for_each_row(loops().cross_entropy->fwd, args, N);
  return {loss, stats};
}

Tensor cross_entropy_bwd(const Tensor& dloss_in, const Tensor& logits_in, const Tensor& target_in,
                         const Tensor& stats_in, int64_t ignore_index, double label_smoothing, double z_loss) {
  if (logits_in.scalar_type() == kDouble)
    return reference<decltype(cross_entropy_bwd)>("cross_entropy_bwd", dloss_in, logits_in, target_in, stats_in,
                                                  ignore_index, label_smoothing, z_loss);
  const Tensor logits = contiguous_rows(logits_in), target = contiguous(target_in);
  const Tensor dloss = contiguous(to(dloss_in, kFloat)), stats = contiguous(stats_in);
  const int64_t N = logits.size(0);
  check_targets(target, N, logits.size(1), ignore_index);
  CHECK_VALUE(dloss.numel() == N && stats.numel() == N * STATS && stats.scalar_type() == kDouble,
              "cross_entropy: dloss must be (", N, ",) and stats float64 (", N, ", ", STATS, "), got ", dloss.sizes(),
              " and ", stats.scalar_type(), " ", stats.sizes());
  Tensor dlogits = make_tensor(logits.sizes(), logits.scalar_type());
  CrossEntropyArgs args = arguments(logits, target, ignore_index, label_smoothing, z_loss);
  args.dloss = dloss.const_data_ptr<float>();
  args.stats = stats.data_ptr<double>();
  args.dlogits = dlogits.data_ptr();
  for_each_row(loops().cross_entropy->bwd, args, N);
  return dlogits;
}

// Memory for logits: enough rows for the matrix products to run at full speed.
//
// So few rows that their logits stay in a core's cache would cost more, because each chunk reads the weight twice and
// reads and writes dweight. Counted, not measured, for 2,048 rows of GPT-2's head in bf16, with dweight in fp32: chunks
// of 1,084 rows move 1.0 GB of logits (written, read and written by the loss, read by two products) and 0.8 GB of the
// rest, chunks of 16 rows 59 GB of the rest. Blocks of the vocabulary for all rows would keep dweight in the cache too,
// and save 1.5 GB, but multiply for the logits twice: that gains where a core has over 1.5 TFLOP/s and 15 GB/s. A
// single chunk saves 0.5 GB for twice the memory.
constexpr int64_t MAX_LOGITS_BYTES = 104 << 20;

// Returns the number of rows of logits to compute at a time.
int64_t chunk_rows(int64_t N, int64_t V, int64_t itemsize) {
  const int64_t fit = std::max<int64_t>(1, MAX_LOGITS_BYTES / (V * itemsize)), chunks = (N + fit - 1) / fit;
  return chunks ? (N + chunks - 1) / chunks : 1;
}

void check_linear(const Tensor& input, const Tensor& weight) {
  CHECK_VALUE(input.dim() == 2 && weight.dim() == 2 && weight.size(0) > 0 && input.size(1) == weight.size(1),
              "linear_cross_entropy: input ", input.sizes(), " and linear_weight ", weight.sizes(), " do not fit");
}

// Calls f(first row, number of rows, logits of these rows) for each chunk. All chunks use one buffer for the logits.
template <class F>
void for_each_chunk(const Tensor& input, const Tensor& weight, F f) {
  const int64_t N = input.size(0), V = weight.size(0), step = chunk_rows(N, V, input.element_size());
  const Tensor buffer = make_tensor({std::min(step, N), V}, input.scalar_type());
  for (int64_t row = 0; row < N; row += step) {
    const int64_t n = std::min(step, N - row);
    Tensor logits = buffer.narrow(0, 0, n);
    matmul(logits, input.narrow(0, row, n), weight.t());
    f(row, n, logits);
  }
}

Tensor linear_cross_entropy_fwd(const Tensor& input, const Tensor& weight, const Tensor& target_in,
                                int64_t ignore_index, double label_smoothing, double z_loss, double skip_below) {
  if (input.scalar_type() == kDouble)
    return reference<decltype(linear_cross_entropy_fwd)>("linear_cross_entropy_fwd", input, weight, target_in,
                                                         ignore_index, label_smoothing, z_loss, skip_below);
  check_linear(input, weight);
  const Tensor target = contiguous(target_in);
  check_targets(target, input.size(0), weight.size(0), ignore_index);
  Tensor loss = empty({input.size(0)}, kFloat), stats = make_stats(loss);
  for_each_chunk(input, weight, [&](int64_t row, int64_t n, const Tensor& logits) {
    CrossEntropyArgs args = arguments(logits, target, ignore_index, label_smoothing, z_loss);
    args.target += row;
    args.loss = loss.data_ptr<float>() + row;
    args.stats = stats.data_ptr<double>() + row * STATS;
    for_each_row(loops().cross_entropy->fwd, args, n);
  });
  return loss;
}

constexpr int64_t FP32_COLUMNS_PER_SLAB = 2048;
constexpr double MAX_KEPT_SHARE = 0.9;  // of columns; with more, skipping costs more than it saves

constexpr int64_t ROWS_PER_SHARE = 16;

// Returns copies of the rows of t (N, C) at these places.
Tensor rows_of(const Tensor& t_in, IntArrayRef places) {
  const Tensor t = contiguous_rows(t_in);
  const int64_t n = static_cast<int64_t>(places.size()), size = t.element_size(), row_bytes = t.size(1) * size;
  Tensor rows = make_tensor({n, t.size(1)}, t.scalar_type());
  const char* from = static_cast<const char*>(t.const_data_ptr());
  char* to = static_cast<char*>(rows.data_ptr());
  if (row_bytes == 0) return rows;
  parallel_for(0, n, ROWS_PER_SHARE, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) memcpy(to + i * row_bytes, from + places[i] * t.stride(0) * size, row_bytes);
  });
  return rows;
}

// Adds rows (n, C) of any dtype to the rows of sums, contiguous fp32, at these places, which differ.
void add_to_rows(const Tensor& sums, IntArrayRef places, const Tensor& rows) {
  const int64_t C = sums.size(1);
  float* const all = sums.data_ptr<float>();
  with_type(rows.scalar_type(), [&](auto number) {
    const auto* from = rows.const_data_ptr<decltype(number)>();
    parallel_for(0, static_cast<int64_t>(places.size()), ROWS_PER_SHARE, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < C; ++j) all[places[i] * C + j] += static_cast<float>(from[i * C + j]);
    });
  });
}

// Adds the gradients of a chunk: dinput of its rows, and its share of dweight, if that is defined.
struct HeadGradients {
  const Tensor &weight, &dinput, &dweight;
  bool first;  // whether dweight is still uninitialised

  void add(const Tensor& dlogits, const Tensor& input) const {
    matmul(dinput, dlogits, weight);
    if (dweight.defined()) matmul(dweight, dlogits.t(), input, {}, !first);
  }

  // Does the same with only some columns of dlogits, which were moved to its front; the others count as 0.
  void add(const Tensor& dlogits, const Tensor& input, const Ints& columns) const {
    const int64_t kept = static_cast<int64_t>(columns.size());
    // The columns whose rows of weight are copied at a time. In 16 bits there is one slab, so dinput is rounded once.
    const int64_t slab = dlogits.scalar_type() == kFloat ? FP32_COLUMNS_PER_SLAB : kept;
    if (first && dweight.defined()) zero(dweight);
    if (!kept) zero(dinput);
    for (int64_t begin = 0; begin < kept; begin += slab) {
      const IntArrayRef some(columns.data() + begin, std::min(slab, kept - begin));
      const int64_t n = static_cast<int64_t>(some.size());
      const Tensor part = dlogits.narrow(1, begin, n);
      matmul(dinput, part, rows_of(weight, some), {}, begin > 0);
      if (!dweight.defined()) continue;
      Tensor share = make_tensor({n, weight.size(1)}, dlogits.scalar_type());
      matmul(share, part.t(), input);
      add_to_rows(dweight, some, share);
    }
  }
};

// Moves the columns that have an entry above skip_below times its row's dloss to the front of dlogits and returns their
// indices. Returns nothing, and moves nothing, where nearly all columns have one.
std::optional<Ints> keep_columns(const Tensor& dlogits, const float* dloss, double skip_below) {
  const int64_t N = dlogits.size(0), V = dlogits.size(1);
  std::vector<float> limits(N);
  // Nothing is small beside inf: such a row keeps every column.
  for (int64_t i = 0; i < N; ++i)
    limits[i] = std::isfinite(dloss[i]) ? static_cast<float>(skip_below * std::abs(dloss[i])) : 0.0f;
  std::vector<uint8_t> marks(V);
  constexpr int64_t COLUMNS_PER_STRIP = 256;
  parallel_for(0, (V + COLUMNS_PER_STRIP - 1) / COLUMNS_PER_STRIP, 1, [&](int64_t begin, int64_t end) {
    loops().cross_entropy->mark_columns(dtype_of(dlogits), dlogits.const_data_ptr(), N, V, limits.data(), marks.data(),
                                        begin * COLUMNS_PER_STRIP, std::min(V, end * COLUMNS_PER_STRIP));
  });
  Ints kept;
  for (int64_t j = 0; j < V; ++j)
    if (marks[j]) kept.push_back(j);
  if (static_cast<double>(kept.size()) > MAX_KEPT_SHARE * static_cast<double>(V)) return std::nullopt;
  const auto move = [&](auto* rows) {
    parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (size_t j = 0; j < kept.size(); ++j) rows[i * V + j] = rows[i * V + kept[j]];
    });
  };
  if (dlogits.element_size() == 4)
    move(static_cast<uint32_t*>(dlogits.data_ptr()));
  else
    move(static_cast<uint16_t*>(dlogits.data_ptr()));
  return kept;
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_fwd_bwd(const Tensor& input, const Tensor& weight,
                                                                const Tensor& target_in, const Tensor& dloss_in,
                                                                int64_t ignore_index, double label_smoothing,
                                                                double z_loss, double skip_below, bool need_dweight) {
  if (input.scalar_type() == kDouble)
    return reference<decltype(linear_cross_entropy_fwd_bwd)>("linear_cross_entropy_fwd_bwd", input, weight, target_in,
                                                             dloss_in, ignore_index, label_smoothing, z_loss,
                                                             skip_below, need_dweight);
  check_linear(input, weight);
  const Tensor target = contiguous(target_in), dloss = contiguous(to(dloss_in, kFloat));
  const int64_t N = input.size(0);
  check_targets(target, N, weight.size(0), ignore_index);
  CHECK_VALUE(dloss.dim() == 1 && dloss.size(0) == N, "linear_cross_entropy: dloss must be (", N, ",), got ",
              dloss.sizes());
  Tensor loss = empty({N}, kFloat), stats = make_stats(loss);
  Tensor dinput = make_tensor(input.sizes(), input.scalar_type());
  // Several chunks add up in fp32: a 16-bit sum would round away what each one adds.
  const bool one_chunk = N <= chunk_rows(N, weight.size(0), input.element_size());
  const auto dtype = one_chunk && skip_below == 0 ? weight.scalar_type() : kFloat;
  Tensor dweight;
  if (need_dweight) dweight = make_tensor(weight.sizes(), dtype);
  if (need_dweight && N == 0) zero(dweight);
  for_each_chunk(input, weight, [&](int64_t row, int64_t n, const Tensor& logits) {
    CrossEntropyArgs args = arguments(logits, target, ignore_index, label_smoothing, z_loss);
    args.target += row;
    args.loss = loss.data_ptr<float>() + row;
    args.stats = stats.data_ptr<double>() + row * STATS;
    args.dloss = dloss.const_data_ptr<float>() + row;
    args.dlogits = logits.data_ptr();
    for_each_row(loops().cross_entropy->fwd_bwd, args, n);
    const Tensor dx = dinput.narrow(0, row, n), x = input.narrow(0, row, n);
    const auto columns = skip_below > 0 ? keep_columns(logits, args.dloss, skip_below) : std::nullopt;
    const HeadGradients gradients{weight, dx, dweight, row == 0};
    columns ? gradients.add(logits, x, *columns) : gradients.add(logits, x);
  });
  double total = 0;
  const float *const losses = loss.const_data_ptr<float>(), *const weights = dloss.const_data_ptr<float>();
  for (int64_t i = 0; i < N; ++i) total += static_cast<double>(losses[i]) * weights[i];
  dweight = need_dweight ? to(dweight, weight.scalar_type()) : empty({0}, weight.scalar_type());
  return {scalar(static_cast<float>(total)), dinput, dweight};
}

const Kernels kernels = Kernels("CPU")
                            .add<cross_entropy_fwd>("cross_entropy_fwd")
                            .add<cross_entropy_bwd>("cross_entropy_bwd")
                            .add<linear_cross_entropy_fwd>("linear_cross_entropy_fwd")
                            .add<linear_cross_entropy_fwd_bwd>("linear_cross_entropy_fwd_bwd");

}  // namespace
}  // namespace gptfast
