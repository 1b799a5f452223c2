// What the driver hands to a kernel set, and what a kernel set is. Plain data: this header is compiled once per instruction set, so it
// must not contain (or include) an inline function that a linker could merge across them.
#pragma once

#include <stdint.h>

namespace mk {

// Rows are handled 32 at a time; every buffer over rows is padded to that.
constexpr int PANEL = 32;

// The problem as marginkernels/backend/base.py describes it.
struct Problem {
  int64_t n, d, c;
  const void* x;  // (n, d), contiguous
  int x_dtype;
  const void* w;  // (c, d), rows w_stride elements apart
  int w_dtype;
  int64_t w_stride;
  const float* row_factor;  // (n)
  const float* bias;        // (c) or null
  const int64_t* labels;    // (n)
  const float* scale;       // (n)
  const float* threshold;   // (n) or null
  float t;
  int form;
  bool normalize_weight;
};

// Vectors over the padded rows. Logits are in units of log 2, so that the kernels need only exp2.
struct Rows {
  const uint32_t* along;   // the rows packed for the cosines: [panel][k][32 rows] units
  const uint32_t* across;  // the rows packed for dW: [row unit][ldn] units, class pass only
  float* factor;           // f_i
  float* slope;            // s_i f_i log2(e): the logit over the raw product where the form is the identity
  float* scale;            // s_i log2(e)
  float* threshold;        // 0 where there is none
  int32_t* label;          // -1 where the row's target is not here
  // Class pass. With p = exp2(logit - lse):
  float* lse;              // rounded to float; what the rounding lost is a factor of softmax and share
  float* softmax;          // G f: softmax_i f_i, of p
  float* uniform;          //      uniform_i f_i
  float* target;           //      target_i f_i, for the row's own class
  float* share;            // db: softmax_i / s_i, of p
  float* uniform_share;    //     uniform_i / s_i
  float* bias;             //     the row's own class
  // The six above are over a power of two, so that whatever the loss was multiplied by they neither vanish nor overflow; this is it.
  float unit;
};

// Rows [first_row, last_row) against classes [first_class, last_class).
struct RowTask {
  int64_t first_row, last_row, first_class, last_class;
  bool uniform, need_u, need_moment;
  float* class_factor;  // (c), or null where another task writes it
  // Over the task's padded rows, starting at first_row:
  float* peak;     // max of the logits, in log 2; -inf at first
  double* total;   // sum of exp2(logit - peak); sum of logits (natural) when uniform
  float* top;      // max of s c + b in log 2, where the form is not the identity
  double* moment;  // sum of p N(c)
  float* u;        // [row][ldn], sum of p N'(c) a w
  char* kept;      // what is left to the class pass of the first kept_slabs slabs; see Layout
  int64_t kept_slabs;
  uint32_t* scratch;
};

struct ClassTask {
  int64_t first_class, last_class;
  const float* class_factor;
  const char* kept;  // of the first kept_slabs slabs
  int64_t kept_slabs;
  void* dw;   // (c, d) contiguous in w's dtype, or null
  float* db;  // (c), or null
  uint32_t* scratch;
};

// How a kernel set lays out its buffers for one D. A unit is 32 bits: a float, or two bfloat16 that are neighbours along the summed index.
struct Layout {
  int64_t dk;       // units along D where D is summed over
  int64_t ldn;      // units along D where it is not, the stride of u
  int64_t classes;  // classes in a slab
  int64_t rows;     // rows in a block
  int64_t along, across, row_scratch, class_scratch;  // units: the packed rows, for each row, and a task's scratch memory
  // Bytes that a panel of a slab leaves to the class pass: [class][32 rows] of exp2(logit - base) N'(c), 0 for the row's own class, as
  // floats or, where products are of bfloat16 alone, as such; then base, [32 rows]. They lie [slab][panel].
  int64_t kept;
};

struct Kernels {
  const char* name;
  int dtypes;  // of the rows it serves: bit 1 << Dtype
  Layout (*layout)(int64_t d);
  void (*pack_along)(const Problem&, uint32_t* along);
  void (*pack_across)(const Problem&, uint32_t* across);
  void (*row_task)(const Problem&, const Rows&, const RowTask&);
  void (*class_task)(const Problem&, const Rows&, const ClassTask&);
};

}  // namespace mk
