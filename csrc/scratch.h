// Memory that a loop needs while it runs.
#pragma once

#include "vectors.h"

namespace gptfast::GPTFAST_LEVEL {

struct Block {
  float* data = nullptr;
  int64_t size = 0;
  ~Block() { free(data); }
};

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
      block_.data = (float*)aligned_alloc(64, round_up(floats * 4, 64));
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
