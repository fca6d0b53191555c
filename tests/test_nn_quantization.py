"""mmkern.nn's quantizers beside those of vector-quantize-pytorch and of DAC: the same state_dict, codes and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmkern import ops
from mmkern.nn import FactorizedResidualVQ, ResidualVQ, VectorQuantizer

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"codebook_dim": 6},
    {"use_cosine_sim": True},
    {"use_cosine_sim": True, "codebook_dim": 6},
    {"learnable_codebook": True, "ema_update": False},
    {"decay": 0.5, "eps": 1e-3, "commitment_weight": 0.25},
)


def rows(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def train(module: nn.Module, x: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Outputs, and gradients for x and the parameters."""
    x = x.clone().requires_grad_()
    out, codes, loss = module(x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    total = (out * upstream).sum() + 3 * loss.sum()
    leaves = [x, *module.parameters()]
    return (out, codes, loss), list(torch.autograd.grad(total, leaves, allow_unused=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_vector_quantizer_is_theirs(options: dict[str, Any]) -> None:
    theirs_of = pytest.importorskip("vector_quantize_pytorch").VectorQuantize
    theirs, ours = theirs_of(12, 30, rotation_trick=False, **options), VectorQuantizer(12, 30, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    for step in range(3):
        x = rows(4, 25, 12, seed=step)
        for found, expected in zip(ours.eval()(x), theirs.eval()(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        outs, gradients = train(ours.train(), x)
        wanted_outs, wanted = train(theirs.train(), x)
        for found, expected in zip(outs, wanted_outs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_residual_vq_is_theirs(options: dict[str, Any]) -> None:
    """But for the gradient of x through the reconstruction, which theirs has once a level."""
    theirs_of = pytest.importorskip("vector_quantize_pytorch").ResidualVQ
    theirs = theirs_of(dim=12, num_quantizers=4, codebook_size=30, **options)
    ours = ResidualVQ(12, 4, 30, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    for step in range(3):
        x = rows(4, 25, 12, seed=step)
        for training in (False, True):
            found, expected = ours.train(training)(x), theirs.train(training)(x)
            assert torch.equal(found[1], expected[1])
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[2], expected[2].flatten(), rtol=1e-4, atol=1e-6)
            for name, value in theirs.state_dict().items():
                torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    out = theirs.eval().get_output_from_indices(found[1])
    torch.testing.assert_close(ours.get_output_from_indices(found[1]), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cosine", [False, True])
def test_one_level_after_the_other_is_all_at_once(cosine: bool) -> None:
    """The reconstruction has the gradient of x once, whichever way it was found."""
    module = ResidualVQ(8, 3, 20, use_cosine_sim=cosine)
    x = rows(50, 8).requires_grad_()
    layers, z = module._quantizers(), module.project_in(x)
    out, codes, losses = module._one_by_one(layers, z, True)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(grad, torch.ones_like(x))
    if not cosine:
        other = module._at_once(layers, z, True)
        assert torch.equal(codes, other[1])
        torch.testing.assert_close(out, other[0])
        torch.testing.assert_close(losses, other[2])


@pytest.mark.parametrize("cosine", [False, True])
def test_begins_with_the_centres_of_the_first_batch(cosine: bool) -> None:
    torch.manual_seed(0)
    module = ResidualVQ(6, 3, 10, kmeans_init=True, use_cosine_sim=cosine)
    assert (module.codebooks == 0).all()
    assert not module.layers[0]._codebook.initted
    x = rows(400, 6)
    _, _, losses = module(x)
    assert all(layer._codebook.initted for layer in module._quantizers())
    assert (losses.diff() < 0).all() or cosine
    if cosine:
        torch.testing.assert_close(module.codebooks.norm(dim=-1), torch.ones(3, 10))
    first = module.codebooks.clone()
    module.eval()(x)
    assert torch.equal(module.codebooks, first)
    few = VectorQuantizer(6, 10, kmeans_init=True)
    few(rows(4, 6))  # fewer rows than codes
    assert few._codebook.embed.isfinite().all()


def test_codes_that_nobody_chooses_become_rows() -> None:
    torch.manual_seed(0)
    module = VectorQuantizer(4, 12, threshold_ema_dead_code=2, decay=0.0)
    with torch.no_grad():
        module._codebook.embed[0, 6:] = 1e3
    x = rows(300, 4)
    module(x)
    embed = module._codebook.embed[0, 6:]
    is_row = (embed[:, None] == x).all(-1)
    assert is_row.any(1).all()
    assert len(is_row.int().argmax(1).unique()) == 6
    assert (module._codebook.cluster_size[0, 6:] == 2).all()
    torch.testing.assert_close(module._codebook.embed_avg[0, 6:], 2 * embed)


def test_quantize_dropout() -> None:
    module = ResidualVQ(6, 5, 20, quantize_dropout=True, quantize_dropout_cutoff_index=1)
    x, counts = rows(30, 6), set()
    for seed in range(40):
        torch.manual_seed(seed)
        out, codes, losses = module(x, freeze_codebook=True)
        kept = int((codes[0] >= 0).sum())
        counts.add(kept)
        assert (codes[:, :kept] >= 0).all()
        assert (codes[:, kept:] == -1).all()
        assert (losses[kept:] == 0).all()
        torch.testing.assert_close(module.get_output_from_indices(codes), out)
    assert counts == {2, 3, 4, 5}
    assert (module.eval()(x)[1] >= 0).all()


def test_frozen_codes_stay() -> None:
    for options in OPTIONS:
        for module in (VectorQuantizer(12, 30, **options), ResidualVQ(12, 3, 30, **options)):
            before = {name: value.clone() for name, value in module.state_dict().items()}
            x = rows(40, 12).requires_grad_()
            out, _, loss = module(x, freeze_codebook=True)
            (out.sum() + loss.sum()).backward()
            assert x.grad is not None
            assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
            codebooks = [p for name, p in module.named_parameters() if "_codebook" in name]
            assert all(p.grad is None for p in codebooks)


class DacLevel(nn.Module):
    """As the published code has it."""

    def __init__(self, wide: int, size: int, narrow: int) -> None:
        super().__init__()
        self.in_proj = nn.utils.weight_norm(nn.Conv1d(wide, narrow, 1))
        self.out_proj = nn.utils.weight_norm(nn.Conv1d(narrow, wide, 1))
        self.codebook = nn.Embedding(size, narrow)

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        z_e = self.in_proj(z)
        rows = functional.normalize(z_e.transpose(1, 2).flatten(0, 1))
        table = functional.normalize(self.codebook.weight)
        distances = rows.square().sum(1, keepdim=True) - 2 * rows @ table.T + table.square().sum(1)
        codes = (-distances).max(1)[1].view(z.shape[0], -1)
        z_q = self.codebook(codes).transpose(1, 2)
        commitment = functional.mse_loss(z_e, z_q.detach())
        of_codes = functional.mse_loss(z_q, z_e.detach())
        return self.out_proj(z_e + (z_q - z_e).detach()), commitment, of_codes, codes


class Dac(nn.Module):
    def __init__(self, wide: int, levels: int, size: int, narrow: int) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(DacLevel(wide, size, narrow) for _ in range(levels))

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        left, total, commitment, of_codes, codes = z, torch.zeros_like(z), 0.0, 0.0, []
        for level in self.quantizers:
            step, one, other, chosen = level(left)
            left, total = left - step, total + step
            commitment, of_codes = commitment + one, of_codes + other
            codes.append(chosen)
        return total, torch.stack(codes, 1), commitment, of_codes  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_factorized_residual_vq_is_that_of_dac() -> None:
    torch.manual_seed(0)
    theirs, ours = Dac(32, 5, 40, 8), FactorizedResidualVQ(32, 5, 40, 8)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    z = rows(3, 32, 21)
    found, expected = ours(z), theirs(z)
    assert torch.equal(found[1], expected[1])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    weight = rows(3, 32, 21, seed=5)
    results = []
    for module in (ours, theirs):
        leaf = z.clone().requires_grad_()
        out, _, commitment, of_codes = module(leaf)
        total = (out * weight).sum() + 0.25 * commitment + of_codes
        gradients = torch.autograd.grad(total, [leaf, *module.parameters()])
        results.append(dict(zip(["z", *dict(module.named_parameters())], gradients, strict=True)))
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.from_codes(found[1]), found[0], rtol=1e-4, atol=1e-5)
    first = ours(z, n_quantizers=2)
    assert first[1].shape == (3, 2, 21)
    torch.testing.assert_close(ours.from_codes(found[1][:, :2]), first[0], rtol=1e-4, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())


def test_modules_compile_whole() -> None:
    for module, x in (
        (VectorQuantizer(6, 20, codebook_dim=4).eval(), rows(30, 6)),
        (ResidualVQ(6, 3, 20).eval(), rows(30, 6)),
        (FactorizedResidualVQ(6, 3, 20, 4), rows(2, 6, 9)),
    ):
        expected = module(x)
        found = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_training_lowers_the_loss() -> None:
    """Blobs, whose centres the moving averages find."""
    torch.manual_seed(0)
    centers = 4 * rows(8, 5)
    module = VectorQuantizer(5, 8, kmeans_init=True, threshold_ema_dead_code=1)
    losses = []
    for step in range(30):
        noise = 0.05 * rows(200, 5, seed=step)
        losses.append(float(module(centers.repeat(25, 1) + noise)[2]))
    assert losses[-1] < 0.01
    assert len(ops.nearest_code(module._codebook.embed[0], centers).unique()) == 8  # type: ignore[union-attr]


REFUSED: tuple[tuple[Any, type[Exception], str], ...] = (
    (lambda: VectorQuantizer(0, 3), ValueError, "VectorQuantizer: dim is 0, expected an int of at least 1"),
    (lambda: VectorQuantizer(4, 3, codebook_dim=0), ValueError, "VectorQuantizer: codebook_dim is 0"),
    (
        lambda: VectorQuantizer(4, 3, decay=2.0),
        ValueError,
        "VectorQuantizer: decay is 2.0, expected a number from 0 to 1",
    ),
    (
        lambda: VectorQuantizer(4, 3, learnable_codebook=True, ema_update=True),
        ValueError,
        "learnable_codebook and ema_update",
    ),
    (
        lambda: VectorQuantizer(4, 3)(torch.zeros(2, 5)),
        ValueError,
        r"VectorQuantizer: x has shape \[2, 5\], expected \[..., 4\]",
    ),
    (lambda: ResidualVQ(4, 0, 3), ValueError, "ResidualVQ: num_quantizers is 0"),
    (
        lambda: ResidualVQ(4, 2, 3, quantize_dropout_cutoff_index=2),
        ValueError,
        "quantize_dropout_cutoff_index is 2, expected an",
    ),
    (lambda: ResidualVQ(4, 2, 3)(torch.zeros(2, 5)), ValueError, r"ResidualVQ: x has shape \[2, 5\]"),
    (
        lambda: FactorizedResidualVQ(4, 2)(torch.zeros(2, 5, 3)),
        ValueError,
        r"FactorizedResidualVQ: x has shape \[2, 5, 3\]",
    ),
    (
        lambda: FactorizedResidualVQ(4, 2)(torch.zeros(2, 4, 3), 3),
        ValueError,
        "n_quantizers is 3, expected an int from 1 to 2",
    ),
)


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
