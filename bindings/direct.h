// The short way from a public op to its kernel: one call reads the arguments, allocates the outputs and runs.
//
// It answers NotImplemented, having done nothing, where something between caller and kernel must see the call (a
// transform, a dispatch mode, the profiler, autocast, a choice of backend) or where an argument is not what the kernel
// takes as it is. mmkern/ops/_define.py has the long way, and the errors.
#pragma once

#include <algorithm>
#include <numeric>

#include "memory.h"
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

// A kernel whose last parameters are its outputs.
class Direct {
 public:
  // `settings` has the attribute `default`; empty_strided(sizes, strides, dtype) allocates what the pool does not;
  // record makes outputs part of autograd's graph, on behalf of `op`, which says how many there are and whether its
  // gradient reads them.
  Direct(const Signature& signature, Kernel kernel, const py::object& settings, const py::object& empty_strided,
         const py::object& record, const py::object& op)
      : signature_(signature),
        kernel_(kernel),
        outputs_(py::len(op.attr("outputs"))),
        inputs_(signature.size() - outputs_),
        saves_outputs_(py::cast<bool>(op.attr("backward_reads_outputs"))),
        autocasts_wide_(py::cast<std::string>(op.attr("autocast")) == "lower"),
        settings_(kept(settings)),
        empty_strided_(kept(empty_strided)),
        record_(kept(record)),
        op_(kept(op)) {}

  // NotImplemented where this is not the way.
  py::object operator()(PyObject* const* args, Py_ssize_t count) const {
    const TorchState& torch = TorchState::instance();
    if (size_t(count) != inputs_ || !is_true(settings_, default_) || torch.intercepts()) return declined();
    Call call;
    View* const outputs = call.tensors + signature_.tensors_among(inputs_);
    if (!reads(args, call, outputs)) return declined();
    if ((autocasts_wide_ || bytes_of(outputs[0].dtype) == 2) && torch.autocasts()) return declined();
    const size_t lead = signature_.lead();
    const py::object result = allocate_all(outputs, call.tensors[signature_.tensors_among(lead)]);
    call.threads = torch.threads();
    run(kernel_, call);
    return torch.records() && any_requires_grad(args) ? recorded(result, args) : result;
  }

 private:
  static py::object declined() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

  // Fills in `call`, and the sizes of the outputs; false where a kernel does not take these arguments as they are.
  bool reads(PyObject* const* args, Call& call, View* outputs) const {
    const TensorReader& reader = TensorReader::instance();
    for (size_t i = 0; i < inputs_; ++i)
      if (!is_number(args[i]) && !reader.is_tensor(args[i]) && args[i] != Py_None) return false;
    if (!reader.is_tensor(args[signature_.lead()])) return false;
    try {
      const Signature::Bound bound = signature_.read(args, inputs_, call);
      for (size_t i = 0; i < outputs_; ++i) outputs[i] = bound.contiguous(signature_.parameter(inputs_ + i));
      return true;
    } catch (const BadArgument&) {
      return false;
    } catch (const py::error_already_set&) {  // as from a tensor that outlived its transform
      return false;
    }
  }

  static bool is_number(PyObject* object) { return PyFloat_Check(object) || PyLong_Check(object); }
  static bool is_tensor(PyObject* object) { return !is_number(object) && object != Py_None; }
  // As one without elements is.
  static bool is_contiguous(const View& view) {
    int64_t stride = 1;
    bool found = true;
    for (int axis = view.rank - 1; axis >= 0; stride *= view.sizes[axis--])
      found = found && (view.sizes[axis] == 1 || view.strides[axis] == stride);
    return found || stride == 0;
  }

  bool any_requires_grad(PyObject* const* args) const {
    for (size_t i = 0; i < inputs_; ++i)
      if (is_tensor(args[i]) && is_true(args[i], requires_grad_)) return true;
    return false;
  }

  // The output, or a tuple of several.
  py::object allocate_all(View* outputs, const View& like) const {
    const bool keeps_order = signature_.parameter(signature_.lead()).axes == Parameter::Axes::strided;
    py::tuple all(outputs_);
    for (size_t i = 0; i < outputs_; ++i) {
      const bool is_small = !signature_.parameter(inputs_ + i).shares_dtype();
      const bool is_plain = !keeps_order || like.rank != outputs[i].rank || is_contiguous(like);
      all[i] = is_small   ? allocate_small(outputs[i])
               : is_plain ? allocate(outputs[i])
                          : allocate_in_order(outputs[i], like);
      TensorReader::instance().read_plain(PyTuple_GET_ITEM(all.ptr(), Py_ssize_t(i)), outputs[i]);
    }
    return outputs_ == 1 ? py::object(all[0]) : py::object(all);
  }
  // Its axes lie in memory in the order of those of `like`, the last one innermost.
  py::object allocate_in_order(const View& view, const View& like) const {
    int order[kMaxRank];
    std::iota(order, order + view.rank, 0);
    std::stable_sort(order, order + view.rank - 1, [&](int a, int b) { return like.strides[a] > like.strides[b]; });
    View dense = view;
    for (int i = 0; i < view.rank; ++i) dense.sizes[i] = view.sizes[order[i]];
    set_dense_strides(dense);
    const py::object made = allocate(dense);
    py::tuple places(view.rank);
    for (int i = 0; i < view.rank; ++i) places[size_t(order[i])] = i;
    PyObject* const args[] = {made.ptr(), places.ptr()};
    return checked(PyObject_VectorcallMethod(permute_, args, 2, nullptr));
  }
  py::object allocate(const View& view) const {
    const py::object pooled = pool_tensor(view);
    return pooled ? pooled : allocate_small(view);
  }
  py::object allocate_small(const View& view) const {
    const py::tuple sizes = in_tuple(view.sizes, view.rank), strides = in_tuple(view.strides, view.rank);
    PyObject* const args[] = {sizes.ptr(), strides.ptr(), TensorReader::instance().torch_dtype(view.dtype)};
    return checked(PyObject_Vectorcall(empty_strided_, args, 3, nullptr));
  }
  static py::tuple in_tuple(const int64_t* values, int count) {
    py::tuple all(count);
    for (int i = 0; i < count; ++i) all[size_t(i)] = values[i];
    return all;
  }

  // record((result, tensors, (op, numbers)), *args): each argument is in one of the two and None in the other; after
  // the tensors come the outputs that the gradient reads.
  py::object recorded(const py::object& result, PyObject* const* args) const {
    py::tuple tensors(inputs_ + (saves_outputs_ ? outputs_ : 0)), numbers(inputs_);
    for (size_t i = 0; i < tensors.size() - inputs_; ++i) {
      PyObject* const out = outputs_ == 1 ? result.ptr() : PyTuple_GET_ITEM(result.ptr(), Py_ssize_t(i));
      tensors[inputs_ + i] = py::reinterpret_borrow<py::object>(out);
    }
    PyObject* all[1 + kMaxTensors + kMaxScalars];
    for (size_t i = 0; i < inputs_; ++i) {
      const bool number = is_number(args[i]);
      (number ? numbers : tensors)[i] = py::reinterpret_borrow<py::object>(args[i]);
      (number ? tensors : numbers)[i] = py::none();
      all[1 + i] = args[i];
    }
    const py::tuple call = py::make_tuple(result, tensors, py::make_tuple(py::handle(op_), numbers));
    all[0] = call.ptr();
    return checked(PyObject_Vectorcall(record_, all, 1 + inputs_, nullptr));
  }

  const Signature& signature_;
  Kernel kernel_;
  size_t outputs_, inputs_;
  bool saves_outputs_, autocasts_wide_;
  PyObject *settings_, *empty_strided_, *record_, *op_;
  PyObject* default_ = intern("default");
  PyObject* requires_grad_ = intern("requires_grad");
  PyObject* permute_ = intern("permute");
};

}  // namespace mmkern
