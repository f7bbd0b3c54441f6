"""
The command line that all scripts share: flags made from a dataclass, and an error of the user as
one line with exit code 2 and no traceback.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints


class UserError(ValueError):
    """An error that the user can fix. Its message says how, and scripts print it as one line."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports a bad command line in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the line on stderr and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def make_parser(docstring: str | None, **options: Any) -> argparse.ArgumentParser:
    """The parser of a script. --help shows the script's docstring with its line breaks."""
    options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
    return OneLineParser(description=docstring, **options)


def option(default: Any, help: str, lowest: int = 0, **extra: Any) -> Any:
    """
    A dataclass field that add_options turns into a flag. A number must be at least `lowest`.
    `extra` goes to add_argument.
    """
    return field(default=default, metadata={"help": help, "lowest": lowest, "extra": extra})


def check_ranges(config: Any) -> None:
    """Raise UserError if a number in a dataclass of options is below its `lowest`, or NaN."""
    for f in fields(config):
        value, lowest = getattr(config, f.name), f.metadata["lowest"]
        if isinstance(value, int | float) and not value >= lowest:  # NaN is not >= anything
            raise UserError(f"--{f.name} {value} must be at least {lowest}")


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add a flag for each option of a dataclass: --name, and for a bool also --no_name."""
    hints = get_type_hints(config_class)
    for f in fields(config_class):
        kind = value_type(hints[f.name])
        help = f.metadata["help"]
        if kind is bool:
            parser.add_argument(f"--{f.name}", action="store_true", default=f.default, help=help)
            parser.add_argument(f"--no_{f.name}", dest=f.name, action="store_false",
                                default=f.default, help=argparse.SUPPRESS)
        else:
            parser.add_argument(f"--{f.name}", type=kind, default=f.default,
                                help=f"{help} (%(default)s)", **f.metadata["extra"])


def value_type(hint: Any) -> Any:
    """The type of a flag's value: int for a field that is an int or an int | None."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if kinds else hint


def env_rank() -> int:
    """The rank that torchrun gave this process, or 0 if the process runs alone."""
    return int(os.environ.get("RANK") or 0)  # an empty value counts as unset


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def list_differences(saved: dict, current: dict) -> list[str]:
    """["NAME OLD, not NEW"] for every key of `current` whose value is another one in `saved`."""
    return [f"{name} {saved.get(name)}, not {value}" for name, value in current.items()
            if saved.get(name) != value]


def run_main(main: Callable[[], None]) -> None:
    """Call `main()`. A UserError or OSError becomes one line on stderr and exit code 2."""
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
