// The two matrix products of attention, as one warp forms them for 16 queries: scores Q K^T, and P V.
//
// In 16-bit types they are mma.sync's, in float32 ordinary FMAs. A lane's scores lie where mma.sync puts them in both,
// so that masks and the softmax are written once: s[n][e] belongs to row lane / 4 + 8 (e / 2) of the warp and to key
// 8 n + 2 (lane % 4) + e % 2 of the tile. Where a lane's sums of P V lie, half() and column() say.
#pragma once

#include "device.cuh"

namespace mmkern {
inline namespace device {

constexpr int kWarpRows = 16;  // queries of a warp
constexpr int kStep = 16;      // channels, or keys, of one mma: tiles are zero up to a multiple of it

constexpr MMKERN_FN int up_to(int multiple, int n) { return (n + multiple - 1) / multiple * multiple; }

MMKERN_FN int this_lane() { return int(threadIdx.x) % kWarp; }

// Rows in shared memory, each 16 bytes longer than its channels: eight rows then lie in eight different groups of
// banks, for ldmatrix and for loads of 16 bytes.
template <class Number>
struct SharedRows {
  static constexpr int chunk = 16 / int(sizeof(Number));

  Number* data;
  int width;  // a multiple of kStep

  MMKERN_FN int stride() const { return width + chunk; }
  MMKERN_FN Number* at(int row, int col) const { return data + row * stride() + col; }
  MMKERN_FN SharedRows from(int row) const { return {at(row, 0), width}; }
};

// Fills `rows` rows; those past `count` and the columns past `width` are zeros. address(row) is where a row begins.
// What comes by cp.async is there once waited for.
template <class Number, class Address>
MMKERN_FN void bring(const SharedRows<Number>& to, int rows, int count, int width, bool vectors, Address address) {
  constexpr int chunk = SharedRows<Number>::chunk;
  const int chunks = to.width / chunk;
  for (int i = int(threadIdx.x); i < rows * chunks; i += int(blockDim.x)) {
    const int row = i / chunks, col = i % chunks * chunk;
    const bool inside = row < count && col < width;
    const Number* from = address(inside ? row : 0) + (inside ? col : 0);
    if (vectors) {
      ptx::cp_async16(to.at(row, col), from, inside);
    } else {
#pragma unroll
      for (int k = 0; k < chunk; ++k) to.at(row, col)[k] = inside && col + k < width ? from[k] : Number(0);
    }
  }
}

struct Bfloat16 {
  using Number = unsigned short;
  static constexpr Dtype dtype = kBfloat16;
  static constexpr int keys = 64;  // of a tile; half as many where the values are widest
  static MMKERN_FN void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    ptx::mma_bf16(c, a, b);
  }
  // Weights are rounded to 16 bits: the fast exponential is as good.
  static MMKERN_FN float exponential(float x) { return ptx::exp2(x * 1.4426950408889634f); }
};

struct Float16 : Bfloat16 {
  static constexpr Dtype dtype = kFloat16;
  static MMKERN_FN void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    ptx::mma_half(c, a, b);
  }
};

struct Float32 {
  using Number = float;
  static constexpr Dtype dtype = kFloat32;
  static constexpr int keys = 32;
  static MMKERN_FN float exponential(float x) { return expf(x); }
};

// visit(n, s[n]) in a loop that stays one, for what is long or wants many registers. Registers have no index at run
// time, so the four at hand are always the first, and the others move up.
template <int N, class Visit>
MMKERN_FN void for_each_four(float (&s)[N][4], Visit visit) {
#pragma unroll 1
  for (int n = 0; n < N; ++n) {
    float four[4] = {s[0][0], s[0][1], s[0][2], s[0][3]};
    visit(n, four);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int m = 1; m < N; ++m) s[m - 1][e] = s[m][e];
      s[N - 1][e] = four[e];
    }
  }
}

// kWhole: the tile is full of keys and the values fill all columns, so nothing has to be asked for on the way.
template <class T, int kKeys>
struct Products {
  using Rows = SharedRows<typename T::Number>;

  static MMKERN_FN int half(int, int e) { return e / 2; }
  static MMKERN_FN int column(int n, int e) { return 8 * n + this_lane() % 4 * 2 + e % 2; }

  template <bool kWhole>
  static MMKERN_FN void scores(float (&s)[kKeys / 8][4], const Rows& q, const Rows& k, int keys) {
    const int lane = this_lane();
#pragma unroll 1
    for (int col = 0; col < q.width; col += kStep) {
      unsigned a[4];
      ptx::ldmatrix(a, q.at(lane % 16, col + lane / 16 * 8));
#pragma unroll
      for (int n = 0; n < kKeys / 8; n += 2) {
        if (!kWhole && 8 * n >= keys) break;
        unsigned b[4];
        ptx::ldmatrix(b, k.at(8 * n + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8));
        T::multiply(s[n], a, {b[0], b[1]});
        T::multiply(s[n + 1], a, {b[2], b[3]});
      }
    }
  }

  template <bool kWhole, int kValue>
  static MMKERN_FN void add_values(float (&o)[kValue / 8][4], float (&p)[kKeys / 8][4], const Rows& v, int keys) {
    const int lane = this_lane();
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      if (!kWhole && 8 * n >= keys) break;
      const unsigned a[4] = {narrow(p[n][0], p[n][1], T::dtype), narrow(p[n][2], p[n][3], T::dtype),
                             narrow(p[n + 1][0], p[n + 1][1], T::dtype), narrow(p[n + 1][2], p[n + 1][3], T::dtype)};
#pragma unroll
      for (int col = 0; col < kValue; col += kStep) {
        if (!kWhole && col >= v.width) break;
        unsigned b[4];
        ptx::ldmatrix_transposed(b, v.at(8 * n + lane % 16, col + lane / 16 * 8));
        T::multiply(o[col / 8], a, {b[0], b[1]});
        T::multiply(o[col / 8 + 1], a, {b[2], b[3]});
      }
    }
  }
};

template <int kKeys>
struct Products<Float32, kKeys> {
  using Rows = SharedRows<float>;

  // Four neighbouring columns, of one row and of the other.
  static MMKERN_FN int half(int n, int) { return n % 2; }
  static MMKERN_FN int column(int n, int e) { return n / 2 * kStep + this_lane() % 4 * 4 + e; }

  template <bool kWhole>
  static MMKERN_FN void scores(float (&s)[kKeys / 8][4], const Rows& q, const Rows& k, int keys) {
    const int row = this_lane() / 4, first = this_lane() % 4 * 2;
#pragma unroll 1
    for (int col = 0; col < q.width; col += 4) {
      float qs[2][4];
      load_four(qs[0], q.at(row, col));
      load_four(qs[1], q.at(row + 8, col));
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        if (!kWhole && 8 * n >= keys) break;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float ks[4];
          load_four(ks, k.at(8 * n + first + e % 2, col));
#pragma unroll
          for (int d = 0; d < 4; ++d) s[n][e] = fma(qs[e / 2][d], ks[d], s[n][e]);
        }
      }
    }
  }

  template <bool kWhole, int kValue>
  static MMKERN_FN void add_values(float (&o)[kValue / 8][4], float (&p)[kKeys / 8][4], const Rows& v, int keys) {
    const int first = this_lane() % 4 * 4;
    for_each_four(p, [&](int n, const float (&four)[4]) {
      if (!kWhole && 8 * n >= keys) return;
#pragma unroll
      for (int key = 0; key < 8; ++key) {
        // The weight of a key is with one of the four lanes that share the row.
        const float weights[2] = {__shfl_sync(kAllLanes, four[key % 2], key / 2, 4),
                                  __shfl_sync(kAllLanes, four[2 + key % 2], key / 2, 4)};
#pragma unroll
        for (int col = 0; col < kValue; col += kStep) {
          if (!kWhole && col >= v.width) break;
          float vs[4];
          load_four(vs, v.at(8 * n + key, col + first));
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            o[col / 8][e] = fma(weights[0], vs[e], o[col / 8][e]);
            o[col / 8 + 1][e] = fma(weights[1], vs[e], o[col / 8 + 1][e]);
          }
        }
      }
    });
  }
};

}  // namespace device
}  // namespace mmkern
