// The Python module: information about the build, and a few switches. Tensors go through the operators.
#include <ATen/Parallel.h>
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <fstream>
#include <set>

#include "arena.h"
#include "level.h"
#include "matmul.h"

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
  info["threads"] = at::get_num_threads();
  return info;
}

// A child process has one thread: GNU OpenMP's threads do not survive a fork, and a child that opened a parallel
// region would wait for them forever. MKL's products and PyTorch's own operators would do so too.
void serial_after_fork() { at::set_num_threads(1); }

}  // namespace
}  // namespace gptfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "gptfast's C++ kernels; the operators register themselves with PyTorch on import.";
  pthread_atfork(nullptr, nullptr, gptfast::serial_after_fork);
  m.def("build_info", &gptfast::build_info, "Return the level, compiler, OpenMP libraries and threads of this build.");
  m.def("set_isa", &gptfast::set_level,
        "Choose the instruction-set level by its name; build_info()['isa_supported'] lists those this CPU has.");
  m.def("set_matmul_provider", &gptfast::set_matmul_provider,
        "Choose who multiplies fp32 matrices: 'gptfast', 'library', or '' to let the CPU decide.");
  m.def("empty_cache", &gptfast::empty_cache, "Give the memory of freed tensors back to the system.");
}
