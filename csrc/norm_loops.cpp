// Layer normalisation over rows. The backward has two passes: one over columns for the gradients of weight and bias,
// and one over rows for the gradient of the input.
#include "layer_norm.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// Rows that are summed in fp32 before their sum is added in double: as exact as torch's pairwise sums.
constexpr int64_t ROWS_PER_BLOCK = 16;
// Vectors side by side: they are whole cache lines, and their sums overlap.
constexpr int64_t VECTORS_PER_STRIP = 4;

template <class X, class Y>
void normalize_rows(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const X* x = (const X*)args.x + row * args.C;
    float* stats = args.stats + 2 * row;
    if (args.compute_stats) {
      const RowStats computed = row_stats<2>(x, args.C, args.eps);
      stats[0] = computed.mean;
      stats[1] = computed.inverse_std;
    }
    normalize_row(x, {stats[0], stats[1]}, args.weight, args.bias, args.C, (Y*)args.y + row * args.C);
  }
}

// Computes dweight = sum of dy times the normalised x and dbias = sum of dy, both over rows, for columns begin .. end.
template <class X, class Y>
void sum_weight_gradients(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += VECTORS_PER_STRIP * W) {
    vd dweight[VECTORS_PER_STRIP] = {}, dbias[VECTORS_PER_STRIP] = {};
    const int64_t vectors = smaller(VECTORS_PER_STRIP, (end - c + W - 1) / W);
    for (int64_t block = 0; block < args.N; block += ROWS_PER_BLOCK) {
      vf weighted[VECTORS_PER_STRIP] = {}, plain[VECTORS_PER_STRIP] = {};
      for (int64_t row = block; row < smaller(args.N, block + ROWS_PER_BLOCK); ++row) {
        const float mean = args.stats[2 * row], inverse_std = args.stats[2 * row + 1];
        for (int64_t i = 0; i < vectors; ++i) {
          const int64_t at = row * args.C + c + i * W, n = smaller<int64_t>(W, args.C - c - i * W);
          const vf dy = load_n((const Y*)args.y + at, n);
          weighted[i] += dy * ((load_n((const X*)args.x + at, n) - mean) * inverse_std);
          plain[i] += dy;
        }
      }
      for (int64_t i = 0; i < vectors; ++i) {
        dweight[i] += __builtin_convertvector(weighted[i], vd);
        dbias[i] += __builtin_convertvector(plain[i], vd);
      }
    }
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t n = smaller<int64_t>(W, args.C - c - i * W);
      store_n(args.dweight + c + i * W, __builtin_convertvector(dweight[i], vf), n);
      store_n(args.dbias + c + i * W, __builtin_convertvector(dbias[i], vf), n);
    }
  }
}

// Computes dx = (g - mean(g) - x' mean(g x')) / std + residual, where g = dy weight and x' is x normalised.
template <class X, class Y>
void input_gradients(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const X* x = (const X*)args.x + row * args.C;
    const Y* dy = (const Y*)args.y + row * args.C;
    const float mean = args.stats[2 * row], inverse_std = args.stats[2 * row + 1];
    vf plain = {}, weighted = {};
    for (int64_t c = 0; c < args.C; c += W) {
      const int64_t n = smaller<int64_t>(W, args.C - c);
      const vf g = load_n(dy + c, n) * load_n(args.weight + c, n);  // 0 past the row's end
      plain += g;
      weighted += g * ((load_n(x + c, n) - mean) * inverse_std);
    }
    const float shift = sum(plain) / args.C, slope = sum(weighted) / args.C;
    X* dx = (X*)args.dx + row * args.C;
    const X* residual = args.residual ? (const X*)args.residual + row * args.C : nullptr;
    for (int64_t c = 0; c < args.C; c += W) {
      const int64_t n = smaller<int64_t>(W, args.C - c);
      const vf g = load_n(dy + c, n) * load_n(args.weight + c, n), normal = (load_n(x + c, n) - mean) * inverse_std;
      const vf passed = residual ? load_n(residual + c, n) : vf{};
      store_n(dx + c, (g - shift - normal * slope) * inverse_std + passed, n);
    }
  }
}

template <class T>
void column_sums(const T* x, int64_t N, int64_t C, float* sums, int64_t begin, int64_t end) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t c = begin; c < end; c += VECTORS_PER_STRIP * W) {
    vd total[VECTORS_PER_STRIP] = {};
    const int64_t vectors = smaller(VECTORS_PER_STRIP, (end - c + W - 1) / W);
    for (int64_t block = 0; block < N; block += ROWS_PER_BLOCK) {
      vf part[VECTORS_PER_STRIP] = {};
      for (int64_t row = block; row < smaller(N, block + ROWS_PER_BLOCK); ++row) {
        const T* strip = x + row * C + c;
        // Rows are too far apart for the CPU to fetch the next ones by itself.
        for (int64_t i = 0; i < VECTORS_PER_STRIP * W; i += LINE) __builtin_prefetch(strip + ROWS_PER_BLOCK * C + i);
        for (int64_t i = 0; i < vectors; ++i) part[i] += load_n(strip + i * W, smaller<int64_t>(W, C - c - i * W));
      }
      for (int64_t i = 0; i < vectors; ++i) total[i] += __builtin_convertvector(part[i], vd);
    }
    for (int64_t i = 0; i < vectors; ++i)
      store_n(sums + c + i * W, __builtin_convertvector(total[i], vf), smaller<int64_t>(W, C - c - i * W));
  }
}

// Calls f(an x element, a y element): of one type, or an fp32 x and a 16-bit y.
template <class F>
void by_dtypes(const NormArgs& args, F f) {
  by_dtype(args.y_dtype, [&](auto y) { args.x_dtype == Dtype::fp32 ? f(float{}, y) : f(y, y); });
}

void normalize(const NormArgs& args, int64_t begin, int64_t end) {
  by_dtypes(args, [&](auto x, auto y) { normalize_rows<decltype(x), decltype(y)>(args, begin, end); });
}
void bwd_columns(const NormArgs& args, int64_t begin, int64_t end) {
  by_dtypes(args, [&](auto x, auto y) { sum_weight_gradients<decltype(x), decltype(y)>(args, begin, end); });
}
void bwd_rows(const NormArgs& args, int64_t begin, int64_t end) {
  by_dtypes(args, [&](auto x, auto y) { input_gradients<decltype(x), decltype(y)>(args, begin, end); });
}
void sum_columns(Dtype dtype, const void* x, int64_t N, int64_t C, float* sums, int64_t begin, int64_t end) {
  by_dtype(dtype, [&](auto type) { column_sums((const decltype(type)*)x, N, C, sums, begin, end); });
}

}  // namespace

extern const NormLoops norm = {normalize, bwd_columns, bwd_rows, sum_columns};

}  // namespace gptfast::GPTFAST_LEVEL
