#include "slab.h"

#include "device.h"

namespace mk {
namespace {

constexpr int WARPS = 8;  // rows of a block where a warp takes one

__device__ __forceinline__ int64_t warp_row() { return int64_t(blockIdx.x) * WARPS + threadIdx.x / 32; }

// 1/|v|, 0 for a zero vector: squares are taken relative to the largest element, so they neither overflow nor vanish.
template <class T>
__device__ float inverse_norm(const T* v, int d) {
  const int lane = threadIdx.x % 32;
  float largest = 0.0f;
  for (int e = lane; e < d; e += 32) largest = fmaxf(largest, fabsf(widen(v[e])));
  largest = warp_reduce(largest, Max{});
  int exponent;
  frexpf(largest, &exponent);
  float sum = 0.0f;
  for (int e = lane; e < d; e += 32) {
    const float scaled = ldexpf(widen(v[e]), -exponent);
    sum += scaled * scaled;
  }
  const float norm = ldexpf(sqrtf(warp_reduce(sum, Sum{})), exponent);
  return norm < TINY ? 0.0f : 1.0f / norm;
}

template <class TW, class T>
__global__ void __launch_bounds__(32 * WARPS) centres_kernel(const Centres p) {
  const int64_t row = warp_row();
  if (row >= p.count) return;
  const TW* w = static_cast<const TW*>(p.w) + row * p.stride;
  T* out = static_cast<T*>(p.out) + row * p.d;
  const int lane = threadIdx.x % 32;
  float a = 1.0f;
  if (p.factor) {
    a = p.given ? p.factor[row] : inverse_norm(w, p.d);
    if (!p.given && lane == 0) p.factor[row] = a;
  }
  for (int e = lane; e < p.d; e += 32) out[e] = narrow<T>(a * widen(w[e]));
}

// What one row's elements need.
struct Row {
  float factor, scale, threshold, t;
  int64_t own;  // its target's column in this slab, or none of them
  __device__ Row(const float* factors, const float* scales, const float* thresholds, const float* ts, const int64_t* labels, int64_t start,
                 int i)
      : factor(factors[i]),
        scale(scales[i]),
        threshold(thresholds ? thresholds[i] : 0.0f),
        t(ts ? *ts : 0.0f),
        own(labels[i] - start) {}
};

// A block takes one row of the slab. Once for the maximum, once for the exponentials: the second reading comes from the cache.
template <class T>
__global__ void __launch_bounds__(1024) row_kernel(const RowSlab p) {
  const int i = blockIdx.x;
  const Row row(p.row_factor, p.scale, p.threshold, p.t, p.labels, p.start, i);
  const float* products = p.products + i * p.ld;
  T* weights = static_cast<T*>(p.weights) + i * p.ld;
  float highest = -INFINITY, top = -INFINITY;
  if (!p.uniform) {
    for (int j = threadIdx.x; j < p.count; j += blockDim.x) {
      if (j == row.own) continue;
      const float c = row.factor * products[j], bias = p.bias ? p.bias[j] : 0.0f;
      highest = fmaxf(highest, row.scale * value_of(p.form, c, row.threshold, row.t) + bias);
      top = fmaxf(top, row.scale * c + bias);
    }
    highest = block_reduce(highest, -INFINITY, Max{});
    top = block_reduce(top, -INFINITY, Max{});
  }
  const Merge<float> merged = merge(p.uniform ? 0.0f : p.peak[i], p.uniform ? 0.0f : highest, expf);
  const float base = finite_peak(merged.peak);
  float total = 0.0f, moment = 0.0f;
  for (int j = threadIdx.x; j < p.count; j += blockDim.x) {
    float weight = 0.0f, slope = 0.0f;
    if (j != row.own) {
      const float c = row.factor * products[j];
      const float value = value_of(p.form, c, row.threshold, row.t);
      const float z = row.scale * value + (p.bias ? p.bias[j] : 0.0f);
      weight = p.uniform ? 1.0f : expf(z - base);
      slope = slope_of(p.form, c, row.threshold, row.t);
      total += p.uniform ? z : weight;
      moment += weight * value;
    }
    if (p.weights) weights[j] = narrow<T>(weight * slope * p.gain);
  }
  total = block_reduce(total, 0.0f, Sum{});
  moment = block_reduce(moment, 0.0f, Sum{});
  if (threadIdx.x != 0) return;
  const float decay = p.uniform ? 1.0f : merged.first;
  p.peak[i] = merged.peak;
  p.top[i] = fmaxf(p.top[i], top);
  p.total[i] = p.total[i] * decay + total;
  if (p.moment) p.moment[i] = p.moment[i] * decay + moment;
  p.decay[i] = decay;
  if (p.base) p.base[i] = base;
}

constexpr int LANES = 32, COLUMNS = 4;  // a warp takes 128 classes, each thread four side by side

template <class T>
struct alignas(COLUMNS * sizeof(T)) Four {
  T at[COLUMNS];
};

// A block takes CHUNK rows of 128 classes, a warp every eighth of the rows. Buffers are padded to whole groups of 128 classes.
template <class T>
__global__ void __launch_bounds__(LANES* WARPS) class_kernel(const ClassSlab p) {
  __shared__ float sums[WARPS][LANES * COLUMNS];
  const int first = (blockIdx.x * LANES + threadIdx.x) * COLUMNS;
  const float gain = p.gain ? *p.gain : 1.0f;
  float bias[COLUMNS], sum[COLUMNS] = {};
  for (int k = 0; k < COLUMNS; ++k) bias[k] = p.bias && first + k < p.count ? p.bias[first + k] : 0.0f;
  const int begin = blockIdx.y * CHUNK, stop = p.n - begin < CHUNK ? p.n : begin + CHUNK;
  for (int i = begin + threadIdx.y; i < stop; i += WARPS) {
    const Row row(p.row_factor, p.scale, p.threshold, p.t, p.labels, p.start, i);
    const float lse = p.lse[i], softmax = p.softmax[i], uniform = p.uniform ? p.uniform[i] : 0.0f;
    const auto products = *reinterpret_cast<const Four<float>*>(p.products + i * p.ld + first);
    Four<T> out;
#pragma unroll
    for (int k = 0; k < COLUMNS; ++k) {
      const float c = row.factor * products.at[k];
      const float z = row.scale * value_of(p.form, c, row.threshold, row.t) + bias[k];
      const bool live = first + k != row.own && first + k < p.count;
      const float weight = live ? softmax * expf(z - lse) + uniform : 0.0f;
      sum[k] += weight / row.scale;
      out.at[k] = narrow<T>(weight * slope_of(p.form, c, row.threshold, row.t) * row.factor * gain);
    }
    if (p.weights) *reinterpret_cast<Four<T>*>(static_cast<T*>(p.weights) + i * p.ld + first) = out;
  }
  if (!p.bias_parts) return;
  for (int k = 0; k < COLUMNS; ++k) sums[threadIdx.y][threadIdx.x * COLUMNS + k] = sum[k];
  __syncthreads();
  if (threadIdx.y != 0) return;
  for (int k = 0; k < COLUMNS; ++k) {
    float all = 0.0f;
    for (int y = 0; y < WARPS; ++y) all += sums[y][threadIdx.x * COLUMNS + k];
    p.bias_parts[blockIdx.y * p.ld + first + k] = all;
  }
}

// The first place in `sorted` (n) whose value is not below `label`.
__device__ __forceinline__ int lower_bound(const int64_t* sorted, int n, int64_t label) {
  int low = 0;
  for (int high = n; low < high;) {
    const int middle = (low + high) / 2;
    if (sorted[middle] < label) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <class TW, class T>
__global__ void __launch_bounds__(32 * WARPS) finish_kernel(const Finish p) {
  const int64_t row = warp_row();
  if (row >= p.count) return;
  const int lane = threadIdx.x % 32;
  const int own = lower_bound(p.sorted, p.n, p.start + row), end = lower_bound(p.sorted, p.n, p.start + row + 1);
  if (p.db && lane == 0) {
    float sum = 0.0f;
    for (int k = 0; k < p.chunks; ++k) sum += p.bias_parts[k * p.ld + row];
    for (int k = own; k < end; ++k) sum += p.row_bias[p.order[k]];
    p.db[row] = sum;
  }
  if (!p.dw) return;
  const float a = p.factor ? p.factor[row] : 1.0f, ungain = 1.0f / ((p.gain ? *p.gain : 1.0f) * p.post);
  const TW* w = static_cast<const TW*>(p.w) + row * p.stride;
  const T* x = static_cast<const T*>(p.x);
  TW* dw = static_cast<TW*>(p.dw) + row * p.d;
  float* v = p.v + row * p.d;
  float dot = 0.0f;
  for (int e = lane; e < p.d; e += 32) {
    float sum = v[e] * ungain;
    for (int k = own; k < end; ++k) {
      const int64_t i = p.order[k];
      sum += p.target[i] * p.row_factor[i] * widen(x[i * p.d + e]);
    }
    if (p.factor) {
      v[e] = sum;
      dot += sum * (a * widen(w[e]));
    } else {
      dw[e] = narrow<TW>(sum);
    }
  }
  if (!p.factor) return;
  dot = warp_reduce(dot, Sum{});
  for (int e = lane; e < p.d; e += 32) dw[e] = narrow<TW>(through_norm(v[e], dot, a * widen(w[e]), a));
}

unsigned blocks(int64_t count, int of) { return unsigned((count + of - 1) / of); }

}  // namespace

void centres(const Centres& p, int w_dtype, int product, void* stream) {
  with_dtype(w_dtype, [&](auto* w) {
    with_dtype(product, [&](auto* x) {
      auto kernel = centres_kernel<std::remove_pointer_t<decltype(w)>, std::remove_pointer_t<decltype(x)>>;
      MK_LAUNCH(kernel, blocks(p.count, WARPS), 32 * WARPS, 0, static_cast<cudaStream_t>(stream), p);
    });
  });
}

void row_slab(const RowSlab& p, int product, void* stream) {
  with_dtype(product, [&](auto* x) {
    auto kernel = row_kernel<std::remove_pointer_t<decltype(x)>>;
    MK_LAUNCH(kernel, p.n, p.threads, 0, static_cast<cudaStream_t>(stream), p);
  });
}

void class_slab(const ClassSlab& p, int product, void* stream) {
  with_dtype(product, [&](auto* x) {
    auto kernel = class_kernel<std::remove_pointer_t<decltype(x)>>;
    const dim3 grid(blocks(p.count, LANES * COLUMNS), blocks(p.n, CHUNK)), block(LANES, WARPS);
    MK_LAUNCH(kernel, grid, block, 0, static_cast<cudaStream_t>(stream), p);
  });
}

void finish(const Finish& p, int w_dtype, int product, void* stream) {
  with_dtype(w_dtype, [&](auto* w) {
    with_dtype(product, [&](auto* x) {
      auto kernel = finish_kernel<std::remove_pointer_t<decltype(w)>, std::remove_pointer_t<decltype(x)>>;
      MK_LAUNCH(kernel, blocks(p.count, WARPS), 32 * WARPS, 0, static_cast<cudaStream_t>(stream), p);
    });
  });
}

}  // namespace mk
