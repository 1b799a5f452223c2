// Vectors of MK_WIDTH floats as GNU vector types, and the few operations that these have no operator for. Included once per instruction
// set, inside that set's namespace.

typedef float V __attribute__((vector_size(4 * MK_WIDTH)));
typedef uint32_t N __attribute__((vector_size(4 * MK_WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * MK_WIDTH)));
typedef uint16_t H __attribute__((vector_size(2 * MK_WIDTH)));

constexpr int W = MK_WIDTH;
constexpr float INF = __builtin_inff();

#define MK_INLINE static inline __attribute__((always_inline))

template <class T>
MK_INLINE T load(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof(T));
  return v;
}

template <class T>
MK_INLINE void store(void* p, T v) {
  __builtin_memcpy(p, &v, sizeof(T));
}

template <class To, class From>
MK_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To out;
  __builtin_memcpy(&out, &v, sizeof(To));
  return out;
}

MK_INLINE V broadcast(float v) { return V{} + v; }

// The lane-wise maximum; a NaN in `b` is propagated.
MK_INLINE V larger(V a, V b) {
#if MK_WIDTH == 16
  return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif MK_WIDTH == 8
  return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

MK_INLINE float sum(V v) {
  float lanes[W], out = 0;
  store(lanes, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  out = lanes[0];
  return out;
}

// 2^z for z up to about 127. The relative error before rounding is 2e-9, or 7e-8 in the sets for plain bfloat16 products, whose weights are
// rounded to 2e-3 afterwards. Results below 2^-126 are 0. NaN stays NaN.
MK_INLINE V exp2(V z) {
  const V shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is left in the low bits
  z = larger(broadcast(-127.0f), z);
  const V rounded = z + shift;
  const V r = z - (rounded - shift);
#if MK_PAIRS && !MK_SPLIT
  V p = r * 0x1.5c08e2p-10f + 0x1.3d0c52p-7f;
  p = p * r + 0x1.c6b6e4p-5f;
  p = p * r + 0x1.ebf918p-3f;
  p = p * r + 0x1.62e428p-1f;
  p = p * r + 0x1.000002p+0f;
#else
  V p = r * 0x1.41d332p-13f + 0x1.5f456ap-10f;
  p = p * r + 0x1.3b2db0p-7f;
  p = p * r + 0x1.c6aed4p-5f;
  p = p * r + 0x1.ebfbdap-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
#endif
  return p * bits<V>((bits<N>(rounded) + 127u) << 23);
}

// Loads W numbers of a dtype as floats.
template <int DTYPE>
MK_INLINE V load_as(const void* p) {
  if constexpr (DTYPE == FLOAT32) return load<V>(p);
  const N u = __builtin_convertvector(load<H>(p), N);
  if constexpr (DTYPE == BFLOAT16) return bits<V>(u << 16);
#if MK_WIDTH == 16
  return (V)_mm512_cvtph_ps(load<__m256i>(p));
#elif MK_WIDTH == 8
  return (V)_mm256_cvtph_ps(load<__m128i>(p));
#else
  // Multiplying rebiases the exponent, which is right for subnormals too; infinities and NaNs are corrected afterwards.
  N out = bits<N>(bits<V>((u & 0x7fffu) << 13) * 0x1p112f);
  out = (u & 0x7c00u) == 0x7c00u ? out | 0x7f800000u : out;
  return bits<V>(out | (u & 0x8000u) << 16);
#endif
}

// To bfloat16 in the low half of each lane, rounding to nearest even; NaN stays NaN.
MK_INLINE N to_bfloat16(V v) {
  const N b = bits<N>(v);
  const N rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return (b & 0x7fffffffu) > 0x7f800000u ? (b >> 16) | 0x40u : rounded;
}

// To float16, rounding to nearest even.
MK_INLINE uint16_t to_float16(float v) {
  uint32_t b = bits<uint32_t>(v);
  const uint32_t sign = (b >> 16) & 0x8000u;
  b &= 0x7fffffffu;
  if (b >= 0x47800000u) return (uint16_t)(sign | (b > 0x7f800000u ? 0x7e00u : 0x7c00u));
  if (b < 0x38800000u) return (uint16_t)(sign | (bits<uint32_t>(bits<float>(b) + 0.5f) - 0x3f000000u));  // the last place of 0.5 is 2^-24
  return (uint16_t)(sign | ((b - 0x38000000u + 0xfffu + ((b >> 13) & 1u)) >> 13));
}

template <int DTYPE>
MK_INLINE void store_as(void* p, V v) {
  if constexpr (DTYPE == FLOAT32) {
    store(p, v);
  } else if constexpr (DTYPE == BFLOAT16) {
#if MK_PAIRS
    store(p, _mm512_cvtneps_pbh((__m512)v));
#else
    store(p, __builtin_convertvector(to_bfloat16(v), H));
#endif
  } else {
#if MK_WIDTH == 16
    store(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif MK_WIDTH == 8
    store(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < W; ++i) ((uint16_t*)p)[i] = to_float16(v[i]);
#endif
  }
}
