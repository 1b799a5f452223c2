// The two passes over all rows and classes: memory, threads and the order in which parts are put together.
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace mk {

struct RowOutput {
  float *total, *top, *moment, *u, *class_factor;  // as RowPass in marginkernels/backend/base.py; moment and u may be null
  char* kept;                                      // of kept_bytes, filled with as many slabs as it holds
  int64_t kept_bytes;
};

struct RowInput {  // as RowWeights there
  const float *lse, *softmax, *uniform, *target, *bias;
  const char* kept;
  int64_t kept_bytes;
};

// What a panel of `rows` rows of a slab of `classes` classes leaves to the class pass.
struct KeptPanel {
  int64_t bytes, rows, classes;
};
KeptPanel kept_panel(const Kernels&);

// The instruction sets that this machine can run, worst first; the build leaves out what the compiler cannot make.
std::vector<const Kernels*> levels();

// The best of them, or the named one, for products of `x_dtype`; throws std::invalid_argument where there is none.
const Kernels& choose(int x_dtype, const std::string& level);

void row_pass(const Kernels&, const Problem&, int threads, bool uniform, const RowOutput&);
void class_pass(const Kernels&, const Problem&, int threads, const RowInput&, const float* class_factor, void* dw, float* db);

}  // namespace mk
