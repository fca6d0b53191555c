"""Hold a module to the numerics contract, beside the module whose place it takes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from torch import Tensor, nn
from torch.nn import functional

from mmkern import testing
from mmkern.ops._define import Op

Inputs = dict[str, Any]


def set_apart(module: nn.Module) -> nn.Module:
    """No weight is 1, no bias 0, and each norm has an eps of its own, large enough to be seen."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    for i, norm in enumerate(m for m in module.modules() if hasattr(m, "eps")):
        norm.eps = 0.05 * (1 + i % 7)
    return module


class _ExactRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = functional.rms_norm(x, self.dim, self.weight, self.eps)
        return y if self.bias is None else y + self.bias


def exact(module: nn.Module) -> nn.Module:
    """A copy in float64, also of norms that are in float32 whatever comes."""
    made = copy.deepcopy(module).double()
    for inner in made.modules():
        inner.__class__ = {RMSNorm: _ExactRMSNorm, FP32LayerNorm: nn.LayerNorm}.get(type(inner), type(inner))
    return made


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    cast = dict(zip(inputs, testing.in_dtype(list(inputs.values()), dtype), strict=True))
    return cast | ({"hidden_dtype": dtype} if "hidden_dtype" in inputs else {})


def outputs_and_gradients(module: nn.Module, inputs: Inputs) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """What it gives, and the gradients of all parameters and floating inputs, by name.

    The first input goes by its place, since its name differs.
    """
    torch.manual_seed(0)
    floating = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    leaves = {name: x.detach().requires_grad_() for name, x in floating.items()}
    first, *others = (inputs | leaves).items()
    found = module(first[1], **dict(others))
    outs = [found] if isinstance(found, Tensor) else list(found if isinstance(found, tuple) else found.to_tuple())
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outs]
    named = dict(module.named_parameters()) | leaves
    gradients = torch.autograd.grad(outs, list(named.values()), grads, allow_unused=True)
    return [out.detach() for out in outs], dict(zip(named, gradients, strict=True))


def check_same(ours: nn.Module, theirs: nn.Module, inputs: Inputs) -> None:
    """In float64, to its last digits."""
    inputs = in_dtype(inputs, torch.float64)
    found, expected = (outputs_and_gradients(exact(m), inputs) for m in (ours, theirs))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def check_contract(
    ours: nn.Module,
    theirs: nn.Module,
    inputs: Inputs,
    dtype: torch.dtype,
    run: Callable[..., Any] = outputs_and_gradients,
) -> None:
    """The error of ours, against theirs in float64, is at most twice (gradients: three times) that of theirs."""
    ours, theirs = (copy.deepcopy(m).to(dtype) for m in (ours, theirs))
    inputs = in_dtype(inputs, dtype)
    errors: Counter[str] = Counter()
    generator = torch.Generator().manual_seed(0)
    for draw in range(testing.FEW_DRAWS):
        near, given = copy.deepcopy(theirs), dict(inputs)
        if draw:
            for parameter in near.parameters():
                parameter.data = testing._nudged(parameter.data, generator)
            given = {k: testing._nudged(x, generator) if testing._is_floating(x) else x for k, x in inputs.items()}
        for name, actual, oracle, scale in _compared(run(near, given), near, given, run):
            errors[name] = max(errors[name], testing.relative_error(actual, oracle, scale).max().item())
    for name, actual, oracle, scale in _compared(run(ours, inputs), theirs, inputs, run):
        factor = testing.FORWARD_FACTOR if scale is None else testing.BACKWARD_FACTOR
        testing.check_contract(name, actual, oracle, errors[name], factor=factor, longest_sum=1, scale=scale)


def check_contract_on_average(
    ours: nn.Module,
    theirs: nn.Module,
    inputs: Inputs,
    dtype: torch.dtype,
    run: Callable[..., Any] = outputs_and_gradients,
) -> None:
    """Of a model, whose layers carry errors on: the largest of hundreds of gradients is a matter of luck."""
    ours, theirs = (copy.deepcopy(m).to(dtype) for m in (ours, theirs))
    inputs = in_dtype(inputs, dtype)
    errors: dict[str, list[list[float]]] = {"output": [[], []], "gradient": [[], []]}
    for side, module in enumerate((ours, theirs)):
        for name, actual, oracle, scale in _compared(run(module, inputs), theirs, inputs, run):
            assert torch.equal(actual.isfinite(), oracle.isfinite()), name
            errors[name.split(" ")[0]][side].append(testing.relative_error(actual, oracle, scale).max().item())
    for kind, factor in (("output", testing.FORWARD_FACTOR), ("gradient", testing.BACKWARD_FACTOR)):
        of_ours, of_theirs = (fmean(found) for found in errors[kind])
        assert of_ours <= factor * of_theirs + torch.finfo(dtype).eps, f"{kind}: {of_ours:.2e}, theirs {of_theirs:.2e}"


def _compared(
    found: Any, theirs: nn.Module, inputs: Inputs, run: Callable[..., Any]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Each output and gradient with its oracle, and the scale of the latter.

    That is the largest gradient among a module's parameters: what adds up to nothing in the gradient of a bias, such as
    that of keys, is seen in that of the weight.
    """
    outs, gradients = found
    oracles, wanted = run(exact(theirs), in_dtype(inputs, torch.float64))
    for i, (out, oracle) in enumerate(zip(outs, oracles, strict=True)):
        yield f"output {i}", out, oracle, None
    assert gradients.keys() == wanted.keys()
    scales: dict[str, Tensor] = {}
    for name, gradient in wanted.items():
        if gradient is not None:
            owner = name.rpartition(".")[0]
            scales[owner] = torch.maximum(gradient.abs().max(), scales.get(owner, gradient.new_zeros(())))
    for name, gradient in wanted.items():
        assert (gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            yield f"gradient of {name}", gradients[name], gradient, scales[name.rpartition(".")[0]]


@contextmanager
def called_ops() -> Iterator[list[tuple[str, Inputs]]]:
    """The name and the arguments of each call of an op."""
    calls: list[tuple[str, Inputs]] = []
    call = Op.__call__

    def recording(op: Op, *args: Any) -> Any:
        calls.append((op.name, dict(zip(op.names, args, strict=True))))
        return call(op, *args)

    Op.__call__ = recording  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Op.__call__ = call  # type: ignore[method-assign]
