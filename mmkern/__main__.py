"""``python -m mmkern info|demo|bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mmkern import bench, demo, info

COMMANDS = {"info": info.main, "demo": demo.main, "bench": bench.main}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mmkern",
        description="info: what is available here. demo: train a small model on real data. bench: time the ops.",
        epilog="Each command has its own --help.",
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the command")
    options = parser.parse_args(argv)
    return COMMANDS[options.command](options.arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
