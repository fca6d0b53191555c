// mmkern._C: the CPU kernels, at the best ISA level of this machine.
//
// A table of kernels is named in MMKERN_FOR_EACH_TABLE; each entry becomes a function `name(*parameters, threads)` that
// returns None, or raises ValueError where an argument does not fit its signature. direct(name, ...) makes the short
// way to it.

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../csrc/call.h"
#include "direct.h"
#include "signature.h"

namespace mmkern {

#define MMKERN_FOR_EACH_TABLE(F, level)                                                                                \
  F(level, activation)                                                                                                 \
  F(level, adaptive_norm)                                                                                              \
  F(level, attention)                                                                                                  \
  F(level, attention_rows)                                                                                             \
  F(level, contrastive)                                                                                                \
  F(level, decoding)                                                                                                   \
  F(level, diffusion)                                                                                                  \
  F(level, group_norm)                                                                                                 \
  F(level, hyperbolic) F(level, quantization) F(level, retrieval) F(level, vocabulary)
#define MMKERN_DECLARE_TABLE(level, name) KernelTable name##_kernels();
#define MMKERN_DECLARE_TABLES(level)                                                                                   \
  namespace level {                                                                                                    \
  MMKERN_FOR_EACH_TABLE(MMKERN_DECLARE_TABLE, level)                                                                   \
  }
MMKERN_FOR_EACH_LEVEL(MMKERN_DECLARE_TABLES)

namespace {

struct Level {
  const char* name;
  bool (*runs_here)();
  std::vector<KernelTable> (*tables)();
};

bool runs_here(const char* level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!std::strcmp(level, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512cd");
  if (!std::strcmp(level, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
#else
  return !std::strcmp(level, "baseline");
#endif
}

#define MMKERN_TABLE_OF(level, name) level::name##_kernels(),
#define MMKERN_LEVEL(level)                                                                                            \
  {#level, [] { return runs_here(#level); },                                                                           \
   [] { return std::vector<KernelTable>{MMKERN_FOR_EACH_TABLE(MMKERN_TABLE_OF, level)}; }},
// Best last.
const Level kLevels[] = {MMKERN_FOR_EACH_LEVEL(MMKERN_LEVEL)};

const Level& choose_level() {
  const char* wanted = std::getenv("MMKERN_CPU_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  const Level* best = nullptr;
  std::string names;
  for (const Level& level : kLevels) {
    names += std::string(names.empty() ? "" : ", ") + level.name;
    if (!level.runs_here()) continue;
    if (!wanted || !std::strcmp(wanted, level.name)) best = &level;
  }
  if (best) return *best;
  throw py::import_error(wanted ? std::string("MMKERN_CPU_ISA=") + wanted +
                                      " was not built or does not run on this CPU; built: " + names
                                : "this CPU runs none of the levels built: " + names);
}

struct BoundKernel {
  std::string name, doc;
  Signature signature;
  Kernel kernel;
  PyMethodDef method;
};

PyObject* invoke(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto* bound = static_cast<BoundKernel*>(PyCapsule_GetPointer(self, nullptr));
  return guarded(bound->name, [&] {
    const size_t parameters = bound->signature.size();
    if (size_t(count) != parameters + 1)
      throw BadArgument{"takes " + std::to_string(parameters + 1) + " arguments, got " + std::to_string(count)};
    Call call;
    bound->signature.read(args, parameters, call);
    call.threads = int(PyLong_AsLong(args[count - 1]));
    if (PyErr_Occurred()) throw py::error_already_set();
    run(bound->kernel, call);
    return py::object(py::none());
  });
}

struct DirectFunction {
  std::string name;
  Direct direct;
  PyMethodDef method;
};

PyObject* invoke_directly(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto* function = static_cast<DirectFunction*>(PyCapsule_GetPointer(self, nullptr));
  return guarded(function->name, [&] { return function->direct(args, count); });
}

// Bound functions, and those made of them, live as long as the process.
template <class Bound>
py::object function(Bound* bound, PyObject* (*body)(PyObject*, PyObject* const*, Py_ssize_t), const char* doc) {
  bound->method = {bound->name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(body)),
                   METH_FASTCALL, doc};
  return py::reinterpret_steal<py::object>(PyCFunction_New(&bound->method, py::capsule(bound).ptr()));
}

std::map<std::string, BoundKernel*> bound_kernels;

void bind_kernel(py::module_& module, const KernelEntry& entry) {
  auto* bound = new BoundKernel{entry.name,
                                std::string(entry.name) + "(" + entry.parameters + ", threads)",
                                Signature(entry.parameters),
                                entry.kernel,
                                {}};
  bound_kernels[entry.name] = bound;
  module.attr(entry.name) = function(bound, &invoke, bound->doc.c_str());
}

py::object make_direct(const std::string& name, const py::object& settings, const py::object& empty_strided,
                       const py::object& record, const py::object& op) {
  const BoundKernel& kernel = *bound_kernels.at(name);
  return function(
      new DirectFunction{name, Direct(kernel.signature, kernel.kernel, settings, empty_strided, record, op), {}},
      &invoke_directly, "The output, or NotImplemented where the call must go the long way.");
}

}  // namespace

void bind_memory(py::module_& module);

}  // namespace mmkern

PYBIND11_MODULE(_C, module) {
  using namespace mmkern;
  module.doc() = "CPU kernels of mmkern; called through mmkern.ops.";
  const Level& level = choose_level();
  module.attr("isa") = level.name;
  py::list built;
  for (const Level& each : kLevels) built.append(each.name);
  module.attr("isa_levels") = py::tuple(built);
  module.def(
      "direct", make_direct,
      "Of a kernel by name, the settings, empty_strided(sizes, strides, dtype), record((out, tensors, (op, numbers)), "
      "*args), and the op.");
  for (const KernelTable& table : level.tables())
    for (int i = 0; i < table.count; ++i) bind_kernel(module, table.entries[i]);
  bind_memory(module);
}
