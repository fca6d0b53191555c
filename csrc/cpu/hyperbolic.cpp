// The hyperbolic family on a CPU: the table of its kernels. What they mean: mmkern/reference/hyperbolic.py; how the
// gradients follow: docs/hyperbolic.md.

#include "hyperbolic_many.h"
#include "hyperbolic_pair.h"
#include "hyperbolic_pairwise.h"
#include "hyperbolic_radial.h"

namespace mmkern {
inline namespace MMKERN_ISA {
namespace {

constexpr auto kCompared = pair::Points::compared;
constexpr auto kCombined = pair::Points::combined;
constexpr auto kMap = pair::Result::map;
constexpr auto kScalar = pair::Result::scalar;

template <class Kernels>
void by_storage(const Call& call, int tensor, Kernels run) {
  with_storage(call[tensor].dtype, run);
}

// A kernel of every storage type from a function template over S.
#define MMKERN_BY_STORAGE(function, tensor)                                                                            \
  [](const Call& call) { by_storage(call, tensor, [&](auto s) { function<typename decltype(s)::type>(call); }); }

#define MMKERN_RADIAL(name, Op)                                                                                        \
  {name, "x: *D, positive curvature, out: *D", radial::run<Op>}, {                                                     \
    name "_backward",                                                                                                  \
        "grad: *D, x: *D, positive curvature, opt grad_x: *D, opt acc grad_curvature:", radial::run_backward<Op>       \
  }
#define MMKERN_MAP(name, Op, points)                                                                                   \
  {name, "x: *D, y: *D, positive curvature, out: *D", pair::run<Op, points, kMap>}, {                                  \
    name "_backward",                                                                                                  \
        "grad: *D, x: *D, y: *D, positive curvature, opt grad_x: *D, opt grad_y: *D, opt acc grad_curvature:",         \
        pair::run_backward<Op, points, kMap>                                                                           \
  }
#define MMKERN_PAIR_SCALAR(name, Op, option)                                                                           \
  {name, "x: *D, y: *D, positive curvature" option ", out: *", pair::run<Op, kCompared, kScalar>}, {                   \
    name "_backward",                                                                                                  \
        "grad: *, x: *D, y: *D, positive curvature" option                                                             \
        ", opt grad_x: *D, opt grad_y: *D, opt acc grad_curvature:",                                                   \
        pair::run_backward<Op, kCompared, kScalar>                                                                     \
  }
#define MMKERN_PAIRWISE(name, Geometry)                                                                                \
  {name, "x: ND, y: MD, positive curvature, out: NM", pairwise::run<pairwise::Geometry>}, {                            \
    name "_backward",                                                                                                  \
        "grad: NM, x: ND, y: MD, positive curvature, opt grad_x: ND, opt grad_y: MD, opt acc grad_curvature:",         \
        pairwise::run_backward<pairwise::Geometry>                                                                     \
  }

const KernelEntry kEntries[] = {
    MMKERN_RADIAL("lorentz_exp_map0", LorentzExpMap0),
    MMKERN_RADIAL("lorentz_log_map0", LorentzLogMap0),
    MMKERN_RADIAL("poincare_exp_map0", PoincareExpMap0),
    MMKERN_RADIAL("poincare_log_map0", PoincareLogMap0),
    MMKERN_RADIAL("lorentz_to_poincare", LorentzToPoincare),
    MMKERN_RADIAL("poincare_to_lorentz", PoincareToLorentz),
    {"mobius_scalar_mul", "acc r: *, x: *D, positive curvature, out: *D", radial::run<MobiusScalarMul, true>},
    {"mobius_scalar_mul_backward",
     "grad: *D, acc r: *, x: *D, positive curvature, opt acc grad_r: *, opt grad_x: *D, opt acc grad_curvature:",
     radial::run_backward<MobiusScalarMul, true>},
    MMKERN_MAP("lorentz_exp_map", LorentzExpMap, kCombined),
    MMKERN_MAP("lorentz_log_map", LorentzLogMap, kCompared),
    MMKERN_MAP("mobius_add", MobiusAdd, kCombined),
    MMKERN_MAP("poincare_exp_map", PoincareExpMap, kCombined),
    MMKERN_MAP("poincare_log_map", PoincareLogMap, kCompared),
    MMKERN_PAIR_SCALAR("lorentz_distance", LorentzDistance, ""),
    MMKERN_PAIR_SCALAR("poincare_distance", PoincareDistance, ""),
    MMKERN_PAIR_SCALAR("lorentz_exterior_angle", LorentzExteriorAngle, ""),
    MMKERN_PAIR_SCALAR("lorentz_entailment_loss", LorentzEntailmentLoss, ", nonnegative min_radius"),
    {"lorentz_half_aperture", "x: *D, positive curvature, nonnegative min_radius, out: *",
     MMKERN_BY_STORAGE(aperture::forward, 0)},
    {"lorentz_half_aperture_backward",
     "grad: *, x: *D, positive curvature, nonnegative min_radius, opt grad_x: *D, opt acc grad_curvature:",
     MMKERN_BY_STORAGE(aperture::backward, 1)},
    {"lorentz_parallel_transport", "x: *D, y: *D, u: *D, positive curvature, out: *D",
     MMKERN_BY_STORAGE(transport::forward, 0)},
    {"lorentz_parallel_transport_backward",
     "grad: *D, x: *D, y: *D, u: *D, positive curvature, opt grad_x: *D, opt grad_y: *D, opt grad_u: *D, "
     "opt acc grad_curvature:",
     MMKERN_BY_STORAGE(transport::backward, 1)},
    {"lorentz_centroid", "x: *ND, flat weights: *N, positive curvature, out: *D",
     MMKERN_BY_STORAGE(centroid::forward, 0)},
    {"lorentz_centroid_backward",
     "grad: *D, x: *ND, flat weights: *N, positive curvature, opt grad_x: *ND, opt flat grad_weights: *N, "
     "opt acc grad_curvature:",
     MMKERN_BY_STORAGE(centroid::backward, 1)},
    MMKERN_PAIRWISE("lorentz_pairwise_inner", LorentzInner),
    MMKERN_PAIRWISE("lorentz_pairwise_distance", LorentzDistance),
    MMKERN_PAIRWISE("poincare_pairwise_distance", PoincareDistance),
};

#undef MMKERN_BY_STORAGE
#undef MMKERN_RADIAL
#undef MMKERN_MAP
#undef MMKERN_PAIR_SCALAR
#undef MMKERN_PAIRWISE

}  // namespace

KernelTable hyperbolic_kernels() { return {kEntries, int(sizeof(kEntries) / sizeof(kEntries[0]))}; }

}  // namespace MMKERN_ISA
}  // namespace mmkern
