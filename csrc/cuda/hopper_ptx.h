// The instructions of compute capability 9.0 that the fused kernels use, one function per instruction: transaction barriers (mbarrier),
// bulk tensor copies (TMA), warpgroup matrix products (wgmma). Under emulation, the same functions do on the CPU what the PTX manual says.
//
// The layouts are plain arithmetic for host and device, so that tests can compare them with the tables of the manual.
#pragma once

#include "device.h"

#if !defined(MK_EMULATE)
#include <assert.h>
#include <cuda.h>
#endif

namespace mk::hopper {

// ---- Layouts ----

// A tile is stored in slices of 64 columns (128 bytes), row after row, with the 16-byte units of a row permuted by the row number: the
// 128-byte swizzle, which TMA writes and the products read without bank conflicts. Slices start at multiples of 1,024 bytes.
constexpr int SLICE_COLUMNS = 64;
constexpr int SLICE_ROW_BYTES = 128;

// The swizzled offset of the byte at `offset` of such a slice.
__host__ __device__ constexpr uint32_t swizzled(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// The matrix descriptor of an operand in shared memory: the address and two strides in units of 16 bytes, and the swizzle.
enum Swizzle : uint32_t { PLAIN = 0, SWIZZLE_128 = 1 };
__host__ __device__ constexpr uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(swizzle) << 62;
}

// A tile in slices whose rows are the operand's rows (for B, its columns) and whose columns run along the summation: eight rows are 1,024
// bytes, and the leading stride is unused. The next 16 columns are 32 bytes further on.
__host__ __device__ constexpr uint64_t along_sum(uint32_t address) { return descriptor(address, 16, 1024, SWIZZLE_128); }

// The same tile as B with its rows along the summation ("transposed"): `slice_bytes` is the distance from 64 columns to the next 64. The
// next 16 rows are 2,048 bytes further on.
__host__ __device__ constexpr uint64_t across_sum(uint32_t address, uint32_t slice_bytes) {
  return descriptor(address, slice_bytes, 1024, SWIZZLE_128);
}

// Weights, operand A of the second product: blocks of 8 rows x 8 columns (128 bytes), the blocks of a row next to each other, so that a
// warp writes a part of its accumulator fragment as 128 contiguous bytes. The next 16 columns are 256 bytes further on.
template <int COLUMNS>
__host__ __device__ constexpr uint32_t weight_offset(int row, int column) {
  return row / 8 * (COLUMNS * 16) + column / 8 * 128 + row % 8 * 16 + column % 8 * 2;
}
template <int COLUMNS>
__host__ __device__ constexpr uint64_t weight_descriptor(uint32_t address) {
  return descriptor(address, 128, COLUMNS * 16, PLAIN);
}

// The element of a 64 x N accumulator that register i of a thread of the warpgroup holds.
__host__ __device__ constexpr int fragment_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
__host__ __device__ constexpr int fragment_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// ---- Instructions ----

#if !defined(MK_EMULATE)

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(Barrier* b, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}

// Makes initialized barriers visible to TMA; a barrier of the block must follow.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

// Arrives, and makes the phase wait for this many bytes of copies as well.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}

// Waits for the end of the phase with this parity. The phase before the first one counts as finished and has parity 1. In a debug build
// (MK_BARRIER_LIMIT; `python setup.py build_cuda_debug`) it looks so many times at the most, then says which barrier, block and thread it
// was and ends the kernel, which would otherwise wait for ever.
__device__ __forceinline__ void barrier_wait(Barrier* b, uint32_t parity, [[maybe_unused]] const char* name) {
  uint32_t done = 0;
#if defined(MK_BARRIER_LIMIT)
  for (uint64_t looks = 0; !done; ++looks) {
    if (looks == MK_BARRIER_LIMIT) {
      __assert_fail(name, "hopper_ptx.h", __LINE__, "barrier_wait");
      __trap();
    }
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
  }
#else
  while (!done) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
  }
#endif
}

// Copies the map's box at (column, row) to `to`. Elements outside the tensor are written as zero, and their bytes count as copied.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, int column, int row, Barrier* b) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(b))
      : "memory");
}

// Copies `bytes`, a multiple of 16, between 16-byte aligned addresses.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, uint32_t bytes, Barrier* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(b))
               : "memory");
}

// Makes shared memory that this thread wrote visible to products, after a barrier.
__device__ __forceinline__ void shared_written_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of the two consumer warpgroups.
__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// Orders registers that other instructions wrote before the products that follow.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most the last PENDING committed groups are in flight.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Products write registers asynchronously, which the compiler does not know. This tells it that the registers change here, so that it
// neither moves nor caches their values across.
template <int N>
__device__ __forceinline__ void pin(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int REGISTERS>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// d (64 x N) = a (64 x 16) b (16 x N), plus d if `accumulate`. B_ACROSS: b is described by across_sum. All threads of a warpgroup execute
// it together.
template <class T, int N, bool B_ACROSS>
__device__ __forceinline__ void product(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 32 || N == 64 || N == 128 || N == 256, "product: N must be one of the widths below");
  static_assert(sizeof(T) == 2, "product: operands are bfloat16 or float16");
#define MK_TEN(x) "%" #x "0, %" #x "1, %" #x "2, %" #x "3, %" #x "4, %" #x "5, %" #x "6, %" #x "7, %" #x "8, %" #x "9, "
#define MK_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MK_16(i) MK_4(i), MK_4(i + 4), MK_4(i + 8), MK_4(i + 12)
#define MK_64(i) MK_16(i), MK_16(i + 16), MK_16(i + 32), MK_16(i + 48)
#define MK_PRODUCT(type, n, across, registers, ra, rb, rp, ...)                                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #rp ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type \
               " {" registers "}, %" #ra ", %" #rb ", p, 1, 1, 0, " #across ";\n}\n"                                          \
               : __VA_ARGS__                                                                                                  \
               : "l"(a), "l"(b), "r"(int(accumulate)))
#define MK_BOTH(n, across, registers, ra, rb, rp, ...)                 \
  if constexpr (std::is_same_v<T, bf16>) {                             \
    MK_PRODUCT("bf16", n, across, registers, ra, rb, rp, __VA_ARGS__); \
  } else {                                                             \
    MK_PRODUCT("f16", n, across, registers, ra, rb, rp, __VA_ARGS__);  \
  }
#define MK_ACROSS(n, registers, ra, rb, rp, ...)      \
  if constexpr (B_ACROSS) {                           \
    MK_BOTH(n, 1, registers, ra, rb, rp, __VA_ARGS__) \
  } else {                                            \
    MK_BOTH(n, 0, registers, ra, rb, rp, __VA_ARGS__) \
  }
  if constexpr (N == 32) {
    MK_ACROSS(32, MK_TEN() "%10, %11, %12, %13, %14, %15", 16, 17, 18, MK_16(0))
  } else if constexpr (N == 64) {
    MK_ACROSS(64, MK_TEN() MK_TEN(1) MK_TEN(2) "%30, %31", 32, 33, 34, MK_16(0), MK_16(16))
  } else if constexpr (N == 128) {
    MK_ACROSS(128, MK_TEN() MK_TEN(1) MK_TEN(2) MK_TEN(3) MK_TEN(4) MK_TEN(5) "%60, %61, %62, %63", 64, 65, 66, MK_64(0))
  } else {
    MK_ACROSS(256,
              MK_TEN() MK_TEN(1) MK_TEN(2) MK_TEN(3) MK_TEN(4) MK_TEN(5) MK_TEN(6) MK_TEN(7) MK_TEN(8) MK_TEN(9) MK_TEN(10)
                  MK_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127",
              128, 129, 130, MK_64(0), MK_64(64))
  }
#undef MK_ACROSS
#undef MK_BOTH
#undef MK_PRODUCT
#undef MK_64
#undef MK_16
#undef MK_4
#undef MK_TEN
}

#else  // the same, emulated

struct TensorMap {
  const uint16_t* base;
  int rows, columns, box_rows;
};

struct Barrier {
  int32_t bytes;
  uint8_t count, missing, phase, unused;
};
static_assert(sizeof(Barrier) == 8, "a barrier takes eight bytes of shared memory");

inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const unsigned char*>(p) - emulate::shared_memory()); }

inline void barrier_init(Barrier* b, uint32_t count) { *b = {0, uint8_t(count), uint8_t(count), 0, 0}; }
inline void barrier_init_fence() {}
inline void barrier_settle(Barrier* b) {
  ++emulate::block().progress;
  if (b->missing || b->bytes) return;
  b->missing = b->count;
  b->phase ^= 1;
}
inline void barrier_arrive_expect(Barrier* b, uint32_t bytes) {
  if (!b->missing) throw std::runtime_error("emulated kernel: one arrival too many");
  --b->missing;
  b->bytes += int32_t(bytes);
  barrier_settle(b);
}
inline void barrier_arrive(Barrier* b) { barrier_arrive_expect(b, 0); }
inline void barrier_wait(Barrier* b, uint32_t parity, const char* name) {
  emulate::wait_until([&] { return b->phase != parity; }, name);
}

// Runs a copy now or, with `late`, when no thread can make progress without it.
inline void start_copy(std::function<void()> copy) {
  if (emulate::block().late)
    emulate::block().copies.push_back(std::move(copy));
  else
    copy();
}

inline void copy_box(void* to, const TensorMap* map, int column, int row, Barrier* b) {
  if (shared_address(to) % 1024) throw std::runtime_error("emulated kernel: a swizzled box must be aligned to 1,024 bytes");
  start_copy([=] {
    unsigned char* out = static_cast<unsigned char*>(to);
    for (int r = 0; r < map->box_rows; ++r)
      for (int c = 0; c < SLICE_COLUMNS; ++c) {
        const bool inside = row + r < map->rows && column + c < map->columns;
        const uint16_t v = inside ? map->base[size_t(row + r) * map->columns + column + c] : 0;
        std::memcpy(out + swizzled(uint32_t(r * SLICE_ROW_BYTES + c * 2)), &v, 2);
      }
    b->bytes -= map->box_rows * SLICE_ROW_BYTES;
    barrier_settle(b);
  });
}
inline void copy_bytes(void* to, const void* from, uint32_t bytes, Barrier* b) {
  if (bytes % 16 || uintptr_t(from) % 16 || shared_address(to) % 16)
    throw std::runtime_error("emulated kernel: a bulk copy must be aligned to 16 bytes");
  start_copy([=] {
    std::memcpy(to, from, bytes);
    b->bytes -= int32_t(bytes);
    barrier_settle(b);
  });
}

inline void shared_written_fence() {}
inline void consumers_meet() { emulate::meet(emulate::block().named[1], 256); }
// The next three are ".aligned": the threads of a warp must execute them together.
inline void products_fence() { emulate::meet_warp(); }
inline void products_commit() {
  emulate::Thread& t = *emulate::block().current;
  t.groups.push_back(std::move(t.issued));
  t.issued.clear();
  emulate::meet_warp();
}
template <int PENDING>
void products_wait() {
  emulate::Thread& t = *emulate::block().current;
  for (; t.groups.size() > PENDING; t.groups.pop_front())
    for (const auto& product : t.groups.front()) product();
  emulate::meet_warp();
}
template <int N>
void pin(float (&)[N]) {}
template <int>
void registers_up() {}
template <int>
void registers_down() {}

// The address of 16-bit element (outer, k) of an operand, from the tables of the PTX manual ("strides", "matrix descriptor"). `across`: the
// summation runs along the tile's rows.
inline uint32_t element_address(uint64_t d, bool across, int outer, int k) {
  const uint32_t start = uint32_t(d & 0x3fff) << 4, leading = uint32_t(d >> 16 & 0x3fff) << 4, stride = uint32_t(d >> 32 & 0x3fff) << 4;
  if (d >> 62 == PLAIN) return start + outer / 8 * stride + outer % 8 * 16 + k / 8 * leading + k % 8 * 2;
  const uint32_t offset =
      across ? outer / 64 * leading + outer % 64 * 2 + k / 8 * stride + k % 8 * 128 : outer / 8 * stride + outer % 8 * 128 + k * 2;
  return swizzled(start + offset);
}

template <class T, int N, bool B_ACROSS>
void product(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  emulate::Thread& t = *emulate::block().current;
  const int thread = int(t.rank % 128);
  const auto run = [=, &d] {
    const auto at = [](uint32_t address) {
      T v;
      std::memcpy(&v, emulate::shared_memory() + address, 2);
      return widen(v);
    };
    for (int i = 0; i < N / 2; ++i) {
      float sum = accumulate ? d[i] : 0.0f;
      for (int k = 0; k < 16; ++k)
        sum += at(element_address(a, false, fragment_row(thread, i), k)) * at(element_address(b, B_ACROSS, fragment_column(thread, i), k));
      d[i] = sum;
    }
  };
  if (emulate::block().late)
    t.issued.push_back(run);
  else
    run();
}

#endif

}  // namespace mk::hopper
