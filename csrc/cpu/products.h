// The three matrix products of the passes, on vectors or on AMX tiles. Included by kernels.h inside the instruction set's namespace.

// Units of D that the cosines sum in one chain before they add them to what they have. A chain of all 512 makes three times the rounding
// error of a library's product; plain bfloat16 products are coarser than that by far.
constexpr int64_t CHAIN = RAW ? INT64_MAX : MK_SPLIT ? 128 : 64;

#if MK_TILES

// Configures the AMX tiles of this thread: eight tiles of 16 rows x 64 bytes. The destructor restores the previous configuration, since
// another library may have its own tiles configured on this thread.
struct TileState {
  struct alignas(64) Config {
    uint8_t palette = 0, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } before;

  TileState() {
    _tile_storeconfig(&before);
    Config mine;
    mine.palette = 1;
    for (int i = 0; i < 8; ++i) mine.bytes[i] = 64, mine.rows[i] = 16;
    _tile_loadconfig(&mine);
  }
  ~TileState() { before.palette ? _tile_loadconfig(&before) : _tile_release(); }
  TileState(const TileState&) = delete;
};

// Strides of an operand in units: to the next plane, to the next 16 units of k, and to the next row.
struct Steps {
  int64_t plane, strip, row;
};

// One term of a product: planes P and Q of its operands. REUSE_A or REUSE_B: the operand is still in its tiles from the term before.
template <int P, int Q, bool REUSE_A = false, bool REUSE_B = false>
MK_INLINE void term(const uint32_t* a, Steps sa, const uint32_t* b, Steps sb) {
  if (!REUSE_B) _tile_loadd(6, b + Q * sb.plane, sb.row * 4);
  if (!REUSE_A) _tile_loadd(4, a + P * sa.plane, sa.row * 4);
  _tile_dpbf16ps(0, 4, 6);
  if (!REUSE_B) _tile_loadd(7, b + Q * sb.plane + 16, sb.row * 4);
  _tile_dpbf16ps(1, 4, 7);
  if (!REUSE_A) _tile_loadd(5, a + P * sa.plane + 16 * sa.row, sa.row * 4);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// c[32][32] (+)= a[32][k] b[k][32], k in strips of 16 units.
template <bool ADD>
MK_INLINE void tile_product(int64_t strips, const uint32_t* a, Steps sa, const uint32_t* b, Steps sb, float* c, int64_t ldc) {
  if (ADD) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + 16, ldc * 4);
    _tile_loadd(2, c + 16 * ldc, ldc * 4);
    _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
#if MK_SPLIT
  // The small terms are added first, while the sums are small, so that their rounding errors are negligible.
  for (int64_t k = 0; k < strips; ++k) {
    const uint32_t *ak = a + k * sa.strip, *bk = b + k * sb.strip;
    term<2, 0>(ak, sa, bk, sb);
    term<1, 0, false, true>(ak, sa, bk, sb);
    term<1, 1, true>(ak, sa, bk, sb);
    term<0, 1, false, true>(ak, sa, bk, sb);
    term<0, 2, true>(ak, sa, bk, sb);
  }
#endif
  for (int64_t k = 0; k < strips; ++k) term<0, 0>(a + k * sa.strip, sa, b + k * sb.strip, sb);
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  _tile_stored(2, c + 16 * ldc, ldc * 4);
  _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

// tile[count][32] = centers . rows; padded classes give 0.
void cosines(const Layout& l, int64_t count, const uint32_t* centers, const uint32_t* rows, float* tile) {
  const Steps of_w{CLASSES * STRIP, PLANES * CLASSES * STRIP, STRIP}, of_x{STRIP * PANEL, PLANES * STRIP * PANEL, PANEL};
  for (int64_t j = 0; j < count; j += 32)
    for (int64_t k = 0; k < l.dk;) {
      const int64_t units = l.dk - k < CHAIN ? l.dk - k : CHAIN;
      const uint32_t *a = centers + k * PLANES * CLASSES + j * STRIP, *b = rows + k * PLANES * PANEL;
      float* to = tile + j * PANEL;
      if (k)
        tile_product<true>(units / STRIP, a, of_w, b, of_x, to, PANEL);
      else
        tile_product<false>(units / STRIP, a, of_w, b, of_x, to, PANEL);
      k += units;
    }
}

// Transposes 16 x 16 units.
MK_INLINE void transpose(const uint32_t* from, int64_t ldf, uint32_t* to, int64_t ldt) {
  __m512i r[16], s[16];
  for (int i = 0; i < 16; ++i) r[i] = load<__m512i>(from + i * ldf);
  for (int i = 0; i < 8; ++i) {
    s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(s[4 * i], s[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(s[4 * i], s[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(s[4 * i + 1], s[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(s[4 * i + 1], s[4 * i + 3]);
  }
  // r[4 i + q] holds columns q, q + 4, q + 8, q + 12 of rows 4 i ... 4 i + 3, one column per 128 bits.
  for (int q = 0; q < 4; ++q) {
    const __m512i a = _mm512_shuffle_i32x4(r[q], r[4 + q], 0x88), b = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(r[q], r[4 + q], 0xdd), d = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0xdd);
    store(to + q * ldt, _mm512_shuffle_i32x4(a, b, 0x88));
    store(to + (q + 8) * ldt, _mm512_shuffle_i32x4(a, b, 0xdd));
    store(to + (q + 4) * ldt, _mm512_shuffle_i32x4(c, d, 0x88));
    store(to + (q + 12) * ldt, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
}

// u[32 rows] += weights^T values. The rows of an AMX tile must be embeddings, so the weights are transposed first, into `spare`.
void accumulate_u(const Layout& l, int64_t count, uint32_t* weights, uint32_t* spare, const uint32_t* values, float* u) {
  const int64_t units = up(count, 32) / 2, row = PLANES * PANEL;
  for (int64_t j = count / 2; j < units; ++j) __builtin_memset(weights + j * row, 0, row * 4);
  for (int64_t j = 0; j < units; j += STRIP)
    for (int q = 0; q < PLANES; ++q)
      for (int i = 0; i < PANEL; i += 16)
        transpose(weights + j * row + q * PANEL + i, row, spare + (j * PLANES + q * STRIP) * PANEL + i * STRIP, STRIP);
  for (int64_t k = 0; k + STRIP < l.ldn; k += 32)
    tile_product<true>(units / STRIP, spare, {STRIP * PANEL, PLANES * STRIP * PANEL, STRIP}, values + k,
                       {l.ldn, STRIP * PLANES * l.ldn, PLANES * l.ldn}, u + k, l.ldn);
}

// v[count] (+)= g^T across.
void accumulate_v(const Layout& l, int64_t units, int64_t count, const uint32_t* g, const uint32_t* across, float* v, bool add) {
  const Steps of_g{CLASSES * STRIP, PLANES * CLASSES * STRIP, STRIP}, of_x{l.ldn, STRIP * PLANES * l.ldn, PLANES * l.ldn};
  for (int64_t j = 0; j < count; j += 32)
    for (int64_t k = 0; k + STRIP < l.ldn; k += 32) {
      float* to = v + j * l.ldn + k;
      if (add)
        tile_product<true>(units / STRIP, g + j * STRIP, of_g, across + k, of_x, to, l.ldn);
      else
        tile_product<false>(units / STRIP, g + j * STRIP, of_g, across + k, of_x, to, l.ldn);
    }
}

#else

struct TileState {
  TileState() {}
  ~TileState() {}
};

MK_INLINE V multiply_add(uint32_t a, V b, V c) {
#if MK_PAIRS
  return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
  return bits<float>(a) * b + c;
#endif
}

// c[MR][2 W] (+)= a b, one register tile. PANELLED: a is [k][32], otherwise [k/16][a_strip/16 rows][16]. Strides are in units.
template <int MR, bool PANELLED>
void register_tile(int64_t units, const uint32_t* a, int64_t a_strip, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  V sums[MR][2] = {};
  const int64_t step = PANELLED ? 2 : STRIP;
  for (int64_t k = 0; k < units; k += step) {
#pragma GCC unroll 4
    for (int q = 0; q < step; ++q, b += ldb) {
      const V b0 = load<V>(b), b1 = load<V>(b + W);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const uint32_t unit = PANELLED ? a[q * PANEL + m] : a[m * STRIP + q];
        sums[m][0] = multiply_add(unit, b0, sums[m][0]);
        sums[m][1] = multiply_add(unit, b1, sums[m][1]);
      }
    }
    a += PANELLED ? step * PANEL : a_strip;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
    for (int h = 0; h < 2; ++h) {
      float* to = c + m * ldc + h * W;
      store(to, add ? load<V>(to) + sums[m][h] : sums[m][h]);
    }
}

using RegisterTile = void (*)(int64_t, const uint32_t*, int64_t, const uint32_t*, int64_t, float*, int64_t, bool);

template <bool PANELLED>
RegisterTile register_tile_of(int rows) {
  static_assert(MK_MR <= 14, "one entry per height");
#define MK_TILE(R) register_tile<(R <= MK_MR ? R : MK_MR), PANELLED>
  static constexpr RegisterTile table[] = {MK_TILE(1), MK_TILE(2), MK_TILE(3),  MK_TILE(4),  MK_TILE(5),  MK_TILE(6),  MK_TILE(7),
                                           MK_TILE(8), MK_TILE(9), MK_TILE(10), MK_TILE(11), MK_TILE(12), MK_TILE(13), MK_TILE(14)};
#undef MK_TILE
  return table[rows - 1];
}

// c[m][n] (+)= a b in register tiles of nearly equal height; n is a multiple of 2 W.
template <bool PANELLED>
void product(int64_t m, int64_t n, int64_t units, const uint32_t* a, int64_t a_strip, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
             bool add) {
  const int64_t tiles = (m + MK_MR - 1) / MK_MR;
  for (int64_t j = 0; j < n; j += 2 * W)
    for (int64_t q = 0, i = 0; q < tiles; ++q) {
      const int64_t rows = (m - i + tiles - q - 1) / (tiles - q);
      register_tile_of<PANELLED>((int)rows)(units, a + i * (PANELLED ? 1 : STRIP), a_strip, b + j, ldb, c + i * ldc + j, ldc, add);
      i += rows;
    }
}

// tile[count][32] = centers . rows; padded classes give 0.
void cosines(const Layout& l, int64_t count, const uint32_t* centers, const uint32_t* rows, float* tile) {
  for (int64_t k = 0; k < l.dk;) {
    const int64_t units = l.dk - k < CHAIN ? l.dk - k : CHAIN;
    product<false>(count, PANEL, units, centers + k * CLASSES, CLASSES * STRIP, rows + k * PANEL, PANEL, tile, PANEL, k > 0);
    k += units;
  }
}

// u[32 rows] += weights^T values. `count` is even; with pairs, the weights hold half as many units.
void accumulate_u(const Layout& l, int64_t count, uint32_t* weights, uint32_t*, const uint32_t* values, float* u) {
  int64_t units = count / PER_UNIT;
  if (units % 2) {
    __builtin_memset(weights + units * PANEL, 0, PANEL * 4);
    ++units;
  }
  product<true>(PANEL, l.ldn - STRIP, units, weights, 0, values, l.ldn, u, l.ldn, true);
}

// v[count] (+)= g^T across.
void accumulate_v(const Layout& l, int64_t units, int64_t count, const uint32_t* g, const uint32_t* across, float* v, bool add) {
  product<false>(count, l.ldn - STRIP, units, g, CLASSES * STRIP, across, l.ldn, v, l.ldn, add);
}

#endif
