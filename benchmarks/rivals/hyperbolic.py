"""The hyperbolic formulas as the field writes them in PyTorch: what mmkern is timed against.

Lorentz maps, distances and cones follow MERU (Desai et al. 2023), clamps and all; the ball follows Ganea et al. 2018.
They lose digits where mmkern's do not (see the reference); no input of the benchmarks comes near those places.
"""

import math

import torch
from torch import Tensor

from mmkern.bench.case import Peer

EPS = 1e-8
RIM = 1e-5  # how near to the rim of the ball atanh is taken


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1, keepdim=True)


def _time(x: Tensor, c: Tensor) -> Tensor:
    return torch.sqrt(1 / c + torch.sum(x**2, dim=-1, keepdim=True))


def _acosh(x: Tensor) -> Tensor:
    return torch.acosh(torch.clamp(x, min=1 + EPS))


def _atanh(x: Tensor) -> Tensor:
    return torch.atanh(torch.clamp(x, max=1 - RIM))


def lorentz_exp_map0(v: Tensor, c: Tensor) -> Tensor:
    r = c**0.5 * torch.norm(v, dim=-1, keepdim=True)
    return torch.sinh(torch.clamp(r, min=EPS, max=math.asinh(2**15))) * v / torch.clamp(r, min=EPS)


def lorentz_log_map0(x: Tensor, c: Tensor) -> Tensor:
    distance = _acosh(torch.sqrt(1 + c * torch.sum(x**2, dim=-1, keepdim=True)))
    return distance * x / torch.clamp(c**0.5 * torch.norm(x, dim=-1, keepdim=True), min=EPS)


def lorentz_exp_map(x: Tensor, u: Tensor, c: Tensor) -> Tensor:
    u_time = _dot(x, u) / _time(x, c)
    r = torch.sqrt(c * torch.clamp(_dot(u, u) - u_time**2, min=EPS))
    return torch.cosh(r) * x + torch.sinh(r) * u / r


def lorentz_log_map(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    alpha = c * (_time(x, c) * _time(y, c) - _dot(x, y))
    return _acosh(alpha) / torch.sqrt(torch.clamp(alpha**2 - 1, min=EPS)) * (y - alpha * x)


def lorentz_distance(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    inner = _dot(x, y) - _time(x, c) * _time(y, c)
    return (_acosh(-c * inner) / c**0.5).squeeze(-1)


def lorentz_parallel_transport(x: Tensor, y: Tensor, u: Tensor, c: Tensor) -> Tensor:
    x_time, y_time = _time(x, c), _time(y, c)
    u_time = _dot(x, u) / x_time
    return u + c * (_dot(y, u) - y_time * u_time) / (1 - c * (_dot(x, y) - x_time * y_time)) * (x + y)


def lorentz_centroid(x: Tensor, weights: Tensor, c: Tensor) -> Tensor:
    weights = weights.unsqueeze(-1)
    space, time = (weights * x).sum(dim=-2), (weights * _time(x, c)).sum(dim=-2)
    return space / torch.sqrt(c * (time**2 - _dot(space, space)))


def lorentz_pairwise_inner(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return x @ y.T - _time(x, c) @ _time(y, c).T


def lorentz_pairwise_distance(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return _acosh(-c * lorentz_pairwise_inner(x, y, c)) / c**0.5


def lorentz_half_aperture(x: Tensor, c: Tensor, min_radius: float = 0.1) -> Tensor:
    sine = 2 * min_radius / (torch.norm(x, dim=-1) * c**0.5 + EPS)
    return torch.asin(torch.clamp(sine, min=-1 + EPS, max=1 - EPS))


def lorentz_exterior_angle(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    x_time, y_time = _time(x, c), _time(y, c)
    s = c * (_dot(x, y) - x_time * y_time)
    cosine = (y_time + s * x_time) / (
        torch.norm(x, dim=-1, keepdim=True) * torch.sqrt(torch.clamp(s**2 - 1, min=EPS)) + EPS
    )
    return torch.acos(torch.clamp(cosine, min=-1 + EPS, max=1 - EPS)).squeeze(-1)


def lorentz_entailment_loss(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return torch.clamp(lorentz_exterior_angle(x, y, c) - lorentz_half_aperture(x, c), min=0).mean()


def poincare_exp_map0(v: Tensor, c: Tensor) -> Tensor:
    r = torch.clamp(c**0.5 * torch.norm(v, dim=-1, keepdim=True), min=EPS)
    return torch.tanh(r) * v / r


def poincare_log_map0(x: Tensor, c: Tensor) -> Tensor:
    r = torch.clamp(c**0.5 * torch.norm(x, dim=-1, keepdim=True), min=EPS)
    return _atanh(r) * x / r


def mobius_add(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    xx, yy, xy = _dot(x, x), _dot(y, y), _dot(x, y)
    return ((1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y) / (1 + 2 * c * xy + c**2 * xx * yy)


def mobius_scalar_mul(r: Tensor, x: Tensor, c: Tensor) -> Tensor:
    length = torch.clamp(c**0.5 * torch.norm(x, dim=-1, keepdim=True), min=EPS)
    return torch.tanh(r * _atanh(length)) * x / length


def poincare_exp_map(x: Tensor, u: Tensor, c: Tensor) -> Tensor:
    factor = 2 / (1 - c * _dot(x, x))
    length = torch.clamp(c**0.5 * torch.norm(u, dim=-1, keepdim=True), min=EPS)
    return mobius_add(x, torch.tanh(factor * length / 2) * u / length, c)


def poincare_log_map(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    step = mobius_add(-x, y, c)
    length = torch.clamp(c**0.5 * torch.norm(step, dim=-1, keepdim=True), min=EPS)
    return (1 - c * _dot(x, x)) * _atanh(length) * step / length


def poincare_distance(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    return 2 / c**0.5 * _atanh(c**0.5 * torch.norm(mobius_add(-x, y, c), dim=-1))


def poincare_pairwise_distance(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """Nickel and Kiela 2017, which needs one matrix product where Möbius addition needs [N, M, D]."""
    gaps = (1 - c * _dot(x, x)) * (1 - c * _dot(y, y)).T
    return _acosh(1 + 2 * c * torch.cdist(x, y) ** 2 / gaps) / c**0.5


def lorentz_to_poincare(x: Tensor, c: Tensor) -> Tensor:
    return x / (1 + c**0.5 * _time(x, c))


def poincare_to_lorentz(x: Tensor, c: Tensor) -> Tensor:
    return 2 * x / (1 - c * _dot(x, x))


# geoopt. Its Lorentz points carry their time first; its k is 1/c there.

_LORENTZ = {
    "lorentz_exp_map0": "expmap0",
    "lorentz_log_map0": "logmap0",
    "lorentz_exp_map": "expmap",
    "lorentz_log_map": "logmap",
    "lorentz_distance": "dist",
    "lorentz_parallel_transport": "transp",
}
_BALL = {
    "poincare_exp_map0": "expmap0",
    "poincare_log_map0": "logmap0",
    "poincare_exp_map": "expmap",
    "poincare_log_map": "logmap",
    "mobius_add": "mobius_add",
    "mobius_scalar_mul": "mobius_scalar_mul",
    "poincare_distance": "dist",
    "poincare_pairwise_distance": "dist",
}
GEOOPT = (*_LORENTZ, *_BALL)


def geoopt_peer(op: str, args: list[Tensor]) -> Peer:
    """geoopt's own op (one of GEOOPT) on the same numbers."""
    *vectors, c = [a.detach().clone() for a in args]  # geoopt's ball writes to the curvature it is given
    make = _lorentz_peer if op in _LORENTZ else _ball_peer
    return make(op, vectors, c, args[0].requires_grad)


def _lorentz_peer(op: str, vectors: list[Tensor], c: Tensor, learnable: bool) -> Peer:
    import geoopt

    manifold = geoopt.Lorentz(k=1 / c, learnable=learnable)
    x, rest = vectors[0], vectors[1:]
    if op == "lorentz_exp_map0":
        inputs = [torch.cat([torch.zeros_like(x[..., :1]), x], dim=-1)]
    else:
        inputs = [torch.cat([_time(x, c), x], dim=-1)]
        for v in rest:
            tangent = v is rest[-1] and op in ("lorentz_exp_map", "lorentz_parallel_transport")
            inputs.append(torch.cat([_dot(x, v) / _time(x, c) if tangent else _time(v, c), v], dim=-1))
    comparable = (lambda out: out) if op == "lorentz_distance" else (lambda out: out[..., 1:])
    return _peer(getattr(manifold, _LORENTZ[op]), inputs, manifold, learnable, comparable)


def _ball_peer(op: str, vectors: list[Tensor], c: Tensor, learnable: bool) -> Peer:
    import geoopt

    manifold = geoopt.PoincareBall(c=c, learnable=learnable)
    function = getattr(manifold, _BALL[op])
    if op == "poincare_pairwise_distance":
        return _peer(lambda x, y: function(x[:, None], y), vectors, manifold, learnable)
    return _peer(function, vectors, manifold, learnable)


def _peer(function, inputs, manifold, learnable, comparable=lambda out: out) -> Peer:  # type: ignore[no-untyped-def]
    inputs = [x.requires_grad_(learnable) for x in inputs]
    return Peer(function, inputs, [*inputs, *manifold.parameters()] if learnable else [], comparable)
