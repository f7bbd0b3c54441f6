"""
What the scripts share on the command line: flags from a dataclass, and one line for a mistake, exit
code 2, no traceback.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import get_args


class UserError(ValueError):
    """A mistake the user can mend; its message says how. Scripts print it as one line."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports a bad command line in one line, without the usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def make_parser(docstring: str, **options) -> argparse.ArgumentParser:
    """The parser of a script. --help shows the script's docstring with its line breaks."""
    options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
    return OneLineParser(description=docstring, **options)


def option(default, help, **extra):
    """A field of a dataclass that is a flag, too; `extra` goes to argparse's add_argument."""
    return field(default=default, metadata={"help": help, **extra})


def add_options(parser, config_class):
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


def env_rank() -> int:
    """The rank that torchrun gave this process; 0 for a process that runs alone."""
    return int(os.environ.get("RANK", "0"))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_main(main: Callable[[], None]) -> None:
    """Call `main()`. An error that the user can cause becomes one line on stderr, exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        rank = env_rank()
        where = f"{Path(sys.argv[0]).name}: " + (f"rank {rank}: " if rank else "")
        print(f"{where}error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
