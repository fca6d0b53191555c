// Reading a torch.Tensor (or a NumPy array) from Python without linking torch: its address, sizes, strides and dtype,
// through DLPack where torch offers that to C, and by attribute before (torch 2.9). One binary serves every torch.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "../csrc/call.h"
#include "dlpack.h"

namespace mmkern {

namespace py = pybind11;

// Thrown where an argument is not what a kernel takes; becomes a ValueError that names op and argument.
struct BadArgument {
  std::string what;
};

// Those of a new tensor with the sizes of `view`.
inline void set_dense_strides(View& view) {
  int64_t stride = 1;
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    view.strides[axis] = stride;
    stride *= std::max(view.sizes[axis], int64_t(1));
  }
}

// ---- Python's API with exceptions ----

inline py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
inline py::object call(PyObject* object, PyObject* method) {
  return checked(PyObject_CallMethodNoArgs(object, method));
}
inline py::object get(PyObject* object, PyObject* name) { return checked(PyObject_GetAttr(object, name)); }
inline bool is_true(PyObject* object, PyObject* name) { return get(object, name).ptr() == Py_True; }

// For what lives as long as the process.
inline PyObject* kept(const py::object& object) { return py::object(object).release().ptr(); }
inline PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }

// What is asked of a tensor, interned once, and torch's types, looked up once.
class TensorReader {
 public:
  static const TensorReader& instance() {
    static const TensorReader* reader = new TensorReader;  // outlives the interpreter: never decref'd at exit
    return *reader;
  }

  bool is_tensor(PyObject* object) const {
    PyTypeObject* type = Py_TYPE(object);
    return type == tensor_type_ || type == parameter_type_;
  }

  void read(PyObject* object, View& view) const {
    if (!is_tensor(object)) return read_buffer(object, view);
    if (call(object, is_neg_).ptr() == Py_True) throw BadArgument{"is a view that changes the sign"};
    read_plain(object, view);
  }

  PyObject* torch_dtype(Dtype dtype) const { return dtypes_[int(dtype)]; }

  // What torch offers to C; null before torch 2.10.
  const dlpack::Exchange* exchange() const { return exchange_; }

  // Of a tensor that torch would allocate on the CPU as `like`; none where kernels have no such dtype.
  Dtype dtype_as(PyObject* like) const { return is_true(like, is_cpu_) ? known(get(like, dtype_).ptr()) : Dtype::none; }

  // Of a tensor that shows its memory as it is.
  void read_plain(PyObject* object, View& view) const {
    if (exchange_)
      read_dlpack(object, view);
    else
      read_attributes(object, view);
  }

 private:
  TensorReader() {
    const py::module_ torch = py::module_::import("torch");
    tensor_type_ = reinterpret_cast<PyTypeObject*>(kept(torch.attr("Tensor")));
    parameter_type_ = reinterpret_cast<PyTypeObject*>(kept(torch.attr("nn").attr("Parameter")));
    const char* names[] = {"float32", "float64", "bfloat16", "float16", "int64", "bool"};
    for (int i = 0; i < kDtypes; ++i) dtypes_[i] = kept(torch.attr(names[i]));
    exchange_ = find_exchange(torch.attr("Tensor"));
  }

  static const dlpack::Exchange* find_exchange(const py::object& type) {
    if (!py::hasattr(type, dlpack::kExchangeAttribute)) return nullptr;
    const py::object capsule = type.attr(dlpack::kExchangeAttribute);
    const auto* exchange =
        static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeCapsule));
    PyErr_Clear();
    return exchange && exchange->version.major == 1 ? exchange : nullptr;
  }

  void read_dlpack(PyObject* object, View& view) const {
    dlpack::Tensor tensor;
    if (exchange_->borrow(object, &tensor)) {  // read_attributes knows what to say
      PyErr_Clear();
      return read_attributes(object, view);
    }
    if (tensor.device.type != dlpack::kCpu.type) throw BadArgument{"must be on the CPU"};
    view.dtype = dtype(tensor.dtype);
    if (view.dtype == Dtype::none) throw BadArgument{"has dtype " + std::string(py::str(get(object, dtype_)))};
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    check_rank(tensor.rank);
    view.rank = tensor.rank;
    std::copy_n(tensor.sizes, view.rank, view.sizes);
    std::copy_n(tensor.strides, view.rank, view.strides);
  }

  static Dtype dtype(dlpack::DataType type) {
    if (type.lanes != 1) return Dtype::none;
    switch (type.code << 8 | type.bits) {
      case dlpack::kFloat << 8 | 32: return Dtype::float32;
      case dlpack::kFloat << 8 | 64: return Dtype::float64;
      case dlpack::kBfloat << 8 | 16: return Dtype::bfloat16;
      case dlpack::kFloat << 8 | 16: return Dtype::float16;
      case dlpack::kInt << 8 | 64: return Dtype::int64;
      case dlpack::kBool << 8 | 8: return Dtype::boolean;
      default: return Dtype::none;
    }
  }

  void read_attributes(PyObject* object, View& view) const {
    if (!is_true(object, is_cpu_)) throw BadArgument{"must be on the CPU"};
    view.data = reinterpret_cast<void*>(PyLong_AsSize_t(call(object, data_ptr_).ptr()));
    view.dtype = dtype(get(object, dtype_).ptr());
    read_axes(get(object, shape_), view.sizes, &view.rank);
    read_axes(call(object, stride_), view.strides, nullptr);
  }

  static void check_rank(int64_t rank) {
    if (rank > kMaxRank) throw BadArgument{"has more than " + std::to_string(kMaxRank) + " axes"};
  }

  static void read_axes(const py::object& axes, int64_t* values, int* rank) {
    const Py_ssize_t n = PyTuple_GET_SIZE(axes.ptr());
    check_rank(n);
    for (Py_ssize_t i = 0; i < n; ++i) values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(axes.ptr(), i));
    if (rank) *rank = int(n);
  }

  Dtype known(PyObject* dtype) const { return Dtype(std::find(dtypes_, dtypes_ + kDtypes, dtype) - dtypes_); }

  Dtype dtype(PyObject* object) const {
    const Dtype found = known(object);
    if (found == Dtype::none) throw BadArgument{"has dtype " + std::string(py::str(object))};
    return found;
  }

  static void read_buffer(PyObject* object, View& view) {
    if (!PyObject_CheckBuffer(object))
      throw BadArgument{std::string("is a ") + Py_TYPE(object)->tp_name + ", not a plain tensor or array"};
    const py::buffer_info info = py::reinterpret_borrow<py::buffer>(object).request();
    view.data = info.ptr;
    view.rank = int(info.ndim);
    check_rank(info.ndim);
    if (info.format == "f")
      view.dtype = Dtype::float32;
    else if (info.format == "d")
      view.dtype = Dtype::float64;
    else if (info.format == "e")
      view.dtype = Dtype::float16;
    else
      throw BadArgument{"has buffer format " + info.format};
    for (int i = 0; i < view.rank; ++i) {
      if (info.strides[i] % info.itemsize) throw BadArgument{"has a stride that is not whole elements"};
      view.sizes[i] = info.shape[i];
      view.strides[i] = info.strides[i] / info.itemsize;
    }
  }

  PyObject* data_ptr_ = intern("data_ptr");
  PyObject* dtype_ = intern("dtype");
  PyObject* shape_ = intern("shape");
  PyObject* stride_ = intern("stride");
  PyObject* is_cpu_ = intern("is_cpu");
  PyObject* is_neg_ = intern("is_neg");
  const dlpack::Exchange* exchange_ = nullptr;
  PyTypeObject* tensor_type_;
  PyTypeObject* parameter_type_;
  static constexpr int kDtypes = int(Dtype::none);
  PyObject* dtypes_[kDtypes];
};

}  // namespace mmkern
