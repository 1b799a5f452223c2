// The two passes over one block of rows and one range of classes, for one instruction set. A level_*.cpp includes this after defining
//
//   MK_NAMESPACE    its namespace; everything here is internal to it, so that the linker can never merge code of two instruction sets
//   MK_WIDTH        floats in a vector
//   MK_MR           rows of a register tile, which is MK_MR x 2 vectors
//   MK_PAIRS        0: float32 products; 1: products of bfloat16 pairs
//   MK_TILES        1: products on AMX tiles
//   MK_SPLIT        1: each float32 number split into a sum of bfloat16 numbers, so that AMX bfloat16 products reach float32 accuracy
//
// Rows are the fastest index of every tile of logits, so that the epilogues, including the running maximum, are plain vertical arithmetic.
//
// The operands of the products are stored in units of 32 bits: a float, or two bfloat16 that are neighbors along the summed index. Any pair
// may be neighbors as long as both operands agree: along D they are d and d + 1 (d + 16 with planes), along the rows i and i + 16, along
// the classes j and j + 1.
//
//   along   [panel of 32 rows][k/16][plane][16][32]   rows, summed over D; packed once
//   across  [row unit][plane][ldn]                    rows, summed over rows; packed once
//   centers [k/16][plane][classes][16]                a chunk of normalized class centers, summed over D
//   values  [class unit][plane][ldn]                  the same chunk, summed over classes
//   tile    [classes][32 rows]                        raw products
//   weights [class unit][plane][32 rows]              the weights of the row pass; without planes they overwrite the tile
//   g       [row unit/16][plane][classes][16]         the weights of the class pass
//
// MK_SPLIT uses three planes, every other set one. With v = v0 + v1 + v2, where each term is what the terms before leave of v, rounded to
// bfloat16, a number has 24 bits, and a product is the sum of the six products of planes whose indices sum to 2 or less. The omitted terms
// are about as large as the rounding of float32 itself.
//
// Plain bfloat16 products take the class centers unnormalized: a bfloat16 center that is normalized first would be rounded twice. Very long
// and very short centers are multiplied by a power of two, since neither they nor their factors may leave bfloat16's normal numbers.

#include "../scalar.h"
#include "interface.h"

namespace mk {
namespace MK_NAMESPACE {
namespace {

#include "simd.h"

constexpr int CLASSES = 128;
constexpr int ROWS = 256;
constexpr int PER_UNIT = MK_PAIRS ? 2 : 1;
constexpr int STRIP = 16;               // contiguous units of k: a cache line, and the width of an AMX tile
constexpr int DIMS = STRIP * PER_UNIT;  // numbers in a strip
constexpr int PLANES = MK_SPLIT ? 3 : 1;
constexpr bool RAW = MK_PAIRS && !MK_SPLIT;            // centers are packed unnormalized, and the epilogues apply their factors
constexpr int SAVED_DTYPE = RAW ? BFLOAT16 : FLOAT32;  // the dtype of the weights that the row pass saves for the class pass
constexpr int SAVED_BYTES = RAW ? 2 : 4;
static_assert(PANEL % (2 * W) == 0 || PANEL == 2 * W, "a panel is whole register tiles");

constexpr int64_t up(int64_t v, int64_t step) { return (v + step - 1) / step * step; }

#include "products.h"

// Loads DIMS numbers of a row from `p` as floats; only `left` of them exist, the rest are 0.
template <int DTYPE>
MK_INLINE void load_strip(const char* p, int64_t left, float* out) {
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

// Each lane rounded to bfloat16, as the bits of a float; ties away from zero.
MK_INLINE N rounded(V v) { return (bits<N>(v) + 0x8000u) & 0xffff0000u; }

// Pairs of bfloat16, `low` first, from lanes that are already rounded.
MK_INLINE N pairs(N low, N high) { return low >> 16 | high; }

// The next plane of `v`, rounded; `v` becomes the remainder, which is not used after the last plane.
MK_INLINE N next_plane(V& v) {
  const N out = rounded(v);
  if (MK_SPLIT) v -= bits<V>(out);
  return out;
}

// Stores W pairs in `planes` planes, `stride` units apart.
MK_INLINE void store_pairs(V low, V high, int planes, int64_t stride, uint32_t* to) {
  for (int q = 0; q < planes; ++q, to += stride) {
    const N l = next_plane(low);
    store(to, pairs(l, next_plane(high)));
  }
}

#endif

// Stores DIMS floats as STRIP units in each of PLANES planes.
MK_INLINE void store_units(const float* v, [[maybe_unused]] int64_t plane, uint32_t* to) {
#if MK_SPLIT
  store_pairs(load<V>(v), load<V>(v + 16), PLANES, plane, to);
#elif MK_PAIRS
  store(to, _mm512_cvtne2ps_pbh(load<__m512>(v + 16), load<__m512>(v)));
#else
  for (int i = 0; i < STRIP; i += W) store(to + i, load<V>(v + i));
#endif
}

// Stores DIMS columns of PER_UNIT rows (`second` is not read if a unit is one number) as DIMS units in each of PLANES planes.
MK_INLINE void store_columns(const float* first, [[maybe_unused]] const float* second, [[maybe_unused]] int64_t plane, uint32_t* to) {
#if MK_PAIRS
  for (int i = 0; i < DIMS; i += W) store_pairs(load<V>(first + i), load<V>(second + i), PLANES, plane, to + i);
#else
  for (int i = 0; i < DIMS; i += W) store(to + i, load<V>(first + i));
#endif
}

// Calls f.run<DTYPE>() for a dtype that is known at run time.
template <class F>
MK_INLINE void with_dtype(int dtype, F f) {
  switch (dtype) {
    case FLOAT32: return f.template run<FLOAT32>();
    case BFLOAT16: return f.template run<BFLOAT16>();
    default: return f.template run<FLOAT16>();
  }
}

// 1/|w|, or 0 for a center whose norm is below TINY. If the plain sum of squares is too small or too large, it is computed again in double,
// of the center divided by its largest element.
template <int DTYPE>
float inverse_norm(const char* row, int64_t d) {
  constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
  float strip[DIMS];
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
    load_strip<DTYPE>(row + k * SIZE, d - k, strip);
    for (int i = 0; i < DIMS; i += W) {
      const V v = load<V>(strip + i);
      squares[(i / W) & 1] += v * v;
    }
  }
  const float plain = sum(squares[0] + squares[1]);
  if (plain > 1e-20f && plain < 1e30f) return (float)(1.0 / __builtin_sqrt((double)plain));
  V largest_lanes = {};
  for (int64_t k = 0; k < d; k += DIMS) {
    load_strip<DTYPE>(row + k * SIZE, d - k, strip);
    for (int i = 0; i < DIMS; i += W) {
      const V v = load<V>(strip + i);
      largest_lanes = larger(largest_lanes, v < 0.0f ? -v : v);
    }
  }
  float largest = 0;
  for (int i = 0; i < W; ++i) largest = largest_lanes[i] > largest || largest_lanes[i] != largest_lanes[i] ? largest_lanes[i] : largest;
  if (largest == 0) return 0.0f;
  double total = 0;
  for (int64_t k = 0; k < d; k += DIMS) {
    load_strip<DTYPE>(row + k * SIZE, d - k, strip);
    for (int i = 0; i < DIMS; ++i) {
      const double v = (double)strip[i] / largest;
      total += v * v;
    }
  }
  const double norm = largest * __builtin_sqrt(total);
  return norm < TINY ? 0.0f : (float)(1.0 / norm);
}

#if MK_PAIRS && !MK_SPLIT

// Loads DIMS numbers of a row, times `pow2`, as a cache line of bfloat16; only `left` of them exist, the rest are 0.
template <int DTYPE>
MK_INLINE __m512i load_line(const char* p, int64_t left, float pow2) {
  const bool as_is = DTYPE == BFLOAT16 && pow2 == 1.0f;
  if (as_is && left >= DIMS) return load<__m512i>(p);
  alignas(64) char line[64] = {};
  if (as_is) {
    if (left > 0) __builtin_memcpy(line, p, left * 2);
  } else {
    float strip[DIMS];
    load_strip<DTYPE>(p, left, strip);
    for (int i = 0; i < DIMS; i += W) store(strip + i, load<V>(strip + i) * pow2);
    store_units(strip, 0, (uint32_t*)line);
  }
  return load<__m512i>(line);
}

// A power of two that a center with this inverse of its norm is packed times; 1 for ordinary norms.
inline float packed_pow2(float inverse) {
  if (inverse == 0 || (inverse > 1e-15f && inverse < 1e15f)) return 1.0f;
  int exponent;
  (void)__builtin_frexpf(inverse, &exponent);
  return __builtin_ldexpf(1.0f, exponent);
}

// Interleaves two lines of 32 bfloat16 into 32 pairs: the pair of column i is (a[i], b[i]).
MK_INLINE void interleave(__m512i a, __m512i b, uint32_t* out) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                                         34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_or_si512(first, _mm512_set1_epi16(16));
  store(out, _mm512_permutex2var_epi16(a, first, b));
  store(out + 16, _mm512_permutex2var_epi16(a, second, b));
}

#endif

// Packs a chunk of class centers into `centers` and (unless null) `values`, with zeros past the last class. Unless RAW, the packed centers
// are normalized.
struct PackChunk {
  const PassInputs& p;
  int64_t first, count;
  float* factor;       // (count up to a multiple of 32) receives what takes a packed center to a normalized one where RAW
  const float* known;  // the inverse norms that were computed before, or null
  float* inverse;      // receives them, or null
  uint32_t* centers;
  uint32_t* values;
  const Layout& l;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    const int64_t pitch = p.w_stride * SIZE;
    const char* row = (const char*)p.w + first * pitch;
    for (int64_t j = 0; j < up(count, 32); j += 2, row += 2 * pitch) {
      [[maybe_unused]] float pow2[2] = {1.0f, 1.0f};
      for (int h = 0; h < 2; ++h) {
        const bool normalize = j + h < count && p.normalize_weight;
        factor[j + h] = !normalize ? 1.0f : known ? known[j + h] : inverse_norm<DTYPE>(row + h * pitch, p.d);
        if (normalize && inverse) inverse[j + h] = factor[j + h];
#if MK_PAIRS && !MK_SPLIT
        if (normalize) pow2[h] = packed_pow2(factor[j + h]), factor[j + h] /= pow2[h];
#endif
      }
      for (int64_t k = 0; k < l.dk; k += STRIP) {
        const int64_t d = k * PER_UNIT, left[2] = {j < count ? p.d - d : 0, j + 1 < count ? p.d - d : 0};
        uint32_t* to = centers + k * PLANES * CLASSES + j * STRIP;
#if MK_PAIRS && !MK_SPLIT
        const __m512i line[2] = {load_line<DTYPE>(row + d * SIZE, left[0], pow2[0]),
                                 load_line<DTYPE>(row + pitch + d * SIZE, left[1], pow2[1])};
        store(to, line[0]), store(to + STRIP, line[1]);
        if (values) interleave(line[0], line[1], values + j / 2 * l.ldn + d);
#else
        float strip[2][DIMS];
        for (int h = 0; h < 2; ++h) {
          load_strip<DTYPE>(row + h * pitch + d * SIZE, left[h], strip[h]);
          if (p.normalize_weight)
            for (int i = 0; i < DIMS; i += W) store(strip[h] + i, load<V>(strip[h] + i) * factor[j + h]);
          store_units(strip[h], CLASSES * STRIP, to + h * STRIP);
        }
        if (!values) continue;
        for (int h = 0; h < 2; h += PER_UNIT) store_columns(strip[h], strip[1], l.ldn, values + (j + h) / PER_UNIT * PLANES * l.ldn + d);
#endif
      }
    }
  }
};

struct PackAlong {
  const PassInputs& p;
  uint32_t* out;
  const Layout& l;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    float strip[DIMS];
    uint32_t units[PLANES * STRIP];
    for (int64_t i = 0; i < up(p.n, PANEL); ++i) {
      uint32_t* to = out + i / PANEL * l.dk * PLANES * PANEL + i % PANEL;
      for (int64_t k = 0; k < l.dk; k += STRIP) {
        const int64_t d = k * PER_UNIT;
        load_strip<DTYPE>((const char*)p.x + (i * p.d + d) * SIZE, i < p.n ? p.d - d : 0, strip);
        store_units(strip, STRIP, units);
        for (int u = 0; u < PLANES * STRIP; ++u) to[(k * PLANES + u) * PANEL] = units[u];
      }
    }
  }
};

struct PackAcross {
  const PassInputs& p;
  uint32_t* out;
  const Layout& l;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    float strip[2][DIMS];
    for (int64_t u = 0; u < up(p.n, PANEL) / PER_UNIT; ++u) {
      const int64_t first = MK_PAIRS ? u / 16 * PANEL + u % 16 : u;
      for (int64_t k = 0; k < up(p.d, 32); k += DIMS) {
        for (int h = 0; h < PER_UNIT; ++h) {
          const int64_t i = first + 16 * h;
          load_strip<DTYPE>((const char*)p.x + (i * p.d + k) * SIZE, i < p.n ? p.d - k : 0, strip[h]);
        }
        store_columns(strip[0], strip[1], l.ldn, out + u * PLANES * l.ldn + k);
      }
    }
  }
};

// The row vectors of W rows.
struct Lanes {
  V factor, slope, scale, threshold, t;
  I label;

  MK_INLINE Lanes at(const Rows& r, int64_t row) {
    return {load<V>(r.factor + row),    load<V>(r.slope + row), load<V>(r.scale + row),
            load<V>(r.threshold + row), load<V>(r.t + row),     load<I>(r.label + row)};
  }
  template <int NON_TARGET>
  MK_INLINE V logit_of(const Lanes& l, V raw, float bias) {
    if constexpr (NON_TARGET == IDENTITY) return raw * l.slope + bias;
    return l.scale * nontarget_value<NON_TARGET>(raw * l.factor, l.threshold, l.t) + bias;
  }
};

// The tile of one panel and one chunk, as the epilogues see it.
struct Chunk {
  int64_t first_class;
  int count;            // classes, even; a padded class has a bias of -inf
  const float* bias;    // in the units of the logits: of log 2, or natural for SOFTPLUS_SUM
  const float* factor;  // of the centers
  float* tile;
  uint32_t* weights;
  char* saved;   // of this panel and chunk, or null
  bool several;  // whether keep_winners() has marked the products of the centers that are not their class's

  // W raw products of class j, times the center's factor if it was not applied when packing.
  V raw(int j, int row) const {
    const V v = load<V>(tile + j * PANEL + row);
    return RAW ? v * factor[j] : v;
  }
  // Whether each of W products was marked.
  I lost(int j, int row) const { return load<V>(tile + j * PANEL + row) == broadcast(-INF); }
  // Stores the weights of classes j and j + 1 over W rows. They may overwrite the raw products of these classes, which were read before.
  void put(int j, int row, V first, V second) const {
#if MK_PAIRS
    if (RAW) first *= factor[j], second *= factor[j + 1];
    store_pairs(first, second, PLANES, PANEL, weights + j / 2 * PLANES * PANEL + row);
#else
    store(weights + j * PANEL + row, first);
    store(weights + (j + 1) * PANEL + row, second);
#endif
  }
  // What the row pass saves for the class pass: W weights of class j, and the base that their exponentials are relative to.
  void save_weight(int j, int row, V v) const { store_as<SAVED_DTYPE>(saved + (j * PANEL + row) * SAVED_BYTES, v); }
  V saved_weight(int j, int row) const { return load_as<SAVED_DTYPE>(saved + (j * PANEL + row) * SAVED_BYTES); }
  float* saved_base() const { return (float*)(saved + CLASSES * PANEL * SAVED_BYTES); }
};

// With several centers a class, each row keeps the highest of their products, the first of equals, or, of its own class, its label's. The
// others become -inf, and have no part in anything.
void keep_winners(const Rows& r, int64_t row, const Chunk& s, int64_t sub_centers) {
  for (int g = 0; g < PANEL; g += W) {
    const I label = load<I>(r.label + row + g) - (int32_t)s.first_class;
    for (int first = 0; first + sub_centers <= s.count; first += (int)sub_centers) {
      V best = s.raw(first, g);
      I winner = I{} + first;
      for (int j = first + 1; j < first + sub_centers; ++j) {
        const V v = s.raw(j, g);
        const I higher = (v > best) | ((v != v) & (best == best));
        best = higher ? v : best;
        winner = higher ? I{} + j : winner;
      }
      winner = (label >= first) & (label < first + (int)sub_centers) ? label : winner;
      for (int j = first; j < first + sub_centers; ++j) {
        float* at = s.tile + j * PANEL + g;
        store(at, winner == j ? load<V>(at) : broadcast(-INF));
      }
    }
  }
}

// One panel of rows against one chunk: updates the running maximum and sums, and turns the raw products into weights.
// `decay` (PANEL) receives the factor that the earlier sums must be multiplied by; returns whether any of them is not 1.
template <int NON_TARGET, bool OWN>
bool row_epilogue(const Rows& r, const RowTask& task, int64_t row, const Chunk& s, float* decay) {
  const V none = broadcast(-INF);
  const int64_t state = row - task.first_row;
  bool moved = false;
  for (int g = 0; g < PANEL; g += W) {
    const Lanes l = Lanes::at(r, row + g);
    const I own = l.label - (int32_t)s.first_class;
    V highest[2] = {none, none}, max_logit[2] = {none, none};
    for (int j = 0; j < s.count; j += 2)
      for (int h = 0; h < 2; ++h) {
        const V raw = s.raw(j + h, g);
        V z = Lanes::logit_of<NON_TARGET>(l, raw, s.bias[j + h]);
        if (s.several) z = s.lost(j + h, g) ? none : z;
        if constexpr (OWN) z = own == j + h ? none : z;
        highest[h] = larger(highest[h], z);
        if constexpr (NON_TARGET != IDENTITY) {
          V plain = raw * l.slope + s.bias[j + h];
          if (s.several) plain = s.lost(j + h, g) ? none : plain;
          if constexpr (OWN) plain = own == j + h ? none : plain;
          max_logit[h] = larger(max_logit[h], plain);
        }
      }
    const V before = load<V>(task.running_max + state + g);
    const V running_max = larger(larger(highest[0], highest[1]), before);
    const V base = finite_max(running_max), factor = exp2(before - base);
    store(task.running_max + state + g, running_max);
    store(decay + g, factor);
    if (s.saved) store(s.saved_base() + g, base);
    if constexpr (NON_TARGET != IDENTITY)
      store(task.max_logit + state + g, larger(larger(max_logit[0], max_logit[1]), load<V>(task.max_logit + state + g)));

    V total[2] = {}, cos_sum[2] = {};
    for (int j = 0; j < s.count; j += 2) {
      V weight[2];
      for (int h = 0; h < 2; ++h) {
        V raw = s.raw(j + h, g);
        V q = exp2(Lanes::logit_of<NON_TARGET>(l, raw, s.bias[j + h]) - base);
        if (s.several) {
          const I lost = s.lost(j + h, g);
          q = lost ? V{} : q, raw = lost ? V{} : raw;
        }
        if constexpr (OWN) q = own == j + h ? V{} : q;
        total[h] += q;
        weight[h] = q;
        if constexpr (NON_TARGET != IDENTITY) {
          const V c = raw * l.factor;
          cos_sum[h] += q * nontarget_value<NON_TARGET>(c, l.threshold, l.t);
          weight[h] = q * nontarget_slope<NON_TARGET>(c, l.threshold, l.t);
        }
        if (s.saved) s.save_weight(j + h, g, weight[h]);
      }
      s.put(j, g, weight[0], weight[1]);
    }
    float sums[2][W], decays[W];
    store(sums[0], total[0] + total[1]);
    store(sums[1], cos_sum[0] + cos_sum[1]);
    store(decays, factor);
    for (int i = 0; i < W; ++i) {
      double& whole = task.total[state + g + i];
      whole = whole * decays[i] + sums[0][i];
      if (NON_TARGET != IDENTITY && task.need_cos) task.cos_sum[state + g + i] = task.cos_sum[state + g + i] * decays[i] + sums[1][i];
      moved |= decays[i] != 1.0f;
    }
  }
  return moved;
}

// The same for the sum of the logits: every weight is N'(c).
template <int NON_TARGET, bool OWN>
bool logit_sum_epilogue(const Rows& r, const RowTask& task, int64_t row, const Chunk& s, float*) {
  const int64_t state = row - task.first_row;
  for (int g = 0; g < PANEL; g += W) {
    const Lanes l = Lanes::at(r, row + g);
    const I own = l.label - (int32_t)s.first_class;
    V total = {}, cos_sum = {};
    for (int j = 0; j < s.count; j += 2) {
      V weight[2] = {};
      for (int h = 0; h < 2 && s.bias[j + h] != -INF; ++h) {
        V c = s.raw(j + h, g) * l.factor, one = V{} + 1.0f;
        if (s.several) {
          const I lost = s.lost(j + h, g);
          one = lost ? V{} : one, c = lost ? V{} : c;
        }
        if constexpr (OWN) one = own == j + h ? V{} : one;
        const V value = nontarget_value<NON_TARGET>(c, l.threshold, l.t);
        total += one * (l.scale * value + s.bias[j + h]);
        cos_sum += one * value;
        weight[h] = one * nontarget_slope<NON_TARGET>(c, l.threshold, l.t);
      }
      s.put(j, g, weight[0], weight[1]);
    }
    for (int i = 0; i < W; ++i) {
      task.total[state + g + i] += (double)total[i] * LN2;
      if (task.need_cos) task.cos_sum[state + g + i] += cos_sum[i];
    }
  }
  return false;
}

// exp(-|z|). The terms of a sum of softplus are as wrong, relatively, as their exponents absolutely, and with one error in common they
// would not average out: hence z comes in natural units, whose factors are those given, and LOG2E to more digits than a float has.
MK_INLINE V exp_of_minus(V z) {
  const V a = z < 0.0f ? z : -z;
  return exp2(a * LOG2E + a * LOG2E_REST);
}

// The same for the sum of softplus: every weight is sigmoid(z) N'(c), with logits in natural units. No maximum is needed, since nothing
// overflows.
template <int NON_TARGET, bool OWN>
bool softplus_epilogue(const Rows& r, const RowTask& task, int64_t row, const Chunk& s, float*) {
  const V none = broadcast(-INF);
  const int64_t state = row - task.first_row;
  for (int g = 0; g < PANEL; g += W) {
    const Lanes l = Lanes::at(r, row + g);
    const I own = l.label - (int32_t)s.first_class;
    V total[2] = {}, cos_sum[2] = {}, max_logit[2] = {none, none};
    if (s.saved) store(s.saved_base() + g, V{});
    for (int j = 0; j < s.count; j += 2) {
      V weight[2];
      for (int h = 0; h < 2; ++h) {
        V raw = s.raw(j + h, g);
        V z = Lanes::logit_of<NON_TARGET>(l, raw, s.bias[j + h]), plain = raw * l.slope + s.bias[j + h];
        if (s.several) {
          const I lost = s.lost(j + h, g);
          z = lost ? none : z, plain = lost ? none : plain, raw = lost ? V{} : raw;
        }
        if constexpr (OWN) z = own == j + h ? none : z, plain = own == j + h ? none : plain;
        const V c = raw * l.factor;
        max_logit[h] = larger(max_logit[h], plain);
        const V e = exp_of_minus(z), q = sigmoid_of(z, e);
        total[h] += larger(V{}, z) + log1p_of(e);
        cos_sum[h] += q * nontarget_value<NON_TARGET>(c, l.threshold, l.t);
        weight[h] = q * nontarget_slope<NON_TARGET>(c, l.threshold, l.t);
        if (s.saved) s.save_weight(j + h, g, weight[h]);
      }
      s.put(j, g, weight[0], weight[1]);
    }
    store(task.max_logit + state + g, larger(larger(max_logit[0], max_logit[1]), load<V>(task.max_logit + state + g)));
    const V sums = total[0] + total[1], cos = cos_sum[0] + cos_sum[1];
    for (int i = 0; i < W; ++i) {
      task.total[state + g + i] += sums[i];
      if (task.need_cos) task.cos_sum[state + g + i] += cos[i];
    }
  }
  return false;
}

// One panel of rows against one chunk in the class pass: the raw products, or the saved weights, become G f, in `out`, and the panel's
// terms are added to db. Saved weights already contain N'(c): for them the transform is always the identity.
template <int NON_TARGET, bool OWN, bool BIAS, bool SAVED, int REDUCTION>
void class_epilogue(const Rows& r, int64_t row, const Chunk& s, uint32_t* out, float* db) {
  static_assert(!SAVED || NON_TARGET == IDENTITY, "saved weights contain the slope of the transform");
  // A logit exceeds lse only by rounding, but for logits of 1e18 that alone could overflow the exponential.
  const auto softmax_of = [](V lse, V logit) { return exp2(-larger(lse - logit, broadcast(-1.0f))); };
  for (int g = 0; g < PANEL; g += 2 * W) {
    Lanes l[2];
    V lse[2], d_lse[2], d_logit_sum[2], d_target_cos[2], from_base[2];
    for (int h = 0; h < 2; ++h) {
      const int64_t at = row + g + h * W;
      l[h] = Lanes::at(r, at);
      lse[h] = load<V>(r.lse + at), d_lse[h] = load<V>(r.d_lse + at), d_logit_sum[h] = load<V>(r.d_logit_sum + at);
      d_target_cos[h] = load<V>(r.d_target_cos + at);
      if constexpr (SAVED) from_base[h] = softmax_of(lse[h], load<V>(s.saved_base() + g + h * W));
    }
    for (int j = 0; j < s.count; ++j) {
      V weight[2];
      for (int h = 0; h < 2; ++h) {
        V raw = SAVED ? V{} : s.raw(j, g + h * W);
        const I own = l[h].label - (int32_t)s.first_class;
        I lost = {};
        if (!SAVED && s.several) {
          lost = s.lost(j, g + h * W);
          raw = lost ? V{} : raw;
        }
        V q;
        if constexpr (SAVED)
          q = s.saved_weight(j, g + h * W) * from_base[h];
        else if constexpr (REDUCTION == SOFTPLUS_SUM) {
          const V z = Lanes::logit_of<NON_TARGET>(l[h], raw, s.bias[j]);
          q = sigmoid_of(z, exp_of_minus(z));
        } else
          q = softmax_of(lse[h], Lanes::logit_of<NON_TARGET>(l[h], raw, s.bias[j]));
        V v = q * d_lse[h] + d_logit_sum[h];
        if constexpr (NON_TARGET != IDENTITY) v *= nontarget_slope<NON_TARGET>(raw * l[h].factor, l[h].threshold, l[h].t);
        if (!SAVED && s.several) v = lost ? V{} : v;
        if constexpr (OWN) v = own == j ? d_target_cos[h] : v;
        weight[h] = v;
        if constexpr (BIAS) {
          const int64_t at = row + g + h * W;
          V d_bias = q * load<V>(r.bias_d_lse + at) + load<V>(r.bias_d_logit_sum + at);
          if (!SAVED && s.several) d_bias = lost ? V{} : d_bias;
          if constexpr (NON_TARGET != IDENTITY) d_bias *= bias_slope<NON_TARGET>(raw * l[h].factor, l[h].threshold, l[h].t);
          if constexpr (OWN) d_bias = own == j ? load<V>(r.d_target_bias + at) : d_bias;
          store(db + j * W, load<V>(db + j * W) + d_bias);
        }
      }
#if MK_PAIRS
      store_pairs(weight[0], weight[1], PLANES, CLASSES * STRIP, out + j * STRIP);
#else
      for (int h = 0; h < 2; ++h) store(out + (g + h * W) / STRIP * (CLASSES * STRIP) + j * STRIP + (g + h * W) % STRIP, weight[h]);
#endif
    }
  }
}

// Whether any row of the panel has its target in the chunk.
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

using RowEpilogue = bool (*)(const Rows&, const RowTask&, int64_t, const Chunk&, float*);
using ClassEpilogue = void (*)(const Rows&, int64_t, const Chunk&, uint32_t*, float*);

template <int NON_TARGET>
RowEpilogue choose_row(int reduction, bool own) {
  switch (reduction) {
    case LOGIT_SUM: return own ? logit_sum_epilogue<NON_TARGET, true> : logit_sum_epilogue<NON_TARGET, false>;
    case SOFTPLUS_SUM: return own ? softplus_epilogue<NON_TARGET, true> : softplus_epilogue<NON_TARGET, false>;
  }
  return own ? row_epilogue<NON_TARGET, true> : row_epilogue<NON_TARGET, false>;
}

template <int NON_TARGET, bool SAVED, int REDUCTION>
ClassEpilogue choose_class(bool own, bool bias) {
  if (bias)
    return own ? class_epilogue<NON_TARGET, true, true, SAVED, REDUCTION> : class_epilogue<NON_TARGET, false, true, SAVED, REDUCTION>;
  return own ? class_epilogue<NON_TARGET, true, false, SAVED, REDUCTION> : class_epilogue<NON_TARGET, false, false, SAVED, REDUCTION>;
}

RowEpilogue row_epilogue_of(int non_target, int reduction, bool own) {
  switch (non_target) {
#define MK_CASE(name) \
  case name: return choose_row<name>(reduction, own);
    MK_TRANSFORMS(MK_CASE)
#undef MK_CASE
  }
  return nullptr;
}

ClassEpilogue class_epilogue_of(int non_target, int reduction, bool own, bool bias) {
  switch (non_target) {
#define MK_CASE(name)                                                                     \
  case name:                                                                              \
    return reduction == SOFTPLUS_SUM ? choose_class<name, false, SOFTPLUS_SUM>(own, bias) \
                                     : choose_class<name, false, LOG_SUM_EXP>(own, bias);
    MK_TRANSFORMS(MK_CASE)
#undef MK_CASE
  }
  return nullptr;
}

// Carves the buffers of a task out of its scratch memory; with no memory it only counts their size.
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
  uint32_t *centers, *values, *tile, *weights, *spare, *bias, *factor, *decay;

  RowBuffers(Buffers& b, const Layout& l) {
    centers = b.take(CLASSES * l.dk * PLANES);
    values = b.take(CLASSES / PER_UNIT * PLANES * l.ldn);
    tile = b.take(CLASSES * PANEL);
    weights = MK_SPLIT ? b.take(CLASSES / 2 * PLANES * PANEL) : tile;
    spare = b.take(CLASSES / 2 * PLANES * PANEL);
    bias = b.take(CLASSES), factor = b.take(CLASSES), decay = b.take(PANEL);
  }
};

struct ClassBuffers {
  uint32_t *centers, *tile, *g, *v, *db, *bias, *factor, *gradient;

  ClassBuffers(Buffers& b, const Layout& l) {
    centers = b.take(CLASSES * l.dk * PLANES);
    tile = b.take(CLASSES * PANEL);
    g = b.take(ROWS / PER_UNIT * PLANES * CLASSES);
    v = b.take(CLASSES * l.ldn);
    db = b.take(CLASSES * W), bias = b.take(CLASSES), factor = b.take(CLASSES), gradient = b.take(l.ldn);
  }
};

Layout layout(int64_t d) {
  Layout l{};
  l.dk = up(d, 32) / PER_UNIT;
  l.ldn = up(d, 32) + STRIP;  // the extra strip keeps row strides away from powers of two
  l.classes = CLASSES;
  l.rows = ROWS;
  l.along = l.dk * PLANES;
  l.across = l.ldn * PLANES / PER_UNIT;
  Buffers row{}, cls{};
  RowBuffers(row, l), ClassBuffers(cls, l);
  l.row_scratch = row.used, l.class_scratch = cls.used;
  l.saved = CLASSES * PANEL * SAVED_BYTES + PANEL * 4;
  return l;
}

// The biases of the chunk in the units of the reduction's logits; -inf for padded classes, so that their weights are 0.
void chunk_bias(const PassInputs& p, int reduction, int64_t first, int64_t count, float* out) {
  const float unit = reduction == SOFTPLUS_SUM ? 1.0f : LOG2E;
  for (int64_t j = 0; j < CLASSES; ++j) out[j] = j >= count ? -INF : p.bias ? p.bias[(first + j) / p.sub_centers] * unit : 0.0f;
}

// The centers of a chunk: those of whole classes.
int64_t chunk_width(const PassInputs& p) { return CLASSES / p.sub_centers * p.sub_centers; }

void row_task(const PassInputs& p, const Rows& r, const RowTask& task) {
  const Layout l = layout(p.d);
  const TileState tiles;
  Buffers memory{0, task.scratch};
  const RowBuffers m(memory, l);
  float *tile = (float*)m.tile, *bias = (float*)m.bias, *factor = (float*)m.factor, *decay = (float*)m.decay;
  const RowEpilogue plain = row_epilogue_of(p.non_target, task.reduction, false);
  const RowEpilogue with_own = row_epilogue_of(p.non_target, task.reduction, true);
  const int64_t width = chunk_width(p);
  for (int64_t first = task.first_class; first < task.last_class; first += width) {
    if (task.interrupt.asked && task.interrupt.asked(task.interrupt.context)) return;
    const int64_t count = task.last_class - first < width ? task.last_class - first : width, even = up(count, 2);
    float* inverse = task.class_factor ? task.class_factor + first : nullptr;
    with_dtype(p.w_dtype, PackChunk{p, first, count, factor, nullptr, inverse, m.centers, task.need_center ? m.values : nullptr, l});
    chunk_bias(p, task.reduction, first, count, bias);
    const int64_t chunk = first / width;
    for (int64_t row = task.first_row; row < task.last_row; row += PANEL) {
      char* saved = chunk < task.saved_chunks ? task.saved + (chunk * up(p.n, PANEL) + row) / PANEL * l.saved : nullptr;
      cosines(l, even, m.centers, r.along + row * l.along, tile);
      const bool own = own_inside(r, row, first, count), several = p.sub_centers > 1;
      const Chunk whole{first, (int)even, bias, factor, tile, m.weights, saved, several};
      if (several) keep_winners(r, row, whole, p.sub_centers);
      const bool moved = (own ? with_own : plain)(r, task, row, whole, decay);
      if (!task.need_center) continue;
      float* u = task.u + (row - task.first_row) * l.ldn;
      if (moved)
        for (int i = 0; i < PANEL; ++i)
          if (decay[i] != 1.0f)
            for (int64_t k = 0; k < l.ldn; k += W) store(u + i * l.ldn + k, load<V>(u + i * l.ldn + k) * decay[i]);
      accumulate_u(l, even, m.weights, m.spare, m.values, u);
    }
  }
}

#include "update.h"

// Writes dw of one chunk from v = G^T x, or updates its centers with it.
struct WriteGradient {
  const PassInputs& p;
  int64_t first, count;
  const float* inverse;  // of the centers' norms, or null
  float pow2;            // Rows::pow2
  const float* v;
  void* d_weight;        // or null where there is an update
  const Update* update;  // or null
  float* gradient;       // a row of floats, where there is an update
  const Layout& l;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    const RowUpdate update_row = update ? row_update_of(*update) : nullptr;
    Corrections corrections;
    for (int64_t j = 0; j < count; ++j) {
      const float* row = v + j * l.ldn;
      const char* center = (const char*)p.w + (first + j) * p.w_stride * SIZE;
      char* to = (char*)d_weight + (first + j) * p.d * SIZE;
      const int64_t whole = p.d / W * W;
      char ends[2][W * SIZE] = {};  // the last elements, for which a whole vector would reach past the row
      __builtin_memcpy(ends[0], center + whole * SIZE, (p.d - whole) * SIZE);
      V a = {}, dot = {};
      if (p.normalize_weight) {
        a = broadcast(inverse[j]);
        V dots[2] = {};
        int64_t k = 0;
        for (; k + 2 * W <= whole; k += 2 * W)
          for (int h = 0; h < 2; ++h) dots[h] += load<V>(row + k + h * W) * (load_as<DTYPE>(center + (k + h * W) * SIZE) * a);
        if (k < whole) dots[0] += load<V>(row + k) * (load_as<DTYPE>(center + k * SIZE) * a);
        if (whole < p.d) dots[1] += load<V>(row + whole) * (load_as<DTYPE>(ends[0]) * a);
        dot = broadcast(sum(dots[0] + dots[1]));
      }
      const auto result = [&](int64_t k, const char* w) {
        const V mine = load<V>(row + k);
        return (p.normalize_weight ? through_norm(mine, dot, load_as<DTYPE>(w) * a, a) : mine) * pow2;
      };
      if (update) {
        for (int64_t k = 0; k < whole; k += W) store(gradient + k, result(k, center + k * SIZE));
        if (whole < p.d) store(gradient + whole, result(whole, ends[0]));
        update_row(*update, first + j, gradient, corrections);
        continue;
      }
      for (int64_t k = 0; k < whole; k += W) store_as<DTYPE>(to + k * SIZE, result(k, center + k * SIZE));
      if (whole < p.d) {
        store_as<DTYPE>(ends[1], result(whole, ends[0]));
        __builtin_memcpy(to + whole * SIZE, ends[1], (p.d - whole) * SIZE);
      }
    }
  }
};

void class_task(const PassInputs& p, const Rows& r, const ClassTask& task) {
  const Layout l = layout(p.d);
  const TileState tiles;
  Buffers memory{0, task.scratch};
  const ClassBuffers m(memory, l);
  float *tile = (float*)m.tile, *v = (float*)m.v, *db = (float*)m.db, *bias = (float*)m.bias, *factor = (float*)m.factor;
  const bool need_bias = task.d_bias;
  const ClassEpilogue plain = class_epilogue_of(p.non_target, task.reduction, false, need_bias);
  const ClassEpilogue with_own = class_epilogue_of(p.non_target, task.reduction, true, need_bias);
  const ClassEpilogue saved_plain = choose_class<IDENTITY, true, LOG_SUM_EXP>(false, need_bias),
                      saved_own = choose_class<IDENTITY, true, LOG_SUM_EXP>(true, need_bias);
  const int64_t width = chunk_width(p);
  for (int64_t first = task.first_class; first < task.last_class; first += width) {
    if (task.interrupt.asked && task.interrupt.asked(task.interrupt.context)) return;
    const int64_t count = task.last_class - first < width ? task.last_class - first : width;
    const float* known = p.normalize_weight ? task.class_factor + first : nullptr;
    const int64_t chunk = first / width;
    const bool from_saved = chunk < task.saved_chunks;
    if (!from_saved) with_dtype(p.w_dtype, PackChunk{p, first, count, factor, known, nullptr, m.centers, nullptr, l});
    chunk_bias(p, task.reduction, first, count, bias);
    if (need_bias) __builtin_memset(db, 0, CLASSES * W * 4);
    for (int64_t block = 0; block < p.n; block += ROWS) {
      const int64_t rows = up(p.n - block < ROWS ? p.n - block : ROWS, PANEL);
      for (int64_t i = 0; i < rows; i += PANEL) {
        const int64_t row = block + i;
        char* saved = from_saved ? (char*)task.saved + (chunk * up(p.n, PANEL) + row) / PANEL * l.saved : nullptr;
        if (!from_saved) cosines(l, count, m.centers, r.along + row * l.along, tile);
        const bool own = own_inside(r, row, first, count);
        const ClassEpilogue epilogue = from_saved ? (own ? saved_own : saved_plain) : own ? with_own : plain;
        const Chunk whole{first, (int)count, bias, factor, tile, nullptr, saved, p.sub_centers > 1};
        if (whole.several && !from_saved) keep_winners(r, row, whole, p.sub_centers);
        epilogue(r, row, whole, m.g + i / PER_UNIT * PLANES * CLASSES, db);
      }
      if (task.d_weight || task.update) accumulate_v(l, rows / PER_UNIT, count, m.g, r.across + block * l.across, v, block > 0);
    }
    if (task.d_weight || task.update)
      with_dtype(p.w_dtype, WriteGradient{p, first, count, known, r.pow2, v, task.d_weight, task.update, (float*)m.gradient, l});
    if (need_bias)
      for (int64_t j = 0; j < count; j += p.sub_centers) {
        V total = load<V>(db + j * W);
        for (int64_t i = 1; i < p.sub_centers; ++i) total += load<V>(db + (j + i) * W);
        task.d_bias[(first + j) / p.sub_centers] = sum(total) * r.pow2;
      }
  }
}

void pack_along(const PassInputs& p, uint32_t* out) {
  const Layout l = layout(p.d);
  with_dtype(p.x_dtype, PackAlong{p, out, l});
}

void pack_across(const PassInputs& p, uint32_t* out) {
  const Layout l = layout(p.d);
  with_dtype(p.x_dtype, PackAcross{p, out, l});
}

#include "topk_kernel.h"

}  // namespace

// The embeddings' dtypes. Without planes, a pair holds nothing wider than bfloat16; with planes, two of a bfloat16 number's planes are 0.
constexpr int DTYPES = !MK_PAIRS ? 7 : MK_SPLIT ? 1 << FLOAT32 | 1 << FLOAT16 : 1 << BFLOAT16;

extern const Kernels kernels = {MK_NAME, DTYPES, layout, pack_along, pack_across, row_task, class_task, topk_task, update_task};

}  // namespace MK_NAMESPACE
}  // namespace mk
