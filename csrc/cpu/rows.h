// The arithmetic of O(N D) around the passes, in double: what marginkernels/backend/base.py does with PyTorch's operators, in one call.
#pragma once

#include <cstdint>

namespace mk {

struct RowsProblem {
  int64_t n, d, c;
  const void* x;  // (n, d), contiguous
  int x_dtype;
  const void* w;  // (c, d), rows w_stride elements apart
  int w_dtype;
  int64_t w_stride;
  const int64_t* labels;  // (n)
  bool normalize_embedding, normalize_weight;
};

// Backend.rows there: prepared (n, d) in x's dtype, row_factor (n), similarity (n), cosine (n).
void prepare_rows(const RowsProblem&, int threads, void* prepared, float* row_factor, double* similarity, double* cosine);

// Backend.row_gradient there: dx (n, d) in x's dtype, from softmax (n) u (n, d) + target (n) w_y.
void row_gradient(const RowsProblem&, int threads, const float* u, const float* softmax, const float* target, void* dx);

}  // namespace mk
