// The interface between the driver and a kernel set (the kernels of one instruction set). Plain data: this header is compiled once per
// instruction set, so it must not contain or include an inline function, which the linker could merge across them.
#pragma once

#include <stdint.h>

namespace mk {

// Rows are processed in panels of 32; every buffer over rows is padded to a multiple of that.
constexpr int PANEL = 32;

// PassInputs of marginkernels/core/types.py.
struct PassInputs {
  int64_t n, d, c;
  const void* x;  // (n, d), contiguous
  int x_dtype;
  const void* w;  // (c, d), rows w_stride elements apart; the centers of a class follow one another
  int w_dtype;
  int64_t w_stride;
  const float* row_factor;  // (n)
  const float* bias;        // (c / sub_centers) or null
  const int64_t* labels;    // (n), rows of w
  const float* scale;       // (n)
  const float* threshold;   // (n), null for the identity
  const float* t;           // (n), null for the identity
  int non_target;
  bool normalize_weight;
  int64_t sub_centers;  // centers of each class, at most Layout::classes
};

// Vectors over the padded rows. Logits are in units of log 2, so that the kernels need only exp2; with SOFTPLUS_SUM in natural ones.
struct Rows {
  const uint32_t* along;   // the rows packed for the cosines: [panel][k][32 rows] units
  const uint32_t* across;  // the rows packed for dW: [row unit][ldn] units; class pass only
  float* factor;           // f_i
  float* slope;            // s_i f_i log2(e): the logit over the raw product for the identity
  float* scale;            // s_i log2(e)
  float* threshold;        // 0 for the identity
  float* t;                // 0 for the identity
  int32_t* label;          // -1 where the row's target is not here
  // Class pass. With p = exp2(logit - lse):
  float* lse;               // rounded to float; what rounding lost is folded into d_lse and bias_d_lse as a factor
  float* d_lse;             // d_lse_i f_i: the coefficient of p in G f
  float* d_logit_sum;       // d_logit_sum_i f_i: added to it for every non-target class
  float* d_target_cos;      // d_target_cos_i f_i: G f of the row's own class
  float* bias_d_lse;        // d_lse_i / s_i: the coefficient of p in db
  float* bias_d_logit_sum;  // d_logit_sum_i / s_i: added to it for every non-target class
  float* d_target_bias;     // db of the row's own class
  // The six vectors above are divided by this power of two, so that they neither vanish nor overflow, however the loss was scaled.
  float pow2;
};

// Asked between two chunks of classes: whether the task should return at once, its results unfinished.
struct Interrupt {
  bool (*asked)(void* context);  // null where nothing interrupts
  void* context;
};

// Rows [first_row, last_row) against centers [first_class, last_class).
struct RowTask {
  Interrupt interrupt;
  int64_t first_row, last_row, first_class, last_class;
  int reduction;
  bool need_center, need_cos;
  float* class_factor;  // (c), or null where another task writes it
  // Over the task's padded rows, starting at first_row:
  float* running_max;  // max of the logits, in log 2; initially -inf
  double* total;       // sum of exp2(logit - running_max); of the logits or their softplus (natural) by the reduction
  float*
      max_logit;  // max of s c + b, in log 2 or natural as all logits; not used for the identity with LOG_SUM_EXP, where it is running_max
  double* cos_sum;  // sum of p N(c)
  float* u;         // [row][ldn], sum of p N'(c) a w
  char* saved;      // weights saved for the class pass, for the first saved_chunks chunks; see Layout
  int64_t saved_chunks;
  uint32_t* scratch;
};

// One step of an optimizer, Update of marginkernels/core/update.py, and the weight (rows, d) and state that it updates: contiguous, the
// state as the weight.
struct Update {
  int rule;
  bool nesterov, stochastic;
  double lr, weight_decay, momentum, first, second, eps;
  uint64_t key;
  void* w;
  int w_dtype;
  int64_t d;
  void* moment[2];  // null where the rule has none
  int moment_dtype;
  float* steps;         // (rows), for ADAMW
  const int64_t* rows;  // the number of each row among those of all ranks, or null where they are first_row and so on
  int64_t first_row;
};

// Rows [first, last) with gradients (rows, d).
struct UpdateTask {
  int64_t first, last;
  const void* g;
  int g_dtype;
  float* scratch;  // d floats, up to a multiple of PANEL
};

struct ClassTask {
  Interrupt interrupt;
  int reduction;  // that d_lse is the gradient of
  int64_t first_class, last_class;
  const float* class_factor;
  const char* saved;  // of the first saved_chunks chunks
  int64_t saved_chunks;
  void* d_weight;        // (c, d) contiguous in w's dtype, or null
  float* d_bias;         // (c / sub_centers), or null
  const Update* update;  // of p.w, instead of d_weight, or null
  uint32_t* scratch;
};

// At most so many rows are multiplied with each class center where it lies, unpacked, which is as fast as the centers can be read.
constexpr int64_t FEW_ROWS = 16;

// The search for the k classes of the highest scores s_i c_ij + b_j, or c_ij without a bias. A candidate of a row is one number that orders
// as its score does, and of equal scores the lower class before the higher: the score's bits in the upper half, rising with the score and
// highest for NaN, and the complement of the class, counted from that of center first_class, in the lower half.
struct TopkTask {
  Interrupt interrupt;
  int64_t first_row, last_row, first_class, last_class;  // of the centers, as in RowTask; with sub-centers a class has its highest score
  const uint32_t* along;                                 // Rows::along, or null: then there are at most FEW_ROWS rows
  const float* factor;                                   // f_i over all padded rows
  const float* scale;                                    // s_i, as `factor`; used with a bias
  int64_t k, capacity;
  // Over the task's padded rows, starting at first_row:
  uint64_t* candidates;  // [row][capacity], of which `count` are there
  int64_t* count;        // less than `capacity`
  float* threshold;      // the k-th best score so far, which a later class must exceed; NaN where it need not
  // Moves the k best of `count` candidates to the front; gives the score of the worst of them.
  float (*shrink)(uint64_t* candidates, int64_t count, int64_t k);
  uint32_t* scratch;
};

// The buffer layout of a kernel set for one D. A unit is 32 bits: a float, or two bfloat16 that are neighbors along the summed index.
struct Layout {
  int64_t dk;                                         // units along D where D is summed over
  int64_t ldn;                                        // units along D where it is not; the stride of u
  int64_t classes;                                    // centers in a chunk, or fewer, where they are a multiple of sub_centers
  int64_t rows;                                       // rows in a block
  int64_t along, across, row_scratch, class_scratch;  // units: the packed rows (per row), and the scratch memory of a task
  // Bytes saved per panel and chunk: [class][32 rows] of exp2(logit - base) N'(c), 0 for the row's own class, as floats or, for plain
  // bfloat16 products, as bfloat16; then base, [32 rows] floats. The order is [chunk][panel].
  int64_t saved;
};

struct Kernels {
  const char* name;
  int dtypes;  // of the embeddings that it serves: bit 1 << Dtype
  Layout (*layout)(int64_t d);
  void (*pack_along)(const PassInputs&, uint32_t* along);
  void (*pack_across)(const PassInputs&, uint32_t* across);
  void (*row_task)(const PassInputs&, const Rows&, const RowTask&);
  void (*class_task)(const PassInputs&, const Rows&, const ClassTask&);
  void (*topk_task)(const PassInputs&, const TopkTask&);
  void (*update_task)(const Update&, const UpdateTask&);
};

}  // namespace mk
