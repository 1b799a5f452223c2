// The two passes over one block of rows and one range of classes, for one instruction set. A level_*.cpp includes this after defining
//
//   MK_NAMESPACE    its namespace: everything here is internal to it, so that the linker can never merge code of two instruction sets
//   MK_WIDTH        floats in a vector
//   MK_MR           rows of a register tile, which is MK_MR x 2 vectors
//   MK_PAIRS        0: products of float32; 1: products of bfloat16 pairs
//   MK_TILES        1: products on AMX tiles
//
// Rows are the fastest index of every tile of logits: then the epilogues, the running maximum included, are plain vertical arithmetic.
//
// The operands of the products, in units of 32 bits (a float, or two bfloat16 that are neighbours along the summed index):
//
//   along   [panel of 32 rows][k][32]      rows, summed over D; packed once
//   across  [row unit][ldn]                rows, summed over rows; packed once
//   centres [k/16][classes][16]            a slab of normalised centres, summed over D
//   values  [class unit][ldn]              the same slab, summed over classes
//   tile    [classes][32 rows]             raw products, then (in place) the weights of the row pass
//   g       [row unit/16][classes][16]     the weights of the class pass

#include "../forms.h"
#include "problem.h"

namespace mk {
namespace MK_NAMESPACE {
namespace {

#include "simd.h"

constexpr int CLASSES = 128;
constexpr int ROWS = 256;
constexpr int PER_UNIT = MK_PAIRS ? 2 : 1;
constexpr int CHUNK = 16;                       // units of k that lie together: a cache line, and the width of an AMX tile
constexpr int DIMS = CHUNK * PER_UNIT;          // numbers in it
static_assert(PANEL % (2 * W) == 0 || PANEL == 2 * W, "a panel is whole register tiles");

constexpr int64_t up(int64_t v, int64_t step) { return (v + step - 1) / step * step; }

#include "products.h"

// DIMS numbers of a row from `p`, of which `left` are there, as floats.
template <int DTYPE>
MK_INLINE void load_chunk(const char* p, int64_t left, float* out) {
  constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
  if (left >= DIMS) {
    for (int i = 0; i < DIMS; i += W) store(out + i, load_as<DTYPE>(p + i * SIZE));
  } else {
    char padded[DIMS * SIZE] = {};
    if (left > 0) __builtin_memcpy(padded, p, left * SIZE);
    for (int i = 0; i < DIMS; i += W) store(out + i, load_as<DTYPE>(padded + i * SIZE));
  }
}

// DIMS floats as CHUNK units.
MK_INLINE void store_units(uint32_t* p, const float* v) {
#if MK_PAIRS
  store(p, _mm512_cvtne2ps_pbh(load<__m512>(v + 16), load<__m512>(v)));
#else
  __builtin_memcpy(p, v, DIMS * 4);
#endif
}

// What a dtype's rows are read with.
template <class F>
MK_INLINE void with_dtype(int dtype, F f) {
  switch (dtype) {
    case FLOAT32: return f.template run<FLOAT32>();
    case BFLOAT16: return f.template run<BFLOAT16>();
    default: return f.template run<FLOAT16>();
  }
}

// 1/|w|, 0 for a centre shorter than TINY. Squares are taken as they are where they can be, else of the centre over its largest element.
template <int DTYPE>
float inverse_norm(const char* row, int64_t d) {
  constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
  float chunk[DIMS];
  V squares[2] = {};
  for (int64_t k = 0; k < d; k += DIMS) {
    load_chunk<DTYPE>(row + k * SIZE, d - k, chunk);
    for (int i = 0; i < DIMS; i += W) {
      const V v = load<V>(chunk + i);
      squares[(i / W) & 1] += v * v;
    }
  }
  const float plain = sum(squares[0] + squares[1]);
  if (plain > 1e-20f && plain < 1e30f) return 1.0f / __builtin_sqrtf(plain);
  V most = {};
  for (int64_t k = 0; k < d; k += DIMS) {
    load_chunk<DTYPE>(row + k * SIZE, d - k, chunk);
    for (int i = 0; i < DIMS; i += W) {
      const V v = load<V>(chunk + i);
      most = larger(most, v < 0.0f ? -v : v);
    }
  }
  float largest = 0;
  for (int i = 0; i < W; ++i) largest = most[i] > largest || most[i] != most[i] ? most[i] : largest;
  if (largest == 0) return 0.0f;
  double total = 0;
  for (int64_t k = 0; k < d; k += DIMS) {
    load_chunk<DTYPE>(row + k * SIZE, d - k, chunk);
    for (int i = 0; i < DIMS; ++i) {
      const double v = (double)chunk[i] / largest;
      total += v * v;
    }
  }
  const double norm = largest * __builtin_sqrt(total);
  return norm < TINY ? 0.0f : (float)(1.0 / norm);
}

// A slab of centres, times their factors, into `centres` and (unless null) `values`; padding is zero.
struct PackSlab {
  const Problem& p;
  int64_t first, count;
  float* factor;               // (count), written unless `known`
  const float* known;
  uint32_t* centres;
  uint32_t* values;
  const Layout& l;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    const int64_t padded = up(count, 32);
    float chunk[DIMS];
    for (int64_t j = 0; j < padded; ++j) {
      const char* row = (const char*)p.w + (first + j) * p.w_stride * SIZE;
      float a = 1.0f;
      if (j < count && p.normalize_weight) {
        a = known ? known[j] : inverse_norm<DTYPE>(row, p.d);
        factor[j] = a;
      }
      for (int64_t k = 0; k < l.dk; k += CHUNK) {
        uint32_t* to = centres + k * CLASSES + j * CHUNK;
        if (j >= count) {
          __builtin_memset(to, 0, CHUNK * 4);
          continue;
        }
        load_chunk<DTYPE>(row + k * PER_UNIT * SIZE, p.d - k * PER_UNIT, chunk);
        if (p.normalize_weight)
          for (int i = 0; i < DIMS; i += W) store(chunk + i, load<V>(chunk + i) * a);
        store_units(to, chunk);
      }
    }
    if (values) pack_values(padded);
  }

  void pack_values(int64_t padded) {
    for (int64_t j = 0; j < padded; j += PER_UNIT) {
      uint32_t* to = values + j / PER_UNIT * l.ldn;
      for (int64_t k = 0; k < l.dk; k += CHUNK) {
        const uint32_t* from = centres + k * CLASSES + j * CHUNK;
#if MK_PAIRS
        interleave(from, from + CHUNK, to + 2 * k);
#else
        __builtin_memcpy(to + k, from, CHUNK * 4);
#endif
      }
    }
  }
};

// A row of the embeddings, DIMS numbers of it, as units; zero past either end.
struct PackAlong {
  const Problem& p;
  uint32_t* out;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    const int64_t dk = up(p.d, 32) / PER_UNIT;
    float chunk[DIMS];
    uint32_t units[CHUNK];
    for (int64_t i = 0; i < up(p.n, PANEL); ++i) {
      uint32_t* to = out + i / PANEL * dk * PANEL + i % PANEL;
      for (int64_t k = 0; k < dk; k += CHUNK) {
        if (i < p.n) {
          load_chunk<DTYPE>((const char*)p.x + (i * p.d + k * PER_UNIT) * SIZE, p.d - k * PER_UNIT, chunk);
          store_units(units, chunk);
        }
        for (int u = 0; u < CHUNK; ++u) to[(k + u) * PANEL] = i < p.n ? units[u] : 0;
      }
    }
  }
};

struct PackAcross {
  const Problem& p;
  uint32_t* out;
  int64_t ldn;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    float chunk[DIMS];
    uint32_t units[2][CHUNK];
    for (int64_t i = 0; i < up(p.n, PANEL); i += PER_UNIT) {
      uint32_t* to = out + i / PER_UNIT * ldn;
      for (int64_t k = 0; k < up(p.d, 32); k += DIMS) {
        for (int u = 0; u < PER_UNIT; ++u) {
          if (i + u < p.n) {
            load_chunk<DTYPE>((const char*)p.x + ((i + u) * p.d + k) * SIZE, p.d - k, chunk);
            store_units(units[u], chunk);
          } else {
            __builtin_memset(units[u], 0, sizeof units[u]);
          }
        }
#if MK_PAIRS
        interleave(units[0], units[1], to + k);
#else
        __builtin_memcpy(to + k, units[0], CHUNK * 4);
#endif
      }
    }
  }
};

// The row vectors of one register's worth of rows.
struct Lanes {
  V factor, slope, scale, threshold;
  I label;

  MK_INLINE Lanes at(const Rows& r, int64_t row) {
    return {load<V>(r.factor + row), load<V>(r.slope + row), load<V>(r.scale + row), load<V>(r.threshold + row), load<I>(r.label + row)};
  }
  template <int FORM>
  MK_INLINE V logit_of(const Lanes& l, V raw, float bias, V t) {
    if constexpr (FORM == IDENTITY) return raw * l.slope + bias;
    return l.scale * form_value<FORM>(raw * l.factor, l.threshold, t) + bias;
  }
};

// The weights of classes j and j + 1 over W rows, where the product with `values` looks for them.
MK_INLINE void store_weights(float* tile, int j, int row, V first, V second) {
#if MK_PAIRS
  // To nearest, ties away from zero.
  const N low = (bits<N>(first) + 0x8000u) >> 16, high = (bits<N>(second) + 0x8000u) & 0xffff0000u;
  store(tile + j / 2 * PANEL + row, low | high);
#else
  store(tile + j * PANEL + row, first);
  store(tile + (j + 1) * PANEL + row, second);
#endif
}

// One panel of rows against one slab: the running maximum and sum move on, and the tile of raw products becomes weights.
// `decay` (PANEL) is what has been summed before must be multiplied by; returns whether any of it is not 1.
template <int FORM, bool OWN>
bool row_epilogue(const Problem& p, const Rows& r, const RowTask& task, int64_t row, int64_t first_class, int count, const float* bias,
                  float* tile, float* decay) {
  const V t = broadcast(p.t), none = broadcast(-INF);
  const int64_t state = row - task.first_row;
  bool moved = false;
  for (int g = 0; g < PANEL; g += W) {
    const Lanes l = Lanes::at(r, row + g);
    const I own = l.label - (int32_t)first_class;
    V highest[2] = {none, none}, top[2] = {none, none};
    for (int j = 0; j < count; j += 2)
      for (int h = 0; h < 2; ++h) {
        const V raw = load<V>(tile + (j + h) * PANEL + g);
        V z = Lanes::logit_of<FORM>(l, raw, bias[j + h], t);
        if constexpr (OWN) z = own == j + h ? none : z;
        highest[h] = larger(highest[h], z);
        if constexpr (FORM != IDENTITY) {
          V plain = raw * l.slope + bias[j + h];
          if constexpr (OWN) plain = own == j + h ? none : plain;
          top[h] = larger(top[h], plain);
        }
      }
    const V before = load<V>(task.peak + state + g);
    const V peak = larger(larger(highest[0], highest[1]), before);
    const V base = finite_peak(peak), shrink = exp2(before - base);
    store(task.peak + state + g, peak);
    store(decay + g, shrink);
    if constexpr (FORM != IDENTITY) store(task.top + state + g, larger(larger(top[0], top[1]), load<V>(task.top + state + g)));

    V total[2] = {}, moment[2] = {};
    for (int j = 0; j < count; j += 2) {
      V weight[2];
      for (int h = 0; h < 2; ++h) {
        const V raw = load<V>(tile + (j + h) * PANEL + g);
        V q = exp2(Lanes::logit_of<FORM>(l, raw, bias[j + h], t) - base);
        if constexpr (OWN) q = own == j + h ? V{} : q;
        total[h] += q;
        weight[h] = q;
        if constexpr (FORM != IDENTITY) {
          const V c = raw * l.factor;
          moment[h] += q * form_value<FORM>(c, l.threshold, t);
          weight[h] = q * form_slope<FORM>(c, l.threshold, t);
        }
      }
      store_weights(tile, j, g, weight[0], weight[1]);
    }
    float sums[2][W], shrunk[W];
    store(sums[0], total[0] + total[1]);
    store(sums[1], moment[0] + moment[1]);
    store(shrunk, shrink);
    for (int i = 0; i < W; ++i) {
      double& whole = task.total[state + g + i];
      whole = whole * shrunk[i] + sums[0][i];
      if (FORM != IDENTITY && task.need_moment) task.moment[state + g + i] = task.moment[state + g + i] * shrunk[i] + sums[1][i];
      moved |= shrunk[i] != 1.0f;
    }
  }
  return moved;
}

// The same for the plain sum of the logits: every weight is 1.
template <int FORM, bool OWN>
bool uniform_epilogue(const Problem& p, const Rows& r, const RowTask& task, int64_t row, int64_t first_class, int count, const float* bias,
                      float* tile, float*) {
  const V t = broadcast(p.t);
  const int64_t state = row - task.first_row;
  for (int g = 0; g < PANEL; g += W) {
    const Lanes l = Lanes::at(r, row + g);
    const I own = l.label - (int32_t)first_class;
    V total = {}, moment = {};
    for (int j = 0; j < count; j += 2) {
      V weight[2] = {};
      for (int h = 0; h < 2 && bias[j + h] != -INF; ++h) {
        const V c = load<V>(tile + (j + h) * PANEL + g) * l.factor;
        V one = V{} + 1.0f;
        if constexpr (OWN) one = own == j + h ? V{} : one;
        const V value = form_value<FORM>(c, l.threshold, t);
        total += one * (l.scale * value + bias[j + h]);
        moment += one * value;
        weight[h] = one * form_slope<FORM>(c, l.threshold, t);
      }
      store_weights(tile, j, g, weight[0], weight[1]);
    }
    for (int i = 0; i < W; ++i) {
      task.total[state + g + i] += (double)total[i] * LN2;
      if (task.need_moment) task.moment[state + g + i] += moment[i];
    }
  }
  return false;
}

// One panel of rows against one slab in the class pass: the tile of raw products becomes G f, in `g`, and db grows.
template <int FORM, bool OWN, bool BIAS>
void class_epilogue(const Problem& p, const Rows& r, int64_t row, int64_t first_class, int count, const float* bias, const float* tile,
                    char* g_row, float* db) {
  const V t = broadcast(p.t);
  for (int g = 0; g < PANEL; g += W) {
    const Lanes l = Lanes::at(r, row + g);
    const I own = l.label - (int32_t)first_class;
    const V lse = load<V>(r.lse + row + g), softmax = load<V>(r.softmax + row + g), uniform = load<V>(r.uniform + row + g);
    const V target = load<V>(r.target + row + g);
    // Where rows g.. of class 0 go: 32 units of float, or 16 of bfloat16, stand side by side in one or two chunks.
    char* out = g_row + g / DIMS * (CLASSES * CHUNK * 4) + g % DIMS * (4 / PER_UNIT);
    for (int j = 0; j < count; ++j) {
      const V raw = load<V>(tile + j * PANEL + g);
      const V q = exp2(Lanes::logit_of<FORM>(l, raw, bias[j], t) - lse);
      V weight = q * softmax + uniform;
      if constexpr (FORM != IDENTITY) weight *= form_slope<FORM>(raw * l.factor, l.threshold, t);
      if constexpr (OWN) weight = own == j ? target : weight;
#if MK_PAIRS
      store(out + j * CHUNK * 4, _mm512_cvtneps_pbh((__m512)weight));
#else
      store(out + j * CHUNK * 4, weight);
#endif
      if constexpr (BIAS) {
        V share = q * load<V>(r.share + row + g) + load<V>(r.uniform_share + row + g);
        if constexpr (OWN) share = own == j ? load<V>(r.bias + row + g) : share;
        store(db + j * W, load<V>(db + j * W) + share);
      }
    }
  }
}

bool own_inside(const Rows& r, int64_t row, int64_t first_class, int count) {
  I any = {};
  for (int g = 0; g < PANEL; g += W) {
    const I own = load<I>(r.label + row + g) - (int32_t)first_class;
    any |= (own >= 0) & (own < count);
  }
  bool found = false;
  for (int i = 0; i < W; ++i) found |= any[i] != 0;
  return found;
}

using RowEpilogue = bool (*)(const Problem&, const Rows&, const RowTask&, int64_t, int64_t, int, const float*, float*, float*);
using ClassEpilogue = void (*)(const Problem&, const Rows&, int64_t, int64_t, int, const float*, const float*, char*, float*);

template <int FORM>
RowEpilogue choose_row(bool uniform, bool own) {
  if (uniform) return own ? uniform_epilogue<FORM, true> : uniform_epilogue<FORM, false>;
  return own ? row_epilogue<FORM, true> : row_epilogue<FORM, false>;
}

template <int FORM>
ClassEpilogue choose_class(bool own, bool bias) {
  if (bias) return own ? class_epilogue<FORM, true, true> : class_epilogue<FORM, false, true>;
  return own ? class_epilogue<FORM, true, false> : class_epilogue<FORM, false, false>;
}

#define MK_CHOOSE(form, function, ...) \
  ((form) == IDENTITY ? function<IDENTITY>(__VA_ARGS__) : (form) == HARD_LINEAR ? function<HARD_LINEAR>(__VA_ARGS__) : function<HARD_QUADRATIC>(__VA_ARGS__))

Layout layout(int64_t d) {
  Layout l{};
  l.dk = up(d, 32) / PER_UNIT;
  l.ldn = up(d, 32) + CHUNK;  // a row of them is never a whole power of two apart from the next
  l.classes = CLASSES;
  l.rows = ROWS;
  l.per_unit = PER_UNIT;
  const int64_t slab = CLASSES * l.dk, tile = CLASSES * PANEL, small = 2 * CLASSES + PANEL;
  l.row_scratch = slab + CLASSES / PER_UNIT * l.ldn + 2 * tile + small;
  l.class_scratch = slab + tile + ROWS / PER_UNIT * CLASSES + CLASSES * l.ldn + CLASSES * W + small + up(d, 32);
  return l;
}

// The slab's biases in units of log 2, -inf for padding, so that a padded class has weight 0.
void slab_bias(const Problem& p, int64_t first, int64_t count, float* out) {
  for (int64_t j = 0; j < CLASSES; ++j) out[j] = j >= count ? -INF : p.bias ? p.bias[first + j] * LOG2E : 0.0f;
}

void row_task(const Problem& p, const Rows& r, const RowTask& task) {
  const Layout l = layout(p.d);
  const TileState tiles;
  uint32_t* at = task.scratch;
  uint32_t* centres = at;
  uint32_t* values = at += CLASSES * l.dk;
  float* tile = (float*)(at += CLASSES / PER_UNIT * l.ldn);
  uint32_t* spare = at += CLASSES * PANEL;
  float* bias = (float*)(at += CLASSES * PANEL);
  float* factor = bias + CLASSES;
  float* decay = factor + CLASSES;
  const RowEpilogue plain = MK_CHOOSE(p.form, choose_row, task.uniform, false), with_own = MK_CHOOSE(p.form, choose_row, task.uniform, true);
  for (int64_t first = task.first_class; first < task.last_class; first += CLASSES) {
    const int64_t count = task.last_class - first < CLASSES ? task.last_class - first : CLASSES;
    with_dtype(p.w_dtype, PackSlab{p, first, count, factor, nullptr, centres, task.need_u ? values : nullptr, l});
    if (task.class_factor && p.normalize_weight) __builtin_memcpy(task.class_factor + first, factor, count * 4);
    slab_bias(p, first, count, bias);
    for (int64_t row = task.first_row; row < task.last_row; row += PANEL) {
      cosines(l.dk, up(count, 2), centres, r.along + row * l.dk, tile);
      const bool own = own_inside(r, row, first, count);
      const bool moved = (own ? with_own : plain)(p, r, task, row, first, up(count, 2), bias, tile, decay);
      if (!task.need_u) continue;
      float* u = task.u + (row - task.first_row) * l.ldn;
      if (moved)
        for (int i = 0; i < PANEL; ++i)
          if (decay[i] != 1.0f)
            for (int64_t k = 0; k < l.ldn; k += W) store(u + i * l.ldn + k, load<V>(u + i * l.ldn + k) * decay[i]);
      accumulate_u(up(count, 2), l, (uint32_t*)tile, spare, values, u);
    }
  }
}

// dw of one slab from v = G^T x, and its place in memory.
struct WriteGradient {
  const Problem& p;
  int64_t first, count;
  const float* factor;
  float* v;
  void* dw;
  float* unit;
  const Layout& l;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    for (int64_t j = 0; j < count; ++j) {
      float* row = v + j * l.ldn;
      if (p.normalize_weight) {
        const char* centre = (const char*)p.w + (first + j) * p.w_stride * SIZE;
        const V a = broadcast(factor[j]);
        V dots[2] = {};
        for (int64_t k = 0; k < p.d; k += DIMS) {
          load_chunk<DTYPE>(centre + k * SIZE, p.d - k, unit + k);
          for (int i = 0; i < DIMS; i += W) {
            const V w = load<V>(unit + k + i) * a;
            store(unit + k + i, w);
            dots[(i / W) & 1] += load<V>(row + k + i) * w;
          }
        }
        const V dot = broadcast(sum(dots[0] + dots[1]));
        for (int64_t k = 0; k < p.d; k += W) store(row + k, through_norm(load<V>(row + k), dot, load<V>(unit + k), a));
      }
      char* to = (char*)dw + (first + j) * p.d * SIZE;
      int64_t k = 0;
      for (; k + W <= p.d; k += W) store_as<DTYPE>(to + k * SIZE, load<V>(row + k));
      if (k < p.d) {
        char last[W * SIZE];
        store_as<DTYPE>(last, load<V>(row + k));
        __builtin_memcpy(to + k * SIZE, last, (p.d - k) * SIZE);
      }
    }
  }
};

void class_task(const Problem& p, const Rows& r, const ClassTask& task) {
  const Layout l = layout(p.d);
  const TileState tiles;
  uint32_t* at = task.scratch;
  uint32_t* centres = at;
  float* tile = (float*)(at += CLASSES * l.dk);
  uint32_t* g = at += CLASSES * PANEL;
  float* v = (float*)(at += ROWS / PER_UNIT * CLASSES);
  float* db = (float*)(at += CLASSES * l.ldn);
  float* bias = (float*)(at += CLASSES * W);
  float* factor = bias + CLASSES;
  float* unit = factor + CLASSES + PANEL;
  const bool need_bias = task.db;
  const ClassEpilogue plain = MK_CHOOSE(p.form, choose_class, false, need_bias), with_own = MK_CHOOSE(p.form, choose_class, true, need_bias);
  for (int64_t first = task.first_class; first < task.last_class; first += CLASSES) {
    const int64_t count = task.last_class - first < CLASSES ? task.last_class - first : CLASSES;
    const float* known = p.normalize_weight ? task.class_factor + first : nullptr;
    with_dtype(p.w_dtype, PackSlab{p, first, count, factor, known, centres, nullptr, l});
    slab_bias(p, first, count, bias);
    if (need_bias) __builtin_memset(db, 0, CLASSES * W * 4);
    for (int64_t block = 0; block < p.n; block += ROWS) {
      const int64_t rows = up(p.n - block < ROWS ? p.n - block : ROWS, PANEL);
      for (int64_t i = 0; i < rows; i += PANEL) {
        const int64_t row = block + i;
        cosines(l.dk, count, centres, r.along + row * l.dk, tile);
        const bool own = own_inside(r, row, first, count);
        (own ? with_own : plain)(p, r, row, first, count, bias, tile, (char*)(g + i / PER_UNIT * CLASSES), db);
      }
      if (task.dw) accumulate_v(rows / PER_UNIT, count, l, g, r.across + block / PER_UNIT * l.ldn, v, block > 0);
    }
    if (task.dw) with_dtype(p.w_dtype, WriteGradient{p, first, count, factor, v, task.dw, unit, l});
    if (need_bias)
      for (int64_t j = 0; j < count; ++j) task.db[first + j] = sum(load<V>(db + j * W));
  }
}

void pack_along(const Problem& p, uint32_t* out) { with_dtype(p.x_dtype, PackAlong{p, out}); }

void pack_across(const Problem& p, uint32_t* out) { with_dtype(p.x_dtype, PackAcross{p, out, layout(p.d).ldn}); }

}  // namespace

extern const Kernels kernels = {MK_NAME, layout, pack_along, pack_across, row_task, class_task};

}  // namespace MK_NAMESPACE
}  // namespace mk
