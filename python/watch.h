// What a plan looks at before every step, in one call: thousands of small questions to tensors,
// which a loop in Python asks several times slower. Part of the binding. Includes nothing of torch:
// what it calls there comes from aim_kernels/step/watch.py.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace aim_python {

namespace py = pybind11;

// What torch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h, which keeps its form from
// release to release) answers of a tensor. A handle points at a tensor's one pointer.
struct TensorFunctions {
  using Handle = void* const*;
  int32_t (*layout)(Handle, int32_t*);
  int32_t (*dtype)(Handle, int32_t*);
  int32_t (*dim)(Handle, int64_t*);
  int32_t (*sizes)(Handle, int64_t**);
  int32_t (*strides)(Handle, int64_t**);
  int32_t (*data)(Handle, void**);
  int32_t (*offset)(Handle, int64_t*);        // in elements, of the first in the storage
  int32_t (*storage_size)(Handle, int64_t*);  // in bytes
  size_t (*element_size)(int32_t dtype);
  int32_t (*drop)(Handle);
};

// Where a tensor is and how it lies there.
struct Look {
  uint64_t address = 0;
  int64_t room = 0;          // bytes from there to the end of its storage
  int64_t element_size = 0;  // in bytes
  int32_t dtype = 0;         // torch's number
  std::vector<int64_t> shape, strides;

  bool empty() const;

  // Whether its storage has all its elements, if these are one block.
  bool is_whole() const;

  // Dimensions of one element, and all of an empty tensor, may have any stride.
  bool lies_as(const std::vector<int64_t>& wanted) const;

  bool is(const Look& other) const;

  // The same of a tensor, to the last stride.
  bool is(const TensorFunctions& ask, TensorFunctions::Handle tensor) const;
};

// A tensor of torch's that is kept alive, by a pointer to it.
class Kept {
 public:
  Kept() = default;
  Kept(const TensorFunctions* functions, void* tensor) : functions_(functions), tensor_(tensor) {}
  Kept(Kept&& other) noexcept : functions_(other.functions_), tensor_(other.tensor_) {
    other.tensor_ = nullptr;
  }
  Kept& operator=(Kept&&) = delete;
  ~Kept() {
    if (tensor_) functions_->drop(static_cast<TensorFunctions::Handle>(tensor_));
  }
  TensorFunctions::Handle get() const { return static_cast<TensorFunctions::Handle>(tensor_); }

 private:
  const TensorFunctions* functions_ = nullptr;
  void* tensor_ = nullptr;
};

class Watch {
 public:
  // `groups`: the very dicts of `param_groups`, in their order; `params`: all their parameters;
  // `idle`: those that are only watched for a gradient, since nothing could step them; `strides`:
  // those of a gradient that can be read as it is; `keys`, `names`, `values`: what `states` holds,
  // key by key, and of each state name by name, None for a value that is nobody's business here;
  // `distributed`: the class whose tensors are asked through their `_local_tensor`, or None;
  // `describe`: (address, dtype, shape, strides, bytes from there to the end of the storage, bytes
  // of an element) of any tensor; `quick`: None, or what saves calling it: the class torch.Tensor,
  // the descriptor of `_cdata`, a function that returns a new reference to a tensor in a capsule,
  // and a capsule of TensorFunctions.
  Watch(py::list param_groups, py::list groups, py::list params, py::list idle, py::list strides,
        py::dict states, py::list keys, py::list names, py::list values, py::object distributed,
        py::object describe, py::object is_negative, py::object quick);

  // Whether another watch found the states as this one did.
  bool sees(const Watch& other) const;

  // Stands for the address of a gradient that has none: an empty one, which nothing reads, or one
  // that is marked odd.
  static constexpr uint64_t kNoAddress = 8;

  // Fills `addresses` with those of the gradients (0: none), `odd` with whether one cannot be read
  // as it is, `grads` with the gradients. False where a group, a parameter, a state, or the type or
  // shape of a gradient changed.
  bool read(py::array_t<uint64_t, py::array::c_style> addresses,
            py::array_t<bool, py::array::c_style> odd, py::list grads);

 private:
  // What of `tensor` is here, which is returned, as it lies in memory.
  py::object look(PyObject* tensor, Look& into) const;

  // The same for plain tensors. False for all others: of what only pretends to have memory, torch
  // would complain.
  bool look_quickly(PyObject* tensor, Look& into) const;

  // Whether a parameter is where it was.
  bool is_as_seen(PyObject* tensor, const Look& seen);

  // The pointer that is a plain tensor.
  void* pointer_of(PyObject* tensor) const;

  // torch.Tensor and its subclasses that leave all operations to torch, such as nn.Parameter.
  bool is_plain(PyObject* tensor) const;

  // Whether a gradient's values are those in memory, negated: torch negates views of complex
  // numbers when they are read.
  bool is_negative(PyObject* tensor) const;

  // Whether the list still holds the very groups of the plan, and those the very parameters.
  bool same_groups() const;

  // Whether the states are the very objects that the plan knows, where they were.
  bool same_states();

  py::list param_groups_, groups_, params_;
  py::dict states_;
  py::list keys_, names_, values_;
  py::object distributed_, describe_, is_negative_;
  py::str params_name_{"params"}, grad_name_{"grad"}, local_name_{"_local_tensor"};
  py::str dispatch_name_{"__torch_dispatch__"};
  py::object class_, descriptor_;
  const TensorFunctions* functions_ = nullptr;
  mutable PyTypeObject* plain_[2] = {};  // the latest classes that were found to be plain
  std::vector<bool> idle_;
  std::vector<Look> seen_, states_seen_;
  std::vector<size_t> begins_;     // of each key's states among them
  std::vector<Kept> states_kept_;  // null: one that has to be asked by its methods
  std::vector<std::vector<int64_t>> strides_;
  Look now_;
};

}  // namespace aim_python
