// The two passes over one block of rows and one range of classes, for one instruction set. A level_*.cpp includes this after defining
//
//   MK_NAMESPACE    its namespace: everything here is internal to it, so that the linker can never merge code of two instruction sets
//   MK_WIDTH        floats in a vector
//   MK_MR           rows of a register tile, which is MK_MR x 2 vectors
//   MK_PAIRS        0: products of float32; 1: products of bfloat16 pairs
//   MK_TILES        1: products on AMX tiles
//   MK_SPLIT        1: float32 numbers as sums of bfloat16 ones, so that AMX's bfloat16 products give float32's
//
// Rows are the fastest index of every tile of logits: then the epilogues, the running maximum included, are plain vertical arithmetic.
//
// The operands of the products, in units of 32 bits: a float, or two bfloat16 that are neighbours along the summed index. Which two are
// neighbours is free where both operands agree: along D they are d and d + 1 (d + 16 with planes), along the rows i and i + 16, along the
// classes j and j + 1.
//
//   along   [panel of 32 rows][k/16][plane][16][32]   rows, summed over D; packed once
//   across  [row unit][plane][ldn]                    rows, summed over rows; packed once
//   centres [k/16][plane][classes][16]                a slab of normalised centres, summed over D
//   values  [class unit][plane][ldn]                  the same slab, summed over classes
//   tile    [classes][32 rows]                        raw products
//   weights [class unit][plane][32 rows]              the weights of the row pass; without planes in the tile's place
//   g       [row unit/16][plane][classes][16]         the weights of the class pass
//
// There is one plane but for MK_SPLIT. There v = v0 + v1 + v2, each the rest of the one before rounded to bfloat16: 24 bits, and a product
// is the six of planes whose indices sum to 2 or less. What is left out is of the size of float32's own rounding.
//
// Products of plain bfloat16 take the centres as they are: normalised first, a bfloat16 centre would be rounded twice.

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
constexpr int PLANES = MK_SPLIT ? 3 : 1;
constexpr bool RAW = MK_PAIRS && !MK_SPLIT;     // centres are packed as they are, and their factors go into the epilogues
constexpr int KEPT_DTYPE = RAW ? BFLOAT16 : FLOAT32;  // the dtype of the weights that the row pass leaves to the class pass
constexpr int KEPT_BYTES = RAW ? 2 : 4;
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

#if MK_PAIRS

// The bfloat16 nearest to each lane, as a float; ties away from zero.
MK_INLINE N rounded(V v) { return (bits<N>(v) + 0x8000u) & 0xffff0000u; }

// Pairs of bfloat16, `low` first, from floats that are already rounded.
MK_INLINE N pairs(N low, N high) { return low >> 16 | high; }

// The next plane of `v`, rounded; `v` becomes what is left. The last plane's rest is of no interest.
MK_INLINE N next_plane(V& v) {
  const N out = rounded(v);
  if (MK_SPLIT) v -= bits<V>(out);
  return out;
}

// W pairs in `planes` planes, `stride` units apart.
MK_INLINE void store_pairs(V low, V high, int planes, int64_t stride, uint32_t* to) {
  for (int q = 0; q < planes; ++q, to += stride) {
    const N l = next_plane(low);
    store(to, pairs(l, next_plane(high)));
  }
}

#endif

// DIMS floats as CHUNK units in each of PLANES planes.
MK_INLINE void store_units(const float* v, [[maybe_unused]] int64_t plane, uint32_t* to) {
#if MK_SPLIT
  store_pairs(load<V>(v), load<V>(v + 16), PLANES, plane, to);
#elif MK_PAIRS
  store(to, _mm512_cvtne2ps_pbh(load<__m512>(v + 16), load<__m512>(v)));
#else
  for (int i = 0; i < CHUNK; i += W) store(to + i, load<V>(v + i));
#endif
}

// DIMS columns of PER_UNIT rows (the second is not read where a unit is one number) as DIMS units in each of PLANES planes.
MK_INLINE void store_columns(const float* first, [[maybe_unused]] const float* second, [[maybe_unused]] int64_t plane, uint32_t* to) {
#if MK_PAIRS
  for (int i = 0; i < DIMS; i += W) store_pairs(load<V>(first + i), load<V>(second + i), PLANES, plane, to + i);
#else
  for (int i = 0; i < DIMS; i += W) store(to + i, load<V>(first + i));
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
  int64_t k = 0;
#if MK_PAIRS
  if (DTYPE == BFLOAT16)
    for (; k + 2 * DIMS <= d; k += 2 * DIMS)
      for (int h = 0; h < 2; ++h) {
        const __m512bh v = (__m512bh)load<__m512i>(row + (k + h * DIMS) * SIZE);
        squares[h] = (V)_mm512_dpbf16_ps((__m512)squares[h], v, v);
      }
#endif
  for (; k < d; k += DIMS) {
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

#if MK_PAIRS && !MK_SPLIT

// DIMS numbers of a row, of which `left` are there, as a line of bfloat16.
template <int DTYPE>
MK_INLINE __m512i load_line(const char* p, int64_t left) {
  if (DTYPE == BFLOAT16 && left >= DIMS) return load<__m512i>(p);
  alignas(64) char line[64] = {};
  if (DTYPE == BFLOAT16) {
    if (left > 0) __builtin_memcpy(line, p, left * 2);
  } else {
    float chunk[DIMS];
    load_chunk<DTYPE>(p, left, chunk);
    store_units(chunk, 0, (uint32_t*)line);
  }
  return load<__m512i>(line);
}

// Two lines of 32 bfloat16 into 32 pairs: the pair of column i is (a[i], b[i]).
MK_INLINE void interleave(__m512i a, __m512i b, uint32_t* out) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34,
                                         2, 33, 1, 32, 0);
  const __m512i second = _mm512_or_si512(first, _mm512_set1_epi16(16));
  store(out, _mm512_permutex2var_epi16(a, first, b));
  store(out + 16, _mm512_permutex2var_epi16(a, second, b));
}

#endif

// A slab of centres into `centres` and (unless null) `values`, zero where there are no more, and their factors, 1 where they are taken as
// they are. Unless RAW, what is packed is times its factor.
struct PackSlab {
  const Problem& p;
  int64_t first, count;
  float* factor;       // (count up to a multiple of 32)
  const float* known;  // factors that need not be found again, or null
  uint32_t* centres;
  uint32_t* values;
  const Layout& l;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    const int64_t pitch = p.w_stride * SIZE;
    const char* row = (const char*)p.w + first * pitch;
    for (int64_t j = 0; j < up(count, 32); j += 2, row += 2 * pitch) {
      for (int h = 0; h < 2; ++h) {
        const bool find = j + h < count && p.normalize_weight;
        factor[j + h] = !find ? 1.0f : known ? known[j + h] : inverse_norm<DTYPE>(row + h * pitch, p.d);
      }
      for (int64_t k = 0; k < l.dk; k += CHUNK) {
        const int64_t d = k * PER_UNIT, left[2] = {j < count ? p.d - d : 0, j + 1 < count ? p.d - d : 0};
        uint32_t* to = centres + k * PLANES * CLASSES + j * CHUNK;
#if MK_PAIRS && !MK_SPLIT
        const __m512i line[2] = {load_line<DTYPE>(row + d * SIZE, left[0]), load_line<DTYPE>(row + pitch + d * SIZE, left[1])};
        store(to, line[0]), store(to + CHUNK, line[1]);
        if (values) interleave(line[0], line[1], values + j / 2 * l.ldn + d);
#else
        float chunk[2][DIMS];
        for (int h = 0; h < 2; ++h) {
          load_chunk<DTYPE>(row + h * pitch + d * SIZE, left[h], chunk[h]);
          if (p.normalize_weight)
            for (int i = 0; i < DIMS; i += W) store(chunk[h] + i, load<V>(chunk[h] + i) * factor[j + h]);
          store_units(chunk[h], CLASSES * CHUNK, to + h * CHUNK);
        }
        if (!values) continue;
        for (int h = 0; h < 2; h += PER_UNIT) store_columns(chunk[h], chunk[1], l.ldn, values + (j + h) / PER_UNIT * PLANES * l.ldn + d);
#endif
      }
    }
  }
};

struct PackAlong {
  const Problem& p;
  uint32_t* out;
  const Layout& l;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    float chunk[DIMS];
    uint32_t units[PLANES * CHUNK];
    for (int64_t i = 0; i < up(p.n, PANEL); ++i) {
      uint32_t* to = out + i / PANEL * l.dk * PLANES * PANEL + i % PANEL;
      for (int64_t k = 0; k < l.dk; k += CHUNK) {
        const int64_t d = k * PER_UNIT;
        load_chunk<DTYPE>((const char*)p.x + (i * p.d + d) * SIZE, i < p.n ? p.d - d : 0, chunk);
        store_units(chunk, CHUNK, units);
        for (int u = 0; u < PLANES * CHUNK; ++u) to[(k * PLANES + u) * PANEL] = units[u];
      }
    }
  }
};

struct PackAcross {
  const Problem& p;
  uint32_t* out;
  const Layout& l;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    float chunk[2][DIMS];
    for (int64_t u = 0; u < up(p.n, PANEL) / PER_UNIT; ++u) {
      const int64_t first = MK_PAIRS ? u / 16 * PANEL + u % 16 : u;
      for (int64_t k = 0; k < up(p.d, 32); k += DIMS) {
        for (int h = 0; h < PER_UNIT; ++h) {
          const int64_t i = first + 16 * h;
          load_chunk<DTYPE>((const char*)p.x + (i * p.d + k) * SIZE, i < p.n ? p.d - k : 0, chunk[h]);
        }
        store_columns(chunk[0], chunk[1], l.ldn, out + u * PLANES * l.ldn + k);
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

// A panel against a slab, as the epilogues see it.
struct Slab {
  int64_t first_class;
  int count;            // classes, even; padding has a bias of -inf
  const float* bias;    // in units of log 2
  const float* factor;  // of the centres
  float* tile;
  uint32_t* weights;
  char* kept;  // the panel's, or null

  // W raw products of class j, times the factor where it is not in them.
  V raw(int j, int row) const {
    const V v = load<V>(tile + j * PANEL + row);
    return RAW ? v * factor[j] : v;
  }
  // The weights of classes j and j + 1 over W rows; where they go has been read already.
  void put(int j, int row, V first, V second) const {
#if MK_PAIRS
    if (RAW) first *= factor[j], second *= factor[j + 1];
    store_pairs(first, second, PLANES, PANEL, weights + j / 2 * PLANES * PANEL + row);
#else
    store(weights + j * PANEL + row, first);
    store(weights + (j + 1) * PANEL + row, second);
#endif
  }
  // What the row pass leaves to the class pass: W weights of class j, and what their exponentials were taken against.
  void keep(int j, int row, V v) const { store_as<KEPT_DTYPE>(kept + (j * PANEL + row) * KEPT_BYTES, v); }
  V kept_weight(int j, int row) const { return load_as<KEPT_DTYPE>(kept + (j * PANEL + row) * KEPT_BYTES); }
  float* kept_base() const { return (float*)(kept + CLASSES * PANEL * KEPT_BYTES); }
};

// One panel of rows against one slab: the running maximum and sum move on, and the raw products become weights.
// `decay` (PANEL) is what has been summed before must be multiplied by; returns whether any of it is not 1.
template <int FORM, bool OWN>
bool row_epilogue(const Problem& p, const Rows& r, const RowTask& task, int64_t row, const Slab& s, float* decay) {
  const V t = broadcast(p.t), none = broadcast(-INF);
  const int64_t state = row - task.first_row;
  bool moved = false;
  for (int g = 0; g < PANEL; g += W) {
    const Lanes l = Lanes::at(r, row + g);
    const I own = l.label - (int32_t)s.first_class;
    V highest[2] = {none, none}, top[2] = {none, none};
    for (int j = 0; j < s.count; j += 2)
      for (int h = 0; h < 2; ++h) {
        const V raw = s.raw(j + h, g);
        V z = Lanes::logit_of<FORM>(l, raw, s.bias[j + h], t);
        if constexpr (OWN) z = own == j + h ? none : z;
        highest[h] = larger(highest[h], z);
        if constexpr (FORM != IDENTITY) {
          V plain = raw * l.slope + s.bias[j + h];
          if constexpr (OWN) plain = own == j + h ? none : plain;
          top[h] = larger(top[h], plain);
        }
      }
    const V before = load<V>(task.peak + state + g);
    const V peak = larger(larger(highest[0], highest[1]), before);
    const V base = finite_peak(peak), shrink = exp2(before - base);
    store(task.peak + state + g, peak);
    store(decay + g, shrink);
    if (s.kept) store(s.kept_base() + g, base);
    if constexpr (FORM != IDENTITY) store(task.top + state + g, larger(larger(top[0], top[1]), load<V>(task.top + state + g)));

    V total[2] = {}, moment[2] = {};
    for (int j = 0; j < s.count; j += 2) {
      V weight[2];
      for (int h = 0; h < 2; ++h) {
        const V raw = s.raw(j + h, g);
        V q = exp2(Lanes::logit_of<FORM>(l, raw, s.bias[j + h], t) - base);
        if constexpr (OWN) q = own == j + h ? V{} : q;
        total[h] += q;
        weight[h] = q;
        if constexpr (FORM != IDENTITY) {
          const V c = raw * l.factor;
          moment[h] += q * form_value<FORM>(c, l.threshold, t);
          weight[h] = q * form_slope<FORM>(c, l.threshold, t);
        }
        if (s.kept) s.keep(j + h, g, weight[h]);
      }
      s.put(j, g, weight[0], weight[1]);
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
bool uniform_epilogue(const Problem& p, const Rows& r, const RowTask& task, int64_t row, const Slab& s, float*) {
  const V t = broadcast(p.t);
  const int64_t state = row - task.first_row;
  for (int g = 0; g < PANEL; g += W) {
    const Lanes l = Lanes::at(r, row + g);
    const I own = l.label - (int32_t)s.first_class;
    V total = {}, moment = {};
    for (int j = 0; j < s.count; j += 2) {
      V weight[2] = {};
      for (int h = 0; h < 2 && s.bias[j + h] != -INF; ++h) {
        const V c = s.raw(j + h, g) * l.factor;
        V one = V{} + 1.0f;
        if constexpr (OWN) one = own == j + h ? V{} : one;
        const V value = form_value<FORM>(c, l.threshold, t);
        total += one * (l.scale * value + s.bias[j + h]);
        moment += one * value;
        weight[h] = one * form_slope<FORM>(c, l.threshold, t);
      }
      s.put(j, g, weight[0], weight[1]);
    }
    for (int i = 0; i < W; ++i) {
      task.total[state + g + i] += (double)total[i] * LN2;
      if (task.need_moment) task.moment[state + g + i] += moment[i];
    }
  }
  return false;
}

// One panel of rows against one slab in the class pass: the tile of raw products, or what was kept, becomes G f, in `out`, and db grows.
// N'(c) is in what was kept: there the form is always the identity.
template <int FORM, bool OWN, bool BIAS, bool KEPT>
void class_epilogue(const Problem& p, const Rows& r, int64_t row, const Slab& s, uint32_t* out, float* db) {
  static_assert(!KEPT || FORM == IDENTITY, "weights are kept with their form's slope");
  const V t = broadcast(p.t);
  // Never above lambda but for rounding, which for logits of 1e18 is itself enough to overflow the exponential.
  const auto share_of = [](V lse, V logit) { return exp2(-larger(lse - logit, broadcast(-1.0f))); };
  for (int g = 0; g < PANEL; g += 2 * W) {
    Lanes l[2];
    V lse[2], softmax[2], uniform[2], target[2], from_base[2];
    for (int h = 0; h < 2; ++h) {
      const int64_t at = row + g + h * W;
      l[h] = Lanes::at(r, at);
      lse[h] = load<V>(r.lse + at), softmax[h] = load<V>(r.softmax + at), uniform[h] = load<V>(r.uniform + at);
      target[h] = load<V>(r.target + at);
      if constexpr (KEPT) from_base[h] = share_of(lse[h], load<V>(s.kept_base() + g + h * W));
    }
    for (int j = 0; j < s.count; ++j) {
      V weight[2];
      for (int h = 0; h < 2; ++h) {
        const V raw = KEPT ? V{} : s.raw(j, g + h * W);
        const I own = l[h].label - (int32_t)s.first_class;
        V q;
        if constexpr (KEPT)
          q = s.kept_weight(j, g + h * W) * from_base[h];
        else
          q = share_of(lse[h], Lanes::logit_of<FORM>(l[h], raw, s.bias[j], t));
        V v = q * softmax[h] + uniform[h];
        if constexpr (FORM != IDENTITY) v *= form_slope<FORM>(raw * l[h].factor, l[h].threshold, t);
        if constexpr (OWN) v = own == j ? target[h] : v;
        weight[h] = v;
        if constexpr (BIAS) {
          const int64_t at = row + g + h * W;
          V share = q * load<V>(r.share + at) + load<V>(r.uniform_share + at);
          if constexpr (OWN) share = own == j ? load<V>(r.bias + at) : share;
          store(db + j * W, load<V>(db + j * W) + share);
        }
      }
#if MK_PAIRS
      store_pairs(weight[0], weight[1], PLANES, CLASSES * CHUNK, out + j * CHUNK);
#else
      for (int h = 0; h < 2; ++h) store(out + (g + h * W) / CHUNK * (CLASSES * CHUNK) + j * CHUNK + (g + h * W) % CHUNK, weight[h]);
#endif
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

using RowEpilogue = bool (*)(const Problem&, const Rows&, const RowTask&, int64_t, const Slab&, float*);
using ClassEpilogue = void (*)(const Problem&, const Rows&, int64_t, const Slab&, uint32_t*, float*);

template <int FORM>
RowEpilogue choose_row(bool uniform, bool own) {
  if (uniform) return own ? uniform_epilogue<FORM, true> : uniform_epilogue<FORM, false>;
  return own ? row_epilogue<FORM, true> : row_epilogue<FORM, false>;
}

template <int FORM, bool KEPT = false>
ClassEpilogue choose_class(bool own, bool bias) {
  if (bias) return own ? class_epilogue<FORM, true, true, KEPT> : class_epilogue<FORM, false, true, KEPT>;
  return own ? class_epilogue<FORM, true, false, KEPT> : class_epilogue<FORM, false, false, KEPT>;
}

#define MK_CHOOSE(form, function, ...) \
  ((form) == IDENTITY ? function<IDENTITY>(__VA_ARGS__) : (form) == HARD_LINEAR ? function<HARD_LINEAR>(__VA_ARGS__) : function<HARD_QUADRATIC>(__VA_ARGS__))

// The buffers of a task, one after the other in its scratch memory.
struct Buffers {
  int64_t used = 0;
  uint32_t* start;

  uint32_t* take(int64_t units) {
    uint32_t* out = start + used;
    used += up(units, 16);
    return out;
  }
};

struct RowBuffers {
  uint32_t *centres, *values, *tile, *weights, *spare, *bias, *factor, *decay;

  RowBuffers(Buffers& b, const Layout& l) {
    centres = b.take(CLASSES * l.dk * PLANES);
    values = b.take(CLASSES / PER_UNIT * PLANES * l.ldn);
    tile = b.take(CLASSES * PANEL);
    weights = MK_SPLIT ? b.take(CLASSES / 2 * PLANES * PANEL) : tile;
    spare = b.take(CLASSES / 2 * PLANES * PANEL);
    bias = b.take(CLASSES), factor = b.take(CLASSES), decay = b.take(PANEL);
  }
};

struct ClassBuffers {
  uint32_t *centres, *tile, *g, *v, *db, *bias, *factor;

  ClassBuffers(Buffers& b, const Layout& l) {
    centres = b.take(CLASSES * l.dk * PLANES);
    tile = b.take(CLASSES * PANEL);
    g = b.take(ROWS / PER_UNIT * PLANES * CLASSES);
    v = b.take(CLASSES * l.ldn);
    db = b.take(CLASSES * W), bias = b.take(CLASSES), factor = b.take(CLASSES);
  }
};

Layout layout(int64_t d) {
  Layout l{};
  l.dk = up(d, 32) / PER_UNIT;
  l.ldn = up(d, 32) + CHUNK;  // a row of them is never a whole power of two apart from the next
  l.classes = CLASSES;
  l.rows = ROWS;
  l.along = l.dk * PLANES;
  l.across = l.ldn * PLANES / PER_UNIT;
  Buffers row{}, cls{};
  RowBuffers(row, l), ClassBuffers(cls, l);
  l.row_scratch = row.used, l.class_scratch = cls.used;
  l.kept = CLASSES * PANEL * KEPT_BYTES + PANEL * 4;
  return l;
}

// The slab's biases in units of log 2, -inf for padding, so that a padded class has weight 0.
void slab_bias(const Problem& p, int64_t first, int64_t count, float* out) {
  for (int64_t j = 0; j < CLASSES; ++j) out[j] = j >= count ? -INF : p.bias ? p.bias[first + j] * LOG2E : 0.0f;
}

void row_task(const Problem& p, const Rows& r, const RowTask& task) {
  const Layout l = layout(p.d);
  const TileState tiles;
  Buffers memory{0, task.scratch};
  const RowBuffers m(memory, l);
  float *tile = (float*)m.tile, *bias = (float*)m.bias, *factor = (float*)m.factor, *decay = (float*)m.decay;
  const RowEpilogue plain = MK_CHOOSE(p.form, choose_row, task.uniform, false), with_own = MK_CHOOSE(p.form, choose_row, task.uniform, true);
  for (int64_t first = task.first_class; first < task.last_class; first += CLASSES) {
    const int64_t count = task.last_class - first < CLASSES ? task.last_class - first : CLASSES, even = up(count, 2);
    with_dtype(p.w_dtype, PackSlab{p, first, count, factor, nullptr, m.centres, task.need_u ? m.values : nullptr, l});
    if (task.class_factor && p.normalize_weight) __builtin_memcpy(task.class_factor + first, factor, count * 4);
    slab_bias(p, first, count, bias);
    const int64_t slab = first / CLASSES;
    for (int64_t row = task.first_row; row < task.last_row; row += PANEL) {
      char* kept = slab < task.kept_slabs ? task.kept + (slab * up(p.n, PANEL) + row) / PANEL * l.kept : nullptr;
      cosines(l, even, m.centres, r.along + row * l.along, tile);
      const bool own = own_inside(r, row, first, count);
      const bool moved = (own ? with_own : plain)(p, r, task, row, {first, (int)even, bias, factor, tile, m.weights, kept}, decay);
      if (!task.need_u) continue;
      float* u = task.u + (row - task.first_row) * l.ldn;
      if (moved)
        for (int i = 0; i < PANEL; ++i)
          if (decay[i] != 1.0f)
            for (int64_t k = 0; k < l.ldn; k += W) store(u + i * l.ldn + k, load<V>(u + i * l.ldn + k) * decay[i]);
      accumulate_u(l, even, m.weights, m.spare, m.values, u);
    }
  }
}

// dw of one slab from v = G^T x, and its place in memory.
struct WriteGradient {
  const Problem& p;
  int64_t first, count;
  const float* factor;
  float unit;
  const float* v;
  void* dw;
  const Layout& l;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    for (int64_t j = 0; j < count; ++j) {
      const float* row = v + j * l.ldn;
      const char* centre = (const char*)p.w + (first + j) * p.w_stride * SIZE;
      char* to = (char*)dw + (first + j) * p.d * SIZE;
      const int64_t whole = p.d / W * W;
      char ends[2][W * SIZE] = {};  // the last elements, where a vector would reach past the row
      __builtin_memcpy(ends[0], centre + whole * SIZE, (p.d - whole) * SIZE);
      V a = {}, dot = {};
      if (p.normalize_weight) {
        a = broadcast(factor[j]);
        V dots[2] = {};
        int64_t k = 0;
        for (; k + 2 * W <= whole; k += 2 * W)
          for (int h = 0; h < 2; ++h) dots[h] += load<V>(row + k + h * W) * (load_as<DTYPE>(centre + (k + h * W) * SIZE) * a);
        if (k < whole) dots[0] += load<V>(row + k) * (load_as<DTYPE>(centre + k * SIZE) * a);
        if (whole < p.d) dots[1] += load<V>(row + whole) * (load_as<DTYPE>(ends[0]) * a);
        dot = broadcast(sum(dots[0] + dots[1]));
      }
      const auto result = [&](int64_t k, const char* w) {
        const V mine = load<V>(row + k);
        return (p.normalize_weight ? through_norm(mine, dot, load_as<DTYPE>(w) * a, a) : mine) * unit;
      };
      for (int64_t k = 0; k < whole; k += W) store_as<DTYPE>(to + k * SIZE, result(k, centre + k * SIZE));
      if (whole < p.d) {
        store_as<DTYPE>(ends[1], result(whole, ends[0]));
        __builtin_memcpy(to + whole * SIZE, ends[1], (p.d - whole) * SIZE);
      }
    }
  }
};

void class_task(const Problem& p, const Rows& r, const ClassTask& task) {
  const Layout l = layout(p.d);
  const TileState tiles;
  Buffers memory{0, task.scratch};
  const ClassBuffers m(memory, l);
  float *tile = (float*)m.tile, *v = (float*)m.v, *db = (float*)m.db, *bias = (float*)m.bias, *factor = (float*)m.factor;
  const bool need_bias = task.db;
  const ClassEpilogue plain = MK_CHOOSE(p.form, choose_class, false, need_bias), with_own = MK_CHOOSE(p.form, choose_class, true, need_bias);
  const ClassEpilogue kept_plain = choose_class<IDENTITY, true>(false, need_bias), kept_own = choose_class<IDENTITY, true>(true, need_bias);
  for (int64_t first = task.first_class; first < task.last_class; first += CLASSES) {
    const int64_t count = task.last_class - first < CLASSES ? task.last_class - first : CLASSES;
    const float* known = p.normalize_weight ? task.class_factor + first : nullptr;
    const int64_t slab = first / CLASSES;
    const bool from_kept = slab < task.kept_slabs;
    if (!from_kept)
      with_dtype(p.w_dtype, PackSlab{p, first, count, factor, known, m.centres, nullptr, l});
    else if (known)
      __builtin_memcpy(factor, known, count * 4);
    slab_bias(p, first, count, bias);
    if (need_bias) __builtin_memset(db, 0, CLASSES * W * 4);
    for (int64_t block = 0; block < p.n; block += ROWS) {
      const int64_t rows = up(p.n - block < ROWS ? p.n - block : ROWS, PANEL);
      for (int64_t i = 0; i < rows; i += PANEL) {
        const int64_t row = block + i;
        char* kept = from_kept ? (char*)task.kept + (slab * up(p.n, PANEL) + row) / PANEL * l.kept : nullptr;
        if (!from_kept) cosines(l, count, m.centres, r.along + row * l.along, tile);
        const bool own = own_inside(r, row, first, count);
        const ClassEpilogue epilogue = from_kept ? (own ? kept_own : kept_plain) : own ? with_own : plain;
        epilogue(p, r, row, {first, (int)count, bias, factor, tile, nullptr, kept}, m.g + i / PER_UNIT * PLANES * CLASSES, db);
      }
      if (task.dw) accumulate_v(l, rows / PER_UNIT, count, m.g, r.across + block * l.across, v, block > 0);
    }
    if (task.dw) with_dtype(p.w_dtype, WriteGradient{p, first, count, factor, r.unit, v, task.dw, l});
    if (need_bias)
      for (int64_t j = 0; j < count; ++j) task.db[first + j] = sum(load<V>(db + j * W)) * r.unit;
  }
}

void pack_along(const Problem& p, uint32_t* out) {
  const Layout l = layout(p.d);
  with_dtype(p.x_dtype, PackAlong{p, out, l});
}

void pack_across(const Problem& p, uint32_t* out) {
  const Layout l = layout(p.d);
  with_dtype(p.x_dtype, PackAcross{p, out, l});
}

}  // namespace

// Without planes, pairs of bfloat16 hold no wider number; with them, a bfloat16 one would be two zeros too many.
constexpr int DTYPES = !MK_PAIRS ? 7 : MK_SPLIT ? 1 << FLOAT32 | 1 << FLOAT16 : 1 << BFLOAT16;

extern const Kernels kernels = {MK_NAME, DTYPES, layout, pack_along, pack_across, row_task, class_task};

}  // namespace MK_NAMESPACE
}  // namespace mk
