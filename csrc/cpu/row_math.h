// The O(N D) arithmetic around the passes, in double: what marginkernels/backend/base.py does with PyTorch operators, in one call.
#pragma once

#include <cstdint>

#include "stop.h"

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

// Each returns whether it finished; see Poll. Where it did not, its results are undefined.

// Backend.prepare_inputs: x (n, d) in x's dtype, row_factor (n), target_similarity (n), target_cos (n).
[[nodiscard]] bool prepare_inputs(const HeadInputs&, int threads, void* x, float* row_factor, double* target_similarity, double* target_cos,
                                  Poll poll = nullptr);

// Backend.row_gradient: dx (n, d) in x's dtype, from d_lse (n) mean_center (n, d) + d_target_cos (n) w_y.
[[nodiscard]] bool row_gradient(const HeadInputs&, int threads, const float* mean_center, const float* d_lse, const float* d_target_cos,
                                void* dx, Poll poll = nullptr);

}  // namespace mk
