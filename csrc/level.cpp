// One row for each instruction-set level that setup.py compiles: its name, what it needs of the CPU, and its loops.
#include "level.h"

#include <stdexcept>

#ifdef __linux__
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

namespace gptfast {

// The tables of loops_table.cpp.
#if defined(__aarch64__)
namespace neon {
extern const Loops loops;
}
namespace neon_dot {
extern const Loops loops;
}
namespace neon_bf16 {
extern const Loops loops;
}
#else
namespace generic {
extern const Loops loops;
}
#endif
#ifdef __x86_64__
namespace avx2 {
extern const Loops loops;
}
namespace avx512 {
extern const Loops loops;
}
namespace avx512_vnni {
extern const Loops loops;
}
namespace avx512_bf16 {
extern const Loops loops;
}
namespace amx {
extern const Loops loops;
}
#endif
namespace amx_emulated {
extern const Loops loops;
}

namespace {

struct Level {
  std::string name;
  bool cpu_has;  // what it needs beyond the level below
  Loops loops;
};

void fill_holes(Loops& loops, const Loops& below) {
  const auto fill = [](auto& own, auto* other) {
    if (!own) own = other;
  };
  fill(loops.attention_fwd, below.attention_fwd);
  fill(loops.attention_bwd, below.attention_bwd);
  fill(loops.cross_entropy, below.cross_entropy);
  fill(loops.adamw, below.adamw);
  fill(loops.sampling, below.sampling);
  fill(loops.matmul, below.matmul);
  fill(loops.matmul_bf16, below.matmul_bf16);
  fill(loops.matmul_parts, below.matmul_parts);
  fill(loops.norm, below.norm);
  fill(loops.mlp, below.mlp);
  fill(loops.engine, below.engine);
}

// Whether the CPU has tiles of bf16 and int8, and whether the system lets this process use them.
enum class MatrixEngine { none, granted, refused };

MatrixEngine ask_for_matrix_engine() {
#if defined(__x86_64__) && defined(__linux__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16") || !__builtin_cpu_supports("amx-int8"))
    return MatrixEngine::none;
  // The contents of tiles are 8 KB of each thread's state, which Linux sets aside for processes that ask. Containers
  // may refuse; then the first use of a tile would end the process. Children inherit the permission.
  constexpr int64_t ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_TILE_DATA = 18;
  const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILE_DATA) == 0;
  return granted ? MatrixEngine::granted : MatrixEngine::refused;
#else
  return MatrixEngine::none;
#endif
}

MatrixEngine asked_matrix_engine() {
  static const MatrixEngine answer = ask_for_matrix_engine();
  return answer;
}

#ifdef __aarch64__

// What an Arm CPU may have beyond NEON.
struct ArmFeatures {
  bool dot_products, bf16, int8_matrices;
};

ArmFeatures arm_features() {
#if defined(__APPLE__)
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_BF16"), has("hw.optional.arm.FEAT_I8MM")};
#elif defined(__linux__)
  // By number: older headers have no names for them.
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  return {(first >> 20 & 1) != 0, (second >> 14 & 1) != 0, (second >> 13 & 1) != 0};
#else
  return {};
#endif
}

std::vector<Level> all_levels() {
  const ArmFeatures has = arm_features();
  return {{"neon", true, neon::loops},
          {"neon_dot", has.dot_products, neon_dot::loops},
          {"neon_bf16", has.bf16 && has.int8_matrices, neon_bf16::loops}};
}

#else

std::vector<Level> all_levels() {
  std::vector<Level> levels = {{"default", true, generic::loops}};
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  levels.push_back({"avx2", avx2, avx2::loops});
  levels.push_back({"avx512", avx512, avx512::loops});
  levels.push_back({"avx512_vnni", __builtin_cpu_supports("avx512vnni") != 0, avx512_vnni::loops});
  levels.push_back({"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0, avx512_bf16::loops});
  levels.push_back({"amx", asked_matrix_engine() == MatrixEngine::granted, amx::loops});
#endif
  return levels;
}

#endif

// Returns the levels up to the first one that this CPU does not have.
std::vector<Level> find_levels() {
  std::vector<Level> levels = all_levels();
  size_t n = 1;
  for (; n < levels.size() && levels[n].cpu_has; ++n) fill_holes(levels[n].loops, levels[n - 1].loops);
  levels.resize(n);
  return levels;
}

const std::vector<Level>& levels() {
  static const std::vector<Level> found = find_levels();
  return found;
}

const Level*& current() {
  static const Level* level = &levels().back();
  return level;
}

// What the emulation has no loops for, it takes from the best level.
const Level& emulated() {
  static const Level level = [] {
    Level found{"amx_emulated", true, amx_emulated::loops};
    fill_holes(found.loops, levels().back().loops);
    return found;
  }();
  return level;
}

}  // namespace

const Loops& loops() { return current()->loops; }

std::string level_name() { return current()->name; }

std::vector<std::string> supported_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.push_back(level.name);
  return names;
}

std::vector<std::string> emulated_levels() { return {emulated().name}; }

std::string matrix_engine() {
  switch (asked_matrix_engine()) {
    case MatrixEngine::granted:
      return "AMX";
    case MatrixEngine::refused:
      return "AMX, refused by the system";
    default:
      return "none";
  }
}

void set_level(const std::string& name) {
  if (name == emulated().name) {
    current() = &emulated();
    return;
  }
  std::string listed;
  for (const Level& level : levels()) {
    if (level.name == name) {
      current() = &level;
      return;
    }
    listed += " " + level.name;
  }
  throw std::invalid_argument("instruction-set level '" + name +
                              "' is not one this CPU has (unset GPTFAST_ISA or choose one of:" + listed + ")");
}

}  // namespace gptfast
