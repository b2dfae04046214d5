#include "torch_settings.h"

// The names as the compiler makes them of at::Context's; macOS puts an underscore before all names.
#ifdef __APPLE__
#define NAMED(name) __asm__("_" name)
#else
#define NAMED(name) __asm__(name)
#endif

namespace gptfast {
namespace {

extern "C" {
// Context& at::globalContext()
[[gnu::weak]] const void* torch_context() NAMED("_ZN2at13globalContextEv");
// bool at::Context::deterministicAlgorithms() const
[[gnu::weak]] bool torch_deterministic(const void*) NAMED("_ZNK2at7Context23deterministicAlgorithmsEv");
// bool at::Context::deterministicFillUninitializedMemory() const
[[gnu::weak]] bool torch_fills(const void*) NAMED("_ZNK2at7Context36deterministicFillUninitializedMemoryEv");
// Float32Precision at::Context::float32Precision(Float32Backend, Float32Op) const
[[gnu::weak]] int torch_precision(const void*, int backend, int op)
    NAMED("_ZNK2at7Context16float32PrecisionENS_14Float32BackendENS_9Float32OpE");
}

// The values of those enumerations.
constexpr int MKLDNN = 2, MATMUL = 3;
constexpr int TF32 = 2, BF16 = 3;  // "high" and "medium"

}  // namespace

bool torch_tells_precision() { return torch_context && torch_precision; }
bool torch_tells_filling() { return torch_context && torch_deterministic && torch_fills; }

bool torch_fills_new_memory() {
  return torch_tells_filling() && torch_deterministic(torch_context()) && torch_fills(torch_context());
}

int parts_asked_for() {
  if (!torch_tells_precision()) return 3;
  const int precision = torch_precision(torch_context(), MKLDNN, MATMUL);
  return precision == BF16 ? 1 : precision == TF32 ? 2 : 3;
}

}  // namespace gptfast
