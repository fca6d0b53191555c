"""tune_cpu_allocator and its environment: what they change, seen in page faults rather than in time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmkern import memory

MALLOC = memory._malloc()
JEMALLOC = memory._find_jemalloc()
pytestmark = pytest.mark.skipif(MALLOC != "glibc", reason=f"malloc is from {MALLOC}")
needs_jemalloc = pytest.mark.skipif(JEMALLOC is None, reason="jemalloc is not installed (libjemalloc2)")
needs_4_kb_pages = pytest.mark.skipif(
    "[always]" in memory._kernel_huge_pages(), reason="the kernel gives huge pages to every block"
)

PRELUDE = """
import os, resource, threading
import torch
from mmkern import memory

torch.set_num_threads(1)

def faults():
    "Page faults of five clones of 72 MB, once the memory for them has been seen."
    x = torch.ones(18 << 20)
    for _ in range(25):
        x.clone()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(5):
        x.clone()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

def faults_in_a_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(faults()))
    thread.start()
    thread.join()
    return seen[0]
"""
MANY = 90_000  # one for each 4 KB
FEW = 10_000  # huge pages leave the two ends of a block, up to 2 MB each, in pages of 4 KB


def run(code: str, **env: str) -> list[str]:
    """The lines that ``code`` prints in a process of its own, which has no settings but ``env``."""
    names = ("LD_PRELOAD", "MALLOC_CONF", memory._HUGE_PAGES)
    clean = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("MALLOC_")}
    clean["PYTHONPATH"] = f"{Path(memory.__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", PRELUDE + code],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@needs_4_kb_pages
def test_heap_keeps_large_blocks_until_it_is_undone() -> None:
    as_found, tuned, thread, undone, thread_undone, *messages = run("""
import mmkern  # does nothing by itself
print(faults())
tuning = mmkern.tune_cpu_allocator()
print(faults(), faults_in_a_thread(), sep="\\n")
again = mmkern.tune_cpu_allocator("huge_pages")
state = memory.describe().splitlines()[0]
undone = tuning.undo()
print(faults(), faults_in_a_thread(), sep="\\n")
print(tuning, again is tuning, state, undone, tuning.undo(), memory.describe().splitlines()[0], sep="\\n")
""")
    assert int(as_found) > MANY
    assert int(tuned) < FEW
    assert int(thread) < FEW
    assert int(undone) > MANY
    assert int(thread_undone) > MANY
    message, again, state, undo, second_undo, after = messages
    assert "M_MMAP_MAX=0" in message
    assert again == "True"
    assert message in state
    assert "mapped again" in undo
    assert second_undo == "nothing to undo"
    assert "as found" in after


@pytest.mark.slow
def test_heap_can_be_tuned_again_after_undo() -> None:
    (again,) = run("""
memory.tune_cpu_allocator().undo()
memory.tune_cpu_allocator()
print(faults())
""")
    assert int(again) < FEW


@pytest.mark.slow
@needs_4_kb_pages
@pytest.mark.skipif("[never]" in memory._kernel_huge_pages(), reason="the kernel has no huge pages")
def test_huge_pages_take_a_fault_for_2_mb() -> None:
    setting, environment, both, few, thread, undo, left = run("""
tuning = memory.tune_cpu_allocator("huge_pages")
print(tuning.setting, os.environ["THP_MEM_ALLOC_ENABLE"], memory.tune_cpu_allocator() is tuning, sep="\\n")
print(faults(), faults_in_a_thread(), tuning.undo(), os.environ.get("THP_MEM_ALLOC_ENABLE"), sep="\\n")
""")
    assert (setting, environment, both) == ("huge_pages", "1", "True")
    assert int(few) < FEW
    assert int(thread) < FEW
    assert "this one keeps huge pages" in undo
    assert left == "None"


@pytest.mark.slow
def test_huge_pages_say_when_they_come_too_late() -> None:
    setting, message, environment = run("""
block = torch.ones(1 << 20)
tuning = memory.tune_cpu_allocator("huge_pages")
print(tuning.setting, tuning.message, os.environ.get("THP_MEM_ALLOC_ENABLE"), sep="\\n")
""")
    assert (setting, environment) == ("None", "None")
    assert "torch read THP_MEM_ALLOC_ENABLE at its first block" in message


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("THP_MEM_ALLOC_ENABLE", "1", "slowest first calls"), ("MALLOC_MMAP_MAX_", "0", "keeps the heap already")],
)
def test_heap_and_huge_pages_are_never_together(
    name: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(memory, "_keep_heap", lambda: pytest.fail("mallopt was called"))
    tuning = memory.tune_cpu_allocator()
    assert tuning.setting is None
    assert reason in str(tuning)
    assert tuning.undo() == "nothing to undo"
    assert f"{name}={value}" in memory.describe()


@pytest.mark.parametrize("malloc", ["libjemalloc.so.2", "libtcmalloc.so.4", "ld-musl-x86_64.so.1"])
def test_leaves_another_malloc_alone(malloc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_malloc", lambda: malloc)
    monkeypatch.setattr(memory, "_keep_heap", lambda: pytest.fail("mallopt was called"))
    tuning = memory.tune_cpu_allocator()
    assert (tuning.setting, tuning.message) == (None, f"nothing done: malloc is from {malloc}, not from glibc")
    assert malloc in memory.describe()
    assert memory.tuned_environment().keys() == ({"LD_PRELOAD", "MALLOC_CONF"} if "jemalloc" in malloc else set())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_finds_who_has_malloc(tmp_path: Path) -> None:
    library = tmp_path / "libother.so"
    source = tmp_path / "other.c"
    source.write_text(
        "extern void* __libc_malloc(unsigned long); void* malloc(unsigned long n) { return __libc_malloc(n); }"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    lines = run("print(memory._malloc(), memory.tune_cpu_allocator(), sep='\\n')", LD_PRELOAD=str(library))
    assert lines == ["libother.so", "nothing done: malloc is from libother.so, not from glibc"]


def test_refuses_a_setting_that_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="tune_cpu_allocator: setting is 'fast', expected 'heap' or 'huge_pages'"):
        memory.tune_cpu_allocator("fast")  # type: ignore[arg-type]


@pytest.mark.slow
@needs_4_kb_pages
@pytest.mark.parametrize("jemalloc", [pytest.param(True, marks=needs_jemalloc), False], ids=["jemalloc", "glibc"])
def test_environment_tunes_a_new_process(jemalloc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", *(n for n in os.environ if n.startswith("MALLOC_"))):
        monkeypatch.delenv(name, raising=False)
    environment = memory.tuned_environment(jemalloc)
    assert ("LD_PRELOAD" in environment) == jemalloc
    few, thread, same, tuning, state, *_ = run(
        f"""
print(faults(), faults_in_a_thread(), memory.tuned_environment({jemalloc}).items() <= os.environ.items(), sep="\\n")
print(memory.tune_cpu_allocator().setting, memory.describe(), sep="\\n")
""",
        **environment,
    )
    assert int(few) < FEW
    assert int(thread) < FEW
    assert same == "True"
    assert tuning == "None"
    assert ("jemalloc" if jemalloc else "MALLOC_MMAP_MAX_=0") in state


def test_environment_keeps_what_is_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_find_jemalloc", lambda: "libjemalloc.so.2")
    monkeypatch.setenv("LD_PRELOAD", "libother.so")
    assert memory.tuned_environment()["LD_PRELOAD"] == "libjemalloc.so.2 libother.so"
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")  # asked for, but malloc is still glibc's
    assert "LD_PRELOAD" not in memory.tuned_environment()
