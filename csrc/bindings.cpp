// The Python module: what was built, and the instruction-set level in use. Tensors never cross it.
#include <ATen/Parallel.h>
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <fstream>
#include <set>

#include "arena.h"
#include "common.h"
#include "matmul.h"

namespace gptfast {
namespace {

// The names in order; the last that the CPU supports is the default.
const std::vector<std::string>& supported() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all{"default"};
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      all.push_back("avx2");
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        all.push_back("avx512");
        if (__builtin_cpu_supports("avx512vnni")) {
          all.push_back("avx512_vnni");
          if (__builtin_cpu_supports("avx512bf16")) all.push_back("avx512_bf16");
        }
      }
    }
#endif
    return all;
  }();
  return names;
}

Level& current() {
  static Level level = static_cast<Level>(supported().size() - 1);
  return level;
}

void set_isa(const std::string& name) {
  const auto& names = supported();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) {
    std::string listed;
    for (const auto& one : names) listed += " " + one;
    throw pybind11::value_error("instruction-set level '" + name +
                                "' is not one this CPU has (unset GPTFAST_ISA or choose one of:" + listed + ")");
  }
  current() = static_cast<Level>(found - names.begin());
}

// The OpenMP libraries in this process; with two, each thinks it has every core.
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
  info["isa"] = supported()[static_cast<size_t>(current())];
  info["isa_supported"] = supported();
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

// GNU OpenMP's threads do not survive a fork: a child that opened a parallel region would wait for them
// forever, MKL's products and PyTorch's own operators included. So a child has one thread.
void serial_after_fork() { at::set_num_threads(1); }

}  // namespace

Level level() { return current(); }

}  // namespace gptfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "gptfast's C++ kernels; the operators register themselves with PyTorch on import.";
  pthread_atfork(nullptr, nullptr, gptfast::serial_after_fork);
  m.def("build_info", &gptfast::build_info, "Level, compiler, OpenMP and threads of this build.");
  m.def("set_isa", &gptfast::set_isa,
        "Choose the instruction-set level: default, avx2, avx512, avx512_vnni or avx512_bf16.");
  m.def("set_matmul_provider", &gptfast::set_matmul_provider,
        "Who multiplies fp32 matrices: 'gptfast', 'library', or '' to let the CPU decide.");
  m.def("empty_cache", &gptfast::empty_cache, "Give the memory of tensors that are gone back to the system.");
}
