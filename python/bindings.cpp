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
#include "aim/stream.h"

namespace py = pybind11;

namespace {

// A one-dimensional contiguous array whose records are Ts.
template <class T>
T* records(py::array& array, const char* name) {
  if (array.ndim() != 1 || array.itemsize() != static_cast<py::ssize_t>(sizeof(T)) ||
      (array.size() > 1 && array.strides(0) != array.itemsize())) {
    throw std::invalid_argument(std::string(name) + ": expected a contiguous array of " +
                                std::to_string(sizeof(T)) + "-byte records");
  }
  return static_cast<T*>(array.mutable_data());
}

// A contiguous float64 or int64 table that holds `count` Ts, given by address.
template <class T>
T* table(uintptr_t address) {
  return reinterpret_cast<T*>(address);
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

aim::Execution execution(int threads, uintptr_t team) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  return {reinterpret_cast<aim::Team>(team), threads, requested_isa()};
}

void step(py::array tensors, py::array groups, uintptr_t rows, uintptr_t statistics,
          uintptr_t control, int threads, uintptr_t team) {
  const aim::Execution how = execution(threads, team);
  const auto* tensor_table = records<aim::Tensor>(tensors, "tensors");
  const auto* group_table = records<aim::Group>(groups, "groups");
  const int64_t tensor_count = tensors.size(), group_count = groups.size();
  aim::Status status;
  {
    py::gil_scoped_release release;
    status = aim::step(tensor_table, tensor_count, group_table, table<aim::Row>(rows),
                       table<aim::Statistics>(statistics), group_count,
                       table<aim::Control>(control), how);
  }
  raise(status, how.isa);
}

void emit(py::array tensors, py::array groups, uintptr_t rows, int threads, uintptr_t team) {
  const aim::Execution how = execution(threads, team);
  const auto* tensor_table = records<aim::Tensor>(tensors, "tensors");
  const auto* group_table = records<aim::Group>(groups, "groups");
  const int64_t tensor_count = tensors.size(), group_count = groups.size();
  aim::Status status;
  {
    py::gil_scoped_release release;
    status =
        aim::emit(tensor_table, tensor_count, group_table, table<aim::Row>(rows), group_count, how);
  }
  raise(status, how.isa);
}

void stream(py::array tensors, bool live, bool nontemporal, int64_t chunk, float factor,
            int threads, uintptr_t team) {
  const aim::Execution how = execution(threads, team);
  const auto* tensor_table = records<aim::Tensor>(tensors, "tensors");
  const int64_t tensor_count = tensors.size();
  aim::Status status;
  {
    py::gil_scoped_release release;
    status = aim::stream(tensor_table, tensor_count, {live, nontemporal, chunk}, factor, how);
  }
  raise(status, how.isa);
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
  return info;
}

// Field offsets as this compiler lays them out, for the test that compares them with
// aim_kernels/rows.py.
py::dict layout() {
  using aim::Group, aim::Row, aim::Statistics, aim::Tensor;
  py::dict tensor, group;
#define AIM_FIELD(into, type, field) into[#field] = offsetof(type, field)
  AIM_FIELD(tensor, Tensor, param);
  AIM_FIELD(tensor, Tensor, grad);
  AIM_FIELD(tensor, Tensor, exp_avg);
  AIM_FIELD(tensor, Tensor, exp_avg_sq);
  AIM_FIELD(tensor, Tensor, master);
  AIM_FIELD(tensor, Tensor, anchor);
  AIM_FIELD(tensor, Tensor, step);
  AIM_FIELD(tensor, Tensor, numel);
  AIM_FIELD(tensor, Tensor, first);
  AIM_FIELD(tensor, Tensor, group);
  AIM_FIELD(tensor, Tensor, dtype);
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
  AIM_FIELD(group, Group, rule);
  AIM_FIELD(group, Group, nesterov);
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
  module.def("step", &step, py::arg("tensors"), py::arg("groups"), py::arg("rows"),
             py::arg("statistics"), py::arg("control"), py::arg("threads"), py::arg("team") = 0,
             "One optimizer step over all tensors; `rows`, `statistics`, `control` and `team` are "
             "addresses.");
  module.def("emit", &emit, py::arg("tensors"), py::arg("groups"), py::arg("rows"),
             py::arg("threads"), py::arg("team") = 0,
             "Writes the live weights of all tensors that have a master.");
  module.def("stream", &stream, py::arg("tensors"), py::arg("live"), py::arg("nontemporal"),
             py::arg("chunk"), py::arg("factor"), py::arg("threads"), py::arg("team") = 0,
             "Moves the bytes of a step and computes next to nothing: the memory floor.");
  module.def("isas", &isas, "(name, compiled, supported) of every instruction set.");
  module.def("active_isa", &active_isa,
             "The instruction set that a step uses now (AIM_KERNELS_ISA forces one).");
  module.def("philox", &philox, py::arg("seed"), py::arg("counter"), "Philox4x32-10.");
  module.def("build_info", &build_info,
             "Compiler, C++ standard and instruction sets of this build.");
  module.def("layout", &layout, "Offsets and sizes of the tables as compiled.");
}
