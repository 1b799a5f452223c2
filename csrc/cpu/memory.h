// The memory of one pass.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "memory_error.h"

namespace mk {

// One allocation that is handed out piece by piece; in large pages if it is large.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
    constexpr int64_t HUGE = 2 << 20;
    const int64_t align = bytes >= 2 * HUGE ? HUGE : 64;
    bytes = (bytes + align - 1) / align * align;
    start_ = static_cast<char*>(std::aligned_alloc(align, bytes));
    if (!start_) throw OutOfMemory(bytes, "the packed embeddings and the threads' buffers of a pass");
#if defined(__linux__)
    if (align == HUGE) madvise(start_, bytes, MADV_HUGEPAGE);
#endif
    end_ = start_ + bytes;
    at_ = start_;
  }
  ~Memory() { std::free(start_); }
  Memory(const Memory&) = delete;

  template <class T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(at_);
    at_ += padded<T>(count);
    if (at_ > end_) throw std::logic_error("marginkernels: a buffer size was underestimated");
    return out;
  }
  template <class T>
  static int64_t padded(int64_t count) {
    return (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char *start_, *end_, *at_;
};

}  // namespace mk
