// A fiber: a stack and the place where it stopped. One fiber plays one CUDA thread.
//
// swapcontext makes a system call a switch; on x86-64 six pushes and six pops do. AddressSanitizer is told of each
// switch, or it would take one fiber's frames for another's.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
extern "C" void cuda_on_host_switch(void** save, void* load);
asm(R"(
.text
.weak cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch, .-cuda_on_host_switch
)");
#endif

namespace cuda_on_host {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 << 10;  // untouched pages cost nothing

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (stack_) munmap(stack_, kStackBytes);
  }

  // The next swap to this fiber calls `entry`, which must call arrived() first and never return. Whatever the fiber was
  // doing before is dropped.
  void start(void (*entry)()) {
    if (!stack_) {
      void* pages = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (pages == MAP_FAILED) __builtin_trap();
      stack_ = static_cast<char*>(pages);
    }
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);
    bottom_ = stack_;
    size_ = kStackBytes;
    fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
    auto* slot = reinterpret_cast<uintptr_t*>(stack_ + kStackBytes);
    *--slot = 0;                                   // entry has no caller
    *--slot = reinterpret_cast<uintptr_t>(entry);  // where `ret` goes
    for (int i = 0; i < 6; ++i) *--slot = 0;
    where_ = slot;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    makecontext(&context_, entry, 0);
#endif
  }

  // Stops here, in `from`, and goes on in `to`. Control comes back from `to` only.
  static void swap(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
#if defined(__x86_64__)
    cuda_on_host_switch(&from.where_, to.where_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
    from.arrived(to);
  }

  void arrived([[maybe_unused]] Fiber& came_from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &came_from.bottom_, &came_from.size_);
#endif
  }

 private:
  char* stack_ = nullptr;  // none: the fiber is the host's own thread
#if defined(__x86_64__)
  void* where_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
#endif
};

}  // namespace cuda_on_host
