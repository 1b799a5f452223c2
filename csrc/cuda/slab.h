// The four kernels of our own between the library's matrix products over a slab of classes. Pointers are to the device; shapes are row-major;
// "product" is the dtype of the embeddings. `marginkernels/backend/cuda.py` runs the loop. All sums have a fixed order; nothing is atomic.
#pragma once

#include <cstdint>

namespace mk {

// Class centres to what the products take: out_j = a_j w_j.
struct Centres {
  const void* w;     // (count, d), rows `stride` elements apart
  int64_t stride;
  float* factor;     // (count) a_j; computed and written unless `given`; null where centres are not normalised (a_j = 1)
  void* out;         // (count, d) product
  int count, d;
  bool given;
};

// One slab of the row pass: products to weights, and the rows' running sums moved on.
struct RowSlab {
  const float* products;   // (n, ld) x_i . a_j w_j
  void* weights;           // (n, ld) product: exp(z - peak) N'(c) gain, 0 for the target; null where not needed. May be `products`.
  int64_t ld;
  int64_t start;           // the slab's first class
  const float* row_factor; // (n)
  const float* scale;      // (n)
  const float* threshold;  // (n), null for the identity
  const float* t;          // (), null for the identity
  const float* bias;       // (count), null for none
  const int64_t* labels;   // (n)
  float *peak, *total, *moment, *top;  // (n) running; moment may be null
  float* decay;            // (n) what the sums so far were multiplied by
  float* base;             // (n) what the exponentials were taken against; may be null
  float gain;              // a power of two that keeps small weights out of float16's subnormals
  int n, count, form;
  int threads;             // of a block, which takes one row: a multiple of 32, at most 1024
  bool uniform;            // weights 1 instead of exponentials
};

// One slab of the class pass: products to G_ij f_i, 0 for the target, which `Finish` adds.
struct ClassSlab {
  const float* products;   // (n, ld)
  void* weights;           // (n, ld) product; null where dw is not needed. May be `products`.
  float* bias_parts;       // (chunks, ld) sums over CHUNK rows of db's terms; null where db is not needed
  int64_t ld;
  int64_t start;
  const float *row_factor, *scale, *threshold, *t, *bias;
  const int64_t* labels;
  const float* lse;        // (n)
  const float* softmax;    // (n)
  const float* uniform;    // (n) or null
  const float* gain;       // () power of two, or null for 1
  int n, count, form;
};
constexpr int CHUNK = 64;  // rows of one block of the class pass

// One slab of dw and db: the products v, the rows' own target terms, the normalisation's Jacobian, one write.
struct Finish {
  float* v;                // (count, d) sum_i gain G_ij f_i x_i over non-targets; overwritten
  const float* gain;       // () or null
  float post;              // another power of two to divide by
  const void* x;           // (n, d) product
  const int64_t* sorted;   // (n) labels in ascending order
  const int64_t* order;    // (n) the rows they come from
  const float* row_factor; // (n)
  const float* target;     // (n) G of a row's own target
  const float* row_bias;   // (n) db's term of a row's own target; null without db
  const void* w;           // (count, d), rows `stride` elements apart; read where `factor` is given
  int64_t stride;
  const float* factor;     // (count) a_j, or null
  void* dw;                // (count, d) in w's dtype; null where not needed
  const float* bias_parts; // (chunks, ld)
  int64_t ld;
  float* db;               // (count) or null
  int64_t start;
  int n, count, d, chunks;
};

void centres(const Centres& p, int w_dtype, int product, void* stream);
void row_slab(const RowSlab& p, int product, void* stream);
void class_slab(const ClassSlab& p, int product, void* stream);
void finish(const Finish& p, int w_dtype, int product, void* stream);

}  // namespace mk
