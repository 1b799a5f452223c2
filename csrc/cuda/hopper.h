// The fused passes for compute capability 9.0: one kernel that computes O = sum_j f(A_i . B_j) B_j, flash-attention style, over a chunk of
// converted class centers. In the row pass, 64 embeddings are stationary and the centers are streamed; in the class pass, 64 centers are
// stationary and the embeddings are streamed. Pointers are to device memory.
#pragma once

#include <cstdint>

namespace mk {

constexpr int TILE_STATIONARY = 64;  // rows of A of a block
constexpr int TILE_STREAMED = 32;    // rows of B per tile; per-column vectors are padded to a multiple of this

struct FusedRow {
  const void* x;            // (n, d) product
  const void* w;            // (count, d) product, a_j w_j
  int64_t start;            // the first class of the chunk
  const float* row_factor;  // (n)
  const float* scale;       // (n)
  const float* threshold;   // (n), null for the identity
  const float* t;           // (n), null for the identity
  const float* bias;        // (count padded) times log2 e, 16-byte aligned; null for none
  const int64_t* labels;    // (n)
  const float* reach;       // (n) an upper bound of |z_ij| times log2 e; null where there is none
  // One running state for each of the `splits` parts of the classes; with `resume`, the sums go on from what these buffers hold.
  float *running_max, *total, *cos, *max_logit;  // (splits, n); maxima and logits in units of log 2; cos may be null
  float* center;                                 // (splits, n, d) sum of weights times centers; null where not needed
  float pow2;                                    // a power of two that the weights of `center` are multiplied by
  int n, count, d, non_target, splits, reduction;
  bool resume;
};

// The class pass's view of a row, packed for one bulk copy instead of nine: (n padded, 12) floats.
struct alignas(16) Streamed {
  float factor, scale, lse, d_lse, d_logit_sum, inverse_scale;  // scale and lse times log2 e
  int own;                                                      // its label, -1 where its target is not here
  float threshold, t;
  float unused[3];  // zero
};
static_assert(sizeof(Streamed) == 48, "the Python side packs 12 floats per row");

struct FusedClass {
  const void* x;         // (n, d) product
  const void* w;         // (count, d) product, a_j w_j
  const Streamed* rows;  // (n padded)
  const float* bias;     // (count) times log2 e, or null
  const float* pow2;     // () a power of two, or null for 1
  float* v;              // (count, d) sum_i pow2 G_ij f_i x_i over non-targets; null where dw is not needed
  float* bias_sum;       // (count) db without the terms of the rows' own classes; null where not needed
  int64_t start;
  int n, count, d, non_target, reduction;
};

// Merges the splits of the row pass into the fields of RowPassOutput in marginkernels/core/types.py.
struct Combine {
  const float *running_max, *total, *cos, *max_logit, *center;  // as in FusedRow; cos and center may be null
  float *out_value, *out_cos, *out_max_logit, *out_center;      // (n), (n), (n) or null for not needed, (n, d)
  float pow2;
  int n, d, splits, reduction;
};

// Bytes of shared memory per block of the fused kernels for embeddings of `d` dimensions.
int fused_shared_bytes(int d);

void fused_row(const FusedRow& p, int product, void* stream);
void fused_class(const FusedClass& p, int product, void* stream);
void combine(const Combine& p, void* stream);

}  // namespace mk
