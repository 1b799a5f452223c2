// The fused passes of compute capability 9.0: one kernel of one shape, O = sum_j f(A_i . B_j) B_j, over a slab of converted centres. The row
// pass keeps 64 rows and streams centres; the class pass keeps 64 centres and streams rows. Pointers are to the device.
#pragma once

#include <cstdint>

namespace mk {

constexpr int TILE_KEPT = 64;      // rows of A of one block
constexpr int TILE_STREAMED = 32;  // rows of B at a time; what is given per column is padded to it

struct FusedRow {
  const void* x;           // (n, d) product
  const void* w;           // (count, d) product, a_j w_j
  int64_t start;           // the slab's first class
  const float* row_factor; // (n)
  const float* scale;      // (n)
  const float* threshold;  // (n), null for the identity
  const float* t;          // (), null for the identity
  const float* bias;       // (count padded) times log2 e, on 16 bytes; null for none
  const int64_t* labels;   // (n)
  const float* reach;      // (n) what |z_ij| times log2 e cannot exceed; null where there is no such bound
  // One running state for each of `splits` parts of the classes; `resume`: go on from what they hold.
  float *peak, *total, *moment, *top;  // (splits, n); peak in units of log2
  float* u;                // (splits, n, d); null where not needed
  float gain;              // what u's weights are multiplied by: a power of two
  int n, count, d, form, splits;
  bool uniform, resume;
};

// What one row is to the class pass, in place of eight vectors: (n padded, 8).
struct alignas(32) Streamed {
  float factor, scale, lse, softmax, uniform, inverse_scale;  // scale and lse times log2 e
  int own;  // its label, -1 for one that is not here
  float threshold;
};

struct FusedClass {
  const void* x;           // (n, d) product
  const void* w;           // (count, d) product, a_j w_j
  const Streamed* rows;    // (n padded)
  const float* t;          // (), null for the identity
  const float* bias;       // (count) times log2 e, or null
  const float* gain;       // () power of two, or null
  float* v;                // (count, d) sum_i gain G_ij f_i x_i over non-targets; null where dw is not needed
  float* bias_sum;         // (count) db's terms but the rows' own; null where not needed
  int64_t start;
  int n, count, d, form;
};

// The row pass's states to one: total, top, moment and u as marginkernels/backend/base.py has them.
struct Combine {
  const float *peak, *total, *moment, *top, *u;  // as in FusedRow; moment and u may be null
  float *out_total, *out_moment, *out_top, *out_u;  // (n), (n), (n), (n, d)
  float gain;
  int n, d, splits;
  bool uniform;
};

// Bytes of shared memory of a block of the fused kernels for embeddings of `d` dimensions.
int fused_shared_bytes(int d);

void fused_row(const FusedRow& p, int product, void* stream);
void fused_class(const FusedClass& p, int product, void* stream);
void combine(const Combine& p, void* stream);

}  // namespace mk
