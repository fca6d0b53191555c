// The short way from a public op to its kernel: one call reads the arguments, allocates the output and runs.
//
// It answers NotImplemented, having done nothing, where something between caller and kernel must see the call (a
// transform, a dispatch mode, the profiler, autocast, a choice of backend) or where an argument is not what the kernel
// takes as it is. mmkern/ops/_define.py has the long way, and the errors.
#pragma once

#include "../csrc/cpu/pool.h"
#include "run.h"
#include "signature.h"

namespace mmkern {

// torch's switches, asked for by calling torch.
class TorchState {
 public:
  static const TorchState& instance() {
    static const TorchState* state = new TorchState;  // outlives the interpreter
    return *state;
  }

  bool intercepts() const {
    return PyLong_AsLong(call(dispatch_modes_).ptr()) != 0 || call(transforms_).ptr() != Py_False ||
           PyLong_AsLong(get(forward_ad_, current_level_).ptr()) >= 0 || call(profiling_).ptr() != Py_False;
  }
  bool autocasts() const { return checked(PyObject_CallOneArg(autocast_, cpu_)).ptr() != Py_False; }
  bool records() const { return call(grad_enabled_).ptr() == Py_True; }
  int threads() const { return int(PyLong_AsLong(call(threads_).ptr())); }

 private:
  TorchState() {
    const py::module_ torch = py::module_::import("torch");
    const py::object internals = torch.attr("_C");
    dispatch_modes_ = kept(internals.attr("_len_torch_dispatch_stack"));
    transforms_ = kept(internals.attr("_are_functorch_transforms_active"));
    profiling_ = kept(internals.attr("_autograd").attr("_profiler_enabled"));
    forward_ad_ = kept(py::module_::import("torch.autograd.forward_ad"));
    autocast_ = kept(torch.attr("is_autocast_enabled"));
    grad_enabled_ = kept(torch.attr("is_grad_enabled"));
    threads_ = kept(torch.attr("get_num_threads"));
  }

  static py::object call(PyObject* function) { return checked(PyObject_CallNoArgs(function)); }

  PyObject *dispatch_modes_, *transforms_, *profiling_, *forward_ad_, *autocast_, *grad_enabled_, *threads_;
  PyObject* current_level_ = intern("_current_level");
  PyObject* cpu_ = intern("cpu");
};

// A kernel whose last parameter is its one output.
class Direct {
 public:
  // `settings` has the attribute `default`; empty(shape, like) allocates large outputs; record makes an output part of
  // autograd's graph, on behalf of `op`.
  Direct(const Signature& signature, Kernel kernel, const py::object& settings, const py::object& empty,
         const py::object& record, const py::object& op)
      : signature_(signature),
        kernel_(kernel),
        inputs_(signature.size() - 1),
        settings_(kept(settings)),
        empty_(kept(empty)),
        record_(kept(record)),
        op_(kept(op)) {}

  // NotImplemented where this is not the way.
  py::object operator()(PyObject* const* args, Py_ssize_t count) const {
    const TorchState& torch = TorchState::instance();
    if (size_t(count) != inputs_ || !is_true(settings_, default_) || torch.intercepts()) return declined();
    Call call;
    View& output = call.tensors[signature_.tensors_among(inputs_)];
    if (!reads(args, call, output) || (bytes_of(output.dtype) == 2 && torch.autocasts())) return declined();
    py::object out = allocate(output, args[signature_.lead()]);
    TensorReader::instance().read_plain(out.ptr(), output);
    call.threads = torch.threads();
    run(kernel_, call);
    return torch.records() && any_requires_grad(args) ? recorded(out, args) : out;
  }

 private:
  static py::object declined() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

  // Fills in `call`, and the sizes of the output; false where a kernel does not take these arguments as they are.
  bool reads(PyObject* const* args, Call& call, View& output) const {
    const TensorReader& reader = TensorReader::instance();
    for (size_t i = 0; i < inputs_; ++i)
      if (!is_number(args[i]) && !reader.is_tensor(args[i])) return false;
    if (!reader.is_tensor(args[signature_.lead()])) return false;
    try {
      output = signature_.read(args, inputs_, call).contiguous(signature_.parameter(inputs_));
      return true;
    } catch (const BadArgument&) {
      return false;
    } catch (const py::error_already_set&) {  // as from a tensor that outlived its transform
      return false;
    }
  }

  static bool is_number(PyObject* object) { return PyFloat_Check(object) || PyLong_Check(object); }

  bool any_requires_grad(PyObject* const* args) const {
    for (size_t i = 0; i < inputs_; ++i)
      if (!is_number(args[i]) && is_true(args[i], requires_grad_)) return true;
    return false;
  }

  py::object allocate(const View& view, PyObject* lead) const {
    int64_t bytes = bytes_of(view.dtype);
    py::tuple shape(view.rank);
    for (int i = 0; i < view.rank; ++i) {
      shape[size_t(i)] = view.sizes[i];
      bytes *= view.sizes[i];
    }
    if (bytes >= int64_t(kPoolThreshold)) {
      PyObject* const args[] = {shape.ptr(), lead};
      return checked(PyObject_Vectorcall(empty_, args, 2, nullptr));
    }
    if (view.rank == 0) {
      PyObject* const args[] = {lead, shape.ptr()};
      return checked(PyObject_VectorcallMethod(new_empty_, args, 2, nullptr));
    }
    // Unpacked, it takes half the time: torch tries a tuple against every signature.
    PyObject* args[1 + kMaxRank] = {lead};
    for (int i = 0; i < view.rank; ++i) args[1 + i] = PyTuple_GET_ITEM(shape.ptr(), i);
    return checked(PyObject_VectorcallMethod(new_empty_, args, size_t(1 + view.rank), nullptr));
  }

  // record((out, tensors, (op, numbers)), *args): each argument is in one of the two and None in the other.
  py::object recorded(const py::object& out, PyObject* const* args) const {
    py::tuple tensors(inputs_), numbers(inputs_);
    PyObject* all[1 + kMaxTensors + kMaxScalars];
    for (size_t i = 0; i < inputs_; ++i) {
      const bool number = is_number(args[i]);
      (number ? numbers : tensors)[i] = py::reinterpret_borrow<py::object>(args[i]);
      (number ? tensors : numbers)[i] = py::none();
      all[1 + i] = args[i];
    }
    const py::tuple call = py::make_tuple(out, tensors, py::make_tuple(py::handle(op_), numbers));
    all[0] = call.ptr();
    return checked(PyObject_Vectorcall(record_, all, 1 + inputs_, nullptr));
  }

  const Signature& signature_;
  Kernel kernel_;
  size_t inputs_;
  PyObject *settings_, *empty_, *record_, *op_;
  PyObject* default_ = intern("default");
  PyObject* requires_grad_ = intern("requires_grad");
  PyObject* new_empty_ = intern("new_empty");
};

}  // namespace mmkern
