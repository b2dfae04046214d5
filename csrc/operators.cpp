#include "operators.h"

#include <torch/headeronly/version.h>

namespace gptfast {
namespace {

// Autograd looks away while this lives.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }

 private:
  bool before_;
};

}  // namespace

std::map<std::string, std::string>& signatures() {
  static std::map<std::string, std::string> all;
  return all;
}

Kernels::Kernels(const char* key) {
  check_torch(aoti_torch_library_init_impl("gptfast", key, __FILE__, __LINE__, &library_));
}

void Kernels::add(const char* name, void (*call)(StableIValue*, uint64_t, uint64_t), const std::string& signature) {
  check_torch(torch_library_impl(library_, name, call, TORCH_ABI_VERSION));
  signatures()[name] = signature;
}

void call_reference(const char* name, StableIValue* stack) {
  const NoGrad guard;
  const std::string whole_name = text("gptfast_reference::", name);
  const AOTITorchError error = torch_call_dispatcher(whole_name.c_str(), "", stack, TORCH_ABI_VERSION);
  if (error) throw_kept_error();  // which says more
  check_torch(error);
}

}  // namespace gptfast
