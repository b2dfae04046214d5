// The Python module: information about the build, and a few switches. Tensors go through the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <fstream>
#include <set>

#include "arena.h"
#include "level.h"
#include "matmul.h"
#include "operators.h"

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
  info["reads_settings"] = torch_tells_settings();
  return info;
}

// The error of a reference that PyTorch called for a kernel, until it is raised: PyTorch would not pass it on.
thread_local PyObject* kept_error = nullptr;

// What pybind11 turns into the kept error, with its type, text and traceback.
class KeptError : public pybind11::builtin_exception {
 public:
  KeptError() : builtin_exception("") {}
  void set_error() const override {
    PyObject* const error = std::exchange(kept_error, nullptr);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
    Py_DECREF(error);
  }
};

void keep_error(const pybind11::object& error) { Py_XDECREF(std::exchange(kept_error, error.inc_ref().ptr())); }

}  // namespace

void throw_kept_error() {
  if (kept_error) throw KeptError();
}

void throw_value_error(const std::string& message) { throw pybind11::value_error(message); }
void throw_index_error(const std::string& message) { throw pybind11::index_error(message); }

}  // namespace gptfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "gptfast's C++ kernels; the operators register themselves with PyTorch on import.";
  m.def("build_info", &gptfast::build_info,
        "Return the level, compiler and OpenMP libraries of this build, and whether it reads PyTorch's settings.");
  m.def("set_isa", &gptfast::set_level,
        "Choose the instruction-set level by its name; build_info()['isa_supported'] lists those this CPU has.");
  m.def("set_matmul_provider", &gptfast::set_matmul_provider,
        "Choose who multiplies fp32 matrices: 'gptfast', 'library', or '' to let the CPU decide.");
  m.def("signatures", &gptfast::signatures,
        "Return the arguments and results of each operator that has a kernel here.");
  m.def(
      "keep_error", &gptfast::keep_error,
      "Keep the exception of a reference that this module called through PyTorch, which raises it when that returns.");
  m.def("empty_cache", &gptfast::empty_cache, "Give the memory of freed tensors back to the system.");
}
