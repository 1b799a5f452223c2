// What every kernel source needs: the CUDA runtime (or its emulation), the dtypes, warp and block reductions, launches.
#pragma once

#if defined(MK_EMULATE)
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../scalar.h"

namespace mk {

// Launches `kernel` and throws on a launch error (in Python, a RuntimeError). Arguments are evaluated once.
#if defined(MK_EMULATE)
#define MK_LAUNCH(kernel, grid, block, shared, stream, ...) emulate::launch(grid, block, [=] { kernel(__VA_ARGS__); })
#define MK_DYNAMIC_SHARED(name) unsigned char* name = emulate::shared_memory()
#else
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
#define MK_LAUNCH(kernel, grid, block, shared, stream, ...)               \
  do {                                                                    \
    kernel<<<grid, block, shared, stream>>>(__VA_ARGS__);                 \
    ::mk::check(cudaGetLastError(), "marginkernels: launch of " #kernel); \
  } while (0)
#define MK_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

using bf16 = __nv_bfloat16;
using fp16 = __half;

__host__ __device__ __forceinline__ float widen(float v) { return v; }
__host__ __device__ __forceinline__ float widen(bf16 v) { return __bfloat162float(v); }
__host__ __device__ __forceinline__ float widen(fp16 v) { return __half2float(v); }

template <class T>
__host__ __device__ __forceinline__ T narrow(float v);
template <>
__host__ __device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__host__ __device__ __forceinline__ bf16 narrow<bf16>(float v) {
  return __float2bfloat16(v);
}
template <>
__host__ __device__ __forceinline__ fp16 narrow<fp16>(float v) {
  return __float2half(v);
}

// Calls `f` with a null pointer of the type that `dtype` stands for.
template <class F>
void with_dtype(int dtype, F f) {
  switch (dtype) {
    case FLOAT32: return f(static_cast<float*>(nullptr));
    case BFLOAT16: return f(static_cast<bf16*>(nullptr));
    case FLOAT16: return f(static_cast<fp16*>(nullptr));
  }
  throw std::invalid_argument("dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(dtype));
}

// The transform is the same for all threads of a launch, so a switch costs less than a copy of every kernel for each. Two copies there are:
// one for what most heads need, and one with REST, for all transforms and reductions, which would cost the others registers.
MK_HOST_DEVICE constexpr bool needs_rest(int non_target, int reduction) { return non_target >= CLIPPED || reduction == SOFTPLUS_SUM; }

template <bool REST, int NON_TARGET>
constexpr int COMPILED = REST || !needs_rest(NON_TARGET, LOG_SUM_EXP) ? NON_TARGET : IDENTITY;

template <bool REST>
__device__ __forceinline__ float value_of(int non_target, float c, float threshold, float t) {
  switch (non_target) {
#define MK_CASE(name) \
  case name: return nontarget_value<COMPILED<REST, name>>(c, threshold, t);
    MK_TRANSFORMS(MK_CASE)
#undef MK_CASE
  }
  return c;
}

template <bool REST>
__device__ __forceinline__ float slope_of(int non_target, float c, float threshold, float t) {
  switch (non_target) {
#define MK_CASE(name) \
  case name: return nontarget_slope<COMPILED<REST, name>>(c, threshold, t);
    MK_TRANSFORMS(MK_CASE)
#undef MK_CASE
  }
  return 1.0f;
}

template <bool REST>
__device__ __forceinline__ float bias_slope_of(int non_target, float c, float threshold, float t) {
  return REST && non_target == CLIPPED ? bias_slope<CLIPPED>(c, threshold, t) : 1.0f;
}

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return a > b ? a : b; }
};

// Reduces over the 32 lanes, always in the same order; all lanes get the result.
template <class Op>
__device__ __forceinline__ float warp_reduce(float v, Op op) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, mask));
  return v;
}

// Reduces over a one-dimensional block of whole warps, always in the same order; all threads get the result.
template <class Op>
__device__ float block_reduce(float v, float empty, Op op) {
  __shared__ float parts[32];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  v = warp_reduce(v, op);
  __syncthreads();  // `parts` may still be in use by the call before
  if (lane == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  return warp_reduce(lane < warps ? parts[lane] : empty, op);
}

}  // namespace mk
