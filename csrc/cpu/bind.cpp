// The Python module marginkernels._cpu. It knows nothing of torch: tensors come as addresses, so a build outlives any torch release.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "driver.h"
#include "pool.h"
#include "rows.h"
#include "threads.h"

namespace py = pybind11;
using Address = uintptr_t;  // of a buffer that the caller keeps alive; 0 where there is none

namespace {

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

mk::Problem make_problem(int64_t n, int64_t d, int64_t c, Address x, int x_dtype, Address w, int w_dtype, int64_t w_stride, Address row_factor,
                         Address bias, Address labels, Address scale, Address threshold, float t, int form, bool normalize_weight) {
  return {n, d, c, at<void>(x), x_dtype, at<void>(w), w_dtype, w_stride, at<float>(row_factor), at<float>(bias), at<int64_t>(labels),
          at<float>(scale), at<float>(threshold), t, form, normalize_weight};
}

void row_pass(const mk::Problem& p, const std::string& level, int threads, bool uniform, Address total, Address top, Address moment, Address u,
              Address class_factor, Address kept, int64_t kept_bytes) {
  const mk::Kernels& k = mk::choose(p.x_dtype, level);
  py::gil_scoped_release released;
  mk::row_pass(k, p, threads, uniform, {at<float>(total), at<float>(top), at<float>(moment), at<float>(u), at<float>(class_factor),
                                       at<char>(kept), kept_bytes});
}

void class_pass(const mk::Problem& p, const std::string& level, int threads, Address lse, Address softmax, Address uniform, Address target,
                Address bias, Address class_factor, Address kept, int64_t kept_bytes, Address dw, Address db) {
  const mk::Kernels& k = mk::choose(p.x_dtype, level);
  py::gil_scoped_release released;
  mk::class_pass(k, p, threads, {at<float>(lse), at<float>(softmax), at<float>(uniform), at<float>(target), at<float>(bias), at<char>(kept), kept_bytes},
                 at<float>(class_factor), at<void>(dw), at<float>(db));
}

mk::RowsProblem make_rows_problem(int64_t n, int64_t d, int64_t c, Address x, int x_dtype, Address w, int w_dtype, int64_t w_stride,
                                  Address labels, bool normalize_embedding, bool normalize_weight) {
  return {n, d, c, at<void>(x), x_dtype, at<void>(w), w_dtype, w_stride, at<int64_t>(labels), normalize_embedding, normalize_weight};
}

void rows(const mk::RowsProblem& p, int threads, Address prepared, Address row_factor, Address similarity, Address cosine) {
  py::gil_scoped_release released;
  mk::prepare_rows(p, threads, at<void>(prepared), at<float>(row_factor), at<double>(similarity), at<double>(cosine));
}

void row_gradient(const mk::RowsProblem& p, int threads, Address u, Address softmax, Address target, Address dx) {
  py::gil_scoped_release released;
  mk::row_gradient(p, threads, at<float>(u), at<float>(softmax), at<float>(target), at<void>(dx));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using namespace py::literals;
  mk::openmp_pool();  // from now on forks are noticed
  py::class_<mk::Problem>(m, "Problem")
      .def(py::init(&make_problem), py::kw_only(), "n"_a, "d"_a, "c"_a, "x"_a, "x_dtype"_a, "w"_a, "w_dtype"_a, "w_stride"_a, "row_factor"_a,
           "bias"_a, "labels"_a, "scale"_a, "threshold"_a, "t"_a, "form"_a, "normalize_weight"_a);
  py::class_<mk::RowsProblem>(m, "RowsProblem")
      .def(py::init(&make_rows_problem), py::kw_only(), "n"_a, "d"_a, "c"_a, "x"_a, "x_dtype"_a, "w"_a, "w_dtype"_a, "w_stride"_a, "labels"_a,
           "normalize_embedding"_a, "normalize_weight"_a);
  py::class_<mk::Block>(m, "Block", py::buffer_protocol())
      .def(py::init<int64_t>(), "bytes"_a)
      .def_static("waiting", &mk::Block::waiting)
      .def_static("drop", &mk::Block::drop)
      .def_buffer([](mk::Block& b) {
        return py::buffer_info(b.start(), 1, py::format_descriptor<uint8_t>::format(), 1, {b.bytes()}, {int64_t(1)});
      });
  m.def("rows", &rows, "problem"_a, py::kw_only(), "threads"_a, "prepared"_a, "row_factor"_a, "similarity"_a, "cosine"_a);
  m.def("row_gradient", &row_gradient, "problem"_a, py::kw_only(), "threads"_a, "u"_a, "softmax"_a, "target"_a, "dx"_a);
  m.def("row_pass", &row_pass, "problem"_a, py::kw_only(), "level"_a, "threads"_a, "uniform"_a, "total"_a, "top"_a, "moment"_a, "u"_a,
        "class_factor"_a, "kept"_a, "kept_bytes"_a);
  m.def("class_pass", &class_pass, "problem"_a, py::kw_only(), "level"_a, "threads"_a, "lse"_a, "softmax"_a, "uniform"_a, "target"_a,
        "bias"_a, "class_factor"_a, "kept"_a, "kept_bytes"_a, "dw"_a, "db"_a);
  m.def("levels", [] {
    std::vector<std::string> names;
    for (const mk::Kernels* k : mk::levels()) names.push_back(k->name);
    return names;
  });
  m.def("kept_panel", [](int x_dtype, const std::string& level) {
    const mk::KeptPanel panel = mk::kept_panel(mk::choose(x_dtype, level));
    return std::tuple(panel.bytes, panel.rows, panel.classes);
  }, "x_dtype"_a, "level"_a);
  m.def("level_for", [](int x_dtype) { return mk::choose(x_dtype, "").name; }, "x_dtype"_a);
}
