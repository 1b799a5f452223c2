// The scalar mathematics of the two passes, shared by the C++ and the CUDA kernels. Notation as in marginkernels/backend/base.py.
//
// Every function is a template on the number's type: a scalar on host and device, or a GNU vector (where `a > b ? x : y` selects lane by
// lane) in the CPU kernels. Nothing here allocates, branches on data or includes another header.
#pragma once

#if defined(__CUDACC__)
#define MK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MK_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace mk {

// The numbers of marginkernels/forms.py.
enum Form : int { IDENTITY = 0, HARD_LINEAR = 1, HARD_QUADRATIC = 2 };

// The numbers by which the dtype of a buffer is handed over.
enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// A row or a centre whose norm lies below this counts as the zero vector.
constexpr float TINY = 1e-30f;
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;

// N(c): what a non-target similarity becomes before the scale.
template <int FORM, class T>
MK_HOST_DEVICE T form_value(T c, T threshold, T t) {
  if constexpr (FORM == HARD_LINEAR) return c > threshold ? (1.0f + t) * c + t : c;
  if constexpr (FORM == HARD_QUADRATIC) return c > threshold ? c * (t + c) : c;
  return c;
}

// N'(c); the mask is not differentiated.
template <int FORM, class T>
MK_HOST_DEVICE T form_slope(T c, T threshold, T t) {
  const T one = T{} + 1.0f;
  if constexpr (FORM == HARD_LINEAR) return c > threshold ? 1.0f + t : one;
  if constexpr (FORM == HARD_QUADRATIC) return c > threshold ? t + 2.0f * c : one;
  return one;
}

// What an exponential may be taken against while the running maximum is still -inf (no class seen, or all of them the target).
template <class T>
MK_HOST_DEVICE T finite_peak(T peak) {
  return peak > -3.0e38f ? peak : T{};
}

// One row's running log-sum-exp, `total` relative to `peak`; and how two of them become one: scale what each has summed (total, moment, U)
// by its factor, in units where exponentials are taken to base `EXP` (expf or exp2f, whatever the logits are in).
template <class T>
struct Merge {
  T peak, first, second;
};

template <class T, class Exp>
MK_HOST_DEVICE Merge<T> merge(T peak_1, T peak_2, Exp exp) {
  const T peak = peak_1 > peak_2 ? peak_1 : peak_2;
  const T base = finite_peak(peak);
  return {peak, exp(peak_1 - base), exp(peak_2 - base)};
}

// v_j, the gradient in the unit centre `unit` = a w, to the gradient in the centre itself; `dot` = v . unit.
template <class T>
MK_HOST_DEVICE T through_norm(T v, T dot, T unit, T a) {
  return a * (v - dot * unit);
}

}  // namespace mk
