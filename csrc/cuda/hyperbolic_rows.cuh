// The row-wise ops of the hyperbolic family: what each kind of op adds to the row loop of rows.cuh. The scalar maths of
// each op is csrc/hyperbolic.h, shared with the CPU; what it means, mmkern/reference/hyperbolic.py.
#pragma once

#include "device.cuh"

#include "../hyperbolic.h"
#include "rows.cuh"

namespace mmkern {
inline namespace device {

// ---- Radial maps: out = scale(z) x, z = c|x|^2 --------------------------------------------------------------------
//
// x' = scale g + 2c scale'(z) (g.x) x    c' = sum of scale'(z) |x|^2 (g.x)    r' = (g.x) d scale/dr

// z scale'(z) of far points, where scale'(z) itself would leave the range of float32. Maps of the ball have none.
template <class Op>
struct FarSlope {
  static MMKERN_FN float times_z(float, float) { return 0; }
};
template <>
struct FarSlope<LorentzLogMap0> {
  static MMKERN_FN float times_z(float z, float scale) { return 0.5f * (1 / sqrt(z) - scale); }
};
template <>
struct FarSlope<PoincareExpMap0> {
  static MMKERN_FN float times_z(float, float scale) { return -0.5f * scale; }
};
template <>
struct FarSlope<LorentzToPoincare> {
  static MMKERN_FN float times_z(float, float scale) { return -0.5f * scale; }
};
constexpr float kFar = 1e16f;  // of z: here 1 + z is z

template <class Op>
struct Radial {
  struct Forward {
    static constexpr int inputs = 1, outputs = 1, sums = 1;
    struct Coefficients {
      float scale;
    };
    static MMKERN_FN void products(const float (&v)[1], float (&s)[1]) { s[0] = fma(v[0], v[0], s[0]); }
    static MMKERN_FN RowResults solve(const float (&s)[1], RowScalars in, Coefficients& k) {
      k.scale = Op::scale(in.curvature * s[0], in.row);
      return {};
    }
    static MMKERN_FN void combine(const Coefficients& k, const float (&v)[1], float (&out)[1]) {
      out[0] = k.scale * v[0];
    }
  };

  struct Backward {
    enum Input { kG, kX };
    enum Sum { kXX, kGX };
    static constexpr int inputs = 2, outputs = 1, sums = 2;
    struct Coefficients {
      float by_g, by_x;
    };
    static MMKERN_FN void products(const float (&v)[2], float (&s)[2]) {
      s[kXX] = fma(v[kX], v[kX], s[kXX]);
      s[kGX] = fma(v[kG], v[kX], s[kGX]);
    }
    static MMKERN_FN RowResults solve(const float (&s)[2], RowScalars in, Coefficients& k) {
      using D = Dual<float, 2>;
      const float z = in.curvature * s[kXX];
      const D scale = Op::scale(D::variable(z, 0), D::variable(in.row, 1));
      const float by_z = scale.slope[0] * s[kGX];
      float by_z_times_xx = by_z * s[kXX];
      k.by_x = 2 * in.curvature * by_z;
      if (z > kFar) {
        by_z_times_xx = FarSlope<Op>::times_z(z, scale.value) * (s[kGX] / in.curvature);
        k.by_x = 2 * in.curvature * by_z_times_xx / s[kXX];
      }
      k.by_g = scale.value;
      return {scale.slope[1] * s[kGX], by_z_times_xx};
    }
    static MMKERN_FN void combine(const Coefficients& k, const float (&v)[2], float (&out)[1]) {
      out[0] = fma(k.by_x, v[kX], k.by_g * v[kG]);
    }
  };
};

// ---- One number a row of one point: f(c|x|^2) ---------------------------------------------------------------------

template <class Op>
struct PointScalar {
  struct Forward {
    static constexpr int inputs = 1, outputs = 0, sums = 1;
    struct Coefficients {};
    static MMKERN_FN void products(const float (&v)[1], float (&s)[1]) { s[0] = fma(v[0], v[0], s[0]); }
    static MMKERN_FN RowResults solve(const float (&s)[1], RowScalars in, Coefficients&) {
      return {Op::value(in.curvature * s[0], in.option), 0};
    }
  };

  struct Backward : Radial<Op>::Forward {
    using typename Radial<Op>::Forward::Coefficients;
    static MMKERN_FN RowResults solve(const float (&s)[1], RowScalars in, Coefficients& k) {
      using D = Dual<float, 1>;
      const float by_z = in.row * Op::value(D::variable(in.curvature * s[0], 0), in.option).slope[0];
      k.scale = 2 * in.curvature * by_z;
      return {0, by_z * s[0]};
    }
  };
};

// ---- Two points ---------------------------------------------------------------------------------------------------
//
// A map gives out = a x + b e, a scalar one number a row. Their arguments are |x|^2, |y|^2 and, with d = y - x,
// x.d and |d|^2 where points are compared (e = d), x.y where they are combined (e = y). Writing s' for the adjoint of
// an inner product s:
//   compared   x' = (a - b) g + (2xx' - xd') x + (xd' - 2dd') d     y' = b g + (2yy' + xd') y - (xd' - 2dd') d
//   combined   x' =  a      g +  2xx'        x +  xy'         y     y' = b g +  2yy'        y +  xy'         x

struct PairGradient {
  float x_by_g, x_by_x, y_by_g, y_by_y, cross;
};

struct Compared {
  static constexpr int sums = 4;
  static MMKERN_FN float e(float x, float y) { return y - x; }
  static MMKERN_FN void products(float x, float y, float* s) {
    const float d = y - x;
    s[0] = fma(x, x, s[0]);
    s[1] = fma(y, y, s[1]);
    s[2] = fma(x, d, s[2]);
    s[3] = fma(d, d, s[3]);
  }
  template <class F>
  static MMKERN_FN DifferenceSums<F> of(const F* s) {
    return {s[0], s[1], s[2], s[3]};
  }
  static MMKERN_FN PairGradient gradient(float a, float b, const float* adjoint) {
    return {a - b, 2 * adjoint[0] - adjoint[2], b, 2 * adjoint[1] + adjoint[2], adjoint[2] - 2 * adjoint[3]};
  }
  // d is subtracted element by element: (2dd')x - (2dd')y would cancel.
  static MMKERN_FN void combine(const PairGradient& k, float x, float y, float& x_to, float& y_to) {
    const float d = y - x;
    x_to = fma(k.x_by_x, x, fma(k.cross, d, x_to));
    y_to = fma(k.y_by_y, y, fma(-k.cross, d, y_to));
  }
};

struct Combined {
  static constexpr int sums = 3;
  static MMKERN_FN float e(float, float y) { return y; }
  static MMKERN_FN void products(float x, float y, float* s) {
    s[0] = fma(x, x, s[0]);
    s[1] = fma(y, y, s[1]);
    s[2] = fma(x, y, s[2]);
  }
  template <class F>
  static MMKERN_FN PlainSums<F> of(const F* s) {
    return {s[0], s[1], s[2]};
  }
  static MMKERN_FN PairGradient gradient(float a, float b, const float* adjoint) {
    return {a, 2 * adjoint[0], b, 2 * adjoint[1], adjoint[2]};
  }
  static MMKERN_FN void combine(const PairGradient& k, float x, float y, float& x_to, float& y_to) {
    x_to = fma(k.x_by_x, x, fma(k.cross, y, x_to));
    y_to = fma(k.y_by_y, y, fma(k.cross, x, y_to));
  }
};

// The inner products as independent variables, the curvature as one more after them.
template <class Points>
struct PairVariables {
  static constexpr int count = Points::sums + 1;
  using D = Dual<float, count>;
  D s[Points::sums];
  D curvature;

  MMKERN_FN PairVariables(const float* sums, float c) : curvature(D::variable(c, Points::sums)) {
#pragma unroll
    for (int k = 0; k < Points::sums; ++k) s[k] = D::variable(sums[k], k);
  }
};

template <class Op, class Points>
struct PairMap {
  struct Forward {
    static constexpr int inputs = 2, outputs = 1, sums = Points::sums;
    using Coefficients = PairCoefficients<float>;
    static MMKERN_FN void products(const float (&v)[2], float (&s)[sums]) { Points::products(v[0], v[1], s); }
    static MMKERN_FN RowResults solve(const float (&s)[sums], RowScalars in, Coefficients& k) {
      k = Op::coefficients(Points::of(s), in.curvature);
      return {};
    }
    static MMKERN_FN void combine(const Coefficients& k, const float (&v)[2], float (&out)[1]) {
      out[0] = fma(k.a, v[0], k.b * Points::e(v[0], v[1]));
    }
  };

  struct Backward {
    enum Input { kG, kX, kY };
    static constexpr int inputs = 3, outputs = 2, sums = Points::sums + 2;
    static constexpr int kGX = Points::sums, kGE = kGX + 1;
    using Coefficients = PairGradient;
    static MMKERN_FN void products(const float (&v)[3], float (&s)[sums]) {
      Points::products(v[kX], v[kY], s);
      s[kGX] = fma(v[kG], v[kX], s[kGX]);
      s[kGE] = fma(v[kG], Points::e(v[kX], v[kY]), s[kGE]);
    }
    static MMKERN_FN RowResults solve(const float (&s)[sums], RowScalars in, Coefficients& k) {
      const PairVariables<Points> variables(s, in.curvature);
      const auto map = Op::coefficients(Points::of(variables.s), variables.curvature);
      float adjoint[variables.count];
#pragma unroll
      for (int n = 0; n < variables.count; ++n) adjoint[n] = fma(s[kGX], map.a.slope[n], s[kGE] * map.b.slope[n]);
      k = Points::gradient(map.a.value, map.b.value, adjoint);
      return {0, adjoint[Points::sums]};
    }
    static MMKERN_FN void combine(const Coefficients& k, const float (&v)[3], float (&out)[2]) {
      out[0] = k.x_by_g * v[kG];
      out[1] = k.y_by_g * v[kG];
      Points::combine(k, v[kX], v[kY], out[0], out[1]);
    }
  };
};

template <class Op>
struct PairScalar {
  struct Forward {
    static constexpr int inputs = 2, outputs = 0, sums = Compared::sums;
    struct Coefficients {};
    static MMKERN_FN void products(const float (&v)[2], float (&s)[sums]) { Compared::products(v[0], v[1], s); }
    static MMKERN_FN RowResults solve(const float (&s)[sums], RowScalars in, Coefficients&) {
      return {Op::value(Compared::of(s), in.curvature, in.option), 0};
    }
  };

  struct Backward {
    static constexpr int inputs = 2, outputs = 2, sums = Compared::sums;
    using Coefficients = PairGradient;
    static MMKERN_FN void products(const float (&v)[2], float (&s)[sums]) { Compared::products(v[0], v[1], s); }
    static MMKERN_FN RowResults solve(const float (&s)[sums], RowScalars in, Coefficients& k) {
      const PairVariables<Compared> variables(s, in.curvature);
      const auto value = Op::value(Compared::of(variables.s), variables.curvature, in.option);
      float adjoint[variables.count];
#pragma unroll
      for (int n = 0; n < variables.count; ++n) adjoint[n] = in.row * value.slope[n];
      k = Compared::gradient(0, 0, adjoint);
      return {0, adjoint[sums]};
    }
    static MMKERN_FN void combine(const Coefficients& k, const float (&v)[2], float (&out)[2]) {
      out[0] = out[1] = 0;
      Compared::combine(k, v[0], v[1], out[0], out[1]);
    }
  };
};

// ---- Parallel transport: out = u + scale (x + y) ------------------------------------------------------------------
//
// With scale' = g.(x + y) and s' = scale' d scale/ds:
//   x' = scale g + (2xx' - xd') x + (xd' - 2dd') d + (xu' - du') u
//   y' = scale g + (2yy' + xd') y - (xd' - 2dd') d +        du'  u          u' = g + xu' x + du' d

template <class Op>
struct Transport {
  enum Sum { kXU = Compared::sums, kDU, kScaleSums, kByScale = kScaleSums, kBackwardSums };

  static MMKERN_FN void products_of(float x, float y, float u, float* s) {
    Compared::products(x, y, s);
    s[kXU] = fma(x, u, s[kXU]);
    s[kDU] = fma(y - x, u, s[kDU]);
  }
  template <class F>
  static MMKERN_FN TransportSums<F> sums_of(const F* s) {
    return {Compared::of(s), s[kXU], s[kDU]};
  }

  struct Forward {
    static constexpr int inputs = 3, outputs = 1, sums = kScaleSums;
    struct Coefficients {
      float scale;
    };
    static MMKERN_FN void products(const float (&v)[3], float (&s)[sums]) { products_of(v[0], v[1], v[2], s); }
    static MMKERN_FN RowResults solve(const float (&s)[sums], RowScalars in, Coefficients& k) {
      k.scale = Op::scale(sums_of(s), in.curvature);
      return {};
    }
    static MMKERN_FN void combine(const Coefficients& k, const float (&v)[3], float (&out)[1]) {
      out[0] = fma(k.scale, v[0] + v[1], v[2]);
    }
  };

  struct Backward {
    enum Input { kG, kX, kY, kU };
    static constexpr int inputs = 4, outputs = 3, sums = kBackwardSums;
    struct Coefficients {
      PairGradient pair;
      float by_xu, by_du;
    };
    static MMKERN_FN void products(const float (&v)[4], float (&s)[sums]) {
      products_of(v[kX], v[kY], v[kU], s);
      s[kByScale] = fma(v[kG], v[kX] + v[kY], s[kByScale]);
    }
    static MMKERN_FN RowResults solve(const float (&s)[sums], RowScalars in, Coefficients& k) {
      using D = Dual<float, kScaleSums + 1>;
      D variables[kScaleSums];
#pragma unroll
      for (int n = 0; n < kScaleSums; ++n) variables[n] = D::variable(s[n], n);
      const D scale = Op::scale(sums_of(variables), D::variable(in.curvature, kScaleSums));
      float adjoint[kScaleSums + 1];
#pragma unroll
      for (int n = 0; n <= kScaleSums; ++n) adjoint[n] = s[kByScale] * scale.slope[n];
      k.pair = Compared::gradient(0, 0, adjoint);
      k.pair.x_by_g = k.pair.y_by_g = scale.value;
      k.by_xu = adjoint[kXU];
      k.by_du = adjoint[kDU];
      return {0, adjoint[kScaleSums]};
    }
    static MMKERN_FN void combine(const Coefficients& k, const float (&v)[4], float (&out)[3]) {
      const float carried = k.pair.x_by_g * v[kG];
      out[0] = fma(k.by_xu - k.by_du, v[kU], carried);
      out[1] = fma(k.by_du, v[kU], carried);
      Compared::combine(k.pair, v[kX], v[kY], out[0], out[1]);
      out[2] = fma(k.by_xu, v[kX], fma(k.by_du, v[kY] - v[kX], v[kG]));
    }
  };
};

}  // namespace device
}  // namespace mmkern
