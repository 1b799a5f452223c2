// marginkernels._cuda: the launchers as Python functions. The fields of a params struct are keyword arguments; pointers are integers
// or None.
#include <pybind11/pybind11.h>

#include <type_traits>

#include "generic.h"
#include "hopper.h"
#if defined(MK_EMULATE)
#include "hopper_ptx.h"
#endif

namespace py = pybind11;

namespace {

template <class T>
void set(T& field, const py::handle& value) {
  if constexpr (std::is_pointer_v<T>) {
    field = value.is_none() ? nullptr : reinterpret_cast<T>(value.cast<uintptr_t>());
  } else {
    field = value.cast<T>();
  }
}

// Every field must be given, and nothing else: a missing argument is an error, not an uninitialized field.
class Fields {
 public:
  explicit Fields(const py::dict& given) : given_(given) {}
  template <class T>
  void operator()(const char* name, T& field) {
    if (!given_.contains(name)) throw py::key_error(std::string("missing argument ") + name);
    set(field, given_[name]);
    ++seen_;
  }
  void done() const {
    if (seen_ != given_.size()) throw py::key_error("an argument that the kernel does not have");
  }

 private:
  const py::dict& given_;
  size_t seen_ = 0;
};

#define MK_SET(name) fields(#name, p.name)

}  // namespace

PYBIND11_MODULE(MK_MODULE, m) {
  m.doc() = "CUDA kernels of marginkernels: plain launchers; see csrc/cuda/generic.h and csrc/cuda/hopper.h";
  m.def("centers", [](int w_dtype, int product, uintptr_t stream, const py::kwargs& given) {
    mk::Centers p{};
    Fields fields(given);
    MK_SET(w), MK_SET(stride), MK_SET(factor), MK_SET(out), MK_SET(count), MK_SET(d), MK_SET(given);
    fields.done();
    mk::centers(p, w_dtype, product, reinterpret_cast<void*>(stream));
  });
  m.def("row_chunk", [](int product, uintptr_t stream, const py::kwargs& given) {
    mk::RowChunk p{};
    Fields fields(given);
    MK_SET(products), MK_SET(weights), MK_SET(ld), MK_SET(start), MK_SET(row_factor), MK_SET(scale), MK_SET(threshold), MK_SET(t),
        MK_SET(bias), MK_SET(labels), MK_SET(running_max), MK_SET(total), MK_SET(cos), MK_SET(max_logit), MK_SET(decay), MK_SET(base),
        MK_SET(pow2), MK_SET(n), MK_SET(count), MK_SET(non_target), MK_SET(threads), MK_SET(reduction);
    fields.done();
    mk::row_chunk(p, product, reinterpret_cast<void*>(stream));
  });
  m.def("class_chunk", [](int product, uintptr_t stream, const py::kwargs& given) {
    mk::ClassChunk p{};
    Fields fields(given);
    MK_SET(products), MK_SET(weights), MK_SET(bias_parts), MK_SET(ld), MK_SET(start), MK_SET(row_factor), MK_SET(scale), MK_SET(threshold),
        MK_SET(t), MK_SET(bias), MK_SET(labels), MK_SET(lse), MK_SET(d_lse), MK_SET(d_logit_sum), MK_SET(pow2), MK_SET(n), MK_SET(count),
        MK_SET(non_target), MK_SET(reduction);
    fields.done();
    mk::class_chunk(p, product, reinterpret_cast<void*>(stream));
  });
  m.def("finish", [](int w_dtype, int product, uintptr_t stream, const py::kwargs& given) {
    mk::Finish p{};
    Fields fields(given);
    MK_SET(v), MK_SET(pow2), MK_SET(v_pow2), MK_SET(x), MK_SET(sorted), MK_SET(order), MK_SET(row_factor), MK_SET(d_target_cos),
        MK_SET(d_target_bias), MK_SET(w), MK_SET(stride), MK_SET(factor), MK_SET(dw), MK_SET(bias_parts), MK_SET(ld), MK_SET(db),
        MK_SET(start), MK_SET(n), MK_SET(count), MK_SET(d), MK_SET(row_blocks);
    fields.done();
    mk::finish(p, w_dtype, product, reinterpret_cast<void*>(stream));
  });
  m.def("driver_version", &mk::driver_version);
  m.def("runtime_version", &mk::runtime_version);
  m.attr("ROW_BLOCK") = mk::ROW_BLOCK;
#if defined(MK_FUSED)  // also built for compute capability 9.0
  m.def("fused_row", [](int product, uintptr_t stream, const py::kwargs& given) {
    mk::FusedRow p{};
    Fields fields(given);
    MK_SET(x), MK_SET(w), MK_SET(start), MK_SET(row_factor), MK_SET(scale), MK_SET(threshold), MK_SET(t), MK_SET(bias), MK_SET(labels),
        MK_SET(reach), MK_SET(running_max), MK_SET(total), MK_SET(cos), MK_SET(max_logit), MK_SET(center), MK_SET(pow2), MK_SET(n),
        MK_SET(count), MK_SET(d), MK_SET(non_target), MK_SET(splits), MK_SET(reduction), MK_SET(resume);
    fields.done();
    mk::fused_row(p, product, reinterpret_cast<void*>(stream));
  });
  m.def("fused_class", [](int product, uintptr_t stream, const py::kwargs& given) {
    mk::FusedClass p{};
    Fields fields(given);
    MK_SET(x), MK_SET(w), MK_SET(rows), MK_SET(bias), MK_SET(pow2), MK_SET(v), MK_SET(bias_sum), MK_SET(start), MK_SET(n), MK_SET(count),
        MK_SET(d), MK_SET(non_target), MK_SET(reduction);
    fields.done();
    mk::fused_class(p, product, reinterpret_cast<void*>(stream));
  });
  m.def("combine", [](uintptr_t stream, const py::kwargs& given) {
    mk::Combine p{};
    Fields fields(given);
    MK_SET(running_max), MK_SET(total), MK_SET(cos), MK_SET(max_logit), MK_SET(center), MK_SET(out_value), MK_SET(out_cos),
        MK_SET(out_max_logit), MK_SET(out_center), MK_SET(pow2), MK_SET(n), MK_SET(d), MK_SET(splits), MK_SET(reduction);
    fields.done();
    mk::combine(p, reinterpret_cast<void*>(stream));
  });
  m.def("fused_shared_bytes", &mk::fused_shared_bytes);
  m.attr("TILE_STATIONARY") = mk::TILE_STATIONARY;
  m.attr("TILE_STREAMED") = mk::TILE_STREAMED;
#endif
#if defined(MK_EMULATE)  // for tests
  m.def("fragment_row", &mk::hopper::fragment_row);
  m.def("fragment_column", &mk::hopper::fragment_column);
  m.def("swizzled", &mk::hopper::swizzled);
  m.def("weight_offset", &mk::hopper::weight_offset<mk::TILE_STREAMED>);
  m.def("weight_descriptor", &mk::hopper::weight_descriptor<mk::TILE_STREAMED>);
  m.def("along_sum", &mk::hopper::along_sum);
  m.def("across_sum", &mk::hopper::across_sum);
  m.def("set_late", [](bool late) { emulate::block().late = late; });
  m.def("wait_for_ever", [] {
    emulate::launch(dim3(1), dim3(32), [] {
      if (threadIdx.x != 0) __syncthreads();
    });
  });
  // One thread waits for a barrier that nobody arrives at; the others wait as well or, with `busy`, do something for ever.
  m.def("wait_for_a_barrier", [](bool busy) {
    emulate::launch(dim3(1), dim3(32), [=] {
      auto* b = reinterpret_cast<mk::hopper::Barrier*>(emulate::shared_memory());
      if (threadIdx.x == 0) mk::hopper::barrier_init(b, 1);
      __syncwarp();
      if (threadIdx.x == 0 || !busy) mk::hopper::barrier_wait(b, 0, "nobody's");
      for (;;) ++emulate::block().progress, emulate::yield();
    });
  });
#endif
}
