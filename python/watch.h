// What a plan looks at before every step, in one call: thousands of small questions to tensors,
// which a loop in Python asks several times slower. Part of the binding. Includes nothing of torch:
// what it calls there comes from aim_kernels/step/watch.py.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
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

inline py::object attribute(PyObject* self, const py::str& name) {
  PyObject* result = PyObject_GetAttr(self, name.ptr());
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline PyObject* item(const py::list& list, size_t i) {
  // The lists are the plan's own, but anybody may have shortened them.
  PyObject* found = PyList_GetItem(list.ptr(), static_cast<py::ssize_t>(i));
  if (!found) throw py::error_already_set();
  return found;
}

// Where a tensor is and how it lies there.
struct Look {
  uint64_t address = 0;
  int64_t room = 0;          // bytes from there to the end of its storage
  int64_t element_size = 0;  // in bytes
  int32_t dtype = 0;         // torch's number
  std::vector<int64_t> shape, strides;

  bool empty() const {
    for (const int64_t size : shape)
      if (size == 0) return true;
    return false;
  }

  // Whether its storage has all its elements, if these are one block.
  bool is_whole() const {
    int64_t bytes = element_size;
    for (const int64_t size : shape) bytes *= size;
    return bytes <= room;
  }

  // Dimensions of one element, and all of an empty tensor, may have any stride.
  bool lies_as(const std::vector<int64_t>& wanted) const {
    if (wanted.size() != strides.size()) return false;
    if (empty()) return true;
    for (size_t dim = 0; dim < shape.size(); ++dim)
      if (shape[dim] != 1 && strides[dim] != wanted[dim]) return false;
    return true;
  }

  bool is(const Look& other) const {
    return address == other.address && dtype == other.dtype && shape == other.shape &&
           lies_as(other.strides);
  }

  // The same of a tensor, to the last stride.
  bool is(const TensorFunctions& ask, TensorFunctions::Handle tensor) const {
    int64_t dim = 0, *sizes = nullptr, *steps = nullptr;
    int32_t type = 0;
    void* data = nullptr;
    return !ask.data(tensor, &data) && reinterpret_cast<uint64_t>(data) == address &&
           !ask.dtype(tensor, &type) && type == dtype && !ask.dim(tensor, &dim) &&
           dim == static_cast<int64_t>(shape.size()) && !ask.sizes(tensor, &sizes) &&
           std::equal(shape.begin(), shape.end(), sizes) && !ask.strides(tensor, &steps) &&
           std::equal(strides.begin(), strides.end(), steps);
  }
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
  // `kind`: the class whose tensors are asked through their `_local_tensor`, or None; `describe`:
  // (address, dtype, shape, strides, bytes from there to the end of the storage, bytes of an
  // element) of any tensor; `quick`: None, or what saves calling it: the
  // class torch.Tensor, the descriptor of `_cdata`, a function that returns a new reference to a
  // tensor in a capsule, and a capsule of TensorFunctions.
  Watch(py::list param_groups, py::list groups, py::list params, py::list idle, py::list strides,
        py::dict states, py::list keys, py::list names, py::list values, py::object kind,
        py::object describe, py::object is_negative, py::object quick)
      : param_groups_(std::move(param_groups)),
        groups_(std::move(groups)),
        params_(std::move(params)),
        states_(std::move(states)),
        keys_(std::move(keys)),
        names_(std::move(names)),
        values_(std::move(values)),
        kind_(std::move(kind)),
        describe_(std::move(describe)),
        is_negative_(std::move(is_negative)) {
    if (!quick.is_none()) {
      const auto parts = py::cast<py::tuple>(quick);
      if (parts.size() != 4 || Py_TYPE(py::object(parts[1]).ptr()) != &PyGetSetDescr_Type)
        throw std::invalid_argument("quick: expected a class, a descriptor, a function, a capsule");
      class_ = parts[0];
      descriptor_ = parts[1];
      if (!PyType_Check(class_.ptr()) ||
          !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(class_.ptr()),
                            PyDescr_TYPE(descriptor_.ptr()))) {
        throw std::invalid_argument("quick: the descriptor is of another class");
      }
      functions_ = static_cast<const TensorFunctions*>(
          PyCapsule_GetPointer(py::object(parts[3]).ptr(), "aim.tensor_functions"));
      if (!functions_) throw py::error_already_set();
    }
    const size_t count = params_.size();
    if (idle.size() != count || strides.size() != count || names_.size() != keys_.size() ||
        values_.size() != keys_.size()) {
      throw std::invalid_argument("idle, strides: one entry a parameter; names, values: a key");
    }
    for (size_t i = 0; i < count; ++i) {
      idle_.push_back(item(idle, i) == Py_True);
      seen_.emplace_back();
      strides_.push_back(py::cast<std::vector<int64_t>>(py::handle(item(strides, i))));
      if (!idle_[i]) look(item(params_, i), seen_[i]);
    }
    const py::object keep = functions_ ? py::object(py::cast<py::tuple>(quick)[2]) : py::none();
    for (const py::handle& list : values_) {
      begins_.push_back(states_seen_.size());
      for (const py::handle& value : py::cast<py::list>(list)) {
        states_seen_.emplace_back();
        if (!value.is_none()) look(value.ptr(), states_seen_.back());
        const bool quickly = !value.is_none() && functions_ && is_plain(value.ptr());
        void* kept = nullptr;
        if (quickly) {
          const py::object capsule = keep(value);
          kept = PyCapsule_GetPointer(capsule.ptr(), nullptr);
          if (!kept) throw py::error_already_set();
        }
        states_kept_.emplace_back(functions_, kept);
      }
    }
  }

  // Whether another watch found the states as this one did.
  bool sees(const Watch& other) const {
    if (states_seen_.size() != other.states_seen_.size()) return false;
    for (size_t i = 0; i < states_seen_.size(); ++i)
      if (!states_seen_[i].is(other.states_seen_[i])) return false;
    return true;
  }

  // Stands for the address of a gradient that has none: an empty one, which nothing reads, or one
  // that is marked odd.
  static constexpr uint64_t kNoAddress = 8;

  // Fills `addresses` with those of the gradients (0: none), `odd` with whether one cannot be read
  // as it is, `grads` with the gradients. False where a group, a parameter, a state, or the kind of
  // a gradient changed.
  bool read(py::array_t<uint64_t, py::array::c_style> addresses,
            py::array_t<bool, py::array::c_style> odd, py::list grads) {
    const size_t count = seen_.size();
    if (params_.size() != count || static_cast<size_t>(addresses.size()) != count ||
        static_cast<size_t>(odd.size()) != count || grads.size() != count) {
      throw std::invalid_argument("addresses, odd, grads: expected one entry a parameter");
    }
    if (!same_groups() || !same_states()) return false;
    uint64_t* address = addresses.mutable_data();
    bool* is_odd = odd.mutable_data();
    for (size_t i = 0; i < count; ++i) {
      PyObject* p = item(params_, i);
      py::object grad = attribute(p, grad_name_);
      address[i] = 0;
      is_odd[i] = false;
      if (idle_[i]) {
        if (!grad.is_none()) return false;
        continue;
      }
      if (!is_as_seen(p, seen_[i])) return false;
      if (!grad.is_none()) {
        const py::object local = look(grad.ptr(), now_);
        if (now_.dtype != seen_[i].dtype || now_.shape != seen_[i].shape) return false;
        address[i] = now_.address ? now_.address : kNoAddress;
        is_odd[i] = !now_.lies_as(strides_[i]) || (!now_.address && !now_.empty()) ||
                    !now_.is_whole() || is_negative(local.ptr());
      }
      grads[i] = std::move(grad);
    }
    return true;
  }

 private:
  // What of `tensor` is here, which is returned, as it lies in memory.
  py::object look(PyObject* tensor, Look& into) const {
    py::object here = py::reinterpret_borrow<py::object>(tensor);
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == kind_.ptr())
      here = attribute(tensor, local_name_);
    if (look_quickly(here.ptr(), into)) return here;
    const py::tuple told = describe_(py::handle(tensor));
    into.address = told[0].cast<uint64_t>();
    into.dtype = told[1].cast<int32_t>();
    into.shape = told[2].cast<std::vector<int64_t>>();
    into.strides = told[3].cast<std::vector<int64_t>>();
    into.room = told[4].cast<int64_t>();
    into.element_size = told[5].cast<int64_t>();
    return here;
  }

  // The same for plain tensors. False for all others: of what only pretends to have memory, torch
  // would complain.
  bool look_quickly(PyObject* tensor, Look& into) const {
    if (!functions_ || !is_plain(tensor)) return false;
    void* const pointer = pointer_of(tensor);
    if (!pointer) return false;
    int32_t layout = 1;
    int64_t dim = 0, offset = 0, bytes = 0, *shape = nullptr, *strides = nullptr;
    void* data = nullptr;
    if (functions_->layout(&pointer, &layout) || layout != 0) return false;
    if (functions_->dtype(&pointer, &into.dtype) || functions_->dim(&pointer, &dim) ||
        functions_->sizes(&pointer, &shape) || functions_->strides(&pointer, &strides) ||
        functions_->data(&pointer, &data) || functions_->offset(&pointer, &offset) ||
        functions_->storage_size(&pointer, &bytes)) {
      return false;
    }
    into.address = reinterpret_cast<uint64_t>(data);
    into.element_size = static_cast<int64_t>(functions_->element_size(into.dtype));
    into.room = bytes - offset * into.element_size;
    into.shape.assign(shape, shape + dim);
    into.strides.assign(strides, strides + dim);
    return true;
  }

  // Whether a parameter is where it was.
  bool is_as_seen(PyObject* tensor, const Look& seen) {
    if (functions_ && is_plain(tensor)) {
      void* const pointer = pointer_of(tensor);
      if (pointer && seen.is(*functions_, &pointer)) return true;
    }
    look(tensor, now_);
    return now_.is(seen);
  }

  // The pointer that is a plain tensor.
  void* pointer_of(PyObject* tensor) const {
    const auto* descriptor = reinterpret_cast<PyGetSetDescrObject*>(descriptor_.ptr());
    PyObject* number = descriptor->d_getset->get(tensor, descriptor->d_getset->closure);
    if (!number) throw py::error_already_set();
    void* const pointer = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    return pointer;
  }

  // torch.Tensor and its subclasses that leave all operations to torch, such as nn.Parameter.
  bool is_plain(PyObject* tensor) const {
    PyTypeObject* const type = Py_TYPE(tensor);
    for (const PyTypeObject* known : plain_)
      if (type == known) return true;
    auto* const base = reinterpret_cast<PyTypeObject*>(class_.ptr());
    if (!PyType_IsSubtype(type, base)) return false;
    const py::object own = attribute(reinterpret_cast<PyObject*>(type), dispatch_name_);
    if (own.ptr() != attribute(class_.ptr(), dispatch_name_).ptr()) return false;
    plain_[1] = plain_[0];
    plain_[0] = type;
    return true;
  }

  // Whether a gradient's values are those in memory, negated: torch negates views of complex
  // numbers when they are read.
  bool is_negative(PyObject* tensor) const {
    PyObject* result = PyObject_Vectorcall(is_negative_.ptr(), &tensor, 1, nullptr);
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result).ptr() == Py_True;
  }

  // Whether the list still holds the very groups of the plan, and those the very parameters.
  bool same_groups() const {
    if (param_groups_.size() != groups_.size()) return false;
    size_t at = 0;
    for (size_t number = 0; number < groups_.size(); ++number) {
      PyObject* const group = item(param_groups_, number);
      if (group != item(groups_, number) || !PyDict_Check(group)) return false;
      PyObject* const list = PyDict_GetItem(group, params_name_.ptr());
      if (!list || !PyList_Check(list)) return false;
      for (py::ssize_t i = 0; i < PyList_GET_SIZE(list); ++i, ++at) {
        if (at >= params_.size() || PyList_GET_ITEM(list, i) != item(params_, at)) return false;
      }
    }
    return at == params_.size();
  }

  // Whether the states are the very objects that the plan knows, where they were.
  bool same_states() {
    size_t number = 0;
    PyObject *key, *state, *name, *value;
    for (py::ssize_t outer = 0; PyDict_Next(states_.ptr(), &outer, &key, &state); ++number) {
      if (number >= keys_.size() || item(keys_, number) != key) return false;
      PyObject* const names = item(names_, number);
      if (names == Py_None) continue;  // no parameter's
      PyObject* const values = item(values_, number);
      if (!PyDict_Check(state) || !PyList_Check(names) || !PyList_Check(values)) return false;
      const py::ssize_t size = PyDict_Size(state);
      size_t at = begins_[number];
      if (size != PyList_GET_SIZE(names) || size != PyList_GET_SIZE(values) ||
          at + static_cast<size_t>(size) > states_seen_.size()) {
        return false;
      }
      py::ssize_t inner = 0, i = 0;
      for (; i < size && PyDict_Next(state, &inner, &name, &value); ++i, ++at) {
        if (PyList_GET_ITEM(names, i) != name) return false;
        PyObject* const known = PyList_GET_ITEM(values, i);
        if (known == Py_None) continue;
        if (known != value) return false;
        const auto kept = states_kept_[at].get();
        if (kept && states_seen_[at].is(*functions_, kept)) continue;
        look(value, now_);
        if (!now_.is(states_seen_[at])) return false;
      }
    }
    return number == keys_.size();
  }

  py::list param_groups_, groups_, params_;
  py::dict states_;
  py::list keys_, names_, values_;
  py::object kind_, describe_, is_negative_;
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
