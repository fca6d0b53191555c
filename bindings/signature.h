// A kernel's parameters, as its table entry states them, and the check of a call against them.
//
//   "x: *D, y: *D, positive curvature, out: *"
//
// A tensor parameter is `name: axes`: `*` stands for any leading axes, equal wherever it occurs, and a letter for one
// axis. All tensors share the dtype of the first, but one marked `acc` has the accumulation dtype (float32, or float64
// beside float64), one marked `own` any that is summed in that, and one marked `bool` or `int64` has that. The axes
// before the last are walked with one stride; one marked `flat` has a single stride over all axes, and one marked
// `strided` a stride for each, the last being dense; of one marked `broadcast`, any axis may also have the size 1, and
// one called `1` has no other; of one marked `shared`, the innermost leading axes may; one marked `samples` has of the
// leading axes the first, or 1. `number name` is any, `positive name` above zero, `nonnegative name` at least zero. A
// tensor may be None if the kernel reads it as "not there"; such parameters are marked `opt`. What axes have to do with
// each other may come first: "h multiple of g, d positive; q: hd, ...".
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "tensor.h"

namespace mmkern {

struct Parameter {
  enum class Kind { tensor, number, positive, nonnegative };
  enum class Axes { rows, flat, strided, broadcast, shared, samples };
  Kind kind = Kind::tensor;
  Axes axes = Axes::rows;
  Dtype fixed_dtype = Dtype::none;
  bool accumulates = false, optional = false, any_leading = false, own_dtype = false;
  std::string name, letters;  // letters: the named axes after `*`

  bool shares_dtype() const { return kind == Kind::tensor && !accumulates && !own_dtype && fixed_dtype == Dtype::none; }
};

class Signature {
 public:
  explicit Signature(const std::string& text) {
    const size_t semicolon = text.find("; ");
    const bool related = semicolon != std::string::npos;
    if (related)
      split(text.substr(0, semicolon), [&](const std::string& part) { relations_.push_back(relation(part)); });
    split(related ? text.substr(semicolon + 2) : text,
          [&](const std::string& part) { parameters_.push_back(parse(part)); });
  }

  size_t size() const { return parameters_.size(); }

  // What `*`, the letters and the dtype stand for, once a tensor has shown it.
  struct Bound {
    const View* leading = nullptr;
    int leading_rank = 0;
    int64_t axis[128];
    bool known[128] = {};
    Dtype dtype = Dtype::none;

    Bound() {
      known[int('1')] = true;
      axis[int('1')] = 1;
    }

    void match(const Parameter& p, const View& view) {
      const int named = int(p.letters.size()), rest = view.rank - named;
      const bool fits = p.axes == Parameter::Axes::samples ? rest == 1 : rest == 0 || (rest > 0 && p.any_leading);
      if (!fits) throw BadArgument{"has " + std::to_string(view.rank) + " axes"};
      match_dtype(p, view);
      if (p.any_leading) match_leading(p, view, rest);
      for (int i = 0; i < named; ++i) {
        const int letter = p.letters[size_t(i)];
        const int64_t size = view.sizes[rest + i];
        if (p.axes == Parameter::Axes::broadcast && size == 1) continue;
        if (known[letter] && axis[letter] != size) throw BadArgument{mismatch(rest + i, size, axis[letter])};
        known[letter] = true;
        axis[letter] = size;
      }
      check_strides(p, view, named);
    }

    int64_t samples() const { return leading_rank > 0 ? leading->sizes[0] : 1; }

    Dtype dtype_of(const Parameter& p) const {
      const Dtype accumulate = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
      return p.fixed_dtype != Dtype::none ? p.fixed_dtype : p.accumulates ? accumulate : dtype;
    }

    void match_dtype(const Parameter& p, const View& view) {
      const bool fits = p.own_dtype
                            ? is_floating(view.dtype) && (view.dtype == Dtype::float64) == (dtype == Dtype::float64)
                            : view.dtype == dtype_of(p);
      if (!fits) throw BadArgument{"has another dtype than expected"};
    }

    void match_leading(const Parameter& p, const View& view, int rest) {
      if (!leading) {
        leading = &view;
        leading_rank = rest;
        return;
      }
      if (p.axes == Parameter::Axes::samples) {
        if (view.sizes[0] != 1 && view.sizes[0] != samples()) throw BadArgument{mismatch(0, view.sizes[0], samples())};
        return;
      }
      if (rest != leading_rank) throw BadArgument{"has other leading axes than expected"};
      int shared = rest;  // axes from here on
      while (p.axes == Parameter::Axes::shared && shared > 0 && view.sizes[shared - 1] == 1) --shared;
      for (int i = 0; i < shared; ++i) {
        if (p.axes == Parameter::Axes::broadcast && view.sizes[i] == 1) continue;
        if (view.sizes[i] != leading->sizes[i]) throw BadArgument{mismatch(i, view.sizes[i], leading->sizes[i])};
      }
    }

    static void check_strides(const Parameter& p, const View& view, int named) {
      if (std::count(view.sizes, view.sizes + view.rank, 0)) return;
      int last = view.rank;
      if (named > 0 && p.axes != Parameter::Axes::flat) {
        --last;
        if (view.sizes[last] > 1 && view.strides[last] != 1) throw BadArgument{"has a last axis that is not dense"};
      }
      if (p.axes >= Parameter::Axes::strided) return;
      int64_t expected = -1;
      for (int i = last - 1; i >= 0; --i) {
        if (view.sizes[i] == 1) continue;
        if (expected >= 0 && view.strides[i] != expected) throw BadArgument{"has leading axes that do not collapse"};
        expected = view.strides[i] * view.sizes[i];
      }
    }

    // The view of a new contiguous tensor, yet without data, as `p` wants it.
    View contiguous(const Parameter& p) const {
      View view;
      view.dtype = dtype_of(p);
      if (p.axes == Parameter::Axes::samples)
        view.sizes[view.rank++] = samples();
      else if (p.any_leading)
        for (int i = 0; i < leading_rank; ++i) view.sizes[view.rank++] = leading->sizes[i];
      for (const char letter : p.letters) view.sizes[view.rank++] = axis[int(letter)];
      set_dense_strides(view);
      return view;
    }

    static std::string mismatch(int at, int64_t got, int64_t wanted) {
      return "has size " + std::to_string(got) + " on axis " + std::to_string(at) + ", expected " +
             std::to_string(wanted);
    }
  };

  const Parameter& parameter(size_t i) const { return parameters_[i]; }

  // How many of the first `count` parameters are tensors.
  int tensors_among(size_t count) const {
    return int(std::count_if(parameters_.begin(), parameters_.begin() + ptrdiff_t(count),
                             [](const Parameter& p) { return p.kind == Parameter::Kind::tensor; }));
  }

  // The parameter whose dtype the others share.
  size_t lead() const {
    return size_t(
        std::find_if(parameters_.begin(), parameters_.end(), [](const Parameter& p) { return p.shares_dtype(); }) -
        parameters_.begin());
  }

  // Fills `call` from the first `count` of Python's arguments, or throws BadArgument.
  Bound read(PyObject* const* args, size_t count, Call& call) const {
    const TensorReader& reader = TensorReader::instance();
    int tensors = 0, scalars = 0;
    each(args, count, [&](const Parameter& p, PyObject* object) {
      if (p.kind == Parameter::Kind::tensor) {
        View& view = call.tensors[tensors++];
        if (object != Py_None)
          reader.read(object, view);
        else if (!p.optional)
          throw BadArgument{"is None"};
        return;
      }
      const double value = number(reader, object);
      if (p.kind == Parameter::Kind::positive && !(value > 0)) throw BadArgument{"must be above 0"};
      if (p.kind == Parameter::Kind::nonnegative && !(value >= 0)) throw BadArgument{"must be at least 0"};
      call.scalars[scalars++] = value;
    });
    Bound bound;
    bound.dtype = shared_dtype(call, count);
    for (const Relation& relation : relations_) {
      if (!relation.size) continue;
      bound.known[int(relation.axis)] = true;
      bound.axis[int(relation.axis)] = relation.size;
    }
    for (const bool of_samples : {false, true}) {  // which are held against the leading axes of the others
      tensors = 0;
      each(args, count, [&](const Parameter& p, PyObject*) {
        if (p.kind != Parameter::Kind::tensor) return;
        const View& view = call.tensors[tensors++];
        if (view.dtype != Dtype::none && (p.axes == Parameter::Axes::samples) == of_samples) bound.match(p, view);
      });
    }
    for (const Relation& relation : relations_) check(relation, bound);
    return bound;
  }

 private:
  // An axis is a multiple of another or half of it, or above 0, or of one size.
  struct Relation {
    char axis, other;  // or none
    bool is_half;
    int64_t size;
  };

  // Of an axis that no tensor has, nothing is asked.
  void check(const Relation& relation, Bound& bound) const {
    const int of = relation.axis, by = relation.other ? relation.other : '1';
    if (relation.is_half && bound.known[by]) {
      if (!bound.known[of]) bound.axis[of] = bound.axis[by] / 2;
      bound.known[of] = true;
      if (2 * bound.axis[of] != bound.axis[by])
        refuse(relation.other, bound, "twice " + std::to_string(bound.axis[of]));
    }
    if (relation.is_half || !bound.known[of] || !bound.known[by]) return;
    const int64_t size = bound.axis[of], divisor = bound.axis[by];
    if (divisor && size % divisor == 0 && (relation.other || size)) return;
    refuse(relation.axis, bound, relation.other ? "a multiple of " + std::to_string(divisor) : "at least 1");
  }

  void refuse(char axis, const Bound& bound, const std::string& expected) const {
    for (const Parameter& p : parameters_) {
      const size_t at = p.letters.find(axis);
      if (at != std::string::npos)
        throw BadArgument{p.name + " has size " + std::to_string(bound.axis[int(axis)]) + " on axis " +
                          std::to_string(at) + ", expected " + expected};
    }
  }

  static Relation relation(const std::string& text) {
    const auto after = [&](const std::string& word) {
      const size_t at = text.find(word);
      return at == std::string::npos ? std::string() : text.substr(at + word.size());
    };
    const std::string multiple = after(" multiple of "), half = after(" half of "), size = after(" is ");
    return {text[0], (multiple + half + '\0')[0], !half.empty(), size.empty() ? 0 : std::stoll(size)};
  }

  template <class F>
  static void split(const std::string& text, F f) {
    for (size_t at = 0; at < text.size();) {
      const size_t comma = std::min(text.find(", ", at), text.size());
      f(text.substr(at, comma - at));
      at = comma + 2;
    }
  }

  static Parameter parse(std::string text) {
    Parameter p;
    const auto take = [&](const char* word) {
      const bool found = text.rfind(word, 0) == 0;
      if (found) text.erase(0, std::string(word).size());
      return found;
    };
    if (take("number ")) p.kind = Parameter::Kind::number;
    if (take("positive ")) p.kind = Parameter::Kind::positive;
    if (take("nonnegative ")) p.kind = Parameter::Kind::nonnegative;
    p.optional = take("opt ");
    p.accumulates = take("acc ");
    p.own_dtype = take("own ");
    if (take("bool ")) p.fixed_dtype = Dtype::boolean;
    if (take("int64 ")) p.fixed_dtype = Dtype::int64;
    if (take("flat ")) p.axes = Parameter::Axes::flat;
    if (take("strided ")) p.axes = Parameter::Axes::strided;
    if (take("broadcast ")) p.axes = Parameter::Axes::broadcast;
    if (take("shared ")) p.axes = Parameter::Axes::shared;
    if (take("samples ")) p.axes = Parameter::Axes::samples;
    const size_t colon = text.find(':');
    p.name = text.substr(0, colon);
    if (p.kind == Parameter::Kind::tensor) {
      for (const char c : text.substr(colon + 1)) {
        if (c == '*')
          p.any_leading = true;
        else if (c != ' ')
          p.letters += c;
      }
    }
    return p;
  }

  template <class F>
  void each(PyObject* const* args, size_t count, F visit) const {
    for (size_t i = 0; i < count; ++i) {
      try {
        visit(parameters_[i], args[i]);
      } catch (const BadArgument& bad) {
        throw BadArgument{parameters_[i].name + " " + bad.what};
      }
    }
  }

  Dtype shared_dtype(const Call& call, size_t count) const {
    int tensors = 0;
    for (size_t i = 0; i < count; ++i) {
      const Parameter& p = parameters_[i];
      if (p.kind != Parameter::Kind::tensor) continue;
      const View& view = call.tensors[tensors++];
      if (p.shares_dtype() && is_floating(view.dtype)) return view.dtype;
    }
    return Dtype::none;
  }

  static double number(const TensorReader& reader, PyObject* object) {
    if (PyFloat_Check(object)) return PyFloat_AS_DOUBLE(object);
    if (PyLong_Check(object)) {
      const double value = PyLong_AsDouble(object);
      if (!PyErr_Occurred()) return value;
      PyErr_Clear();
      throw BadArgument{"must be within the range of a float"};
    }
    View view;
    reader.read(object, view);
    if (view.rank != 0 || !view.data) throw BadArgument{"must be a number or a 0-d tensor"};
    if (view.dtype == Dtype::float32) return *static_cast<float*>(view.data);
    if (view.dtype == Dtype::float64) return *static_cast<double*>(view.data);
    throw BadArgument{"must be float32 or float64"};
  }

  std::vector<Parameter> parameters_;
  std::vector<Relation> relations_;
};

}  // namespace mmkern
