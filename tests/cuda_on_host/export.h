// A table of kernels compiled for the host, with a C interface for ctypes.
//
//   EXPORT_KERNELS(KERNEL(first) KERNEL(second<float>))   in one .cpp, each kernel taking one struct by value
#pragma once

#include <sstream>

#include "shim.h"

namespace cuda_on_host {

struct HostKernel {
  std::string name;
  size_t argument_bytes;
  std::function<void(const void*)> call;
};

template <class Args>
HostKernel kernel(const char* name, void (*function)(Args)) {
  return {name, sizeof(Args), [function](const void* bytes) {
            Args args;
            memcpy(static_cast<void*>(&args), bytes, sizeof args);
            function(args);
          }};
}

const std::vector<HostKernel>& kernels();

inline const HostKernel& find(const char* name) {
  for (const HostKernel& k : kernels())
    if (k.name == name) return k;
  throw std::runtime_error(std::string("no kernel ") + name);
}

}  // namespace cuda_on_host

#define CUDA_ON_HOST_ENTRY(...) cuda_on_host::kernel(#__VA_ARGS__, __VA_ARGS__),
#define EXPORT_KERNELS(LIST)                                                                                           \
  const std::vector<cuda_on_host::HostKernel>& cuda_on_host::kernels() {                                               \
    static const std::vector<HostKernel> all = {LIST(CUDA_ON_HOST_ENTRY)};                                             \
    return all;                                                                                                        \
  }

extern "C" {

// Lines of "argument bytes, space, name".
const char* cuda_on_host_kernels() {
  static const std::string all = [] {
    std::ostringstream out;
    for (const auto& k : cuda_on_host::kernels()) out << k.argument_bytes << ' ' << k.name << '\n';
    return out.str();
  }();
  return all.c_str();
}

void cuda_on_host_set_order(int order, unsigned seed) {
  cuda_on_host::machine().order = static_cast<cuda_on_host::Order>(order);
  cuda_on_host::machine().seed = seed;
}

// Null, or what went wrong.
const char* cuda_on_host_launch(const char* name, unsigned grid_x, unsigned grid_y, unsigned threads,
                                size_t shared_bytes, const void* args, size_t argument_bytes) {
  static std::string error;
  try {
    const auto& kernel = cuda_on_host::find(name);
    if (argument_bytes != kernel.argument_bytes)
      throw std::runtime_error("takes " + std::to_string(kernel.argument_bytes) + " bytes, got " +
                               std::to_string(argument_bytes));
    cuda_on_host::launch({{grid_x, grid_y, 1}, {threads, 1, 1}, shared_bytes}, [&] { kernel.call(args); });
    return nullptr;
  } catch (const std::exception& e) {
    error = std::string(name) + ": " + e.what();
    return error.c_str();
  }
}
}
