// A program for sanitizers: every instruction set over small and ragged problems, on buffers of exactly the size they should have. Wrong
// numbers are other tests' business; here it is enough that they are numbers.

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>

#include "../forms.h"
#include "driver.h"
#include "rows.h"

namespace {

template <class T>
using Buffer = std::unique_ptr<T[]>;  // on the heap, so that a read one element past the end is seen

std::mt19937 generator(0);

Buffer<float> random_floats(int64_t count) {
  std::normal_distribution<float> normal;
  Buffer<float> out(new float[count]);
  for (int64_t i = 0; i < count; ++i) out[i] = normal(generator);
  return out;
}

// (rows, pitch) numbers of a dtype, random where the row has one; bfloat16 by cutting a float, float16 between 1/16 and 2.
Buffer<char> matrix(int64_t rows, int64_t d, int64_t pitch, int dtype) {
  const int size = dtype == mk::FLOAT32 ? 4 : 2;
  const int64_t count = (rows - 1) * pitch + d;
  const Buffer<float> from = random_floats(count);
  Buffer<char> out(new char[count * size]);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t b;
    __builtin_memcpy(&b, &from[i], 4);
    const uint16_t half = dtype == mk::BFLOAT16 ? b >> 16 : (b >> 16 & 0x8000) | (0x2c00 + (b >> 8 & 0x1bff) % 0x1400);
    __builtin_memcpy(&out[i * size], dtype == mk::FLOAT32 ? static_cast<void*>(&b) : const_cast<uint16_t*>(&half), size);
  }
  return out;
}

bool finite(const float* v, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!std::isfinite(v[i])) return false;
  return true;
}

int check(const mk::Kernels& k, int64_t n, int64_t d, int64_t c, int x_dtype, int w_dtype, int form, bool normalize, int variant,
          int missing) {
  const int64_t pitch = d + variant % 2;
  const bool uniform = variant % 4 == 3, has_bias = variant % 3 == 0, need_moment = variant % 3 == 1;
  const Buffer<char> x = matrix(n, d, d, x_dtype), w = matrix(c, d, pitch, w_dtype);
  Buffer<float> one(new float[n]), bias = random_floats(c), threshold = random_floats(n);
  Buffer<int64_t> labels(new int64_t[n]);
  for (int64_t i = 0; i < n; ++i) one[i] = 1.0f, labels[i] = i % 5 == 4 ? -1 : i % 7 == 6 ? c + (int64_t(1) << 40) : generator() % c;
  const mk::Problem p{n, d, c, x.get(), x_dtype, w.get(), w_dtype, pitch, one.get(), has_bias ? bias.get() : nullptr, labels.get(), one.get(),
                      form ? threshold.get() : nullptr, 0.2f, form, normalize};
  Buffer<float> total(new float[n]), top(new float[n]), moment(new float[n]), u(new float[n * d]), factor(new float[c]), db(new float[c]);
  for (int threads = 1; threads <= 2; ++threads) {
    const mk::RowsProblem rows{n, d, c, x.get(), x_dtype, w.get(), w_dtype, pitch, labels.get(), variant % 2 == 0, normalize};
    Buffer<char> prepared(new char[n * d * (x_dtype == mk::FLOAT32 ? 4 : 2)]);
    Buffer<double> similarity(new double[n]), cosine(new double[n]);
    Buffer<float> row_factor(new float[n]), some_u = random_floats(n * d);
    mk::prepare_rows(rows, threads, prepared.get(), row_factor.get(), similarity.get(), cosine.get());
    mk::row_gradient(rows, threads, some_u.get(), one.get(), one.get(), prepared.get());
    if (!finite(row_factor.get(), n)) return 1;
    // None, all but the last byte, or all of what may be kept.
    const mk::KeptPanel panel = mk::kept_panel(k);
    const int64_t all = (n + panel.rows - 1) / panel.rows * ((c + panel.classes - 1) / panel.classes) * panel.bytes;
    const int64_t bytes = variant % 3 == 0 ? 0 : variant % 3 == 1 ? all - 1 : all;
    Buffer<char> kept(new char[bytes]);
    mk::row_pass(k, p, threads, uniform, {total.get(), top.get(), need_moment ? moment.get() : nullptr, variant % 5 ? u.get() : nullptr, factor.get(),
                                          kept.get(), bytes});
    if (c > 2 && !uniform && !finite(total.get(), n)) return 1;
    if (variant % 5 && !finite(u.get(), n * d)) return 1;
    for (int64_t i = 0; i < n; ++i)
      if (!std::isfinite(total[i])) total[i] = INFINITY;
    Buffer<char> dw(new char[c * d * (w_dtype == mk::FLOAT32 ? 4 : 2) - missing]);
    mk::class_pass(k, p, threads, {total.get(), one.get(), uniform ? one.get() : nullptr, one.get(), has_bias ? one.get() : nullptr, kept.get(), uniform ? 0 : bytes},
                   factor.get(), dw.get(), has_bias ? db.get() : nullptr);
    if (has_bias && !finite(db.get(), c)) return 1;
    if (w_dtype == mk::FLOAT32 && !finite(reinterpret_cast<float*>(dw.get()), c * d)) return 1;
  }
  return 0;
}

}  // namespace

// With an argument, dw is a byte too short: a sanitizer that does not notice is worth nothing.
int main(int count, char**) {
  constexpr int64_t SHAPES[][3] = {{1, 1, 1}, {2, 3, 2}, {7, 33, 101}, {33, 16, 129}, {40, 65, 260}, {300, 31, 140}};
  int checks = 0, failures = 0;
  for (const mk::Kernels* k : mk::levels())
    for (const auto& s : SHAPES)
      for (int x_dtype = 0; x_dtype < 3; ++x_dtype)
        for (int w_dtype = 0; w_dtype < 3; ++w_dtype) {
          if (!(k->dtypes >> x_dtype & 1)) continue;
          for (int form = 0; form < 3; ++form, ++checks) {
            const int failed = check(*k, s[0], s[1], s[2], x_dtype, w_dtype, form, checks % 2, checks % 60, count > 1);
            if (failed) std::printf("%s: not finite at n=%d d=%d c=%d\n", k->name, int(s[0]), int(s[1]), int(s[2]));
            failures += failed;
          }
        }
  std::printf("%d problems, %d failures\n", checks, failures);
  return failures != 0;
}
