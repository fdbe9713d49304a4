// The pybind11 binding of the CUDA kernels: tables and addresses in, result -> exception, GIL
// released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "aim/cuda.h"

namespace py = pybind11;

namespace {

using aim::cuda::Result;
using aim::cuda::Work;

void raise(const Result& result) {
  if (result.error == 0) return;
  throw std::runtime_error("CUDA: " + std::string(result.call) + ": " + describe(result) +
                           " (error " + std::to_string(result.error) + ")");
}

Work one(const py::array& work) {
  if (work.ndim() != 1 || work.size() != 1 || work.itemsize() != static_cast<int>(sizeof(Work))) {
    throw std::invalid_argument("work: expected an array of one " + std::to_string(sizeof(Work)) +
                                "-byte record");
  }
  return *static_cast<const Work*>(work.data());
}

template <Result (*kCall)(const Work&, int32_t, void*)>
void call(const py::array& array, int32_t device, uintptr_t stream) {
  const Work work = one(array);
  Result result;
  {
    py::gil_scoped_release release;
    result = kCall(work, device, reinterpret_cast<void*>(stream));
  }
  raise(result);
}

void copy_bytes(uintptr_t from, uintptr_t to, int64_t bytes, int32_t device, uintptr_t stream) {
  raise(aim::cuda::copy_bytes(reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to),
                              bytes, device, reinterpret_cast<void*>(stream)));
}

py::dict build_info() {
  py::dict info;
  info["nvcc"] = AIM_NVCC_VERSION;
  info["architectures"] = AIM_CUDA_ARCHS;
  return info;
}

// Field offsets as this compiler lays them out, for the test that compares them with
// aim_kernels/step/layout.py.
py::dict layout() {
  using aim::cuda::Chunk, aim::cuda::Span;
  py::dict work, chunk, span;
#define AIM_FIELD(into, type, field) into[#field] = offsetof(type, field)
  AIM_FIELD(work, Work, tensors);
  AIM_FIELD(work, Work, groups);
  AIM_FIELD(work, Work, rows);
  AIM_FIELD(work, Work, statistics);
  AIM_FIELD(work, Work, control);
  AIM_FIELD(work, Work, chunks);
  AIM_FIELD(work, Work, spans);
  AIM_FIELD(work, Work, partials);
  AIM_FIELD(work, Work, phases);
  AIM_FIELD(work, Work, sums);
  AIM_FIELD(work, Work, others);
  AIM_FIELD(work, Work, grad_scale);
  AIM_FIELD(work, Work, found_inf);
  AIM_FIELD(work, Work, chunk_count);
  AIM_FIELD(work, Work, group_count);
  AIM_FIELD(work, Work, others_count);
  AIM_FIELD(work, Work, chunk_size);
  AIM_FIELD(work, Work, threads);
  AIM_FIELD(work, Work, dtypes);
  AIM_FIELD(work, Work, families);
  AIM_FIELD(chunk, Chunk, tensor);
  AIM_FIELD(chunk, Chunk, index);
  AIM_FIELD(span, Span, tensor_begin);
  AIM_FIELD(span, Span, tensor_end);
  AIM_FIELD(span, Span, chunk_begin);
  AIM_FIELD(span, Span, chunk_end);
#undef AIM_FIELD
  py::dict result;
  result["work"] = work;
  result["chunk"] = chunk;
  result["span"] = span;
  result["work_size"] = sizeof(Work);
  result["chunk_size"] = sizeof(Chunk);
  result["span_size"] = sizeof(Span);
  return result;
}

}  // namespace

PYBIND11_MODULE(AIM_CUDA_MODULE, module) {
  module.doc() = "CUDA kernels of aim_kernels; csrc/include/aim/cuda.h describes the tables.";
  module.attr("MOST_THREADS") = aim::cuda::kMostThreads;
  module.def("update", &call<aim::cuda::update>, py::arg("work"), py::arg("device"),
             py::arg("stream"), "The step of every tensor that has a gradient.");
  module.def("finish", &call<aim::cuda::finish>, py::arg("work"), py::arg("device"),
             py::arg("stream"), "Sums, thresholds, step counts and phase.");
  module.def("emit", &call<aim::cuda::emit>, py::arg("work"), py::arg("device"), py::arg("stream"),
             "Writes the live weights of all tensors that have a master.");
  module.def("copy_bytes", &copy_bytes, py::arg("source"), py::arg("target"), py::arg("bytes"),
             py::arg("device"), py::arg("stream"), "Copies on the device: the memory floor.");
  module.def("build_info", &build_info, "nvcc and the architectures of this build.");
  module.def("layout", &layout, "Offsets and sizes of the tables as compiled.");
}
