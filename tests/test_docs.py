"""What the documents show can be run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("document", ["README.md", "docs/attention.md", "docs/modulation.md", "docs/diffusion.md"])
def test_examples_run(document: str) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        if "from_pretrained" not in block:  # downloads
            exec(compile(block, document, "exec"), names)
