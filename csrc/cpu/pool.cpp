#include "pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <new>

namespace mmkern {
namespace {

// Aligned to a huge page: maps one more and cuts both ends off.
void* map_aligned(size_t bytes) {
  void* raw = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(raw);
  const size_t head = -reinterpret_cast<uintptr_t>(raw) & (kHugePage - 1);
  if (head) munmap(begin, head);
  munmap(begin + head + bytes, kHugePage - head);
  madvise(begin + head, bytes, MADV_HUGEPAGE);  // refused by a kernel without huge pages, which does no harm
  return begin + head;
}

}  // namespace

SizeClass SizeClass::of(size_t bytes) {
  const size_t units = (bytes + kHugePage - 1) / kHugePage;
  if (units <= 4) return {int(units) - 1, units * kHugePage};
  // 4 * 2^shift < units <= 8 * 2^shift, rounded up to a multiple of 2^shift
  const int shift = 61 - __builtin_clzll(units - 1);
  const size_t steps = (units + (size_t(1) << shift) - 1) >> shift;
  return {shift * 4 + int(steps) - 1, (steps << shift) * kHugePage};
}

Pool& Pool::of_process() {
  static Pool* const pool = [] {
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    return new Pool;
  }();
  return *pool;
}

Block* Pool::take(size_t bytes) {
  const SizeClass wanted = SizeClass::of(bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  Block* block = idle_[wanted.index];
  if (block) {
    idle_[wanted.index] = block->next;
    stats_.idle -= block->bytes;
    stats_.in_use += block->bytes;
    ++stats_.reused;
    return block;
  }
  if (make_room(wanted.bytes)) block = new (std::nothrow) Block;
  void* const data = block ? map_aligned(wanted.bytes) : nullptr;
  if (!data) {
    delete block;
    ++stats_.declined;
    return nullptr;
  }
  *block = {data, wanted.bytes, wanted.index, 0, nullptr};
  stats_.in_use += wanted.bytes;
  ++stats_.mapped;
  return block;
}

void Pool::give_back(Block* block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  stats_.in_use -= block->bytes;
  stats_.idle += block->bytes;
  block->idle_since = ++clock_;
  block->next = idle_[block->size_class];
  idle_[block->size_class] = block;
  shrink();
}

size_t Pool::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t idle = stats_.idle;
  for (Block*& head : idle_) {
    while (head) unmap(&head);
  }
  return idle;
}

void Pool::set_limit(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  stats_.limit = bytes;
  shrink();
}

PoolStats Pool::stats() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

// Unmaps idle blocks, the oldest first, until `bytes` more fit under the limit; none where they cannot fit at all.
bool Pool::make_room(size_t bytes) {
  if (bytes > stats_.limit || stats_.in_use > stats_.limit - bytes) return false;
  while (stats_.in_use + stats_.idle + bytes > stats_.limit) unmap_oldest();
  return true;
}

void Pool::shrink() {
  while (stats_.idle && stats_.in_use + stats_.idle > stats_.limit) unmap_oldest();
}

void Pool::unmap_oldest() {
  // A list is in order of age, its oldest block last.
  Block** oldest = nullptr;
  for (Block*& head : idle_) {
    if (!head) continue;
    Block** last = &head;
    while ((*last)->next) last = &(*last)->next;
    if (!oldest || (*last)->idle_since < (*oldest)->idle_since) oldest = last;
  }
  unmap(oldest);
}

void Pool::unmap(Block** link) {
  Block* const block = *link;
  *link = block->next;
  stats_.idle -= block->bytes;
  munmap(block->data, block->bytes);
  delete block;
}

template <class F>
void Pool::for_each_idle(F visit) {
  for (Block* head : idle_) {
    for (Block* block = head; block; block = block->next) visit(block);
  }
}

// A fork copies the blocks in use, page by page as either side writes, like any memory. Idle blocks stay with the
// parent alone: a copy would cost it a fault for every page again, and keep the old pages for as long as the child
// lives.
void Pool::before_fork() {
  Pool& pool = of_process();
  pool.mutex_.lock();
  pool.for_each_idle([](Block* block) { madvise(block->data, block->bytes, MADV_DONTFORK); });
}

void Pool::after_fork_in_parent() {
  Pool& pool = of_process();
  pool.for_each_idle([](Block* block) { madvise(block->data, block->bytes, MADV_DOFORK); });
  pool.mutex_.unlock();
}

void Pool::after_fork_in_child() {
  Pool& pool = of_process();
  for (Block*& head : pool.idle_) head = nullptr;  // a few words each are lost: malloc may not be safe here
  pool.stats_.idle = 0;
  pool.mutex_.unlock();
}

}  // namespace mmkern
