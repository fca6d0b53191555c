// Counts what kernels read and write of watched memory: the calls that g++ -fsanitize=thread puts at every access,
// without that sanitizer's library.
#include <stddef.h>
#include <stdint.h>

namespace {

constexpr int kRoom = 32;
struct Watched {
  uintptr_t begin, end;
};
Watched watched[kRoom];
int watched_count = 0;
long long bytes_moved = 0;

void add(const void* at, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  for (int i = 0; i < watched_count; ++i)
    if (address >= watched[i].begin && address < watched[i].end) bytes_moved += static_cast<long long>(bytes);
}

}  // namespace

extern "C" {

// Null: begins anew. Returns -1 where there is no room.
int cuda_on_host_watch(const void* begin, size_t bytes) {
  if (!begin) return watched_count = 0, bytes_moved = 0;
  if (watched_count == kRoom) return -1;
  const auto address = reinterpret_cast<uintptr_t>(begin);
  watched[watched_count++] = {address, address + bytes};
  return 0;
}

long long cuda_on_host_bytes() { return bytes_moved; }

void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
char __tsan_atomic8_load(const volatile char* at, int) { return *at; }  // of the harness's own statics
void __tsan_read_range(void* at, size_t bytes) { add(at, bytes); }
void __tsan_write_range(void* at, size_t bytes) { add(at, bytes); }

#define MMKERN_ACCESSES(BYTES)                                                                                         \
  void __tsan_read##BYTES(void* at) { add(at, BYTES); }                                                                \
  void __tsan_write##BYTES(void* at) { add(at, BYTES); }                                                               \
  void __tsan_unaligned_read##BYTES(void* at) { add(at, BYTES); }                                                      \
  void __tsan_unaligned_write##BYTES(void* at) { add(at, BYTES); }
MMKERN_ACCESSES(1)
MMKERN_ACCESSES(2)
MMKERN_ACCESSES(4)
MMKERN_ACCESSES(8)
MMKERN_ACCESSES(16)
}
