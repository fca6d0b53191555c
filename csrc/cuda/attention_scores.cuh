// What happens to a tile of scores between the two products: scale, soft-cap, biases, masks, dropout.
#pragma once

#include "attention_products.cuh"

#include "../philox.h"

namespace mmkern {
inline namespace device {

MMKERN_FN i64 row_of(const i64* strides, int batch, int head, int query) {
  return batch * strides[0] + head * strides[1] + query * strides[2];
}

// [batch, heads, length, channels]; channels are dense. Strides in elements.
struct Heads {
  const void* data;
  i64 batch_stride, head_stride, row_stride;
};

// [B, H, L, S], with stride 0 along axes of the size 1.
struct Broadcast {
  const void* data;  // null: none
  i64 strides[4];

  MMKERN_FN i64 row(int batch, int head, int query) const { return row_of(strides, batch, head, query); }
};

// How query i finds its place among the keys; the codes of mmkern/reference/attention.py.
enum Alignment : int { kTopLeft = 0, kBottomRight = 1, kResample = 2 };

// Laid out alike in mmkern/backends/cuda_attention.py.
struct AttentionArgs {
  Heads q, k, v;
  Broadcast attn_mask, attn_bias, bias;
  const unsigned char* key_mask;  // [B, S], or null
  const i64* prefix_lengths;      // [B], or null
  const i64* seed;                // key and first counter of the dropout; null: none
  void* out;                      // [B, H, L, Dv]; of several splits [splits, B, H, L, Dv] in float32
  i64 out_strides[3];             // of batch, head and query
  float* lse;                     // [B, H, L], or [splits, B, H, L]
  i64 all_rows;                   // B H L
  i64 left, right;                // bounds of the window; negative: none
  i64 least_kept;                 // of Philox's words, which the dropout keeps from here on
  int heads, groups, queries, keys, width, value_width;
  int splits, split_keys;  // the latter a multiple of the tile
  int alignment;
  int q_vectors, k_vectors, v_vectors;  // rows begin and end at multiples of 16 bytes
  float scale;                          // over softcap, where there is one
  float softcap;                        // 0: none
  float dropout_p;
};

MMKERN_FN bool is_finite(float x) { return fabsf(x) < infinity(); }

// One query, and the keys that it may see for its place: first <= j < end.
struct Query {
  i64 row;  // of [B, H, L]; negative: past the last query
  int head, query;
  int first, end;

  // `row` counts the queries of all heads that share keys; only keys from begin to end are of interest.
  static MMKERN_FN Query at(const AttentionArgs& a, int batch, int group, int row, int begin, int end) {
    const int ratio = a.heads / a.groups;
    if (row >= ratio * a.queries) return {-1, 0, 0, 0, 0};
    const int head = group * ratio + row / a.queries, query = row % a.queries;
    Query made{(i64(batch) * a.heads + head) * a.queries + query, head, query, begin, end};
    if (a.left >= 0 || a.right >= 0) made.bound(a, batch);
    return made;
  }

  MMKERN_FN bool sees(int key) const { return first <= key && key < end; }

 private:
  MMKERN_FN void bound(const AttentionArgs& a, int batch) {
    i64 floor = query, ceil = query;  // of the place; it is whole unless resampled
    if (a.alignment == kBottomRight) floor = ceil = i64(query) + a.keys - a.queries;
    if (a.alignment == kResample) {
      const i64 product = i64(query) * a.keys;
      floor = product / a.queries;
      ceil = floor + (product % a.queries != 0);
    }
    if (a.left >= 0 && ceil - a.left > first) first = ceil - a.left < end ? int(ceil - a.left) : end;
    if (a.right < 0) return;
    i64 bound = floor + a.right + 1;
    if (a.prefix_lengths && a.prefix_lengths[batch] > bound) bound = a.prefix_lengths[batch];
    if (bound < end) end = bound > first ? int(bound) : first;
  }
};

// visit(half, key, score) for all scores of a lane; `key` counts from `first_key`.
template <int N, class Visit>
MMKERN_FN void for_each_score(float (&s)[N][4], int first_key, Visit visit) {
  first_key += this_lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) visit(e / 2, first_key + 8 * n + e % 2, s[n][e]);
}

template <class T, int N>
struct ScoreTransform {
  const AttentionArgs& a;
  const Query (&queries)[2];
  int batch, first_key;

  // Dot products become scores; -inf where the query does not see the key.
  MMKERN_FN void operator()(float (&s)[N][4]) const {
    for_each_score(s, first_key, [&](int, int, float& x) { x *= a.scale; });
    if (a.softcap > 0 || a.attn_bias.data || a.bias.data || a.key_mask || a.attn_mask.data)
      for_each_four(s, [&](int n, float (&x)[4]) { transform(x, key_of(n)); });
    for_each_score(s, first_key, [&](int half, int key, float& x) {
      if (!queries[half].sees(key)) x = -infinity();
    });
  }

  // Word key % 4 of counter offset + row ceil(S / 4) + key / 4 decides.
  MMKERN_FN void drop(float (&p)[N][4]) const {
    const i64 seed = a.seed[0], fours = (i64(a.keys) + 3) / 4;
    for_each_four(p, [&](int n, float (&x)[4]) {
      const int key = key_of(n);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const PhiloxWords words = philox(seed, a.seed[1] + queries[half].row * fours + key / 4);
        const bool upper = key % 4 != 0;
        if ((upper ? words.word[2] : words.word[0]) < a.least_kept) x[2 * half] = 0;
        if ((upper ? words.word[3] : words.word[1]) < a.least_kept) x[2 * half + 1] = 0;
      }
    });
  }

 private:
  MMKERN_FN int key_of(int n) const { return first_key + 8 * n + this_lane() % 4 * 2; }

  MMKERN_FN void transform(float (&x)[4], int key) const {
    if (a.softcap > 0) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = a.softcap * tanh(x[e]);
    }
    add(x, key, a.attn_bias);
    add(x, key, a.bias);
    if (a.key_mask) {
      const unsigned char* seen = a.key_mask + i64(batch) * a.keys;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (queries[e / 2].sees(key + e % 2) && !seen[key + e % 2]) x[e] = -infinity();
    }
    if (a.attn_mask.data) {
      const auto* seen = static_cast<const unsigned char*>(a.attn_mask.data);
      with(a.attn_mask, key, [&](int e, i64 at) {
        if (!seen[at]) x[e] = -infinity();
      });
    }
  }

  MMKERN_FN void add(float (&x)[4], int key, const Broadcast& bias) const {
    if (bias.data) with(bias, key, [&](int e, i64 at) { x[e] += load_one(bias.data, at, T::dtype); });
  }

  // visit(e, offset) for those of four scores that are seen.
  template <class Visit>
  MMKERN_FN void with(const Broadcast& given, int key, Visit visit) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Query& q = queries[e / 2];
      if (q.sees(key + e % 2)) visit(e, given.row(batch, q.head, q.query) + (key + e % 2) * given.strides[3]);
    }
  }
};

}  // namespace device
}  // namespace mmkern
