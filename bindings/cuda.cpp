// mmkern._cuda: launches a CUDA kernel by name.
//
// A family adds its table to kFamilies. What to launch, and with which arguments, is decided in
// mmkern/backends/cuda.py, which serves kernels compiled at run time as well.

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

#include "../csrc/cuda/kernel_table.h"

namespace mmkern {
namespace {

namespace py = pybind11;

constexpr DeviceKernelTable (*kFamilies[])() = {
    attention_device_kernels, attention_rows_device_kernels, contrastive_device_kernels, decoding_device_kernels,
    diffusion_device_kernels, hyperbolic_device_kernels,     modulation_device_kernels};
constexpr int kSharedWithoutAsking = 48 << 10;  // more dynamic shared memory must be asked for, once a launch

using Kernels = std::unordered_map<std::string_view, DeviceKernel>;

const Kernels& kernels() {
  static const Kernels all = [] {
    Kernels found;
    for (const auto family : kFamilies) {
      const DeviceKernelTable table = family();
      for (int i = 0; i < table.count; ++i) found.emplace(table.entries[i].name, table.entries[i]);
    }
    return found;
  }();
  return all;
}

void check(cudaError_t error, std::string_view kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not to be reported again by the next launch
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// `arguments`: the bytes of the kernel's one struct.
void launch(std::string_view name, unsigned grid_x, unsigned grid_y, unsigned threads, int shared_bytes, size_t stream,
            std::string_view arguments) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::invalid_argument("no CUDA kernel is called " + std::string(name));
  const DeviceKernel& kernel = found->second;
  if (arguments.size() != size_t(kernel.argument_bytes))
    throw std::invalid_argument(std::string(name) + ": takes " + std::to_string(kernel.argument_bytes) +
                                " bytes of arguments, got " + std::to_string(arguments.size()));
  if (shared_bytes > kSharedWithoutAsking)
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  void* parameters[] = {const_cast<char*>(arguments.data())};
  check(cudaLaunchKernel(kernel.function, dim3(grid_x, grid_y), dim3(threads), parameters, size_t(shared_bytes),
                         reinterpret_cast<cudaStream_t>(stream)),
        name);
  check(cudaGetLastError(), name);
}

py::dict sizes() {
  py::dict found;
  for (const auto& [name, kernel] : kernels()) found[py::str(name.data())] = kernel.argument_bytes;
  return found;
}

}  // namespace
}  // namespace mmkern

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of mmkern; called through mmkern.ops.";
  module.def("launch", &mmkern::launch, pybind11::arg("kernel"), pybind11::arg("grid_x"), pybind11::arg("grid_y"),
             pybind11::arg("threads"), pybind11::arg("shared_bytes"), pybind11::arg("stream"),
             pybind11::arg("arguments"));
  module.def("kernels", &mmkern::sizes, "The bytes of arguments that each kernel takes, by its name.");
}
