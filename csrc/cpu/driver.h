// The two passes over all rows and classes: memory, threads, and the order in which partial results are combined.
#pragma once

#include <string>
#include <vector>

#include "interface.h"
#include "stop.h"

namespace mk {

// The results of the row pass, as RowPassOutput in marginkernels/core/types.py. max_logit, cos and center may be null.
struct RowOutput {
  double* value;
  float *max_logit, *cos, *center, *class_factor;
  char* saved;  // of saved_bytes; filled with as many chunks as fit
  int64_t saved_bytes;
};

// The upstream gradient, as Upstream there, and the workspace that the row pass filled. d_logit_sum and d_target_bias may be null.
struct ClassInput {
  const double* lse;
  const float *d_lse, *d_logit_sum, *d_target_cos, *d_target_bias;
  const char* saved;
  int64_t saved_bytes;
  int reduction;  // that d_lse is the gradient of
};

// The bytes that a panel of `rows` rows saves for the class pass per chunk of `classes` centers, or of fewer, where these are a multiple of
// the sub-centers of a class.
struct SavedPanel {
  int64_t bytes, rows, classes;
};
SavedPanel saved_panel(const Kernels&);

// The instruction sets that this machine can run, worst first; with `here` false all that were built. The build leaves out those that the
// compiler does not support.
std::vector<const Kernels*> levels(bool here = true);

// The best of them for products of `x_dtype`, or the one named `level`; throws std::invalid_argument if there is none.
const Kernels& choose(int x_dtype, const std::string& level);

// Each returns whether it finished. With an `update` the class pass updates p.w instead of writing d_weight. Where `poll` returned true it
// did not, and its results are undefined. Throws OutOfMemory.
[[nodiscard]] bool row_pass(const Kernels&, const PassInputs&, int threads, int reduction, const RowOutput&, Poll poll = nullptr);
[[nodiscard]] bool class_pass(const Kernels&, const PassInputs&, int threads, const ClassInput&, const float* class_factor, void* d_weight,
                              float* d_bias, Poll poll = nullptr, const Update* update = nullptr);

// An optimizer's step of `rows` rows with gradients `g` (rows, d). Throws OutOfMemory.
void update(const Kernels&, const Update&, int threads, int64_t rows, const void* g, int g_dtype);

}  // namespace mk
