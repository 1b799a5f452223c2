// The four custom kernels that run between cuBLAS products over a chunk of classes, on any GPU of compute capability 8.0 or later. Pointers
// are to device memory; shapes are row-major; "product" is the dtype of the embeddings. marginkernels/backend/cuda/generic.py has the loop
// over chunks. All sums have a fixed order; there are no atomics.
#pragma once

#include <cstdint>

namespace mk {

// Converts class centers to the operand of the products: out_j = a_j w_j.
struct Centers {
  const void* w;  // (count, d), rows `stride` elements apart
  int64_t stride;
  float* factor;  // (count) a_j; computed and written unless `given`; null where weights are not normalized (a_j = 1)
  void* out;      // (count, d) product
  int count, d;
  bool given;
};

// One chunk of the row pass: turns products into weights and updates the rows' running sums.
struct RowChunk {
  const float* products;  // (n, ld) x_i . a_j w_j
  void* weights;          // (n, ld) product: exp(z - base) N'(c) pow2, 0 for the target; null where not needed. May be `products`.
  int64_t ld;
  int64_t start;            // the first class of the chunk
  const float* row_factor;  // (n)
  const float* scale;       // (n)
  const float* threshold;   // (n), null for the identity
  const float* t;           // (n), null for the identity
  const float* bias;        // (count), null for none
  const int64_t* labels;    // (n)
  // Running over the chunks, each (n): max z, sum exp(z - running_max), sum exp(z - running_max) N(c), max (s c + b). cos may be null.
  float *running_max, *total, *cos, *max_logit;
  float* decay;  // (n) the factor that this chunk applied to the earlier sums
  float* base;   // (n) what the exponentials are relative to; may be null
  float pow2;    // a power of two that keeps small weights out of float16's subnormals
  int n, count, non_target;
  int threads;    // per block, which handles one row: a multiple of 32, at most 1024; it may take fewer
  int reduction;  // LOGIT_SUM: weights are 1 instead of exponentials, total is sum z; SOFTPLUS_SUM: sigmoids, total is sum log(1 + exp z)
};

// One chunk of the class pass: turns products into G_ij f_i, 0 for the target, which `Finish` adds.
struct ClassChunk {
  const float* products;  // (n, ld)
  void* weights;          // (n, ld) product: G_ij f_i pow2; null where dw is not needed. May be `products`.
  float* bias_parts;      // (row_blocks, ld) sums of db's terms over ROW_BLOCK rows; null where db is not needed
  int64_t ld;
  int64_t start;
  const float *row_factor, *scale, *threshold, *t, *bias;
  const int64_t* labels;
  const float* lse;                     // (n)
  const float* d_lse;                   // (n)
  const float* d_logit_sum;             // (n) or null
  const float* pow2;                    // () a power of two, or null for 1
  int n, count, non_target, reduction;  // SOFTPLUS_SUM: sigmoid(z) in the place of exp(z - lse)
};
constexpr int ROW_BLOCK = 64;  // rows of a block of the class pass

// One chunk of dw and db: adds the target terms to v, applies the normalization's Jacobian and writes the result.
struct Finish {
  float* v;                    // (count, d) sum_i pow2 v_pow2 G_ij f_i x_i over non-targets; overwritten
  const float* pow2;           // () or null
  float v_pow2;                // another power of two that v is a multiple of
  const void* x;               // (n, d) product
  const int64_t* sorted;       // (n) labels in ascending order
  const int64_t* order;        // (n) the rows that they belong to
  const float* row_factor;     // (n)
  const float* d_target_cos;   // (n) G of a row's own target
  const float* d_target_bias;  // (n) db's term of a row's own target; null without db
  const void* w;               // (count, d), rows `stride` elements apart; read where `factor` is given
  int64_t stride;
  const float* factor;      // (count) a_j, or null
  void* dw;                 // (count, d) in w's dtype; null where not needed
  const float* bias_parts;  // (row_blocks, ld)
  int64_t ld;
  float* db;  // (count) or null
  int64_t start;
  int n, count, d, row_blocks;
};

void centers(const Centers& p, int w_dtype, int product, void* stream);
void row_chunk(const RowChunk& p, int product, void* stream);
void class_chunk(const ClassChunk& p, int product, void* stream);
void finish(const Finish& p, int w_dtype, int product, void* stream);

// The latest CUDA version that the driver serves, 0 where there is none, and the version of the runtime that is linked in: 1000 times the
// major version plus 10 times the minor.
int driver_version();
int runtime_version();

}  // namespace mk
