// A pool of large blocks for the outputs of CPU kernels.
//
// A fresh block costs a page fault for every 4 KB, which takes longer than most kernels. The pool keeps blocks mapped,
// aligned to 2 MB and marked for huge pages, and hands them out again. No Python and no torch here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

namespace mmkern {

constexpr size_t kHugePage = size_t(2) << 20;
// Below this malloc's own caches do as well (docs/memory.md).
constexpr size_t kPoolThreshold = size_t(1) << 20;

struct Block {
  void* data;
  size_t bytes;
  int size_class;
  uint64_t idle_since;  // in give_backs, for the choice of what to unmap first
  Block* next;          // the next idle block of this class
};

struct PoolStats {
  size_t limit, in_use, idle;         // bytes
  uint64_t reused, mapped, declined;  // calls of take()
};

// Four classes a doubling, so that at most a fifth of a block's address range is unused: 2, 4, 6, 8, 10, 12, 14, 16,
// 20, 24, 28, 32, 40 ... MB. What is never written is never resident.
struct SizeClass {
  int index;
  size_t bytes;

  static SizeClass of(size_t bytes);
};

// Every method may be called from any thread, with or without the GIL.
class Pool {
 public:
  // The one pool of this process. It is never destroyed: tensors may outlive the module, even the interpreter.
  static Pool& of_process();

  // A block of at least `bytes` with any content, or null where the limit or the system refuses.
  Block* take(size_t bytes);
  void give_back(Block* block);

  // Unmaps every idle block; the bytes that went back to the system.
  size_t release();
  // Zero turns the pool off. Blocks in use stay valid and go back to the system in their time.
  void set_limit(size_t bytes);
  PoolStats stats();

 private:
  Pool() = default;

  // All of these want mutex_ held. Mapping and unmapping happen under it too, so that a fork, which takes it, never
  // meets a block half made.
  bool make_room(size_t bytes);
  void shrink();
  void unmap_oldest();
  void unmap(Block** link);

  static void before_fork();
  static void after_fork_in_parent();
  static void after_fork_in_child();
  template <class F>
  void for_each_idle(F visit);

  static constexpr int kClasses = 4 * 48;

  std::mutex mutex_;
  Block* idle_[kClasses] = {};  // last in, first out: the warmest block is used first
  uint64_t clock_ = 0;
  PoolStats stats_ = {};
};

}  // namespace mmkern
