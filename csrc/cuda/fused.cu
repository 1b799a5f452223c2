#include "fused.h"

#include "hopper.h"

namespace mk {
namespace {

using namespace hopper;

// ---- Traits ----

constexpr int CONSUMERS = 2;  // warpgroups; each owns half of O's columns, and every second tile's weights
constexpr int GROUP = 128;    // threads of a warpgroup
constexpr int THREADS = (CONSUMERS + 1) * GROUP;
constexpr int WARPS = CONSUMERS * GROUP / 32;
// Per thread, of the multiprocessor's 65,536: the copying warpgroup gives up what the two others need for O.
constexpr int COPY_REGISTERS = 24, CONSUMER_REGISTERS = 240;

// What a tile costs at D = 512, on paper. Matrix unit: 4 x 64 x 32 x 512 FLOP at 4,096 a cycle, 1,024 cycles. Shared memory at 128 bytes a
// cycle: the first product 768 (2 KB of A and 1 KB of B for each of its 32 instructions), the second 320, the copy 256, weights and columns
// up to 100; 1,440 in all, which makes it the tighter limit: a part of A held in registers would be the next step. L2: 32 KB a tile are 23
// bytes a cycle, of 24 to 28 that 5.5 TB/s give a multiprocessor. One copy to a pair of blocks would halve that, but alone lift nothing.
template <class T, int D>
struct Traits {
  static constexpr int STAGES = 4;
  static constexpr int CHUNKS = D / CHUNK_COLUMNS;
  static constexpr int HALF = D / CONSUMERS;                             // columns of O of one warpgroup
  static constexpr int KEPT_CHUNK = TILE_KEPT * CHUNK_ROW_BYTES;         // bytes of 64 columns of A
  static constexpr int STREAMED_CHUNK = TILE_STREAMED * CHUNK_ROW_BYTES; // and of B
  static constexpr int STAGE = CHUNKS * STREAMED_CHUNK;
  static constexpr int WEIGHTS = TILE_KEPT * TILE_STREAMED * 2;
  static constexpr int COLUMNS = TILE_STREAMED * int(sizeof(Streamed));  // the larger of the two passes' needs
  // Where each lies in shared memory.
  static constexpr int STAGE_AT = CHUNKS * KEPT_CHUNK;
  static constexpr int WEIGHTS_AT = STAGE_AT + STAGES * STAGE;
  static constexpr int COLUMNS_AT = WEIGHTS_AT + 2 * WEIGHTS;
  static constexpr int PEAKS_AT = COLUMNS_AT + STAGES * COLUMNS;
  static constexpr int EXCHANGE_AT = PEAKS_AT + 2 * TILE_KEPT * 4;
  static constexpr int BARRIERS_AT = EXCHANGE_AT + 3 * TILE_KEPT * 4;
  static constexpr int BYTES = BARRIERS_AT + (2 * STAGES + 7) * 8;
  static_assert(sizeof(T) == 2, "fused passes: the product's dtype is bfloat16 or float16");
  static_assert(D % (CONSUMERS * CHUNK_COLUMNS) == 0, "fused passes: each warpgroup takes whole chunks of 64 columns");
  static_assert(HALF <= 256, "fused passes: O's share of a thread must fit its registers");
  static_assert(STREAMED_CHUNK % 1024 == 0 && STAGE_AT % 1024 == 0, "fused passes: the swizzle repeats every 1,024 bytes");
  static_assert(BYTES <= 227 * 1024, "fused passes: more shared memory than a block can have");
  static_assert(COPY_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= 65536 / GROUP, "fused passes: more registers than there are");
};

// Both kernels' arguments: the two tensors as the copy engine knows them, and the pass's own.
template <class Args>
struct Launch {
  TensorMap kept, streamed;
  Args args;
};

struct Memory {
  unsigned char *kept, *stages, *weights, *columns;
  float *peaks, *exchange;
  Barrier *kept_full, *full, *empty, *weights_full, *weights_empty, *peaks_full;
  template <class S>
  __device__ static Memory of(unsigned char* base) {
    Barrier* barriers = reinterpret_cast<Barrier*>(base + S::BARRIERS_AT);
    return {base, base + S::STAGE_AT, base + S::WEIGHTS_AT, base + S::COLUMNS_AT, reinterpret_cast<float*>(base + S::PEAKS_AT),
            reinterpret_cast<float*>(base + S::EXCHANGE_AT), barriers, barriers + 1, barriers + 1 + S::STAGES, barriers + 1 + 2 * S::STAGES,
            barriers + 3 + 2 * S::STAGES, barriers + 5 + 2 * S::STAGES};
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

// Over the four threads that hold a row of a fragment.
template <class Op>
__device__ __forceinline__ float row_reduce(float v, Op op) {
  v = op(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return op(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

constexpr int ELEMENTS = TILE_STREAMED / 2;  // of a tile's 64 x 32 products, held by one thread: of two rows, eight columns

// ---- What the passes do with a product ----

// PLAIN below: the identity form (and in the row pass exponentials), as for most heads; otherwise what is wanted is asked at run time.
// OUTPUT: whether O is wanted at all.

// Row pass: weights exp2(z - peak) N'(c) with the peak running over the tiles, shared by both warpgroups through Memory::peaks; or with a
// peak of 0 throughout, for a warp whose rows all have logits so near 0.
template <bool PLAIN, bool WITH_OUTPUT>
struct RowElements {
  using Args = FusedRow;
  static constexpr bool RUNNING = true, OUTPUT = WITH_OUTPUT;
  // In units of log2: neither an exponential nor a sum of 2^31 of them leaves the range that float32 and bfloat16 share.
  static constexpr float NEAR = 96.0f;
  const Args& p;
  bool near;
  float t;
  float factor[2], scale[2], threshold[2];
  int own[2];  // the target's column in the slab, -1 for none
  float peak[2], total[2], moment[2], top[2];

  __device__ RowElements(const Args& args, int row, int split, bool first)
      : p(args), near(PLAIN && args.reach), t(!PLAIN && args.t ? *args.t : 0.0f) {
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
      const int64_t column = live ? p.labels[i] - p.start : -1;
      own[h] = column >= 0 && column < p.count ? int(column) : -1;
      const bool go_on = live && p.resume;
      const int64_t at = int64_t(split) * p.n + i;
      peak[h] = fixed() ? 0.0f : go_on ? p.peak[at] : -INFINITY;
      // What the earlier slabs summed goes on in one of the threads that share the row.
      total[h] = go_on && first ? p.total[at] : 0.0f;
      moment[h] = go_on && first && p.moment ? p.moment[at] : 0.0f;
      top[h] = go_on ? p.top[at] : -INFINITY;
    }
  }

  __device__ __forceinline__ bool uniform() const { return !PLAIN && p.uniform; }
  __device__ __forceinline__ bool fixed() const { return PLAIN ? near : p.uniform; }  // the peak, to 0
  __device__ __forceinline__ float value(float c, int h) const { return PLAIN ? c : value_of(p.form, c, threshold[h], t); }
  __device__ __forceinline__ float slope(float c, int h) const { return PLAIN ? 1.0f : slope_of(p.form, c, threshold[h], t); }

  // The tile's products to weights, in place.
  __device__ __forceinline__ void weigh(float (&s)[ELEMENTS], const unsigned char* columns, int tile, int lane, float* peaks,
                                        Barrier* peaks_full) {
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
    // Few tiles have columns that do not count: past the last class, or a row's own target.
    if (__any_sync(0xffffffffu, left < TILE_STREAMED || unsigned(here[0]) < TILE_STREAMED || unsigned(here[1]) < TILE_STREAMED)) {
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i)
        if (!counts(i)) z[i] = -INFINITY;
    }
    float highest[2] = {PLAIN ? top[0] : peak[0], PLAIN ? top[1] : peak[1]};
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) {
      const int h = i / 2 % 2;
      highest[h] = fmaxf(highest[h], z[i]);
      if constexpr (!PLAIN)
        if (counts(i)) top[h] = fmaxf(top[h], scale[h] * s[i] + (p.bias ? bias[fragment_column(lane, i)] : 0.0f));
    }
    if constexpr (PLAIN) top[0] = highest[0], top[1] = highest[1];
    if (!fixed()) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        highest[h] = row_reduce(fmaxf(highest[h], peak[h]), Max{});
        if (lane % 4 == 0) peaks[8 * h] = highest[h];
        decay(h, highest[h]);
      }
    }
    barrier_arrive(peaks_full);
    const float base[2] = {finite_peak(peak[0]), finite_peak(peak[1])};
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) {
      const int h = i / 2 % 2;
      float weight;
      if (uniform()) {
        weight = z[i] == -INFINITY ? 0.0f : 1.0f;
        total[h] += weight == 0.0f ? 0.0f : z[i];
      } else {
        weight = exp2_fast(z[i] - base[h]);
        total[h] += weight;
      }
      moment[h] += weight * value(s[i], h);
      s[i] = weight * slope(s[i], h) * p.gain;
    }
  }

  // Moves row half h's sums to a new peak; O follows apart.
  __device__ __forceinline__ void decay(int h, float to) {
    const float by = exp2_fast(peak[h] - finite_peak(to));
    peak[h] = to;
    total[h] *= by;
    moment[h] *= by;
  }

  __device__ void store(float* exchange, int row, int group, int lane, int row_in_tile, int split) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] = row_reduce(total[h], Sum{});
      moment[h] = row_reduce(moment[h], Sum{});
      top[h] = row_reduce(top[h], Max{});
      float* mine = exchange + row_in_tile + 8 * h;
      if (group == 1 && lane % 4 == 0) mine[0] = total[h], mine[TILE_KEPT] = moment[h], mine[2 * TILE_KEPT] = top[h];
    }
    consumers_meet();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (group != 0 || lane % 4 != 0 || row + 8 * h >= p.n) continue;
      const float* other = exchange + row_in_tile + 8 * h;
      const int64_t at = int64_t(split) * p.n + row + 8 * h;
      p.peak[at] = peak[h];
      p.total[at] = total[h] + other[0];
      if (p.moment) p.moment[at] = moment[h] + other[TILE_KEPT];
      p.top[at] = fmaxf(top[h], other[2 * TILE_KEPT]);
    }
  }
};

// Class pass: weights G_ij f_i, from what the row pass left of each row.
template <bool PLAIN, bool WITH_OUTPUT>
struct ClassElements {
  using Args = FusedClass;
  static constexpr bool RUNNING = false, OUTPUT = WITH_OUTPUT;
  const Args& p;
  float t, gain;
  float bias[2], sum[2] = {};
  int own[2];

  __device__ ClassElements(const Args& args, int row, int, bool)
      : p(args), t(!PLAIN && args.t ? *args.t : 0.0f), gain(args.gain ? *args.gain : 1.0f) {
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
      const float z = r.scale * (PLAIN ? c : value_of(p.form, c, r.threshold, t)) + (bias[h] - r.lse);
      float weight = r.softmax * exp2_fast(z) + r.uniform;
      if (r.own == own[h]) weight = 0.0f;
      sum[h] += weight * r.inverse_scale;
      s[i] = weight * (PLAIN ? 1.0f : slope_of(p.form, c, r.threshold, t)) * (r.factor * gain);
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

// What the kernel asks of a pass's arguments.
__device__ __forceinline__ int kept_rows(const FusedRow& p) { return p.n; }
__device__ __forceinline__ int kept_rows(const FusedClass& p) { return p.count; }
__device__ __forceinline__ int streamed_rows(const FusedRow& p) { return p.count; }
__device__ __forceinline__ int streamed_rows(const FusedClass& p) { return p.n; }
__device__ __forceinline__ const void* columns(const FusedRow& p) { return p.bias; }
__device__ __forceinline__ const void* columns(const FusedClass& p) { return p.rows; }
__device__ __forceinline__ int column_bytes(const FusedRow&) { return sizeof(float); }
__device__ __forceinline__ int column_bytes(const FusedClass&) { return sizeof(Streamed); }
__host__ __device__ __forceinline__ float* output(const FusedRow& p) { return p.u; }
__host__ __device__ __forceinline__ float* output(const FusedClass& p) { return p.v; }
__device__ __forceinline__ bool resumes(const FusedRow& p) { return p.resume; }
__device__ __forceinline__ bool resumes(const FusedClass&) { return false; }

// ---- The kernel ----

// One thread: keeps the ring of stages full.
template <class T, int D, class Args>
__device__ void copy_tiles(const Launch<Args>& launch, const Memory& m, int first, int count) {
  using S = Traits<T, D>;
  barrier_arrive_expect(m.kept_full, S::CHUNKS * S::KEPT_CHUNK);
  for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
    for (int part = 0; part < TILE_KEPT / TILE_STREAMED; ++part)  // boxes are of TILE_STREAMED rows for both tensors
      copy_box(m.kept + chunk * S::KEPT_CHUNK + part * S::STREAMED_CHUNK, &launch.kept, chunk * CHUNK_COLUMNS,
               int(blockIdx.x) * TILE_KEPT + part * TILE_STREAMED, m.kept_full);
  const unsigned char* per_column = static_cast<const unsigned char*>(columns(launch.args));
  const int bytes = per_column ? TILE_STREAMED * column_bytes(launch.args) : 0;
  for (int k = 0; k < count; ++k) {
    const int stage = k % S::STAGES;
    barrier_wait(m.empty + stage, (k / S::STAGES & 1) ^ 1);
    barrier_arrive_expect(m.full + stage, S::STAGE + bytes);
    for (int chunk = 0; chunk < S::CHUNKS; ++chunk)
      copy_box(m.stages + stage * S::STAGE + chunk * S::STREAMED_CHUNK, &launch.streamed, chunk * CHUNK_COLUMNS,
               (first + k) * TILE_STREAMED, m.full + stage);
    if (bytes) copy_bytes(m.columns + stage * S::COLUMNS, per_column + int64_t(first + k) * bytes, bytes, m.full + stage);
  }
}

// A warpgroup of the two that compute. Tile k's weights are made by warpgroup k % 2 from its 64 x 32 products and left in shared memory;
// both then add their half of weights x tile to O. While one makes weights, the matrix unit has the other's products to do: each starts
// the products of its next tile before it adds the other's. A thread waits in an order that cannot close a circle: tile k's weights need
// only k's stage, weights k - 1 and both warpgroups' release of k - 2, which needs no weights after k - 1.
template <class T, int D, class Elements>
struct Consumer {
  using S = Traits<T, D>;
  const Memory& m;
  Elements& elements;
  const int group, thread, row;  // row: of the tile, the first of the thread's two
  float (&o)[S::HALF / 2];
  float (&s)[ELEMENTS];

  __device__ __forceinline__ void start_products(int k) {
    barrier_wait(m.full + k % S::STAGES, k / S::STAGES & 1);
    const uint64_t a = along_sum(shared_address(m.kept)), b = along_sum(shared_address(m.stages + k % S::STAGES * S::STAGE));
    pin(s);
    products_fence();
#pragma unroll
    for (int e = 0; e < D / 16; ++e) {
      const int chunk = e * 16 / CHUNK_COLUMNS, within = e * 16 % CHUNK_COLUMNS * 2;
      product<T, TILE_STREAMED, false>(s, a + ((chunk * S::KEPT_CHUNK + within) >> 4), b + ((chunk * S::STREAMED_CHUNK + within) >> 4),
                                       e > 0);
    }
    products_commit();
  }

  __device__ __forceinline__ void make_weights(int k, int tile) {
    barrier_wait(m.weights_empty + k % 2, (k / 2 & 1) ^ 1);
    elements.weigh(s, m.columns + k % S::STAGES * S::COLUMNS, tile, thread, m.peaks + k % 2 * TILE_KEPT + row, m.peaks_full + k % 2);
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

  // Moves O, and the sums where the other warpgroup found the peak, from `before` to tile k's peak. No product may be under way.
  __device__ __forceinline__ void rescale(int k, const float (&before)[2]) {
    float by[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float to = m.peaks[k % 2 * TILE_KEPT + row + 8 * h];
      by[h] = exp2_fast(before[h] - finite_peak(to));
      if (elements.peak[h] != to) elements.decay(h, to);
    }
    if (!__any_sync(0xffffffffu, by[0] != 1.0f || by[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < S::HALF / 2; ++i) o[i] *= by[i / 2 % 2];
  }

  __device__ __forceinline__ void add(int k) {
    if constexpr (Elements::OUTPUT) {
      const uint64_t a = weight_descriptor<TILE_STREAMED>(shared_address(m.weights + k % 2 * S::WEIGHTS));
      const uint64_t b = across_sum(
          shared_address(m.stages + k % S::STAGES * S::STAGE + group * (S::HALF / CHUNK_COLUMNS) * S::STREAMED_CHUNK), S::STREAMED_CHUNK);
      pin(o);
      products_fence();
#pragma unroll
      for (int e = 0; e < TILE_STREAMED / 16; ++e)
        product<T, S::HALF, true>(o, a + (e * 256 >> 4), b + (e * 16 * CHUNK_ROW_BYTES >> 4), true);
      products_commit();  // in the products' own block of code: apart from them it would be a group of its own
    }
  }

  // Tile k's stage and weights may be overwritten, as far as this warp goes.
  __device__ __forceinline__ void release(int k) {
    if (thread % 32 != 0) return;
    barrier_arrive(m.empty + k % S::STAGES);
    barrier_arrive(m.weights_empty + k % 2);
  }

  __device__ __forceinline__ void wait_peaks(int k) { barrier_wait(m.peaks_full + k % 2, k / 2 & 1); }

  __device__ __forceinline__ void wait_weights(int k) {
    barrier_wait(m.weights_full + k % 2, k / 2 & 1);
    barrier_wait(m.full + k % S::STAGES, k / S::STAGES & 1);  // the tile too: this warpgroup may not have looked at it yet
  }
};

template <class T, int D, class Elements>
__global__ void __launch_bounds__(THREADS, 1) fused_kernel(const __grid_constant__ Launch<typename Elements::Args> launch) {
  using S = Traits<T, D>;
  MK_DYNAMIC_SHARED(memory);
  const Memory m = Memory::of<S>(memory);
  const auto& args = launch.args;
  if (threadIdx.x == 0) {
    barrier_init(m.kept_full, 1);
    for (int stage = 0; stage < S::STAGES; ++stage) barrier_init(m.full + stage, 1), barrier_init(m.empty + stage, WARPS);
    for (int k = 0; k < 2; ++k) barrier_init(m.weights_full + k, GROUP), barrier_init(m.weights_empty + k, WARPS), barrier_init(m.peaks_full + k, GROUP);
    barrier_init_fence();
  }
  __syncthreads();
  // This block's share of the tiles.
  const int tiles = (streamed_rows(args) + TILE_STREAMED - 1) / TILE_STREAMED, each = (tiles + int(gridDim.y) - 1) / int(gridDim.y);
  const int split = int(blockIdx.y), first = split * each, left = tiles - first, count = left < each ? (left > 0 ? left : 0) : each;
  if (threadIdx.x < GROUP) {
    registers_down<COPY_REGISTERS>();
    if (threadIdx.x == 0) copy_tiles<T, D>(launch, m, first, count);
  } else {
    registers_up<CONSUMER_REGISTERS>();
    // Through lane 0, so that the compiler knows it to be the same for the whole warp: products stand only where all threads go.
    const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / GROUP - 1, 0), thread = int(threadIdx.x) % GROUP, row = fragment_row(thread, 0);
    const int kept = int(blockIdx.x) * TILE_KEPT + row;
    Elements elements(args, kept, split, group == 0 && thread % 4 == 0);
    float o[S::HALF / 2], s[ELEMENTS];
    // O's first register is here; the others, two side by side at a time, at fixed distances: hardly an address to compute.
    float* out = output(args) + (int64_t(split) * kept_rows(args) + kept) * D + group * S::HALF + fragment_column(thread, 0);
    const bool there[2] = {kept < kept_rows(args), kept + 8 < kept_rows(args)};
    const auto place = [&](int i) { return reinterpret_cast<float2*>(out + i / 2 % 2 * 8 * D + i / 4 * 8); };
#pragma unroll
    for (int i = 0; i < S::HALF / 2; i += 2) {
      const float2 v = Elements::OUTPUT && resumes(args) && there[i / 2 % 2] ? *place(i) : float2{0.0f, 0.0f};
      o[i] = v.x, o[i + 1] = v.y;
    }
    Consumer<T, D, Elements> consumer{m, elements, group, thread, row, o, s};
    float before[2] = {};
    const auto move_to_peak = [&](int k) {
      if constexpr (Elements::RUNNING)
        if (!elements.fixed()) consumer.rescale(k, before);
    };
    const auto note_peak = [&] {
      if constexpr (Elements::RUNNING) before[0] = elements.peak[0], before[1] = elements.peak[1];
    };
    const auto follow_peak = [&](int k) {  // to that of the other warpgroup's tile
      if constexpr (Elements::RUNNING)
        if (!elements.fixed()) consumer.wait_peaks(k);
      note_peak();
      move_to_peak(k);
    };
    barrier_wait(m.kept_full, 0);
    int k = group;
    for (; k < count; k += 2) {
      // O moves to a new peak only while no product is under way: otherwise the compiler has each product wait for the one before it.
      if constexpr (Elements::RUNNING) {
        products_wait<0>();  // tile k - 2 is in O
        pin(o);
        if (k > 1) consumer.release(k - 2);
        if (k > 0) follow_peak(k - 1);
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
      note_peak();
      consumer.make_weights(k, first + k);
      consumer.wait_weights(k);
      products_wait<0>();
      pin(o);
      if (k > 0) consumer.release(k - 1);
      move_to_peak(k);
      consumer.add(k);
    }
    products_wait<0>();
    pin(o);
    if (k == count && count > 0) {  // the last tile is the other warpgroup's
      follow_peak(k - 1);
      consumer.wait_weights(k - 1);
      consumer.add(k - 1);
      products_wait<0>();
      pin(o);
    }
    elements.store(m.exchange, kept, group, thread, row, split);
    if constexpr (Elements::OUTPUT) {
#pragma unroll
      for (int i = 0; i < S::HALF / 2; i += 2)
        if (there[i / 2 % 2]) *place(i) = {o[i], o[i + 1]};
    }
  }
}

// ---- Combination of the splits ----

__global__ void __launch_bounds__(256) combine_kernel(const Combine p) {
  const int i = blockIdx.x;
  float peak = -INFINITY, top = -INFINITY, total = 0.0f, moment = 0.0f;
  for (int k = 0; k < p.splits; ++k) peak = fmaxf(peak, p.peak[int64_t(k) * p.n + i]);
  const float base = finite_peak(peak);
  for (int k = 0; k < p.splits; ++k) {
    const int64_t at = int64_t(k) * p.n + i;
    const float by = exp2f(p.peak[at] - base);
    total += by * p.total[at];
    if (p.moment) moment += by * p.moment[at];
    top = fmaxf(top, p.top[at]);
  }
  const float share = p.uniform ? 1.0f : total == 0.0f ? 0.0f : 1.0f / total;
  if (threadIdx.x == 0) {
    // Logits were in units of log2.
    p.out_total[i] = p.uniform ? total * LN2 : total == 0.0f ? -INFINITY : logf(total) + peak * LN2;
    p.out_top[i] = top * LN2;
    if (p.moment) p.out_moment[i] = moment * share;
  }
  if (!p.u) return;
  for (int e = threadIdx.x; e < p.d; e += blockDim.x) {
    float sum = 0.0f;
    for (int k = 0; k < p.splits; ++k) {
      const int64_t at = int64_t(k) * p.n + i;
      sum += exp2f(p.peak[at] - base) * p.u[at * p.d + e];
    }
    p.out_u[int64_t(i) * p.d + e] = sum * share / p.gain;
  }
}

// ---- Launches ----

#if defined(MK_EMULATE)
TensorMap tensor_map(const void* base, int rows, int columns, int) {
  if (uintptr_t(base) % 16 || columns * 2 % 16) throw std::runtime_error("emulated kernel: a tensor and its rows must lie on 16 bytes");
  return {static_cast<const uint16_t*>(base), rows, columns, TILE_STREAMED};
}
#else
// The driver's function that describes a tensor to the copy engine, found at run time so that nothing links against the driver.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result), "cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result), "cuTensorMapEncodeTiled");
#endif
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; it must be of CUDA 12 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

// (rows, columns) row-major and dense, read in swizzled boxes of TILE_STREAMED x 64.
TensorMap tensor_map(const void* base, int rows, int columns, int product) {
  TensorMap map;
  const cuuint64_t shape[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(columns) * 2};
  const cuuint32_t box[2] = {CHUNK_COLUMNS, TILE_STREAMED}, steps[2] = {1, 1};
  const CUresult status =
      encoder()(&map, product == BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(base),
                shape, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(int(status)));
  return map;
}
#endif

template <class T, int D, class Elements>
void launch_fused(const void* kept, int kept_count, const void* streamed, int streamed_count, int splits,
                  const typename Elements::Args& args, int product, void* stream) {
  [[maybe_unused]] constexpr int bytes = Traits<T, D>::BYTES;
  auto kernel = fused_kernel<T, D, Elements>;
#if !defined(MK_EMULATE)
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory of the fused kernel");
#endif
  const Launch<typename Elements::Args> launch = {tensor_map(kept, kept_count, D, product), tensor_map(streamed, streamed_count, D, product),
                                                  args};
  const dim3 grid((kept_count + TILE_KEPT - 1) / TILE_KEPT, splits);
  MK_LAUNCH(kernel, grid, dim3(THREADS), bytes, static_cast<cudaStream_t>(stream), launch);
}

template <template <bool, bool> class Elements, class Args>
void dispatch(const void* kept, int kept_count, const void* streamed, int streamed_count, int splits, bool plain, const Args& args,
              int product, void* stream) {
  const auto with_elements = [&](auto* x, auto d) {
    using T = std::remove_pointer_t<decltype(x)>;
    constexpr int D = decltype(d)::value;
    const auto launch = !output(args) ? launch_fused<T, D, Elements<false, false>>
                        : plain       ? launch_fused<T, D, Elements<true, true>>
                                      : launch_fused<T, D, Elements<false, true>>;
    launch(kept, kept_count, streamed, streamed_count, splits, args, product, stream);
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

int fused_shared_bytes(int d) { return d == 128 ? Traits<bf16, 128>::BYTES : d == 256 ? Traits<bf16, 256>::BYTES : Traits<bf16, 512>::BYTES; }

void fused_row(const FusedRow& p, int product, void* stream) {
  dispatch<RowElements>(p.x, p.n, p.w, p.count, p.splits, p.form == IDENTITY && !p.uniform, p, product, stream);
}

void fused_class(const FusedClass& p, int product, void* stream) {
  dispatch<ClassElements>(p.w, p.count, p.x, p.n, 1, p.form == IDENTITY, p, product, stream);
}

void combine(const Combine& p, void* stream) {
  MK_LAUNCH(combine_kernel, p.n, 256, 0, static_cast<cudaStream_t>(stream), p);
}

}  // namespace mk
