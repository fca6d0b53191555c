"""Bytes that calls move, counted by Triton's interpreter: variants as JSON in, ``[[moved, least], ...]`` out."""

from __future__ import annotations

import json
import sys

from tests.triton_interpreter import patches
from tools.gpu_report_triton import Variant, call


def main() -> None:
    patches.install()
    counts = []
    for given in json.load(sys.stdin):
        launch, least = call(Variant(**given))
        with patches.counted_traffic() as traffic:
            launch()
        counts.append((traffic.read + traffic.written, least))
    json.dump(counts, sys.stdout)


if __name__ == "__main__":
    main()
