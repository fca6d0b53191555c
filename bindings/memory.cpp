// mmkern._C.memory: the pool's blocks as DLPack capsules, which torch turns into tensors without a copy.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <vector>

#include "../csrc/cpu/pool.h"
#include "dlpack.h"

namespace mmkern {
namespace {

namespace py = pybind11;

constexpr int kMaxRank = 8;

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

struct KnownDtype {
  PyObject* dtype;  // torch's own object, compared by identity
  dlpack::DataType code;
};
std::vector<KnownDtype> known_dtypes;

void register_dtype(const py::object& dtype, int code, int bits) {
  known_dtypes.push_back({py::object(dtype).release().ptr(), {uint8_t(code), uint8_t(bits), 1}});
}

struct Names {
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
};

const dlpack::DataType* dtype_of(PyObject* tensor, PyObject* name) {
  const py::object dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
  for (const KnownDtype& known : known_dtypes) {
    if (known.dtype == dtype.ptr()) return &known.code;
  }
  return nullptr;
}

// Contiguous strides of `shape`, and its number of elements; -1 where the pool has no business with it.
int64_t lay_out(PyObject* shape, int64_t* sizes, int64_t* strides) {
  if (!PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) > kMaxRank) return -1;
  int64_t elements = 1;
  for (Py_ssize_t axis = PyTuple_GET_SIZE(shape) - 1; axis >= 0; --axis) {
    sizes[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, axis));
    strides[axis] = elements;
    if (sizes[axis] < 0 || __builtin_mul_overflow(elements, sizes[axis], &elements)) return -1;
  }
  return elements;
}

PyObject* lend(int64_t bytes, dlpack::DataType dtype, int rank, const int64_t* sizes, const int64_t* strides) {
  Block* const block = Pool::of_process().take(size_t(bytes));
  if (!block) return nullptr;
  auto* const loan = new Loan{{}, block, {}, {}};
  for (int axis = 0; axis < rank; ++axis) {
    loan->sizes[axis] = sizes[axis];
    loan->strides[axis] = strides[axis];
  }
  loan->managed = {{block->data, dlpack::kCpu, rank, dtype, loan->sizes, loan->strides, 0}, loan, end_loan};
  PyObject* const capsule = PyCapsule_New(&loan->managed, dlpack::kCapsule, drop_capsule);
  if (!capsule) end_loan(&loan->managed);
  return capsule;
}

// take(shape, like): a capsule, or None where torch should allocate (and should say what is wrong with the arguments).
// A plain C function, since pybind11's conversion of arguments costs as much as all the rest.
PyObject* take(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static const Names names;
  constexpr int64_t kWidestDtype = 8;
  int64_t sizes[kMaxRank], strides[kMaxRank];
  const int64_t elements = count == 2 ? lay_out(args[0], sizes, strides) : -1;
  PyObject* capsule = nullptr;
  if (elements >= int64_t(kPoolThreshold) / kWidestDtype) {
    const dlpack::DataType* dtype = dtype_of(args[1], names.dtype);
    const py::object is_cpu =
        py::reinterpret_steal<py::object>(dtype ? PyObject_GetAttr(args[1], names.is_cpu) : nullptr);
    int64_t bytes;
    if (is_cpu.ptr() == Py_True && !__builtin_mul_overflow(elements, int64_t(dtype->bits / 8), &bytes) &&
        bytes >= int64_t(kPoolThreshold))
      capsule = lend(bytes, *dtype, int(PyTuple_GET_SIZE(args[0])), sizes, strides);
  }
  if (capsule) return capsule;
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyMethodDef kTake = {"take", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&take)), METH_FASTCALL,
                     "take(shape, like): a DLPack capsule from the pool, or None where torch should allocate."};

}  // namespace

void bind_memory(py::module_& parent) {
  Pool::of_process();  // before any other thread could fork
  py::module_ module = parent.def_submodule("memory", "The pool behind the outputs of CPU ops.");
  module.attr("take") = py::reinterpret_steal<py::object>(PyCFunction_New(&kTake, nullptr));
  module.attr("threshold") = kPoolThreshold;
  module.def("register_dtype", register_dtype);
  module.def("release", [] { return Pool::of_process().release(); }, py::call_guard<py::gil_scoped_release>());
  module.def(
      "set_limit", [](size_t bytes) { Pool::of_process().set_limit(bytes); }, py::call_guard<py::gil_scoped_release>());
  module.def("stats", [] {
    const PoolStats stats = Pool::of_process().stats();
    return py::make_tuple(stats.limit, stats.in_use, stats.idle, stats.reused, stats.mapped, stats.declined);
  });
}

}  // namespace mmkern
