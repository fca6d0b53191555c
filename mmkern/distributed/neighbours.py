"""The ring in which shards go from process to process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch import distributed as dist


class Neighbours:
    """The place of this process in the ring, and what each process said of its shard.

    Args:
        group: the processes; all by default.
        described: whole numbers, as many in each process; the first is the size of its shard along ``axis``.
        axis: along which shards differ.
        device: where the shards are.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, described: Sequence[int], axis: int, device: torch.device
    ) -> None:
        self.group, self.axis = group, axis
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.next, self.previous = (members[(self.rank + step) % self.size] for step in (1, -1))
        mine = torch.tensor(described, dtype=torch.int64, device=device)
        found = [torch.zeros_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group)
        self.described: list[list[int]] = torch.stack(found).tolist()
        self.sizes = [size for size, *_ in self.described]

    def visits(self, shard: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Each shard once, this process's first; the next one is on its way while one is held.

        What came two steps before is overwritten: only two shards of others have room.
        """
        rooms = [self._room(shard) for _ in range(min(2, self.size - 1))]
        for step in range(self.size):
            receive = self.pass_on(shard, step, rooms[step % 2]) if step + 1 < self.size else None
            yield step, shard
            if receive is not None:
                shard = receive()

    def pass_on(
        self, held: Sequence[Tensor], step: int, room: Sequence[Tensor] | None = None
    ) -> Callable[[], list[Tensor]]:
        """Send what is held at ``step``; the result waits for what is held at the next."""
        if self.size == 1:
            return at_hand(held)
        shapes = [self._shape(x, self.sizes[(self.rank - step - 1) % self.size]) for x in held]
        if room is None:
            received = [x.new_empty(shape) for x, shape in zip(held, shapes, strict=True)]
        else:
            received = [x[: shape.numel()].view(shape) for x, shape in zip(room, shapes, strict=True)]
        sends = [dist.P2POp(dist.isend, x, self.next, self.group) for x in held if x.numel()]
        receipts = [dist.P2POp(dist.irecv, x, self.previous, self.group) for x in received if x.numel()]
        pending = dist.batch_isend_irecv([*sends, *receipts]) if sends or receipts else []

        def wait() -> list[Tensor]:
            for work in pending:
                work.wait()
            return received

        return wait

    def _room(self, shard: Sequence[Tensor]) -> list[Tensor]:
        """For the largest shard."""
        return [x.new_empty(self._shape(x, max(self.sizes)).numel()) for x in shard]

    def _shape(self, x: Tensor, size: int) -> torch.Size:
        return torch.Size([*x.shape[: self.axis], size, *x.shape[self.axis + 1 :]])


def at_hand(held: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """What ``pass_on`` returns, of tensors that need not travel."""
    return lambda: list(held)
