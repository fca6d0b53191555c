"""Two small towers: a perceptron over 8 x 8 pixels, a recurrent network over the words of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 64


class ImageTower(nn.Sequential):
    """``[B, 1, 8, 8]`` to ``[B, WIDTH]``."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(64, 256),
            nn.GELU(),
            nn.Linear(256, 256),
            nn.GELU(),
            nn.Linear(256, WIDTH),
            nn.LayerNorm(WIDTH),
        )


class TextTower(nn.Module):
    """Numbers of prompts ``[B]`` to ``[B, WIDTH]``; each prompt of the table is read once, however often it occurs."""

    tokens: Tensor

    def __init__(self, tokens: Tensor, vocabulary: int) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.words = nn.Embedding(vocabulary, WIDTH, padding_idx=0)
        self.reader = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, prompt_ids: Tensor) -> Tensor:
        states, _ = self.reader(self.words(self.tokens))
        last_word = (self.tokens != 0).sum(1) - 1
        sentences: Tensor = self.norm(states[torch.arange(len(states)), last_word])
        return sentences[prompt_ids]
