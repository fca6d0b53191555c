"""What the documents show can be run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


FAMILIES = (
    "attention",
    "contrastive",
    "ctc",
    "decoding",
    "diffusion",
    "modulation",
    "quantization",
    "retrieval",
    "vocabulary",
)
RUN = (
    "README.md",
    *(f"docs/{name}.md" for name in FAMILIES),
)
ALL = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


@pytest.mark.parametrize("document", ALL)
def test_what_is_linked_is_there(document: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / document).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / document).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("document", RUN)
def test_examples_run(document: str) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        if "from_pretrained" not in block:  # downloads
            exec(compile(block, document, "exec"), names)
