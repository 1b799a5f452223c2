// The search for the k best classes of a block of rows in one range of classes; see TopkTask. Included by kernels.h inside the instruction
// set's namespace.
//
// Once some classes have been seen, few scores exceed the k-th best so far: the search is a product and one comparison for each score.

// Lanes of `v` that are not at or below `threshold`, also where either is NaN: a bit for each.
MK_INLINE unsigned lanes_above(V v, V threshold) {
#if MK_WIDTH == 16
  return _mm512_cmp_ps_mask((__m512)v, (__m512)threshold, _CMP_NLE_UQ);
#elif MK_WIDTH == 8
  return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)threshold, _CMP_NLE_UQ));
#else
  const I above = ~(v <= threshold);
  unsigned out = 0;
  for (int i = 0; i < W; ++i) out |= (unsigned)above[i] >> 31 << i;
  return out;
#endif
}

// out[0 ... 3]: the sums over the lanes of four vectors, each in the same order.
MK_INLINE void sum_each(const V (&v)[4], float* out) {
#if MK_WIDTH >= 8
#if MK_WIDTH == 16
  __m256 u[4];
  for (int i = 0; i < 4; ++i) u[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
#else
  const __m256 u[4] = {(__m256)v[0], (__m256)v[1], (__m256)v[2], (__m256)v[3]};
#endif
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(u[0], u[1]), _mm256_hadd_ps(u[2], u[3]));
  store(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
#endif
}

// Adds a candidate of the row at `at`, counted from the task's first, and the class `label`, counted from the task's first too.
MK_INLINE void add_candidate(const TopkTask& task, int64_t at, float score, int64_t label) {
  uint32_t b = bits<uint32_t>(score + 0.0f);  // -0 is 0
  if ((b & 0x7fffffffu) > 0x7f800000u) b = 0x7fffffffu;
  const uint32_t ordered = b >> 31 ? ~b : b | 0x80000000u;
  uint64_t* mine = task.candidates + at * task.capacity;
  int64_t& count = task.count[at];
  mine[count++] = (uint64_t)ordered << 32 | (uint32_t)~(uint32_t)label;
  if (count < task.capacity) return;
  task.threshold[at] = task.shrink(mine, count, task.k);
  count = task.k;
}

// The higher, or NaN where either is.
MK_INLINE V higher(V a, V b) { return (b > a) | (b != b) ? b : a; }

// Adds the candidates of one panel of rows in one chunk of classes, from their raw products.
template <bool BIAS>
void add_candidates(const PassInputs& p, const TopkTask& task, int64_t row, const Chunk& s) {
  for (int g = 0; g < PANEL; g += W) {
    const int64_t at = row - task.first_row + g;
    const V factor = load<V>(task.factor + row + g), scale = load<V>(task.scale + row + g);
    V threshold = load<V>(task.threshold + at);
    for (int j = 0; j < s.count; j += (int)p.sub_centers) {
      V best = s.raw(j, g);
      for (int i = 1; i < p.sub_centers; ++i) best = higher(best, s.raw(j + i, g));
      const int64_t label = (s.first_class + j) / p.sub_centers;
      V score = best * factor;
      if constexpr (BIAS) score = score * scale + p.bias[label];
      unsigned lanes = lanes_above(score, threshold);
      if (__builtin_expect(lanes == 0, 1)) continue;
      for (; lanes; lanes &= lanes - 1) {
        const int i = __builtin_ctz(lanes);
        add_candidate(task, at + i, score[i], label - task.first_class / p.sub_centers);
      }
      threshold = load<V>(task.threshold + at);
    }
  }
}

// The search for at most FEW_ROWS rows.
struct FewRows {
  const PassInputs& p;
  const TopkTask& task;
  const float* x;  // [row][pitch], zeros past D
  int64_t pitch;
  float* products;  // [row][CLASSES]
  float* factor;    // (CLASSES)
  float* bias;      // (CLASSES)

  // The products of COUNT rows, from `row`, with four centers, and where SQUARES the centers' squares: all in an order of summation that
  // is the same for every row and center.
  template <int DTYPE, int COUNT, bool SQUARES>
  MK_INLINE void multiply(const FewRows& f, int64_t row, const char* const (&centers)[4], int64_t j) {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    const float* x = f.x + row * f.pitch;
    V sums[COUNT][4] = {}, squares[4] = {};
    const auto add = [&](int64_t k, const char* a, const char* b, const char* c, const char* d) {
      const V w[4] = {load_as<DTYPE>(a), load_as<DTYPE>(b), load_as<DTYPE>(c), load_as<DTYPE>(d)};
#pragma GCC unroll 4
      for (int r = 0; r < COUNT; ++r) {
        const V v = load<V>(x + r * f.pitch + k);
#pragma GCC unroll 4
        for (int h = 0; h < 4; ++h) sums[r][h] += v * w[h];
      }
      if constexpr (SQUARES) {
#pragma GCC unroll 4
        for (int h = 0; h < 4; ++h) squares[h] += w[h] * w[h];
      }
    };
    const int64_t whole = f.p.d / W * W;
    for (int64_t k = 0; k < whole; k += W)
      add(k, centers[0] + k * SIZE, centers[1] + k * SIZE, centers[2] + k * SIZE, centers[3] + k * SIZE);
    if (whole < f.p.d) {
      char ends[4][W * SIZE] = {};
      for (int h = 0; h < 4; ++h) __builtin_memcpy(ends[h], centers[h] + whole * SIZE, (f.p.d - whole) * SIZE);
      add(whole, ends[0], ends[1], ends[2], ends[3]);
    }
    for (int r = 0; r < COUNT; ++r) sum_each(sums[r], f.products + (row + r) * CLASSES + j);
    if constexpr (SQUARES) sum_each(squares, f.factor + j);
  }

  // The products of all rows with a chunk of centers. Past its last center the last is read again.
  template <int DTYPE, bool SQUARES>
  static void multiply_chunk(const FewRows& f, const char* from, int64_t count) {
    const int64_t pitch = f.p.w_stride * (DTYPE == FLOAT32 ? 4 : 2);
    for (int64_t j = 0; j < count; j += 4) {
      const char* const at = from + j * pitch;
      const int64_t left = count - 1 - j;
      const char* const centers[4] = {at, at + (left < 1 ? left : 1) * pitch, at + (left < 2 ? left : 2) * pitch,
                                      at + (left < 3 ? left : 3) * pitch};
      if (f.p.n == 1) {
        multiply<DTYPE, 1, SQUARES>(f, 0, centers, j);
        continue;
      }
      multiply<DTYPE, 2, SQUARES>(f, 0, centers, j);
      int64_t row = 2;
      for (; row + 2 <= f.p.n; row += 2) multiply<DTYPE, 2, false>(f, row, centers, j);
      if (row < f.p.n) multiply<DTYPE, 1, false>(f, row, centers, j);
    }
  }

  // From a center's sum of squares to its factor. A center whose squares may have lost something, or whose products may, is multiplied once
  // more, times its factor.
  template <int DTYPE>
  void normalize(const char* center, int64_t j) const {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    if (factor[j] > 1e-20f && factor[j] < 1e30f) {
      factor[j] = 1.0f / __builtin_sqrtf(factor[j]);
      return;
    }
    const V a = broadcast(inverse_norm<DTYPE>(center, p.d));
    for (int64_t row = 0; row < p.n; ++row) {
      V sums = {};
      for (int64_t k = 0; k < p.d; k += W) {
        char end[W * SIZE] = {};
        __builtin_memcpy(end, center + k * SIZE, (p.d - k < W ? p.d - k : W) * SIZE);
        sums += load<V>(x + row * pitch + k) * (load_as<DTYPE>(end) * a);
      }
      products[row * CLASSES + j] = sum(sums);
    }
    factor[j] = 1.0f;
  }

  // Leaves of the products of each class's centers the highest, in the place of the class, and 1 as its factor.
  void keep_highest(int64_t count) const {
    for (int64_t row = 0; row < p.n; ++row)
      for (int64_t j = 0; j < count; j += p.sub_centers) {
        float* const of = products + row * CLASSES;
        float best = -INF;
        for (int64_t i = j; i < j + p.sub_centers; ++i) {
          const float v = p.normalize_weight ? of[i] * factor[i] : of[i];
          best = !(v <= best) && best == best ? v : best;
        }
        of[j / p.sub_centers] = best;
      }
    for (int64_t j = 0; j < CLASSES; ++j) factor[j] = 1.0f;
  }

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    const int64_t width = chunk_width(p);
    for (int64_t first = task.first_class; first < task.last_class; first += width) {
      if (task.interrupt.asked && task.interrupt.asked(task.interrupt.context)) return;
      int64_t count = task.last_class - first < width ? task.last_class - first : width, label = first;
      const char* from = (const char*)p.w + first * p.w_stride * SIZE;
      p.normalize_weight ? multiply_chunk<DTYPE, true>(*this, from, count) : multiply_chunk<DTYPE, false>(*this, from, count);
      if (p.normalize_weight)
        for (int64_t j = 0; j < count; ++j) normalize<DTYPE>(from + j * p.w_stride * SIZE, j);
      if (p.sub_centers > 1) keep_highest(count), label /= p.sub_centers, count /= p.sub_centers;
      if (p.bias) __builtin_memcpy(bias, p.bias + label, count * 4);
      for (int64_t row = 0; row < p.n; ++row)
        for (int64_t j = 0; j < count; j += W) {
          V score = load<V>(products + row * CLASSES + j) * task.factor[row];
          if (p.normalize_weight) score *= load<V>(factor + j);
          if (p.bias) score = score * task.scale[row] + load<V>(bias + j);
          unsigned lanes = lanes_above(score, broadcast(task.threshold[row]));
          if (count - j < W) lanes &= (1u << (count - j)) - 1;
          for (; lanes; lanes &= lanes - 1) {
            const int i = __builtin_ctz(lanes);
            add_candidate(task, row, score[i], label - task.first_class / p.sub_centers + j + i);
          }
        }
    }
  }
};

// The rows as floats, a row every `pitch`, zeros past D.
struct WidenRows {
  const PassInputs& p;
  float* out;
  int64_t pitch;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    for (int64_t i = 0; i < p.n; ++i)
      for (int64_t k = 0; k < pitch; k += DIMS) load_strip<DTYPE>((const char*)p.x + (i * p.d + k) * SIZE, p.d - k, out + i * pitch + k);
  }
};

void topk_task(const PassInputs& p, const TopkTask& task) {
  const Layout l = layout(p.d);
  Buffers memory{0, task.scratch};
  const RowBuffers m(memory, l);
  float *tile = (float*)m.tile, *factor = (float*)m.factor, *bias = (float*)m.bias;
  if (!task.along) {
    const int64_t pitch = up(p.d, 32);
    static_assert(FEW_ROWS * 2 <= CLASSES && FEW_ROWS <= PANEL, "the rows fit where the centers would be, and their products in the tile");
    with_dtype(p.x_dtype, WidenRows{p, (float*)m.centers, pitch});
    return with_dtype(p.w_dtype, FewRows{p, task, (float*)m.centers, pitch, tile, factor, bias});
  }
  const TileState tiles;
  const int64_t width = chunk_width(p);
  for (int64_t first = task.first_class; first < task.last_class; first += width) {
    if (task.interrupt.asked && task.interrupt.asked(task.interrupt.context)) return;
    const int64_t count = task.last_class - first < width ? task.last_class - first : width;
    with_dtype(p.w_dtype, PackChunk{p, first, count, factor, nullptr, nullptr, m.centers, nullptr, l});
    for (int64_t row = task.first_row; row < task.last_row; row += PANEL) {
      cosines(l, count, m.centers, task.along + row * l.along, tile);
      const Chunk chunk{first, (int)count, nullptr, factor, tile, nullptr, nullptr, false};
      p.bias ? add_candidates<true>(p, task, row, chunk) : add_candidates<false>(p, task, row, chunk);
    }
  }
}
