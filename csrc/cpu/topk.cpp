#include "topk.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "memory.h"
#include "stop.h"
#include "threads.h"

namespace mk {
namespace {

constexpr int64_t MAX_PART = int64_t(1) << 31;  // classes of one task: a candidate holds 32 bits of them
constexpr int TASKS_PER_THREAD = 4;             // so that a delayed thread does not delay the others

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

float score_of(uint32_t ordered) {
  const uint32_t b = ordered >> 31 ? ordered & 0x7fffffffu : ~ordered;
  float out;
  std::memcpy(&out, &b, 4);
  return out;
}

float shrink(uint64_t* candidates, int64_t count, int64_t k) {
  std::nth_element(candidates, candidates + k - 1, candidates + count, std::greater<uint64_t>());
  return score_of(uint32_t(candidates[k - 1] >> 32));
}

struct Found {
  uint32_t ordered;
  int64_t label;
  bool operator<(const Found& other) const { return ordered != other.ordered ? ordered > other.ordered : label < other.label; }
};

// Into how many ranges the classes are cut.
int64_t class_parts(const HeadInputs& p, int threads, int64_t blocks, int64_t chunks, int64_t k) {
  const int64_t least = ceil_div(p.c, MAX_PART);
  if (threads == 1) return least;
  // Each range finds its own k candidates: few ranges where these are a large part of them.
  const int64_t wanted = std::min(ceil_div(TASKS_PER_THREAD * threads, blocks), std::max(ceil_div(threads, blocks), p.c / (64 + 16 * k)));
  return std::max(least, std::min(wanted, chunks));
}

// Fewer threads where each would have less than some 0.2 ms of work. Few rows take as long as it takes to read the centers.
int useful_threads(const HeadInputs& p, int threads) {
  const double work = double(std::max<int64_t>(p.n, 8)) * double(p.d) * double(p.c);
  return static_cast<int>(std::max(1.0, std::min(double(threads), work / 4e6)));
}

}  // namespace

bool topk(const Kernels& kernels, const HeadInputs& given, int threads, int64_t k, int64_t sub_centers, const float* bias,
          const float* scale, float* scores, int64_t* classes, Poll poll) {
  Stop stop(poll);
  const bool few = given.n <= FEW_ROWS;
  const int64_t n = ceil_div(given.n, PANEL) * PANEL, size = given.x_dtype == 0 ? 4 : 2;
  const Layout l = kernels.layout(given.d);
  threads = useful_threads(given, threads);
  const int64_t width = l.classes / sub_centers * sub_centers;  // centers of a chunk: those of whole classes
  const int64_t blocks = few ? 1 : ceil_div(given.n, l.rows), chunks = ceil_div(given.c, width);
  const int64_t parts = class_parts(given, threads, blocks, chunks, k), tasks = blocks * parts;
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  const int64_t rows = few ? given.n : std::min<int64_t>(l.rows, n), padded = ceil_div(rows, PANEL) * PANEL;
  const auto first_class = [&](int64_t part) { return std::min(given.c, chunks * part / parts * width); };
  const int64_t range = std::min(given.c, ceil_div(chunks, parts) * width) / sub_centers, kept = std::min(k, range);
  const int64_t capacity = std::min(range, 2 * k + 16) + 1;  // one more, so that what fits is never moved

  const int64_t state = Memory::padded<uint64_t>(padded * capacity) + Memory::padded<int64_t>(padded) + Memory::padded<float>(padded);
  Memory memory(Memory::padded<char>(given.n * given.d * size) + 2 * Memory::padded<float>(n) + Memory::padded<int64_t>(given.n) +
                2 * Memory::padded<double>(given.n) + Memory::padded<uint32_t>(few ? 0 : n * l.along) + tasks * state +
                threads * Memory::padded<uint32_t>(l.row_scratch));
  char* x = memory.take<char>(given.n * given.d * size);
  float *factor = memory.take<float>(n), *row_scale = memory.take<float>(n);
  std::fill(factor, factor + n, 0.0f), std::fill(row_scale, row_scale + n, 0.0f);
  if (scale) std::copy(scale, scale + given.n, row_scale);
  {
    HeadInputs head = given;
    int64_t* labels = memory.take<int64_t>(given.n);
    std::fill(labels, labels + given.n, -1);
    head.labels = labels;
    double *similarity = memory.take<double>(given.n), *cos = memory.take<double>(given.n);
    if (!prepare_inputs(head, threads, x, factor, similarity, cos, poll)) return false;
  }
  PassInputs p{};
  p.n = given.n, p.d = given.d, p.c = given.c;
  p.x = x, p.x_dtype = given.x_dtype;
  p.w = given.w, p.w_dtype = given.w_dtype, p.w_stride = given.w_stride;
  p.row_factor = factor, p.bias = bias, p.normalize_weight = given.normalize_weight, p.sub_centers = sub_centers;
  uint32_t* along = nullptr;
  if (!few) kernels.pack_along(p, along = memory.take<uint32_t>(n * l.along));

  std::vector<TopkTask> all(tasks);
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t block = i / parts, part = i % parts;
    TopkTask& t = all[i];
    t.interrupt = stop.interrupt();
    t.first_row = block * l.rows;
    t.last_row = std::min(p.n, t.first_row + rows);
    t.first_class = first_class(part), t.last_class = first_class(part + 1);
    t.along = along, t.factor = factor, t.scale = row_scale;
    t.k = kept, t.capacity = capacity, t.shrink = &shrink;
    t.candidates = memory.take<uint64_t>(padded * capacity);
    t.count = memory.take<int64_t>(padded);
    t.threshold = memory.take<float>(padded);
  }
  std::vector<uint32_t*> scratch(threads);
  for (auto& s : scratch) s = memory.take<uint32_t>(l.row_scratch);
  parallel(threads, tasks, [&](int thread, int64_t i) {
    TopkTask& t = all[i];
    t.scratch = scratch[thread];
    const int64_t mine = t.last_row - t.first_row;
    std::fill(t.count, t.count + padded, 0);
    std::fill(t.threshold, t.threshold + mine, NAN);
    std::fill(t.threshold + mine, t.threshold + padded, INFINITY);  // of padded rows nothing is kept
    kernels.topk_task(p, t);
  });
  if (stop.stopped()) return false;

  std::vector<std::vector<Found>> found(threads);
  const int64_t step = std::max<int64_t>(1, 4096 / (parts * capacity));  // rows at a time
  parallel(threads, ceil_div(p.n, step), [&](int thread, int64_t group) {
    std::vector<Found>& mine = found[thread];
    for (int64_t i = group * step; i < std::min(p.n, (group + 1) * step); ++i) {
      const int64_t block = few ? 0 : i / l.rows;
      mine.clear();
      for (int64_t part = 0; part < parts; ++part) {
        const TopkTask& t = all[block * parts + part];
        const int64_t at = i - t.first_row;
        for (int64_t j = 0; j < t.count[at]; ++j) {
          const uint64_t one = t.candidates[at * capacity + j];
          mine.push_back({uint32_t(one >> 32), t.first_class / sub_centers + int64_t(~uint32_t(one))});
        }
      }
      std::partial_sort(mine.begin(), mine.begin() + k, mine.end());
      for (int64_t j = 0; j < k; ++j) scores[i * k + j] = score_of(mine[j].ordered), classes[i * k + j] = mine[j].label;
    }
  });
  return true;
}

}  // namespace mk
