// Cross entropy over rows of logits: one pass for the maximum, one for the sum, one for the gradient. A row of GPT-2
// logits is 200 KB, so the passes after the first read it from the core's own cache.
#include "maths.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Terms that are summed in fp32, in two chains a lane, before their sums are added in double. The error of the sum is
// that of every gradient of its row; in a long chain, each term would be rounded to the last bit of the largest one.
constexpr int64_t TERMS_PER_FP32_SUM = 2 * 8 * W;

template <class T>
float row_max(const T* x, int64_t V) {
  vf best[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
  int64_t j = 0;
  for (; j + 4 * W <= V; j += 4 * W)
    for (int i = 0; i < 4; ++i) best[i] = max(load(x + j + i * W), best[i]);
  for (; j < V; j += W) best[0] = max(j + W <= V ? load(x + j) : load_part(x + j, V - j, -INFINITY), best[0]);
  return max(max(max(best[0], best[1]), max(best[2], best[3])));
}

// Computes exps = sum_j exp(x_j - top) and, if SUM_VALUES, values = sum_j (x_j - top). The latter is in double
// throughout: no difference is rounded, and none overflows.
template <bool SUM_VALUES, class T>
void row_sums(const T* x, int64_t V, float top, double& exps, double& values) {
  exps = values = 0;
  vd exps_by_lane = {};
  for (int64_t begin = 0; begin < V; begin += TERMS_PER_FP32_SUM) {
    const int64_t end = smaller(V, begin + TERMS_PER_FP32_SUM);
    vf e[2] = {};
    vd v = {};
    int64_t j = begin;
    for (; j + 2 * W <= end; j += 2 * W)
      for (int i = 0; i < 2; ++i) {
        const vf value = load(x + j + i * W);
        e[i] += exp(value - top);
        if (SUM_VALUES) v += __builtin_convertvector(value, vd) - top;
      }
    for (; j < end; j += W) {
      const int64_t lanes = smaller<int64_t>(W, end - j);
      const vf value = load_n(x + j, lanes);
      e[0] += keep_lanes(exp(value - top), lanes);
      if (SUM_VALUES)
        for (int64_t i = 0; i < lanes; ++i) v[i] += (double)value[i] - top;
    }
    exps_by_lane += __builtin_convertvector(e[0], vd) + __builtin_convertvector(e[1], vd);
    if (SUM_VALUES) values = add_lanes(values, v);
  }
  exps = add_lanes(0, exps_by_lane);
}

template <class T>
void fwd_row(const CrossEntropyArgs& args, int64_t row) {
  const T* x = (const T*)args.logits + row * args.row_stride;
  const int64_t target = args.target[row], V = args.V;
  double* stats = args.stats + row * STATS;
  if (target == args.ignore_index) {
    args.loss[row] = 0;
    stats[STAT_TOP] = stats[STAT_EXP_SUM] = 0;
    return;
  }
  const float top = row_max(x, V), smoothing = args.label_smoothing;
  double exps, values;
  if (smoothing > 0)
    row_sums<true>(x, V, top, exps, values);
  else
    row_sums<false>(x, V, top, exps, values);
  stats[STAT_TOP] = top;
  stats[STAT_EXP_SUM] = exps;
  const double log_sum = log(exps), below_top = (double)top - load_one(x + target);
  double loss = (1.0 - smoothing) * (log_sum + below_top);
  if (smoothing > 0) loss += smoothing * (log_sum - values / V);
  if (args.z_loss > 0) loss += args.z_loss * (top + log_sum) * (top + log_sum);
  args.loss[row] = (float)loss;
}

template <class T>
void bwd_row(const CrossEntropyArgs& args, int64_t row) {
  const T* x = (const T*)args.logits + row * args.row_stride;
  T* dx = (T*)args.dlogits + row * args.V;
  const int64_t target = args.target[row], V = args.V;
  if (target == args.ignore_index) {
    memset((void*)dx, 0, sizeof(T) * V);
    return;
  }
  const double exp_sum = args.stats[row * STATS + STAT_EXP_SUM], dloss = args.dloss[row];
  const float top = (float)args.stats[row * STATS + STAT_TOP], smoothing = args.label_smoothing;
  const double at_target = load_one(x + target), lse = args.z_loss > 0 ? top + log(exp_sum) : 0;
  const double scale = 1 + 2 * args.z_loss * lse;
  const float factor = (float)(dloss * scale / exp_sum), offset = (float)(dloss * smoothing / V);
  int64_t j = 0;
  for (; j + W <= V; j += W) store(dx + j, exp(load(x + j) - top) * factor - offset);
  if (j < V) store_part(dx + j, exp(load_part(x + j, V - j) - top) * factor - offset, V - j);
  // In double: the terms cancel where the target is nearly certain.
  const double p = ::exp(at_target - top) / exp_sum;
  const double dtarget = dloss * (p * scale - smoothing / V - (1.0 - smoothing));
  store_part(dx + target, splat((float)dtarget), 1);
}

template <class T>
void fwd_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) fwd_row<T>(args, row);
}
template <class T>
void bwd_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) bwd_row<T>(args, row);
}
template <class T>
void fwd_bwd_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    fwd_row<T>(args, row);
    bwd_row<T>(args, row);
  }
}

// Sets marks[j] to whether column j has an entry |x_j| above its row's limit, or NaN.
template <class T>
void mark(const T* x, int64_t N, int64_t V, const float* limits, uint8_t* marks, int64_t begin, int64_t end) {
  constexpr int64_t VECTORS_PER_STRIP = 4;
  for (int64_t j = begin; j < end; j += VECTORS_PER_STRIP * W) {
    vi above[VECTORS_PER_STRIP] = {};
    const int64_t vectors = smaller(VECTORS_PER_STRIP, (end - j + W - 1) / W);
    for (int64_t row = 0; row < N; ++row)
      for (int64_t i = 0; i < vectors; ++i) {
        const vf value = load_n(x + row * V + j + i * W, smaller<int64_t>(W, end - j - i * W));
        above[i] |= ~((value <= splat(limits[row])) & (value >= splat(-limits[row])));
      }
    for (int64_t i = 0; i < smaller(VECTORS_PER_STRIP * W, end - j); ++i) marks[j + i] = above[i / W][i % W] != 0;
  }
}

void fwd(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto type) { fwd_rows<decltype(type)>(args, begin, end); });
}
void bwd(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto type) { bwd_rows<decltype(type)>(args, begin, end); });
}
void fwd_bwd(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto type) { fwd_bwd_rows<decltype(type)>(args, begin, end); });
}
void mark_columns(Dtype dtype, const void* x, int64_t N, int64_t V, const float* limits, uint8_t* marks, int64_t begin,
                  int64_t end) {
  by_dtype(dtype, [&](auto type) { mark((const decltype(type)*)x, N, V, limits, marks, begin, end); });
}

}  // namespace

extern const CrossEntropyLoops cross_entropy = {fwd, bwd, fwd_bwd, mark_columns};

}  // namespace gptfast::GPTFAST_LEVEL
