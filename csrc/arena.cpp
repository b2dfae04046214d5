#include "arena.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <mutex>

#include "torch_settings.h"

namespace gptfast {
namespace {

const size_t PAGE_BYTES = static_cast<size_t>(sysconf(_SC_PAGESIZE));
constexpr int64_t MIN_ARENA_BYTES = int64_t{1} << 20;  // smaller tensors are torch's

// Blocks are the first fit by address: a step finds the blocks that the last one freed, and the range stays short.
class Arena {
 public:
  Arena() {
    const size_t size = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * PAGE_BYTES;
    void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start != MAP_FAILED) free_.emplace(static_cast<char*>(start), size);
    // A forked child must not inherit a locked mutex: the thread that would unlock it is not in the child.
    pthread_atfork(lock, unlock, unlock);
  }

  // Returns null if no block is large enough, for example because the system refused the range.
  char* find(size_t n) {
    const size_t bytes = (n + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    const std::lock_guard lock(mutex_);
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      const auto [start, size] = *block;
      if (size < bytes) continue;
      free_.erase(block);
      if (size > bytes) free_.emplace(start + bytes, size - bytes);
      used_.emplace(start, bytes);
      return start;
    }
    return nullptr;
  }

  void empty_cache() {
    const std::lock_guard lock(mutex_);
    for (const auto& [start, size] : free_) madvise(start, size, MADV_DONTNEED);
  }

  void release(char* start) {
    const std::lock_guard lock(mutex_);
    const auto used = used_.find(start);
    size_t size = used->second;
    used_.erase(used);
    auto next = free_.lower_bound(start);
    if (next != free_.end() && start + size == next->first) {
      size += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == start) {
        before->second += size;
        return;
      }
    }
    free_.emplace(start, size);
  }

 private:
  static void lock();
  static void unlock();

  std::mutex mutex_;
  std::map<char*, size_t> free_, used_;  // start and bytes of each block
};

Arena& arena() {
  static Arena* const one = new Arena;  // never destroyed: tensors may outlive every static
  return *one;
}

void Arena::lock() { arena().mutex_.lock(); }
void Arena::unlock() { arena().mutex_.unlock(); }

// Whether torch allocates a tensor of this size.
bool is_torchs(int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  return true;  // the sanitizer sees a read past the end of malloc's blocks, but not of ours
#else
  return bytes < MIN_ARENA_BYTES || torch_fills_new_memory();
#endif
}

void release(void* start, void*) { arena().release(static_cast<char*>(start)); }

}  // namespace

Tensor make_tensor(IntArrayRef sizes, ScalarType dtype) {
  int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(torch_dtype(dtype)));
  for (int64_t size : sizes) bytes *= size;
  char* const start = is_torchs(bytes) ? nullptr : arena().find(static_cast<size_t>(bytes));
  return start ? from_memory(start, sizes, dtype, release, nullptr) : empty(sizes, dtype);
}

void empty_cache() { arena().empty_cache(); }

}  // namespace gptfast
