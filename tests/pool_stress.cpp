// The pool without Python: `pool_stress threads` and `pool_stress forks` end with 0, or say what broke.

#include "../csrc/cpu/pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

using mmkern::Block;
using mmkern::kHugePage;
using mmkern::Pool;

namespace {

constexpr size_t kLimit = 24 * kHugePage;
std::atomic<bool> stop{false};
std::atomic<int64_t> next_stamp{1};

void expect(bool truth, const char* what) {
  if (truth) return;
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}

// Takes and gives back; a block that two threads hold at once loses its stamp.
void churn(unsigned seed, int rounds) {
  std::mt19937 random(seed);
  std::vector<std::pair<Block*, int64_t>> held;
  for (int i = 0; i < rounds && !stop; ++i) {
    const size_t bytes = 1 + random() % (6 * kHugePage);
    if (Block* block = Pool::of_process().take(bytes)) {
      const int64_t stamp = next_stamp++;
      expect(block->bytes >= bytes, "block too small");
      expect(reinterpret_cast<uintptr_t>(block->data) % kHugePage == 0, "block not aligned");
      std::memcpy(block->data, &stamp, sizeof stamp);
      std::memcpy(static_cast<char*>(block->data) + bytes - 1, &stamp, 1);
      held.emplace_back(block, stamp);
    }
    while (held.size() > random() % 4) {
      const auto [block, stamp] = held.back();
      expect(!std::memcmp(block->data, &stamp, sizeof stamp), "two owners of one block");
      held.pop_back();
      Pool::of_process().give_back(block);
    }
    if (random() % 64 == 0) Pool::of_process().release();
    const mmkern::PoolStats stats = Pool::of_process().stats();
    expect(stats.in_use + stats.idle <= kLimit, "above the limit");
  }
  for (auto [block, stamp] : held) Pool::of_process().give_back(block);
}

void threads() {
  std::vector<std::thread> all;
  for (unsigned seed = 0; seed < 4; ++seed) all.emplace_back(churn, seed, 2000);
  for (std::thread& thread : all) thread.join();
  expect(Pool::of_process().stats().in_use == 0, "blocks lost");
}

// A child may find no lock held by a thread that it does not have, and no idle block that it does not have.
void forks() {
  std::vector<std::thread> all;
  for (unsigned seed = 0; seed < 3; ++seed) all.emplace_back(churn, seed, 1 << 30);
  for (int i = 0; i < 200; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(5);  // a child that hangs is killed
      Pool::of_process().set_limit(2 * kLimit);
      Block* const block = Pool::of_process().take(2 * kHugePage);
      if (!block) std::_Exit(2);
      std::memset(block->data, 1, block->bytes);
      Pool::of_process().give_back(block);
      std::_Exit(Pool::of_process().stats().idle == 2 * kHugePage ? 0 : 3);
    }
    int status = 0;
    waitpid(child, &status, 0);
    expect(WIFEXITED(status), "a forked child hung or crashed");
    expect(WEXITSTATUS(status) == 0, "a forked child found no memory, or idle blocks of its parent");
  }
  stop = true;
  for (std::thread& thread : all) thread.join();
}

}  // namespace

int main(int, char** argv) {
  Pool::of_process().set_limit(kLimit);
  if (!std::strcmp(argv[1], "forks")) {
    forks();
  } else {
    threads();
  }
}
