// A cache of large buffers that are needed again at every step: the gradient of the weights and what the row pass saves for the class pass.
// Fresh memory costs a page fault at each page's first touch, a fifth of a step that takes a tenth of a second; freed buffers are therefore
// cached for reuse by the next step.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "memory_error.h"

namespace mk {

// A buffer; its memory comes from the cache and returns there when it is destroyed.
class Block {
 public:
  Block(int64_t bytes, const std::string& purpose) : bytes_(bytes), capacity_(rounded(bytes)), start_(take(capacity_)) {
    if (!start_) {
      release();  // the cached buffers may take the memory that is needed
      start_ = allocate(capacity_);
    }
    if (!start_) throw OutOfMemory(bytes, purpose);
  }
  ~Block() { give_back(); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* start() const { return start_; }
  int64_t bytes() const { return bytes_; }

  // Bytes in the cache. It holds the buffers of the last few steps only: a request that it cannot serve empties it.
  static int64_t cached() {
    const std::lock_guard<std::mutex> locked(lock());
    int64_t total = 0;
    for (const Free& f : list()) total += f.capacity;
    return total;
  }
  // Returns all cached memory to the system.
  static void release() {
    const std::lock_guard<std::mutex> locked(lock());
    for (const Free& f : list()) std::free(f.start);
    list().clear();
  }

 private:
  struct Free {
    void* start;
    int64_t capacity;
  };
  static constexpr int64_t LARGE_PAGE = 2 << 20, MAX_CACHED = 512 << 20;

  static std::mutex& lock() {
    static std::mutex* m = new std::mutex;  // never destroyed: a tensor may outlive every other object
    return *m;
  }
  static std::vector<Free>& list() {
    static auto* v = new std::vector<Free>;
    return *v;
  }
  static int64_t rounded(int64_t bytes) { return (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE; }

  static void* take(int64_t capacity) {
    const std::lock_guard<std::mutex> locked(lock());
    for (size_t i = 0; i < list().size(); ++i)
      if (list()[i].capacity == capacity) {
        void* found = list()[i].start;
        list().erase(list().begin() + i);
        return found;
      }
    return nullptr;
  }
  static void* allocate(int64_t capacity) {
    void* start = std::aligned_alloc(LARGE_PAGE, capacity);
#if defined(__linux__)
    // Large pages pay off only in memory that is reused: on virtual machines their first touch can cost more than that of small pages.
    if (start && capacity <= MAX_CACHED) madvise(start, capacity, MADV_HUGEPAGE);
#endif
    return start;
  }
  void give_back() {
    const std::lock_guard<std::mutex> locked(lock());
    int64_t total = capacity_;
    for (const Free& f : list()) total += f.capacity;
    while (total > MAX_CACHED && !list().empty()) {  // the oldest are freed first
      total -= list().front().capacity;
      std::free(list().front().start);
      list().erase(list().begin());
    }
    if (total > MAX_CACHED)
      std::free(start_);
    else
      list().push_back({start_, capacity_});
  }

  int64_t bytes_, capacity_;
  void* start_;
};

}  // namespace mk
