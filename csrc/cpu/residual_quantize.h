// Codes level by level: residual_quantize of mmkern/reference/quantization.py.
//
// A block of rows goes through all levels before the next block begins. What is left of it, and the packed codes and
// weights of a level, lie in the second cache; keys do not leave the registers in which they are made.
#pragma once

#include <optional>

#include "nearest_code.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace residual {

// [levels, rows, cols], a matrix a level, packed as the columns of a product.
template <class T>
class PackedLevels {
 public:
  PackedLevels(int64_t levels, int64_t rows, int64_t cols)
      : cols_(cols), stride_(up_to(TileShape<T>::cols, rows) * cols), room_(levels * stride_) {}

  template <class Y>
  void pack(int64_t level, const Y& y) const {
    constexpr int W = Vec<T>::size, C = TileShape<T>::cols;
    for (int64_t j = 0; j < up_to(C, y.rows); j += W)
      pack_columns(y, j, room_.data + level * stride_ + j / C * C * cols_ + j % C);
  }
  const T* operator[](int64_t level) const { return room_.data + level * stride_; }

 private:
  const int64_t cols_, stride_;
  const Scratch<T> room_;
};

// A weight of every level [Q, out, in] with its bias [Q, out]; or none.
template <class T, class S>
class Projections {
 public:
  Projections(const View& weight, const View& bias)
      : is_there(bool(weight)),
        weights_(is_there ? rows<const S>(weight) : Rows<const S>{}),
        biases_(bias ? rows<const S>(bias) : Rows<const S>{}),
        out_(is_there ? weight.sizes[1] : 0),
        packed_(is_there ? weight.sizes[0] : 0, out_, weights_.cols) {}

  void pack(int64_t level) const {
    if (is_there) packed_.pack(level, weights_.part(level * out_, out_));
  }
  const T* weights(int64_t level) const { return packed_[level]; }
  int64_t in() const { return weights_.cols; }
  int64_t out() const { return out_; }
  // A product's vector with its bias.
  template <class At>
  MMKERN_FN Vec<T> biased(int64_t level, int64_t j, At at, const T* products) const {
    const Vec<T> v = at.load(products);
    return biases_.data ? v + at.load(biases_[level] + j) : v;
  }

  const bool is_there;

 private:
  const Rows<const S> weights_, biases_;
  const int64_t out_;
  const PackedLevels<T> packed_;
};

template <template <class> class MetricOf, class S>
class Quantizer {
 public:
  using T = accumulate_t<S>;
  using Metric = MetricOf<S>;

  // Tensors: x, codebooks, the weight and the bias in, those out, the reconstruction, both losses, codes.
  explicit Quantizer(const Call& call)
      : x_(rows<const S>(call[0])),
        codebooks_(rows<const S>(call[1])),
        count_(call[1].sizes[0]),
        codes_of_level_(call[1].sizes[1]),
        in_(call[2], call[3]),
        out_(call[4], call[5]),
        packed_(count_, codes_of_level_, codebooks_.cols),
        metrics_(new std::optional<Metric>[size_t(count_)]),
        reconstruction_(rows<S>(call[6])),
        losses_{static_cast<T*>(call[7].data), static_cast<T*>(call[8].data)},
        codes_(static_cast<int64_t*>(call[9].data)),
        threads_(call.threads) {}
  Quantizer(const Quantizer&) = delete;
  Quantizer& operator=(const Quantizer&) = delete;
  ~Quantizer() { delete[] metrics_; }

  void run() const {
    const int64_t codes = codes_of_level_, width = codebooks_.cols;
    parallel_rows(count_, 4 * codes * width, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        metrics_[q].emplace(codebooks_.part(q * codes, codes), 1);
        packed_.pack(q, metrics_[q]->factors());
        in_.pack(q);
        out_.pack(q);
      }
    });
    const int64_t blocks = blocks_of(x_.rows, kRows), work = kRows * width * (codes + x_.cols) / Vec<T>::size;
    const Scratch<double> squares(blocks * count_);  // of z - e
    parallel_rows(blocks, count_ * work, threads_, [&](int64_t begin, int64_t end) {
      const Block block(*this);
      for (int64_t b = begin; b < end; ++b) block.quantize(b * kRows, squares.data + b * count_);
    });
    for (int64_t q = 0; q < count_; ++q) {
      double total = 0;
      for (int64_t b = 0; b < blocks; ++b) total += squares.data[b * count_ + q];
      for (T* losses : losses_) losses[q] = T(total / double(x_.rows * width));
    }
  }

 private:
  using Shape = TileShape<T>;
  static constexpr int64_t kRows = Shape::block_rows;

  // A thread's room for a block of rows.
  class Block {
   public:
    explicit Block(const Quantizer& all)
        : all_(all),
          width_(all.x_.cols),
          narrow_(all.codebooks_.cols),
          left_(kRows * width_),
          sum_(kRows * width_),
          z_(kRows * narrow_),
          e_(kRows * narrow_),
          packed_(kRows * up_to(Shape::depth, width_ > narrow_ ? width_ : narrow_)),
          products_(kRows * Shape::block_stride) {}

    void quantize(int64_t i0, double* squares) const {
      const int64_t n = smaller(kRows, all_.x_.rows - i0);
      const Rows<const T> left = matrix(left_, n, width_), z = matrix(z_, n, narrow_), e = matrix(e_, n, narrow_);
      for (int64_t r = 0; r < n; ++r)
        for_each_vec<T>(width_, [&](auto at) {
          at.keep(left_.data + r * width_, at.load(all_.x_[i0 + r]));
          at.keep(sum_.data + r * width_, Vec<T>(T(0)));
        });
      for (int64_t q = 0; q < all_.count_; ++q) {
        if (all_.in_.is_there)
          multiply(left, all_.in_, q,
                   [&](int64_t r, int64_t j, auto at, Vec<T> v) { at.keep(z_.data + r * narrow_ + j, v); });
        squares[q] = look_up(all_.in_.is_there ? z : left, q, all_.codes_ + i0 * all_.count_ + q);
        const auto take = [&](int64_t r, int64_t j, auto at, Vec<T> v) {
          T *const rest = left_.data + r * width_ + j, *const sum = sum_.data + r * width_ + j;
          at.keep(rest, at.load(rest) - v);
          at.keep(sum, at.load(sum) + v);
        };
        if (all_.out_.is_there) {
          multiply(e, all_.out_, q, take);
        } else {
          for (int64_t r = 0; r < n; ++r) for_each_vec<T>(width_, [&](auto at) { take(r, 0, at, at.load(e[r])); });
        }
      }
      for (int64_t r = 0; r < n; ++r)
        for_each_vec<T>(width_,
                        [&](auto at) { at.store(all_.reconstruction_[i0 + r], at.load(sum_.data + r * width_)); });
    }

   private:
    static Rows<const T> matrix(const Scratch<T>& room, int64_t n, int64_t cols) { return {room.data, n, cols, cols}; }

    // put(r, j, at, v) for the vectors of x W^T + b, at columns j + at.
    template <class Put>
    void multiply(const Rows<const T>& x, const Projections<T, S>& by, int64_t q, const Put& put) const {
      const int64_t padded = up_to(Shape::row_step, x.rows), out = by.out();
      pack_rows(x, 0, padded, packed_.data);
      for (int64_t j = 0; j < out; j += Shape::block_cols) {
        const int64_t cols = smaller(Shape::block_cols, out - j);
        fill_block(packed_.data, padded, by.weights(q) + j * by.in(), cols, by.in(), products_.data);
        for (int64_t r = 0; r < x.rows; ++r) {
          const T* const row = products_.data + r * Shape::block_stride;
          for_each_vec<T>(cols, [&](auto at) { put(r, j, at, by.biased(q, j, at, row)); });
        }
      }
    }

    // Writes codes, Q apart, and e + (z - z): the codes themselves, and NaN where z is none. The sum of (z - e)^2.
    double look_up(const Rows<const T>& z, int64_t q, int64_t* codes) const {
      const Metric& metric = *all_.metrics_[q];
      const int64_t padded = up_to(Shape::row_step, z.rows);
      pack_rows(z, 0, padded, packed_.data);
      nearest::LaneLeaders<T> lanes[kRows];
      nearest::find_leaders(PackedBlock<T>{0, z.rows, padded, packed_.data, 0, metric.codes.rows, all_.packed_[q]},
                            narrow_, metric.squares.offsets.data, lanes);
      double squares = 0;
      for (int64_t r = 0; r < z.rows; ++r) {
        nearest::Leader<T> leader;
        lanes[r].add_to(leader, 0);
        nearest::Nearest found;
        double length;
        if (!nearest::settles(metric, z[r], leader, found, length)) found = nearest::search(metric, z[r], length);
        codes[r * all_.count_] = found.code;
        const S* const code = metric.codes[found.code];
        squares += nearest::sum_in_double<T, nearest::SquaredDifference>(z[r], code, narrow_);
        for_each_vec<T>(narrow_, [&](auto at) {
          const Vec<T> each = at.load(z[r]);
          at.keep(e_.data + r * narrow_, at.load(code) + (each - each));
        });
      }
      return squares;
    }

    const Quantizer& all_;
    const int64_t width_, narrow_;
    const Scratch<T> left_, sum_, z_, e_, packed_, products_;
  };

  const Rows<const S> x_, codebooks_;
  const int64_t count_, codes_of_level_;
  const Projections<T, S> in_, out_;
  const PackedLevels<T> packed_;
  std::optional<Metric>* const metrics_;
  const Rows<S> reconstruction_;
  T* const losses_[2];
  int64_t* const codes_;
  const int threads_;
};

}  // namespace residual
}  // namespace MMKERN_ISA
}  // namespace mmkern
