#include "generic.h"

#include "device.h"

namespace mk {
namespace {

constexpr int WARPS = 8;  // rows of a block where each warp handles one

__device__ __forceinline__ int64_t warp_row() { return int64_t(blockIdx.x) * WARPS + threadIdx.x / 32; }

// 1/|v|, or 0 for a zero vector. Squares are relative to the largest element, so that they neither overflow nor underflow.
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
__global__ void __launch_bounds__(32 * WARPS) centers_kernel(const Centers p) {
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

// What the elements of a row need.
struct Row {
  float factor, scale, threshold, t;
  int64_t own;  // the column of its target in this chunk, or outside of the chunk
  __device__ Row(const float* factors, const float* scales, const float* thresholds, const float* ts, const int64_t* labels, int64_t start,
                 int i)
      : factor(factors[i]), scale(scales[i]), threshold(thresholds ? thresholds[i] : 0.0f), t(ts ? ts[i] : 0.0f), own(labels[i] - start) {}
};

// The most threads of a block of the row pass: with REST a thread needs more than the 32 registers that 1024 leave to each.
constexpr int most_threads(bool rest) { return rest ? 512 : 1024; }

// A block handles one row of the chunk. It reads the row twice: for the maximum, and, from the cache, for the exponentials.
template <class T, bool REST>
__global__ void __launch_bounds__(most_threads(REST)) row_kernel(const RowChunk p) {
  const int i = blockIdx.x;
  const Row row(p.row_factor, p.scale, p.threshold, p.t, p.labels, p.start, i);
  const float* products = p.products + i * p.ld;
  T* weights = static_cast<T*>(p.weights) + i * p.ld;
  float highest = -INFINITY, max_logit = -INFINITY;
  const bool logit_sum = p.reduction == LOGIT_SUM, softplus = REST && p.reduction == SOFTPLUS_SUM, online = !logit_sum && !softplus;
  if (!logit_sum) {
    for (int j = threadIdx.x; j < p.count; j += blockDim.x) {
      if (j == row.own) continue;
      const float c = row.factor * products[j], bias = p.bias ? p.bias[j] : 0.0f;
      highest = fmaxf(highest, row.scale * value_of<REST>(p.non_target, c, row.threshold, row.t) + bias);
      max_logit = fmaxf(max_logit, row.scale * c + bias);
    }
    highest = block_reduce(highest, -INFINITY, Max{});
    max_logit = block_reduce(max_logit, -INFINITY, Max{});
  }
  const Merge<float> merged = merge(online ? p.running_max[i] : 0.0f, online ? highest : 0.0f, expf);
  const float base = finite_max(merged.max);
  float total = 0.0f, cos = 0.0f;
  for (int j = threadIdx.x; j < p.count; j += blockDim.x) {
    float weight = 0.0f, slope = 0.0f;
    if (j != row.own) {
      const float c = row.factor * products[j];
      const float value = value_of<REST>(p.non_target, c, row.threshold, row.t);
      const float z = row.scale * value + (p.bias ? p.bias[j] : 0.0f);
      float e = 0.0f;
      if (softplus) {
        e = expf(-fabsf(z));
        weight = sigmoid_of(z, e);
      } else {
        weight = logit_sum ? 1.0f : expf(z - base);
      }
      slope = slope_of<REST>(p.non_target, c, row.threshold, row.t);
      total += softplus ? fmaxf(z, 0.0f) + log1p_of(e) : logit_sum ? z : weight;
      cos += weight * value;
    }
    if (p.weights) weights[j] = narrow<T>(weight * slope * p.pow2);
  }
  total = block_reduce(total, 0.0f, Sum{});
  cos = block_reduce(cos, 0.0f, Sum{});
  if (threadIdx.x != 0) return;
  const float decay = online ? merged.first : 1.0f;
  p.running_max[i] = merged.max;
  p.max_logit[i] = fmaxf(p.max_logit[i], max_logit);
  p.total[i] = p.total[i] * decay + total;
  if (p.cos) p.cos[i] = p.cos[i] * decay + cos;
  p.decay[i] = decay;
  if (p.base) p.base[i] = base;
}

constexpr int LANES = 32, COLUMNS = 4;  // a warp handles 128 classes, each thread four adjacent ones

template <class T>
struct alignas(COLUMNS * sizeof(T)) Four {
  T at[COLUMNS];
};

// A block handles ROW_BLOCK rows of 128 classes, a warp every eighth of the rows. Buffers are padded to whole groups of 128 classes.
template <class T, bool REST>
__global__ void __launch_bounds__(LANES* WARPS) class_kernel(const ClassChunk p) {
  __shared__ float sums[WARPS][LANES * COLUMNS];
  const int first = (blockIdx.x * LANES + threadIdx.x) * COLUMNS;
  const float pow2 = p.pow2 ? *p.pow2 : 1.0f;
  float bias[COLUMNS], sum[COLUMNS] = {};
  for (int k = 0; k < COLUMNS; ++k) bias[k] = p.bias && first + k < p.count ? p.bias[first + k] : 0.0f;
  const int begin = blockIdx.y * ROW_BLOCK, stop = p.n - begin < ROW_BLOCK ? p.n : begin + ROW_BLOCK;
  for (int i = begin + threadIdx.y; i < stop; i += WARPS) {
    const Row row(p.row_factor, p.scale, p.threshold, p.t, p.labels, p.start, i);
    const float lse = p.lse[i], d_lse = p.d_lse[i], d_logit_sum = p.d_logit_sum ? p.d_logit_sum[i] : 0.0f;
    const auto products = *reinterpret_cast<const Four<float>*>(p.products + i * p.ld + first);
    Four<T> out;
#pragma unroll
    for (int k = 0; k < COLUMNS; ++k) {
      const float c = row.factor * products.at[k];
      const float z = row.scale * value_of<REST>(p.non_target, c, row.threshold, row.t) + bias[k];
      const bool live = first + k != row.own && first + k < p.count;
      const bool softplus = REST && p.reduction == SOFTPLUS_SUM;
      const float e = expf(softplus ? -fabsf(z) : z - lse);
      const float weight = live ? d_lse * (softplus ? sigmoid_of(z, e) : e) + d_logit_sum : 0.0f;
      sum[k] += weight / row.scale * bias_slope_of<REST>(p.non_target, c, row.threshold, row.t);
      out.at[k] = narrow<T>(weight * slope_of<REST>(p.non_target, c, row.threshold, row.t) * row.factor * pow2);
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

// The first index of `sorted` (n) whose value is not below `label`.
__device__ __forceinline__ int lower_bound(const int64_t* sorted, int n, int64_t label) {
  int low = 0;
  for (int high = n; low < high;) {
    const int middle = (low + high) / 2;
    if (sorted[middle] < label)
      low = middle + 1;
    else
      high = middle;
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
    for (int k = 0; k < p.row_blocks; ++k) sum += p.bias_parts[k * p.ld + row];
    for (int k = own; k < end; ++k) sum += p.d_target_bias[p.order[k]];
    p.db[row] = sum;
  }
  if (!p.dw) return;
  const float a = p.factor ? p.factor[row] : 1.0f, inverse_pow2 = 1.0f / ((p.pow2 ? *p.pow2 : 1.0f) * p.v_pow2);
  const TW* w = static_cast<const TW*>(p.w) + row * p.stride;
  const T* x = static_cast<const T*>(p.x);
  TW* dw = static_cast<TW*>(p.dw) + row * p.d;
  float* v = p.v + row * p.d;
  float dot = 0.0f;
  for (int e = lane; e < p.d; e += 32) {
    float sum = v[e] * inverse_pow2;
    for (int k = own; k < end; ++k) {
      const int64_t i = p.order[k];
      sum += p.d_target_cos[i] * p.row_factor[i] * widen(x[i * p.d + e]);
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

void centers(const Centers& p, int w_dtype, int product, void* stream) {
  with_dtype(w_dtype, [&](auto* w) {
    with_dtype(product, [&](auto* x) {
      auto kernel = centers_kernel<std::remove_pointer_t<decltype(w)>, std::remove_pointer_t<decltype(x)>>;
      MK_LAUNCH(kernel, blocks(p.count, WARPS), 32 * WARPS, 0, static_cast<cudaStream_t>(stream), p);
    });
  });
}

void row_chunk(const RowChunk& p, int product, void* stream) {
  with_dtype(product, [&](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    const bool rest = needs_rest(p.non_target, p.reduction);
    const int most = most_threads(rest);
    auto kernel = rest ? row_kernel<T, true> : row_kernel<T, false>;
    MK_LAUNCH(kernel, p.n, p.threads < most ? p.threads : most, 0, static_cast<cudaStream_t>(stream), p);
  });
}

void class_chunk(const ClassChunk& p, int product, void* stream) {
  with_dtype(product, [&](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    auto kernel = needs_rest(p.non_target, p.reduction) ? class_kernel<T, true> : class_kernel<T, false>;
    const dim3 grid(blocks(p.count, LANES * COLUMNS), blocks(p.n, ROW_BLOCK)), block(LANES, WARPS);
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

#if defined(MK_EMULATE)
int driver_version() { return 0; }
int runtime_version() { return 0; }
#else
int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}
int runtime_version() { return CUDART_VERSION; }
#endif

}  // namespace mk
