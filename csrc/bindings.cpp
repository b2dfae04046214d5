// The Python module: information about the build, and a few switches. Tensors go through the operators.
#ifdef _OPENMP
#include <omp.h>
#endif
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <fstream>
#include <set>

#include "arena.h"
#include "level.h"
#include "matmul.h"
#include "operators.h"
#include "torch_settings.h"

namespace gptfast {
namespace {

// Returns the OpenMP libraries in this process. With two of them, each starts a thread for every core.
std::set<std::string> openmp_runtimes() {
  std::set<std::string> found;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const std::string file = line.substr(line.find_last_of('/') + 1);
    if (file.starts_with("libgomp") || file.starts_with("libiomp") || file.starts_with("libomp")) found.insert(file);
  }
  return found;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["isa"] = level_name();
  info["isa_supported"] = supported_levels();
  info["isa_emulated"] = emulated_levels();
  info["matrix_engine"] = matrix_engine();
  info["compiler"] = __VERSION__;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["openmp_runtimes"] = openmp_runtimes();
  info["matmul"] = matmul_provider();
  std::vector<std::string> unknown;
  if (!torch_tells_precision()) unknown.push_back("torch.set_float32_matmul_precision");
  if (!torch_tells_filling()) unknown.push_back("torch.utils.deterministic.fill_uninitialized_memory");
  info["unknown_settings"] = unknown;
  return info;
}

void give_back(PyObject* error) {
  if (!Py_IsInitialized()) return;
  const pybind11::gil_scoped_acquire gil;
  Py_DECREF(error);
}

// An error of Python's as an exception of C++, which pybind11 turns into it again, with its type, text and traceback.
class KeptError : public pybind11::builtin_exception {
 public:
  KeptError(const pybind11::object& error, const std::string& text)
      : builtin_exception(text), error_(error.inc_ref().ptr(), give_back) {}
  void set_error() const override { PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error_.get())), error_.get()); }

 private:
  std::shared_ptr<PyObject> error_;
};

// That of a reference that PyTorch called for a kernel, until it is thrown: PyTorch would not pass it on.
thread_local std::optional<KeptError> kept_error;

void keep_error(const pybind11::object& error, const std::string& text) { kept_error.emplace(error, text); }

}  // namespace

void throw_kept_error() {
  if (!kept_error) return;
  const KeptError error = *kept_error;
  kept_error.reset();
  throw error;
}

void throw_value_error(const std::string& message) { throw pybind11::value_error(message); }
void throw_index_error(const std::string& message) { throw pybind11::index_error(message); }

}  // namespace gptfast

#ifdef _OPENMP
// GNU OpenMP's threads do not survive a fork. Python's forks set PyTorch's number of threads, too (ops/backend.py).
void serial_after_fork() { omp_set_num_threads(1); }
#endif

PYBIND11_MODULE(_C, m) {
#ifdef _OPENMP
  pthread_atfork(nullptr, nullptr, serial_after_fork);
#endif
  m.doc() = "gptfast's C++ kernels; the operators register themselves with PyTorch on import.";
  m.def("build_info", &gptfast::build_info,
        "Return the level, compiler and OpenMP libraries of this build, and which settings PyTorch does not tell it.");
  m.def("set_isa", &gptfast::set_level,
        "Choose the instruction-set level by its name; build_info()['isa_supported'] lists those this CPU has.");
  m.def("set_matmul_provider", &gptfast::set_matmul_provider,
        "Choose who multiplies fp32 matrices: 'gptfast', 'library', or '' to let the CPU decide.");
  m.def("signatures", &gptfast::signatures,
        "Return the arguments and results of each operator that has a kernel here.");
  m.def(
      "keep_error", &gptfast::keep_error,
      "Keep the exception, with its text, of a reference that this module called through PyTorch, and raise it then.");
  m.def("empty_cache", &gptfast::empty_cache, "Give the memory of freed tensors back to the system.");
}
