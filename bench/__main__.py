"""`python -m bench [--base REF] NAME [options]`: one measurement, as a table and as JSON lines."""

from __future__ import annotations

import argparse
import importlib
import sys

from bench.base import against
from bench.timing import Loaded

NAMES = {
    "yoso": "YOSO against exact attention: every speed figure of the README",
    "softmax": "exact attention, RFA, RA, LARA and EVA against torch's exact attention",
    "sparse": "sparse attention, selection and SEA against torch's exact attention, gather, sort",
    "cuda": "YOSO on a CUDA device against flash attention; --model: the predicted table, without a device",
    "border": "nanoseconds to convert one and three arrays, per framework",
    "machine": "copy bandwidth, multiply-add and exp peaks of this machine",
}


def main(argv: list[str] | None = None) -> int:
    names = "\n".join(f"  {name:10} {text}" for name, text in NAMES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"{__doc__}\n\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", metavar="REF", help="measure that commit too and compare (yoso, softmax and sparse)")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of that measurement, see NAME --help")
    args = parser.parse_args(argv)
    if args.base and args.name not in ("yoso", "softmax", "sparse"):
        parser.error(f"--base compares the lines of yoso, softmax and sparse, {args.name} has none")
    try:
        if args.base:
            return against(args.base, args.name, args.options)
        return importlib.import_module(f"bench.{args.name}").main(args.options) or 0
    except Loaded as error:
        print(f"bench: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    raise SystemExit(main())
