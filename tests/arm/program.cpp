// Runs one call of the loops without PyTorch: `program LEVEL NAME INPUT OUTPUT` reads the arguments from a file and
// writes its arrays to another, as they are after the call. `program` alone prints the levels of this CPU.
// tests/arm/program.py makes it and calls it.
#include <algorithm>
#include <functional>
#include <thread>

#include "call.h"
#include "engine.h"
#include "level.h"

namespace {

using namespace gptfast;

// Each of these takes the numbers of a call, then its arrays. Members are set in the order in which they are written.

void attention(Call& c) {
  AttentionArgs args{.dtype = c.dtype(),
                     .B = c.integer(),
                     .H = c.integer(),
                     .Tq = c.integer(),
                     .Tk = c.integer(),
                     .D = c.integer(),
                     .scale = c.real(),
                     .dropout_p = c.real(),
                     .seed = (uint64_t)c.integer()};
  args.kv_len = c.array<int64_t>();
  const auto heads = [&](int64_t T) { return Heads{c.array(), args.H * T * args.D, T * args.D, args.D}; };
  args.q = heads(args.Tq);
  args.k = heads(args.Tk);
  args.v = heads(args.Tk);
  args.out = heads(args.Tq);
  args.lse = c.array<double>();
  args.dout = heads(args.Tq);
  args.dq = heads(args.Tq);
  args.dk = heads(args.Tk);
  args.dv = heads(args.Tk);
  if (args.dout.data)
    loops().attention_bwd->run(args, 0, args.B * args.H);
  else
    loops().attention_fwd->run(args, 0, loops().attention_fwd->count_items(args));
}

void cross_entropy(Call& c) {
  const int64_t N = c.integer();
  CrossEntropyArgs args{.dtype = c.dtype(),
                        .V = c.integer(),
                        .row_stride = args.V,
                        .ignore_index = c.integer(),
                        .label_smoothing = (float)c.real(),
                        .z_loss = (float)c.real(),
                        .logits = c.array(),
                        .target = c.array<int64_t>(),
                        .loss = c.array<float>(),
                        .stats = c.array<double>(),
                        .dloss = c.array<float>(),
                        .dlogits = c.array()};
  const CrossEntropyLoops& loop = *loops().cross_entropy;
  (!args.dlogits ? loop.fwd : args.loss ? loop.fwd_bwd : loop.bwd)(args, 0, N);
}

void mark_columns(Call& c) {
  const Dtype dtype = c.dtype();
  const int64_t N = c.integer(), V = c.integer();
  const void* x = c.array();
  const float* limits = c.array<float>();
  loops().cross_entropy->mark_columns(dtype, x, N, V, limits, c.array<uint8_t>(), 0, V);
}

void adamw(Call& c) {
  const int64_t n = c.integer();
  AdamWTensor t{.dtype = c.dtype(),
                .moment_dtype = c.dtype(),
                .param = c.array(),
                .grad = c.array(),
                .exp_avg = c.array(),
                .exp_avg_sq = c.array(),
                .master = c.array<float>(),
                .step_size = (float)c.real(),
                .inv_sqrt_bias2 = (float)c.real(),
                .param_id = (uint32_t)c.integer(),
                .step = (uint32_t)c.integer()};
  const AdamWArgs args{.clip = (float)c.real(),
                       .decay = (float)c.real(),
                       .beta1 = (float)c.real(),
                       .one_minus_beta1 = (float)c.real(),
                       .beta2 = (float)c.real(),
                       .one_minus_beta2 = (float)c.real(),
                       .eps = (float)c.real(),
                       .stochastic = c.integer() != 0,
                       .seed = (uint64_t)c.integer()};
  loops().adamw->step(t, args, 0, n);
}

void square_sum(Call& c) {
  const Dtype dtype = c.dtype();
  const void* grad = c.array();
  *c.array<double>() = loops().adamw->square_sum(dtype, grad, 0, c.integer());
}

void sample(Call& c) {
  const int64_t B = c.integer();
  const SamplingArgs args{.dtype = c.dtype(),
                          .V = c.integer(),
                          .row_stride = args.V,
                          .logits = c.array(),
                          .temperature = c.array<float>(),
                          .top_k = c.array<int64_t>(),
                          .top_p = c.array<float>(),
                          .min_p = c.array<float>(),
                          .seed = c.array<int64_t>(),
                          .position = c.array<int64_t>(),
                          .ids = c.array<int64_t>()};
  loops().sampling->sample(args, 0, B);
}

void matmul(Call& c) {
  const MatmulArgs args{.M = c.integer(),
                        .N = c.integer(),
                        .K = c.integer(),
                        .a = c.array<float>(),
                        .a_row_stride = c.integer(),
                        .a_col_stride = c.integer(),
                        .b = c.array<float>(),
                        .b_row_stride = c.integer(),
                        .b_col_stride = c.integer(),
                        .c = c.array<float>(),
                        .c_row_stride = args.N,
                        .bias = c.array<float>(),
                        .accumulate = c.integer() != 0};
  loops().matmul->run(args, 0, args.M, 0, args.N);
}

void matmul_bf16(Call& c) {
  const MatmulBf16Args args{.M = c.integer(),
                            .N = c.integer(),
                            .K = c.integer(),
                            .a = c.array<bf16>(),
                            .a_row_stride = c.integer(),
                            .a_col_stride = c.integer(),
                            .b = c.array(),
                            .b_row_stride = c.integer(),
                            .b_col_stride = c.integer(),
                            .b_dtype = c.dtype(),
                            .c_dtype = c.dtype(),
                            .c = c.array(),
                            .c_row_stride = args.N,
                            .bias = c.array<bf16>(),
                            .residual = c.array(),
                            .residual_row_stride = args.N,
                            .accumulate = c.integer() != 0};
  loops().matmul_bf16->run(args, 0, args.M, 0, args.N);
}

void matmul_parts(Call& c) {
  const MatmulPartsArgs args{.M = c.integer(),
                             .N = c.integer(),
                             .K = c.integer(),
                             .a = c.array<float>(),
                             .a_row_stride = c.integer(),
                             .a_col_stride = c.integer(),
                             .b = c.array<float>(),
                             .b_row_stride = c.integer(),
                             .b_col_stride = c.integer(),
                             .c = c.array<float>(),
                             .c_row_stride = args.N,
                             .bias = c.array<float>(),
                             .residual = c.array<float>(),
                             .residual_row_stride = args.N,
                             .accumulate = c.integer() != 0,
                             .parts = (int)c.integer()};
  if (args.parts > loops().matmul_parts->max_parts) fail("this level has no products of so many parts");
  loops().matmul_parts->run(args, 0, args.M, 0, args.N);
}

// Normalises, or computes the gradients where there is room for dx.
void norm(Call& c) {
  const NormArgs args{.x_dtype = c.dtype(),
                      .y_dtype = c.dtype(),
                      .N = c.integer(),
                      .C = c.integer(),
                      .eps = (float)c.real(),
                      .compute_stats = c.integer() != 0,
                      .x = c.array(),
                      .weight = c.array<float>(),
                      .bias = c.array<float>(),
                      .stats = c.array<float>(),
                      .y = c.array(),
                      .dx = c.array(),
                      .residual = c.array(),
                      .dweight = c.array<float>(),
                      .dbias = c.array<float>()};
  if (!args.dx) return loops().norm->normalize(args, 0, args.N);
  loops().norm->bwd_columns(args, 0, args.C);
  loops().norm->bwd_rows(args, 0, args.N);
}

void sum_columns(Call& c) {
  const Dtype dtype = c.dtype();
  const int64_t N = c.integer(), C = c.integer();
  const void* x = c.array();
  loops().norm->sum_columns(dtype, x, N, C, c.array<float>(), 0, C);
}

// Computes gelu(x), and the gradient where there is one.
void gelu(Call& c) {
  const Dtype dtype = c.dtype();
  const int64_t n = c.integer();
  const void* x = c.array();
  void *y = c.array(), *dy = c.array();
  if (dy)
    loops().mlp->gelu_bwd(dtype, x, y, dy, 0, n);
  else
    loops().mlp->gelu_fwd(dtype, x, y, 0, n);
}

// Places in a packed model, in the order of engine_layout.cpp.
class Packed {
 public:
  Packed(Call& c, WeightType type) : c_(c), type_(type), data_(c.array<char>()) {}
  const float* floats() { return (const float*)(data_ + c_.integer()); }
  EngineNorm norm() {
    const float* weight = floats();
    return {weight, floats()};
  }
  EngineMatrix matrix(int64_t N, int64_t K) {
    EngineMatrix matrix{.panels = data_ + c_.integer(), .scale = nullptr, .bias = nullptr, .N = N, .K = K};
    if (type_ == WeightType::int8) matrix.scale = floats();
    return matrix;
  }
  EngineMatrix linear(int64_t N, int64_t K) {
    EngineMatrix linear = matrix(N, K);
    linear.bias = floats();
    return linear;
  }

 private:
  Call& c_;
  const WeightType type_;
  const char* data_;
};

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One step of the engine for one segment, as engine_step.cpp runs it.
void engine(Call& c) {
  const EngineLoops& loop = *loops().engine;
  EngineArgs args{.type = (WeightType)c.integer(),
                  .n_layer = c.integer(),
                  .n_head = c.integer(),
                  .C = c.integer(),
                  .D = c.integer(),
                  .N = c.integer()};
  const int64_t V = c.integer(), threads = c.integer(), start = c.integer(), C = args.C, N = args.N;
  Packed packed(c, args.type);
  args.wte = args.head = packed.matrix(V, C);
  args.wpe = packed.floats();
  std::vector<EngineLayer> layers;
  for (int64_t i = 0; i < args.n_layer; ++i)
    layers.push_back({.ln_1 = packed.norm(),
                      .c_attn = packed.linear(3 * C, C),
                      .attn_c_proj = packed.linear(C, C),
                      .ln_2 = packed.norm(),
                      .c_fc = packed.linear(4 * C, C),
                      .mlp_c_proj = packed.linear(C, 4 * C)});
  args.layers = layers.data();
  args.ln_f = packed.norm();
  const EngineSegment segment{.slots = c.array<int32_t>(), .start = start, .first = 0, .n = N};
  args.segments = &segment;
  args.n_segments = 1;
  args.ids = c.array<int64_t>();
  args.positions = c.array<int64_t>();
  args.wanted = c.array<int64_t>();
  args.n_wanted = c.integer();
  args.cache = c.array<char>();
  args.n_slots = c.integer();
  args.logits = c.array<float>();
  const int64_t row_bytes = std::max(loop.input_bytes(args.type, C), loop.input_bytes(args.type, 4 * C));
  args.private_inputs_bytes = MAX_PRIVATE_ROWS * row_bytes;
  const int64_t attention = loop.queries_per_pass * (round_up(start + N, 16) + 2 * round_up(args.D, CACHE_UNIT));
  args.scratch_floats = round_up(std::max(attention, 4 * round_up(C, 16)), 32);
  const int64_t rows = std::max(N, args.n_wanted);
  const auto take = [](int64_t bytes) { return aligned_alloc(128, round_up(bytes, 128)); };  // until the process ends
  const auto take_rows = [&](int64_t n, int64_t width) { return (float*)take(n * round_up(width, PANEL) * 4); };
  args.x = take_rows(N, C);
  args.qkv = take_rows(N, 3 * C);
  args.attended = take_rows(rows, C);
  args.fc = take_rows(N, 4 * C);
  args.inputs = (char*)take(std::max(threads * args.private_inputs_bytes, round_up(rows, ROW_UNIT) * row_bytes));
  args.scratch = (float*)take(threads * args.scratch_floats * 4);
  EngineBarrier barrier;
  args.barrier = &barrier;
  std::vector<std::thread> team;
  for (int64_t i = 1; i < threads; ++i) team.emplace_back(loop.forward, std::cref(args), i, threads);
  loop.forward(args, 0, threads);
  for (std::thread& thread : team) thread.join();
}

struct Operation {
  const char* name;
  void (*run)(Call&);
};
constexpr Operation OPERATIONS[] = {
    {"attention", attention}, {"cross_entropy", cross_entropy}, {"mark_columns", mark_columns},
    {"adamw", adamw},         {"square_sum", square_sum},       {"sample", sample},
    {"matmul", matmul},       {"matmul_bf16", matmul_bf16},     {"matmul_parts", matmul_parts},
    {"norm", norm},           {"sum_columns", sum_columns},     {"gelu", gelu},
    {"engine", engine},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    for (const std::string& name : supported_levels()) printf("%s\n", name.c_str());
    return 0;
  }
  set_level(argv[1]);
  for (const Operation& operation : OPERATIONS)
    if (!strcmp(operation.name, argv[2])) {
      Call call(argv[3]);
      operation.run(call);
      call.write(argv[4]);
      return 0;
    }
  fail(std::string("no operation ") + argv[2]);
}
