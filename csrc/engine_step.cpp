// One step of the engine: new tokens of any rows through all layers, the head, and the choice of the next tokens.
#include <omp.h>

#include "arena.h"
#include "common.h"
#include "engine_layout.h"
#include "sampling.h"

namespace gptfast {
namespace {

constexpr int64_t BUFFER_ALIGNMENT = 128;  // bytes: no two buffers share a cache line, or a pair that the CPU fetches

// Checks the new tokens of each row against slots (rows, tokens) and returns them.
std::vector<EngineSegment> make_segments(const Tensor& slots, int64_t n_slots, const Ints& rows, const Ints& starts,
                                         const Ints& counts, int64_t N, int64_t block_size) {
  CHECK_VALUE(slots.dim() == 2 && slots.scalar_type() == kInt && slots.is_contiguous(),
              "engine: slots must be contiguous int32 of shape (rows, tokens), got ", slots.sizes(), " ",
              slots.scalar_type());
  CHECK_VALUE(rows.size() == starts.size() && rows.size() == counts.size(),
              "engine: rows, starts and counts need one length, got ", rows.size(), ", ", starts.size(), " and ",
              counts.size());
  std::vector<EngineSegment> segments;
  int64_t first = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t start = starts[i], n = counts[i];
    CHECK_INDEX(rows[i] >= 0 && rows[i] < slots.size(0) && start >= 0 && n > 0 && n <= slots.size(1) &&
                    start <= slots.size(1) - n,
                "engine: slots ", slots.sizes(), " have no ", n, " tokens from position ", start, " on in row ",
                rows[i]);
    CHECK_INDEX(start + n <= block_size, "engine: position ", start + n - 1, " is beyond block_size=", block_size);
    const int32_t* row = slots.const_data_ptr<int32_t>() + rows[i] * slots.size(1);
    for (int64_t t = 0; t < start + n; ++t)
      CHECK_INDEX(row[t] >= 0 && row[t] < n_slots, "engine: slot ", row[t], " is out of range for a cache of ",
                  n_slots);
    segments.push_back({.slots = row, .start = start, .first = first, .n = n});
    first += n;
  }
  CHECK_VALUE(first == N, "engine: counts add up to ", first, ", but there are ", N, " ids");
  return segments;
}

std::vector<int64_t> token_positions(const std::vector<EngineSegment>& segments) {
  std::vector<int64_t> positions;
  for (const EngineSegment& segment : segments)
    for (int64_t i = 0; i < segment.n; ++i) positions.push_back(segment.start + i);
  return positions;
}

// One tensor that holds all buffers.
class Buffers {
 public:
  int64_t add(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += round_up(bytes, BUFFER_ALIGNMENT);
    return offset;
  }
  void allocate() {
    memory_ = make_tensor({bytes_ + BUFFER_ALIGNMENT}, kByte);
    start_ = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(memory_.data_ptr()), BUFFER_ALIGNMENT));
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(start_ + offset);
  }

 private:
  Tensor memory_;
  char* start_ = nullptr;
  int64_t bytes_ = 0;
};

// Returns the floats that a thread needs for attention, or for the normalised inputs of a product.
int64_t scratch_floats(const EngineArgs& args, int64_t queries) {
  int64_t longest = 0;
  for (int64_t i = 0; i < args.n_segments; ++i)
    longest = std::max(longest, args.segments[i].start + args.segments[i].n);
  const int64_t attention = queries * (round_up(longest, 16) + 2 * round_up(args.D, CACHE_UNIT));
  return round_up(std::max(attention, 4 * round_up(args.C, 16)), 32);
}

void run(EngineArgs& args) {
  const int64_t threads = available_threads();
  const int64_t C = args.C, N = args.N, rows = std::max(N, args.n_wanted);
  const EngineLoops& engine = *loops().engine;
  const int64_t row_bytes = std::max(engine.input_bytes(args.type, C), engine.input_bytes(args.type, 4 * C));
  args.private_inputs_bytes = MAX_PRIVATE_ROWS * row_bytes;
  args.scratch_floats = scratch_floats(args, engine.queries_per_pass);
  Buffers buffers;
  const auto add_rows = [&](int64_t n, int64_t width) { return buffers.add(n * round_up(width, PANEL) * 4); };
  const int64_t x = add_rows(N, C), qkv = add_rows(N, 3 * C), attended = add_rows(rows, C), fc = add_rows(N, 4 * C);
  const int64_t inputs =
      buffers.add(std::max(threads * args.private_inputs_bytes, round_up(rows, ROW_UNIT) * row_bytes));
  const int64_t scratch = buffers.add(threads * args.scratch_floats * 4);
  buffers.allocate();
  args.x = buffers.at<float>(x);
  args.qkv = buffers.at<float>(qkv);
  args.attended = buffers.at<float>(attended);
  args.fc = buffers.at<float>(fc);
  args.inputs = buffers.at<char>(inputs);
  args.scratch = buffers.at<float>(scratch);
  EngineBarrier barrier;
  args.barrier = &barrier;
  if (threads == 1) return engine.forward(args, 0, 1);
  // Not parallel_for: the threads wait for each other, so all of them must run at once, whatever their number is.
#pragma omp parallel num_threads(static_cast<int>(threads))
  engine.forward(args, omp_get_thread_num(), omp_get_num_threads());
}

// The parameters of `sample` in the order of the operator's list, and the position of each drawn token.
struct SamplingTensors {
  static constexpr size_t COUNT = 5;
  const Tensor &temperature, &top_k, &top_p, &min_p, &seed;
  explicit SamplingTensors(const TensorList& list)
      : temperature(list[0]), top_k(list[1]), top_p(list[2]), min_p(list[3]), seed(list[4]) {}
};

Tensor sample_ids(const Tensor& logits, const TensorList& sampling, const Ints& positions) {
  Tensor position = empty({logits.size(0)}, kLong);
  if (sampling.empty() || logits.size(0) == 0) return position.narrow(0, 0, 0);
  std::copy(positions.begin(), positions.end(), position.data_ptr<int64_t>());
  const SamplingTensors tensors(sampling);
  return sample(logits, tensors.temperature, tensors.top_k, tensors.top_p, tensors.min_p, tensors.seed, position);
}

EngineArgs model_args(const ModelShape& shape, const Layout& layout, const char* model,
                      const std::vector<EngineLayer>& layers) {
  EngineArgs args{};
  args.type = shape.type();
  args.n_layer = shape.n_layer;
  args.n_head = shape.n_head;
  args.C = shape.n_embd;
  args.D = shape.head_dim();
  args.layers = layers.data();
  args.ln_f = layout.ln_f(model);
  args.wte = layout.wte(model);
  args.head = layout.head(model);
  args.wpe = layout.wpe(model);
  return args;
}

std::tuple<Tensor, Tensor> step(const Tensor& packed, const Ints& shape_fields, const Tensor& cache,
                                const Tensor& slots, const Ints& rows, const Ints& starts, const Ints& counts,
                                const Ints& ids, const Ints& wanted, const TensorList& sampling,
                                const Ints& positions) {
  const ModelShape shape(shape_fields);
  const Layout layout(shape);
  const int64_t N = static_cast<int64_t>(ids.size()), M = static_cast<int64_t>(wanted.size()), V = shape.vocab_size;
  layout.check(packed);
  CHECK_VALUE(cache.is_contiguous() && cache.scalar_type() == shape.cache_dtype() &&
                  cache.numel() % shape.cache_elements_per_token() == 0,
              "engine: the cache must be contiguous ", shape.cache_dtype(), " with a multiple of ",
              shape.cache_elements_per_token(), " elements, got ", cache.sizes(), " ", cache.scalar_type());
  CHECK_VALUE(sampling.empty() || (sampling.size() == SamplingTensors::COUNT && positions.size() == wanted.size()),
              "engine: sampling needs temperature, top_k, top_p, min_p, seed, and a position for each wanted token");
  for (const int64_t id : ids)
    CHECK_INDEX(id >= 0 && id < V, "engine: token id ", id, " is out of range for a vocabulary of ", V);
  for (const int64_t t : wanted)
    CHECK_INDEX(t >= 0 && t < N, "engine: wanted token ", t, " is out of range for ", N, " ids");
  const int64_t n_slots = cache.numel() / shape.cache_elements_per_token();
  const auto segments = make_segments(slots, n_slots, rows, starts, counts, N, shape.block_size);
  const auto in_row = token_positions(segments);

  const char* model = static_cast<const char*>(packed.const_data_ptr());
  const auto layers = layout.layers(model);
  const Tensor padded_logits = make_tensor({M, round_up(V, PANEL)}, kFloat);
  EngineArgs args = model_args(shape, layout, model, layers);
  args.N = N;
  args.segments = segments.data();
  args.n_segments = static_cast<int64_t>(segments.size());
  args.ids = ids.data();
  args.positions = in_row.data();
  args.wanted = wanted.data();
  args.n_wanted = M;
  args.cache = static_cast<char*>(cache.data_ptr());
  args.n_slots = n_slots;
  args.logits = padded_logits.data_ptr<float>();
  if (N) run(args);
  const Tensor logits = padded_logits.narrow(1, 0, V);
  return {logits, sample_ids(logits, sampling, positions)};
}

const Kernels kernels = Kernels("CPU").add<step>("engine_step");

}  // namespace
}  // namespace gptfast
