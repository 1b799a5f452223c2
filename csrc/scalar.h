// The scalar math of the two passes, shared by the C++ and the CUDA kernels. Notation as in marginkernels/core/types.py.
//
// Every function is a template on the number type: a scalar on host and device, or a GNU vector in the CPU kernels, where `a > b ? x : y`
// selects lane by lane. Nothing here allocates, branches on data or includes another header.
#pragma once

#if defined(__CUDACC__)
#define MK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MK_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace mk {

// The transform N of non-target similarities; the numbers of marginkernels/core/nontarget.py.
enum NonTarget : int { IDENTITY = 0, HARD_LINEAR = 1, HARD_QUADRATIC = 2 };

// The dtype of a buffer that is passed as a plain address; the numbers of marginkernels/backend/_extension.py.
enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// An embedding or a class center with a smaller norm is treated as the zero vector.
constexpr float TINY = 1e-30f;
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;

// N(c) of a non-target similarity c; the logit is s N(c) + b. `threshold` and `t` are the row's.
template <int NON_TARGET, class T>
MK_HOST_DEVICE T nontarget_value(T c, T threshold, T t) {
  if constexpr (NON_TARGET == HARD_LINEAR) return c > threshold ? (1.0f + t) * c + t : c;
  if constexpr (NON_TARGET == HARD_QUADRATIC) return c > threshold ? c * (t + c) : c;
  return c;
}

// N'(c); the mask c > threshold is not differentiated.
template <int NON_TARGET, class T>
MK_HOST_DEVICE T nontarget_slope(T c, T threshold, T t) {
  const T one = T{} + 1.0f;
  if constexpr (NON_TARGET == HARD_LINEAR) return c > threshold ? 1.0f + t : one;
  if constexpr (NON_TARGET == HARD_QUADRATIC) return c > threshold ? t + 2.0f * c : one;
  return one;
}

// What exponentials are taken relative to: the running maximum, or 0 while that is still -inf (no class so far, or only the target).
template <class T>
MK_HOST_DEVICE T finite_max(T max) {
  return max > -3.0e38f ? max : T{};
}

// Two running log-sum-exps of a row, each a sum relative to its own maximum, merged into one: the new maximum, and the factors that the
// first and the second part's sums (of exponentials, of cosines, of centers) are scaled by. `exp` is expf or exp2f, according to
// the base that the logits are in.
template <class T>
struct Merge {
  T max, first, second;
};

template <class T, class Exp>
MK_HOST_DEVICE Merge<T> merge(T max_1, T max_2, Exp exp) {
  const T max = max_1 > max_2 ? max_1 : max_2;
  const T base = finite_max(max);
  return {max, exp(max_1 - base), exp(max_2 - base)};
}

// The normalization's Jacobian: from v, the gradient in the unit center `unit` = a w, to the gradient in w itself; `dot` = v . unit.
template <class T>
MK_HOST_DEVICE T through_norm(T v, T dot, T unit, T a) {
  return a * (v - dot * unit);
}

}  // namespace mk
