// What the files of the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

namespace fastadapt {

// What a tensor's method without arguments returns; the name is interned.
inline int64_t ask(py::handle tensor, PyObject* method) {
  const auto got =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), method));
  if (!got) throw py::error_already_set();
  return py::cast<int64_t>(got);
}

template <class T>
T* pointer(py::handle tensor) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  return reinterpret_cast<T*>(ask(tensor, data_ptr));
}

void define_among(py::module_& m);    // among_bindings.cpp
void define_history(py::module_& m);  // history_bindings.cpp

}  // namespace fastadapt
