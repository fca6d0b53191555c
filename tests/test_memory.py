"""The pool behind the outputs of CPU ops: its blocks, its bounds, and tensors that behave as any other."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, Dataset

from mmkern import memory

ROOT = Path(__file__).parents[1]
MB = 1 << 20
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]
LIKE = torch.empty(0)

needs_pool = pytest.mark.skipif(memory._pool is None, reason="mmkern._C is not built")
pytestmark = needs_pool


@pytest.fixture(autouse=True)
def _fresh_pool() -> Iterator[None]:
    memory.release()
    limit = memory.stats().limit
    yield
    memory._pool.set_limit(limit)


def pooled(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    before = memory.stats()
    x = memory.empty(shape, torch.empty(0, dtype=dtype))
    assert memory.stats().in_use > before.in_use
    return x


def run(code: str, **env: str) -> str:
    """The output of ``code`` in a process of its own; it must end well and without a word on stderr."""
    package = Path(memory.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"} | env
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


# ---- Blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1 << 20,), (3, 5, 99991), (1, 1024, 1, 1031), (2,) * 11 + (1 << 10,), (2,) * 20])
def test_is_the_tensor_that_was_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = memory.empty(shape, torch.empty(0, dtype=dtype))
    expected = torch.empty(shape, dtype=dtype)
    assert (x.shape, x.stride(), x.dtype, x.device) == (shape, expected.stride(), dtype, expected.device)
    assert x.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    assert (x.data_ptr() % (2 * MB) == 0) == (len(shape) <= 12)  # the pool's tensors have up to 12 axes
    assert torch.equal(x.fill_(3), expected.fill_(3))


def test_uses_a_block_again() -> None:
    x = pooled(1 << 20)
    address = x.data_ptr()
    row = x[5:]
    del x
    assert pooled(1 << 20).data_ptr() != address  # a view keeps the block
    del row
    before = memory.stats()
    assert pooled(1 << 19, dtype=torch.float64).data_ptr() == address
    after = memory.stats()
    assert (after.reused, after.mapped) == (before.reused + 1, before.mapped)


def test_one_size_class_serves_near_sizes() -> None:
    address = pooled(5_000_000).data_ptr()
    assert pooled(4_800_000).data_ptr() == address


@pytest.mark.parametrize("allocate", [memory.empty_strided, memory._empty_strided])
@pytest.mark.parametrize("shape", [(), (5,), (3, 0, 2), (4, 6)])
def test_what_allocates_small_outputs(allocate: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    like = LIKE.new_empty(shape, dtype=torch.bfloat16)
    with torch.device("meta"):
        x = allocate(shape, like.stride(), like.dtype)
    assert (x.shape, x.stride(), x.dtype, x.device) == (like.shape, like.stride(), like.dtype, like.device)
    assert x.resize_(100).untyped_storage().resizable()


@pytest.mark.parametrize("shape", [(), (0,), (7, 0, 1 << 20), (64, 32), (MB // 4 - 1,)])
def test_small_and_empty_outputs_come_from_torch(shape: tuple[int, ...]) -> None:
    before = memory.stats()
    assert memory.empty(shape, LIKE).shape == shape
    assert memory.stats() == before


WRAPS = (1 << 62) + (1 << 18)  # four times this is 2^20 in 64 bits


@pytest.mark.parametrize(
    "shape", [(-1, 1 << 30), (1 << 62,), (1 << 40, 1 << 40), (WRAPS,), (WRAPS, 4), (1 << 31, 0, -5), (1 << 70,)]
)
def test_raises_as_torch_does(shape: tuple[int, ...]) -> None:
    with pytest.raises((RuntimeError, TypeError)) as torchs:
        LIKE.new_empty(shape)
    with pytest.raises(torchs.type) as ours:
        memory.empty(shape, LIKE)
    assert str(ours.value).splitlines()[0].startswith(str(torchs.value).splitlines()[0][:25])
    assert memory.stats().in_use == 0


@pytest.mark.parametrize(
    "like",
    [
        torch.empty(0, dtype=torch.complex64),
        torch.empty(0, device="meta"),
        FakeTensorMode().from_tensor(torch.empty(1)),
        nn.Parameter(torch.empty(1)),
        torch.empty(1, requires_grad=True),
    ],
    ids=["dtype", "meta", "fake", "parameter", "requires_grad"],
)
def test_follows_like(like: Tensor) -> None:
    x = memory.empty((1 << 20,), like)
    assert (x.dtype, x.device.type, x.requires_grad) == (like.dtype, like.device.type, False)


def test_live_tensors_never_overlap() -> None:
    shuffle = random.Random(0)
    held: list[tuple[Tensor, int]] = []
    for stamp in range(600):
        x = memory.empty((shuffle.randrange(1, 4 * MB),), LIKE)
        x[0] = x[-1] = stamp
        held.append((x, stamp))
        while len(held) > shuffle.randrange(8):
            y, expected = held.pop(shuffle.randrange(len(held)))
            assert y[0] == y[-1] == expected
    del x, y
    held.clear()
    assert memory.stats().in_use == 0


# ---- Bounds ----------------------------------------------------------------------------------------------------------


def test_holds_no_more_than_its_limit() -> None:
    memory._pool.set_limit(20 * MB)
    held = [memory.empty((2 * MB,), LIKE) for _ in range(4)]  # 8 MB each: two fit
    assert all(torch.equal(x.fill_(i), torch.full((2 * MB,), float(i))) for i, x in enumerate(held))
    now = memory.stats()
    assert (now.in_use, now.idle) == (16 * MB, 0)
    declined = now.declined
    assert memory.empty((6 * MB,), LIKE).numel() == 6 * MB
    assert memory.stats().declined == declined + 1
    del held
    assert memory.stats().idle == 16 * MB
    memory.empty((3 * MB,), LIKE)  # 12 MB: one idle block makes room
    assert (memory.stats().in_use, memory.stats().idle) == (0, 20 * MB)
    memory._pool.set_limit(10 * MB)
    assert memory.stats().idle <= 10 * MB


def test_unmaps_the_oldest_first() -> None:
    memory._pool.set_limit(14 * MB)
    for size in (MB, MB + MB // 2, MB // 2, MB):  # floats: 4, 6 and 2 MB, and the first again, now the youngest
        memory.empty((size,), LIKE)
    memory.empty((2 * MB,), LIKE)  # 8 MB: the block of 6 MB has to go
    assert memory.stats().idle == 14 * MB
    reused = memory.stats().reused
    memory.empty((MB,), LIKE)
    memory.empty((MB // 2,), LIKE)
    assert memory.stats().reused == reused + 2


def test_release_returns_idle_memory_to_the_system() -> None:
    x, y = pooled(16 * MB), pooled(8 * MB)
    x.fill_(1)
    y.fill_(2)
    with_both = _resident()
    del x
    assert memory.release() == 64 * MB
    assert with_both - _resident() > 60 * MB
    assert torch.equal(y, torch.full_like(y, 2))
    assert memory.stats().in_use == 32 * MB


@pytest.mark.slow
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends a process without memory")
def test_falls_back_where_the_system_has_no_memory() -> None:
    out = run("""
import resource, torch
from mmkern import memory
like = torch.empty(0)
size = [int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize")][0]
resource.setrlimit(resource.RLIMIT_AS, (size + (75 << 20),) * 2)
x = memory.empty((65 << 18,), like)  # 65 MB fit; the block of 80 MB that the pool would map does not
stats = memory.stats()
print(x.fill_(1).sum().item() == 65 << 18, stats.mapped, stats.declined)
try:
    memory.empty((1 << 28,), like)
except RuntimeError as error:
    print("allocate memory" in str(error))
""")
    assert out.split() == ["True", "0", "1", "True"]


@pytest.mark.slow
def test_can_be_turned_off() -> None:
    code = (
        "import torch; from mmkern import memory; x = memory.empty((1 << 20,), torch.empty(0)); print(memory.stats())"
    )
    assert run(code, MMKERN_POOL="0") == "Stats(limit=0, in_use=0, idle=0, reused=0, mapped=0, declined=0)\n"


@pytest.mark.parametrize(
    ("text", "limit"), [("512M", 512 * MB), ("1048576", MB), ("0", 0), ("2 GiB", 2048 * MB), ("3g", 3072 * MB)]
)
def test_reads_its_limit(monkeypatch: pytest.MonkeyPatch, text: str, limit: int) -> None:
    monkeypatch.setenv("MMKERN_POOL_LIMIT", text)
    assert memory._limit() == limit


@pytest.mark.parametrize("text", ["much", "-1", "1.5G", "4T"])
def test_names_a_limit_that_it_cannot_read(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MMKERN_POOL_LIMIT", text)
    with pytest.raises(ValueError, match=f"MMKERN_POOL_LIMIT is '{text}', expected bytes"):
        memory._limit()


def test_default_limit_is_a_quarter_of_what_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMKERN_POOL_LIMIT", raising=False)
    monkeypatch.setattr(memory, "_cgroup_limits", lambda: iter([1 << 30]))
    assert memory._limit() == 1 << 28
    monkeypatch.setattr(memory, "_memory_of_this_process", lambda: 1 << 40)
    assert memory._limit() == 4 << 30


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- A tensor from the pool behaves as any other ---------------------------------------------------------------------


def _saved(x: Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(x, file)
    return file.getvalue()


def _gradient(x: Tensor) -> Tensor | None:
    x.requires_grad_()
    (x * x).sum().backward()
    return x.grad


def _storage_alone(x: Tensor) -> Tensor:
    storage = x.untyped_storage()
    del x
    return torch.empty(0).set_(storage, 7, (2, 3))


BEHAVIOURS: dict[str, Callable[[Tensor], Any]] = {
    "resize_ to less": lambda x: (x.resize_(10), x.stride()),
    "resize_ within": lambda x: (x.resize_(10).resize_(1024, 512), x.stride()),
    "resize_ 2d": lambda x: x.resize_(512, 1024),
    "out=": lambda x: torch.arange(9.0, out=x.resize_(0)),
    "view": lambda x: x.view(-1)[5:9],
    "view dtype": lambda x: x.view(torch.int32),
    "as_strided": lambda x: x.as_strided((3, 3), (2, 1), 4),
    "transpose": lambda x: (x.t(), x.t().is_contiguous()),
    "in place": lambda x: (x.add_(1).mul_(2), x._version),
    "in place on a view": lambda x: (x[3:5].zero_(), x, x._version),
    "set_": lambda x: x.set_(torch.arange(5.0)),
    "set_ from": lambda x: torch.empty(0).set_(x.untyped_storage(), 3, (2, 2)),
    "storage": lambda x: (x.untyped_storage().nbytes(), x.untyped_storage().data_ptr() == x.data_ptr()),
    "storage alone": _storage_alone,
    "data": lambda x: setattr(x, "data", torch.ones(3)) or x,
    "flags": lambda x: (x.is_leaf, x._is_view(), x._base, x.requires_grad, x.layout, x._version, x.is_pinned()),
    "inference": lambda x: x.is_inference(),
    "requires_grad": _gradient,
    "functional gradient": torch.func.grad(lambda x: (x * x).sum()),
    "vmap": torch.vmap(torch.exp),
    "parameter": lambda x: nn.Parameter(x),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save": lambda x: torch.load(io.BytesIO(_saved(x))),
    "saved bytes": lambda x: len(_saved(x)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy can grow": lambda x: copy.deepcopy(x).resize_(1 << 20)[:9].shape,
    "clone can grow": lambda x: x.clone().resize_(1 << 20).shape,
    "share_memory_": lambda x: (x.share_memory_(), x.is_shared()),
    "numpy": lambda x: torch.from_numpy(x.numpy()).add_(1),
    "dlpack": torch.from_dlpack,
    "weak reference": lambda x: weakref.ref(x)() is x,
    "fake": lambda x: FakeTensorMode().from_tensor(x).shape,
    "to": lambda x: (x.to(torch.bfloat16), x.to("meta").shape),
    "repr": repr,
}


def same(x: Any, y: Any) -> bool:
    if isinstance(x, tuple):
        return isinstance(y, tuple) and len(x) == len(y) and all(map(same, x, y))
    if isinstance(x, Tensor):
        same_layout = (type(x), x.shape, x.stride(), x.dtype) == (type(y), y.shape, y.stride(), y.dtype)
        return same_layout and torch.equal(x, y)
    return bool(x == y)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_behaves_as_any_other(name: str) -> None:
    x = pooled(1024, 512)
    y = torch.empty(1024, 512)
    for each in (x, y):
        torch.arange(1024.0 * 512, out=each.view(-1))
    ours, torchs = BEHAVIOURS[name](x), BEHAVIOURS[name](y)
    assert same(ours, torchs)
    del ours, x, each
    gc.collect()  # torch 2.9 leaves a cycle behind pickling
    assert memory.stats().in_use == 0


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_its_storage_cannot_grow() -> None:
    """The one difference, and the same as for a tensor from NumPy: its memory has a fixed size, and torch says so."""
    for grow in (
        lambda x: x.resize_(1024, 513),
        lambda x: torch.mul(torch.ones(1024, 513), 2, out=x),
        lambda x: x.untyped_storage().resize_(0),
    ):
        for x in (pooled(1024, 512), torch.from_numpy(np.empty((1024, 512), np.float32))):
            row = x.fill_(3)[-1]
            with pytest.raises(RuntimeError, match="Trying to resize storage that is not resizable"):
                grow(x)
            assert torch.equal(row, torch.full((512,), 3.0))


def test_shared_memory_outlives_the_block() -> None:
    x = pooled(1 << 20).fill_(1).share_memory_()
    assert memory.stats().in_use == 0
    pooled(1 << 20).fill_(2)
    assert torch.equal(x, torch.ones(1 << 20))


class _Batches(Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return memory.empty((512, 1024), LIKE).fill_(index)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 2])
def test_travels_from_data_loader_workers(batch_size: int | None) -> None:
    loader = DataLoader(_Batches(), batch_size=batch_size, num_workers=2, multiprocessing_context="fork", timeout=60)
    seen = torch.cat([batch.reshape(-1, 512, 1024) for batch in loader])
    assert torch.equal(seen, torch.arange(6.0)[:, None, None].expand(6, 512, 1024))


QUEUE = """
import torch, torch.multiprocessing as mp
from mmkern import memory

def work(inbox, outbox):
    x = inbox.get()
    y = memory.empty(x.shape, x)
    torch.add(x, 1, out=y)
    outbox.put(y)
    assert inbox.get() == "done"

if __name__ == "__main__":
    context = mp.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    worker = context.Process(target=work, args=(inbox, outbox))
    worker.start()
    inbox.put(memory.empty((1 << 20,), torch.empty(0)).fill_(41))
    answer = outbox.get(timeout=60)
    print(torch.equal(answer, torch.full_like(answer, 42)), memory.stats().mapped)
    inbox.put("done")
    worker.join()
"""


@pytest.mark.slow
def test_travels_through_a_queue(tmp_path: Path) -> None:
    script = tmp_path / "through_a_queue.py"
    script.write_text(QUEUE)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(memory.__file__).parents[1]), *sys.path[1:2]])}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "1"], done.stderr


# ---- Threads, forks, the end -----------------------------------------------------------------------------------------


def test_threads_share_the_pool() -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        shuffle = random.Random(seed)
        try:
            for stamp in range(300):
                x = memory.empty((shuffle.randrange(MB // 4, 2 * MB),), LIKE)
                x[0] = x[-1] = 1000 * seed + stamp
                y = x[-1:].clone()
                assert x[0] == y == x[-1] == 1000 * seed + stamp
                if stamp % 50 == 0:
                    memory.release()
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    assert memory.stats().in_use == 0


@pytest.mark.slow
def test_a_forked_child_keeps_its_tensors_and_uses_the_pool() -> None:
    out = run("""
import os, signal, torch
from mmkern import memory
torch.set_num_threads(1)
like = torch.empty(0)
x = memory.empty((1 << 20,), like).fill_(1)
idle = memory.empty((1 << 20,), like).fill_(5)
address = idle.data_ptr()
del idle
child = os.fork()
if child == 0:
    signal.alarm(20)
    ok = memory.stats().idle == 0 and torch.equal(x, torch.ones(1 << 20))
    x.fill_(2)
    y = memory.empty((1 << 20,), like).fill_(3)
    del x, y
    z = memory.empty((1 << 20,), like)
    ok = ok and memory.stats().idle == 4 << 20 and memory.release() == 4 << 20
    os._exit(0 if ok else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
again = memory.empty((1 << 20,), like)
print(torch.equal(x, torch.ones(1 << 20)), again.data_ptr() == address, again[7].item())
child = os.fork()
if child == 0:
    os._exit(int(again[7].item()))  # idle at the first fork, in use at the second
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert out.split() == ["0", "True", "True", "5.0", "5"]


@pytest.mark.slow
def test_tensors_may_outlive_the_interpreter() -> None:
    run("""
import atexit, builtins, sys, threading, time, torch
from mmkern import memory
like = torch.empty(0)
builtins.kept = [memory.empty((1 << 20,), like) for _ in range(3)]
weight = memory.empty((1 << 20,), like).fill_(1).requires_grad_()
torch.graph = (weight * weight).sum()      # autograd holds tensors without Python
atexit.register(lambda: builtins.kept.append(memory.empty((1 << 20,), like)))
cycle = [memory.empty((1 << 20,), like)]
cycle.append(cycle)

class AtTheEnd:
    def __del__(self, x=memory.empty((1 << 20,), like)):
        del x
sys.last = AtTheEnd()

def hold(x):
    while True:
        time.sleep(1)
threading.Thread(target=hold, args=(memory.empty((1 << 20,), like),), daemon=True).start()
""")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    ("mode", "flags"), [("threads", ["-fsanitize=thread"]), ("forks", [])], ids=["threads", "forks"]
)
def test_without_python(tmp_path: Path, mode: str, flags: list[str]) -> None:
    program = tmp_path / "pool_stress"
    sources = [ROOT / "tests/pool_stress.cpp", ROOT / "csrc/cpu/pool.cpp"]
    compiled = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-pthread", *flags, *map(str, sources), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    if "cannot find" in compiled.stderr and flags:
        pytest.skip("this g++ has no thread sanitizer")
    assert compiled.returncode == 0, compiled.stderr
    alone = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer bears no second
    done = subprocess.run([str(program), mode], env=alone, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
