"""What torch asks of an op, and how a call finds its kernel. The hyperbolic family stands for all."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mmkern
from mmkern import backends, ops, testing
from mmkern.ops import _define
from mmkern.reference import hyperbolic as reference
from tests import contract
from tests.cases.case import Case
from tests.cases.hyperbolic import PAIRWISE
from tests.test_hyperbolic import leaves, one_of_each, public

EVERY_OP = pytest.mark.parametrize("case", one_of_each(), ids=str)
ROW_WISE = pytest.mark.parametrize("case", [c for c in one_of_each() if c.op not in PAIRWISE], ids=str)


def registered(name: str) -> Any:
    return getattr(torch.ops.mmkern, name).default


def laid_out(args: list[Any], layout: str) -> list[Any]:
    def lay(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() < 2:
            return x
        if layout == "permuted":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return torch.cat([x, x], -1)[..., : x.shape[-1]] if layout == "sliced" else x

    return [lay(a) for a in args]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dense", "permuted", "sliced"])
@EVERY_OP
def test_opcheck(case: Case, layout: str) -> None:
    args = leaves(laid_out(case.arguments(torch.float32), layout))
    args = [torch.tensor(a) if isinstance(a, float) and i == len(args) - 2 else a for i, a in enumerate(args)]
    torch.library.opcheck(registered(case.op), tuple(args))


@pytest.mark.slow
@EVERY_OP
def test_compile_without_graph_breaks(case: Case) -> None:
    torch._dynamo.reset()
    args = case.arguments(torch.float32)
    compiled = torch.compile(public(case.op), fullgraph=True, backend="aot_eager")
    eager_args, compiled_args = leaves(args), leaves(args)
    eager, out = public(case.op)(*eager_args), compiled(*compiled_args)
    assert torch.equal(out, eager)
    grad = torch.randn_like(out)
    out.backward(grad)
    eager.backward(grad)
    for mine, other in zip(compiled_args, eager_args, strict=True):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine.grad, other.grad)


def test_new_curvatures_do_not_recompile() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(ops.lorentz_exp_map0, fullgraph=True, backend=counter)
    v = torch.randn(4, 8)
    for curvature in torch.linspace(0.5, 2, 12).tolist():
        torch.testing.assert_close(compiled(v, curvature), ops.lorentz_exp_map0(v, curvature))
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_inductor_runs_it() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda v, c: ops.lorentz_exp_map0(v * 2, c) + 1, fullgraph=True)
    v = torch.randn(6, 10)
    torch.testing.assert_close(compiled(v, 0.5), ops.lorentz_exp_map0(v * 2, 0.5) + 1)


@EVERY_OP
def test_fake_and_meta_give_the_shape(case: Case) -> None:
    args = case.arguments(torch.float32)
    expected = public(case.op)(*args)
    meta = public(case.op)(*[a.to("meta") if isinstance(a, Tensor) else a for a in args])
    assert (meta.shape, meta.dtype, meta.device.type) == (expected.shape, expected.dtype, "meta")
    with FakeTensorMode() as mode:
        fake = public(case.op)(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])
    assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)


@EVERY_OP
def test_func_grad(case: Case) -> None:
    args = case.arguments(torch.float64)
    lead = contract.op_of(case.op).lead
    gradient = torch.func.grad(lambda x: public(case.op)(*args[:lead], x, *args[lead + 1 :]).sum())(args[lead])
    own = leaves(args)
    public(case.op)(*own).sum().backward()
    torch.testing.assert_close(gradient, own[lead].grad)


@EVERY_OP
def test_vmap(case: Case) -> None:
    args = case.arguments(torch.float64)
    lead = contract.op_of(case.op).lead
    batch = torch.stack([args[lead], 0.5 * args[lead]])
    run = lambda x: public(case.op)(*args[:lead], x, *args[lead + 1 :])  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(run)(batch), torch.stack([run(x) for x in batch]))


def test_vmap_over_curvatures_and_second_arguments() -> None:
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
    c = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    got = torch.func.vmap(ops.lorentz_distance, in_dims=(None, 0, 0))(x, y, c)
    torch.testing.assert_close(got, torch.stack([ops.lorentz_distance(x, y[i], c[i]) for i in range(3)]))
    got = torch.func.vmap(ops.lorentz_distance, in_dims=(None, 1, None))(x[0], y, 1.0)
    torch.testing.assert_close(got, torch.stack([ops.lorentz_distance(x[0], y[:, i], 1.0) for i in range(4)]))


def test_vmap_of_grad() -> None:
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(lambda a, b: ops.lorentz_distance(a, b, 1.0)))(x, y)
    leaf = x.clone().requires_grad_()
    ops.lorentz_distance(leaf, y, 1.0).sum().backward()
    torch.testing.assert_close(per_sample, leaf.grad)


@ROW_WISE
def test_forward_mode_is_the_reference(case: Case) -> None:
    args = case.arguments(torch.float64)
    lead = contract.op_of(case.op).lead
    tangent = torch.randn_like(args[lead])

    def of(function: Any) -> Any:
        return torch.func.jvp(lambda x: function(*args[:lead], x, *args[lead + 1 :]), (args[lead],), (tangent,))

    for got, expected in zip(of(public(case.op)), of(getattr(reference, case.op)), strict=True):
        torch.testing.assert_close(got, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[lead], tangent)
        out = public(case.op)(*args[:lead], dual, *args[lead + 1 :])
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None


@pytest.mark.slow
@EVERY_OP
def test_autocast_runs_in_float32(case: Case) -> None:
    args = case.arguments(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = public(case.op)(*args)
        traced = torch.compile(public(case.op), fullgraph=True, backend="aot_eager")(*args)
    assert out.dtype == traced.dtype == torch.float32
    wide = [a.float() if isinstance(a, Tensor) else a for a in args]
    assert torch.equal(out, public(case.op)(*wide))


def test_autocast_takes_mixed_dtypes() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ops.lorentz_distance(x, y, 1.0), ops.lorentz_distance(x, y.float(), 1.0))


class Tagged(Tensor):
    pass


def test_a_tensor_subclass_is_seen() -> None:
    x = torch.randn(3, 4)
    tagged = x.as_subclass(Tagged)
    torch.testing.assert_close(ops.lorentz_exp_map0(tagged, 1.0).as_subclass(Tensor), ops.lorentz_exp_map0(x, 1.0))
    torch.testing.assert_close(
        ops.lorentz_distance(x, tagged, 1.0).as_subclass(Tensor), ops.lorentz_distance(x, x, 1.0)
    )


def test_checkpointing_and_parameters() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 8))
    curvature = torch.nn.Parameter(torch.tensor(0.7))
    ops.lorentz_exp_map0(weight, curvature).sum().backward()
    expected = copy.deepcopy((weight.grad, curvature.grad))
    weight.grad = curvature.grad = None
    checkpoint(ops.lorentz_exp_map0, weight, curvature, use_reentrant=False).sum().backward()
    assert torch.equal(weight.grad, expected[0])
    assert torch.equal(curvature.grad, expected[1])


def test_a_bfloat16_curvature_gets_a_bfloat16_gradient() -> None:
    curvature = torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)
    for function in (ops.lorentz_exp_map0, torch.ops.mmkern.lorentz_exp_map0):
        (gradient,) = torch.autograd.grad(function(torch.randn(3, 4), curvature).sum(), curvature)
        assert gradient.dtype == torch.bfloat16


def test_the_registered_op_refuses_a_second_derivative() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    out = torch.ops.mmkern.lorentz_exp_map0(x, torch.tensor(1.0))
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_the_registered_op_takes_gradients_of_the_reference() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    gradients = []
    for backend in ("reference", None):
        with mmkern.use_backend(backend):
            out = torch.ops.mmkern.lorentz_exp_map0(x, torch.tensor(1.0))
            gradients += torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(*gradients)


def test_the_profiler_names_the_op() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with torch.profiler.profile() as profile:
        ops.lorentz_exp_map0(x, 1.0).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"mmkern::lorentz_exp_map0", "mmkern::lorentz_exp_map0_backward"} <= names


# ---- Backends ------------------------------------------------------------------------------------------------------


def test_use_backend_is_of_one_thread() -> None:
    x = torch.randn(3, 4)
    seen: list[str | None] = []
    with mmkern.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.settings.backend))
        thread.start()
        thread.join()
        assert torch.equal(ops.lorentz_exp_map0(x, 1.0), reference.lorentz_exp_map0(x, 1.0))
        with mmkern.use_backend("cpu"):
            assert backends.settings.backend == "cpu"
        assert backends.settings.backend == "reference"
    assert seen == [None]
    assert backends.settings.default


def test_use_backend_refuses_the_impossible() -> None:
    with pytest.raises(ValueError, match="expected one of cpu, triton, cuda, reference"):
        mmkern.use_backend("tpu")
    with mmkern.use_backend("triton"), pytest.raises(ValueError, match="cannot run this call: runs on cuda"):
        ops.lorentz_exp_map0(torch.randn(2, 2), 1.0)


def test_explain_gives_every_reason() -> None:
    answer = mmkern.explain("lorentz_distance", torch.randn(2, 3), torch.randn(2, 3), 1.0)
    assert [choice.backend for choice in answer] == ["cpu", "triton", "cuda", "reference"]
    assert [choice.backend for choice in answer if choice.chosen] == ["cpu"]
    assert "the input is on cpu" in str(answer[1])
    with mmkern.use_backend("reference"):
        assert 'use_backend("reference") is in force' in str(mmkern.explain("lorentz_distance", torch.randn(2))[0])
    with pytest.raises(ValueError, match="there is no op 'distance'"):
        mmkern.explain("distance", torch.randn(2))
    with pytest.raises(TypeError, match="given no tensor"):
        mmkern.explain("lorentz_distance", 1.0)


def test_verify_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    op = contract.op_of("lorentz_exp_map0")
    right = op._kernel

    def wrong(name: str, given: Any) -> Any:
        def kernel(*args: Any) -> None:
            right(name, given)(*args)
            args[3 if name.endswith("backward") else -1][0] *= 1.001

        return kernel

    monkeypatch.setattr(op, "_kernel", wrong)
    x = torch.randn(3, 4)
    with mmkern.verify(), pytest.raises(testing.ContractError, match="lorentz_exp_map0: error"):
        ops.lorentz_exp_map0(x, 1.0)
    with pytest.raises(testing.ContractError, match="gradient of v"), mmkern.verify():
        op.run_backward([torch.ones(3, 4)], [True, False], (x, 1.0))


def test_a_dtype_without_a_kernel_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.BACKENDS[0].__class__, "reasons_not", lambda *_: ["switched off"])
    op = contract.op_of("lorentz_exp_map0")
    monkeypatch.setattr(op, "_kernels", {})
    monkeypatch.setattr(op, "_direct", None)
    x = torch.randn(3, 4, requires_grad=True)
    out = ops.lorentz_exp_map0(x, 1.0)
    assert torch.equal(out, reference.lorentz_exp_map0(x, 1.0))
    out.sum().backward()
    assert x.grad is not None


# ---- The short way (bindings/direct.h) -------------------------------------------------------------------------------


def directly(*args: Any) -> Any:
    return contract.op_of("lorentz_exp_map0")._direct(*args)


class SeesEverything(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(3, 4), (4,), (2, 3, 5), (0, 4), (600, 512)], ids=str)
@pytest.mark.parametrize("dtype", backends.BACKENDS[0].dtypes, ids=str)
def test_the_short_way_is_taken_where_nothing_speaks_against_it(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, c = torch.randn(shape).to(dtype), torch.tensor(0.5)
    for arguments in ((x, 0.5), (x, c), (x.requires_grad_(), c.requires_grad_())):
        out = directly(*arguments)
        assert torch.equal(out, contract.op_of("lorentz_exp_map0").run(x.detach(), 0.5))
    assert out.grad_fn.name() == "_FunctionBackward"
    assert directly(x[:0], 0.5).shape == x[:0].shape


@pytest.mark.parametrize(
    "between",
    [
        lambda: mmkern.use_backend("cpu"),
        mmkern.verify,
        SeesEverything,
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        lambda: torch.autograd.forward_ad.dual_level(),
        lambda: torch.autocast("cpu"),
    ],
)
def test_the_short_way_makes_room_for(between: Any) -> None:
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    assert isinstance(directly(x, 1.0), Tensor)
    with between():
        assert directly(x, 1.0) is NotImplemented
    assert isinstance(directly(x, 1.0), Tensor)


def test_the_short_way_leaves_transforms_and_unfit_arguments_alone() -> None:
    x = torch.randn(3, 4)
    seen = []
    torch.func.vmap(lambda row: (seen.append(directly(row, 1.0)), row)[1])(x)
    unfit: list[tuple[Any, ...]] = [(x, 0.0), (x, "1"), (x.T, 1.0), (x.int(), 1.0), (x.numpy(), 1.0), (x,), (None, 1.0)]
    unfit += [(torch._neg_view(x), 1.0), (x.to("meta"), 1.0), (x.to_sparse(), 1.0), (x, None), (x, x)]
    assert [*seen, *(directly(*arguments) for arguments in unfit)] == [NotImplemented] * (1 + len(unfit))


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Any = None, bias: Any = None, softcap: float = 0.0) -> list[Any]:
    return [q, k, v, key_mask, None, None, bias, None, None, 0.5, softcap, -1, -1, 1, 0.0]


@pytest.mark.parametrize("dtype", backends.BACKENDS[0].dtypes, ids=str)
def test_the_short_way_of_two_outputs_and_optional_arguments(dtype: torch.dtype) -> None:
    op = contract.op_of("cross_attention")
    q, k, v = (torch.randn(2, heads, 5, 8).to(dtype).requires_grad_() for heads in (4, 2, 2))
    mask = torch.rand(2, 5) < 0.7
    for key_mask, bias in ((None, None), (mask, None), (mask, torch.randn(1, 4, 1, 5).to(dtype).requires_grad_())):
        args = attend(q, k, v, key_mask, bias)
        out, lse = op._direct(*args)
        expected = op._routed(op._prepare(args))
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])
        inputs = [x for x in (q, k, v, bias) if x is not None]
        loss, other = (o.float().sum() + torch.where(s.isinf(), 0, s).sum() for o, s in ((out, lse), expected))
        for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(other, inputs), strict=True):
            assert torch.equal(a, b)


def test_the_short_way_of_attention_leaves_alone_what_its_kernel_does_not_take() -> None:
    op = contract.op_of("cross_attention")
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
    for fit in (q, q.transpose(1, 2).contiguous().transpose(1, 2), q[:1].expand(2, 4, 5, 8)):
        assert op._direct(*attend(fit, k, k))[0].stride() == op.run(*attend(fit, k, k))[0].stride()
    unfit = [
        attend(q[:, :3], k, k),
        attend(q, k[:, :0], k[:, :0]),
        attend(q[..., :0], k[..., :0], k),
        attend(q, k, k[:, :, :5]),
        attend(q.double(), k, k),
        attend(q, k, k, key_mask=torch.ones(2, 5, dtype=torch.bool)),
        attend(q, k, k, key_mask=torch.ones(2, 6)),
        attend(q, k, k, bias=torch.ones(5, 6)),
        attend(q, k, k, bias=torch.ones(1, 1, 5, 6).double()),
        attend(q, k, k, softcap=-1.0),
    ]
    assert [op._direct(*args) for args in unfit] == [NotImplemented] * len(unfit)
    with torch.autocast("cpu"):
        assert op._direct(*attend(q, k, k)) is NotImplemented


def test_a_tensor_that_outlived_its_transform() -> None:
    x, kept = torch.randn(3, 4), []
    torch.func.grad(lambda v: (kept.append(v), v.sum())[1])(x)
    assert torch.equal(ops.lorentz_exp_map0(kept[0], 1.0), ops.lorentz_exp_map0(x, 1.0))


def test_views_that_change_the_sign() -> None:
    x = torch.randn(3, 4)
    flipped = torch._neg_view(x).requires_grad_()
    out = ops.lorentz_exp_map0(flipped, 1.0)
    assert torch.equal(out, ops.lorentz_exp_map0(-x, 1.0))
    (gradient,) = torch.autograd.grad(out, flipped, torch._neg_view(x))
    plain = (-x).requires_grad_()
    (expected,) = torch.autograd.grad(ops.lorentz_exp_map0(plain, 1.0), plain, -x)
    assert torch.equal(gradient, expected)


@pytest.mark.slow
def test_torch_without_dlpack_for_c() -> None:
    code = (
        "import torch; vars(torch.Tensor).get('__dlpack_c_exchange_api__') and delattr(torch.Tensor, "
        "'__dlpack_c_exchange_api__'); import mmkern; from mmkern.ops import hyperbolic;"
        "x = torch.randn(5, 6, 8)[:, 0]; out = hyperbolic._lorentz_exp_map0._direct(x, 2.0);"
        "torch.testing.assert_close(out, torch.sinh(r := 2**0.5 * x.norm(dim=-1, keepdim=True)) / r * x);"
        "assert hyperbolic._lorentz_exp_map0._direct(x.int(), 2.0) is NotImplemented"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dense_rows_copies_only_what_it_must() -> None:
    x = torch.randn(6, 4, 8)
    for view in (x, x[:, 0], x[::2, 1], x[:1].expand(5, 4, 8)[:, 0], x[..., :5][0]):
        assert _define.dense_rows(view) is view
    for view in (x.transpose(0, 1), x[::2], x[..., ::2], x[:, :2], x.permute(2, 1, 0)):
        assert _define.dense_rows(view).is_contiguous()


@pytest.mark.slow
def test_import_is_light() -> None:
    code = (
        "import time, torch; start = time.perf_counter(); import mmkern; print(time.perf_counter() - start);"
        "import sys; assert 'triton' not in sys.modules or 'triton' in before"
    )
    code = "import sys, torch; before = set(sys.modules); " + code
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 1.0  # 0.1 s on a quiet machine; a test must not hang on a busy one


@pytest.mark.slow
def test_one_openmp_runtime() -> None:
    code = (
        "import mmkern, torch; x = torch.randn(512, 512); mmkern.ops.lorentz_exp_map0(x, 1.0); torch.mm(x, x);"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "1"
