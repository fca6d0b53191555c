// What the queries of one call attend to: the keys and values of one source, or of several, each weighed by its gate.
//
// A unit of work is a group of heads that share one head of k and v in every source; a source may have fewer of those.
#pragma once

#include <new>

#include "attention.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace attention {

constexpr int kMaxSources = 4;

// Room for each source's own; what is made there needs no destructor.
template <class Item>
class OfEach {
 public:
  template <class... Args>
  Item& make(int i, Args&&... args) {
    return *new (room_ + i * sizeof(Item)) Item(static_cast<Args&&>(args)...);
  }
  Item& operator[](int i) { return reinterpret_cast<Item*>(room_)[i]; }
  const Item& operator[](int i) const { return reinterpret_cast<const Item*>(room_)[i]; }

 private:
  alignas(Item) unsigned char room_[kMaxSources * sizeof(Item)];
};

template <class T>
class Sources {
 public:
  static constexpr int kEach = 5, kSeed = 1 + kMaxSources * kEach, kInputs = kSeed + 1;

  const bool joint;  // one softmax runs over the keys of all; else each has its own, and the results are added up

  // The one of a call of cross_attention.
  explicit Sources(const Call& call) : joint(true) { add(call, View()); }

  // Tensors: q, then k, v, gate, key_mask and bias of each source, None in the places of those that are not there,
  // then seed. Scalars: scale, softcap, joint, dropout_p.
  static Sources of_several(const Call& call) {
    Sources sources(call.scalars[2] != 0);
    int64_t counters = 0;  // of the sources before
    for (int at = 1; at < kSeed && is_there(call, at); at += kEach) {
      Call one;
      one.tensors[0] = call[0];
      one.tensors[1] = call[at];
      one.tensors[2] = call[at + 1];
      one.tensors[3] = call[at + 3];
      one.tensors[6] = call[at + 4];
      one.tensors[8] = call[kSeed];
      const double scalars[] = {call.scalars[0], call.scalars[1], -1, -1, 0, call.scalars[3]};
      for (int i = 0; i < 6; ++i) one.scalars[i] = scalars[i];
      Problem<T>& p = sources.add(one, call[at + 2]);
      p.first_counter += counters;
      counters += p.batches * p.heads * p.queries * ((p.keys + 3) / 4);
    }
    sources.score_alike();
    return sources;
  }

  int count() const { return count_; }
  const Problem<T>& operator[](int i) const { return problems_[i]; }
  const Problem<T>& first() const { return problems_[0]; }

  int64_t rows() const { return first().heads / groups_ * first().queries; }  // of a unit
  int64_t units() const { return first().batches * groups_; }
  int64_t work() const {
    int64_t all = 0;
    for (int i = 0; i < count(); ++i) {
      const Problem<T>& p = (*this)[i];
      all += units() * rows() * p.keys * (p.width + p.value_width) / Vec<T>::size;
    }
    return all;
  }

  // The unit of source i that holds `unit`, and the first of its rows there.
  struct Place {
    int64_t unit, row;
  };
  Place place(int i, int64_t unit) const {
    const int64_t groups = (*this)[i].groups, each = groups_ / groups, group = unit % groups_;
    return {unit / groups_ * groups + group / each, group % each * rows()};
  }

  T gate(int i, const Row& row) const {
    const Broadcast& of = gates_[i];
    T gate = 1;
    if (of)
      (Stored<T>(of.view) + of.row(row.batch, row.head, row.query)).with([&](const auto* x) {
        gate = T(element(x, 0));
      });
    return gate;
  }

 private:
  static bool is_there(const Call& call, int at) {
    return call[at].dtype != Dtype::none && call[at + 1].dtype != Dtype::none;
  }

  explicit Sources(bool is_joint) : joint(is_joint) {}

  // The queries are the same for all: pairs, or numbers.
  void score_alike() {
    bool pair = true;
    for (int i = 0; i < count_; ++i) pair = pair && problems_[i].scored.are_pairs;
    for (int i = 0; i < count_; ++i) problems_[i].scored = Factors(problems_[i].q, problems_[i].k, pair);
  }

  Problem<T>& add(const Call& one, const View& gate) {
    gates_.make(count_, gate);
    Problem<T>& problem = problems_.make(count_++, one, 0);
    int64_t groups = groups_;
    while (groups % problem.groups) groups += groups_;
    groups_ = groups;
    return problem;
  }

  OfEach<Problem<T>> problems_;
  OfEach<Broadcast> gates_;
  int count_ = 0;
  int64_t groups_ = 1;
};

}  // namespace attention
}  // namespace MMKERN_ISA
}  // namespace mmkern
