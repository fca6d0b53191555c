// Attention of a few queries: every key is read once, from where it lies, so that memory sets the pace.
//
// Keys are cut into pieces of a fixed length; what each leaves is merged in their order.
#pragma once

#include "attention_forward.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

constexpr int64_t kPieceKeys = 1024;

inline thread_local ThreadBuffer few_queries, few_scores;

// Keys this far ahead are asked for: a vector's worth of them is read in turns, and the machine follows one stream.
constexpr int64_t kKeysAhead = 16;

template <class S>
MMKERN_FN void prefetch_rows(const S* row, int64_t stride, int64_t rows, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(row + j * stride + d);
}

// Scalar: for (j < n) for (d < width) sums[d] += weights[j] * v[j][d]
template <class T, class S>
void add_values(const T* weights, const S* v, int64_t stride, int64_t n, int64_t width, T* sums) {
  for_each_run<T, 8>(width, [&](auto run, auto count) __attribute__((always_inline)) {
    constexpr int kVecs = decltype(count)::value;
    Vec<T> acc[kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) acc[i] = run.load(sums, i);
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> weight(weights[j]);
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) acc[i] = fma(weight, run.load(v + j * stride, i), acc[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) run.store(sums, i, acc[i]);
  });
}

// What a piece of the keys leaves of `rows` rows of a unit: the softmax so far, and Σ weight·v.
template <class T>
void decode_piece(const Problem<T>& p, int64_t unit, int64_t first, int64_t rows, KeyRange piece, Softmax<T>* softmax,
                  T* sums) {
  constexpr int64_t kKeys = 512;  // 128 are 3 % slower
  const int64_t batch = unit / p.groups, group = unit % p.groups;
  const RowBlock<T> block(p, unit, first, rows);
  const KeyRange unmasked = p.unmasked(batch);
  const bool holes = p.has_holes(batch, unmasked);
  T* const queries = few_queries.reserve<T>(rows * p.width);
  T* const scores = few_scores.reserve<T>(rows * kKeys);
  for (int64_t r = 0; r < rows; ++r) {
    p.query(block.rows[r]).read(p.width, queries + r * p.width);
    softmax[r] = {};
    for (int64_t d = 0; d < p.value_width; ++d) sums[r * p.value_width + d] = 0;
  }
  piece = piece.within(unmasked).within(block.keys);
  const Stored<T> k = p.at(p.k, batch, group, 0), v = p.at(p.v, batch, group, 0);
  for (int64_t j0 = piece.first; j0 < piece.last; j0 += kKeys) {
    const int64_t n = smaller(kKeys, piece.last - j0);
    k.with([&](const auto* data) {
      using S = std::remove_pointer_t<decltype(data)>;
      constexpr int W = Vec<T>::size;
      const int64_t stride = p.k.strides[2];
      const S* const from = data + j0 * stride;
      int64_t j = 0;
      for (; j + W <= n; j += W) {
        prefetch_rows(from + (j + kKeysAhead) * stride, stride, W, p.width);
        for (int64_t r = 0; r < rows; ++r)
          dot_keys(queries + r * p.width, from + j * stride, stride, p.width, scores + r * kKeys + j);
      }
      for (int64_t r = 0; j < n && r < rows; ++r)
        dot_last_keys(queries + r * p.width, from + j * stride, stride, n - j, p.width, scores + r * kKeys + j);
    });
    for (int64_t r = 0; r < rows; ++r) {
      T* const s = scores + r * kKeys;
      const KeyRange band = block.bands[r].within(unmasked);
      transform_scores(p, block.rows[r], band, holes, j0, n, s);
      const T factor = softmax[r].weigh(s, n);
      if (factor != 1) multiply(sums + r * p.value_width, p.value_width, factor);
      if (p.drops()) for_each_kept(p, block.rows[r], j0, n, [&](int64_t j, T kept) { s[j] *= kept; });
    }
    v.with([&](const auto* data) {
      const int64_t stride = p.v.strides[2];
      for (int64_t r = 0; r < rows; ++r)
        add_values(scores + r * kKeys, data + j0 * stride, stride, n, p.value_width, sums + r * p.value_width);
    });
  }
}

template <class T>
int64_t pieces_of(const Problem<T>& p) {
  return p.keys ? blocks_of(p.keys, kPieceKeys) : 1;
}

// A piece of the keys of a source; `number` counts those of all sources.
template <class T>
struct Piece {
  int source = 0;
  KeyRange keys;

  Piece(const Sources<T>& sources, int64_t number) {
    for (; number >= pieces_of(sources[source]); ++source) number -= pieces_of(sources[source]);
    keys = {number * kPieceKeys, smaller((number + 1) * kPieceKeys, sources[source].keys)};
  }
};

// lse may be null.
template <class T>
void decode(const Sources<T>& sources, const View& out, T* lse, int threads) {
  const Problem<T>& p = sources.first();
  const int64_t rows = sources.rows(), D = p.value_width;
  int64_t count = 0;
  for (int i = 0; i < sources.count(); ++i) count += pieces_of(sources[i]);
  const Scratch<Softmax<T>> softmax(sources.units() * count * rows);
  const Scratch<T> all_sums(sources.units() * count * rows * D + 1);
  if (!is_parallel(sources.work(), threads)) threads = 1;
  parallel_blocks(sources.units() * count, threads, [&](int64_t task) {
    const Piece<T> piece(sources, task % count);
    const auto place = sources.place(piece.source, task / count);
    decode_piece(sources[piece.source], place.unit, place.row, rows, piece.keys, softmax.data + task * rows,
                 all_sums.data + task * rows * D);
  });
  for (int64_t unit = 0; unit < sources.units(); ++unit)
    for (int64_t r = 0; r < rows; ++r) {
      const auto place = sources.place(0, unit);
      const Row row = p.row(place.unit, place.row + r);
      const auto sums_of = [&](int64_t i) { return all_sums.data + ((unit * count + i) * rows + r) * D; };
      T* const total = sums_of(0);  // takes the others
      Softmax<T> all;
      int64_t i = 0;
      for (int source = 0; source < sources.count(); ++source) {
        const bool begins = source == 0 || !sources.joint;
        const T gate = sources.gate(source, row);
        T* const sums = begins ? sums_of(i) : total;
        if (begins) all = {};
        const int64_t end = i + pieces_of(sources[source]);
        for (bool is_first = begins; i < end; ++i, is_first = false) {
          const T* const piece = sums_of(i);
          const auto [kept, added] = all.merge(softmax.data[(unit * count + i) * rows + r]);
          const T by = sources.joint ? added * gate : added;
          for_each_vec<T>(D, [&, k = kept](auto j) {
            const Vec<T> weighed = Vec<T>(by) * j.load(piece);
            j.store(sums, is_first ? weighed : fma(Vec<T>(k), j.load(sums), weighed));
          });
        }
        if (sources.joint) continue;
        multiply(sums, D, gate * all.inverse());
        if (source > 0) for_each_vec<T>(D, [&](auto j) { j.store(total, j.load(total) + j.load(sums)); });
      }
      if (sources.joint) multiply(total, D, all.inverse());
      p.at(out, row.batch, row.head, row.query).write(D, total);
      if (lse) logs_of_sums(&all, 1, lse + p.index(row));
    }
}

template <class T>
void forward(const Sources<T>& sources, const View& out, T* lse, int threads) {
  const auto path = sources.rows() <= kFewRows ? decode<T> : forward_blocks<T>;
  path(sources, out, lse, threads);
}

// Tensors: the problem's, out, lse.
template <class T>
void forward(const Call& call) {
  constexpr int kOut = Problem<T>::kInputs;
  forward(Sources<T>(call), call[kOut], static_cast<T*>(call[kOut + 1].data), call.threads);
}

// Tensors: those of Sources::of_several, out.
template <class T>
void forward_sources(const Call& call) {
  forward<T>(Sources<T>::of_several(call), call[Sources<T>::kInputs], nullptr, call.threads);
}

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
