"""Absorbing-state diffusion: the numerics contract, the steps and the loss of SEDD, what is drawn, and use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkern import ops
from mmkern.ops._define import OPS
from mmkern.reference import absorbing as reference
from tests import contract
from tests.cases.absorbing import CASES, ENTROPY, LOSS, STEP
from tests.cases.case import Case
from tests.draws import chi_square

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_IN_EACH = (
    "2x3x4x64",
    "2x3x2x2x111, guided",
    "rows inside",
    "sliced",
    "columns",
    "last, odd, guided",
    "near by 0.3",
    "little noise",
)
RUNS = [
    (case, dtype) for case in CASES for dtype in DTYPES if dtype == torch.float32 or case.label.startswith(_IN_EACH)
]
# The gradient of a step is the reference's, in any dtype.
GRADIENTS = [
    (case, dtype)
    for case, dtype in RUNS
    if case.op == ENTROPY or (case.op == STEP and dtype == torch.float32 and "odd" not in case.label)
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    found = contract.check_forward(case, OPS[case.op], dtype, device)
    if case.op == STEP:
        assert torch.equal(found[1], OPS[case.op].reference(*case.arguments(dtype, device))[1])


@pytest.mark.parametrize(("case", "dtype"), GRADIENTS, ids=str)
def test_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    def run(*args: Any) -> Any:
        return OPS[case.op](args[0], *(a.detach() if isinstance(a, Tensor) else a for a in args[1:]))

    contract.check_backward(case, contract.by_autograd(run), dtype, device)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.label.startswith(("2x3x4x64", "rows inside, guided", "sliced"))], ids=str
)
def test_opcheck(case: Case) -> None:
    log_scores, *given = case.arguments(torch.float32)
    torch.library.opcheck(getattr(torch.ops.mmkern, case.op).default, (log_scores.requires_grad_(), *given))


# ---- What a step is --------------------------------------------------------------------------------------------------


def by_definition(log_scores: Tensor, step: float, method: str) -> Tensor:
    """Probabilities of a step from MASK over ``[..., V + 1]``, as the paper has them: by matrices of transitions."""
    size = log_scores.shape[-1]
    score = torch.cat([log_scores[..., :-1], torch.zeros_like(log_scores[..., :1])], -1).exp()
    if method == "euler":
        rates = score.clone()
        rates[..., -1] = -score[..., :-1].sum(-1)
        return torch.eye(size, dtype=score.dtype)[-1] + step * rates

    def transition(noise: float) -> Tensor:
        """``exp(noise·Q)``, to the row from the column."""
        generator = -torch.eye(size, dtype=torch.float64)
        generator[-1] += 1
        return torch.linalg.matrix_exp(noise * generator)

    # Tweedie: the score a step earlier, times what comes from there to MASK.
    earlier = score @ transition(-step).T
    return earlier * transition(step)[-1]


@pytest.mark.parametrize("method", ["euler", "analytic"])
@pytest.mark.parametrize("size", [1, 7, 60])
def test_steps_are_those_of_the_paper(size: int, method: Literal["euler", "analytic"]) -> None:
    log_scores = torch.randn(5, size + 1, dtype=torch.float64)
    step = 0.02 / size
    rate = torch.tensor([[step if method == "euler" else math.expm1(step)]])
    p = reference.step_log_probs(log_scores[:, :-1], rate.double()).exp()
    torch.testing.assert_close(p, by_definition(log_scores, step, method))


@pytest.mark.parametrize("rate", [0.0, 1e-30, 1e-3, 0.02, 0.5, 1e3, 1e30, math.inf])
def test_probabilities_of_a_step_sum_to_1(rate: float) -> None:
    log_scores = 20 * torch.randn(200, 40, dtype=torch.float64)
    log_p = reference.step_log_probs(log_scores, torch.tensor([[rate]], dtype=torch.float64))
    torch.testing.assert_close(log_p.logsumexp(-1), torch.zeros(200, dtype=torch.float64))
    if rate == math.inf:
        torch.testing.assert_close(log_p[:, :-1], log_scores.log_softmax(-1))
        assert (log_p[:, -1] == -torch.inf).all()
    if rate == 0:
        assert (log_p[:, -1] == 0).all()


def test_a_log_probability_is_that_of_its_step() -> None:
    log_scores, tokens = torch.randn(3, 4, 50, 31, dtype=torch.float64), torch.full((4, 50), 30)
    tokens[:, ::3] = 5
    drawn, log_probs = ops.absorbing_step(log_scores, tokens, 4.0, 0.005, guidance=(0.7, -0.2), return_log_prob=True)
    guided = 0.5 * log_scores[0] + 0.7 * log_scores[1] - 0.2 * log_scores[2]
    expected = reference.step_log_probs(guided[..., :-1], torch.tensor([0.02], dtype=torch.float64))
    expected = expected.gather(-1, drawn[..., None]).squeeze(-1).where(tokens == 30, 0.0)
    torch.testing.assert_close(log_probs, expected)


# ---- What is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "step"), [("euler", 0.5), ("analytic", 0.5), ("euler", 40.0), ("denoise", None)])
@pytest.mark.parametrize("size", [7, 111])
def test_tokens_come_as_often_as_they_should(
    size: int, method: Literal["euler", "analytic", "denoise"], step: float | None
) -> None:
    draws = 1_000_000
    branches = torch.randn(3, size + 1, generator=torch.Generator().manual_seed(3))
    weights = torch.tensor([-1.0, 1.4, 0.6])
    sigma, step = (None, None) if step is None else (0.5, 2 * step / size)
    drawn = ops.absorbing_step(
        branches[:, None].expand(-1, draws, -1),
        torch.full((draws,), size),
        sigma,
        step,
        guidance=weights[1:],
        method=method,
        seed=5,
    )
    noise = (sigma or 0) * (step or 0)
    rate = {"euler": noise, "analytic": math.expm1(noise), "denoise": math.inf}[method]
    guided = (weights[:, None] * branches).double().sum(0)[:-1]
    p = reference.step_log_probs(guided, torch.tensor([rate], dtype=torch.float64)).exp()
    assert chi_square(drawn.bincount(minlength=size + 1), p) > 1e-3  # type: ignore[union-attr]


def test_few_tokens_are_told_apart_by_rounding() -> None:
    """The same tokens as by the reference, but for one in 1e5."""
    log_scores = 2 * torch.randn(20_000, 2, 50, generator=torch.Generator().manual_seed(1))
    tokens, weights = torch.full((20_000,), 49), torch.tensor([[-0.5, 1.5]])
    differing = 0
    for seed, rate in enumerate((1e-4, 3e-3, 0.01, 0.02, math.inf)):
        args = log_scores, tokens, torch.tensor([seed, 0]), torch.tensor([rate]), weights
        differing += int((OPS[STEP](*args)[1] != reference.absorbing_step(*args)[1]).sum())
    assert differing <= 1


def test_a_position_draws_by_its_place_alone() -> None:
    """Whatever else is masked, and with the counters of its place."""
    log_scores, tokens = torch.randn(6, 10, 35), torch.full((6, 10), 34)
    drawn = ops.absorbing_step(log_scores, tokens, method="denoise", seed=9, offset=3)
    some = tokens.clone()
    some[torch.rand(6, 10) < 0.5] = 2
    expected = drawn.where(some == 34, 2)  # type: ignore[union-attr]
    assert torch.equal(ops.absorbing_step(log_scores, some, method="denoise", seed=9, offset=3), expected)  # type: ignore[arg-type]
    later = ops.absorbing_step(log_scores[2:], tokens[2:], method="denoise", seed=9, offset=3 + 20 * 9)
    assert torch.equal(later, drawn[2:])  # type: ignore[arg-type]
    assert not torch.equal(drawn, ops.absorbing_step(log_scores, tokens, method="denoise", seed=9, offset=4))  # type: ignore[arg-type]


def test_the_result_does_not_hang_on_threads() -> None:
    log_scores, tokens, masked = torch.randn(40, 30, 200), torch.full((40, 30), 199), torch.rand(40, 30) < 0.7
    targets, sigma = torch.randint(0, 199, (40, 30)), torch.rand(40)

    def run() -> list[Any]:
        x = log_scores.clone().requires_grad_()
        loss = ops.absorbing_score_loss(x, targets, masked, sigma, 0.3)
        rows = ops.absorbing_score_loss(x, targets, masked, sigma, 0.3, reduction="none")
        gradients = [torch.autograd.grad(loss, x)[0], torch.autograd.grad(rows.sum(), x)[0]]
        return [ops.absorbing_step(log_scores, tokens, 1.0, 1e-3, seed=3), loss, rows, *gradients]

    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run())
    with torch.profiler.profile():  # the long way
        found.append(run())
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


# ---- The loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_formula() -> None:
    """The paper's, for each sample, as it stands."""
    log_scores = torch.randn(3, 2, 5, 9, dtype=torch.float64)
    targets, masked = torch.randint(0, 8, (3, 2, 5)), torch.rand(3, 2, 5) < 0.5
    sigma, dsigma = [0.2, 1.0, 3.0], [2.0, 0.3, 1.1]
    losses = []
    for b in range(3):
        r = 1 / math.expm1(sigma[b])
        loss = 0.0
        for row, y in zip(log_scores[b][masked[b]].tolist(), targets[b][masked[b]].tolist(), strict=True):
            loss += math.fsum(map(math.exp, row[:-1])) - r * row[y] + r * (math.log(r) - 1)
        losses.append(dsigma[b] * loss)
    args = log_scores, targets, masked, torch.tensor(sigma), torch.tensor(dsigma)
    each = ops.absorbing_score_loss(*args, reduction="none")
    torch.testing.assert_close(each.sum((1, 2)), torch.tensor(losses, dtype=torch.float64))
    assert (each[~masked] == 0).all()
    for x in (log_scores, log_scores.requires_grad_()):
        for reduction, expected in (("sum", sum(losses)), ("mean", sum(losses) / 3)):
            found = ops.absorbing_score_loss(x, *args[1:], reduction=reduction)  # type: ignore[arg-type]
            torch.testing.assert_close(found.item(), expected)


@pytest.mark.parametrize("sigma", [1e-4, 0.3, math.log(2), 4.0, 40.0])
def test_the_loss_is_zero_at_the_true_scores(sigma: float) -> None:
    targets, masked = torch.randint(0, 20, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    true = reference.log_ratio(torch.tensor(sigma, dtype=torch.float64))
    log_scores = torch.full((2, 6, 21), -torch.inf, dtype=torch.float64).scatter(-1, targets[..., None], true.item())
    log_scores.requires_grad_()
    loss = ops.absorbing_score_loss(log_scores, targets, masked, sigma, 1.0)
    assert loss == 0
    assert (torch.autograd.grad(loss, log_scores)[0].abs() <= 1e-15 * math.exp(true)).all()
    single = ops.absorbing_score_loss(log_scores.detach().float(), targets, masked, sigma, 1.0)
    assert 0 <= single <= 1e-12 * math.exp(true)


def test_the_loss_is_never_negative_and_least_at_the_concrete_scores() -> None:
    """Of tokens with probabilities p the scores ``r·p`` have no gradient in the mean over targets."""
    p = torch.rand(12, dtype=torch.float64).softmax(0)
    sigma = torch.tensor([0.7], dtype=torch.float64)
    log_scores = torch.cat([reference.log_ratio(sigma) + p.log(), torch.zeros(1)]).requires_grad_()
    targets, masked = torch.arange(12), torch.ones(12, dtype=torch.bool)
    losses = ops.absorbing_score_loss(log_scores.expand(12, -1), targets, masked, sigma.item(), 1.0, reduction="none")
    assert (losses > 0).all()
    gradient = torch.autograd.grad((p * losses).sum(), log_scores)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_gradcheck() -> None:
    log_scores = torch.randn(2, 3, 4, 8, dtype=torch.float64).requires_grad_()
    targets, masked = torch.randint(0, 7, (2, 3, 4)), torch.rand(2, 3, 4) < 0.6
    dsigma = torch.rand(2, dtype=torch.float64).requires_grad_()
    for reduction in ("mean", "sum", "none"):

        def loss(x: Tensor, rate: Tensor, reduction: Any = reduction) -> Tensor:
            return ops.absorbing_score_loss(x, targets, masked, torch.tensor([0.4, 1.5]), rate, reduction=reduction)

        torch.autograd.gradcheck(lambda x, loss=loss: loss(x, dsigma.detach()), (log_scores,))
        torch.autograd.gradcheck(loss, (log_scores, dsigma))
        torch.autograd.gradgradcheck(loss, (log_scores, dsigma))


def test_gradients_that_were_made_serve_every_backward() -> None:
    log_scores = torch.randn(4, 9, 33).requires_grad_()
    targets, masked = torch.randint(0, 32, (4, 9)), torch.rand(4, 9) < 0.6
    loss = ops.absorbing_score_loss(log_scores, targets, masked, 0.5, 1.0)
    one, three = (
        torch.autograd.grad(loss, log_scores, torch.tensor(upstream), retain_graph=upstream == 1)[0]
        for upstream in (1.0, 3.0)
    )
    torch.testing.assert_close(3 * one, three)
    rows = ops.absorbing_score_loss(log_scores, targets, masked, 0.5, 1.0, reduction="none")
    torch.testing.assert_close(torch.autograd.grad(rows.sum() / 4, log_scores)[0], one)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_scores_are_saved(reduction: Literal["mean", "none"]) -> None:
    log_scores = torch.randn(4, 60, 300).requires_grad_()
    targets, masked = torch.randint(0, 299, (4, 60)), torch.rand(4, 60) < 0.6
    saved = contract.saved_bytes(
        lambda: ops.absorbing_score_loss(log_scores, targets, masked, 0.5, 1.0, reduction=reduction)
    )
    assert sum(n >= log_scores.nbytes for n in saved) == (2 if reduction == "mean" else 1)  # it, and its gradient


@pytest.mark.parametrize("size", [64, 321])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_past_the_caches(size: int, dtype: torch.dtype) -> None:
    """Of a tensor that no cache has room for; rows begin at lines, and anywhere."""
    rows = (36 << 20) // (size * dtype.itemsize)
    row = torch.randn(1, size).to(dtype)
    targets, masked = torch.randint(0, size - 1, (rows,)), torch.rand(rows) < 0.5
    gradients = []
    for reduction in ("sum", "none"):
        x = row.repeat(rows, 1).requires_grad_()
        loss = ops.absorbing_score_loss(x, targets, masked, 0.5, 1.0, reduction=reduction)  # type: ignore[arg-type]
        gradients += torch.autograd.grad(loss.sum(), x)
    exp = row[0].to(gradients[0].dtype).exp() if dtype == torch.float64 else row[0].float().exp()
    expected = torch.cat([exp[:-1], exp.new_zeros(1)]) - torch.nn.functional.one_hot(targets, size) / math.expm1(0.5)
    for gradient in gradients:
        torch.testing.assert_close(gradient, (expected * masked[:, None]).to(dtype))


# ---- Use -------------------------------------------------------------------------------------------------------------


def test_tokens_that_are_not_masked_stay() -> None:
    tokens = torch.randint(0, 20, (5, 40))
    tokens[0, :2] = torch.tensor([-1, 30])  # marked by a step before, and what is no token
    log_scores = torch.full((5, 40, 20), torch.nan)
    log_scores[tokens == 19] = 0.3
    kept = tokens != 19
    for method, *noise in (("euler", 1.0, 0.01), ("analytic", 2.0, 1.5), ("denoise",)):
        drawn = ops.absorbing_step(log_scores, tokens, *noise, method=method)  # type: ignore[arg-type]
        assert torch.equal(drawn[kept], tokens[kept])  # type: ignore[index]
        assert method == "euler" or (drawn[~kept] < 19).all()  # type: ignore[index]


def test_no_step_and_a_step_without_an_end() -> None:
    log_scores, tokens = torch.randn(3, 30, 12), torch.full((3, 30), 11)
    assert torch.equal(ops.absorbing_step(log_scores, tokens, 1.0, 0.0), tokens)  # type: ignore[arg-type]
    steps = torch.tensor([0.0, 1e30, 1e-30])
    for method in ("euler", "analytic"):
        drawn = ops.absorbing_step(log_scores, tokens, 1.0, steps, method=method, seed=4)  # type: ignore[arg-type]
        assert (drawn[::2] == 11).all()  # type: ignore[index]
        last = ops.absorbing_step(log_scores, tokens, method="denoise", seed=4)
        assert torch.equal(drawn[1], last[1])  # type: ignore[index]


def test_noise_of_each_form() -> None:
    """A rate and a time of all samples, or one of each; only their product counts."""
    log_scores, tokens = torch.randn(3, 40, 12), torch.full((3, 40), 11)
    expected = ops.absorbing_step(log_scores, tokens, 0.5, 0.125, seed=3)
    assert 0 < int((expected == 11).sum()) < 120  # type: ignore[union-attr]
    for sigma, step in (
        (0.0625, 1.0),
        (torch.tensor(0.25), 0.25),
        (torch.full((3,), 0.25).double(), torch.full((3,), 0.25)),
    ):
        assert torch.equal(ops.absorbing_step(log_scores, tokens, sigma, step, seed=3), expected)  # type: ignore[arg-type]
    each = ops.absorbing_step(
        log_scores, tokens, torch.tensor([0.0, 0.5, 1e30]), torch.tensor([1.0, 0.125, 1e30]), seed=3
    )
    assert (each[0] == 11).all()  # type: ignore[index]
    assert torch.equal(each[1], expected[1])  # type: ignore[index]
    assert (each[2] < 11).all()  # type: ignore[index]


def test_rows_without_a_token() -> None:
    log_scores, tokens = torch.zeros(5, 4), torch.tensor([3, 3, 3, 3, 1])
    log_scores[0, 1], log_scores[1, 2], log_scores[2], log_scores[3, 3] = torch.nan, torch.inf, -torch.inf, torch.nan
    drawn, log_probs = ops.absorbing_step(log_scores, tokens, 0.1, 1.0, errors="mark", return_log_prob=True)
    assert drawn[:3].tolist() == [-1, -1, 3]
    assert log_probs[:2].isnan().all()
    assert log_probs[2:].isfinite().all()
    drawn = ops.absorbing_step(log_scores, tokens, method="denoise", errors="mark")
    assert drawn[:3].tolist() == [-1, -1, -1]  # type: ignore[index]
    assert 0 <= drawn[3] < 3  # type: ignore[index]
    with pytest.raises(
        ValueError, match=r"absorbing_step: log_scores has no token to choose in rows 0, 1, 2: NaN, \+inf"
    ):
        ops.absorbing_step(log_scores, tokens, method="denoise")
    assert torch.equal(ops.absorbing_step(log_scores.zero_(), drawn, method="denoise"), drawn)  # type: ignore[arg-type]


def test_a_score_of_zero_in_a_branch_stays_zero() -> None:
    log_scores = torch.zeros(3, 400, 5)
    log_scores[0, :, 0], log_scores[1, :, 1], log_scores[:, :, 2] = -torch.inf, -torch.inf, -torch.inf
    drawn = ops.absorbing_step(log_scores, torch.full((400,), 4), guidance=(1.5, 0.0), method="denoise")
    assert (drawn == 3).all()  # type: ignore[union-attr]


def test_guidance_of_each_form() -> None:
    log_scores, tokens = torch.randn(2, 3, 40, 12), torch.full((3, 40), 11)
    guided = log_scores[0] + 1.5 * (log_scores[1] - log_scores[0])
    expected = ops.absorbing_step(guided, tokens, method="denoise", seed=3)
    for guidance in (1.5, (1.5,), torch.tensor([1.5]), torch.full((3, 1), 1.5, dtype=torch.float64)):
        found = ops.absorbing_step(log_scores, tokens, guidance=guidance, method="denoise", seed=3)
        assert torch.equal(found, expected)  # type: ignore[arg-type]
    each = torch.tensor([[0.0], [1.0], [1.5]])
    found = ops.absorbing_step(log_scores, tokens, guidance=each, method="denoise", seed=3)
    plain = ops.absorbing_step(log_scores[1], tokens, method="denoise", seed=3)
    assert torch.equal(found[1:], torch.stack([plain[1], expected[2]]))  # type: ignore[index]


def test_empty_inputs() -> None:
    assert ops.absorbing_step(torch.zeros(0, 3, 9), torch.zeros(0, 3).long(), 0.1, 1.0).shape == (0, 3)  # type: ignore[union-attr]
    for x in (torch.zeros(0, 3, 9), torch.zeros(0, 3, 9).requires_grad_()):
        args = x, torch.zeros(0, 3).long(), torch.zeros(0, 3).bool(), 0.5, 1.0
        assert ops.absorbing_score_loss(*args).isnan()
        assert ops.absorbing_score_loss(*args, reduction="sum") == 0
        assert ops.absorbing_score_loss(*args, reduction="none").shape == (0, 3)


def test_a_tracer_leaves_nothing_behind() -> None:
    with FakeTensorMode():
        drawn = ops.absorbing_step(torch.empty(2, 3, 9), torch.empty(2, 3).long(), 0.1, 1.0, seed=1)
        loss = ops.absorbing_score_loss(torch.empty(3, 9), torch.empty(3).long(), torch.empty(3).bool(), 0.5, 1.0)
    assert drawn.shape == (2, 3)  # type: ignore[union-attr]
    assert loss.shape == ()


def test_a_compiled_sampler_and_its_losses() -> None:
    log_scores, tokens = torch.randn(3, 2, 20, 30), torch.full((2, 20), 29)
    graphs = 0

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    def sample(x: Tensor, step: float, guidance: tuple[float, ...], seed: Tensor) -> Any:
        for i in range(2):
            tokens = ops.absorbing_step(x, x.new_full((2, 20), 29).long(), 0.5, step, guidance=guidance, seed=seed + i)
        return tokens, ops.absorbing_step(x[0], tokens, method="denoise", seed=seed)  # type: ignore[arg-type]

    compiled = torch.compile(sample, fullgraph=True, backend=backend)
    for i in range(5):
        args = log_scores, 0.001 * (1 + i), (0.5 + i, 0.25), torch.tensor(i)
        assert all(map(torch.equal, compiled(*args), sample(*args)))
    assert graphs <= 2
    targets, masked = torch.randint(0, 29, (2, 20)), tokens == 29
    for reduction, kernel in (("mean", LOSS), ("none", ENTROPY)):
        kernels = contract.kernels_when_compiled(
            lambda x, reduction=reduction: ops.absorbing_score_loss(x, targets, masked, 0.5, 1.0, reduction=reduction),
            log_scores[0],
        )
        assert kernels == [f"mmkern.{kernel}"]


def test_functional_transforms() -> None:
    log_scores = torch.randn(4, 6, 9, dtype=torch.float64)
    targets, masked = torch.randint(0, 8, (4, 6)), torch.rand(4, 6) < 0.6

    def loss(x: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        return ops.absorbing_score_loss(x, targets, masked, 0.5, 1.0, reduction="sum")

    leaf = log_scores.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf, targets, masked), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(log_scores, targets, masked), expected)
    each = torch.func.vmap(loss)(log_scores, targets, masked)
    torch.testing.assert_close(each.sum(), loss(log_scores, targets, masked))


_X, _T = torch.zeros(2, 4, 9), torch.full((2, 4), 8)
_M = _T == 8
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.absorbing_step([1.0], _T, 1.0, 0.1), TypeError, "step: log_scores is list, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.absorbing_step(_X, 3, 1.0, 0.1), TypeError, "step: tokens is int, expected a Tensor"),  # type: ignore[arg-type]
    (lambda: ops.absorbing_step(_X.int(), _T, 1.0, 0.1), TypeError, "step: log_scores has dtype torch.int32"),
    (
        lambda: ops.absorbing_step(_X, _T.int(), 1.0, 0.1),
        TypeError,
        "step: tokens has dtype torch.int32, expected int64",
    ),
    (
        lambda: ops.absorbing_step(_X, _T[:1], 1.0, 0.1),
        ValueError,
        r"step: log_scores has shape \[2, 4, 9\], expected \[1, 4, V \+ 1\] for tokens \[1, 4\]",
    ),
    (
        lambda: ops.absorbing_step(_X, _T, 1.0, 0.1, guidance=1.0),
        ValueError,
        r"step: log_scores has shape \[2, 4, 9\], expected \[2, 2, 4, V \+ 1\] for tokens \[2, 4\]",
    ),
    (lambda: ops.absorbing_step(_X[..., :1], _T, 1.0, 0.1), ValueError, r"step: log_scores has shape .* V at least 1"),
    (lambda: ops.absorbing_step(_X, _T), ValueError, "step: sigma is None, expected a number or a tensor"),
    (lambda: ops.absorbing_step(_X, _T, 1.0), ValueError, "step: step is None, expected a number or a tensor"),
    (lambda: ops.absorbing_step(_X, _T, -1.0, 0.1), ValueError, "step: sigma is -1.0, expected a number of at least 0"),
    (lambda: ops.absorbing_step(_X, _T, 1.0, -0.1), ValueError, "step: step is -0.1, expected a number of at least 0"),
    (
        lambda: ops.absorbing_step(_X, _T, 1.0, math.nan),
        ValueError,
        "step: step is nan, expected a number of at least 0",
    ),
    (lambda: ops.absorbing_step(_X, _T, 1.0, "1"), TypeError, "step: step is str, expected a number of at least 0"),  # type: ignore[arg-type]
    (
        lambda: ops.absorbing_step(_X, _T, 1.0, torch.ones(3)),
        ValueError,
        r"step: step has shape \[3\], expected \[2\] or",
    ),
    (lambda: ops.absorbing_step(_X, _T, 1.0, torch.ones(2).long()), TypeError, "step: step has dtype torch.int64"),
    (
        lambda: ops.absorbing_step(_X, _T, 1.0, torch.tensor([0.5, -2])),
        ValueError,
        "step: step has -2.0, expected a number",
    ),
    (lambda: ops.absorbing_step(_X, _T, 1.0, method="denoise"), ValueError, "step: sigma is 1.0, expected None with"),
    (lambda: ops.absorbing_step(_X, _T, step=0.1, method="denoise"), ValueError, "step: step is 0.1, expected None"),
    (
        lambda: ops.absorbing_step(_X, _T, 1.0, 0.1, method="tau"),
        ValueError,
        'step: method is \'tau\', expected "euler", "ana',
    ),  # type: ignore[arg-type]
    (lambda: ops.absorbing_step(_X, _T, 1.0, 0.1, errors="ignore"), ValueError, "step: errors is 'ignore', expected"),  # type: ignore[arg-type]
    (
        lambda: ops.absorbing_step(_X, _T, 1.0, 0.1, seed=1, generator=torch.Generator()),
        ValueError,
        "step: got generator and",
    ),
    (
        lambda: ops.absorbing_step(_X, _T, 1.0, 0.1, seed=torch.zeros(2).long()),
        ValueError,
        r"step: seed has shape \[2\]",
    ),
    (
        lambda: ops.absorbing_step(_X[None], _T, 1.0, 0.1, guidance=()),
        ValueError,
        r"step: guidance has shape \[0\], expected two branches or more",
    ),
    (
        lambda: ops.absorbing_step(_X.expand(3, -1, -1, -1), _T, 1.0, 0.1, guidance=1.0),
        ValueError,
        r"step: guidance has shape \[1\], expected \[2\] or \[2, 2\], of the branches after the first",
    ),
    (
        lambda: ops.absorbing_step(_X.expand(2, -1, -1, -1), _T, 1.0, 0.1, guidance=math.inf),
        ValueError,
        "step: guidance is inf, expected finite numbers",
    ),
    (lambda: ops.absorbing_score_loss(_X, 3, _M, 0.1, 1), TypeError, "score_loss: targets is int, expected a Tensor"),  # type: ignore[arg-type]
    (
        lambda: ops.absorbing_score_loss(_X, _T, _M, 0.1, 1),
        ValueError,
        "score_loss: targets has 8, expected a token from 0",
    ),
    (
        lambda: ops.absorbing_score_loss(_X, _T, _M[0], 0.1, 1),
        ValueError,
        r"score_loss: masked has shape \[4\], expected",
    ),
    (
        lambda: ops.absorbing_score_loss(_X, _T, _T, 0.1, 1),
        TypeError,
        "score_loss: masked has dtype torch.int64, expected",
    ),
    (lambda: ops.absorbing_score_loss(_X, _T, None, 0.1, 1), TypeError, "score_loss: masked is NoneType, expected a"),  # type: ignore[arg-type]
    (lambda: ops.absorbing_score_loss(_X, _T, _M, -1.0, 1), ValueError, "score_loss: sigma is -1.0, expected a number"),
    (
        lambda: ops.absorbing_score_loss(_X, _T, _M, math.inf, 1),
        ValueError,
        "score_loss: sigma is inf, expected a number",
    ),
    (
        lambda: ops.absorbing_score_loss(_X, _T, _M, 1, torch.ones(4)),
        ValueError,
        r"score_loss: dsigma has shape \[4\], exp",
    ),
    (
        lambda: ops.absorbing_score_loss(_X, _T, _M, 0.1, 1, reduction="batch"),  # type: ignore[arg-type]
        ValueError,
        'score_loss: reduction is \'batch\', expected "mean", "sum" or "none"',
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"absorbing_{message}"):
        call()


@pytest.mark.parametrize("target", [-1, 8, 20])
def test_a_target_that_is_no_token(target: int) -> None:
    """Where it is not masked nobody looks at it; a kernel, which cannot raise, gives NaN."""
    targets, masked = torch.zeros(2, 4).long(), torch.ones(2, 4).bool()
    targets[1, 2], masked[1, 2] = target, False
    assert ops.absorbing_score_loss(_X, targets, masked, 0.5, 1.0).isfinite()
    x, sigma = torch.randn(2, 4, 9).requires_grad_(), torch.tensor([0.5])
    masked[1, 2] = True
    for op, more in ((ENTROPY, ()), (LOSS, (torch.tensor([1.0]),))):
        args = x, targets, masked, sigma, *more
        kernel = getattr(__import__("mmkern._C")._C, op)
        found = [torch.empty_like(out) for out in OPS[op].empty_outputs(args)]
        kernel(*(a.detach() for a in args), *found, 1)
        for mine, expected in zip(found, [*map(torch.Tensor.detach, _reference(op, args))], strict=True):
            torch.testing.assert_close(mine, expected, equal_nan=True)


def _reference(op: str, args: Any) -> tuple[Tensor, ...]:
    found = OPS[op].reference(*args)
    return found if isinstance(found, tuple) else (found,)
