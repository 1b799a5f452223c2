// marginkernels._cuda: the launchers as Python functions. A params struct is filled by keyword; pointers come as integers.
#include <pybind11/pybind11.h>

#include <type_traits>

#include "fused.h"
#include "slab.h"
#if defined(MK_EMULATE)
#include "hopper.h"
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

// Every field must be named, and nothing else: what is forgotten is an error, not garbage.
class Fields {
 public:
  explicit Fields(const py::dict& given) : given_(given) {}
  template <class T>
  Fields& operator()(const char* name, T& field) {
    if (!given_.contains(name)) throw py::key_error(std::string("missing argument ") + name);
    set(field, given_[name]);
    ++seen_;
    return *this;
  }
  void done() const {
    if (seen_ != given_.size()) throw py::key_error("an argument that the kernel does not have");
  }

 private:
  const py::dict& given_;
  size_t seen_ = 0;
};

#define MK_FIELD(name) (#name, p.name)

}  // namespace

PYBIND11_MODULE(MK_MODULE, m) {
  m.doc() = "CUDA kernels of marginkernels: plain launchers; see csrc/cuda/slab.h and csrc/cuda/fused.h";
  m.def("centres", [](int w_dtype, int product, uintptr_t stream, const py::kwargs& given) {
    mk::Centres p{};
    Fields fields(given);
    fields MK_FIELD(w) MK_FIELD(stride) MK_FIELD(factor) MK_FIELD(out) MK_FIELD(count) MK_FIELD(d) MK_FIELD(given).done();
    mk::centres(p, w_dtype, product, reinterpret_cast<void*>(stream));
  });
  m.def("row_slab", [](int product, uintptr_t stream, const py::kwargs& given) {
    mk::RowSlab p{};
    Fields fields(given);
    fields MK_FIELD(products) MK_FIELD(weights) MK_FIELD(ld) MK_FIELD(start) MK_FIELD(row_factor) MK_FIELD(scale) MK_FIELD(threshold)
        MK_FIELD(t) MK_FIELD(bias) MK_FIELD(labels) MK_FIELD(peak) MK_FIELD(total) MK_FIELD(moment) MK_FIELD(top) MK_FIELD(decay)
            MK_FIELD(base) MK_FIELD(gain) MK_FIELD(n) MK_FIELD(count) MK_FIELD(form) MK_FIELD(threads) MK_FIELD(uniform)
                .done();
    mk::row_slab(p, product, reinterpret_cast<void*>(stream));
  });
  m.def("class_slab", [](int product, uintptr_t stream, const py::kwargs& given) {
    mk::ClassSlab p{};
    Fields fields(given);
    fields MK_FIELD(products) MK_FIELD(weights) MK_FIELD(bias_parts) MK_FIELD(ld) MK_FIELD(start) MK_FIELD(row_factor) MK_FIELD(scale)
        MK_FIELD(threshold) MK_FIELD(t) MK_FIELD(bias) MK_FIELD(labels) MK_FIELD(lse) MK_FIELD(softmax) MK_FIELD(uniform) MK_FIELD(gain)
            MK_FIELD(n) MK_FIELD(count) MK_FIELD(form)
                .done();
    mk::class_slab(p, product, reinterpret_cast<void*>(stream));
  });
  m.def("finish", [](int w_dtype, int product, uintptr_t stream, const py::kwargs& given) {
    mk::Finish p{};
    Fields fields(given);
    fields MK_FIELD(v) MK_FIELD(gain) MK_FIELD(post) MK_FIELD(x) MK_FIELD(sorted) MK_FIELD(order) MK_FIELD(row_factor) MK_FIELD(target)
        MK_FIELD(row_bias) MK_FIELD(w) MK_FIELD(stride) MK_FIELD(factor) MK_FIELD(dw) MK_FIELD(bias_parts) MK_FIELD(ld) MK_FIELD(db)
            MK_FIELD(start) MK_FIELD(n) MK_FIELD(count) MK_FIELD(d) MK_FIELD(chunks)
                .done();
    mk::finish(p, w_dtype, product, reinterpret_cast<void*>(stream));
  });
  m.attr("CHUNK") = mk::CHUNK;
#if defined(MK_FUSED)  // built for compute capability 9.0 too
  m.def("fused_row", [](int product, uintptr_t stream, const py::kwargs& given) {
    mk::FusedRow p{};
    Fields fields(given);
    fields MK_FIELD(x) MK_FIELD(w) MK_FIELD(start) MK_FIELD(row_factor) MK_FIELD(scale) MK_FIELD(threshold) MK_FIELD(t) MK_FIELD(bias)
        MK_FIELD(labels) MK_FIELD(reach) MK_FIELD(peak) MK_FIELD(total) MK_FIELD(moment) MK_FIELD(top) MK_FIELD(u) MK_FIELD(gain) MK_FIELD(n)
            MK_FIELD(count) MK_FIELD(d) MK_FIELD(form) MK_FIELD(splits) MK_FIELD(uniform) MK_FIELD(resume)
                .done();
    mk::fused_row(p, product, reinterpret_cast<void*>(stream));
  });
  m.def("fused_class", [](int product, uintptr_t stream, const py::kwargs& given) {
    mk::FusedClass p{};
    Fields fields(given);
    fields MK_FIELD(x) MK_FIELD(w) MK_FIELD(rows) MK_FIELD(t) MK_FIELD(bias) MK_FIELD(gain) MK_FIELD(v) MK_FIELD(bias_sum) MK_FIELD(start)
        MK_FIELD(n) MK_FIELD(count) MK_FIELD(d) MK_FIELD(form)
            .done();
    mk::fused_class(p, product, reinterpret_cast<void*>(stream));
  });
  m.def("combine", [](uintptr_t stream, const py::kwargs& given) {
    mk::Combine p{};
    Fields fields(given);
    fields MK_FIELD(peak) MK_FIELD(total) MK_FIELD(moment) MK_FIELD(top) MK_FIELD(u) MK_FIELD(out_total) MK_FIELD(out_moment)
        MK_FIELD(out_top) MK_FIELD(out_u) MK_FIELD(gain) MK_FIELD(n) MK_FIELD(d) MK_FIELD(splits) MK_FIELD(uniform)
            .done();
    mk::combine(p, reinterpret_cast<void*>(stream));
  });
  m.def("fused_shared_bytes", &mk::fused_shared_bytes);
  m.attr("TILE_KEPT") = mk::TILE_KEPT;
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
#endif
}
