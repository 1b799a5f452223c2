#include "driver.h"

#if defined(__x86_64__)
#define MK_X86 1
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#if MK_X86
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../scalar.h"
#include "memory.h"
#include "stop.h"
#include "threads.h"

namespace mk {

namespace plain {
extern const Kernels kernels;
}
#if MK_HAS_AVX2
namespace avx2 {
extern const Kernels kernels;
}
#endif
#if MK_HAS_AVX512
namespace avx512 {
extern const Kernels kernels;
}
#endif
#if MK_HAS_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif
#if MK_HAS_AMX
namespace amx {
extern const Kernels kernels;
}
namespace amx_split {
extern const Kernels kernels;
}
#endif

namespace {

#if MK_X86
// The operating system must grant the use of AMX tiles, once per process.
bool amx_allowed() {
#if defined(__linux__)
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return allowed;
#else
  return false;
#endif
}

struct Features {
  bool avx2, avx512, bf16, amx;
};

// AMX is read from cpuid: an older compiler's __builtin_cpu_supports does not know the name.
Features features() {
  Features f{};
  __builtin_cpu_init();
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq");
  f.bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
  unsigned a, b, c, d;
  if (f.bf16 && __get_cpuid_count(7, 0, &a, &b, &c, &d)) f.amx = (d >> 22 & 1) && (d >> 24 & 1) && amx_allowed();
  return f;
}
#endif

constexpr int64_t round_up(int64_t v, int64_t step) { return (v + step - 1) / step * step; }

// Fewer threads where each would have less than about 0.1 ms of work.
int useful_threads(int threads, const PassInputs& p) {
  const double work = double(p.n) * double(p.d) * double(p.c);
  return static_cast<int>(std::max(1.0, std::min(double(threads), work / 4e6)));
}

int64_t padded_rows(const PassInputs& p) { return round_up(p.n, PANEL); }

// The centers of a chunk: those of whole classes.
int64_t chunk_width(const Layout& l, int64_t sub_centers) { return l.classes / sub_centers * sub_centers; }

int64_t saved_chunks(const PassInputs& p, const Layout& l, int64_t bytes) { return bytes / (padded_rows(p) / PANEL * l.saved); }

constexpr double LOG2E_DOUBLE = 1.44269504088896340736, LN2_DOUBLE = 0.69314718055994530942;
constexpr int ROW_VECTORS = 13;  // of Rows, in the class pass

int64_t rows_bytes(const PassInputs& p, const Layout& l, bool across) {
  const int64_t n = padded_rows(p);
  return Memory::padded<uint32_t>(n * l.along) + (across ? Memory::padded<uint32_t>(n * l.across) : 0) +
         ROW_VECTORS * Memory::padded<float>(n);
}

// Of a head with unit centers, logits near the end of float would overflow in units of log 2. The passes take at most so large ones: the
// softmax is 1 for the largest of them in either case, and a log-sum-exp is in proportion to the scale.
constexpr double LARGEST_LOGIT = 0x1p100;

// What the passes take the scale of row i times.
double shrunk(const PassInputs& p, int64_t i) {
  const double reach = double(p.scale[i]) * double(p.row_factor[i]);
  return p.normalize_weight && reach > LARGEST_LOGIT ? LARGEST_LOGIT / reach : 1.0;
}

// The same for its log-sum-exps. Below 2^64 they come from the biases, which are not scaled.
double shrunk(const PassInputs& p, int64_t i, double lse) { return std::fabs(lse) > 0x1p64 ? shrunk(p, i) : 1.0; }

// 2 to the power of what rounding a log-sum-exp of `lse` log 2 to float adds to it. That is less than 64 where the largest logit, a float,
// is less than 32 below `lse`, as it is for fewer than 2^32 classes. From 2^36 on a double has no digits left for it: there the float is
// the largest logit itself, whose class has all the weight.
double lost_to_rounding(double lse) {
  if (!(std::fabs(lse) < 0x1p36)) return 1.0;
  return std::exp2(std::clamp(double(float(lse)) - lse, -64.0, 64.0));
}

// Packs the rows and fills their vectors. Padded rows are 0 and have no target.
Rows make_rows(const Kernels& k, const PassInputs& p, const Layout& l, int reduction, const ClassInput* in, bool need_across,
               Memory& memory) {
  const int64_t n = padded_rows(p);
  Rows r{};
  uint32_t* along = memory.take<uint32_t>(n * l.along);
  k.pack_along(p, along);
  r.along = along;
  if (need_across) {
    uint32_t* across = memory.take<uint32_t>(n * l.across);
    k.pack_across(p, across);
    r.across = across;
  }
  const auto vector = [&] {
    float* v = memory.take<float>(n);
    std::fill(v, v + n, 0.0f);
    return v;
  };
  r.factor = vector(), r.slope = vector(), r.scale = vector(), r.threshold = vector(), r.t = vector();
  r.label = memory.take<int32_t>(n);
  std::fill(r.label, r.label + n, -1);
  for (int64_t i = 0; i < p.n; ++i) {
    const double scale = p.scale[i] * shrunk(p, i) * (reduction == SOFTPLUS_SUM ? 1.0 : LOG2E_DOUBLE);
    r.factor[i] = p.row_factor[i];
    r.scale[i] = float(scale);
    r.slope[i] = float(scale * p.row_factor[i]);
    r.threshold[i] = p.threshold ? p.threshold[i] : 0.0f;
    r.t[i] = p.t ? p.t[i] : 0.0f;
    if (p.labels[i] >= 0 && p.labels[i] < p.c) r.label[i] = static_cast<int32_t>(p.labels[i]);
  }
  if (!in) return r;
  r.lse = vector(), r.d_lse = vector(), r.d_logit_sum = vector(), r.d_target_cos = vector();
  r.bias_d_lse = vector(), r.bias_d_logit_sum = vector(), r.d_target_bias = vector();
  double largest = 0;
  for (int64_t i = 0; i < p.n; ++i)
    for (const float* v : {in->d_lse, in->d_logit_sum, in->d_target_cos})
      // Of an embedding whose norm is kept f may be 2^127, which the sums over rows must hold too.
      if (v && std::isfinite(v[i])) largest = std::max(largest, std::fabs(double(v[i])) * std::max(1.0, 0x1p-64 * p.row_factor[i]));
  int exponent = 0;
  std::frexp(largest, &exponent);
  r.pow2 = float(std::ldexp(1.0, exponent = std::clamp(exponent, -120, 120)));
  const double inverse = std::ldexp(1.0, -exponent);
  for (int64_t i = 0; i < n; ++i) {
    if (i >= p.n) {
      r.lse[i] = INFINITY;  // p = 0
      continue;
    }
    const double lse = in->lse[i] * shrunk(p, i, in->lse[i]) * LOG2E_DOUBLE, f = p.row_factor[i];
    r.lse[i] = float(lse);
    const double d_lse = in->d_lse[i] * lost_to_rounding(lse) * inverse, d_logit_sum = in->d_logit_sum ? in->d_logit_sum[i] * inverse : 0.0;
    r.d_lse[i] = float(d_lse * f);
    r.d_logit_sum[i] = float(d_logit_sum * f);
    r.d_target_cos[i] = float(in->d_target_cos[i] * inverse * f);
    r.bias_d_lse[i] = float(d_lse / p.scale[i]);
    r.bias_d_logit_sum[i] = float(d_logit_sum / p.scale[i]);
    r.d_target_bias[i] = in->d_target_bias ? float(in->d_target_bias[i] * inverse) : 0.0f;
  }
  return r;
}

// The number of class ranges in the row pass: enough that the tasks fill the threads evenly, and no more, since each task has its own U.
int64_t class_parts(int threads, int64_t blocks, int64_t chunks) {
  int64_t best = 1;
  double best_use = 0;
  for (int64_t parts = 1; parts <= std::min<int64_t>(threads, chunks); ++parts) {
    const int64_t tasks = parts * blocks;
    const double use = double(tasks) / double(round_up(tasks, threads));
    if (use > best_use + 0.02) best = parts, best_use = use;
  }
  return best;
}

}  // namespace

std::vector<const Kernels*> levels(bool here) {
  std::vector<const Kernels*> out{&plain::kernels};
#if MK_X86
  [[maybe_unused]] static const Features f = features();
#endif
#if MK_HAS_AVX2
  if (f.avx2 || !here) out.push_back(&avx2::kernels);
#endif
#if MK_HAS_AVX512
  if (f.avx512 || !here) out.push_back(&avx512::kernels);
#endif
#if MK_HAS_AVX512_BF16
  if (f.bf16 || !here) out.push_back(&avx512_bf16::kernels);
#endif
#if MK_HAS_AMX
  if (f.amx || !here) out.insert(out.end(), {&amx::kernels, &amx_split::kernels});
#endif
  return out;
}

const Kernels& choose(int x_dtype, const std::string& level) {
  const Kernels* found = nullptr;
  for (const Kernels* k : levels()) {
    if (!(k->dtypes >> x_dtype & 1)) continue;
    if (level.empty() || level == k->name) found = k;
  }
  if (!found) throw std::invalid_argument("level: this machine has no '" + level + "' for this dtype");
  return *found;
}

SavedPanel saved_panel(const Kernels& k) {
  const Layout l = k.layout(1);
  return {l.saved, PANEL, l.classes};
}

bool row_pass(const Kernels& k, const PassInputs& p, int threads, int reduction, const RowOutput& out, Poll poll) {
  const bool online = reduction == LOG_SUM_EXP;
  Stop stop(poll);
  const Layout l = k.layout(p.d);
  threads = useful_threads(threads, p);
  const int64_t width = chunk_width(l, p.sub_centers), blocks = (p.n + l.rows - 1) / l.rows, chunks = (p.c + width - 1) / width;
  const int64_t parts = class_parts(threads, blocks, chunks), tasks = blocks * parts;
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  const int64_t rows = std::min<int64_t>(l.rows, padded_rows(p)), u_size = out.center ? rows * l.ldn : 0;
  const int64_t state = 2 * Memory::padded<float>(rows) + 2 * Memory::padded<double>(rows) + Memory::padded<float>(u_size);
  Memory memory(rows_bytes(p, l, false) + tasks * state + threads * Memory::padded<uint32_t>(l.row_scratch));
  const Rows r = make_rows(k, p, l, reduction, nullptr, false, memory);

  std::vector<RowTask> all(tasks);
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t block = i / parts, part = i % parts;
    RowTask& t = all[i];
    t.interrupt = stop.interrupt();
    t.first_row = block * l.rows;
    t.last_row = std::min(p.n, t.first_row + l.rows);
    t.first_class = chunks * part / parts * width;
    t.last_class = std::min(p.c, chunks * (part + 1) / parts * width);
    t.reduction = reduction, t.need_center = out.center, t.need_cos = out.cos;
    t.class_factor = block == 0 ? out.class_factor : nullptr;
    t.running_max = memory.take<float>(rows), t.max_logit = memory.take<float>(rows);
    t.total = memory.take<double>(rows), t.cos_sum = memory.take<double>(rows);
    t.u = memory.take<float>(u_size);
    t.saved = out.saved, t.saved_chunks = reduction == LOGIT_SUM ? 0 : saved_chunks(p, l, out.saved_bytes);
  }
  std::vector<uint32_t*> scratch(threads);
  for (auto& s : scratch) s = memory.take<uint32_t>(l.row_scratch);
  parallel(threads, tasks, [&](int thread, int64_t i) {
    RowTask& t = all[i];
    t.scratch = scratch[thread];
    std::fill(t.running_max, t.running_max + rows, -INFINITY);
    std::fill(t.max_logit, t.max_logit + rows, -INFINITY);
    std::fill(t.total, t.total + rows, 0.0);
    std::fill(t.cos_sum, t.cos_sum + rows, 0.0);
    std::fill(t.u, t.u + u_size, 0.0f);
    k.row_task(p, r, t);
  });

  if (stop.stopped()) return false;

  // Merge the parts of each row, always in the same order.
  const auto exp = [](float z) { return std::exp2(z); };
  for (int64_t i = 0; i < p.n; ++i) {
    const RowTask* part = &all[i / l.rows * parts];
    const int64_t at = i % l.rows;
    float running_max = part->running_max[at], max_logit = part->max_logit[at];
    double total = part->total[at], cos_sum = part->cos_sum[at];
    float* u = part->u + at * l.ldn;
    for (int64_t q = 1; q < parts; ++q) {
      const RowTask& other = part[q];
      Merge<float> m{running_max, 1.0f, 1.0f};
      if (online) m = merge(running_max, other.running_max[at], exp);
      running_max = m.max;
      max_logit = std::max(max_logit, other.max_logit[at]);
      total = total * m.first + other.total[at] * m.second;
      cos_sum = cos_sum * m.first + other.cos_sum[at] * m.second;
      if (out.center) {
        const float* more = other.u + at * l.ldn;
        for (int64_t j = 0; j < p.d; ++j) u[j] = u[j] * m.first + more[j] * m.second;
      }
    }
    const double inverse = !online || total == 0 ? 1.0 : 1.0 / total;
    const double value = !online ? total : total == 0 ? -INFINITY : (running_max + std::log2(total)) * LN2_DOUBLE;
    out.value[i] = value / shrunk(p, i, value);
    if (out.max_logit) {
      const double unit = reduction == SOFTPLUS_SUM ? 1.0 : LN2_DOUBLE;
      const double highest = double(p.non_target == IDENTITY && online ? running_max : max_logit) * unit;
      out.max_logit[i] = float(highest / shrunk(p, i, highest));
    }
    if (out.cos) out.cos[i] = float(cos_sum * inverse);
    if (out.center) {
      for (int64_t j = 0; j < p.d; ++j) out.center[i * p.d + j] = u[j] * float(inverse);
    }
  }
  return true;
}

bool class_pass(const Kernels& k, const PassInputs& p, int threads, const ClassInput& in, const float* class_factor, void* d_weight,
                float* d_bias, Poll poll, const Update* update) {
  Stop stop(poll);
  const Layout l = k.layout(p.d);
  threads = useful_threads(threads, p);
  // Several tasks per thread, so that a delayed thread does not delay the others. The result of a class does not depend on the partition.
  const int64_t width = chunk_width(l, p.sub_centers), chunks = (p.c + width - 1) / width, tasks = std::min<int64_t>(chunks, 16 * threads);
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  Memory memory(rows_bytes(p, l, true) + threads * Memory::padded<uint32_t>(l.class_scratch));
  const Rows r = make_rows(k, p, l, in.reduction, &in, true, memory);
  // For a hard transform the saved weights already contain N'(c), and with sub-centers they do not tell a center that is not its class's
  // from one of no weight: d_logit_sum and d_bias need more than that.
  const bool use_saved = (p.non_target == IDENTITY && p.sub_centers == 1) || (!in.d_logit_sum && !d_bias);
  std::vector<uint32_t*> scratch(threads);
  for (auto& s : scratch) s = memory.take<uint32_t>(l.class_scratch);
  parallel(threads, tasks, [&](int thread, int64_t i) {
    ClassTask t{};
    t.interrupt = stop.interrupt();
    t.reduction = in.reduction;
    t.first_class = chunks * i / tasks * width;
    t.last_class = std::min(p.c, chunks * (i + 1) / tasks * width);
    t.class_factor = class_factor;
    t.d_weight = d_weight, t.d_bias = d_bias, t.update = update;
    t.saved = in.saved, t.saved_chunks = use_saved ? saved_chunks(p, l, in.saved_bytes) : 0;
    t.scratch = scratch[thread];
    k.class_task(p, r, t);
  });
  return !stop.stopped();
}

void update(const Kernels& k, const Update& u, int threads, int64_t rows, const void* g, int g_dtype) {
  constexpr int64_t TASK = 1 << 16;  // numbers, about 0.1 ms of memory traffic
  const int64_t each = std::max<int64_t>(1, TASK / std::max<int64_t>(u.d, 1)), tasks = (rows + each - 1) / each;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
  const int64_t width = round_up(u.d, PANEL);
  Memory memory(threads * Memory::padded<float>(width));
  std::vector<float*> scratch(threads);
  for (auto& s : scratch) s = memory.take<float>(width);
  parallel(threads, tasks,
           [&](int thread, int64_t i) { k.update_task(u, {i * each, std::min(rows, (i + 1) * each), g, g_dtype, scratch[thread]}); });
}

}  // namespace mk
