// Memory that a loop needs while it runs.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "vectors.h"

namespace gptfast::GPTFAST_LEVEL {

struct Block {
  float* data = nullptr;
  int64_t size = 0;
  ~Block() { free(data); }
};

// Returns memory, aligned for any vector. Much memory comes in huge pages, if the system has them: to find small ones
// takes a tenth of the time of a product that reads 4 MB over and over.
static inline float* scratch_memory(int64_t bytes) {
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
  constexpr int64_t HUGE_PAGE = 2 << 20;
  if (bytes >= HUGE_PAGE) {
    const int64_t size = round_up(bytes, HUGE_PAGE);
    void* data = aligned_alloc(HUGE_PAGE, size);
    if (data) madvise(data, size, MADV_HUGEPAGE);  // if it fails, pages are small
    return (float*)data;
  }
#endif
  return (float*)aligned_alloc(64, round_up(bytes, 64));
}

// Memory for one call of a loop, aligned for any vector. Each thread keeps its block from call to call, because new
// memory from the system costs a page fault every 4 KB. A thread may have one Scratch at a time.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
#ifdef __SANITIZE_ADDRESS__
    block_.size = 0;  // the sanitizer sees an access past the end of exactly what was asked for
#endif
    if (floats > block_.size) {
      free(block_.data);
      block_.data = scratch_memory(floats * 4);
      if (!block_.data) abort();
      block_.size = floats;
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* take(int64_t floats) {
    float* p = block_.data + used_;
    used_ += round_up(floats, 16);
    return p;
  }

 private:
  inline static thread_local Block block_;
  int64_t used_ = 0;
};

}  // namespace gptfast::GPTFAST_LEVEL
