// A program to run under sanitizers: every instruction set over small and ragged problems, on buffers of exactly the size that is needed.
// The results must be finite and agree with those of the plain set; whether these are right is checked by the Python tests.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../scalar.h"
#include "driver.h"
#include "row_math.h"
#include "topk.h"

namespace {

std::mt19937 generator;

// On the heap, so that a sanitizer sees an access one element past the end.
std::vector<float> random_floats(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& v : out) v = normal(generator);
  return out;
}

int size_of(int dtype) { return dtype == mk::FLOAT32 ? 4 : 2; }

// (rows, d) random numbers of a dtype, rows `pitch` elements apart: bfloat16 by truncating a float, float16 with magnitudes of 1/16 to 2.
std::vector<char> matrix(int64_t rows, int64_t d, int64_t pitch, int dtype) {
  const int64_t count = (rows - 1) * pitch + d;
  const std::vector<float> from = random_floats(count);
  std::vector<char> out(count * size_of(dtype));
  for (int64_t i = 0; i < count; ++i) {
    uint32_t b;
    __builtin_memcpy(&b, &from[i], 4);
    const uint16_t half = dtype == mk::BFLOAT16 ? b >> 16 : (b >> 16 & 0x8000) | (0x2c00 + (b >> 8 & 0x1bff) % 0x1400);
    __builtin_memcpy(&out[i * size_of(dtype)], dtype == mk::FLOAT32 ? static_cast<const void*>(&b) : &half, size_of(dtype));
  }
  return out;
}

template <class T>
bool finite(const std::vector<T>& v) {
  for (const T x : v)
    if (!std::isfinite(x)) return false;
  return true;
}

// Whether `got` is within `tolerance` of `want`, in the norm of the whole vector.
template <class T>
bool close(const std::vector<T>& got, const std::vector<T>& want, double tolerance) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (got[i] == want[i]) continue;  // also infinities
    error += (double(got[i]) - want[i]) * (double(got[i]) - want[i]);
  }
  for (const T x : want) norm += std::isfinite(x) ? double(x) * x : 0.0;
  return std::sqrt(error) <= tolerance * (std::sqrt(norm) + 1e-3 * std::sqrt(double(want.size())));
}

struct Shape {
  int64_t n, d, c;
};

// One head with its options.
struct Case {
  Shape s;
  int x_dtype, w_dtype, non_target;
  bool normalize_embedding, normalize_weight, logit_sum, softplus, has_bias, need_cos, need_center, need_max;
  int64_t sub_centers;
  int workspace;  // 0: none, 1: all but the last byte, 2: all that can be saved
  int64_t pitch;
  std::vector<char> x, w;
  std::vector<float> one, row_factor, bias, threshold, t;
  std::vector<int64_t> labels;

  Case(Shape shape, int x_dtype_, int w_dtype_, int non_target_) : s(shape), x_dtype(x_dtype_), w_dtype(w_dtype_), non_target(non_target_) {
    sub_centers = generator() % 2 ? 1 : 1 + int64_t(generator() % 5);
    s.c *= sub_centers;
    const unsigned bits = generator();
    const auto bit = [&](int i) { return (bits >> i & 1) != 0; };
    normalize_embedding = bit(0), normalize_weight = bit(1), logit_sum = bit(2) && bit(3);
    softplus = !logit_sum && bit(10);
    has_bias = bit(4), need_cos = bit(5), need_center = bit(6) || bit(7), need_max = bit(8);
    workspace = int(generator() % 3);
    // Where an angle or a power is taken, similarities are cosines: beyond the ends of the interval a rounded one would be of another
    // branch.
    if ((non_target >= mk::ANGLE_PART && non_target <= mk::POWER_DETACHED && non_target != mk::CLIPPED) || non_target == mk::LIFTED_ANGLE)
      normalize_weight = true;
    pitch = s.d + bit(9);
    x = matrix(s.n, s.d, s.d, x_dtype), w = matrix(s.c, s.d, pitch, w_dtype);
    one.assign(s.n, 1.0f), row_factor.assign(s.n, (normalize_weight ? 0.5f : 1.0f) / std::sqrt(float(s.d)));
    bias = random_floats(s.c / sub_centers);
    for (int64_t i = 0; i < s.n; ++i) {  // every row has its own threshold and t
      threshold.push_back(0.05f + 0.1f * float(generator() % 8));
      t.push_back(0.05f * float(generator() % 10));
      labels.push_back(i % 5 == 4 ? -1 : i % 7 == 6 ? s.c + (int64_t(1) << 40) : int64_t(generator() % s.c));
    }
  }
};

struct Result {
  std::vector<double> value;
  std::vector<float> max_logit, cos, center, d_weight, d_bias, best;

  bool is_close(const Result& want, double tolerance) const {
    return close(value, want.value, tolerance) && close(max_logit, want.max_logit, tolerance) && close(cos, want.cos, tolerance) &&
           close(center, want.center, tolerance) && close(d_weight, want.d_weight, tolerance) && close(d_bias, want.d_bias, tolerance) &&
           close(best, want.best, tolerance);
  }
};

float* or_null(std::vector<float>& v) { return v.empty() ? nullptr : v.data(); }

// Runs everything; false where a result that should be finite is not. The gradient's buffer is `missing` bytes too short.
bool run(const mk::Kernels& kernels, const Case& p, int threads, int missing, Result& out) {
  const auto [n, d, c] = p.s;
  const int64_t classes = c / p.sub_centers;
  const mk::HeadInputs head{
      n, d, c, p.x.data(), p.x_dtype, p.w.data(), p.w_dtype, p.pitch, p.labels.data(), p.normalize_embedding, p.normalize_weight};
  std::vector<char> rows(n * d * size_of(p.x_dtype));
  std::vector<double> target_similarity(n), target_cos(n);
  std::vector<float> row_factor(n);
  if (!mk::prepare_inputs(head, threads, rows.data(), row_factor.data(), target_similarity.data(), target_cos.data())) return false;
  const std::vector<float> mean_center(n * d, 0.5f);
  if (!mk::row_gradient(head, threads, mean_center.data(), p.one.data(), p.one.data(), rows.data())) return false;
  if (!finite(row_factor)) return false;

  mk::PassInputs inputs{};
  inputs.n = n, inputs.d = d, inputs.c = c;
  inputs.x = p.x.data(), inputs.x_dtype = p.x_dtype;
  inputs.w = p.w.data(), inputs.w_dtype = p.w_dtype, inputs.w_stride = p.pitch;
  inputs.row_factor = p.row_factor.data(), inputs.scale = p.one.data(), inputs.labels = p.labels.data();
  inputs.bias = p.has_bias ? p.bias.data() : nullptr;
  inputs.threshold = p.non_target ? p.threshold.data() : nullptr, inputs.t = p.non_target ? p.t.data() : nullptr;
  inputs.non_target = p.non_target, inputs.normalize_weight = p.normalize_weight, inputs.sub_centers = p.sub_centers;

  const mk::SavedPanel panel = mk::saved_panel(kernels);
  const int64_t width = panel.classes / p.sub_centers * p.sub_centers;
  const int64_t all = (n + panel.rows - 1) / panel.rows * ((c + width - 1) / width) * panel.bytes;
  std::vector<char> saved(p.workspace == 0 ? 0 : p.workspace == 1 ? all - 1 : all);
  const int64_t saved_bytes = int64_t(saved.size());
  std::vector<float> class_factor(p.normalize_weight ? c : 0);
  out.value.resize(n), out.max_logit.resize(p.need_max ? n : 0), out.cos.resize(p.need_cos ? n : 0);
  out.center.resize(p.need_center ? n * d : 0), out.d_bias.resize(p.has_bias ? classes : 0);
  const bool rows_finished = mk::row_pass(
      kernels, inputs, threads,
      p.logit_sum  ? mk::LOGIT_SUM
      : p.softplus ? mk::SOFTPLUS_SUM
                   : mk::LOG_SUM_EXP,
      {out.value.data(), or_null(out.max_logit), or_null(out.cos), or_null(out.center), or_null(class_factor), saved.data(), saved_bytes});
  if (!rows_finished || (classes > 2 && !p.logit_sum && !finite(out.value))) return false;
  if (!finite(out.center) || !finite(out.cos)) return false;

  std::vector<double> lse = out.value;
  for (double& v : lse)
    if (!std::isfinite(v)) v = INFINITY;
  if (p.softplus) std::fill(lse.begin(), lse.end(), 0.0);
  std::vector<char> d_weight(c * d * size_of(p.w_dtype) - missing);
  const float *one = p.one.data(), *d_logit_sum = p.logit_sum ? one : nullptr, *d_target_bias = p.has_bias ? one : nullptr;
  const mk::ClassInput in{lse.data(),
                          one,
                          d_logit_sum,
                          one,
                          d_target_bias,
                          saved.data(),
                          p.logit_sum ? 0 : saved_bytes,
                          p.softplus ? mk::SOFTPLUS_SUM : mk::LOG_SUM_EXP};
  if (!mk::class_pass(kernels, inputs, threads, in, or_null(class_factor), d_weight.data(), or_null(out.d_bias))) return false;
  if (p.w_dtype == mk::FLOAT32 && !missing) {
    out.d_weight.resize(c * d);
    __builtin_memcpy(out.d_weight.data(), d_weight.data(), d_weight.size());
  }
  // The scores of the best class, of some, and of all; classes are in their range.
  for (const int64_t k : {int64_t(1), classes / 2 + 1, classes}) {
    std::vector<float> scores(n * k);
    std::vector<int64_t> best(n * k, -1);
    if (!mk::topk(kernels, head, threads, k, p.sub_centers, inputs.bias, p.has_bias ? one : nullptr, scores.data(), best.data()))
      return false;
    for (const int64_t j : best)
      if (j < 0 || j >= classes) return false;
    out.best.insert(out.best.end(), scores.begin(), scores.end());
  }
  return finite(out.d_bias) && finite(out.d_weight) && finite(out.best);
}

}  // namespace

// With an argument, the gradient's buffer is one byte too short: the sanitizer must notice that.
int main(int count, char**) {
  constexpr Shape SHAPES[] = {{1, 1, 1}, {2, 3, 2}, {7, 33, 101}, {33, 16, 129}, {40, 65, 260}, {300, 31, 140}};
  int problems = 0, failures = 0;
  for (const Shape& s : SHAPES)
    for (int x_dtype = 0; x_dtype < 3; ++x_dtype)
      for (int w_dtype = 0; w_dtype < 3; ++w_dtype)
        for (int non_target = 0; non_target < mk::TRANSFORMS; ++non_target) {
          generator.seed(unsigned(problems++));
          const Case p(s, x_dtype, w_dtype, non_target);
          Result want;  // of the plain set, which comes first and serves every dtype
          for (const mk::Kernels* k : mk::levels()) {
            if (!(k->dtypes >> x_dtype & 1)) continue;
            // Products of plain bfloat16 round the centers to it, and the weights.
            const bool rounds = k->dtypes == 1 << mk::BFLOAT16;
            const double tolerance = rounds ? 5e-2 : 1e-3;
            // A filtered logit, and the slope of a clipped one, jump where a cosine crosses a bound, as it may when the center is rounded.
            const bool jumps = rounds && w_dtype != mk::BFLOAT16 && (non_target == mk::FILTERED || non_target == mk::CLIPPED);
            for (int threads = 1; threads <= 2; ++threads) {
              Result got;
              const bool is_finite = run(*k, p, threads, count > 1, got);
              if (want.value.empty()) want = got;
              if (is_finite && (jumps || got.is_close(want, tolerance))) continue;
              std::printf("%s: %s at n=%d d=%d c=%d, dtypes %d and %d, transform %d\n", k->name,
                          is_finite ? "differs from the plain set" : "not finite", int(s.n), int(s.d), int(s.c), x_dtype, w_dtype,
                          non_target);
              ++failures;
            }
          }
        }
  std::printf("%d problems, %d failures\n", problems, failures);
  return failures != 0;
}
