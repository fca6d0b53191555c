"""Contrastive losses in processes of their own, joined by gloo, against one process with the whole batch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mmkern
from mmkern import ops
from mmkern.distributed.neighbours import Neighbours

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

WORLD = 4
WIDTH = 6
NEGATIVES = 3
SHORT = timedelta(seconds=3)
BOUND = 30.0  # seconds until a missing process is an error

# Of the largest entry, or of FLOOR.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}
FLOOR = 1e-2

Loss = Callable[..., Tensor]  # of a batch, of hard negatives, with group and reduction


@dataclass
class Batch:
    """Rows of some processes; ``upstream`` is the gradient of each loss where there is no reduction."""

    x: Tensor
    y: Tensor
    hard_negatives: Tensor
    upstream: Tensor
    verbs: Tensor
    nouns: Tensor
    forget: Tensor
    numbers: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, mine: slice, hard_negatives: Tensor) -> Batch:
        of_rows = (getattr(self, name)[mine] for name in ("upstream", "verbs", "nouns", "forget"))
        return Batch(self.x[mine], self.y[mine], hard_negatives, *of_rows)


def info_nce(batch: Batch, **options: Any) -> Tensor:
    return ops.info_nce_loss(batch.x, batch.y, batch.numbers["scale"], **options)


def info_nce_with_everything(batch: Batch, **options: Any) -> Tensor:
    options |= {"label_smoothing": 0.1, "normalize": True, "hard_negatives": batch.hard_negatives}
    return info_nce(batch, **options)


def siglip(batch: Batch, *, reduction: str, **options: Any) -> Tensor:
    return ops.siglip_loss(batch.x, batch.y, batch.numbers["scale"], batch.numbers["bias"], **options)


def lorentz(batch: Batch, **options: Any) -> Tensor:
    numbers = batch.numbers["curvature"], batch.numbers["scale"]
    return ops.lorentz_contrastive_loss(batch.x, batch.y, *numbers, entailment_weight=0.2, **options)


def ego_nce(batch: Batch, **options: Any) -> Tensor:
    return ops.ego_nce_loss(batch.x, batch.y, batch.numbers["temperature"], batch.verbs, batch.nouns, **options)


def ego_nce_outside(batch: Batch, **options: Any) -> Tensor:
    batch = replace(batch, verbs=ops.pack_labels(batch.verbs))
    return ego_nce(batch, form="outside", normalize=True, **options)


WEIGHTS = {"alpha": 0.7, "beta": 0.4, "gamma": 1.3}


def calibration(batch: Batch, *, reduction: str, **options: Any) -> Tensor:
    return ops.alignment_calibration_loss(
        batch.x, batch.y, batch.forget, logit_scale=batch.numbers["scale"], **WEIGHTS, **options
    )


def lorentz_calibration(batch: Batch, **options: Any) -> Tensor:
    return calibration(batch, geometry="lorentz", curvature=batch.numbers["curvature"], margin=3.0, **options)


def all_forgotten(batch: Batch, **options: Any) -> Tensor:
    return lorentz_calibration(replace(batch, forget=torch.ones_like(batch.forget)), **options)


@dataclass(frozen=True)
class Problem:
    loss: Loss
    rows: tuple[int, ...]
    reduction: str = "mean"
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    frozen: tuple[str, ...] = ()  # what needs no gradient

    def __str__(self) -> str:
        return f"{self.loss.__name__}, rows {self.rows}, {self.reduction}, frozen {self.frozen}"


ONE, TWO, EVEN, UNEVEN = (5,), (5, 2), (3, 3, 3, 3), (4, 0, 1, 6)
NEW = (ego_nce, ego_nce_outside, calibration, lorentz_calibration)
PROBLEMS = [
    *(Problem(loss, rows) for loss in NEW for rows in (TWO, UNEVEN, (0, 1))),
    *(Problem(ego_nce_outside, UNEVEN, kind) for kind in ("sum", "none")),
    *(Problem(loss, (2, 3, 0, 2), around=mmkern.verify) for loss in (ego_nce_outside, lorentz_calibration)),
    Problem(ego_nce, UNEVEN, "none", lambda: mmkern.use_backend("reference")),
    *(Problem(ego_nce, UNEVEN, frozen=frozen) for frozen in (("y",), ("x", "temperature"))),
    Problem(all_forgotten, UNEVEN),
    *(Problem(loss, rows) for loss in (info_nce, siglip, lorentz) for rows in (ONE, TWO, EVEN, UNEVEN)),
    *(
        Problem(loss, UNEVEN, kind)
        for loss in (info_nce, info_nce_with_everything, lorentz)
        for kind in ("sum", "none")
    ),
    Problem(info_nce_with_everything, TWO),
    Problem(info_nce_with_everything, UNEVEN),
    *(Problem(loss, (0, 1)) for loss in (info_nce, siglip, lorentz)),  # no pair apart from the positive one
    *(Problem(loss, (2, 3, 0, 2), around=mmkern.verify) for loss in (info_nce, siglip, lorentz)),
    Problem(info_nce, EVEN, "none", lambda: mmkern.use_backend("reference")),
    Problem(lorentz, UNEVEN, around=lambda: torch.autocast("cpu", torch.bfloat16)),
    *(Problem(loss, UNEVEN, frozen=frozen) for loss in (info_nce, siglip) for frozen in (("y",), ("x", "scale"))),
]


def whole_batch(rows: tuple[int, ...], dtype: torch.dtype) -> Batch:
    """Hard negatives ``[process, K, D]``. Columns of x and y are strided."""
    g = torch.Generator().manual_seed(sum(rows))
    x, y = torch.randn(2, sum(rows), 2 * WIDTH, generator=g, dtype=torch.float64).to(dtype)[..., ::2]
    hard_negatives = torch.randn(len(rows), NEGATIVES, WIDTH, generator=g, dtype=torch.float64).to(dtype)
    upstream = torch.randn(sum(rows), generator=g, dtype=torch.float64)
    verbs, nouns = (torch.rand(sum(rows), classes, generator=g) < 0.3 for classes in (3, 70))
    return Batch(x, y, hard_negatives, upstream, verbs, nouns, torch.rand(sum(rows), generator=g) < 0.4)


def gradients(problem: Problem, batch: Batch, **options: Any) -> dict[str, Tensor]:
    """The loss, and its gradients for all that a batch has and that is not frozen."""
    wide = torch.promote_types(batch.x.dtype, torch.float32)
    values = {"scale": 4.0, "bias": -1.5, "curvature": 0.7, "temperature": 0.4}
    batch.numbers = {name: torch.tensor(value, dtype=wide, requires_grad=True) for name, value in values.items()}
    leaves = {name: getattr(batch, name).detach().requires_grad_() for name in ("x", "y", "hard_negatives")}
    batch = replace(batch, **leaves)
    leaves |= batch.numbers
    for name in problem.frozen:
        leaves.pop(name).requires_grad_(False)
    value = problem.loss(batch, reduction=problem.reduction, **options)
    with torch.no_grad():
        torch.testing.assert_close(problem.loss(batch, reduction=problem.reduction, **options), value)
    upstream = batch.upstream.to(value.dtype) if value.dim() else value.new_tensor(0.5)
    found = torch.autograd.grad(value, list(leaves.values()), upstream, materialize_grads=True)
    return {"loss": value.detach(), **dict(zip(leaves, found, strict=True))}


def in_one_process(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    batch = whole_batch(problem.rows, dtype)
    counts = torch.tensor(problem.rows)
    batch.hard_negatives = batch.hard_negatives.repeat_interleave(counts, 0)
    found = gradients(problem, batch)
    found["hard_negatives"] = torch.stack([part.sum(0) for part in found["hard_negatives"].split(problem.rows)])
    return found


def in_its_process(problem: Problem, dtype: torch.dtype, rank: int, group: Any) -> dict[str, Tensor]:
    whole = whole_batch(problem.rows, dtype)
    mine = slice(sum(problem.rows[:rank]), sum(problem.rows[: rank + 1]))
    batch = whole.rows(mine, whole.hard_negatives[rank])
    with problem.around():
        return gradients(problem, batch, group=group)


# ---- Towers ----------------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        towers = (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, WIDTH)) for _ in range(2))
        self.image, self.text = towers
        self.log_scale = nn.Parameter(torch.ones(1))  # FSDP shards no 0-d parameters

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(image), self.text(text), self.log_scale.exp()[0]


def pairs(rank: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(rank)
    return list(torch.randn(2, 2 + rank, 4, generator=g, dtype=torch.float64))


def towers_alone(*batches: list[int]) -> list[Tensor]:
    """Gradients of the mean of the losses of ``batches``, each of some processes."""
    towers = Towers().double()
    losses = [ops.info_nce_loss(*towers(*map(torch.cat, zip(*map(pairs, ranks), strict=True)))) for ranks in batches]
    (sum(losses) / len(losses)).backward()
    return [p.grad for p in towers.parameters()]


def towers_sharded(rank: int) -> list[Tensor]:
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    towers = Towers().double()
    for part in (towers.image, towers.text, towers):
        fully_shard(part, mesh=mesh)
    loss = ops.info_nce_loss(*towers(*pairs(rank)), group=mesh.get_group())
    (loss * WORLD).backward()
    return [p.grad.full_tensor() for p in towers.parameters()]


def towers_replicated(rank: int, group: dist.ProcessGroup) -> list[Tensor]:
    towers = DistributedDataParallel(Towers().double())
    loss = ops.info_nce_loss(*towers(*pairs(rank)), group=group)
    (loss * group.size()).backward()
    return [p.grad for p in towers.parameters()]


# ---- Failures --------------------------------------------------------------------------------------------------------


def refusals(rank: int) -> dict[str, str]:
    """What each process is told where processes do not fit together, and where it is in no group."""
    x = torch.ones(2, 4 + (rank == 1))
    labels = torch.ones(2, 1 + (rank == 1), dtype=torch.int64)
    apart = dist.new_group([0])
    calls = {
        "width": lambda: ops.info_nce_loss(x, x, 1.0, group=dist.group.WORLD),
        "need": lambda: ops.siglip_loss(x, x[:, :4], 1.0, 0.0, group=dist.group.WORLD),
        "words": lambda: ops.ego_nce_loss(x, x, 1.0, labels, labels, group=dist.group.WORLD),
        "member": lambda: ops.lorentz_contrastive_loss(x, x, 1.0, 1.0, group=apart),
    }
    said = {}
    for name, call in calls.items():
        x = torch.ones(2, 4, requires_grad=rank == 2 and name == "need") if name != "width" else x
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    return said


def seconds_to_error(call: Callable[[], object]) -> float:
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        call()
    return time.monotonic() - start


def with_missing_processes(rank: int, group: dist.ProcessGroup, store: str) -> list[float]:
    """Of the first two, the second ends after the loss; of the last two, the last never comes."""
    x = torch.ones(2, 4, requires_grad=True)
    if rank < 2:
        loss = ops.info_nce_loss(x, x, 1.0, group=group)
        if rank == 1:
            os._exit(0)
        return [
            seconds_to_error(loss.backward),
            seconds_to_error(lambda: ops.siglip_loss(x, x, 1.0, 0.0, group=group)),
        ]
    if rank == 2:
        return [seconds_to_error(lambda: ops.info_nce_loss(x, x, 1.0, group=group))]
    deadline = time.monotonic() + BOUND
    while not Path(f"{store}-2-missing").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return []


# ---- The processes ---------------------------------------------------------------------------------------------------


def blocks_met(rank: int) -> tuple[list[int], int]:
    """Whose block comes at each step, and how many places those of others take."""
    rows = rank + 1
    ring = Neighbours(None, [rows], 0, torch.device("cpu"))
    mine = torch.full((rows, 3), float(rank))
    owners, places = [], set()
    for _, (held,) in ring.visits([mine]):
        assert held.shape == (held[0, 0].int() + 1, 3)
        assert (held == held[0, 0]).all()
        owners.append(int(held[0, 0]))
        if held is not mine:
            places.add(held.untyped_storage().data_ptr())
    return owners, len(places)


def process(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, WORLD)} | {WORLD: dist.group.WORLD}
    halves = [dist.new_group([2 * half, 2 * half + 1]) for half in range(2)]
    short = [dist.new_group([2 * half, 2 * half + 1], timeout=SHORT) for half in range(2)]
    found: dict[str, Any] = {}
    for at, problem in enumerate(PROBLEMS):
        if rank < len(problem.rows):
            group = groups[len(problem.rows)]
            found[str(at)] = [in_its_process(problem, dtype, rank, group) for dtype in TOLERANCES]
    found["sharded"] = towers_sharded(rank)
    found["replicated"] = towers_replicated(rank, dist.group.WORLD)
    found["in halves"] = towers_replicated(rank, halves[rank // 2])
    found["refusals"] = refusals(rank)
    found["blocks"] = blocks_met(rank)
    torch.save(found, f"{store}-{rank}")
    dist.barrier()
    missing = with_missing_processes(rank, short[rank // 2], store)
    torch.save(missing, f"{store}-{rank}-missing")
    os._exit(0)  # a group with a missing process cannot be taken down


@pytest.mark.slow
def test_processes(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    multiprocessing.spawn(process, (store,), nprocs=WORLD)
    of_processes = [torch.load(f"{store}-{rank}") for rank in range(WORLD)]
    for at, problem in enumerate(PROBLEMS):
        for step, dtype in enumerate(TOLERANCES):
            parts = [found[str(at)][step] for found in of_processes[: len(problem.rows)]]
            check_problem(problem, dtype, parts)
    check_towers(of_processes)
    check_refusals([found["refusals"] for found in of_processes])
    for rank, found in enumerate(of_processes):
        assert found["blocks"] == ([(rank - step) % WORLD for step in range(WORLD)], 2)
    seconds = [torch.load(f"{store}-{rank}-missing") for rank in (0, 2)]
    assert [len(found) for found in seconds] == [2, 1]
    assert max(map(max, seconds)) < BOUND


def check_problem(problem: Problem, dtype: torch.dtype, parts: list[dict[str, Tensor]]) -> None:
    for name, expected in in_one_process(problem, dtype).items():
        of_name = [part[name] for part in parts]
        if name == "hard_negatives":
            got = torch.stack(of_name)
        elif name in ("x", "y") or expected.dim():
            got = torch.cat(of_name)
        elif name == "loss":
            got = of_name[0]
            assert all(torch.equal(got, other) for other in of_name)
        else:
            got = torch.stack(of_name).sum(0)
        bound = TOLERANCES[dtype] * max(expected.abs().max().item(), FLOOR)
        label = f"{problem}: {name}, {dtype}: "
        torch.testing.assert_close(got, expected, rtol=0, atol=bound, msg=lambda m, label=label: label + m)


def check_towers(of_processes: list[dict[str, Any]]) -> None:
    """FSDP and DDP average: with the loss times the size of its group, they give the gradients of one process."""
    everyone = list(range(WORLD))
    together, in_halves = towers_alone(everyone), towers_alone(everyone[:2], everyone[2:])
    for found in of_processes:
        for way, expected in (("sharded", together), ("replicated", together), ("in halves", in_halves)):
            torch.testing.assert_close(found[way], expected, rtol=0, atol=1e-13, msg=lambda m, way=way: f"{way}: {m}")


def check_refusals(said: list[dict[str, str]]) -> None:
    for rank in range(WORLD):
        odd = 0 if rank == 1 else 1  # the first process that differs from this one
        assert said[rank]["width"].startswith(f"info_nce_loss: x and y of process {odd} have {5 if odd else 4} columns")
        odd = 0 if rank == 2 else 2
        expected = f"siglip_loss: x and y of process {odd} have 4 columns, dtype torch.float32 and gradients for "
        assert said[rank]["need"].startswith(expected + ("x, y, expected" if odd else "nothing, expected"))
        odd = 0 if rank == 1 else 1
        expected = (
            f"ego_nce_loss: x and y of process {odd} have 4 columns, labels of {odd + 1} and {odd + 1} words, dtype"
        )
        assert said[rank]["words"].startswith(expected)
        if rank:
            assert said[rank]["member"].startswith("lorentz_contrastive_loss: group is without this process")


def test_a_positive_mask_is_of_one_process() -> None:
    x = torch.ones(3, 4)
    mask = torch.eye(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="info_nce_loss: positive_mask is a Tensor, expected None beside a group"):
        ops.info_nce_loss(x, x, 1.0, positive_mask=mask, group="group")  # type: ignore[arg-type]


def test_compiles_in_parts() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x, y = torch.randn(2, 5, 4)
        x.requires_grad_()
        compiled = torch.compile(
            lambda x, y: ops.info_nce_loss(x, y, 2.0, label_smoothing=0.1, group=dist.group.WORLD), backend="eager"
        )
        found = torch.autograd.grad(compiled(x, y), x)
        torch.testing.assert_close(found, torch.autograd.grad(ops.info_nce_loss(x, y, 2.0, label_smoothing=0.1), x))
    finally:
        dist.destroy_process_group()


def test_group_is_named() -> None:
    x = torch.ones(3, 4)
    with pytest.raises(TypeError, match=r"siglip_loss: group is str, expected a torch.distributed.ProcessGroup"):
        ops.siglip_loss(x, x, 1.0, 0.0, group="group")  # type: ignore[arg-type]
