// Runs CUDA blocks on the host: one fiber a thread, one block after another.
//
// A thread runs until it has to wait for others: at a barrier, a shuffle, a vote, an mma. The last to arrive computes
// the result for all of them. When nobody can run and somebody waits, the kernel would hang on a device: launch()
// throws and says who waits where. Nothing may depend on the order in which threads and blocks run, so the order is a
// setting; whichever thread comes first in it is driven as far as it can go, as a device drives a warp.
#pragma once

#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace cuda_on_host {

struct Index {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
};

// The place in a kernel from which an intrinsic was called.
struct Site {
  const char* file;
  int line;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& o) const { return line == o.line && strcmp(file, o.file) == 0; }
};

// What threads wait for together: the same op at the same site, of the whole block or of a warp's lanes in `mask`.
struct Meeting {
  enum Scope { block, warp };
  Scope scope;
  const char* op;
  unsigned mask;
  int argument;  // width, immediate: all must bring the same
  size_t size;   // of what they exchange
  Site site;

  bool operator==(const Meeting& o) const {
    return scope == o.scope && mask == o.mask && argument == o.argument && size == o.size && site == o.site &&
           strcmp(op, o.op) == 0;
  }
};

// cp.async of one thread: copies take place when it waits for them, not before.
class AsyncCopies {
 public:
  void add(void* to, const void* from, size_t bytes, size_t valid) {
    memset(to, 0xff, bytes);
    open_.push_back({to, from, bytes, valid});
  }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait_for_all_but(size_t newest) {
    const size_t due = groups_.size() > newest ? groups_.size() - newest : 0;
    for (size_t g = 0; g < due; ++g)
      for (const Copy& copy : groups_[g]) copy.perform();
    groups_.erase(groups_.begin(), groups_.begin() + due);
  }
  bool pending() const {
    return !open_.empty() || std::any_of(groups_.begin(), groups_.end(), [](auto& g) { return !g.empty(); });
  }
  void clear() {
    open_.clear();
    groups_.clear();
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes, valid;
    void perform() const {
      memset(to, 0, bytes);
      memcpy(to, from, valid);
    }
  };
  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> groups_;
};

struct Thread {
  enum State { ready, waiting, exited };
  Fiber fiber;
  State state;
  unsigned number;  // in the block
  unsigned rank;    // in the order
  Index index;
  const Meeting* meeting;
  const void* in;
  void* out;
  AsyncCopies copies;

  unsigned lane() const { return number % 32; }
};

// The threads that can run, by their rank in the order; the first is found in a few instructions.
class ReadySet {
 public:
  void clear() { memset(words_, 0, sizeof words_); }
  void add(unsigned rank) { words_[rank / 64] |= uint64_t(1) << (rank % 64); }
  void remove(unsigned rank) { words_[rank / 64] &= ~(uint64_t(1) << (rank % 64)); }
  int first() const {
    for (int w = 0; w < 16; ++w)
      if (words_[w]) return 64 * w + __builtin_ctzll(words_[w]);
    return -1;
  }

 private:
  uint64_t words_[16];
};

struct Launch {
  Index grid, block;
  size_t shared_bytes = 0;  // dynamic
};

enum class Order { forward, reverse, random };

// Where __shared__ variables lie. The shim makes them thread_local: all fibers run on one thread of the host, and the
// linker gathers them in one segment, which each block finds poisoned.
struct SharedSegment {
  char* begin = nullptr;
  size_t bytes = 0;

  static SharedSegment find() {
    static thread_local char anchor;
    SharedSegment found{&anchor, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* data) {
          auto* segment = static_cast<SharedSegment*>(data);
          auto* begin = static_cast<char*>(module->dlpi_tls_data);
          for (int i = 0; i < module->dlpi_phnum; ++i) {
            const auto& header = module->dlpi_phdr[i];
            if (header.p_type != PT_TLS || segment->begin < begin || segment->begin >= begin + header.p_memsz) continue;
            *segment = {begin, header.p_memsz};
            return 1;
          }
          return 0;
        },
        &found);
    return found;
  }
};

class Machine {
 public:
  static constexpr size_t kMaxSharedBytes = 227 << 10;

  Order order = Order::forward;
  unsigned seed = 0;
  Launch launch;
  Index block_index;
  Thread* running = nullptr;

  void run(const Launch& what, std::function<void()> kernel) {
    launch = what;
    check_launch();
    kernel_ = std::move(kernel);
    static_shared_ = SharedSegment::find();
    random_.seed(seed);
    shared_.reset(static_cast<char*>(aligned_alloc(16, (what.shared_bytes + 15) / 16 * 16)));
    const unsigned threads = launch.block.count(), blocks = launch.grid.count();
    while (threads_.size() < threads) threads_.push_back(std::make_unique<Thread>());
    std::vector<unsigned> blocks_in_order = ordered(blocks);
    for (unsigned b : blocks_in_order) {
      block_index = {b % launch.grid.x, b / launch.grid.x % launch.grid.y, b / (launch.grid.x * launch.grid.y)};
      run_block(threads);
    }
  }

  void* dynamic_shared() { return shared_.get(); }

  [[noreturn]] void fail(const std::string& what, Site site) {
    error_ = "thread " + std::to_string(running->number) + " at " + text(site) + ": " + what;
    Fiber::swap(running->fiber, host_);
    __builtin_unreachable();
  }

  // Waits for all threads of `m`; the last to come calls compute(participants).
  template <class In, class Out, class Compute>
  Out meet(const Meeting& m, const In& in, Compute compute) {
    Thread& me = *running;
    if (m.scope == Meeting::warp && !(m.mask >> me.lane() & 1))
      fail(std::string(m.op) + " without its own lane in the mask", m.site);
    Out out{};
    me.meeting = &m;
    me.in = &in;
    me.out = &out;
    me.state = Thread::waiting;
    ready_.remove(me.rank);
    unsigned& arrived = m.scope == Meeting::warp ? waiting_in_warp_[me.number / 32] : waiting_in_block_;
    ++arrived;
    if (arrived >= expected(m) && all_met(m)) {
      std::vector<Thread*>& who = participants(m);
      compute(who);
      for (Thread* t : who) {
        t->state = Thread::ready;
        ready_.add(t->rank);
      }
      arrived -= unsigned(who.size());
    } else {
      Fiber::swap(me.fiber, host_);
    }
    return out;
  }

  void exit_thread() {
    if (running->copies.pending()) fail("exits with copies by cp.async under way", {"kernel", 0});
    running->state = Thread::exited;
    ready_.remove(running->rank);
    Fiber::swap(running->fiber, host_);
    __builtin_unreachable();
  }

  void enter_thread() {
    running->fiber.arrived(host_);
    kernel_();
    exit_thread();
  }

 private:
  struct Free {
    void operator()(char* p) const { free(p); }
  };

  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Thread*> by_rank_;
  ReadySet ready_;
  std::vector<Thread*> participants_;
  std::unique_ptr<char, Free> shared_;
  SharedSegment static_shared_;
  Fiber host_;
  std::mt19937 random_;
  std::string error_;
  unsigned waiting_in_block_ = 0;
  unsigned waiting_in_warp_[32] = {};

  void check_launch() const {
    const auto& [grid, block, bytes] = launch;
    if (grid.count() == 0 || grid.y > 65535 || grid.z > 65535) throw std::runtime_error("bad grid");
    if (block.count() == 0 || block.count() > 1024) throw std::runtime_error("bad block");
    if (bytes > kMaxSharedBytes) throw std::runtime_error("too much dynamic shared memory");
  }

  std::vector<unsigned> ordered(unsigned n) {
    std::vector<unsigned> all(n);
    for (unsigned i = 0; i < n; ++i) all[i] = order == Order::reverse ? n - 1 - i : i;
    if (order == Order::random) std::shuffle(all.begin(), all.end(), random_);
    return all;
  }

  static void entry();

  void run_block(unsigned threads) {
    memset(shared_.get(), 0xff, launch.shared_bytes);
    memset(static_shared_.begin, 0xff, static_shared_.bytes);
    waiting_in_block_ = 0;
    memset(waiting_in_warp_, 0, sizeof waiting_in_warp_);
    ready_.clear();
    by_rank_.clear();
    for (unsigned i : ordered(threads)) {
      Thread& t = *threads_[i];
      const Index& size = launch.block;
      t.number = i;
      t.rank = unsigned(by_rank_.size());
      t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
      t.state = Thread::ready;
      t.copies.clear();
      t.fiber.start(entry);
      by_rank_.push_back(&t);
      ready_.add(t.rank);
    }
    for (int rank; (rank = ready_.first()) >= 0;) {
      running = by_rank_[size_t(rank)];
      Fiber::swap(host_, running->fiber);
      if (!error_.empty()) throw std::runtime_error(std::exchange(error_, "") + " (block " + text(block_index) + ")");
    }
    if (std::any_of(threads_.begin(), threads_.begin() + threads, [](auto& t) { return t->state != Thread::exited; }))
      throw std::runtime_error("deadlock in block " + text(block_index) + "\n" + who_waits(threads));
  }

  unsigned expected(const Meeting& m) const {
    return m.scope == Meeting::block ? launch.block.count() : unsigned(__builtin_popcount(m.mask));
  }

  std::vector<Thread*>& participants(const Meeting& m) {
    participants_.clear();
    const unsigned threads = launch.block.count();
    const unsigned first = m.scope == Meeting::block ? 0 : running->number / 32 * 32;
    const unsigned n = m.scope == Meeting::block ? threads : 32;
    for (unsigned i = first; i < first + n && i < threads; ++i)
      if (m.scope == Meeting::block || m.mask >> (i % 32) & 1) participants_.push_back(threads_[i].get());
    return participants_;
  }

  bool all_met(const Meeting& m) {
    const auto& who = participants(m);
    return who.size() == expected(m) && std::all_of(who.begin(), who.end(), [&](Thread* t) {
             return t->state == Thread::waiting && *t->meeting == m;
           });
  }

  static std::string text(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }
  static std::string text(const Index& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
  }

  // "0-30, 32": the numbers in a sorted list, runs shortened.
  static std::string ranges(const std::vector<unsigned>& numbers) {
    std::string out;
    for (size_t i = 0; i < numbers.size();) {
      size_t end = i;
      while (end + 1 < numbers.size() && numbers[end + 1] == numbers[end] + 1) ++end;
      if (!out.empty()) out += ", ";
      out += std::to_string(numbers[i]);
      if (end > i) out += "-" + std::to_string(numbers[end]);
      i = end + 1;
    }
    return out;
  }

  std::string who_waits(unsigned threads) const {
    std::map<std::string, std::vector<unsigned>> places;
    for (unsigned i = 0; i < threads; ++i) {
      const Thread& t = *threads_[i];
      if (t.state == Thread::exited) {
        places["exited"].push_back(i);
        continue;
      }
      char mask[32] = "";
      if (t.meeting->scope == Meeting::warp) snprintf(mask, sizeof mask, ", mask %08x", t.meeting->mask);
      places[std::string("wait at ") + t.meeting->op + " (" + text(t.meeting->site) + mask + ")"].push_back(i);
    }
    std::string out;
    for (const auto& [place, who] : places) out += "  threads " + ranges(who) + " " + place + "\n";
    return out;
  }
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline void Machine::entry() { machine().enter_thread(); }

inline void launch(const Launch& what, std::function<void()> kernel) { machine().run(what, std::move(kernel)); }

}  // namespace cuda_on_host
