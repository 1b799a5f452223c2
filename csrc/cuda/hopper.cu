#include "hopper.h"

#include "hopper_ptx.h"

namespace mk {
namespace {

using namespace hopper;

// ---- Traits ----

constexpr int CONSUMERS = 2;  // warpgroups that compute; each owns half of O's columns and makes the weights of every second tile
constexpr int GROUP = 128;    // threads of a warpgroup
constexpr int THREADS = (CONSUMERS + 1) * GROUP;
constexpr int WARPS = CONSUMERS * GROUP / 32;
// Per thread, of the 65,536 of an SM: the producer warpgroup gives up what the two consumers need for O.
constexpr int COPY_REGISTERS = 24, CONSUMER_REGISTERS = 240;

// The cost of a tile at D = 512, by calculation. Tensor cores: 4 x 64 x 32 x 512 FLOP at 4,096 per cycle are 1,024 cycles. Shared memory at
// 128 bytes per cycle: the first product 768 cycles (2 KB of A and 1 KB of B for each of its 32 instructions), the second 320, the copy
// 256, weights and columns up to 100; 1,440 in all, which makes it the tighter limit: keeping a part of A in registers would be the next
// step. L2: 32 KB per tile are 23 bytes per cycle, of 24 to 28 that 5.5 TB/s give an SM. Multicasting a copy to a pair of blocks would
// halve that, but would not lift the tighter limit.
template <class T, int D>
struct Traits {
  static constexpr int STAGES = 4;
  static constexpr int SLICES = D / SLICE_COLUMNS;
  static constexpr int HALF = D / CONSUMERS;                                  // columns of O of one warpgroup
  static constexpr int STATIONARY_SLICE = TILE_STATIONARY * SLICE_ROW_BYTES;  // bytes of 64 columns of A
  static constexpr int STREAMED_SLICE = TILE_STREAMED * SLICE_ROW_BYTES;      // and of B
  static constexpr int STAGE = SLICES * STREAMED_SLICE;
  static constexpr int WEIGHTS = TILE_STATIONARY * TILE_STREAMED * 2;
  static constexpr int COLUMNS = TILE_STREAMED * int(sizeof(Streamed));  // the larger of the two passes' sizes
  // Offsets in shared memory.
  static constexpr int STAGE_AT = SLICES * STATIONARY_SLICE;
  static constexpr int WEIGHTS_AT = STAGE_AT + STAGES * STAGE;
  static constexpr int COLUMNS_AT = WEIGHTS_AT + 2 * WEIGHTS;
  static constexpr int MAXIMA_AT = COLUMNS_AT + STAGES * COLUMNS;
  static constexpr int EXCHANGE_AT = MAXIMA_AT + 2 * TILE_STATIONARY * 4;
  static constexpr int BARRIERS_AT = EXCHANGE_AT + 3 * TILE_STATIONARY * 4;
  static constexpr int BYTES = BARRIERS_AT + (2 * STAGES + 7) * 8;
  static_assert(sizeof(T) == 2, "fused passes: the product's dtype is bfloat16 or float16");
  static_assert(D % (CONSUMERS * SLICE_COLUMNS) == 0, "fused passes: each warpgroup owns whole slices of 64 columns");
  static_assert(HALF <= 256, "fused passes: O's share of a thread must fit its registers");
  static_assert(STREAMED_SLICE % 1024 == 0 && STAGE_AT % 1024 == 0, "fused passes: the swizzle repeats every 1,024 bytes");
  static_assert(BYTES <= 227 * 1024, "fused passes: more shared memory than a block can have");
  static_assert(COPY_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= 65536 / GROUP, "fused passes: more registers than there are");
};

// The kernel's arguments: the tensor maps (TMA descriptors) of the two operands, and those of the pass.
template <class Args>
struct Launch {
  TensorMap stationary, streamed;
  Args args;
};

struct Memory {
  unsigned char *stationary, *stages, *weights, *columns;
  float *maxima, *exchange;
  Barrier *stationary_full, *full, *empty, *weights_full, *weights_empty, *maxima_full;
  template <class S>
  __device__ static Memory of(unsigned char* base) {
    Barrier* barriers = reinterpret_cast<Barrier*>(base + S::BARRIERS_AT);
    return {base,
            base + S::STAGE_AT,
            base + S::WEIGHTS_AT,
            base + S::COLUMNS_AT,
            reinterpret_cast<float*>(base + S::MAXIMA_AT),
            reinterpret_cast<float*>(base + S::EXCHANGE_AT),
            barriers,
            barriers + 1,
            barriers + 1 + S::STAGES,
            barriers + 1 + 2 * S::STAGES,
            barriers + 3 + 2 * S::STAGES,
            barriers + 5 + 2 * S::STAGES};
  }
};

__device__ __forceinline__ float exp2_fast(float v) {
#if defined(MK_EMULATE)
  return exp2f(v);
#else
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
#endif
}

// Reduces over the four threads that hold a row of an accumulator fragment.
template <class Op>
__device__ __forceinline__ float row_reduce(float v, Op op) {
  v = op(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return op(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

constexpr int ELEMENTS = TILE_STREAMED / 2;  // of a tile's 64 x 32 products held by one thread: two rows, eight columns of each

// ---- What the passes do with a product ----

// PLAIN: the identity transform (and in the row pass exponentials), as for most heads; otherwise the variant is read at run time, and REST
// says whether among all (device.h). WITH_OUTPUT: whether O is needed at all.

// Row pass: weights exp2(z - running_max) N'(c) with the running_max running over the tiles, shared by both warpgroups through
// Memory::maxima; or with a running_max of 0 throughout, for a warp whose rows all have logits so near 0.
template <bool PLAIN, bool WITH_OUTPUT, bool REST>
struct RowElements {
  using Args = FusedRow;
  static constexpr bool RUNNING = true, OUTPUT = WITH_OUTPUT;
  // In units of log 2. Neither an exponential nor a sum of 2^31 of them leaves the range that float32 and bfloat16 share.
  static constexpr float NEAR = 96.0f;
  const Args& p;
  bool near;
  float factor[2], scale[2], threshold[2], t[2];
  int own[2];  // the target's column in the chunk, or -1
  float running_max[2], total[2], cos[2], max_logit[2];

  __device__ RowElements(const Args& args, int row, int split, bool first) : p(args), near(PLAIN && args.reach) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (near && row + 8 * h < p.n) near = p.reach[row + 8 * h] <= NEAR;
    near = !__any_sync(0xffffffffu, !near);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = row + 8 * h;
      const bool live = i < p.n;
      factor[h] = live ? p.row_factor[i] : 0.0f;
      scale[h] = live ? p.scale[i] * LOG2E : 0.0f;
      threshold[h] = !PLAIN && live && p.threshold ? p.threshold[i] : 0.0f;
      t[h] = !PLAIN && live && p.t ? p.t[i] : 0.0f;
      const int64_t column = live ? p.labels[i] - p.start : -1;
      own[h] = column >= 0 && column < p.count ? int(column) : -1;
      const bool go_on = live && p.resume;
      const int64_t at = int64_t(split) * p.n + i;
      running_max[h] = fixed() ? 0.0f : go_on ? p.running_max[at] : -INFINITY;
      // One of the threads that share the row continues the sums of the earlier chunks.
      total[h] = go_on && first ? p.total[at] : 0.0f;
      cos[h] = go_on && first && p.cos ? p.cos[at] : 0.0f;
      max_logit[h] = go_on ? p.max_logit[at] : -INFINITY;
    }
  }

  __device__ __forceinline__ bool logit_sum() const { return !PLAIN && p.reduction == LOGIT_SUM; }
  __device__ __forceinline__ bool softplus() const { return REST && p.reduction == SOFTPLUS_SUM; }
  __device__ __forceinline__ bool fixed() const { return PLAIN ? near : logit_sum() || softplus(); }  // whether the maximum is fixed to 0
  __device__ __forceinline__ float value(float c, int h) const { return PLAIN ? c : value_of<REST>(p.non_target, c, threshold[h], t[h]); }
  __device__ __forceinline__ float slope(float c, int h) const {
    return PLAIN ? 1.0f : slope_of<REST>(p.non_target, c, threshold[h], t[h]);
  }

  // Turns the tile's products into weights, in place.
  __device__ __forceinline__ void weigh(float (&s)[ELEMENTS], const unsigned char* columns, int tile, int lane, float* maxima,
                                        Barrier* maxima_full) {
    const float* bias = reinterpret_cast<const float*>(columns);
    float z[ELEMENTS];
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) {
      s[i] *= factor[i / 2 % 2];
      z[i] = scale[i / 2 % 2] * value(s[i], i / 2 % 2);
    }
    if (p.bias) {
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) z[i] += bias[fragment_column(lane, i)];
    }
    const int left = p.count - tile * TILE_STREAMED, here[2] = {own[0] - tile * TILE_STREAMED, own[1] - tile * TILE_STREAMED};
    const auto counts = [&](int i) { return fragment_column(lane, i) < left && fragment_column(lane, i) != here[i / 2 % 2]; };
    // Only few tiles have columns that do not count: those past the last class and the rows' own targets.
    if (__any_sync(0xffffffffu, left < TILE_STREAMED || unsigned(here[0]) < TILE_STREAMED || unsigned(here[1]) < TILE_STREAMED)) {
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i)
        if (!counts(i)) z[i] = -INFINITY;
    }
    float highest[2] = {PLAIN ? max_logit[0] : running_max[0], PLAIN ? max_logit[1] : running_max[1]};
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) {
      const int h = i / 2 % 2;
      highest[h] = fmaxf(highest[h], z[i]);
      if constexpr (!PLAIN)
        if (counts(i)) max_logit[h] = fmaxf(max_logit[h], scale[h] * s[i] + (p.bias ? bias[fragment_column(lane, i)] : 0.0f));
    }
    if constexpr (PLAIN) max_logit[0] = highest[0], max_logit[1] = highest[1];
    if (!fixed()) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        highest[h] = row_reduce(fmaxf(highest[h], running_max[h]), Max{});
        if (lane % 4 == 0) maxima[8 * h] = highest[h];
        decay(h, highest[h]);
      }
    }
    barrier_arrive(maxima_full);
    const float base[2] = {finite_max(running_max[0]), finite_max(running_max[1])};
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) {
      const int h = i / 2 % 2;
      float weight;
      if (logit_sum()) {
        weight = z[i] == -INFINITY ? 0.0f : 1.0f;
        total[h] += weight == 0.0f ? 0.0f : z[i];
      } else if (softplus()) {
        const float e = exp2_fast(-fabsf(z[i]));
        weight = sigmoid_of(z[i], e);
        total[h] += fmaxf(z[i], 0.0f) + LOG2E * log1p_of(e);
      } else {
        weight = exp2_fast(z[i] - base[h]);
        total[h] += weight;
      }
      cos[h] += weight * value(s[i], h);
      s[i] = weight * slope(s[i], h) * p.pow2;
    }
  }

  // Makes the sums of the thread's row h relative to a new maximum; `Consumer::rescale` does this for O.
  __device__ __forceinline__ void decay(int h, float to) {
    const float by = exp2_fast(running_max[h] - finite_max(to));
    running_max[h] = to;
    total[h] *= by;
    cos[h] *= by;
  }

  __device__ void store(float* exchange, int row, int group, int lane, int row_in_tile, int split) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] = row_reduce(total[h], Sum{});
      cos[h] = row_reduce(cos[h], Sum{});
      max_logit[h] = row_reduce(max_logit[h], Max{});
      float* mine = exchange + row_in_tile + 8 * h;
      if (group == 1 && lane % 4 == 0) mine[0] = total[h], mine[TILE_STATIONARY] = cos[h], mine[2 * TILE_STATIONARY] = max_logit[h];
    }
    consumers_meet();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (group != 0 || lane % 4 != 0 || row + 8 * h >= p.n) continue;
      const float* other = exchange + row_in_tile + 8 * h;
      const int64_t at = int64_t(split) * p.n + row + 8 * h;
      p.running_max[at] = running_max[h];
      p.total[at] = total[h] + other[0];
      if (p.cos) p.cos[at] = cos[h] + other[TILE_STATIONARY];
      p.max_logit[at] = fmaxf(max_logit[h], other[2 * TILE_STATIONARY]);
    }
  }
};

// Class pass: weights G_ij f_i, from the per-row quantities of Streamed.
template <bool PLAIN, bool WITH_OUTPUT, bool REST>
struct ClassElements {
  using Args = FusedClass;
  static constexpr bool RUNNING = false, OUTPUT = WITH_OUTPUT;
  const Args& p;
  float pow2;
  float bias[2], sum[2] = {};
  int own[2];

  __device__ ClassElements(const Args& args, int row, int, bool) : p(args), pow2(args.pow2 ? *args.pow2 : 1.0f) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      bias[h] = p.bias && row + 8 * h < p.count ? p.bias[row + 8 * h] : 0.0f;
      own[h] = int(p.start) + row + 8 * h;
    }
  }

  __device__ __forceinline__ void weigh(float (&s)[ELEMENTS], const unsigned char* columns, int, int lane, float*, Barrier*) {
    const Streamed* rows = reinterpret_cast<const Streamed*>(columns);
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) {
      const int h = i / 2 % 2;
      const Streamed r = rows[fragment_column(lane, i)];
      const float c = r.factor * s[i];
      const float z = r.scale * (PLAIN ? c : value_of<REST>(p.non_target, c, r.threshold, r.t)) + (bias[h] - r.lse);
      const bool softplus = REST && p.reduction == SOFTPLUS_SUM;
      const float e = exp2_fast(softplus ? -fabsf(z) : z);
      float weight = r.d_lse * (softplus ? sigmoid_of(z, e) : e) + r.d_logit_sum;
      if (r.own == own[h]) weight = 0.0f;
      sum[h] += weight * r.inverse_scale * bias_slope_of<REST>(p.non_target, c, r.threshold, r.t);
      s[i] = weight * (PLAIN ? 1.0f : slope_of<REST>(p.non_target, c, r.threshold, r.t)) * (r.factor * pow2);
    }
  }

  __device__ void store(float* exchange, int row, int group, int lane, int row_in_tile, int) {
    if (!p.bias_sum) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] = row_reduce(sum[h], Sum{});
      if (group == 1 && lane % 4 == 0) exchange[row_in_tile + 8 * h] = sum[h];
    }
    consumers_meet();
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (group == 0 && lane % 4 == 0 && row + 8 * h < p.count) p.bias_sum[row + 8 * h] = sum[h] + exchange[row_in_tile + 8 * h];
  }
};

// What the kernel needs to know about the arguments of a pass.
__device__ __forceinline__ int stationary_rows(const FusedRow& p) { return p.n; }
__device__ __forceinline__ int stationary_rows(const FusedClass& p) { return p.count; }
__device__ __forceinline__ int streamed_rows(const FusedRow& p) { return p.count; }
__device__ __forceinline__ int streamed_rows(const FusedClass& p) { return p.n; }
__device__ __forceinline__ const void* columns(const FusedRow& p) { return p.bias; }
__device__ __forceinline__ const void* columns(const FusedClass& p) { return p.rows; }
__device__ __forceinline__ int column_bytes(const FusedRow&) { return sizeof(float); }
__device__ __forceinline__ int column_bytes(const FusedClass&) { return sizeof(Streamed); }
__host__ __device__ __forceinline__ float* output(const FusedRow& p) { return p.center; }
__host__ __device__ __forceinline__ float* output(const FusedClass& p) { return p.v; }
__device__ __forceinline__ bool resumes(const FusedRow& p) { return p.resume; }
__device__ __forceinline__ bool resumes(const FusedClass&) { return false; }

// ---- The kernel ----

// The producer, one thread: keeps the ring of stages full.
template <class T, int D, class Args>
__device__ void copy_tiles(const Launch<Args>& launch, const Memory& m, int first, int count) {
  using S = Traits<T, D>;
  barrier_arrive_expect(m.stationary_full, S::SLICES * S::STATIONARY_SLICE);
  for (int slice = 0; slice < S::SLICES; ++slice)
    for (int part = 0; part < TILE_STATIONARY / TILE_STREAMED; ++part)  // for both tensors, a box has TILE_STREAMED rows
      copy_box(m.stationary + slice * S::STATIONARY_SLICE + part * S::STREAMED_SLICE, &launch.stationary, slice * SLICE_COLUMNS,
               int(blockIdx.x) * TILE_STATIONARY + part * TILE_STREAMED, m.stationary_full);
  const unsigned char* per_column = static_cast<const unsigned char*>(columns(launch.args));
  const int bytes = per_column ? TILE_STREAMED * column_bytes(launch.args) : 0;
  for (int k = 0; k < count; ++k) {
    const int stage = k % S::STAGES;
    barrier_wait(m.empty + stage, (k / S::STAGES & 1) ^ 1, "empty");
    barrier_arrive_expect(m.full + stage, S::STAGE + bytes);
    for (int slice = 0; slice < S::SLICES; ++slice)
      copy_box(m.stages + stage * S::STAGE + slice * S::STREAMED_SLICE, &launch.streamed, slice * SLICE_COLUMNS,
               (first + k) * TILE_STREAMED, m.full + stage);
    if (bytes) copy_bytes(m.columns + stage * S::COLUMNS, per_column + int64_t(first + k) * bytes, bytes, m.full + stage);
  }
}

// One of the two consumer warpgroups. Warpgroup k % 2 makes the weights of tile k from its 64 x 32 products and writes them to shared
// memory; both warpgroups then add their half of weights x tile to O. While one makes weights, the tensor cores work on the products of the
// other: each starts the products of its next tile before it adds the other's tile. The order of the waits cannot deadlock: the weights of
// tile k need only stage k, the weights of k - 1 and the release of k - 2 by both warpgroups, which needs no weights after k - 1.
template <class T, int D, class Elements>
struct Consumer {
  using S = Traits<T, D>;
  const Memory& m;
  Elements& elements;
  const int group, thread, row;  // row: the first of the thread's two rows of the tile
  float (&o)[S::HALF / 2];
  float (&s)[ELEMENTS];

  __device__ __forceinline__ void start_products(int k) {
    barrier_wait(m.full + k % S::STAGES, k / S::STAGES & 1, "full");
    const uint64_t a = along_sum(shared_address(m.stationary)), b = along_sum(shared_address(m.stages + k % S::STAGES * S::STAGE));
    pin(s);
    products_fence();
#pragma unroll
    for (int e = 0; e < D / 16; ++e) {
      const int slice = e * 16 / SLICE_COLUMNS, within = e * 16 % SLICE_COLUMNS * 2;
      product<T, TILE_STREAMED, false>(s, a + ((slice * S::STATIONARY_SLICE + within) >> 4),
                                       b + ((slice * S::STREAMED_SLICE + within) >> 4), e > 0);
    }
    products_commit();
  }

  __device__ __forceinline__ void make_weights(int k, int tile) {
    barrier_wait(m.weights_empty + k % 2, (k / 2 & 1) ^ 1, "weights_empty");
    elements.weigh(s, m.columns + k % S::STAGES * S::COLUMNS, tile, thread, m.maxima + k % 2 * TILE_STATIONARY + row,
                   m.maxima_full + k % 2);
    unsigned char* weights = m.weights + k % 2 * S::WEIGHTS;
#pragma unroll
    for (int i = 0; i < ELEMENTS; i += 2) {
      struct alignas(4) {
        T low, high;
      } two = {narrow<T>(s[i]), narrow<T>(s[i + 1])};
      *reinterpret_cast<decltype(two)*>(weights + weight_offset<TILE_STREAMED>(row + i / 2 % 2 * 8, fragment_column(thread, i))) = two;
    }
    shared_written_fence();
    barrier_arrive(m.weights_full + k % 2);
  }

  // Makes O relative to tile k's running maximum, where it was `before`; also the sums, if the other warpgroup found the maximum. No
  // product may be in flight.
  __device__ __forceinline__ void rescale(int k, const float (&before)[2]) {
    float by[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float to = m.maxima[k % 2 * TILE_STATIONARY + row + 8 * h];
      by[h] = exp2_fast(before[h] - finite_max(to));
      if (elements.running_max[h] != to) elements.decay(h, to);
    }
    if (!__any_sync(0xffffffffu, by[0] != 1.0f || by[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < S::HALF / 2; ++i) o[i] *= by[i / 2 % 2];
  }

  __device__ __forceinline__ void add(int k) {
    if constexpr (Elements::OUTPUT) {
      const uint64_t a = weight_descriptor<TILE_STREAMED>(shared_address(m.weights + k % 2 * S::WEIGHTS));
      const uint64_t b = across_sum(
          shared_address(m.stages + k % S::STAGES * S::STAGE + group * (S::HALF / SLICE_COLUMNS) * S::STREAMED_SLICE), S::STREAMED_SLICE);
      pin(o);
      products_fence();
#pragma unroll
      for (int e = 0; e < TILE_STREAMED / 16; ++e)
        product<T, S::HALF, true>(o, a + (e * 256 >> 4), b + (e * 16 * SLICE_ROW_BYTES >> 4), true);
      products_commit();  // in the same basic block as the products: elsewhere it would be a group of its own
    }
  }

  // This warp no longer needs the stage and the weights of tile k.
  __device__ __forceinline__ void release(int k) {
    if (thread % 32 != 0) return;
    barrier_arrive(m.empty + k % S::STAGES);
    barrier_arrive(m.weights_empty + k % 2);
  }

  __device__ __forceinline__ void wait_maxima(int k) { barrier_wait(m.maxima_full + k % 2, k / 2 & 1, "maxima_full"); }

  __device__ __forceinline__ void wait_weights(int k) {
    barrier_wait(m.weights_full + k % 2, k / 2 & 1, "weights_full");
    barrier_wait(m.full + k % S::STAGES, k / S::STAGES & 1, "full");  // this warpgroup may not have waited for the tile itself yet
  }
};

template <class T, int D, class Elements>
__global__ void __launch_bounds__(THREADS, 1) fused_kernel(const __grid_constant__ Launch<typename Elements::Args> launch) {
  using S = Traits<T, D>;
  MK_DYNAMIC_SHARED(memory);
  const Memory m = Memory::of<S>(memory);
  const auto& args = launch.args;
  if (threadIdx.x == 0) {
    barrier_init(m.stationary_full, 1);
    for (int stage = 0; stage < S::STAGES; ++stage) barrier_init(m.full + stage, 1), barrier_init(m.empty + stage, WARPS);
    for (int k = 0; k < 2; ++k)
      barrier_init(m.weights_full + k, GROUP), barrier_init(m.weights_empty + k, WARPS), barrier_init(m.maxima_full + k, GROUP);
    barrier_init_fence();
  }
  __syncthreads();
  // The tiles of this block.
  const int tiles = (streamed_rows(args) + TILE_STREAMED - 1) / TILE_STREAMED, each = (tiles + int(gridDim.y) - 1) / int(gridDim.y);
  const int split = int(blockIdx.y), first = split * each, left = tiles - first, count = left < each ? (left > 0 ? left : 0) : each;
  if (threadIdx.x < GROUP) {
    registers_down<COPY_REGISTERS>();
    if (threadIdx.x == 0) copy_tiles<T, D>(launch, m, first, count);
  } else {
    registers_up<CONSUMER_REGISTERS>();
    // Broadcast from lane 0, so that the compiler knows that it is uniform in the warp: all threads of a warp must execute the products.
    const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / GROUP - 1, 0), thread = int(threadIdx.x) % GROUP,
              row = fragment_row(thread, 0);
    const int stationary = int(blockIdx.x) * TILE_STATIONARY + row;
    Elements elements(args, stationary, split, group == 0 && thread % 4 == 0);
    float o[S::HALF / 2], s[ELEMENTS];
    // The address of O's first register; the others, in adjacent pairs, are at constant offsets, which keeps address arithmetic small.
    float* out = output(args) + (int64_t(split) * stationary_rows(args) + stationary) * D + group * S::HALF + fragment_column(thread, 0);
    const bool there[2] = {stationary < stationary_rows(args), stationary + 8 < stationary_rows(args)};
    const auto place = [&](int i) { return reinterpret_cast<float2*>(out + i / 2 % 2 * 8 * D + i / 4 * 8); };
#pragma unroll
    for (int i = 0; i < S::HALF / 2; i += 2) {
      const float2 v = Elements::OUTPUT && resumes(args) && there[i / 2 % 2] ? *place(i) : float2{0.0f, 0.0f};
      o[i] = v.x, o[i + 1] = v.y;
    }
    Consumer<T, D, Elements> consumer{m, elements, group, thread, row, o, s};
    float before[2] = {};
    const auto move_to_max = [&](int k) {
      if constexpr (Elements::RUNNING)
        if (!elements.fixed()) consumer.rescale(k, before);
    };
    const auto note_max = [&] {
      if constexpr (Elements::RUNNING) before[0] = elements.running_max[0], before[1] = elements.running_max[1];
    };
    const auto follow_max = [&](int k) {  // to the maximum of the other warpgroup's tile
      if constexpr (Elements::RUNNING)
        if (!elements.fixed()) consumer.wait_maxima(k);
      note_max();
      move_to_max(k);
    };
    barrier_wait(m.stationary_full, 0, "stationary_full");
    int k = group;
    for (; k < count; k += 2) {
      // O is rescaled only while no product is in flight: otherwise the compiler makes each product wait for the one before it.
      if constexpr (Elements::RUNNING) {
        products_wait<0>();  // tile k - 2 is in O
        pin(o);
        if (k > 1) consumer.release(k - 2);
        if (k > 0) follow_max(k - 1);
        consumer.start_products(k);
      } else {
        consumer.start_products(k);
        products_wait<1>();
        pin(o);
        if (k > 1) consumer.release(k - 2);
      }
      if (k > 0) {
        consumer.wait_weights(k - 1);
        consumer.add(k - 1);
        products_wait<Elements::OUTPUT ? 1 : 0>();  // tile k's products
      } else {
        products_wait<0>();
      }
      pin(s);
      note_max();
      consumer.make_weights(k, first + k);
      consumer.wait_weights(k);
      products_wait<0>();
      pin(o);
      if (k > 0) consumer.release(k - 1);
      move_to_max(k);
      consumer.add(k);
    }
    products_wait<0>();
    pin(o);
    if (k == count && count > 0) {  // the other warpgroup made the last tile's weights
      follow_max(k - 1);
      consumer.wait_weights(k - 1);
      consumer.add(k - 1);
      products_wait<0>();
      pin(o);
    }
    elements.store(m.exchange, stationary, group, thread, row, split);
    if constexpr (Elements::OUTPUT) {
#pragma unroll
      for (int i = 0; i < S::HALF / 2; i += 2)
        if (there[i / 2 % 2]) *place(i) = {o[i], o[i + 1]};
    }
  }
}

// ---- Merging of the splits ----

__global__ void __launch_bounds__(256) combine_kernel(const Combine p) {
  const int i = blockIdx.x;
  float running_max = -INFINITY, max_logit = -INFINITY, total = 0.0f, cos = 0.0f;
  for (int k = 0; k < p.splits; ++k) running_max = fmaxf(running_max, p.running_max[int64_t(k) * p.n + i]);
  const float base = finite_max(running_max);
  for (int k = 0; k < p.splits; ++k) {
    const int64_t at = int64_t(k) * p.n + i;
    const float by = exp2f(p.running_max[at] - base);
    total += by * p.total[at];
    if (p.cos) cos += by * p.cos[at];
    max_logit = fmaxf(max_logit, p.max_logit[at]);
  }
  const float inverse = p.reduction != LOG_SUM_EXP ? 1.0f : total == 0.0f ? 0.0f : 1.0f / total;
  if (threadIdx.x == 0) {
    // Logits were in units of log 2.
    p.out_value[i] = p.reduction != LOG_SUM_EXP ? total * LN2 : total == 0.0f ? -INFINITY : logf(total) + running_max * LN2;
    if (p.out_max_logit) p.out_max_logit[i] = max_logit * LN2;
    if (p.cos) p.out_cos[i] = cos * inverse;
  }
  if (!p.center) return;
  for (int e = threadIdx.x; e < p.d; e += blockDim.x) {
    float sum = 0.0f;
    for (int k = 0; k < p.splits; ++k) {
      const int64_t at = int64_t(k) * p.n + i;
      sum += exp2f(p.running_max[at] - base) * p.center[at * p.d + e];
    }
    p.out_center[int64_t(i) * p.d + e] = sum * inverse / p.pow2;
  }
}

// ---- Launches ----

#if defined(MK_EMULATE)
TensorMap tensor_map(const void* base, int rows, int columns, int) {
  if (uintptr_t(base) % 16 || columns * 2 % 16)
    throw std::runtime_error("emulated kernel: a tensor and its rows must be aligned to 16 bytes");
  return {static_cast<const uint16_t*>(base), rows, columns, TILE_STREAMED};
}
#else
// The driver function that makes a tensor map, looked up at run time so that nothing links against the driver.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result), "cuTensorMapEncodeTiled");
#endif
    if (result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; CUDA 12 or later is needed");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

// Of a dense row-major (rows, columns) matrix that is read in swizzled boxes of TILE_STREAMED x 64.
TensorMap tensor_map(const void* base, int rows, int columns, int product) {
  TensorMap map;
  const cuuint64_t shape[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(columns) * 2};
  const cuuint32_t box[2] = {SLICE_COLUMNS, TILE_STREAMED}, steps[2] = {1, 1};
  const CUresult status = encoder()(&map, product == BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                                    const_cast<void*>(base), shape, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                    CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(int(status)));
  return map;
}
#endif

template <class T, int D, class Elements>
void launch_fused(const void* stationary, int stationary_count, const void* streamed, int streamed_count, int splits,
                  const typename Elements::Args& args, int product, void* stream) {
  [[maybe_unused]] constexpr int bytes = Traits<T, D>::BYTES;
  auto kernel = fused_kernel<T, D, Elements>;
#if !defined(MK_EMULATE)
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory of the fused kernel");
#endif
  const Launch<typename Elements::Args> launch = {tensor_map(stationary, stationary_count, D, product),
                                                  tensor_map(streamed, streamed_count, D, product), args};
  const dim3 grid((stationary_count + TILE_STATIONARY - 1) / TILE_STATIONARY, splits);
  MK_LAUNCH(kernel, grid, dim3(THREADS), bytes, static_cast<cudaStream_t>(stream), launch);
}

template <template <bool, bool, bool> class Elements, class Args>
void dispatch(const void* stationary, int stationary_count, const void* streamed, int streamed_count, int splits, bool plain,
              const Args& args, int product, void* stream) {
  const bool rest = needs_rest(args.non_target, args.reduction);
  const auto with_elements = [&](auto* x, auto d) {
    using T = std::remove_pointer_t<decltype(x)>;
    constexpr int D = decltype(d)::value;
    const auto of_rest = output(args) ? launch_fused<T, D, Elements<false, true, true>> : launch_fused<T, D, Elements<false, false, true>>;
    const auto launch = rest            ? of_rest
                        : !output(args) ? launch_fused<T, D, Elements<false, false, false>>
                        : plain         ? launch_fused<T, D, Elements<true, true, false>>
                                        : launch_fused<T, D, Elements<false, true, false>>;
    launch(stationary, stationary_count, streamed, streamed_count, splits, args, product, stream);
  };
  const auto with_d = [&](auto* x) {
    switch (args.d) {
      case 128: return with_elements(x, std::integral_constant<int, 128>{});
      case 256: return with_elements(x, std::integral_constant<int, 256>{});
      case 512: return with_elements(x, std::integral_constant<int, 512>{});
    }
    throw std::invalid_argument("d: expected 128, 256 or 512, got " + std::to_string(args.d));
  };
  switch (product) {
    case BFLOAT16: return with_d(static_cast<bf16*>(nullptr));
    case FLOAT16: return with_d(static_cast<fp16*>(nullptr));
  }
  throw std::invalid_argument("product: expected 1 (bfloat16) or 2 (float16), got " + std::to_string(product));
}

}  // namespace

int fused_shared_bytes(int d) {
  return d == 128 ? Traits<bf16, 128>::BYTES : d == 256 ? Traits<bf16, 256>::BYTES : Traits<bf16, 512>::BYTES;
}

void fused_row(const FusedRow& p, int product, void* stream) {
  dispatch<RowElements>(p.x, p.n, p.w, p.count, p.splits, p.non_target == IDENTITY && p.reduction != LOGIT_SUM, p, product, stream);
}

void fused_class(const FusedClass& p, int product, void* stream) {
  dispatch<ClassElements>(p.w, p.count, p.x, p.n, 1, p.non_target == IDENTITY, p, product, stream);
}

void combine(const Combine& p, void* stream) { MK_LAUNCH(combine_kernel, p.n, 256, 0, static_cast<cudaStream_t>(stream), p); }

}  // namespace mk
