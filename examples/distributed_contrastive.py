"""Two towers trained with CLIP's loss over a batch that several processes hold, beside one process with all of it.

    torchrun --nproc-per-node 2 examples/distributed_contrastive.py

Or by itself, in one process. Draws distributed_contrastive.png with what ``pip install 'mmkern[demo]'`` brings.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmkern import ops
from mmkern.extras import require

BATCH = 127  # of all processes, whose shards then differ in size
STEPS = 120
SHOWN = 20
LATENT, SEEN, EMBEDDED = 8, 32, 16


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [[nn.Linear(SEEN, 64), nn.GELU(), nn.Linear(64, EMBEDDED)] for _ in range(2)]
        self.image, self.text = (nn.Sequential(*tower) for tower in layers)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(image), self.text(text), self.log_scale.exp()


def pairs(seed: int) -> tuple[Tensor, Tensor]:
    """Two noisy views of the same latent points."""
    views = torch.randn(2, LATENT, SEEN, generator=torch.Generator().manual_seed(STEPS + 2))
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(BATCH, LATENT, generator=g)
    image, text = torch.tanh(points @ views) + 0.1 * torch.randn(2, BATCH, SEEN, generator=g)
    return image, text


def train(group: dist.ProcessGroup | None) -> tuple[list[float], list[float], list[Tensor]]:
    """Losses and accuracies of all steps, and the gradients of the first; alone without a group."""
    torch.manual_seed(0)
    towers: nn.Module = Towers()
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    if group:
        towers = DistributedDataParallel(towers, process_group=group)
    optimizer = torch.optim.Adam(towers.parameters(), 2e-3)
    losses, accuracies, first = [], [], []
    for step in range(STEPS + 1):
        shard = [view.tensor_split(size)[rank] for view in pairs(step)]
        loss = ops.info_nce_loss(*towers(*shard), normalize=True, group=group)
        optimizer.zero_grad()
        (loss * size).backward()  # DDP averages over the processes; the gradient is the sum
        first = first or [p.grad.clone() for p in towers.parameters()]
        optimizer.step()
        losses.append(loss.item())
        accuracies.append(accuracy(towers))
    return losses, accuracies, first


@torch.no_grad()
def accuracy(towers: nn.Module) -> float:
    """How many held-out texts are the nearest of their image."""
    image, text, _ = getattr(towers, "module", towers)(*pairs(STEPS + 1))
    nearest = (nn.functional.normalize(image) @ nn.functional.normalize(text).T).argmax(1)
    return (nearest == torch.arange(BATCH)).float().mean().item()


def report(size: int, joined: list[float], alone: list[float], accuracies: list[float], gap: float) -> None:
    table = require("rich.table", "rich", "demo").Table(title=f"{BATCH} pairs in {size} process{'es' * (size > 1)}")
    for heading in ("step", "loss, in a ring", "loss, alone", "difference", "nearest text right"):
        table.add_column(heading, justify="right")
    for step in range(0, STEPS + 1, SHOWN):
        a, b = joined[step], alone[step]
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.0e}", f"{accuracies[step]:.0%}")
    console = require("rich.console", "rich", "demo").Console()
    console.print(table)
    console.print(f"Gradients of the first step differ by at most {gap:.0e} of the largest entry.")


def draw(size: int, joined: list[float], alone: list[float], accuracies: list[float], path: Path) -> None:
    figure = require("matplotlib.figure", "matplotlib", "demo").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(joined, color="#3b6fb6", linewidth=4, alpha=0.5, label=f"loss, in a ring of {size}")
    axes.plot(alone, "--", color="#22262b", linewidth=1.2, label="loss, alone")
    axes.plot([], color="#e07b1f", label="nearest text right")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None), title="CLIP's loss of a batch that processes share")
    axes.legend(frameon=False, loc="center right")
    share = axes.twinx()
    share.plot(accuracies, color="#e07b1f")
    share.set(ylim=(0, 1), ylabel="share of held-out images")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, default=Path("distributed_contrastive.png"))
    path = parser.parse_args().picture
    by_itself = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **by_itself)
    joined, accuracies, first = train(dist.group.WORLD)
    if dist.get_rank() == 0:
        alone, _, expected = train(None)
        gap = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(first, expected, strict=True))
        report(dist.get_world_size(), joined, alone, accuracies, gap)
        draw(dist.get_world_size(), joined, alone, accuracies, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
