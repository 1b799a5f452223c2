// Large buffers that are needed again at every step: the gradient and what the passes leave to one another. Fresh memory costs a fault for
// each page at its first touch, which in a step of a tenth of a second is a fifth of it; so those given back wait here for the next step.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mk {

// Memory of the pool for as long as this lives.
class Block {
 public:
  explicit Block(int64_t bytes) : bytes_(bytes), room_(rounded(bytes)), start_(take(room_)) {
    if (!start_) {
      drop();  // what waits may be what is missing
      start_ = fresh(room_);
    }
    if (!start_) throw std::bad_alloc();
  }
  ~Block() { give_back(); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* start() const { return start_; }
  int64_t bytes() const { return bytes_; }

  // Bytes that wait. None but the last few steps' buffers do: where one is asked for that does not wait, all that wait are dropped.
  static int64_t waiting() {
    const std::lock_guard<std::mutex> locked(lock());
    int64_t total = 0;
    for (const Free& f : list()) total += f.room;
    return total;
  }
  static void drop() {
    const std::lock_guard<std::mutex> locked(lock());
    for (const Free& f : list()) std::free(f.start);
    list().clear();
  }

 private:
  struct Free {
    void* start;
    int64_t room;
  };
  static constexpr int64_t LARGE_PAGE = 2 << 20, MOST = 512 << 20;

  static std::mutex& lock() {
    static std::mutex* m = new std::mutex;  // never destroyed: a tensor may outlive everything else
    return *m;
  }
  static std::vector<Free>& list() {
    static auto* v = new std::vector<Free>;
    return *v;
  }
  static int64_t rounded(int64_t bytes) { return (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE; }

  static void* take(int64_t room) {
    const std::lock_guard<std::mutex> locked(lock());
    for (size_t i = 0; i < list().size(); ++i)
      if (list()[i].room == room) {
        void* found = list()[i].start;
        list().erase(list().begin() + i);
        return found;
      }
    return nullptr;
  }
  static void* fresh(int64_t room) {
    void* start = std::aligned_alloc(LARGE_PAGE, room);
#if defined(__linux__)
    // Large pages pay where they are used again. On virtual machines their first touch can cost more than that of small ones.
    if (start && room <= MOST) madvise(start, room, MADV_HUGEPAGE);
#endif
    return start;
  }
  void give_back() {
    const std::lock_guard<std::mutex> locked(lock());
    int64_t total = room_;
    for (const Free& f : list()) total += f.room;
    while (total > MOST && !list().empty()) {  // the oldest go first
      total -= list().front().room;
      std::free(list().front().start);
      list().erase(list().begin());
    }
    if (total > MOST)
      std::free(start_);
    else
      list().push_back({start_, room_});
  }

  int64_t bytes_, room_;
  void* start_;
};

}  // namespace mk
