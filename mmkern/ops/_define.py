"""From one statement of an op to everything torch asks of it.

``define`` takes the schema, the checks, the shape of the output and the reference. From these follow the eager call,
autograd, the registered ``torch.ops.mmkern`` op with its fake, autocast and vmap rules, and the choice of a backend,
whose kernels are found by the op's name.

A call takes one of five ways:

* eager on the CPU: one call into ``mmkern._C`` (bindings/direct.h), which checks, allocates and runs, and comes back
  to record a classic ``autograd.Function`` where a gradient is needed. 2 µs more than the kernel and its output. Not
  for ops whose checks say more than the kernel's signature.
* eager elsewhere, or with arguments that no kernel takes as they are: checked and arranged, then the same.
* a compiler or a dispatch mode is active, or a tensor subclass came: ``torch.ops.mmkern.<name>``.
* a functorch transform is active: a second Function with ``setup_context`` and ``vmap``.
* forward-mode AD is active, or the reference was chosen: the reference, differentiated by PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from mmkern import backends, memory, testing
from mmkern.backends import settings

from ._autograd import TransformableFunction, no_second_derivative, record, restore, save, saved, upstream
from ._checks import Arguments, Check, accumulation_dtype
from ._layouts import dense_last_axis, dense_rows, needs_order
from ._outputs import Result, Shape, in_tuple, indices, like, summed

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_DEVICES = ("cpu", "cuda")
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_AUTOGRAD_KEYS = tuple(
    map(torch._C._dispatch_key_parse, ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"))
)
_library = torch.library.Library("mmkern", "DEF")

Kind = Literal["vector", "grid", "matrix", "row_scalar", "scalar", "fixed", "option"]
Autocast = Literal["float32", "lower", "keep"]


@dataclass(frozen=True)
class Argument:
    """One argument of a schema.

    A *vector* is read row by row, all rows with one stride; so is a *matrix*, of an op that is not row-wise; a *grid*
    has a stride on each axis but the last; a *row scalar* has one number a row; a *scalar* is a 0-d tensor and may be a
    float in the public call. These take a gradient. A *fixed* tensor (a mask, lengths, a seed) takes none; an *option*
    is no tensor.
    """

    name: str
    kind: Kind
    is_optional: bool = False

    @property
    def is_broadcast(self) -> bool:
        """An optional grid, such as a bias: any of its axes may be 1."""
        return self.kind == "grid" and self.is_optional


@dataclass(eq=False)
class Op:
    """An op: callable with the arguments of its schema. See :func:`define`."""

    name: str
    family: str
    arguments: tuple[Argument, ...]
    reference: Callable[..., Any]
    outputs: tuple[Shape, ...]
    requires: Sequence[Check]
    arrange: Callable[[Arguments], Arguments]
    autocast: Autocast
    second_derivative: bool
    backward_reads_outputs: bool
    differentiable: int
    makes_gradients: bool
    from_indices: Callable[..., Result] | None
    is_checked_by_signature: bool
    decomposes: Callable[[Sequence[Any]], bool]
    _kernels: dict[tuple[str, bool, torch.dtype], backends.Kernel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = [a.kind for a in self.arguments]
        self.lead = next(i for i, kind in enumerate(kinds) if kind in ("vector", "grid", "matrix"))
        self.vectors = tuple(i for i, kind in enumerate(kinds) if kind in ("vector", "grid", "matrix", "row_scalar"))
        self.tensors = tuple(i for i, kind in enumerate(kinds) if kind not in ("fixed", "option"))
        self.scalars = tuple(i for i, kind in enumerate(kinds) if kind == "scalar")
        # Sums over many rows come back in the dtype of the sum.
        self.wide_gradients = (*self.scalars, *(i for i in self.tensors if self.arguments[i].is_broadcast))
        self.names = tuple(a.name for a in self.arguments)
        self._direct = backends.direct(self, memory.empty_strided, record) if self.is_checked_by_signature else None

    # ---- The call ----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Tensor:
        """The output; of several, a tuple (which unpacks as a Tensor does, for type checkers)."""
        if is_dynamo_compiling():
            prepared = self._prepare(args)
            return self.reference(*prepared) if self.decomposes(prepared) else self._registered(prepared)  # type: ignore[return-value]
        if self._direct is not None:
            out = self._direct(*args)
            if out is not NotImplemented:
                return out  # type: ignore[no-any-return]
        return self._routed(self._prepare(args))  # type: ignore[return-value]

    def _routed(self, args: Sequence[Any]) -> Result:
        lead = args[self.lead]
        if forward_ad._current_level >= 0:
            return self.reference(*args)  # type: ignore[no-any-return]
        if torch._C._functorch.maybe_current_level() is not None:
            return TransformableFunction.apply(self, *args)  # type: ignore[no-any-return]
        is_plain = all(args[i] is None or type(args[i]) in _PLAIN_TYPES for i in self.vectors)
        if not is_plain or torch._C._len_torch_dispatch_stack() or lead.device.type not in _DEVICES:
            return self._registered(args)
        if self._kernel(self.name, args) is None:
            return self.reference(*args)  # type: ignore[no-any-return]
        if not self.differentiable or not needs_gradient(*args):
            return self.run(*args)
        with torch.no_grad():
            out = self.run(*args)
        return record((out, *saved(self, args, out)), *args)  # type: ignore[no-any-return]

    def _prepare(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Checked, cast, broadcast and laid out as kernels want them."""
        if len(args) != len(self.arguments):
            raise TypeError(f"{self.name}: got {len(args)} arguments, expected {', '.join(self.names)}")
        lead = args[self.lead]
        may_cast = self.autocast != "keep" and isinstance(lead, Tensor) and lead.device.type in _DEVICES
        if may_cast and torch.is_autocast_enabled(lead.device.type):
            args = self._autocast(args)
        named = dict(zip(self.names, args, strict=True))
        for check in self.requires:
            check(self.name, named)
        named = self.arrange(named)
        for i in self.vectors:
            x = named[self.names[i]]
            if x is not None:
                named[self.names[i]] = _LAYOUTS[self.arguments[i].kind](x.resolve_neg())
        for i in self.scalars:
            value = named[self.names[i]]
            if isinstance(value, Tensor):
                named[self.names[i]] = value.to(accumulation_dtype(named[self.names[self.lead]].dtype))
        return tuple(named.values())

    def _autocast(self, args: Sequence[Any]) -> tuple[Any, ...]:
        lower = torch.get_autocast_dtype(args[self.lead].device.type)
        source, to = (_SIXTEEN_BITS, torch.float32) if self.autocast == "float32" else ((torch.float32,), lower)
        return tuple(a.to(to) if isinstance(a, Tensor) and a.dtype in source else a for a in args)

    # ---- Running a kernel --------------------------------------------------------------------------------------

    def run(self, *args: Any) -> Result:
        """The forward kernel, or the reference where there is none; no autograd."""
        kernel = self._kernel(self.name, args)
        if kernel is None:
            with torch.no_grad():
                found = in_tuple(self.reference(*args))
            laid_out = tuple(
                self._laid_out(self.lead, out, args[self.lead]) if self.has_dtype_of_inputs(slot) else out
                for slot, out in enumerate(found)
            )
            return _alone(laid_out)
        outs = self.empty_outputs(args)
        with torch.profiler.record_function(f"mmkern::{self.name}") if _profiling() else nullcontext():
            kernel(*args, *outs)
        if settings.verify:
            testing.verify_forward(self, args, outs)
        return _alone(outs)

    def empty_outputs(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """What the forward kernel writes."""
        return self._outputs(args, memory.empty)

    def _outputs(self, args: Sequence[Any], empty: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        lead = args[self.lead]
        return tuple(
            self._empty_like(self.lead, shape(args), lead, empty)
            if self.has_dtype_of_inputs(slot)
            else torch.empty(shape(args), dtype=self.output_dtype(slot, lead.dtype), device=lead.device)
            for slot, shape in enumerate(self.outputs)
        )

    def has_dtype_of_inputs(self, slot: int) -> bool:
        """Whether an output does; the others are indices, or in the dtype of sums."""
        output = self.outputs[slot]
        return isinstance(output, like) or (slot == 0 and not isinstance(output, summed | indices))

    def output_dtype(self, slot: int, dtype: torch.dtype) -> torch.dtype:
        """Of an output, beside inputs of ``dtype``."""
        if isinstance(self.outputs[slot], indices):
            return torch.int64
        return dtype if self.has_dtype_of_inputs(slot) else accumulation_dtype(dtype)

    def zeros_like_output(self, slot: int, args: Sequence[Any]) -> Tensor:
        lead: Tensor = args[self.lead]
        return lead.new_zeros(self.outputs[slot](args), dtype=self.output_dtype(slot, lead.dtype))

    def _empty_like(self, index: int, shape: Sequence[int], x: Tensor, empty: Callable[..., Tensor]) -> Tensor:
        """For a grid ``x``, argument ``index``, the axes of the new tensor lie in memory in the order of those of x."""
        if self.arguments[index].kind != "grid" or len(shape) != x.dim() or not needs_order(x):
            return empty(shape, x)
        *leading, last = range(x.dim())
        order = [*sorted(leading, key=x.stride, reverse=True), last]
        return empty([shape[axis] for axis in order], x).permute([order.index(axis) for axis in range(x.dim())])

    def _laid_out(self, index: int, found: Tensor, x: Tensor) -> Tensor:
        """What the reference found, where a kernel would have left it in memory."""
        like = self._empty_like(index, found.shape, x, lambda shape, _: found.new_empty(shape, device="meta"))
        if found.stride() == like.stride():
            return found
        return torch.empty_like(like, device=found.device).copy_(found)

    def run_backward(
        self, grads: Sequence[Tensor], wanted: Sequence[bool], args: Sequence[Any], outs: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        """Gradients for the tensor arguments that are wanted, in their order; None for the others.

        ``grads`` are those of the differentiable outputs; ``outs`` are all outputs, of an op whose backward kernel
        reads them.
        """
        if self.makes_gradients:
            return self.scaled(grads[0], wanted, args, outs)
        lead = args[self.lead]
        kernel = self._kernel(f"{self.name}_backward", args)
        if kernel is None:
            found = self.reference_gradients(grads, wanted, args, outs, create_graph=False)
            return [g if g is None else self._laid_out(i, g, args[i]) for i, g in zip(self.tensors, found, strict=True)]
        gradients = [
            self._empty_gradient(i, args[i], lead) if want else None
            for i, want in zip(self.tensors, wanted, strict=True)
        ]
        with torch.profiler.record_function(f"mmkern::{self.name}_backward") if _profiling() else nullcontext():
            kernel(*(self._dense_gradient(g, lead) for g in grads), *args, *outs, *gradients)
        if settings.verify:
            testing.verify_backward(self, grads, args, gradients)
        for slot, i in enumerate(self.tensors):
            gradient = gradients[slot]
            if gradient is not None and gradient.dtype != args[i].dtype:
                gradients[slot] = gradient.to(args[i].dtype)
        return gradients

    def scaled(
        self, grad: Tensor, wanted: Sequence[bool], args: Sequence[Any], outs: Sequence[Tensor], in_place: bool = False
    ) -> list[Tensor | None]:
        """The gradients that the forward has made of its first output, times the gradient of that."""
        if in_place and grad.is_cpu and grad.item() == 1:  # a pass over a large gradient saved
            return [gradient if want else None for gradient, want in zip(outs[1:], wanted, strict=True)]
        times = torch.Tensor.mul_ if in_place else torch.mul
        made = zip(self.tensors, outs[1:], wanted, strict=True)
        return [times(gradient, grad).to(args[i].dtype) if want else None for i, gradient, want in made]

    def reference_gradients(
        self,
        grads: Sequence[Tensor],
        wanted: Sequence[bool],
        args: Sequence[Any],
        outs: Sequence[Tensor] = (),
        *,
        create_graph: bool,
    ) -> list[Tensor | None]:
        """The same gradients by PyTorch's autograd of the reference; differentiable again with ``create_graph``.

        With ``outs``, of an op with indices, of what these have chosen.
        """
        with torch.enable_grad():
            # Views, so that an argument passed twice keeps two gradients.
            inputs = [
                args[i].view_as(args[i]) if want else args[i] for i, want in zip(self.tensors, wanted, strict=True)
            ]
            if not create_graph:
                inputs = [x.detach().requires_grad_() if want else x for x, want in zip(inputs, wanted, strict=True)]
            full = list(args)
            for i, x in zip(self.tensors, inputs, strict=True):
                full[i] = x
            formula = self.from_indices if outs and self.from_indices else self.reference
            results = in_tuple(formula(*full, *(outs if formula is self.from_indices else ())))[: self.differentiable]
            chosen = [x for x, want in zip(inputs, wanted, strict=True) if want]
            # An output may depend on none of those that are wanted.
            dependent = [(out, grad) for out, grad in zip(results, grads, strict=True) if out.requires_grad]
            roots, given = zip(*dependent, strict=True)
            found = iter(torch.autograd.grad(roots, chosen, given, create_graph=create_graph, allow_unused=True))
        return [next(found) if want else None for want in wanted]

    def _kernel(self, name: str, args: Sequence[Any]) -> backends.Kernel | None:
        lead = args[self.lead]
        if settings.default:
            found = self._kernels.get((name, lead.is_cpu, lead.dtype))
            if found is not None:
                return found
        backend = backends.choose(self, name, args)
        if backend is None:
            return None
        kernel = backend.find(self.family, name)
        if settings.default and backends.takes_every_call(backend, name):
            self._kernels[name, lead.is_cpu, lead.dtype] = kernel
        return kernel

    def _dense_gradient(self, grad: Tensor, lead: Tensor) -> Tensor:
        grad = grad.resolve_neg()
        if self.arguments[self.lead].kind == "grid":
            return dense_last_axis(grad) if grad.dim() == lead.dim() else grad.contiguous()
        return dense_rows(grad) if grad.shape[-1:] == lead.shape[-1:] and grad.dim() > 1 else grad.contiguous()

    def _empty_gradient(self, index: int, arg: Tensor, lead: Tensor) -> Tensor:
        if index in self.wide_gradients:
            return torch.empty(arg.shape, dtype=accumulation_dtype(lead.dtype), device=lead.device)
        return self._empty_like(index, arg.shape, arg, memory.empty)

    # ---- The registered op -------------------------------------------------------------------------------------

    def _registered(self, args: Sequence[Any]) -> Result:
        full = list(args)
        lead = full[self.lead]
        for i in self.scalars:
            if not isinstance(full[i], Tensor):
                # ones * value compiles once for all values; torch.full and torch.as_tensor once for each.
                full[i] = torch.ones((), dtype=accumulation_dtype(lead.dtype), device=lead.device) * full[i]
        result: Result = getattr(torch.ops.mmkern, self.name)(*full)
        return result

    def wanted(self, needs_input_grad: Sequence[bool]) -> list[bool]:
        return [needs_input_grad[i] for i in self.tensors]

    def split_backward(
        self, given: Sequence[Any], wanted: Sequence[bool]
    ) -> tuple[Sequence[Tensor], Sequence[bool], Sequence[Any], Sequence[Tensor]]:
        """What :meth:`run_backward` takes, from gradients, arguments and outputs in a row."""
        first, last = self.differentiable, self.differentiable + len(self.arguments)
        return given[:first], wanted, given[first:last], given[last:]

    def spread(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """One entry an argument, None for the options."""
        found = dict(zip(self.tensors, gradients, strict=True))
        return tuple(found.get(i) for i in range(len(self.arguments)))

    def vmap(self, info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Result, Any]:
        """Row-wise ops take the batch as one more leading axis; the others go through the reference."""
        scalars_batched = any(in_dims[i] is not None for i in self.scalars)
        if scalars_batched or not self.takes_leading_axes:
            found = torch.func.vmap(self.reference, in_dims=tuple(in_dims))(*args)
            return found, (0,) * len(found) if isinstance(found, tuple) else 0
        moved = list(args)
        for i in self.vectors:
            dim = in_dims[i]
            moved[i] = args[i].expand(info.batch_size, *args[i].shape) if dim is None else args[i].movedim(dim, 0)
        return self(*moved), 0

    @property
    def takes_leading_axes(self) -> bool:
        return "pairwise" not in self.name and self.arguments[self.lead].kind == "vector"


def _new_empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return like.new_empty(shape)


def _alone(found: tuple[Tensor, ...]) -> Result:
    return found[0] if len(found) == 1 else found


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "vector": dense_rows,
    "grid": dense_last_axis,
    "matrix": dense_rows,
    "row_scalar": Tensor.contiguous,
}
_profiling = torch._C._autograd._profiler_enabled


def needs_gradient(*args: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def may_make_gradients(*args: Tensor | None) -> bool:
    """Whether an op whose CPU kernel makes gradients in forward takes a call, in which some of ``args`` need theirs."""
    x = args[0]
    if x is None or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    if not needs_gradient(*args) or is_dynamo_compiling():
        return needs_gradient(*args)
    return torch._C._functorch.maybe_current_level() is None and forward_ad._current_level < 0


def named(op: str, raw: Op, call: Callable[..., Any], *args: Any, names: Mapping[str, str] | None = None) -> Any:
    """``call``, of ``raw``, with errors that name the public function and, where they are others, its arguments."""
    try:
        return call(*args)
    except (TypeError, ValueError) as error:
        raise renamed(error, op, raw, names or {}) from error


def renamed(error: Exception, op: str, raw: Op, names: Mapping[str, str]) -> Exception:
    """The same error of ``raw``, by the names of the public function."""
    message = str(error).removeprefix(f"{raw.name}: ")
    for inner, outer in names.items():
        message = re.sub(rf"\b{inner}\b", outer, message)
    return type(error)(f"{op}: {message}")


def _plain(args: Sequence[Any]) -> list[Any]:
    """What a registered op was given, without the subclass of a tensor that has no dispatch of its own."""
    return [a.as_subclass(Tensor) if isinstance(a, Tensor) and type(a) not in _PLAIN_TYPES else a for a in args]


def _autograd_allowed() -> AbstractContextManager[None]:
    """A registered op runs beneath autograd, which records nothing there: not what the reference needs either."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), excluded
    )
    return guard


# ---- Registration ----------------------------------------------------------------------------------------------------

_ARGUMENT = re.compile(r"(Tensor|Tensor\?|float|int|bool) (\w+)")
OPS: dict[str, Op] = {}


def define(
    schema: str,
    *,
    family: str,
    reference: Callable[..., Any],
    output: Shape | tuple[Shape, ...],
    requires: Sequence[Check],
    kinds: Mapping[str, Kind],
    arrange: Callable[[Arguments], Arguments] = lambda args: args,
    autocast: Autocast = "float32",
    second_derivative: bool = True,
    backward_reads_outputs: bool = False,
    differentiable: int | None = None,
    makes_gradients: bool = False,
    from_indices: Callable[..., Result] | None = None,
    is_checked_by_signature: bool = True,
    decomposes: Callable[[Sequence[Any]], bool] = lambda args: False,
) -> Op:
    """State an op once; returns the callable.

    Args:
        schema: ``"name(Tensor x, Tensor curvature, float eps) -> Tensor"``, as registered with torch.
        family: the name of the family's files on every floor.
        reference: the meaning, called with the arguments in order.
        output: the shape of the result, whose dtype is that of the first vector argument unless it is ``summed``; of
            several, those others that are not ``like`` an argument are ``indices``, or in the dtype of the sums.
        requires: checks, run in order where a call is not already what a kernel takes.
        kinds: which tensor arguments are not vectors (see :class:`Argument`).
        arrange: brings checked arguments to the shapes that kernels take (broadcasting).
        autocast: under autocast, run in float32, in autocast's own dtype, or in what came.
        second_derivative: the reference can be differentiated twice.
        backward_reads_outputs: the backward kernel takes the outputs after the arguments.
        differentiable: how many of the outputs have a gradient, the first ones; all by default. With none there is no
            backward.
        makes_gradients: the first output is a number, and the others, where the arguments ask for them, its gradients
            for the tensor arguments in their order: nothing is left for a backward kernel.
        from_indices: of an op with ``indices`` among its outputs, the differentiable ones once more, from the arguments
            and the outputs: what is differentiated in place of the reference, and shows whether the indices are right.
        is_checked_by_signature: what the CPU kernel's signature accepts, ``requires`` would accept too.
        decomposes: under torch.compile such arguments go through the reference, which Inductor fuses with what stands
            beside it: where that has been measured to be faster.
    """
    name, _, rest = schema.partition("(")
    arguments = tuple(
        Argument(argument, kinds.get(argument, "vector") if "Tensor" in kind else "option", kind == "Tensor?")
        for kind, argument in _ARGUMENT.findall(rest)
    )
    outputs = output if isinstance(output, tuple) else (output,)
    op = Op(
        name,
        family,
        arguments,
        reference,
        outputs,
        requires,
        arrange,
        autocast,
        second_derivative,
        backward_reads_outputs or makes_gradients or from_indices is not None,
        1 if makes_gradients else len(outputs) if differentiable is None else differentiable,
        makes_gradients,
        from_indices,
        is_checked_by_signature,
        decomposes,
    )
    OPS[name] = op
    _register(op, schema)
    return op


def _register(op: Op, schema: str) -> None:
    qualified = f"mmkern::{op.name}"

    def forward(*args: Any) -> Result:
        return op.run(*op._prepare(_plain(args)))

    def fake(*args: Any) -> Result:
        return _alone(op._outputs(args, _new_empty))

    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(op.name, forward, key)
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_vmap(qualified, op.vmap, lib=_library)
    if op.autocast == "float32":
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(qualified, device, torch.float32, lib=_library)
    if op.differentiable:
        _register_backward(op, schema[schema.index("(") + 1 : schema.index(")")])
    else:
        _library.impl(op.name, torch.library.fallthrough_kernel, "Autograd")


def _register_backward(op: Op, inputs: str) -> None:
    """``inputs``: of the op's schema."""
    grads = ", ".join(f"Tensor grad{i or ''}" for i in range(op.differentiable))
    saved = "".join(f", Tensor out{i or ''}" for i in range(len(op.outputs) * op.backward_reads_outputs))
    results = ", ".join(["Tensor"] * len(op.tensors))
    backward_name = f"{op.name}_backward"
    qualified, qualified_backward = f"mmkern::{op.name}", f"mmkern::{backward_name}"

    def backward(*given: Any) -> Result:
        grads, wanted, args, outs = op.split_backward(_plain(given[:-1]), given[-1])
        with _autograd_allowed():
            gradients = op.run_backward(grads, wanted, op._prepare(args), outs)
        return _alone(
            tuple(
                grads[0].new_empty(0) if g is None else g.to(args[i].dtype)
                for i, g in zip(op.tensors, gradients, strict=True)
            )
        )

    def fake_backward(*given: Any) -> Result:
        grads, wanted, args, _ = op.split_backward(given[:-1], given[-1])
        return _alone(
            tuple(
                op._empty_like(i, args[i].shape, args[i], _new_empty) if want else grads[0].new_empty(0)
                for i, want in zip(op.tensors, wanted, strict=True)
            )
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
        save(ctx, op, inputs, output)

    def autograd(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = op.wanted(ctx.needs_input_grad)
        _, args, outs = restore(ctx)
        found = getattr(torch.ops.mmkern, backward_name)(*upstream(op, args, given), *args, *outs, wanted)
        return op.spread([g if want else None for g, want in zip(in_tuple(found), wanted, strict=True)])

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(no_second_derivative(op))

    _library.define(f"{backward_name}({grads}, {inputs}{saved}, bool[{len(op.tensors)}] wanted) -> ({results})")
    for key in ("CPU", "CUDA"):
        _library.impl(backward_name, backward, key)
    torch.library.register_fake(qualified_backward, fake_backward, lib=_library)
    torch.library.register_autograd(qualified, autograd, setup_context=setup_context, lib=_library)
    torch.library.register_autograd(qualified_backward, refuse, lib=_library)
