"""The demo's data are true, its training learns alike on both sides, its ways end at the root, its picture is drawn."""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmkern import ops
from mmkern.demo import cli, data, evaluation, main
from mmkern.demo.layout import DiskLayout, spread_labels
from mmkern.demo.training import Run, build, train
from mmkern.extras import MissingExtraError, require

SHORT = cli.Settings(steps=12, batch=64, embed_dim=48)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "demo.png"


@pytest.fixture(scope="module")
def outcome(picture: Path) -> cli.Outcome:
    return cli.run(SHORT, picture, lambda reference, ours: None)


# ---- Data ------------------------------------------------------------------------------------------------------------


def test_the_split_is_whole_stratified_and_disjoint() -> None:
    training, held_out = data.load(0.25, 0)
    assert len(training.images) + len(held_out.images) == 1797
    assert training.images.shape[1:] == (1, 8, 8)
    assert 0 <= training.images.min() < training.images.max() == 1
    shares = held_out.labels.bincount() / (held_out.labels.bincount() + training.labels.bincount())
    assert (shares - 0.25).abs().max() < 0.01
    seen = {image.numpy().tobytes() for image in training.images}
    assert not any(image.numpy().tobytes() in seen for image in held_out.images)


def test_every_drawn_prompt_is_true_of_its_image() -> None:
    # Images that show their own label, so that a batch says what it took.
    labels = torch.arange(500) % 10
    images = labels.float()[:, None, None, None].expand(-1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    met = set()
    for batch in data.batches(data.Digits(images, labels), 8, 400, generator):
        for image, prompt in zip(batch.images, batch.prompt_ids.tolist(), strict=True):
            assert int(image[0, 0, 0]) in data.PROMPTS[prompt].digits
            met.add(prompt)
    assert met == set(range(len(data.PROMPTS)))


def test_prompts_say_what_they_mean() -> None:
    of = {prompt.text: prompt.digits for prompt in data.PROMPTS}
    assert len(of) == len(data.PROMPTS)
    assert of["an odd number smaller than five"] == {1, 3}
    assert of["an even number larger than four"] == {6, 8}
    assert of["the digit 7"] == of["a handwritten seven"] == {7}
    assert of["a digit"] == set(range(10))
    tokens, vocabulary = data.tokens()
    assert len(set(map(tuple, tokens.tolist()))) == len(data.PROMPTS)
    assert tokens.max() == vocabulary - 1


# ---- A short run -----------------------------------------------------------------------------------------------------


def test_both_runs_start_alike_and_learn_alike(outcome: cli.Outcome) -> None:
    losses = outcome.mmkern.losses
    assert len(losses) == len(outcome.reference.losses) == SHORT.steps
    assert sum(losses[-3:]) / 3 < losses[0] - 0.2
    assert abs(losses[0] - outcome.reference.losses[0]) < 1e-4
    assert 0 < outcome.curve_gap < 1e-2  # 0 would mean that both ran the same ops
    assert outcome.speedup == outcome.reference.step_seconds / outcome.mmkern.step_seconds


def test_ways_lead_through_entailing_prompts_to_the_root(outcome: cli.Outcome) -> None:
    model = outcome.mmkern.model
    curvature = model.curvature.detach()
    with torch.no_grad():
        prompts = model.embed_text(torch.arange(len(data.PROMPTS)))
    assert [journey.label for journey in outcome.journeys] == list(cli.TRAVELLERS)
    for journey in outcome.journeys:
        *met, last = journey.stops
        assert last.text == "[ROOT]"
        assert last.prompt is None
        for stop in met:
            assert stop.prompt is not None
            text = prompts[stop.prompt]
            angle = ops.lorentz_exterior_angle(text, stop.point, curvature)
            assert angle <= ops.lorentz_half_aperture(text, curvature, model.min_radius)
        distances = [float(stop.point.norm()) for stop in journey.stops]
        assert distances == sorted(distances, reverse=True)


def test_the_picture_is_a_png_of_sensible_size(outcome: cli.Outcome, picture: Path) -> None:
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 1000 < width < height < 2500
    assert 50_000 < len(content) < 3_000_000


@pytest.mark.slow
def test_the_full_run_classifies_what_it_never_saw() -> None:
    settings = cli.Settings()
    training, held_out = data.load(settings.held_out, settings.seed)
    batches = data.batches(training, settings.steps, settings.batch, torch.Generator().manual_seed(settings.seed))
    run = Run(None, build(settings.embed_dim, settings.seed), settings.steps)
    torch.set_num_threads(settings.threads)
    train([run], batches, lambda: None)
    assert evaluation.zero_shot_accuracy(run.model, held_out) >= 0.95


# ---- The disk --------------------------------------------------------------------------------------------------------


def test_the_disk_keeps_distances_to_the_root_and_parts_the_classes() -> None:
    labels = torch.arange(10).repeat_interleave(20)
    centres = torch.randn(10, 32)
    curvature = torch.tensor(0.5)
    points = ops.lorentz_exp_map0(0.1 * (centres[labels] + 0.2 * torch.randn(200, 32)), curvature)
    layout = DiskLayout.fit(points, labels, curvature, 0.9)
    places = layout.place(points)
    distance = ops.lorentz_distance(points, torch.zeros(32), curvature).double().numpy()
    radius = np.tanh(layout.stretch * distance * math.sqrt(0.5) / 2)
    np.testing.assert_allclose(np.linalg.norm(places, axis=1), radius, rtol=1e-4)
    assert np.isclose(np.median(radius), 0.9, atol=0.01)
    assert layout.radius(float(distance[0])) == pytest.approx(radius[0], rel=1e-5)
    assert not layout.place(torch.zeros(1, 32)).any()
    angles = np.angle(places @ [1, 1j]).reshape(10, 20)
    middles = np.sort(np.angle(np.exp(1j * angles).mean(1)))
    gaps = np.diff(np.append(middles, middles[0] + 2 * np.pi))
    assert gaps.min() > 0.3  # ten even shares are 0.63


def test_labels_do_not_overlap_and_stay_in_their_ring() -> None:
    rng = np.random.default_rng(0)
    anchors = 0.3 * rng.normal(size=(24, 2))
    anchors[1] = anchors[0]
    sizes = np.stack([rng.uniform(0.15, 0.3, 24), np.full(24, 0.06)], 1)
    centres = spread_labels(anchors, sizes, 0.43, 0.82)
    apart = np.abs(centres[:, None] - centres) - (sizes[:, None] + sizes) / 2
    overlap = (apart < -0.01).all(2)
    np.fill_diagonal(overlap, False)
    assert not overlap.any()
    radius = np.linalg.norm(centres, axis=1)
    assert radius.min() > 0.4
    assert radius.max() < 0.83


# ---- Without the extra -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "package"), [("rich.console", "rich"), ("sklearn.datasets", "scikit-learn")])
def test_a_missing_package_is_named(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["--steps", "1"]) == 2
    assert f"{package} is not installed; pip install 'mmkern[demo]'" in capsys.readouterr().err


def test_a_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as raised:
        require("broken_package", "broken-package", "demo")
    assert not isinstance(raised.value, MissingExtraError)
