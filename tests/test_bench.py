"""The benchmark harness: turns, checks, floors, history, and its commands on a tiny suite. No timing decides a test."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mmkern
import mmkern.testing
from mmkern import ops
from mmkern.bench import environment, floors, history, main, measure, metrics, picture, sides, table, worker
from mmkern.bench.case import Case, Shape, by_name, load_suite, select
from mmkern.bench.floors import Bound
from mmkern.bench.measure import Measurement, Plan
from mmkern.ops._define import OPS

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
for _package in ("pytest_benchmark", "rich", "matplotlib", "yaml", "geoopt"):
    pytest.importorskip(_package, reason="needs mmkern[bench]")


@pytest.fixture(scope="module")
def suite() -> dict[str, Case]:
    return load_suite(BENCHMARKS)


def test_every_case_names_an_op_with_kernels(suite: dict[str, Case]) -> None:
    names = {case.family.made_of.get(case.op, case.op) for case in suite.values()}
    assert names <= {*OPS, ""}


def resized(case: Case, **changes: Any) -> Case:
    """The same case on a shape that takes no time."""
    shape = Shape(rows=6, width=24, source="", others=case.shape.others and 5)
    return dataclasses.replace(case, shape=shape, **changes)


def check(case: Case, *rivals: str) -> None:
    sides.check(case, sides.build_sides(case, rivals))


def measurement(case: str = "op/4x8/forward", **metric: float) -> Measurement:
    ours = 1e-3
    times = {
        name: value * ours for name, value in metric.items() if name in ("eager", "compile", "geoopt", "copy", "sgemm")
    }
    return Measurement(
        case=case, op="op", shape="4x8", mode=case.split("/")[2], source="a paper", backend="cpu", threads=1, flops=1e6,
        bytes=1_000_000, medians={"mmkern": ours, **times}, spreads={}, metrics=metric,
    )  # fmt: skip


def run_of(revision: str, *cases: Measurement, time: str = "2030-01-02T03:04:05Z") -> history.Run:
    machine = {"cpu": "a CPU", "isa": "avx2", "torch": "2", "fma_peak": 1e11}
    return history.Run(revision, time, machine, {m.case: m for m in cases})


# ---- The suite -------------------------------------------------------------------------------------------------------


def test_every_op_has_a_case_and_both_levels_are_filled(suite: dict[str, Case]) -> None:
    assert {case.op for case in suite.values()} == set(ops.__all__)
    assert 0 < len(select(suite, "default")) < len(select(suite, "full")) == len(suite)


def test_floor_file_names_cases_and_figures_that_exist(suite: dict[str, Case]) -> None:
    of_mode = {"call": {"overhead_us"}, "call+grad": {"of_mul"}}
    for name, bounds in floors.load(BENCHMARKS / "floors.json").items():
        case = suite[name]
        assert set(bounds) <= {*case.sides[1:]} | of_mode.get(case.mode, set()), name
        assert all(bound.goal and bound.why for bound in bounds.values()), name


@pytest.mark.parametrize("op", ops.__all__)
def test_rivals_compute_what_the_reference_means(op: str, suite: dict[str, Case]) -> None:
    for task in {case.task: case for case in suite.values() if case.op == op}.values():
        case = resized(task)
        args = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in case.arguments()]
        rival = case.family.rivals[case.task](*args)
        with mmkern.use_backend("reference"):
            expected = (case.family.ours.get(case.task) or getattr(ops, op))(*args)
        torch.testing.assert_close(rival, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_check_holds_for_every_peer(mode: Any, suite: dict[str, Case]) -> None:
    peers = [case for case in suite.values() if case.with_peer]
    assert len({case.op for case in peers}) > 10
    for op in {case.op for case in peers}:
        if mode != "forward" and op in OPS and not OPS[op].differentiable:
            continue
        case = resized(next(case for case in peers if case.op == op), mode=mode)
        check(case, "eager", "peer")


def test_check_catches_a_rival_that_computes_something_else(suite: dict[str, Case]) -> None:
    case = resized(suite["lorentz_distance/16384x512/forward+backward"])
    wrong = dataclasses.replace(case.family, rivals={case.op: lambda x, y, c: (x - y).norm(dim=-1) * c})
    broken = dataclasses.replace(case, family=wrong)
    with pytest.raises(sides.WrongResultError, match="eager: differs"):
        check(broken, "eager")


def test_check_catches_a_wrong_gradient(suite: dict[str, Case]) -> None:
    case = resized(suite["lorentz_exp_map0/16384x512/forward+backward"])
    rival = case.family.rivals[case.op]
    wrong = dataclasses.replace(case.family, rivals={case.op: lambda v, c: rival(v, c.detach() + 0 * c)})
    broken = dataclasses.replace(case, family=wrong)
    with pytest.raises(sides.WrongResultError, match="gradient 1"):
        check(broken, "eager")


def test_check_holds_mmkern_itself_to_the_contract(suite: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(
        suite["lorentz_exp_map0/16384x512/forward"], shape=Shape(rows=600, width=8, source=""), threads=1
    )
    seen: list[tuple[int, ...]] = []
    verify = mmkern.testing.verify_forward

    def off_by_little(op: Any, args: Any, outs: list[torch.Tensor]) -> None:
        seen.append(tuple(outs[0].shape))
        verify(op, args, [out * (1 + 1e-5) for out in outs])

    monkeypatch.setattr(mmkern.testing, "verify_forward", off_by_little)
    with pytest.raises(mmkern.testing.ContractError):
        check(case, "eager")
    assert seen == [(200, 8)]  # every third row


def test_cases_of_one_name_are_refused(suite: dict[str, Case]) -> None:
    case = next(iter(suite.values()))
    with pytest.raises(ValueError, match="two benchmark cases"):
        by_name([case, case])


# ---- Timing ----------------------------------------------------------------------------------------------------------


def test_sides_are_timed_in_turns_after_warm_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def side(name: str, seconds: float) -> Any:
        def run() -> None:
            calls.append(name)
            clock[0] += seconds

        return run

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    samples = measure.interleave({"a": side("a", 1.0), "b": side("b", 0.25), "c": side("c", 1e-4)}, seconds=0.0)
    warm, timed = calls[: 3 * measure.WARMUPS], calls[3 * measure.WARMUPS :]
    assert measure.WARMUPS >= 12
    assert [warm.count(name) for name in "abc"] == [measure.WARMUPS] * 3
    turns = 2 + 20  # 20 calls of 100 µs are what the clock resolves
    rounds = ["".join(timed[at : at + turns]).replace("c" * 20, "c") for at in range(0, len(timed), turns)]
    assert len(rounds) == measure.FEWEST_ROUNDS
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 2  # no side always finds the caches as the same other one left them
    assert samples["a"] == pytest.approx([1.0] * measure.FEWEST_ROUNDS)
    assert samples["c"] == pytest.approx([1e-4] * measure.FEWEST_ROUNDS)


def test_metrics() -> None:
    medians = {"mmkern": 2.0, "eager": 5.0, "copy": 1.0, "sgemm": 0.5, "bare kernel": 1.5, "x * 2": 1.0}
    found = metrics.derive(medians, copies=1.5, products=3)
    assert found == {"eager": 2.5, "copy": 0.75, "sgemm": 0.75, "overhead_us": 0.5e6, "of_mul": 2.0}
    assert metrics.rivals(found) == {"eager": 2.5}


def test_measurement_of_a_case(suite: dict[str, Case]) -> None:
    case = resized(suite["lorentz_exp_map0/16384x512/forward+backward"])
    stages: list[str] = []
    threads = torch.get_num_threads()
    m = measure.measure(case, Plan(rivals=("eager",), seconds=0.01), stages.append)
    assert (m.case, set(m.medians), stages) == (
        str(case),
        {"mmkern", "eager", "copy"},
        ["checking", "timing"],
    )
    assert m.bytes == 5 * 6 * 24 * 4 + 2 * 4 + 4  # v in, x out; v and the gradient in, the gradient out; curvature
    assert m.flops == (3 + 7) * 6 * 24
    assert torch.get_num_threads() == threads
    assert Measurement.from_json(json.loads(json.dumps(m.as_json()))) == m


# ---- Floors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "measured", "bound", "status"),
    [
        ("eager", 2.5, Bound(2.0, 2.4), "ok"),
        ("eager", 2.2, Bound(2.0, 2.4), "below goal"),
        ("eager", 1.9, Bound(2.0, 2.4), "below floor"),
        ("eager", 9.9, Bound(None, 2.4), "no floor yet"),
        ("eager", None, Bound(2.0, 2.4), "not measured"),
        ("overhead_us", 2.0, Bound(3.0, 2.5), "ok"),
        ("overhead_us", 2.7, Bound(3.0, 2.5), "below goal"),
        ("overhead_us", 3.1, Bound(3.0, 2.5), "below floor"),
    ],
)
def test_verdicts(metric: str, measured: float | None, bound: Bound, status: str) -> None:
    m = measurement(**({} if measured is None else {metric: measured}))
    (verdict,) = floors.judge({m.case: {metric: bound}}, {m.case: m}, [m.case])
    assert verdict.status == status
    assert verdict.holds == (status not in ("below floor", "not measured"))


def test_a_floor_of_an_isa_level_holds_there_alone(tmp_path: Path) -> None:
    m = measurement(sgemm=0.7)
    before = {m.case: {"sgemm": Bound(0.8, 0.9, floor_on={"avx512": 0.6})}}
    for isa, status in (("avx2", "below floor"), ("avx512", "below goal")):
        (verdict,) = floors.judge(before, {m.case: m}, [m.case], isa)
        assert verdict.status == status
    floors.save(tmp_path / "floors.json", floors.raised(before, {m.case: m}, "avx512"))
    assert floors.load(tmp_path / "floors.json")[m.case]["sgemm"] == Bound(0.8, 0.9, floor_on={"avx512": 0.63})


def test_new_floors_leave_room_and_stop_at_the_goal(tmp_path: Path) -> None:
    m = measurement(eager=3.0, compile=2.0, overhead_us=2.0, of_mul=1.7)
    before = {
        m.case: {
            "eager": Bound(None, 2.4, "why"),
            "compile": Bound(1.0, 4.0),
            "overhead_us": Bound(None, 2.5),
            "of_mul": Bound(None, 1.8),
            "geoopt": Bound(5.0, 8.0),
        }
    }
    path = tmp_path / "floors.json"
    floors.save(path, floors.raised(before, {m.case: m}))
    after = floors.load(path)[m.case]
    assert after["eager"] == Bound(2.4, 2.4, "why")
    assert after["compile"] == Bound(1.8, 4.0)
    assert after["overhead_us"] == Bound(2.5, 2.5)
    assert after["of_mul"] == Bound(1.89, 1.8)
    assert after["geoopt"] == Bound(5.0, 8.0)


# ---- History ---------------------------------------------------------------------------------------------------------


def test_history_keeps_runs_and_finds_a_revision(tmp_path: Path) -> None:
    first = run_of("aaaaaaaaaaaa", measurement("a/1/forward", eager=2.0), measurement("b/1/forward", eager=2.0))
    later = run_of("aaaaaaaaaaaa+", measurement("a/1/forward", eager=3.0), time="2030-01-03T03:04:05Z")
    other = run_of("bbbbbbbbbbbb", measurement("a/1/forward", eager=5.0), time="2030-01-04T03:04:05Z")
    for run in (first, later, other):
        history.append(tmp_path / "runs", run)
    runs = history.load(tmp_path / "runs")
    assert runs == [first, later, other]
    assert (tmp_path / "runs" / ".gitignore").read_text() == "*\n"
    assert len(list((tmp_path / "runs").iterdir())) == 4, "no partial file is left"
    found = history.runs_of(runs, "aaaa", tmp_path)
    assert {name: m.metrics["eager"] for name, m in found.cases.items()} == {"a/1/forward": 3.0, "b/1/forward": 2.0}
    with pytest.raises(ValueError, match="no run of cccc; it has aaaaaaaaaaaa"):
        history.runs_of(runs, "cccc", tmp_path)


def test_a_write_that_fails_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        history.append(tmp_path, run_of("aaaa", measurement(eager=2.0)))
    assert history.load(tmp_path) == []


def test_revision_marks_uncommitted_changes(tmp_path: Path) -> None:
    def git(*command: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, "-C", str(tmp_path), *command], check=True, capture_output=True)

    assert history.revision(tmp_path) == "unknown"
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    clean = history.revision(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("2")
    assert history.revision(tmp_path) == clean + "+"
    assert history.revision(tmp_path, clean[:6]) == clean


# ---- What a user sees ------------------------------------------------------------------------------------------------


def shown(made: Any) -> str:
    console = table.console()
    with console.capture() as capture:
        console.print(made)
    return capture.get()


def test_tables_show_the_figures() -> None:
    m = dataclasses.replace(measurement(eager=2.5, compile=4.0, copy=0.81), as_found={"eager": 6.1})
    text = shown(table.results([m, dataclasses.replace(measurement(eager=0.9), backend="reference")]))
    for expected in ("1 ms", "2.50x", "6.10x", "4.00x", "81 % copy", "(reference)", "0.90x"):
        assert expected in text
    verdict = floors.Verdict(m.case, "overhead_us", Bound(3.0, 2.5), 3.14)
    assert all(part in shown(table.verdicts([verdict])) for part in ("3.1 µs", "2.5 µs", "below floor"))
    text = shown(table.comparison(run_of("aaaa", m), run_of("bbbb", dataclasses.replace(m, metrics={"eager": 5.0}))))
    assert all(part in text for part in ("aaaa → bbbb", "2.00x", "same"))


@pytest.mark.slow
def test_picture_is_drawn_with_few_and_with_many_cases(tmp_path: Path) -> None:
    for count in (0, 1, 30):
        modes = ("forward", "forward+backward", "call")
        cases = [measurement(f"op{i}/4x8/{modes[i % 3]}", eager=0.5 + i, geoopt=3.0, copy=0.8) for i in range(count)]
        bounds = {case.case: {"eager": Bound(1.0, 2.0)} for case in cases}
        target = tmp_path / f"{count}.png"
        picture.draw(run_of("aaaa", *cases), bounds, target)
        assert target.read_bytes().startswith(b"\x89PNG")


def test_environments_can_be_had_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.memory, "tuned_environment", lambda: {"LD_PRELOAD": "new", "MALLOC_CONF": "set"})
    monkeypatch.delenv("MALLOC_CONF", raising=False)
    monkeypatch.delenv("MMKERN_BENCH_REPLACED", raising=False)
    monkeypatch.setenv("LD_PRELOAD", "old")
    plain = environment.plain_environment()
    assert not environment.is_tuned()
    tuned = environment.tuned_environment()
    assert (tuned["LD_PRELOAD"], tuned["MALLOC_CONF"]) == ("new", "set")
    for name, value in tuned.items():
        monkeypatch.setenv(name, value)
    assert environment.is_tuned()
    assert environment.tuned_environment() == tuned
    assert environment.plain_environment() == plain


def test_fma_peak_is_a_rate_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = environment.fma_peak()
    assert peak is None or 1e8 < peak < 1e13
    monkeypatch.setenv("CC", "no-such-compiler")
    assert environment.fma_peak() is None


TINY = """
from mmkern.bench.case import Case, Family, Shape
import torch

def arguments(op, shape, generator):
    return [torch.randn(shape.rows, shape.width, generator=generator), torch.tensor(0.5)]

def exp_map0(v, c):
    r = (c * v.square().sum(-1, keepdim=True)).sqrt()
    return torch.sinh(r) / r * v * WRONG

FAMILY = Family("tiny", arguments, {"lorentz_exp_map0": exp_map0}, lambda op, backward: 3.0)
CASES = [Case(FAMILY, "lorentz_exp_map0", Shape(8, 16, "none"), mode=mode) for mode in ("forward", "forward+backward")]

def test_tiny(case, side, timed):
    timed(case, side)
"""


def tiny_suite(folder: Path, wrong: str = "1", bounds: Any = None) -> Path:
    (folder / "bench_tiny.py").write_text(TINY.replace("WRONG", wrong))
    shutil.copy(BENCHMARKS / "conftest.py", folder)
    if bounds is not None:
        (folder / "floors.json").write_text(json.dumps(bounds))
    return folder


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """``python -m mmkern bench`` on the suite in ``tmp_path``, but for the process; returns status and output."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)

    def run(*words: str) -> tuple[int, str]:
        quick = (
            "--suite",
            str(tmp_path),
            "--rivals",
            "eager",
            "--seconds",
            "0.01",
            "--picture",
            str(tmp_path / "bench.png"),
        )
        status = main([*quick, *words])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


@pytest.mark.slow
def test_bench_measures_keeps_and_draws(tmp_path: Path, bench: Any) -> None:
    tiny_suite(tmp_path)
    status, said = bench()
    assert status == 0, said
    assert "lorentz_exp_map0/8x16/forward+backward" in said
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    (run,) = history.load(tmp_path / "history")
    m = run.cases["lorentz_exp_map0/8x16/forward"]
    assert m.backend == "cpu"
    assert m.as_found["eager"] > 0
    status, said = bench("--compare", run.revision, run.revision)
    assert status == 0
    assert f"{run.revision} → {run.revision}" in said


@pytest.mark.slow
def test_bench_check_fails_below_a_floor_after_a_second_try(tmp_path: Path, bench: Any) -> None:
    name = "lorentz_exp_map0/8x16/forward"
    tiny_suite(tmp_path, bounds={name: {"eager": {"floor": 1e6, "goal": 1e6}, "copy": {"floor": 0.0}}})
    status, said = bench("--check", "--no-as-found")
    assert status == 1, said
    assert "below floor" in said
    assert "once more" in said
    tiny_suite(tmp_path, bounds={name: {"eager": {"floor": None, "goal": 1e-6, "why": "kept"}}})
    status, said = bench("--set-floors", "--no-as-found")
    assert status == 0, said
    assert floors.load(tmp_path / "floors.json")[name]["eager"] == Bound(1e-6, 1e-6, "kept")
    status, said = bench("--check", "--no-as-found")
    assert status == 0, said
    assert "once more" not in said


@pytest.mark.slow
def test_bench_fails_where_a_result_is_wrong(tmp_path: Path, bench: Any) -> None:
    tiny_suite(tmp_path, wrong="1.5")
    status, said = bench("--no-as-found")
    assert status == 1, said
    assert "WrongResultError" in said


def test_bench_says_what_is_wrong_with_a_request(tmp_path: Path, bench: Any) -> None:
    assert "no bench_*.py" in bench()[1]
    tiny_suite(tmp_path)
    assert "--rivals is 'numpy'" in bench("--rivals", "numpy")[1]
    for more in ((), ("--check",)):
        assert "no case contains 'nothing'" in bench(*more, "--only", "nothing")[1]
    tiny_suite(tmp_path, bounds={"gone/1x1/forward": {}})
    status, said = bench("--check")
    assert status == 2
    assert "names cases that the suite has not: gone" in said


@pytest.mark.slow
def test_pytest_restarts_tuned_and_fails_only_on_wrong_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark rests in a worker of xdist
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", ".", "--seconds", "0.01", "--no-as-found", "-k"]

    def run(only: str, wrong: str) -> tuple[int, str]:
        done = subprocess.run(
            [*words, only], cwd=tiny_suite(tmp_path, wrong=wrong), capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout + done.stderr

    status, said = run("not backward", wrong="1")
    assert status == 0, said
    assert "restarting pytest under the tuned allocator" in said
    assert "benchmark 'lorentz_exp_map0/8x16/forward': 4 tests" in said
    (kept,) = history.load(tmp_path / "history")
    assert set(kept.cases["lorentz_exp_map0/8x16/forward"].medians) == {"mmkern", "eager", "compile", "copy"}
    status, said = run("not backward and eager", wrong="1.5")
    assert status == 1
    assert "1 failed" in said
    assert "WrongResultError" in said


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    (tiny_suite(tmp_path) / "bench_tiny.py").write_text("import os; os._exit(3)")
    with pytest.raises(worker.WorkerError, match="status 3"):
        list(worker.run(tmp_path, ["a"], Plan(), dict(os.environ, PYTHONPATH=str(ROOT))))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(name: str, *_: Any) -> ModuleType:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("mmkern.extras.importlib.import_module", absent)
    assert main([]) == 2
    assert "pip install 'mmkern[bench]'" in capsys.readouterr().err
