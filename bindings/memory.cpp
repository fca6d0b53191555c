// mmkern._C.memory: the pool's blocks as tensors, by way of DLPack and without a copy.

#include "memory.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#include "../csrc/cpu/pool.h"
#include "dlpack.h"

namespace mmkern {
namespace {

// A block on loan, and what DLPack points at meanwhile.
struct Loan {
  dlpack::ManagedTensor managed;
  Block* block;
  int64_t sizes[kMaxRank], strides[kMaxRank];
};

// Runs in whichever thread drops the last reference, without the GIL, perhaps after the interpreter has ended: it may
// not touch Python.
void end_loan(dlpack::ManagedTensor* managed) {
  auto* const loan = static_cast<Loan*>(managed->context);
  Pool::of_process().give_back(loan->block);
  delete loan;
}

void drop_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, dlpack::kCapsule)) return;  // consumed
  end_loan(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule)));
}

dlpack::DataType dlpack_type(Dtype dtype) {
  const dlpack::Code code = dtype == Dtype::boolean    ? dlpack::kBool
                            : dtype == Dtype::int64    ? dlpack::kInt
                            : dtype == Dtype::bfloat16 ? dlpack::kBfloat
                                                       : dlpack::kFloat;
  return {code, uint8_t(8 * bytes_of(dtype)), 1};
}

// Of a contiguous tensor; -1 where that is more than can be counted.
int64_t bytes_of(const View& view) {
  int64_t bytes = bytes_of(view.dtype);
  for (int axis = 0; axis < view.rank; ++axis)
    if (__builtin_mul_overflow(bytes, view.sizes[axis], &bytes)) return -1;
  return bytes;
}

dlpack::ManagedTensor* lend(const View& view, int64_t bytes) {
  Block* const block = Pool::of_process().take(size_t(bytes));
  if (!block) return nullptr;
  auto* const loan = new Loan{{}, block, {}, {}};
  View dense = view;
  set_dense_strides(dense);
  std::copy_n(dense.sizes, dense.rank, loan->sizes);
  std::copy_n(dense.strides, dense.rank, loan->strides);
  loan->managed = {dlpack::kVersion,
                   loan,
                   end_loan,
                   0,
                   {block->data, dlpack::kCpu, view.rank, dlpack_type(view.dtype), loan->sizes, loan->strides, 0}};
  return &loan->managed;
}

py::object in_capsule(dlpack::ManagedTensor* managed) {
  PyObject* const capsule = PyCapsule_New(managed, dlpack::kCapsule, drop_capsule);
  if (!capsule) end_loan(managed);
  return checked(capsule);
}

py::object to_torch(dlpack::ManagedTensor* managed) {
  static PyObject* const from_dlpack = kept(py::module_::import("torch._C").attr("_from_dlpack"));
  const dlpack::Exchange* const exchange = TensorReader::instance().exchange();
  if (!exchange) return checked(PyObject_CallOneArg(from_dlpack, in_capsule(managed).ptr()));
  void* made = nullptr;
  exchange->to_python(managed, &made);
  return checked(static_cast<PyObject*>(made));
}

bool read_sizes(PyObject* shape, View& view) {
  if (!PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) > kMaxRank) return false;
  view.rank = int(PyTuple_GET_SIZE(shape));
  for (int axis = 0; axis < view.rank; ++axis) {
    view.sizes[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, axis));
    if (view.sizes[axis] < 0) return false;
  }
  return true;
}

// empty(shape, like): a tensor, or None where torch should allocate (and should say what is wrong with the arguments).
// A plain C function, since pybind11's conversion of arguments costs as much as all the rest.
PyObject* empty(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    View view;
    if (count == 2 && read_sizes(args[0], view)) {
      view.dtype = TensorReader::instance().dtype_as(args[1]);
      if (py::object made = pool_tensor(view)) return made.release().ptr();
    }
  } catch (const py::error_already_set&) {
  }
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyMethodDef kEmpty = {"empty", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&empty)), METH_FASTCALL,
                      "empty(shape, like): a tensor from the pool, or None where torch should allocate."};

}  // namespace

py::object pool_tensor(const View& view) {
  const int64_t bytes = bytes_of(view);
  dlpack::ManagedTensor* const managed = bytes >= int64_t(kPoolThreshold) ? lend(view, bytes) : nullptr;
  return managed ? to_torch(managed) : py::object();
}

void bind_memory(py::module_& parent) {
  Pool::of_process();  // before any other thread could fork
  py::module_ module = parent.def_submodule("memory", "The pool behind the outputs of CPU ops.");
  module.attr("empty") = py::reinterpret_steal<py::object>(PyCFunction_New(&kEmpty, nullptr));
  module.attr("threshold") = kPoolThreshold;
  module.def("release", [] { return Pool::of_process().release(); }, py::call_guard<py::gil_scoped_release>());
  module.def(
      "set_limit", [](size_t bytes) { Pool::of_process().set_limit(bytes); }, py::call_guard<py::gil_scoped_release>());
  module.def("stats", [] {
    const PoolStats stats = Pool::of_process().stats();
    return py::make_tuple(stats.limit, stats.in_use, stats.idle, stats.reused, stats.mapped, stats.declined);
  });
}

}  // namespace mmkern
