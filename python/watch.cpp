// The looking itself. Functions that run once a parameter are marked inline, so that the compiler
// takes them into read().
#include "watch.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace aim_python {

namespace {

py::object attribute(PyObject* self, const py::str& name) {
  PyObject* result = PyObject_GetAttr(self, name.ptr());
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

PyObject* item(const py::list& list, size_t i) {
  // The lists are the plan's own, but anybody may have shortened them.
  PyObject* found = PyList_GetItem(list.ptr(), static_cast<py::ssize_t>(i));
  if (!found) throw py::error_already_set();
  return found;
}

}  // namespace

inline bool Look::empty() const {
  for (const int64_t size : shape)
    if (size == 0) return true;
  return false;
}

inline bool Look::is_whole() const {
  int64_t bytes = element_size;
  for (const int64_t size : shape) bytes *= size;
  return bytes <= room;
}

inline bool Look::lies_as(const std::vector<int64_t>& wanted) const {
  if (wanted.size() != strides.size()) return false;
  if (empty()) return true;
  for (size_t dim = 0; dim < shape.size(); ++dim)
    if (shape[dim] != 1 && strides[dim] != wanted[dim]) return false;
  return true;
}

inline bool Look::is(const Look& other) const {
  return address == other.address && dtype == other.dtype && shape == other.shape &&
         lies_as(other.strides);
}

inline bool Look::is(const TensorFunctions& ask, TensorFunctions::Handle tensor) const {
  int64_t dim = 0, *sizes = nullptr, *steps = nullptr;
  int32_t type = 0;
  void* data = nullptr;
  return !ask.data(tensor, &data) && reinterpret_cast<uint64_t>(data) == address &&
         !ask.dtype(tensor, &type) && type == dtype && !ask.dim(tensor, &dim) &&
         dim == static_cast<int64_t>(shape.size()) && !ask.sizes(tensor, &sizes) &&
         std::equal(shape.begin(), shape.end(), sizes) && !ask.strides(tensor, &steps) &&
         std::equal(strides.begin(), strides.end(), steps);
}

inline py::object Watch::look(PyObject* tensor, Look& into) const {
  py::object here = py::reinterpret_borrow<py::object>(tensor);
  if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == distributed_.ptr())
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

inline bool Watch::look_quickly(PyObject* tensor, Look& into) const {
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

inline bool Watch::is_as_seen(PyObject* tensor, const Look& seen) {
  if (functions_ && is_plain(tensor)) {
    void* const pointer = pointer_of(tensor);
    if (pointer && seen.is(*functions_, &pointer)) return true;
  }
  look(tensor, now_);
  return now_.is(seen);
}

inline void* Watch::pointer_of(PyObject* tensor) const {
  const auto* descriptor = reinterpret_cast<PyGetSetDescrObject*>(descriptor_.ptr());
  PyObject* number = descriptor->d_getset->get(tensor, descriptor->d_getset->closure);
  if (!number) throw py::error_already_set();
  void* const pointer = PyLong_AsVoidPtr(number);
  Py_DECREF(number);
  return pointer;
}

inline bool Watch::is_plain(PyObject* tensor) const {
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

inline bool Watch::is_negative(PyObject* tensor) const {
  PyObject* result = PyObject_Vectorcall(is_negative_.ptr(), &tensor, 1, nullptr);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result).ptr() == Py_True;
}

inline bool Watch::same_groups() const {
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

inline bool Watch::same_states() {
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

Watch::Watch(py::list param_groups, py::list groups, py::list params, py::list idle,
             py::list strides, py::dict states, py::list keys, py::list names, py::list values,
             py::object distributed, py::object describe, py::object is_negative, py::object quick)
    : param_groups_(std::move(param_groups)),
      groups_(std::move(groups)),
      params_(std::move(params)),
      states_(std::move(states)),
      keys_(std::move(keys)),
      names_(std::move(names)),
      values_(std::move(values)),
      distributed_(std::move(distributed)),
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

bool Watch::sees(const Watch& other) const {
  if (states_seen_.size() != other.states_seen_.size()) return false;
  for (size_t i = 0; i < states_seen_.size(); ++i)
    if (!states_seen_[i].is(other.states_seen_[i])) return false;
  return true;
}

bool Watch::read(py::array_t<uint64_t, py::array::c_style> addresses,
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

}  // namespace aim_python
