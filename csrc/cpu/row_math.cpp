#include "row_math.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../scalar.h"
#include "memory_error.h"
#include "threads.h"

// The vectors of the plain set, which every processor has: this arithmetic is a small part of a step, and in double.
#define MK_WIDTH 4
#define MK_PAIRS 0
#define MK_SPLIT 0

namespace mk {
namespace {

#include "simd.h"

constexpr int SIZES[] = {4, 2, 2};  // bytes of an element, by Dtype

// Reads a row of any dtype as doubles, and writes it back.
template <int DTYPE>
void widen_as(const char* from, int64_t d, double* to) {
  constexpr int SIZE = SIZES[DTYPE];
  int64_t k = 0;
  for (; k + W <= d; k += W) {
    const V v = load_as<DTYPE>(from + k * SIZE);
    for (int i = 0; i < W; ++i) to[k + i] = v[i];
  }
  char rest[W * SIZE] = {};
  __builtin_memcpy(rest, from + k * SIZE, (d - k) * SIZE);
  const V v = load_as<DTYPE>(rest);
  for (int i = 0; k + i < d; ++i) to[k + i] = v[i];
}

template <int DTYPE>
void narrow_as(const double* from, int64_t d, char* to) {
  constexpr int SIZE = SIZES[DTYPE];
  for (int64_t k = 0; k < d; k += W) {
    const int64_t left = d - k < W ? d - k : W;
    V v = {};
    for (int i = 0; i < left; ++i) v[i] = float(from[k + i]);
    char whole[W * SIZE];
    store_as<DTYPE>(whole, v);
    __builtin_memcpy(to + k * SIZE, whole, left * SIZE);
  }
}

void widen(const void* from, int dtype, int64_t at, int64_t d, double* to) {
  const char* start = static_cast<const char*>(from) + at * SIZES[dtype];
  dtype == FLOAT32    ? widen_as<FLOAT32>(start, d, to)
  : dtype == BFLOAT16 ? widen_as<BFLOAT16>(start, d, to)
                      : widen_as<FLOAT16>(start, d, to);
}

void narrow(const double* from, int dtype, int64_t at, int64_t d, void* to) {
  char* start = static_cast<char*>(to) + at * SIZES[dtype];
  dtype == FLOAT32    ? narrow_as<FLOAT32>(from, d, start)
  : dtype == BFLOAT16 ? narrow_as<BFLOAT16>(from, d, start)
                      : narrow_as<FLOAT16>(from, d, start);
}

double dot(const double* a, const double* b, int64_t d) {
  double sums[8] = {};
  int64_t k = 0;
  for (; k + 8 <= d; k += 8)
    for (int i = 0; i < 8; ++i) sums[i] += a[k + i] * b[k + i];
  for (; k < d; ++k) sums[k % 8] += a[k] * b[k];
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

// |v|, and 1/|v| or 0.
struct Length {
  double norm, inverse;
  Length(const double* v, int64_t d) : norm(std::sqrt(dot(v, v, d))), inverse(norm < TINY ? 0.0 : 1.0 / norm) {}
};

// An embedding and the center of its class, which is zero if its target is not here.
struct Row {
  double *x, *center;  // (d)

  void read(const HeadInputs& p, int64_t i) {
    widen(p.x, p.x_dtype, i * p.d, p.d, x);
    const int64_t label = p.labels[i];
    if (label >= 0 && label < p.c)
      widen(p.w, p.w_dtype, label * p.w_stride, p.d, center);
    else
      std::fill(center, center + p.d, 0.0);
  }
};

// f(row, i) for every row i; returns whether it came to the end.
template <class F>
bool each_row(const HeadInputs& p, int threads, Poll poll, F f) {
  Stop stop(poll);
  constexpr int64_t BLOCK = 32;
  threads = static_cast<int>(std::min<int64_t>(threads, 1 + p.n * p.d / 40000));
  std::vector<double> buffers;
  try {
    buffers.resize(2 * threads * p.d);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory(2 * threads * p.d * int64_t(sizeof(double)), "an embedding and a class center of each thread");
  }
  parallel(threads, (p.n + BLOCK - 1) / BLOCK, [&](int thread, int64_t block) {
    if (stop.asked()) return;
    Row row{buffers.data() + 2 * thread * p.d, buffers.data() + (2 * thread + 1) * p.d};
    for (int64_t i = block * BLOCK; i < std::min(p.n, (block + 1) * BLOCK); ++i) {
      row.read(p, i);
      f(row, i);
    }
  });
  return !stop.stopped();
}

}  // namespace

bool prepare_inputs(const HeadInputs& p, int threads, void* out, float* row_factor, double* target_similarity, double* target_cos,
                    Poll poll) {
  return each_row(p, threads, poll, [&](const Row& r, int64_t i) {
    const Length x(r.x, p.d), center(r.center, p.d);
    const double product = dot(r.x, r.center, p.d), cos = product * x.inverse * center.inverse;
    target_cos[i] = cos < -1 ? -1 : cos > 1 ? 1 : cos;
    target_similarity[i] = p.normalize_embedding && p.normalize_weight
                               ? target_cos[i]
                               : product * (p.normalize_embedding ? x.inverse : 1.0) * (p.normalize_weight ? center.inverse : 1.0);
    int exponent = 0;
    if (std::isfinite(x.norm)) std::frexp(x.norm, &exponent);
    exponent = std::min(exponent, 127);  // a float's largest
    const double pow2 = std::ldexp(1.0, exponent), inverse = std::ldexp(1.0, -exponent);
    row_factor[i] = float(p.normalize_embedding ? pow2 * x.inverse : pow2);
    for (int64_t k = 0; k < p.d; ++k) r.x[k] *= inverse;
    narrow(r.x, p.x_dtype, i * p.d, p.d, out);
  });
}

bool row_gradient(const HeadInputs& p, int threads, const float* mean_center, const float* d_lse, const float* d_target_cos, void* dx,
                  Poll poll) {
  return each_row(p, threads, poll, [&](const Row& r, int64_t i) {
    const double own = d_target_cos[i] * (p.normalize_weight ? Length(r.center, p.d).inverse : 1.0);
    double* g = r.center;
    for (int64_t k = 0; k < p.d; ++k) g[k] = double(d_lse[i]) * mean_center[i * p.d + k] + own * g[k];
    if (p.normalize_embedding) {
      const double inverse = Length(r.x, p.d).inverse, along = dot(g, r.x, p.d) * inverse * inverse;
      for (int64_t k = 0; k < p.d; ++k) g[k] = (g[k] - along * r.x[k]) * inverse;
    }
    narrow(g, p.x_dtype, i * p.d, p.d, dx);
  });
}

}  // namespace mk
