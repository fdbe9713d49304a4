// The pybind11 binding: tables and addresses in, status -> exception, GIL released. All tensor
// checks live in Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "aim/isa.h"
#include "aim/step.h"
#include "bench/stream.h"
#include "watch.h"

namespace py = pybind11;

namespace {

// A one-dimensional contiguous array whose records are Ts.
template <class T>
T* records(py::array& array, const char* name) {
  if (array.ndim() != 1 || array.dtype().kind() != 'V' ||
      array.itemsize() != static_cast<py::ssize_t>(sizeof(T)) ||
      (array.size() > 1 && array.strides(0) != array.itemsize())) {
    throw std::invalid_argument(std::string(name) + ": expected a contiguous array of " +
                                std::to_string(sizeof(T)) + "-byte records");
  }
  return static_cast<T*>(array.mutable_data());
}

// A contiguous table of float64 or int64 numbers as `count` Ts. Not by address: a table of another
// size would be written past its end.
template <class T, class Number>
T* table(py::array& array, int64_t count, const char* name) {
  const auto wanted = count * static_cast<int64_t>(sizeof(T) / sizeof(Number));
  if (!py::isinstance<py::array_t<Number, py::array::c_style>>(array) || array.size() != wanted) {
    throw std::invalid_argument(std::string(name) + ": expected a contiguous array of " +
                                std::to_string(wanted) + " 64-bit numbers");
  }
  return static_cast<T*>(array.mutable_data());
}

void raise(aim::Status status, const char* isa) {
  if (status == aim::Status::kOk) return;
  std::string message = aim::describe(status);
  if (status == aim::Status::kUnknownIsa || status == aim::Status::kUnsupportedIsa) {
    message = "AIM_KERNELS_ISA='" + std::string(isa ? isa : "") + "': " + message;
  }
  throw std::invalid_argument(message);
}

const char* requested_isa() { return std::getenv("AIM_KERNELS_ISA"); }

// `pool` is None or a capsule, which nobody makes by accident, of that name.
aim::Execution execution(int threads, const py::object& pool) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  void* lent = nullptr;
  if (!pool.is_none()) {
    lent = PyCapsule_GetPointer(pool.ptr(), "aim.thread_pool");
    if (!lent) throw py::error_already_set();
  }
  return {reinterpret_cast<aim::ThreadPool>(lent), threads, requested_isa()};
}

// The arrays of a call; it may lack some.
struct Arrays {
  py::array* tensors = nullptr;
  py::array* groups = nullptr;
  py::array* rows = nullptr;
  py::array* statistics = nullptr;
  py::array* control = nullptr;
};

aim::StepTables unpacked(const Arrays& from) {
  aim::StepTables tables{};
  if (from.tensors) {
    tables.tensors = records<aim::Tensor>(*from.tensors, "tensors");
    tables.tensor_count = from.tensors->size();
  }
  if (from.groups) {
    tables.groups = records<aim::Group>(*from.groups, "groups");
    tables.group_count = from.groups->size();
  }
  const int64_t count = tables.group_count;
  if (from.rows) tables.rows = table<aim::Row, double>(*from.rows, count, "rows");
  if (from.statistics)
    tables.statistics = table<aim::Statistics, double>(*from.statistics, count, "statistics");
  if (from.control) tables.control = table<aim::Control, int64_t>(*from.control, 1, "control");
  return tables;
}

// Calls the core without the GIL.
template <class Call>
void run(const aim::Execution& how, const Call& call) {
  aim::Status status;
  {
    py::gil_scoped_release release;
    status = call();
  }
  raise(status, how.isa);
}

void step(py::array tensors, py::array groups, py::array rows, py::array statistics,
          py::array control, int threads, const py::object& pool) {
  const aim::Execution how = execution(threads, pool);
  const aim::StepTables tables = unpacked({&tensors, &groups, &rows, &statistics, &control});
  run(how, [&] { return aim::step(tables, how); });
}

void update(py::array tensors, py::array groups, py::array rows, py::array statistics,
            py::array control, py::array sums, int threads, const py::object& pool) {
  const aim::Execution how = execution(threads, pool);
  const aim::StepTables tables = unpacked({&tensors, &groups, &rows, &statistics, &control});
  auto* const into = table<aim::Statistics, double>(sums, tables.group_count, "sums");
  run(how, [&] { return aim::update(tables, how, into); });
}

void finish(py::array groups, py::array sums, py::array rows, py::array statistics,
            py::array control) {
  const aim::StepTables tables = unpacked({nullptr, &groups, &rows, &statistics, &control});
  raise(aim::finish(tables, table<aim::Statistics, double>(sums, tables.group_count, "sums")),
        nullptr);
}

void check(py::array tensors, py::array groups) {
  raise(aim::check(unpacked({&tensors, &groups})), nullptr);
}

void emit(py::array tensors, py::array groups, py::array rows, int threads,
          const py::object& pool) {
  const aim::Execution how = execution(threads, pool);
  const aim::StepTables tables = unpacked({&tensors, &groups, &rows});
  run(how, [&] { return aim::emit(tables, how); });
}

double squares(py::array tensors, int threads, const py::object& pool) {
  const aim::Execution how = execution(threads, pool);
  const aim::StepTables tables = unpacked({&tensors});
  double sum = 0;
  run(how, [&] { return aim::squares(tables, how, &sum); });
  return sum;
}

void stream_runs(py::array runs, int64_t numel, int64_t chunk, int32_t add, int threads,
                 const py::object& pool) {
  const aim::Execution how = execution(threads, pool);
  const auto* table = records<aim::bench::StreamRun>(runs, "runs");
  const int64_t count = runs.size();
  run(how, [&] { return aim::bench::stream_runs(table, count, numel, chunk, add, how); });
}

void stream(py::array tensors, bool live, bool nontemporal, int64_t chunk, float factor,
            int threads, const py::object& pool) {
  const aim::Execution how = execution(threads, pool);
  const aim::StepTables tables = unpacked({&tensors});
  run(how, [&] {
    return aim::bench::stream(tables.tensors, tables.tensor_count, {live, nontemporal, chunk},
                              factor, how);
  });
}

std::vector<std::tuple<std::string, bool, bool>> isas() {
  aim::IsaInfo info[8];
  int count = 0;
  raise(aim::list_isas(info, 8, &count), nullptr);
  std::vector<std::tuple<std::string, bool, bool>> result;
  for (int i = 0; i < count; ++i)
    result.emplace_back(info[i].name, info[i].compiled, info[i].supported);
  return result;
}

std::string active_isa() {
  const char* requested = requested_isa();
  const char* chosen = nullptr;
  raise(aim::choose_isa(requested, &chosen), requested);
  return chosen;
}

std::vector<uint32_t> philox(uint64_t seed, const std::vector<uint32_t>& counter) {
  if (counter.size() != 4) throw std::invalid_argument("counter: expected 4 words");
  std::vector<uint32_t> output(4);
  aim::philox(seed, counter.data(), output.data());
  return output;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["standard"] = static_cast<long>(__cplusplus);
  std::vector<std::string> compiled;
  for (const auto& [name, is_compiled, supported] : isas()) {
    if (is_compiled) compiled.push_back(name);
  }
  info["isas"] = compiled;
#ifdef AIM_CUDA_BUILD
  info["cuda"] = AIM_CUDA_BUILD;  // "built", or why the CUDA kernels were not
#endif
  return info;
}

// Field offsets as this compiler lays them out, for the test that compares them with
// aim_kernels/step/layout.py.
py::dict layout() {
  using aim::Group, aim::Row, aim::Statistics, aim::Tensor;
  py::dict tensor, group;
#define AIM_FIELD(into, type, field) into[#field] = offsetof(type, field)
  AIM_FIELD(tensor, Tensor, param);
  AIM_FIELD(tensor, Tensor, grad);
  AIM_FIELD(tensor, Tensor, exp_avg);
  AIM_FIELD(tensor, Tensor, exp_avg_sq);
  AIM_FIELD(tensor, Tensor, extra);
  AIM_FIELD(tensor, Tensor, master);
  AIM_FIELD(tensor, Tensor, anchor);
  AIM_FIELD(tensor, Tensor, step);
  AIM_FIELD(tensor, Tensor, exp_avg_scale);
  AIM_FIELD(tensor, Tensor, exp_avg_sq_scale);
  AIM_FIELD(tensor, Tensor, extra_scale);
  AIM_FIELD(tensor, Tensor, rest);
  AIM_FIELD(tensor, Tensor, ema);
  AIM_FIELD(tensor, Tensor, numel);
  AIM_FIELD(tensor, Tensor, first);
  AIM_FIELD(tensor, Tensor, offset);
  AIM_FIELD(tensor, Tensor, group);
  AIM_FIELD(tensor, Tensor, dtype);
  AIM_FIELD(tensor, Tensor, uncounted);
  AIM_FIELD(tensor, Tensor, moments);
  AIM_FIELD(tensor, Tensor, weights);
  AIM_FIELD(tensor, Tensor, stochastic);
  AIM_FIELD(tensor, Tensor, zero_grad);
  AIM_FIELD(tensor, Tensor, flags);
  AIM_FIELD(group, Group, lr);
  AIM_FIELD(group, Group, beta1);
  AIM_FIELD(group, Group, beta2);
  AIM_FIELD(group, Group, eps);
  AIM_FIELD(group, Group, weight_decay);
  AIM_FIELD(group, Group, momentum);
  AIM_FIELD(group, Group, dampening);
  AIM_FIELD(group, Group, scale);
  AIM_FIELD(group, Group, target);
  AIM_FIELD(group, Group, rate);
  AIM_FIELD(group, Group, lr_decay);
  AIM_FIELD(group, Group, ema_decay);
  AIM_FIELD(group, Group, lr_tensor);
  AIM_FIELD(group, Group, rule);
  AIM_FIELD(group, Group, nesterov);
  AIM_FIELD(group, Group, lr_dtype);
  AIM_FIELD(group, Group, flags);
#undef AIM_FIELD
  py::dict result;
  result["tensor"] = tensor;
  result["group"] = group;
  result["tensor_size"] = sizeof(Tensor);
  result["group_size"] = sizeof(Group);
  result["row_columns"] = sizeof(Row) / sizeof(double);
  result["statistics_columns"] = sizeof(Statistics) / sizeof(double);
  result["control_columns"] = sizeof(aim::Control) / sizeof(int64_t);
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of aim_kernels; docs/design.md describes the tables.";
  module.attr("CHUNK") = aim::kChunk;
  module.def(
      "step", &step, py::arg("tensors"), py::arg("groups"), py::arg("rows"), py::arg("statistics"),
      py::arg("control"), py::arg("threads"), py::arg("pool") = py::none(),
      "One optimizer step over all tensors; `pool` is None or a capsule \"aim.thread_pool\" of a "
      "function like GOMP_parallel.");
  module.def("update", &update, py::arg("tensors"), py::arg("groups"), py::arg("rows"),
             py::arg("statistics"), py::arg("control"), py::arg("sums"), py::arg("threads"),
             py::arg("pool") = py::none(), "A step up to its sums, which it writes.");
  module.def("finish", &finish, py::arg("groups"), py::arg("sums"), py::arg("rows"),
             py::arg("statistics"), py::arg("control"),
             "The rest of a step, for the sums over all processes.");
  module.def("emit", &emit, py::arg("tensors"), py::arg("groups"), py::arg("rows"),
             py::arg("threads"), py::arg("pool") = py::none(),
             "Writes the live weights of all tensors that have a master.");
  module.def("squares", &squares, py::arg("tensors"), py::arg("threads"),
             py::arg("pool") = py::none(),
             "The sum of squares of all gradients but the uncounted ones'.");
  module.def("check", &check, py::arg("tensors"), py::arg("groups"),
             "Raises on tables that no step could work with; rows are not looked at.");
  using aim_python::Watch;
  py::class_<Watch>(module, "Watch", "What a plan looks at before every step, in one call.")
      .def(py::init<py::list, py::list, py::list, py::list, py::list, py::dict, py::list, py::list,
                    py::list, py::object, py::object, py::object, py::object>(),
           py::arg("param_groups"), py::arg("groups"), py::arg("params"), py::arg("idle"),
           py::arg("strides"), py::arg("states"), py::arg("keys"), py::arg("names"),
           py::arg("values"), py::arg("distributed"), py::arg("describe"), py::arg("is_negative"),
           py::arg("quick"))
      .def("read", &Watch::read, py::arg("addresses"), py::arg("odd"), py::arg("grads"),
           "Takes the gradients; False where something changed that the plan must be built anew "
           "for.")
      .def("sees", &Watch::sees, py::arg("other"),
           "Whether another watch found the states as this one did.");
  module.def("stream_runs", &stream_runs, py::arg("runs"), py::arg("numel"), py::arg("chunk"),
             py::arg("add"), py::arg("threads"), py::arg("pool") = py::none(),
             "The memory floor of any arrays of `numel` elements.");
  module.def("stream", &stream, py::arg("tensors"), py::arg("live"), py::arg("nontemporal"),
             py::arg("chunk"), py::arg("factor"), py::arg("threads"), py::arg("pool") = py::none(),
             "Moves the bytes of a step and computes next to nothing: the memory floor.");
  module.def("isas", &isas, "(name, compiled, supported) of every instruction set.");
  module.def("active_isa", &active_isa,
             "The instruction set that a step uses now (AIM_KERNELS_ISA forces one).");
  module.def("philox", &philox, py::arg("seed"), py::arg("counter"), "Philox4x32-10.");
  module.def("build_info", &build_info,
             "Compiler, C++ standard and instruction sets of this build.");
  module.def("layout", &layout, "Offsets and sizes of the tables as compiled.");
}
