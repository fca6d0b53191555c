// Host bodies of csrc/cuda/ptx.cuh, written from the PTX manual: what each instruction does to the 32 lanes.
#pragma once

namespace cuda_on_host {

using Bits = unsigned short;

inline float bf16_to_float(Bits bits) { return __uint_as_float(unsigned(bits) << 16); }

inline Bits float_to_bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return Bits((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(Bits bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  return float(x);
}

inline Bits float_to_half(float x) {
  if (x != x) return 0x7fff;
  const _Float16 rounded = _Float16(x);
  Bits bits;
  memcpy(&bits, &rounded, 2);
  return bits;
}

inline Bits half_of(const unsigned* registers, int element) {
  return Bits(registers[element / 2] >> (16 * (element & 1)));
}

struct Fragment {
  unsigned r[4];
};

inline Fragment load_matrices(const char* op, const void* row, bool transposed, Site site) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    machine().fail(std::string(op) + " from an address that is not a multiple of 16", site);
  const Meeting all{Meeting::warp, op, ~0u, 0, sizeof row, site};
  return machine().meet<const void*, Fragment>(all, row, [transposed](std::vector<Thread*>& who) {
    Bits matrix[4][8][8];
    for (Thread* t : who) memcpy(matrix[t->lane() / 8][t->lane() % 8], *static_cast<const void* const*>(t->in), 16);
    for (Thread* t : who) {
      const unsigned i = t->lane() / 4, j = t->lane() % 4 * 2;
      auto* to = static_cast<Fragment*>(t->out);
      for (int m = 0; m < 4; ++m) {
        const Bits low = transposed ? matrix[m][j][i] : matrix[m][i][j];
        const Bits high = transposed ? matrix[m][j + 1][i] : matrix[m][i][j + 1];
        to->r[m] = low | unsigned(high) << 16;
      }
    }
  });
}

struct MmaOperands {
  unsigned a[4], b[2];
  float c[4];
};
struct MmaResult {
  float c[4];
};

inline void mma(const char* op, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], float (*number)(Bits),
                Site site) {
  MmaOperands in;
  memcpy(in.a, a, sizeof a);
  memcpy(in.b, b, sizeof b);
  memcpy(in.c, c, sizeof c);
  const Meeting all{Meeting::warp, op, ~0u, 0, sizeof in, site};
  const auto out = machine().meet<MmaOperands, MmaResult>(all, in, [number](std::vector<Thread*>& who) {
    float A[16][16], B[16][8];
    for (Thread* t : who) {
      const auto* x = static_cast<const MmaOperands*>(t->in);
      const int group = int(t->lane()) / 4, pair = int(t->lane()) % 4 * 2;
      for (int e = 0; e < 8; ++e) A[group + e / 2 % 2 * 8][pair + e % 2 + e / 4 * 8] = number(half_of(x->a, e));
      for (int e = 0; e < 4; ++e) B[pair + e % 2 + e / 2 * 8][group] = number(half_of(x->b, e));
    }
    for (Thread* t : who) {
      const auto* x = static_cast<const MmaOperands*>(t->in);
      const int group = int(t->lane()) / 4, pair = int(t->lane()) % 4 * 2;
      for (int e = 0; e < 4; ++e) {
        float sum = x->c[e];
        for (int k = 0; k < 16; ++k) sum += A[group + e / 2 * 8][k] * B[k][pair + e % 2];
        static_cast<MmaResult*>(t->out)->c[e] = sum;
      }
    }
  });
  memcpy(c, out.c, sizeof c);
}

}  // namespace cuda_on_host

namespace mmkern {
inline namespace device {
namespace ptx {

inline float half_to_float(unsigned short bits) { return cuda_on_host::half_to_float(bits); }
inline unsigned float_to_half2(float first, float second) {
  return cuda_on_host::float_to_half(first) | unsigned(cuda_on_host::float_to_half(second)) << 16;
}
inline unsigned float_to_bf162(float first, float second) {
  return cuda_on_host::float_to_bf16(first) | unsigned(cuda_on_host::float_to_bf16(second)) << 16;
}

inline float exp2(float x) {
  const float y = exp2f(x);
  return fabsf(y) < 0x1p-126f ? 0 : y;
}

inline void cp_async16(void* to, const void* from, bool valid, MMKERN_SITE) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
    cuda_on_host::machine().fail("cp.async with an address that is not a multiple of 16", site);
  cuda_on_host::machine().running->copies.add(to, from, 16, valid ? 16 : 0);
}
inline void cp_async_commit() { cuda_on_host::machine().running->copies.commit(); }
template <int N>
inline void cp_async_wait() {
  cuda_on_host::machine().running->copies.wait_for_all_but(N);
}

inline void ldmatrix(unsigned (&to)[4], const void* row, MMKERN_SITE) {
  const auto fragment = cuda_on_host::load_matrices("ldmatrix", row, false, site);
  memcpy(to, fragment.r, sizeof to);
}
inline void ldmatrix_transposed(unsigned (&to)[4], const void* row, MMKERN_SITE) {
  const auto fragment = cuda_on_host::load_matrices("ldmatrix.trans", row, true, site);
  memcpy(to, fragment.r, sizeof to);
}

inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], MMKERN_SITE) {
  cuda_on_host::mma("mma.bf16", c, a, b, cuda_on_host::bf16_to_float, site);
}
inline void mma_half(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], MMKERN_SITE) {
  cuda_on_host::mma("mma.f16", c, a, b, cuda_on_host::half_to_float, site);
}

}  // namespace ptx
}  // namespace device
}  // namespace mmkern
