// The search for the nearest class centers, streamed over them.
#pragma once

#include "driver.h"
#include "row_math.h"

namespace mk {

// The `k` classes of the highest scores for each row: scores (n, k) falling, NaN before every number, and classes (n, k), of equal scores
// the lower first. A score is the similarity c_ij, the highest of the class's `sub_centers`, or, with a `bias` (c / sub_centers),
// scale_i c_ij + bias_j; `labels` are not read. 1 <= k <= c / sub_centers.
//
// The bits of a score depend neither on the number of threads nor on the partition of the classes. Returns whether it finished; see
// row_pass. Throws OutOfMemory.
[[nodiscard]] bool topk(const Kernels&, const HeadInputs&, int threads, int64_t k, int64_t sub_centers, const float* bias,
                        const float* scale, float* scores, int64_t* classes, Poll poll = nullptr);

}  // namespace mk
