// mmkern._C: the CPU kernels, at the best ISA level of this machine.
//
// A family adds its table to kFamilies; each entry becomes a function `name(*parameters, threads)` that returns None,
// or raises ValueError where an argument does not fit its signature.

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../csrc/call.h"
#include "signature.h"

namespace mmkern {

#define MMKERN_DECLARE_FAMILIES(level)                                                                                 \
  namespace level {                                                                                                    \
  KernelTable hyperbolic_kernels();                                                                                    \
  }
MMKERN_FOR_EACH_LEVEL(MMKERN_DECLARE_FAMILIES)

namespace {

struct Level {
  const char* name;
  bool (*runs_here)();
  std::vector<KernelTable> (*families)();
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

#define MMKERN_LEVEL(level)                                                                                            \
  {#level, [] { return runs_here(#level); }, [] { return std::vector<KernelTable>{level::hyperbolic_kernels()}; }},
// Best last.
const Level kLevels[] = {MMKERN_FOR_EACH_LEVEL(MMKERN_LEVEL)};

const Level& choose_level() {
  const char* wanted = std::getenv("MMKERN_CPU_ISA");
  const Level* best = nullptr;
  std::string names;
  for (const Level& level : kLevels) {
    names += std::string(names.empty() ? "" : ", ") + level.name;
    if (!level.runs_here()) continue;
    if (!wanted || !std::strcmp(wanted, level.name)) best = &level;
  }
  if (best) return *best;
  throw pybind11::import_error(wanted ? std::string("MMKERN_CPU_ISA=") + wanted +
                                            " was not built or does not run on this CPU; built: " + names
                                      : "this CPU runs none of the levels built: " + names);
}

struct BoundKernel {
  std::string name, doc;
  Signature signature;
  Kernel kernel;
  PyMethodDef method;
};

constexpr int64_t kReleaseGilAbove = 1 << 14;  // elements; a release and its reacquisition cost about 0.1 us

int64_t elements(const Call& call) {
  int64_t most = 0;
  for (const View& view : call.tensors) {
    int64_t n = view ? 1 : 0;
    for (int i = 0; i < view.rank; ++i) n *= view.sizes[i];
    most = n > most ? n : most;
  }
  return most;
}

PyObject* invoke(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto* bound = static_cast<BoundKernel*>(PyCapsule_GetPointer(self, nullptr));
  try {
    if (size_t(count) != bound->signature.size() + 1)
      throw BadArgument{"takes " + std::to_string(bound->signature.size() + 1) + " arguments, got " +
                        std::to_string(count)};
    Call call;
    bound->signature.read(args, call);
    call.threads = int(PyLong_AsLong(args[count - 1]));
    if (PyErr_Occurred()) return nullptr;
    if (elements(call) > kReleaseGilAbove) {
      pybind11::gil_scoped_release release;
      bound->kernel(call);
    } else {
      bound->kernel(call);
    }
  } catch (const BadArgument& bad) {
    PyErr_SetString(PyExc_ValueError, (bound->name + ": " + bad.what).c_str());
    return nullptr;
  } catch (pybind11::error_already_set& error) {
    error.restore();
    return nullptr;
  }
  Py_RETURN_NONE;
}

void bind_kernel(pybind11::module_& module, const KernelEntry& entry) {
  // Functions of a module live as long as the process.
  auto* bound = new BoundKernel{entry.name,
                                std::string(entry.name) + "(" + entry.parameters + ", threads)",
                                Signature(entry.parameters),
                                entry.kernel,
                                {}};
  bound->method = {bound->name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&invoke)),
                   METH_FASTCALL, bound->doc.c_str()};
  const pybind11::capsule self(bound);
  module.attr(entry.name) = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&bound->method, self.ptr()));
}

}  // namespace

void bind_memory(pybind11::module_& module);

}  // namespace mmkern

PYBIND11_MODULE(_C, module) {
  using namespace mmkern;
  module.doc() = "CPU kernels of mmkern; called through mmkern.ops.";
  const Level& level = choose_level();
  module.attr("isa") = level.name;
  pybind11::list built;
  for (const Level& each : kLevels) built.append(each.name);
  module.attr("isa_levels") = pybind11::tuple(built);
  for (const KernelTable& table : level.families())
    for (int i = 0; i < table.count; ++i) bind_kernel(module, table.entries[i]);
  bind_memory(module);
}
