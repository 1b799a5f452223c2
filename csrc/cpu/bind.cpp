// The Python module marginkernels._cpu. It is independent of torch: tensors are passed as addresses, so one build works with every torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "driver.h"
#include "pool.h"
#include "row_math.h"
#include "threads.h"
#include "topk.h"

namespace py = pybind11;
using Address = uintptr_t;  // of a buffer that the caller keeps alive; 0 for none

namespace {

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

mk::PassInputs make_pass_inputs(int64_t n, int64_t d, int64_t c, Address x, int x_dtype, Address w, int w_dtype, int64_t w_stride,
                                Address row_factor, Address bias, Address labels, Address scale, Address threshold, Address t,
                                int non_target, bool normalize_weight, int64_t sub_centers) {
  mk::PassInputs p{};
  p.n = n, p.d = d, p.c = c;
  p.x = at<void>(x), p.x_dtype = x_dtype;
  p.w = at<void>(w), p.w_dtype = w_dtype, p.w_stride = w_stride;
  p.row_factor = at<float>(row_factor);
  p.bias = at<float>(bias);
  p.labels = at<int64_t>(labels);
  p.scale = at<float>(scale);
  p.threshold = at<float>(threshold);
  p.t = at<float>(t);
  p.non_target = non_target;
  p.normalize_weight = normalize_weight;
  p.sub_centers = sub_centers;
  return p;
}

mk::HeadInputs make_head_inputs(int64_t n, int64_t d, int64_t c, Address x, int x_dtype, Address w, int w_dtype, int64_t w_stride,
                                Address labels, bool normalize_embedding, bool normalize_weight) {
  mk::HeadInputs p{};
  p.n = n, p.d = d, p.c = c;
  p.x = at<void>(x), p.x_dtype = x_dtype;
  p.w = at<void>(w), p.w_dtype = w_dtype, p.w_stride = w_stride;
  p.labels = at<int64_t>(labels);
  p.normalize_embedding = normalize_embedding;
  p.normalize_weight = normalize_weight;
  return p;
}

// Runs Python's handlers of pending signals; true where one raised. The exception stays set for the caller. Does nothing outside Python's
// main thread.
bool signaled() noexcept {
  const py::gil_scoped_acquire acquired;
  return PyErr_CheckSignals() != 0;
}

void row_pass(const mk::PassInputs& p, const std::string& level, int threads, int reduction, Address value, Address max_logit, Address cos,
              Address center, Address class_factor, Address saved, int64_t saved_bytes) {
  const mk::Kernels& k = mk::choose(p.x_dtype, level);
  const mk::RowOutput out{at<double>(value),       at<float>(max_logit), at<float>(cos), at<float>(center),
                          at<float>(class_factor), at<char>(saved),      saved_bytes};
  bool finished;
  {
    py::gil_scoped_release released;
    finished = mk::row_pass(k, p, threads, reduction, out, &signaled);
  }
  if (!finished) throw py::error_already_set();
}

void class_pass(const mk::PassInputs& p, const std::string& level, int threads, Address lse, Address d_lse, Address d_logit_sum,
                Address d_target_cos, Address d_target_bias, int reduction, Address class_factor, Address saved, int64_t saved_bytes,
                Address d_weight, Address d_bias, const mk::Update* update) {
  const mk::Kernels& k = mk::choose(p.x_dtype, level);
  const mk::ClassInput in{
      at<double>(lse), at<float>(d_lse), at<float>(d_logit_sum), at<float>(d_target_cos), at<float>(d_target_bias), at<char>(saved),
      saved_bytes,     reduction};
  bool finished;
  {
    py::gil_scoped_release released;
    // A step is not interrupted: a weight that is updated in part would be lost.
    finished = mk::class_pass(k, p, threads, in, at<float>(class_factor), at<void>(d_weight), at<float>(d_bias),
                              update ? nullptr : &signaled, update);
  }
  if (!finished) throw py::error_already_set();
}

mk::Update make_update(int rule, bool nesterov, bool stochastic, double lr, double weight_decay, double momentum, double first,
                       double second, double eps, uint64_t key, Address w, int w_dtype, int64_t d, Address first_moment,
                       Address second_moment, int moment_dtype, Address steps, Address rows, int64_t first_row) {
  return {rule,
          nesterov,
          stochastic,
          lr,
          weight_decay,
          momentum,
          first,
          second,
          eps,
          key,
          at<void>(w),
          w_dtype,
          d,
          {at<void>(first_moment), at<void>(second_moment)},
          moment_dtype,
          at<float>(steps),
          at<int64_t>(rows),
          first_row};
}

void update(const mk::Update& u, const std::string& level, int threads, int64_t rows, Address g, int g_dtype) {
  const std::vector<const mk::Kernels*> all = mk::levels();
  const mk::Kernels* found = all.back();  // they all give the same bits
  for (const mk::Kernels* k : all)
    if (level == k->name) found = k;
  const py::gil_scoped_release released;
  mk::update(*found, u, threads, rows, at<void>(g), g_dtype);
}

void topk(const mk::HeadInputs& p, const std::string& level, int threads, int64_t k, int64_t sub_centers, Address bias, Address scale,
          Address scores, Address classes) {
  const mk::Kernels& kernels = mk::choose(p.x_dtype, level);
  bool finished;
  {
    py::gil_scoped_release released;
    finished = mk::topk(kernels, p, threads, k, sub_centers, at<float>(bias), at<float>(scale), at<float>(scores), at<int64_t>(classes),
                        &signaled);
  }
  if (!finished) throw py::error_already_set();
}

void prepare_inputs(const mk::HeadInputs& p, int threads, Address x, Address row_factor, Address target_similarity, Address target_cos) {
  bool finished;
  {
    py::gil_scoped_release released;
    finished = mk::prepare_inputs(p, threads, at<void>(x), at<float>(row_factor), at<double>(target_similarity), at<double>(target_cos),
                                  &signaled);
  }
  if (!finished) throw py::error_already_set();
}

void row_gradient(const mk::HeadInputs& p, int threads, Address mean_center, Address d_lse, Address d_target_cos, Address dx) {
  bool finished;
  {
    py::gil_scoped_release released;
    finished = mk::row_gradient(p, threads, at<float>(mean_center), at<float>(d_lse), at<float>(d_target_cos), at<void>(dx), &signaled);
  }
  if (!finished) throw py::error_already_set();
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using namespace py::literals;
  mk::openmp_pool();  // registers the handler that notices a fork
  py::class_<mk::PassInputs>(m, "PassInputs")
      .def(py::init(&make_pass_inputs), py::kw_only(), "n"_a, "d"_a, "c"_a, "x"_a, "x_dtype"_a, "w"_a, "w_dtype"_a, "w_stride"_a,
           "row_factor"_a, "bias"_a, "labels"_a, "scale"_a, "threshold"_a, "t"_a, "non_target"_a, "normalize_weight"_a, "sub_centers"_a);
  py::class_<mk::HeadInputs>(m, "HeadInputs")
      .def(py::init(&make_head_inputs), py::kw_only(), "n"_a, "d"_a, "c"_a, "x"_a, "x_dtype"_a, "w"_a, "w_dtype"_a, "w_stride"_a,
           "labels"_a, "normalize_embedding"_a, "normalize_weight"_a);
  py::class_<mk::Update>(m, "Update")
      .def(py::init(&make_update), py::kw_only(), "rule"_a, "nesterov"_a, "stochastic"_a, "lr"_a, "weight_decay"_a, "momentum"_a, "first"_a,
           "second"_a, "eps"_a, "key"_a, "w"_a, "w_dtype"_a, "d"_a, "first_moment"_a, "second_moment"_a, "moment_dtype"_a, "steps"_a,
           "rows"_a, "first_row"_a);
  py::class_<mk::Block>(m, "Block", py::buffer_protocol())
      .def(py::init<int64_t, const std::string&>(), "bytes"_a, "purpose"_a)
      .def_static("cached", &mk::Block::cached)
      .def_static("release", &mk::Block::release)
      .def_buffer([](mk::Block& b) {
        return py::buffer_info(b.start(), 1, py::format_descriptor<uint8_t>::format(), 1, {b.bytes()}, {int64_t(1)});
      });
  m.def("prepare_inputs", &prepare_inputs, "inputs"_a, py::kw_only(), "threads"_a, "x"_a, "row_factor"_a, "target_similarity"_a,
        "target_cos"_a);
  m.def("row_gradient", &row_gradient, "inputs"_a, py::kw_only(), "threads"_a, "mean_center"_a, "d_lse"_a, "d_target_cos"_a, "dx"_a);
  m.def("row_pass", &row_pass, "inputs"_a, py::kw_only(), "level"_a, "threads"_a, "reduction"_a, "value"_a, "max_logit"_a, "cos"_a,
        "center"_a, "class_factor"_a, "saved"_a, "saved_bytes"_a);
  m.def("class_pass", &class_pass, "inputs"_a, py::kw_only(), "level"_a, "threads"_a, "lse"_a, "d_lse"_a, "d_logit_sum"_a, "d_target_cos"_a,
        "d_target_bias"_a, "reduction"_a, "class_factor"_a, "saved"_a, "saved_bytes"_a, "d_weight"_a, "d_bias"_a, "update"_a = py::none());
  m.def("update", &update, "update"_a, py::kw_only(), "level"_a, "threads"_a, "rows"_a, "g"_a, "g_dtype"_a);
  m.def("topk", &topk, "inputs"_a, py::kw_only(), "level"_a, "threads"_a, "k"_a, "sub_centers"_a, "bias"_a, "scale"_a, "scores"_a,
        "classes"_a);
  m.def(
      "levels",
      [](bool here) {
        std::vector<std::string> names;
        for (const mk::Kernels* k : mk::levels(here)) names.push_back(k->name);
        return names;
      },
      "here"_a = true);
  m.def(
      "saved_panel",
      [](int x_dtype, const std::string& level) {
        const mk::SavedPanel panel = mk::saved_panel(mk::choose(x_dtype, level));
        return std::tuple(panel.bytes, panel.rows, panel.classes);
      },
      "x_dtype"_a, "level"_a);
  m.def("level_for", [](int x_dtype) { return mk::choose(x_dtype, "").name; }, "x_dtype"_a);
}
