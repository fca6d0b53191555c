// The edits between two sequences of tokens: edit_distance of mmkern/reference/edit_distance.py.
//
// Neighbouring distances differ by at most one, so a column of the table is two bits a row, and 64 rows a word (Myers
// 1999, Hyyro 2003). The way back through the table is found in the columns; of a long one each stretch is made again
// from its first column, so that room grows with rows times the root of columns.
#pragma once

#include "score_tiles.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace edits {

using Word = uint64_t;
constexpr int kWord = 64;

// 64 rows of a column: from row to row the distance grows, or falls.
struct Steps {
  Word up, down;
};

struct Tokens {
  const int64_t* data;
  int64_t n;

  int64_t last() const { return data[n - 1]; }
};

struct Counts {
  int64_t substitutions, insertions, deletions;
};

// For each token the rows of a that have it: 64 in a word. Tokens are found by a hash; where they are too many for a
// table, rows are compared with each as it comes.
class Matches {
 public:
  explicit Matches(int64_t most)
      : rows_(up_to(kWord, most)), slots_(slots_for(most)), keys_(slots_for(most)), table_(kTableWords) {}

  void fill(Tokens a, int64_t words) {
    words_ = words;
    mask_ = slots_for(a.n) - 1;
    for (int64_t i = 0; i <= mask_; ++i) slots_.data[i] = 0;
    const int64_t most = smaller(a.n + 1, kTableWords / (words ? words : 1));
    for (int64_t i = 0; i < most * words; ++i) table_.data[i] = 0;
    distinct_ = 1;  // the first row is that of tokens that a does not have
    for (int64_t i = 0; i < a.n; ++i) {
      const int64_t slot = find(a.data[i]);
      int32_t& found = slots_.data[slot];  // no branch on whether it is there: nothing foretells that
      const bool is_new = found == 0;
      if (distinct_ == most && is_new) return keep_rows(a);
      found = is_new ? int32_t(distinct_) : found;
      distinct_ += is_new;
      keys_.data[slot] = a.data[i];
      row(found)[i / kWord] |= Word(1) << (i % kWord);
    }
  }

  // f(w) gives the rows 64 w to 64 w + 63 that have the token.
  template <class F>
  MMKERN_FN void with(int64_t token, F f) const {
    if (is_table()) {
      const Word* const found = row(slots_.data[find(token)]);
      f([=](int64_t w) { return found[w]; });
    } else {
      const Vec<int64_t> same(token);
      f([=](int64_t w) { return compared(w, same); });
    }
  }

 private:
  static constexpr int64_t kTableWords = 1 << 15;  // 256 KB
  static constexpr int64_t kTooMany = -1;

  static int64_t slots_for(int64_t tokens) {
    int64_t slots = 16;
    while (slots < 2 * tokens) slots *= 2;
    return slots;
  }
  bool is_table() const { return distinct_ != kTooMany; }
  Word* row(int64_t which) const { return table_.data + which * words_; }
  void keep_rows(Tokens a) {
    distinct_ = kTooMany;
    for (int64_t i = 0; i < words_ * kWord; ++i) rows_.data[i] = i < a.n ? a.data[i] : 0;
  }
  // Where a token is, or would be.
  MMKERN_FN int64_t find(int64_t token) const {
    int64_t slot = int64_t(uint64_t(token) * 0x9e3779b97f4a7c15u >> 32) & mask_;
    while ((slots_.data[slot] != 0) & (keys_.data[slot] != token)) slot = (slot + 1) & mask_;
    return slot;
  }
  // Scalar: for (i < 64) bits |= Word(rows[64 w + i] == token) << i;
  MMKERN_FN Word compared(int64_t w, Vec<int64_t> token) const {
    Word bits = 0;
    for (int i = 0; i < kWord; i += Vec<int64_t>::size)
      bits |= bits_of(Vec<int64_t>::load(rows_.data + w * kWord + i) == token) << i;
    return bits;
  }

  int64_t words_ = 0, mask_ = 0, distinct_ = 0;
  const Scratch<int64_t> rows_;
  const Scratch<int32_t> slots_;  // the row of the table, or 0
  const Scratch<int64_t> keys_;
  const Scratch<Word> table_;
};

// One thread's room for sequences of up to n and m tokens.
class Aligner {
 public:
  Aligner(int64_t n, int64_t m)
      : most_words_(blocks_of(n, int64_t(kWord))),
        stretch_(stretch_of(m)),
        matches_(n),
        starts_(most_words_ * (blocks_of(m, stretch_) + 1)),
        columns_(most_words_ * (stretch_ + 1)) {}

  Counts align(Tokens a, Tokens b) {
    for (; a.n && b.n && a.data[0] == b.data[0]; --a.n, --b.n) ++a.data, ++b.data;
    for (; a.n && b.n && a.last() == b.last(); --a.n) --b.n;
    a_ = a, b_ = b;
    words_ = blocks_of(a.n, int64_t(kWord));
    matches_.fill(a, words_);
    return trace();
  }

 private:
  // Of columns that are kept at a time: the root of them, but all where they are few.
  static int64_t stretch_of(int64_t m) {
    int64_t stretch = 512;
    while (stretch * stretch < m) stretch *= 2;
    return stretch;
  }
  Steps* start(int64_t stretch) const { return starts_.data + stretch * words_; }
  Steps* column(int64_t of_stretch) const { return columns_.data + of_stretch * words_; }

  // A column from the one before it.
  template <class F>
  static MMKERN_FN void advance(const Steps* from, Steps* to, int64_t words, F matches) {
    Word up_before = 1, down_before = 0;  // from the column before to this one, in the row above the word
#pragma GCC unroll 4
    for (int64_t w = 0; w < words; ++w) {
      const Word up = from[w].up, down = from[w].down;
      const Word equal = matches(w) | down_before;
      const Word same = (((equal & up) + up) ^ up) | equal | down;  // as the neighbour above in the column before
      const Word right_up = down | ~(same | up), right_down = same & up;
      const Word shifted_up = right_up << 1 | up_before, shifted_down = right_down << 1 | down_before;
      up_before = right_up >> (kWord - 1);
      down_before = right_down >> (kWord - 1);
      to[w].up = shifted_down | ~(same | shifted_up);
      to[w].down = shifted_up & same;
    }
  }

  // Backwards from the ends: a deletion where it is one of the best, else an insertion where the way up is, else both.
  Counts trace() const {
    for (int64_t w = 0; w < words_; ++w) start(0)[w] = {~Word(0), 0};
    const int64_t last = b_.n ? (b_.n - 1) / stretch_ : 0;
    for (int64_t s = 0; s < last; ++s) {
      fill(s, stretch_);
      for (int64_t w = 0; w < words_; ++w) start(s + 1)[w] = column(stretch_)[w];
    }
    Counts counts{0, 0, 0};
    int64_t i = a_.n, j = b_.n;
    for (int64_t s = last; s >= 0 && i > 0; --s) {
      const int64_t before = s * stretch_;
      fill(s, j - before);
      while (i > 0 && j > before) {
        if (is_set(column(j - before)[(i - 1) / kWord].up, i)) {
          ++counts.deletions, --i;
          continue;
        }
        --j;
        if (is_set(column(j - before)[(i - 1) / kWord].down, i)) {
          ++counts.insertions;
        } else {
          --i;
          counts.substitutions += a_.data[i] != b_.data[j];
        }
      }
    }
    counts.deletions += i;
    counts.insertions += j;
    return counts;
  }
  static bool is_set(Word bits, int64_t row) { return bits >> ((row - 1) % kWord) & 1; }

  // The first columns of a stretch.
  void fill(int64_t stretch, int64_t n) const {
    const int64_t* const tokens = b_.data + stretch * stretch_;
    for (int64_t w = 0; w < words_; ++w) column(0)[w] = start(stretch)[w];
    if (words_ > kFewWords || words_ == 0) {
      for (int64_t k = 0; k < n; ++k)
        matches_.with(tokens[k], [&](auto matches) { advance(column(k), column(k + 1), words_, matches); });
    } else {
      with_count<kFewWords>(int(words_), [&](auto count) { fill_few(count, tokens, n); });
    }
  }
  // Each waits for the one before it: in registers.
  template <int kWords>
  void fill_few(Count<kWords>, const int64_t* tokens, int64_t n) const {
    Steps now[kWords];
    for (int w = 0; w < kWords; ++w) now[w] = column(0)[w];
    for (int64_t k = 0; k < n; ++k) {
      matches_.with(tokens[k],
                    [&](auto matches) __attribute__((always_inline)) { advance(now, now, kWords, matches); });
#pragma GCC unroll 4
      for (int w = 0; w < kWords; ++w) column(k + 1)[w].up = now[w].up, column(k + 1)[w].down = now[w].down;
    }
  }

  static constexpr int kFewWords = 4;
  const int64_t most_words_, stretch_;
  int64_t words_ = 0;
  Tokens a_{}, b_{};
  Matches matches_;
  const Scratch<Steps> starts_, columns_;
};

inline Tokens tokens_of(const Rows<const int64_t>& rows, const RowScalars<const int64_t>& lengths, int64_t row) {
  const int64_t n = lengths.get(row, rows.cols);
  return {rows[row], n < 0 ? 0 : smaller(n, rows.cols)};
}

// Tensors: a, b, their lengths, counts.
inline void run(const Call& call) {
  const Rows<const int64_t> a = rows<const int64_t>(call[0]), b = rows<const int64_t>(call[1]);
  const RowScalars<const int64_t> a_lengths = row_scalars<const int64_t>(call[2]);
  const RowScalars<const int64_t> b_lengths = row_scalars<const int64_t>(call[3]);
  const Rows<int64_t> counts = rows<int64_t>(call[4]);
  parallel_rows(a.rows, b.cols * (8 + a.cols / 4), call.threads, [&](int64_t first, int64_t last) {
    Aligner aligner(a.cols, b.cols);
    for (int64_t row = first; row < last; ++row) {
      const Counts found = aligner.align(tokens_of(a, a_lengths, row), tokens_of(b, b_lengths, row));
      int64_t* const to = counts[row];
      to[0] = found.substitutions, to[1] = found.insertions, to[2] = found.deletions;
    }
  });
}

}  // namespace edits
}  // namespace MMKERN_ISA
}  // namespace mmkern
