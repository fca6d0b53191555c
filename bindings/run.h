// Running a kernel from Python: without the GIL where that pays, and with C++ exceptions turned into Python's.
#pragma once

#include <new>

#include "tensor.h"

namespace mmkern {

constexpr int64_t kReleaseGilAbove = 1 << 14;  // elements; a release and its reacquisition cost about 0.1 us

inline int64_t elements(const Call& call) {
  int64_t most = 0;
  for (const View& view : call.tensors) {
    int64_t n = view ? 1 : 0;
    for (int i = 0; i < view.rank; ++i) n *= view.sizes[i];
    most = n > most ? n : most;
  }
  return most;
}

inline void run(Kernel kernel, const Call& call) {
  if (elements(call) > kReleaseGilAbove) {
    pybind11::gil_scoped_release release;
    kernel(call);
  } else {
    kernel(call);
  }
}

// The result of `body` for Python, or null with Python's error set.
template <class Body>
PyObject* guarded(const std::string& name, Body body) {
  try {
    return body().release().ptr();
  } catch (const BadArgument& bad) {
    PyErr_SetString(PyExc_ValueError, (name + ": " + bad.what).c_str());
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_Format(PyExc_MemoryError, "%s: no memory for the kernel's workspace", name.c_str());
  }
  return nullptr;
}

}  // namespace mmkern
