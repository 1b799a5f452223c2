// Enough of CUDA's execution model to run these kernels on a CPU, for tests: blocks run one after another, and the threads of a block are
// coroutines that switch at barriers, shuffles and waits. It checks the logic, the indexing and that no thread waits forever. Asynchronous
// operations (copies, warpgroup products) run at once or, with `late`, at the last moment that the waits allow, and threads then take turns
// in a shuffled order: a read or an overwrite that is too early changes the results of one of the two modes. A missing fence is not
// detected. Included instead of the CUDA headers if MK_EMULATE is defined.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block runs at a time, so a static variable belongs to it

using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

struct __nv_bfloat16 {
  uint16_t bits;
};
using __half = _Float16;

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline __nv_bfloat16 __float2bfloat16(float v) {
  if (std::isnan(v)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits += 0x7fff + ((bits >> 16) & 1);
  return {uint16_t(bits >> 16)};
}

inline float __half2float(__half v) { return float(v); }
inline __half __float2half(float v) { return __half(v); }

namespace emulate {

constexpr size_t SHARED_BYTES = 227 * 1024;
constexpr size_t STACK_BYTES = 64 * 1024;

struct Thread {
  dim3 index;
  unsigned rank = 0;
  ucontext_t context;
  jmp_buf at;
  std::vector<char> stack;
  bool started = false, done = false;
  const char* waits_for = nullptr;                        // the barrier that it waits for, where that has a name
  std::vector<std::function<void()>> issued;              // products since the last commit
  std::deque<std::vector<std::function<void()>>> groups;  // committed and not yet run
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Block {
  dim3 grid, size, index;
  std::deque<Thread> threads;  // as many as the largest block so far; they are reused from block to block
  unsigned count = 0;          // in this block
  Thread* current = nullptr;
  jmp_buf scheduler;
  uint64_t progress = 0;  // increases with everything that may let a waiting thread continue
  bool gave_up = false;   // a thread has looked at its barrier MK_BARRIER_LIMIT times
  Barrier named[16], warps[32];
  uint64_t slots[1024];  // the value that each thread publishes to its warp
  const std::function<void()>* body = nullptr;
  bool late = false;
  std::deque<std::function<void()>> copies;  // not yet run
  unsigned turn = 1;                         // the state of the generator that shuffles the order
};

inline Block& block() {
  static Block it;
  return it;
}

inline unsigned char* shared_memory() {
  alignas(1024) static unsigned char memory[SHARED_BYTES];
  return memory;
}

inline void yield() {
  Block& b = block();
  if (!_setjmp(b.current->at)) _longjmp(b.scheduler, 1);
}

template <class Ready>
void wait_until(Ready ready, const char* name = nullptr) {
  Block& b = block();
  for (uint64_t looks = 0; !ready(); ++looks) {
    b.current->waits_for = name;
#if defined(MK_BARRIER_LIMIT)
    b.gave_up |= name && looks == MK_BARRIER_LIMIT;
#endif
    yield();
  }
  b.current->waits_for = nullptr;
  ++b.progress;
}

inline void meet(Barrier& barrier, unsigned count) {
  const unsigned generation = barrier.generation;
  ++block().progress;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  wait_until([&] { return barrier.generation != generation; });
}

inline void meet_warp() {
  Block& b = block();
  meet(b.warps[b.current->rank / 32], 32);
}

inline void enter() {
  for (;;) {
    Block& b = block();
    (*b.body)();
    b.current->done = true;
    ++b.progress;
    yield();
  }
}

// Ends the kernel, whose threads are stuck in the middle of it; the message names the barriers that some of them wait for.
[[noreturn]] inline void fail(const std::string& what) {
  Block& b = block();
  std::set<std::string> names;
  for (unsigned i = 0; i < b.count; ++i)
    if (!b.threads[i].done && b.threads[i].waits_for) names.insert(b.threads[i].waits_for);
  std::string message = "emulated kernel: " + what;
  for (const std::string& name : names) message += (name == *names.begin() ? "; waiting for " : ", ") + name;
  b.threads.clear();
  b.gave_up = false;
  throw std::runtime_error(message);
}

inline void run_block() {
  Block& b = block();
  static unsigned remaining, i;  // static, to survive the jumps
  static uint64_t before;
  for (i = 0; i < b.count; ++i) b.threads[i].done = false, b.threads[i].waits_for = nullptr;
  for (remaining = b.count; remaining;) {
    before = b.progress;
    if (b.late) b.turn = b.turn * 1103515245u + 12345u;
    for (i = 0; i < b.count; ++i) {
      // With `late`, forwards or backwards from a random warp.
      Thread& t = b.threads[b.late ? ((b.turn >> 16 & 1 ? i : b.count - 1 - i) + (b.turn >> 17) * 32) % b.count : i];
      if (t.done) continue;
      b.current = &t;
      if (!_setjmp(b.scheduler)) {
        if (t.started) _longjmp(t.at, 1);
        t.started = true;
        setcontext(&t.context);
      }
      remaining -= b.current->done;
    }
    if (before == b.progress && !b.copies.empty()) {
      b.copies.front()();
      b.copies.pop_front();
    } else if (remaining && before == b.progress) {
      fail("all threads wait, none can go on");
    }
    if (b.gave_up) fail("a thread has waited for too long");
  }
}

inline void prepare(dim3 size) {
  Block& b = block();
  b.size = size;
  b.count = size.x * size.y * size.z;
  if (b.count > 1024 || b.count % 32) throw std::runtime_error("emulated kernel: a block must be whole warps, 32 at most");
  while (b.threads.size() < b.count) {
    b.threads.emplace_back();
    Thread& t = b.threads.back();
    t.stack.resize(STACK_BYTES);
    t.rank = unsigned(b.threads.size() - 1);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = STACK_BYTES;
    t.context.uc_link = nullptr;
    makecontext(&t.context, enter, 0);
  }
  for (unsigned i = 0; i < b.count; ++i) b.threads[i].index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
  for (Barrier& barrier : b.named) barrier = {};
  for (Barrier& barrier : b.warps) barrier = {};
}

template <class Body>
void launch(dim3 grid, dim3 size, Body body) {
  Block& b = block();
  const std::function<void()> wrapped = body;
  prepare(size);
  b.grid = grid;
  b.body = &wrapped;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        b.index = dim3(x, y, z);
        std::memset(shared_memory(), 0xff, SHARED_BYTES);  // NaN in every dtype, so that reading unwritten memory shows
        run_block();
      }
}

}  // namespace emulate

#define threadIdx (emulate::block().current->index)
#define blockIdx (emulate::block().index)
#define blockDim (emulate::block().size)
#define gridDim (emulate::block().grid)

inline void __syncthreads() { emulate::meet(emulate::block().named[0], emulate::block().count); }
inline void __syncwarp() { emulate::meet_warp(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) <= 8, "one slot is eight bytes");
  emulate::Block& b = emulate::block();
  const unsigned rank = b.current->rank;
  std::memcpy(&b.slots[rank], &value, sizeof(T));
  emulate::meet_warp();
  T other;
  std::memcpy(&other, &b.slots[rank ^ unsigned(mask)], sizeof(T));
  emulate::meet_warp();
  return other;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  const int own = int(emulate::block().current->rank % 32);
  return __shfl_xor_sync(~0u, value, own ^ lane);
}

inline bool __any_sync(unsigned, bool value) {
  int any = value;
  for (int mask = 16; mask; mask /= 2) any |= __shfl_xor_sync(~0u, any, mask);
  return any;
}

inline float __int_as_float(int v) {
  float out;
  std::memcpy(&out, &v, 4);
  return out;
}

inline int __float_as_int(float v) {
  int out;
  std::memcpy(&out, &v, 4);
  return out;
}
