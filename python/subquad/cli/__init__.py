"""The command line: `subquad info`, `subquad compare` and `subquad crossover`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import subquad
from subquad import _ext

from . import compare, crossover, info
from .console import Failure, UserError, print_text

__all__ = ["main"]

_EPILOG = """\
examples:
  subquad info                                  what to paste into a bug report
  subquad compare                               every method on the built-in sample
  subquad compare --input qkv.npz --plot o.png  the same on arrays q, k, v of your own
  subquad crossover --dim 64 --heads 12         the length from which each method pays off here
  cmake -Dsubquad_DIR="$(python -m subquad --cmake-dir)" ...

exit status: 0 success, 1 a measurement failed, 2 wrong usage or input
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="subquad",
        description="Attention below N^2: what is installed, and what each method costs and gives on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"subquad {subquad.__version__}")
    folders = parser.add_mutually_exclusive_group()
    folders.add_argument("--cmake-dir", action="store_true", help="print the folder of subquad-config.cmake")
    folders.add_argument("--include-dir", action="store_true", help="print the folder of the C++ headers")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    for module in (info, compare, crossover):
        module.add_parser(commands)
    return parser


def _package_folder(name: str, file: str) -> str:
    """The folder `name` inside the installed package, which holds `file`. UserError if this install has none."""
    # beside the compiled module: in an editable install the Python files are elsewhere
    folder = Path(_ext.__file__).absolute().parent / name
    if not (folder / file).is_file():
        raise UserError(
            f"no {file} in {folder}: this install has no C++ parts; install the package with `pip install .`"
        )
    return str(folder)


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.cmake_dir:
        print_text(_package_folder("cmake", "subquad-config.cmake"))
    elif args.include_dir:
        print_text(_package_folder("include", "subquad/subquad.h"))
    elif args.command is None:
        parser.print_help(sys.stderr)
        return 2
    else:
        args.run(args)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the arguments of the process) and return its exit status.

    0: success; 1: a measurement failed; 2: wrong usage or input, said in one sentence on stderr.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed help, the version, or what is wrong
        return int(stop.code or 0)
    prog = f"subquad {args.command}" if args.command else "subquad"
    try:
        return _run(parser, args)
    except (UserError, Failure) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:  # the reader of our output has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        print(f"{prog}: error: out of memory: try a smaller --seq", file=sys.stderr)
        return Failure.status
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
