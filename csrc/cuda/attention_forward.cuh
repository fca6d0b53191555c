// Attention of queries to keys, forward: softmax(transformed q k^T) v, scores never in memory.
//
// A block takes up to 64 queries, a warp 16 of them: rows of one head, or of all the heads that share keys, one head
// after the other, so that a few queries of grouped heads still fill a warp. It walks over its keys by tiles in shared
// memory; K of the next tile comes while the weights are multiplied with V, and V while they are made from K. A lane
// keeps the running maximum, the sum and its part of the result of two rows (Dao 2023, algorithm 1).
//
// Where queries are few the keys are split over blocks, each of which writes a result of its own in float32, and
// merge_attention weighs these by their sums, in order. How many splits there are depends on sizes alone.
#pragma once

#include "attention_scores.cuh"

namespace mmkern {
inline namespace device {

constexpr int kAttentionThreads = 128;  // at most

// Which keys for which queries a block takes: batch, group, split and tile of rows, the last one fastest.
struct AttentionPlace {
  int batch, group, split, first_row, first_key, last_key;

  static MMKERN_FN AttentionPlace of(const AttentionArgs& a) {
    const int tile = int(blockDim.x) / kWarp * kWarpRows;
    const unsigned tiles = unsigned(up_to(tile, a.heads / a.groups * a.queries) / tile);
    unsigned rest = blockIdx.x;
    AttentionPlace at;
    at.first_row = int(rest % tiles) * tile;
    rest /= tiles;
    at.split = int(rest % unsigned(a.splits));
    rest /= unsigned(a.splits);
    at.group = int(rest % unsigned(a.groups));
    at.batch = int(rest / unsigned(a.groups));
    at.first_key = at.split * a.split_keys;
    at.last_key = at.split == a.splits - 1 ? a.keys : at.first_key + a.split_keys;
    return at;
  }

  // Leaves out the tiles of keys that no row of the block sees for its place: of one head, whose first row sees the
  // first key of all and its last row the last.
  MMKERN_FN void narrow_to_band(const AttentionArgs& a, int tile_keys) {
    const int rows = int(blockDim.x) / kWarp * kWarpRows, all = a.heads / a.groups * a.queries;
    const int last_row = (first_row + rows < all ? first_row + rows : all) - 1;
    if ((a.left < 0 && a.right < 0) || first_row / a.queries != last_row / a.queries) return;
    const int first = Query::at(a, batch, group, first_row, first_key, last_key).first;
    last_key = Query::at(a, batch, group, last_row, first_key, last_key).end;
    first_key += (first - first_key) / tile_keys * tile_keys;
  }

  template <class Number>
  MMKERN_FN const Number* head(const Heads& x, int number) const {
    return static_cast<const Number*>(x.data) + batch * x.batch_stride + number * x.head_stride;
  }
};

MMKERN_FN float sum_over_row(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
MMKERN_FN float max_over_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// The softmax of two rows as it stands after the tiles seen: `sum` of this lane's exp(score - base()).
struct RunningSoftmax {
  float top[2] = {-infinity(), -infinity()};
  float sum[2] = {0, 0};

  // Infinite where no key was seen, or where a score is +inf: no base, as in logsumexp.
  static MMKERN_FN float base(float top) { return is_finite(top) ? top : 0; }

  // Scores become weights. What was summed before is to be multiplied by `factor`.
  template <class T, int N>
  MMKERN_FN void weigh(float (&s)[N][4], float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = top[half];
#pragma unroll
      for (int n = 0; n < N; ++n) high = fmaxf(high, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      high = max_over_row(high);
      factor[half] = is_finite(top[half]) && is_finite(high) ? T::exponential(top[half] - high) : 1;
      top[half] = high;
      sum[half] *= factor[half];
    }
    for_each_score(s, 0, [&](int half, int, float& x) {
      x = T::exponential(x - base(top[half]));
      sum[half] += x;
    });
  }
};

MMKERN_FN void store_pair(void* base, i64 i, float first, float second, Dtype dtype) {
  if (dtype == kFloat32) {
    *reinterpret_cast<float2*>(static_cast<float*>(base) + i) = float2{first, second};
  } else {
    *reinterpret_cast<unsigned*>(static_cast<unsigned short*>(base) + i) = narrow(first, second, dtype);
  }
}

// kValue: the channels of V, or more.
template <class T, int kValue>
__global__ void __launch_bounds__(kAttentionThreads) attention(const AttentionArgs a) {
  using Number = typename T::Number;
  constexpr int kTileKeys = kValue > 128 ? T::keys / 2 : T::keys;  // registers
  constexpr int kScores = kTileKeys / 8, kSums = kValue / 8;
  using Product = Products<T, kTileKeys>;
  MMKERN_DYNAMIC_SHARED(Number, shared);
  __shared__ AttentionPlace at;  // not in registers, of which float32 has none to spare
  if (threadIdx.x == 0) {
    at = AttentionPlace::of(a);
    at.narrow_to_band(a, kTileKeys);
  }
  __syncthreads();
  const int warp = int(threadIdx.x) / kWarp, rows = int(blockDim.x) / kWarp * kWarpRows;
  const int row_count = a.heads / a.groups * a.queries - at.first_row;

  const SharedRows<Number> q_tile{shared, up_to(kStep, a.width)};
  const SharedRows<Number> k_tile{q_tile.at(rows, 0), q_tile.width};
  const SharedRows<Number> v_tile{k_tile.at(kTileKeys, 0), up_to(kStep, a.value_width)};
  const auto bring_keys = [&](const SharedRows<Number>& to, const Heads& from, int width, int vectors, int first) {
    const int count = at.last_key - first;
    const Number* head = at.head<Number>(from, at.group) + first * from.row_stride;
    const int filled = count < kTileKeys ? up_to(kStep, count) : kTileKeys;
    bring(to, filled, count, width, vectors != 0, [&](int row) { return head + row * from.row_stride; });
    ptx::cp_async_commit();
  };

  bring(q_tile, rows, row_count, a.width, a.q_vectors != 0, [&](int row) {
    const int head = at.group * (a.heads / a.groups) + (at.first_row + row) / a.queries;
    return at.head<Number>(a.q, head) + (at.first_row + row) % a.queries * a.q.row_stride;
  });
  ptx::cp_async_commit();
  if (at.first_key < at.last_key) bring_keys(k_tile, a.k, a.width, a.k_vectors, at.first_key);

  Query queries[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    queries[half] = Query::at(a, at.batch, at.group, at.first_row + warp * kWarpRows + 8 * half + this_lane() / 4,
                              at.first_key, at.last_key);
  RunningSoftmax softmax;
  float sums[kSums][4] = {};
  for (int key = at.first_key; key < at.last_key; key += kTileKeys) {
    const int count = at.last_key - key;
    const bool whole = count >= kTileKeys && v_tile.width == kValue;
    ptx::cp_async_wait<0>();
    __syncthreads();  // K is there, and nobody reads the V before any more
    bring_keys(v_tile, a.v, a.value_width, a.v_vectors, key);
    float s[kScores][4] = {};
    if (whole) {
      Product::template scores<true>(s, q_tile.from(warp * kWarpRows), k_tile, count);
    } else {
      Product::template scores<false>(s, q_tile.from(warp * kWarpRows), k_tile, count);
    }
    const ScoreTransform<T, kScores> transform{a, queries, at.batch, key};
    transform(s);
    float factor[2];
    softmax.weigh<T>(s, factor);
    if (a.seed) transform.drop(s);
#pragma unroll
    for (int n = 0; n < kSums; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[n][e] *= factor[Product::half(n, e)];
    ptx::cp_async_wait<0>();
    __syncthreads();  // V is there, and nobody reads K any more
    if (count > kTileKeys) bring_keys(k_tile, a.k, a.width, a.k_vectors, key + kTileKeys);
    if (whole) {
      Product::template add_values<true, kValue>(sums, s, v_tile, count);
    } else {
      Product::template add_values<false, kValue>(sums, s, v_tile, count);
    }
  }
  ptx::cp_async_wait<0>();  // for the queries, where there is no key

  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_over_row(softmax.sum[half]);
    inverse[half] = sum == 0 ? 0 : 1 / (sum * (a.seed ? 1 - a.dropout_p : 1));
    const i64 row = queries[half].row;
    if (row >= 0 && this_lane() % 4 == 0)
      a.lse[at.split * a.all_rows + row] = sum == 0 ? -infinity() : RunningSoftmax::base(softmax.top[half]) + logf(sum);
  }
  const Dtype dtype = a.splits > 1 ? kFloat32 : T::dtype;
  const bool pairs = a.value_width % 2 == 0;
  i64 begins[2];  // of the rows in `out`
#pragma unroll
  for (int half = 0; half < 2; ++half)
    begins[half] = at.split * a.all_rows * a.value_width +
                   row_of(a.out_strides, at.batch, queries[half].head, queries[half].query);
#pragma unroll
  for (int n = 0; n < kSums; ++n)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int half = Product::half(n, e), col = Product::column(n, e);
      if (queries[half].row < 0 || col >= a.value_width) continue;
      const i64 to = begins[half] + col;
      const float first = sums[n][e] * inverse[half], second = sums[n][e + 1] * inverse[half];
      if (pairs) {
        store_pair(a.out, to, first, second, dtype);
      } else {
        store_one(a.out, to, first, dtype);
        if (col + 1 < a.value_width) store_one(a.out, to + 1, second, dtype);
      }
    }
}

// Laid out alike in mmkern/backends/cuda_attention.py.
struct MergeArgs {
  const float* partials;      // [splits, rows, width]
  const float* partial_lses;  // [splits, rows]
  void* out;                  // [B, heads, queries, width]
  i64 out_strides[3];         // of batch, head and query
  float* lse;                 // [rows]
  i64 rows;
  int heads, queries, splits, width;
  Dtype dtype;
};

// The result over all keys from those over a part of them each. One block a row.
__global__ void __launch_bounds__(kAttentionThreads) merge_attention(const MergeArgs a) {
  const i64 row = blockIdx.x;
  const auto lse = [&](int split) { return a.partial_lses[split * a.rows + row]; };
  float top = -infinity(), sum = 0;
  for (int split = 0; split < a.splits; ++split) top = fmaxf(top, lse(split));
  const float base = RunningSoftmax::base(top);
  for (int split = 0; split < a.splits; ++split) sum += expf(lse(split) - base);
  const float inverse = sum == 0 ? 0 : 1 / sum;
  const i64 head = row / a.queries;
  const i64 to = row_of(a.out_strides, int(head / a.heads), int(head % a.heads), int(row % a.queries));
  for (int col = int(threadIdx.x); col < a.width; col += int(blockDim.x)) {
    float merged = 0;
    for (int split = 0; split < a.splits; ++split)
      merged = fma(expf(lse(split) - base), a.partials[(split * a.rows + row) * a.width + col], merged);
    store_one(a.out, to + col, merged * inverse, a.dtype);
  }
  if (threadIdx.x == 0) a.lse[row] = sum == 0 ? -infinity() : base + logf(sum);
}

}  // namespace device
}  // namespace mmkern
