"""
What the scripts share on the command line: flags from a dataclass, and one line for a mistake, exit
code 2, no traceback.
"""

import argparse
import ctypes
import os
import sys
from dataclasses import field, fields
from pathlib import Path
from typing import get_args


class UserError(ValueError):
    """A mistake the user can mend; its message says how. Scripts print it as one line."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a bad command line costs one line of stderr, not the whole usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def knob(default, help, **extra):
    """A field of a dataclass that is a flag, too; `extra` goes to argparse's add_argument."""
    return field(default=default, metadata={"help": help, **extra})


def add_knobs(parser, config_class):
    """Give an ArgumentParser a flag for each knob of a dataclass: --name, and --no_name if bool."""
    for f in fields(config_class):
        # int | None and the like: the type that is not None
        kind = next((t for t in get_args(f.type) if t is not type(None)), f.type)
        extra = dict(f.metadata)
        help = extra.pop("help")
        if kind is bool:
            parser.add_argument(f"--{f.name}", action="store_true", default=f.default, help=help)
            parser.add_argument(f"--no_{f.name}", dest=f.name, action="store_false",
                                default=f.default, help=argparse.SUPPRESS)
        else:
            parser.add_argument(f"--{f.name}", type=kind, default=f.default,
                                help=f"{help} (%(default)s)", **extra)


def keep_memory():
    """
    Have the C library keep what is freed: handing large tensors back to the system and having it
    zero them anew, page by page, in every step costs time. Linux with glibc; nothing elsewhere.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt  # glibc's name
    except (OSError, AttributeError):
        return
    # M_MMAP_MAX: no tensor in a mapping of its own; M_TRIM_THRESHOLD: the heap never shrinks;
    # M_TOP_PAD: it grows by 256 MB at a time; M_ARENA_MAX: and there is one of it
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1)):
        mallopt(option, value)


def run_main(main):
    """Call `main()`; what a user can cause ends in one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        rank = os.environ.get("RANK", "0")
        where = f"{Path(sys.argv[0]).name}: " + (f"rank {rank}: " if rank != "0" else "")
        print(f"{where}error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
