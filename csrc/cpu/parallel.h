// Threads: blocks of rows, or tiles, shared among the threads of one OpenMP region.
//
// What f computes for a row must not depend on where its block begins: then the bits are the same for any thread count.
#pragma once

#include <pthread.h>
#include <stdint.h>
#include <sys/stat.h>
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
static inline int omp_get_num_threads() { return 1; }
#endif

#ifndef MMKERN_ISA
#define MMKERN_ISA baseline
#endif

namespace mmkern {
inline namespace MMKERN_ISA {

// Element-operations below which one thread is faster. Waking a second thread takes 1 us right after another region and
// 5 us after 2 ms without one; 5 us are 30000 to 60000 operations of a row loop in cache.
constexpr int64_t kSerialWork = 65536;

// In the child of a process that had threads when it forked, a region would wait for threads that are gone. They may
// be torch's, with which libgomp's pool is shared, so every thread counts.
struct Fork {
  static inline bool watched = false;
  static inline bool threads_before = false;
  static inline bool threads_lost = false;

  static void prepare() {
    struct stat tasks;
    threads_before = stat("/proc/self/task", &tasks) != 0 || tasks.st_nlink > 3;  // two links and one a thread
  }
  static void in_child() { threads_lost = threads_lost || threads_before; }
  static void watch() {
    if (!watched) pthread_atfork(prepare, nullptr, in_child);
    watched = true;
  }
};

__attribute__((constructor)) static void watch_forks() { Fork::watch(); }

// Whether work of this many element-operations is shared among threads. The bindings release the GIL where it is.
inline bool is_parallel(int64_t total_work, int threads) {
#ifdef _OPENMP
  constexpr bool has_threads = true;
#else
  constexpr bool has_threads = false;
#endif
  return has_threads && threads > 1 && total_work >= kSerialWork && !Fork::threads_lost;
}

// f(begin, end) on contiguous blocks that cover [0, rows). work_per_row counts element-operations.
template <class F>
inline void parallel_rows(int64_t rows, int64_t work_per_row, int threads, F f) {
  if (rows > 1 && is_parallel(rows * work_per_row, threads)) {
#pragma omp parallel num_threads(rows < threads ? int(rows) : threads)
    {
      const int64_t t = omp_get_thread_num(), n = omp_get_num_threads();
      const int64_t begin = rows * t / n, end = rows * (t + 1) / n;
      if (begin < end) f(begin, end);
    }
    return;
  }
  if (rows > 0) f(int64_t(0), rows);
}

// f(i) for each i in [0, count), handed out one at a time: for tiles, each worth a thread's while.
template <class F>
inline void parallel_blocks(int64_t count, int threads, F f) {
  if (count > 1 && is_parallel(kSerialWork, threads)) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(count < threads ? int(count) : threads)
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  for (int64_t i = 0; i < count; ++i) f(i);
}

}  // namespace MMKERN_ISA
}  // namespace mmkern
