// An optimizer's step of one row: Update of marginkernels/core/update.py. Included by kernels.h, once per instruction set, with the same
// bits in all of them: no product is fused with a sum.
//
// Arithmetic is in float; weight and state may be half precision, and are rounded once.

// A product that no later sum is fused with.
MK_INLINE V kept(V v) {
#if defined(__x86_64__) && MK_WIDTH == 16
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

constexpr uint32_t LANE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The random bits of one row: see random_bits() of marginkernels/core/update.py.
struct RowBits {
  uint32_t low, high;

  MK_INLINE RowBits of(uint64_t key, uint64_t row) {
    uint64_t z = row * 0x9E3779B97F4A7C15u + key;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z = (z ^ z >> 31) & 0x7FFFFFFFFFFFFFFFu;
    return {(uint32_t)z, (uint32_t)(z >> 32)};
  }

  // 16 bits for each of the columns [k, k + W) of a tensor.
  MK_INLINE N draw(const RowBits& r, uint32_t tensor, int64_t k) {
    N h = (load<N>(LANE) + (uint32_t)k) * 0x9E3779B1u + (tensor * 0x7F4A7C15u + r.low);
    h = (h ^ h >> 16) * 0x85EBCA6Bu ^ r.high;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return h >> 16;
  }
};

// Rounded up with the probability of the distance from below, by `random` in [0, 2^16): a float whose dtype holds it exactly.
template <int DTYPE>
MK_INLINE V rounded_at_random(V v, N random) {
  const N number = bits<N>(v), magnitude = number & 0x7fffffffu;
  const N finite = (N)(magnitude < 0x7f800000u);
  if constexpr (DTYPE == BFLOAT16) return bits<V>(((number + random) & 0xffff0000u & finite) | (number & ~finite));
  // The last places of float16's normal numbers are a share of the number, those of its subnormal ones all 2^-24.
  const N normal = (number + (random >> 3)) & ~0x1fffu;
  const N small = (N)(magnitude < 0x38800000u);
  const V units = bits<V>(number & small) * 0x1p24f;
  const V whole = __builtin_convertvector(__builtin_convertvector(units, I), V);
  const V rest = bits<V>(bits<N>(units - whole) & 0x7fffffffu) * 65536.0f;
  const N up = (N)(rest >= 65536.0f - __builtin_convertvector(random, V));
  const N one = bits<N>(V{} + 1.0f) | (number & 0x80000000u);
  const V below = (whole + bits<V>(one & up)) * 0x1p-24f;
  return bits<V>((bits<N>(below) & small) | (normal & ~small & finite) | (number & ~finite));
}

// W numbers of a row, of which `left` exist.
template <int DTYPE>
MK_INLINE V load_some(const char* p, int64_t left) {
  if (left >= W) return load_as<DTYPE>(p);
  constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
  char padded[W * SIZE] = {};
  __builtin_memcpy(padded, p, left * SIZE);
  return load_as<DTYPE>(padded);
}

template <int DTYPE>
MK_INLINE void store_some(char* p, int64_t left, V v) {
  if (left >= W) return store_as<DTYPE>(p, v);
  constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
  char padded[W * SIZE];
  store_as<DTYPE>(padded, v);
  __builtin_memcpy(p, padded, left * SIZE);
}

// AdamW's factors of a row, which depend on its count of steps alone.
struct Corrections {
  float steps = -1, rate = 0, root = 0;

  void of(const Update& u, float now) {
    if (steps == now) return;
    steps = now;
    rate = (float)(u.lr / (1.0 - __builtin_pow(u.first, now)));
    root = (float)__builtin_sqrt(1.0 - __builtin_pow(u.second, now));
  }
};

// Updates row `row` of the weight with its gradient `g`, which is 0 up to a whole vector.
template <int RULE, int W_DTYPE, int S_DTYPE>
void update_row(const Update& u, int64_t row, const float* g, Corrections& corrections) {
  constexpr int W_SIZE = W_DTYPE == FLOAT32 ? 4 : 2, S_SIZE = S_DTYPE == FLOAT32 ? 4 : 2;
  char* w = (char*)u.w + row * u.d * W_SIZE;
  char* moment[2] = {u.moment[0] ? (char*)u.moment[0] + row * u.d * S_SIZE : nullptr,
                     u.moment[1] ? (char*)u.moment[1] + row * u.d * S_SIZE : nullptr};
  const bool random = u.stochastic && (W_DTYPE != FLOAT32 || S_DTYPE != FLOAT32);
  const RowBits drawn = random ? RowBits::of(u.key, (uint64_t)(u.rows ? u.rows[row] : u.first_row + row)) : RowBits{};
  if constexpr (RULE == ADAMW) {
    u.steps[row] += 1.0f;
    corrections.of(u, u.steps[row]);
  }
  const V lr = broadcast((float)u.lr), decay = broadcast((float)u.weight_decay), momentum = broadcast((float)u.momentum);
  const V keep = broadcast((float)(1.0 - u.lr * u.weight_decay)), second = broadcast((float)u.second), eps = broadcast((float)u.eps);
  const V first_rest = broadcast((float)(1.0 - u.first)), second_rest = broadcast((float)(1.0 - u.second));
  const V rate = broadcast(corrections.rate), root = broadcast(corrections.root);
  const auto put_moment = [&](int i, int64_t k, V v) {
    if (S_DTYPE != FLOAT32 && random) v = rounded_at_random<S_DTYPE>(v, RowBits::draw(drawn, i + 1, k));
    store_some<S_DTYPE>(moment[i] + k * S_SIZE, u.d - k, v);
  };
  for (int64_t k = 0; k < u.d; k += W) {
    const int64_t left = u.d - k;
    V p = load_some<W_DTYPE>(w + k * W_SIZE, left), d = load<V>(g + k);
    if constexpr (RULE == SGD) {
      if (u.weight_decay != 0) d += kept(p * decay);
      if (u.momentum != 0) {
        const V m = kept(load_some<S_DTYPE>(moment[0] + k * S_SIZE, left) * momentum) + d;
        put_moment(0, k, m);
        d = u.nesterov ? d + kept(m * momentum) : m;
      }
      p -= kept(d * lr);
    } else {
      p = kept(p * keep);
      V m = load_some<S_DTYPE>(moment[0] + k * S_SIZE, left), v = load_some<S_DTYPE>(moment[1] + k * S_SIZE, left);
      m += kept((d - m) * first_rest);
      v = kept(v * second) + kept(kept(d * d) * second_rest);
      put_moment(0, k, m), put_moment(1, k, v);
      p -= kept(m / (square_root(v) / root + eps) * rate);
    }
    if (W_DTYPE != FLOAT32 && random) p = rounded_at_random<W_DTYPE>(p, RowBits::draw(drawn, 0, k));
    store_some<W_DTYPE>(w + k * W_SIZE, left, p);
  }
}

using RowUpdate = void (*)(const Update&, int64_t, const float*, Corrections&);

template <int RULE, int W_DTYPE>
RowUpdate row_update_of_state(int dtype) {
  return dtype == FLOAT32    ? update_row<RULE, W_DTYPE, FLOAT32>
         : dtype == BFLOAT16 ? update_row<RULE, W_DTYPE, BFLOAT16>
                             : update_row<RULE, W_DTYPE, FLOAT16>;
}

template <int RULE>
RowUpdate row_update_of_weight(const Update& u) {
  return u.w_dtype == FLOAT32    ? row_update_of_state<RULE, FLOAT32>(u.moment_dtype)
         : u.w_dtype == BFLOAT16 ? row_update_of_state<RULE, BFLOAT16>(u.moment_dtype)
                                 : row_update_of_state<RULE, FLOAT16>(u.moment_dtype);
}

RowUpdate row_update_of(const Update& u) { return u.rule == SGD ? row_update_of_weight<SGD>(u) : row_update_of_weight<ADAMW>(u); }

// Rows [first, last) with the gradients that stand in memory.
struct UpdateRows {
  const Update& u;
  const UpdateTask& task;

  template <int DTYPE>
  void run() {
    constexpr int SIZE = DTYPE == FLOAT32 ? 4 : 2;
    const RowUpdate update = row_update_of(u);
    Corrections corrections;
    for (int64_t j = task.first; j < task.last; ++j) {
      const char* g = (const char*)task.g + j * u.d * SIZE;
      for (int64_t k = 0; k < u.d; k += W) store(task.scratch + k, load_some<DTYPE>(g + k * SIZE, u.d - k));
      update(u, j, task.scratch, corrections);
    }
  }
};

void update_task(const Update& u, const UpdateTask& task) { with_dtype(task.g_dtype, UpdateRows{u, task}); }
