// The O(N D) arithmetic around the passes, in double: what marginkernels/backend/base.py does with PyTorch operators, in one call.
#pragma once

#include <cstdint>

namespace mk {

// HeadInputs of marginkernels/core/types.py.
struct HeadInputs {
  int64_t n, d, c;
  const void* x;  // (n, d), contiguous
  int x_dtype;
  const void* w;  // (c, d), rows w_stride elements apart
  int w_dtype;
  int64_t w_stride;
  const int64_t* labels;  // (n)
  bool normalize_embedding, normalize_weight;
};

// Backend.prepare_inputs: x (n, d) in x's dtype, row_factor (n), target_similarity (n), target_cos (n).
void prepare_inputs(const HeadInputs&, int threads, void* x, float* row_factor, double* target_similarity, double* target_cos);

// Backend.row_gradient: dx (n, d) in x's dtype, from d_lse (n) mean_center (n, d) + d_target_cos (n) w_y.
void row_gradient(const HeadInputs&, int threads, const float* mean_center, const float* d_lse, const float* d_target_cos, void* dx);

}  // namespace mk
