"""``FusedSampler`` beside transformers' own warpers: the same distribution, and whole generations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LogitsProcessorList

from mmkern.integrations.transformers import FusedSampler
from tests.draws import chi_square

NUMBERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 9},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.6},
    {"repetition_penalty": 1.4},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95, "repetition_penalty": 0.8},
]


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=39)
    return GPT2LMHeadModel(config).eval()


def config_of(numbers: dict[str, Any], **more: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, **({"top_k": 0} | numbers), pad_token_id=39, **more)


def warped(model: GPT2LMHeadModel, config: GenerationConfig, input_ids: Tensor, scores: Tensor) -> Tensor:
    """Probabilities as ``generate`` would draw from them."""
    processors: LogitsProcessorList = model._get_logits_processor(config, input_ids_seq_length=input_ids.shape[1])
    return processors(input_ids, scores.clone()).softmax(-1)


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_the_distribution_is_that_of_transformers(model: GPT2LMHeadModel, numbers: dict[str, Any]) -> None:
    scores = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(4))
    input_ids = torch.tensor([[3, 5, 3]])
    config = config_of(numbers)
    p = warped(model, config, input_ids, scores)[0]
    _, (sampler,) = FusedSampler.of(config, torch.Generator().manual_seed(1))
    draws = 200_000
    chosen = sampler(input_ids.expand(draws, -1), scores.expand(draws, -1))
    assert ((chosen == 0).sum(1) == 1).all()
    assert chi_square((chosen == 0).sum(0), p.double()) > 1e-3


def test_a_generation(model: GPT2LMHeadModel) -> None:
    """The second tokens of many come as often as the model says."""
    inputs = torch.zeros(20_000, 1, dtype=torch.long)
    numbers = {"temperature": 0.9, "top_k": 12}
    config, processors = FusedSampler.of(config_of(numbers, max_new_tokens=2))
    torch.manual_seed(3)
    mask = torch.ones_like(inputs)
    found = model.generate(inputs, attention_mask=mask, generation_config=config, logits_processor=processors)
    torch.manual_seed(3)
    again = model.generate(inputs, attention_mask=mask, generation_config=config, logits_processor=processors)
    assert torch.equal(found, again)
    assert found.shape == (20_000, 3)
    with torch.no_grad():
        logits = model(inputs[:1]).logits[:, -1]
    p = warped(model, config_of(numbers), inputs[:1], logits)[0]
    assert chi_square(found[:, 1].bincount(minlength=40), p.double()) > 1e-3


def test_given_to_generate_itself(model: GPT2LMHeadModel) -> None:
    inputs = torch.zeros(3, 1, dtype=torch.long)
    sampler = FusedSampler(temperature=0.0)
    common = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 6, "pad_token_id": 39}
    found = model.generate(inputs, do_sample=False, logits_processor=LogitsProcessorList([sampler]), **common)
    assert torch.equal(found, model.generate(inputs, do_sample=False, **common))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GenerationConfig(do_sample=False), "do_sample = False, expected True"),
        (GenerationConfig(do_sample=True, num_beams=3), "num_beams = 3, expected 1"),
        (GenerationConfig(do_sample=True, epsilon_cutoff=0.1), "epsilon_cutoff = 0.1, expected 0.0"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_named(config: GenerationConfig, message: str) -> None:
    with pytest.raises(ValueError, match=f"FusedSampler: the config has {message}"):
        FusedSampler.of(config)
