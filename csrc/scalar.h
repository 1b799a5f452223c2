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

// The transform N of non-target similarities: what is done with each of them, in the order of their numbers in
// marginkernels/core/nontarget.py. A new one is a name here, and its lines in nontarget_value and nontarget_slope.
#define MK_TRANSFORMS(one)                                                                                                          \
  one(IDENTITY) one(HARD_LINEAR) one(HARD_QUADRATIC) one(FILTERED) one(HINGE) one(ANGLE_PART) one(ANGLE_PART_DETACHED) one(CLIPPED) \
      one(POWER) one(POWER_DETACHED) one(LIFTED) one(LIFTED_ANGLE)
#define MK_NAME_TRANSFORM(name) name,
enum NonTarget : int { MK_TRANSFORMS(MK_NAME_TRANSFORM) };
#define MK_COUNT_TRANSFORM(name) +1
constexpr int TRANSFORMS = 0 MK_TRANSFORMS(MK_COUNT_TRANSFORM);
#undef MK_NAME_TRANSFORM
#undef MK_COUNT_TRANSFORM

// What the row pass sums; the numbers of marginkernels/core/types.py.
enum Reduction : int { LOG_SUM_EXP = 0, LOGIT_SUM = 1, SOFTPLUS_SUM = 2 };

// What an optimizer's step does; the numbers of marginkernels/core/update.py.
enum Rule : int { SGD = 0, ADAMW = 1 };

// The dtype of a buffer that is passed as a plain address; the numbers of marginkernels/backend/_extension.py.
enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// An embedding or a class center with a smaller norm is treated as the zero vector.
constexpr float TINY = 1e-30f;
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;
constexpr float LOG2E_REST = 1.92596299e-8f;  // what LOG2E lacks

template <class T>
MK_HOST_DEVICE T square_root(T v) {
  if constexpr (sizeof(T) == sizeof(float)) {
#if defined(__CUDACC__)
    return sqrtf(v);
#else
    return __builtin_sqrtf(v);
#endif
  } else {
    T out;
    for (unsigned i = 0; i < sizeof(T) / sizeof(float); ++i) out[i] = __builtin_sqrtf(v[i]);
    return out;
  }
}

// atanh(q)/q is a polynomial in q^2 up to 1/9, to 4e-9; this is log((1 + q)/(1 - q)).
template <class T>
MK_HOST_DEVICE T log_of_ratio(T q) {
  const T square = q * q;
  T p = square * 0.140891671f + 0.139803007f;
  p = p * square + 0.200124547f;
  p = p * square + 0.333331585f;
  return 2.0f * q * (p * square + 1.0f);
}

// v^t for a normal number v > 0; 0 below 2^-126. The exponent's part of the logarithm is exact.
template <class T>
MK_HOST_DEVICE T power_of(T v, T t) {
  if constexpr (sizeof(T) == sizeof(float)) {
#if defined(__CUDACC__)
    return exp2f(t * log2f(v));
#else
    return __builtin_exp2f(t * __builtin_log2f(v));
#endif
  } else {
    using I = decltype(v < v);
    I bits;
    __builtin_memcpy(&bits, &v, sizeof(T));
    const I exponent = (bits - 0x3f3504f3) >> 23;  // relative to the square root of 1/2
    bits -= exponent << 23;
    T m;
    __builtin_memcpy(&m, &bits, sizeof(T));
    T z = t * (__builtin_convertvector(exponent, T) + LOG2E * log_of_ratio((m - 1.0f) / (m + 1.0f)));
    z = z < -127.0f ? T{} - 127.0f : z;
    const T rounded = z + 12582912.0f;  // as simd.h's exp2, for any width
    const T r = z - (rounded - 12582912.0f);
    T p = r * 0x1.41d332p-13f + 0x1.5f456ap-10f;
    p = p * r + 0x1.3b2db0p-7f;
    p = p * r + 0x1.c6aed4p-5f;
    p = p * r + 0x1.ebfbdap-3f;
    p = p * r + 0x1.62e430p-1f;
    p = p * r + 1.0f;
    __builtin_memcpy(&bits, &rounded, sizeof(T));
    bits = (bits + 127) << 23;
    __builtin_memcpy(&m, &bits, sizeof(T));
    return v != v ? v : p * m;
  }
}

// softplus(z) = max(z, 0) + log1p(e) and its slope, from e = exp(-|z|): small terms keep their digits.
template <class T>
MK_HOST_DEVICE T log1p_of(T e) {
  return log_of_ratio(e / (2.0f + e));
}

template <class T>
MK_HOST_DEVICE T sigmoid_of(T z, T e) {
  return (z > 0.0f ? T{} + 1.0f : e) / (1.0f + e);
}

constexpr float LEAST_BASE = 0x1p-40f;
constexpr float PI = 3.14159265358979323846f;
// See marginkernels/core/nontarget.py.
constexpr float LEAST_SINE = 0x1p-4f;
constexpr float LEAST_LIFTED_SINE = 0x1p-7f;

// theta = acos(c), and its sine; |c| may exceed 1 by rounding. `least` is what sin(theta/2)^2, at the nearer end, is taken for at least.
// asin(s)/s is a polynomial in s^2 up to 1/2, to 2e-8.
template <class T>
struct Angle {
  T theta, sine;
  MK_HOST_DEVICE Angle(T c, float least) {
    T square = 0.5f - 0.5f * (c < 0.0f ? -c : c);
    square = square < least ? T{} + least : square;
    const T s = square_root(square);
    T p = square * 0.113449931f - 0.0966452733f;
    p = p * square + 0.0800102577f;
    p = p * square + 0.0152228381f;
    p = p * square + 0.0467416383f;
    p = p * square + 0.0748597309f;
    p = p * square + 0.166670203f;
    p = p * square + 1.0f;
    const T near = 2.0f * s * p;
    theta = c < 0.0f ? PI - near : near;
    sine = 2.0f * s * square_root(1.0f - square);
  }
};

// sin(y) and cos(y) for y in [0, pi/2], to 5e-9.
template <class T>
MK_HOST_DEVICE T sine_of(T y) {
  const T square = y * y;
  T p = square * 2.60190313e-06f - 0.000198074194f;
  p = p * square + 0.0083330255f;
  p = p * square - 0.166666567f;
  return y * (p * square + 1.0f);
}

template <class T>
MK_HOST_DEVICE T cosine_of(T y) {
  const T square = y * y;
  T p = square * -2.60514952e-07f + 2.4760162e-05f;
  p = p * square - 0.00138883619f;
  p = p * square + 0.0416666381f;
  p = p * square - 0.5f;
  return p * square + 1.0f;
}

// Within [-1, 1]; a cosine may lie beyond by rounding.
template <class T>
MK_HOST_DEVICE T clamped(T c) {
  c = c < -1.0f ? T{} - 1.0f : c;
  return c > 1.0f ? T{} + 1.0f : c;
}

// N(c) of a non-target similarity c; the logit is s N(c) + b. `threshold` and `t` are the row's.
template <int NON_TARGET, class T>
MK_HOST_DEVICE T nontarget_value(T c, T threshold, T t) {
  if constexpr (NON_TARGET == HARD_LINEAR) return c > threshold ? (1.0f + t) * c + t : c;
  if constexpr (NON_TARGET == HARD_QUADRATIC) return c > threshold ? c * (t + c) : c;
  if constexpr (NON_TARGET == FILTERED) return c > threshold ? T{} : c;
  if constexpr (NON_TARGET == HINGE) return (c + t < 0.0f ? T{} : c + t) * (c - t);
  if constexpr (NON_TARGET == ANGLE_PART || NON_TARGET == ANGLE_PART_DETACHED) {
    const T half = sine_of(0.5f * t * Angle<T>(c, 0.0f).theta);
    return 1.0f - 2.0f * half * half;
  }
  if constexpr (NON_TARGET == CLIPPED) {
    c = c < threshold ? threshold : c;
    return c > t ? t : c;
  }
  if constexpr (NON_TARGET == POWER || NON_TARGET == POWER_DETACHED) {
    const T base = 0.5f + 0.5f * c;
    return 2.0f * power_of<T>(base < LEAST_BASE ? T{} + LEAST_BASE : base, t) + (threshold - 1.0f);
  }
  if constexpr (NON_TARGET == LIFTED) return c > threshold ? c + t : c;
  if constexpr (NON_TARGET == LIFTED_ANGLE) {
    const T at = clamped(c), square = 1.0f - at * at;
    return c > threshold ? at * cosine_of(t) + square_root(square) * sine_of(t) : c;
  }
  return c;
}

// N'(c), or what stands for it; the mask c > threshold is not differentiated.
template <int NON_TARGET, class T>
MK_HOST_DEVICE T nontarget_slope(T c, T threshold, T t) {
  const T one = T{} + 1.0f;
  if constexpr (NON_TARGET == HARD_LINEAR) return c > threshold ? 1.0f + t : one;
  if constexpr (NON_TARGET == HARD_QUADRATIC) return c > threshold ? t + 2.0f * c : one;
  if constexpr (NON_TARGET == FILTERED) return c > threshold ? T{} : one;
  if constexpr (NON_TARGET == HINGE) return c + t < 0.0f ? T{} : c + t;
  if constexpr (NON_TARGET == ANGLE_PART) {
    const Angle<T> at(c, 1e-9f);
    const T y = 0.5f * t * at.theta, least = c < 0.0f ? T{} + LEAST_SINE : T{};
    return t * 2.0f * sine_of(y) * cosine_of(y) / (at.sine < least ? least : at.sine);
  }
  if constexpr (NON_TARGET == CLIPPED) return c < threshold ? T{} : c > t ? T{} : one;
  if constexpr (NON_TARGET == POWER) {
    const T base = 0.5f + 0.5f * c;
    return t * power_of<T>(base < LEAST_BASE ? T{} + LEAST_BASE : base, t - 1.0f);
  }
  if constexpr (NON_TARGET == LIFTED_ANGLE) {
    const T at = clamped(c), square = 1.0f - at * at, least = T{} + LEAST_LIFTED_SINE * LEAST_LIFTED_SINE;
    return c > threshold ? cosine_of(t) - at * sine_of(t) / square_root(square < least ? least : square) : one;
  }
  return one;
}

// The slope of the logit in the bias: 1, or 0 where the transform holds the logit.
template <int NON_TARGET, class T>
MK_HOST_DEVICE T bias_slope(T c, T threshold, T t) {
  if constexpr (NON_TARGET == CLIPPED) return nontarget_slope<NON_TARGET>(c, threshold, t);
  return T{} + 1.0f;
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
