// Layer normalisation over rows: forward, and backward as a pass over columns, for the gradients of scale and
// shift, and one over rows, for that of the input.
#include "simd.h"

namespace gptfast::GPTFAST_LEVEL {
namespace {

constexpr int64_t BLOCK = 16;  // rows summed in fp32, and then in double: as exact as torch's pairwise sums
constexpr int64_t STRIP = 4;   // vectors side by side: whole cache lines, and chains that overlap

inline vf first(vf x, int64_t n) {
  for (int64_t i = n; i < W; ++i) x[i] = 0.0f;
  return x;
}

template <class X>
void row_stats(const X* x, int64_t C, float eps, float* stats) {
  vf total[2] = {}, squares[2] = {};
  int64_t c = 0;
  for (; c + 2 * W <= C; c += 2 * W)
    for (int i = 0; i < 2; ++i) total[i] += load(x + c + i * W);
  for (; c < C; c += W) total[0] += load_n(x + c, smaller<int64_t>(W, C - c));
  const float mean = (float)((double)sum(total[0] + total[1]) / C);
  for (c = 0; c + 2 * W <= C; c += 2 * W)
    for (int i = 0; i < 2; ++i) {
      const vf d = load(x + c + i * W) - mean;
      squares[i] += d * d;
    }
  for (; c < C; c += W) {
    const int64_t n = smaller<int64_t>(W, C - c);
    const vf d = first(load_n(x + c, n) - mean, n);
    squares[0] += d * d;
  }
  stats[0] = mean;
  stats[1] = (float)(1 / sqrt((double)sum(squares[0] + squares[1]) / C + eps));
}

template <class X, class Y>
void normalize_rows(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const X* x = (const X*)args.x + row * args.C;
    Y* y = (Y*)args.y + row * args.C;
    float* stats = args.stats + 2 * row;
    if (args.fresh) row_stats(x, args.C, args.eps, stats);
    for (int64_t c = 0; c < args.C; c += W) {
      const int64_t n = smaller<int64_t>(W, args.C - c);
      const vf normal = (load_n(x + c, n) - stats[0]) * stats[1];
      store_n(y + c, normal * load_n(args.weight + c, n) + load_n(args.bias + c, n), n);
    }
  }
}

// dweight = sum of dy times the normalised x, dbias = sum of dy, over rows; columns begin .. end
template <class X, class Y>
void bwd_columns(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += STRIP * W) {
    vd dweight[STRIP] = {}, dbias[STRIP] = {};
    const int64_t vectors = smaller(STRIP, (end - c + W - 1) / W);
    for (int64_t from = 0; from < args.N; from += BLOCK) {
      vf weighted[STRIP] = {}, plain[STRIP] = {};
      for (int64_t row = from; row < smaller(args.N, from + BLOCK); ++row) {
        const float mean = args.stats[2 * row], inverse = args.stats[2 * row + 1];
        for (int64_t i = 0; i < vectors; ++i) {
          const int64_t at = row * args.C + c + i * W, n = smaller<int64_t>(W, args.C - c - i * W);
          const vf dy = load_n((const Y*)args.y + at, n);
          weighted[i] += dy * ((load_n((const X*)args.x + at, n) - mean) * inverse);
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

// dx = (g - mean(g) - x' mean(g x')) / std + residual, where g = dy weight and x' is x normalised
template <class X, class Y>
void bwd_rows(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const X* x = (const X*)args.x + row * args.C;
    const Y* dy = (const Y*)args.y + row * args.C;
    const float mean = args.stats[2 * row], inverse = args.stats[2 * row + 1];
    vf plain = {}, weighted = {};
    for (int64_t c = 0; c < args.C; c += W) {
      const int64_t n = smaller<int64_t>(W, args.C - c);
      const vf g = load_n(dy + c, n) * load_n(args.weight + c, n);  // 0 past the row's end
      plain += g;
      weighted += g * ((load_n(x + c, n) - mean) * inverse);
    }
    const float shift = sum(plain) / args.C, slope = sum(weighted) / args.C;
    X* dx = (X*)args.dx + row * args.C;
    const X* residual = args.residual ? (const X*)args.residual + row * args.C : nullptr;
    for (int64_t c = 0; c < args.C; c += W) {
      const int64_t n = smaller<int64_t>(W, args.C - c);
      const vf g = load_n(dy + c, n) * load_n(args.weight + c, n), normal = (load_n(x + c, n) - mean) * inverse;
      const vf passed = residual ? load_n(residual + c, n) : vf{};
      store_n(dx + c, (g - shift - normal * slope) * inverse + passed, n);
    }
  }
}

// to[c] = sum of the rows' elements, columns begin .. end
template <class T>
void sum_columns(const void* from, int64_t N, int64_t C, float* to, int64_t begin, int64_t end) {
  const T* x = (const T*)from;
  for (int64_t c = begin; c < end; c += STRIP * W) {
    vd total[STRIP] = {};
    const int64_t vectors = smaller(STRIP, (end - c + W - 1) / W);
    for (int64_t block = 0; block < N; block += BLOCK) {
      vf part[STRIP] = {};
      for (int64_t row = block; row < smaller(N, block + BLOCK); ++row)
        for (int64_t i = 0; i < vectors; ++i)
          part[i] += load_n(x + row * C + c + i * W, smaller<int64_t>(W, C - c - i * W));
      for (int64_t i = 0; i < vectors; ++i) total[i] += __builtin_convertvector(part[i], vd);
    }
    for (int64_t i = 0; i < vectors; ++i)
      store_n(to + c + i * W, __builtin_convertvector(total[i], vf), smaller<int64_t>(W, C - c - i * W));
  }
}

// f(x's element type, y's element type): the same, or fp32 beside one of 16 bits
template <class F>
void by_dtypes(const NormArgs& args, F f) {
  by_dtype(args.y_dtype, [&](auto y) { args.x_dtype == Dtype::fp32 ? f(float{}, y) : f(y, y); });
}

void normalize(const NormArgs& args, int64_t begin, int64_t end) {
  by_dtypes(args, [&](auto x, auto y) { normalize_rows<decltype(x), decltype(y)>(args, begin, end); });
}
void columns(const NormArgs& args, int64_t begin, int64_t end) {
  by_dtypes(args, [&](auto x, auto y) { bwd_columns<decltype(x), decltype(y)>(args, begin, end); });
}
void rows(const NormArgs& args, int64_t begin, int64_t end) {
  by_dtypes(args, [&](auto x, auto y) { bwd_rows<decltype(x), decltype(y)>(args, begin, end); });
}
void sums(Dtype dtype, const void* x, int64_t N, int64_t C, float* to, int64_t begin, int64_t end) {
  by_dtype(dtype, [&](auto type) { sum_columns<decltype(type)>(x, N, C, to, begin, end); });
}

}  // namespace

const NormLoops norm = {normalize, columns, rows, sums};

}  // namespace gptfast::GPTFAST_LEVEL
