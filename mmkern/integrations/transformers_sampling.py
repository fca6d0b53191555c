"""Sampling in ``generate()`` of transformers, in one pass over the logits: ``mmkern.integrations.transformers``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mmkern.ops.decoding import sample_tokens

# What transformers' warpers take, and what leaves everything as it is.
_NEUTRAL = {
    "temperature": 1.0,
    "top_k": None,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}


class FusedSampler(LogitsProcessor):
    """The warpers of ``generate(do_sample=True)`` and its draw in one: :func:`mmkern.ops.sample_tokens`.

    A processor, behind all others: it draws a token of each row, and returns scores of which that token's is 0 and all
    others are −∞, so that the ``argmax`` of ``do_sample=False`` takes it. The distribution is that of transformers with
    the same numbers; the tokens are others, since another race draws them.

        sampler = FusedSampler(temperature=0.8, top_p=0.9)
        model.generate(**inputs, do_sample=False, logits_processor=[sampler])

    Args:
        temperature, top_k, top_p, min_p, typical_p, repetition_penalty: as in transformers' ``GenerationConfig``.
        generator: where seeds come from; PyTorch's own by default, so ``torch.manual_seed`` counts.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.numbers: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
        }
        self.repetition_penalty, self.generator = repetition_penalty, generator

    @classmethod
    def of(
        cls, config: GenerationConfig, generator: torch.Generator | None = None
    ) -> tuple[GenerationConfig, LogitsProcessorList]:
        """A config of ``do_sample=True`` as one without, and what samples in its place.

            config, processors = FusedSampler.of(model.generation_config)
            model.generate(**inputs, generation_config=config, logits_processor=processors)

        Raises: ValueError where the config does not sample, or asks for beams or for a warper that the op has not.
        """
        unknown = {
            "epsilon_cutoff": 0.0,
            "eta_cutoff": 0.0,
            "num_beams": 1,
            "top_h": None,
            "renormalize_logits": False,
        }
        for name, neutral in unknown.items():
            value = getattr(config, name, None)
            if value is not None and value != neutral:
                raise ValueError(f"FusedSampler: the config has {name} = {value}, expected {neutral}")
        if not config.do_sample:
            raise ValueError("FusedSampler: the config has do_sample = False, expected True")
        given = {name: getattr(config, name, neutral) for name, neutral in _NEUTRAL.items()}
        asked: dict[str, Any] = {
            name: None if value in (None, _NEUTRAL[name]) else value
            for name, value in given.items()
            if name != "temperature"
        }
        asked["top_k"] = asked["top_k"] or None  # 0 is none, too
        sampler = cls(temperature=given["temperature"] or 1.0, **asked, generator=generator)
        greedy = copy.deepcopy(config)
        greedy.do_sample = False
        for name, neutral in _NEUTRAL.items():
            setattr(greedy, name, neutral)
        return greedy, LogitsProcessorList([sampler])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        history = None if self.repetition_penalty is None else input_ids
        tokens: Any = sample_tokens(
            scores,
            **self.numbers,
            repetition_penalty=self.repetition_penalty,
            history=history,
            generator=self.generator,
        )
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
