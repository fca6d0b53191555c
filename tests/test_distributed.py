"""Ring attention in processes of their own, joined by gloo, against attention to all keys at once."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist

import mmkern
from mmkern import ops
from mmkern.distributed import ring_cross_attention

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

TOLERANCES = {torch.float64: 1e-13, torch.bfloat16: 2e-2}

# Keys of each process.
SHARDS = {
    "one": [7],
    "two": [6, 6],
    "two, uneven": [9, 2],
    "four": [5, 5, 5, 5],
    "four, uneven, one empty": [1, 0, 8, 3],
    "three, verified": [3, 4, 2],  # each call is that of a shard alone
}
SOFTCAPS = {"two": 2.0}
WORLD = max(map(len, SHARDS.values()))


def problem(shards: list[int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """For each process three queries; keys of all, and a mask that hides the first process's shard from one batch."""
    g = torch.Generator().manual_seed(0)
    keys = sum(shards)
    sizes = [(2, 4, 3 * len(shards), 8), (2, 2, keys, 8), (2, 2, keys, 5), (2, 4, 3 * len(shards), 5)]
    tensors = [torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in sizes]
    mask = torch.rand(2, keys, generator=g) < 0.8
    mask[0, : shards[0]] = False
    mask[1] = False if len(shards) == 2 else mask[1]  # a query that sees no key anywhere
    return tensors, mask


def attend_to_all(shards: list[int], dtype: torch.dtype, softcap: float | None) -> list[Tensor]:
    (q, k, v, grad), mask = problem(shards, dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = ops.cross_attention(*leaves, key_mask=mask, softcap=softcap, return_lse=True)
    loss = (out * grad).sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def process(rank: int, store: str) -> None:
    """Each problem in a group of the first processes, or of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    found = {}
    for name, shards in SHARDS.items():
        group = dist.new_group(list(range(len(shards)))) if len(shards) < WORLD else None
        if rank < len(shards):
            with mmkern.verify() if "verified" in name else nullcontext():
                found[name] = [attend_in_ring(rank, shards, dtype, SOFTCAPS.get(name), group) for dtype in TOLERANCES]
    torch.save(found, f"{store}-{rank}")
    dist.destroy_process_group()


def attend_in_ring(
    rank: int, shards: list[int], dtype: torch.dtype, softcap: float | None, group: dist.ProcessGroup | None
) -> list[Tensor]:
    (q, k, v, grad), mask = problem(shards, dtype)
    mine = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
    rows = slice(3 * rank, 3 * rank + 3)
    leaves = [x.requires_grad_() for x in (q[:, :, rows], k[:, :, mine], v[:, :, mine])]
    out, lse = ring_cross_attention(*leaves, group, key_mask=mask[:, mine], softcap=softcap, return_lse=True)
    loss = (out * grad[:, :, rows]).sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.slow
def test_ring(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    multiprocessing.spawn(process, (store,), nprocs=WORLD)
    of_processes = [torch.load(f"{store}-{rank}") for rank in range(WORLD)]
    for name, shards in SHARDS.items():
        for at, (dtype, tolerance) in enumerate(TOLERANCES.items()):
            parts = zip(*(found[name][at] for found in of_processes[: len(shards)]), strict=True)
            wanted = attend_to_all(shards, dtype, SOFTCAPS.get(name))
            for what, part, expected in zip(("out", "lse", "grad q", "grad k", "grad v"), parts, wanted, strict=True):
                label = f"{name}, {what}, {dtype}: "
                torch.testing.assert_close(
                    torch.cat(part, 2), expected, rtol=0, atol=tolerance, msg=lambda m, label=label: label + m
                )


def test_without_a_process_group() -> None:
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="ring_cross_attention: there is no process group"):
        ring_cross_attention(q, q, q)
