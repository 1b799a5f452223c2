// Work for several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace mk {

// The process's existing OpenMP threads, if GNU's runtime is loaded (PyTorch loads it). They spin for a while after every operator, so
// threads of this library would compete with them for the cores. Null where there is no such runtime, and after a fork, which the threads
// do not survive.
using RunOnPool = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
inline RunOnPool openmp_pool() {
#if defined(__linux__)
  static std::atomic<bool> forked{false};
  static const auto found = [] {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return reinterpret_cast<RunOnPool>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  }();
  return forked ? nullptr : found;
#else
  return nullptr;
#endif
}

// Calls f(thread, i) for i in [0, count) on at most `threads` threads, including this one. Results must not depend on which thread runs an
// index.
template <class F>
void parallel(int threads, int64_t count, F f) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  std::atomic<int64_t> next{0};
  std::atomic<int> joined{0};
  auto work = [&] {
    const int thread = joined.fetch_add(1);
    if (thread >= threads) return;
    for (int64_t i; (i = next.fetch_add(1)) < count;) f(thread, i);
  };
  if (threads <= 1) return work();
  if (const RunOnPool run = openmp_pool()) return run([](void* w) { (*static_cast<decltype(work)*>(w))(); }, &work, threads, 0);
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // The system has no more threads: those that were started do all the work.
  }
  work();
  for (auto& t : others) t.join();
}

}  // namespace mk
