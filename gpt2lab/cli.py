"""
The command line that all scripts share: flags made from a dataclass, what the environment says
about ranks and CPUs, and an error of the user as one line with exit code 2 and no traceback.
"""

import argparse
import contextlib
import errno
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, NoReturn, get_args, get_type_hints

from gpt2lab.streams import open_standard_streams


class UserError(ValueError):
    """An error that the user can fix. Its message says how, and scripts print it as one line."""


class SaidByMaster(UserError):
    """A UserError that the master prints, so that the other ranks end without a line of theirs."""


# -----------------------------------------------------------------------------
# flags


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports a bad command line in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the line on stderr and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def make_parser(docstring: str | None, **options: Any) -> argparse.ArgumentParser:
    """The parser of a script. --help shows the script's docstring with its line breaks."""
    options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
    # no abbreviations, because --max_step would be taken for --max_steps
    return OneLineParser(description=docstring, allow_abbrev=False, **options)


def option(default: Any, help: str, lowest: float = 0, highest: float = 10**12,
           **extra: Any) -> Any:
    """
    A dataclass field that add_options turns into a flag. A number must be from `lowest` to
    `highest`. `extra` goes to add_argument.
    """
    return field(default=default, metadata={
        "help": help, "lowest": lowest, "highest": highest, "extra": extra})


def check_ranges(config: Any) -> None:
    """Raise UserError if a number in a dataclass of options is not in its range, or NaN."""
    for f in fields(config):
        value = getattr(config, f.name)
        lowest, highest = f.metadata["lowest"], f.metadata["highest"]
        if not isinstance(value, int | float) or lowest <= value <= highest:
            continue
        limit = f"most {highest}" if value > highest else f"least {lowest}"  # least for a NaN
        raise UserError(f"--{f.name} {value} must be at {limit}")


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


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError if one of these numbers of a command line is below 1. None is allowed."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")


def split_list(text: str | None) -> list[str]:
    """The parts of a value like "a,b" of a flag, and none of an empty one or of None."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def value_type(hint: Any) -> Any:
    """The type of a flag's value: int for a field that is an int or an int | None."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if kinds else hint


# -----------------------------------------------------------------------------
# the environment: ranks and CPUs


def env_int(name: str, default: int) -> int:
    """
    The whole number in an environment variable, or `default` if the variable is not set or empty.
    Raises UserError for any other value.
    """
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdigit():
        raise UserError(f"the environment variable {name} is {text!r}: set it to a whole number, "
                        "or unset it")
    return int(text)


class EnvRanks(NamedTuple):
    """What the environment tells a process about its place among the processes of a run."""

    rank: int = 0
    local_rank: int = 0  # among the processes of this machine
    world_size: int = 1


def env_ranks() -> EnvRanks:
    """
    RANK, LOCAL_RANK and WORLD_SIZE of the environment, where torchrun and other launchers put them.
    Without a WORLD_SIZE above 1 the process runs alone, and a RANK is left over from something
    else. A missing LOCAL_RANK is 0, because launchers that start one process in each container, for
    example Kubeflow, do not set it. Raises UserError if the variables contradict each other.
    """
    world_size = env_int("WORLD_SIZE", 1)
    if world_size <= 1:
        return EnvRanks()
    if not os.environ.get("RANK"):
        raise UserError(f"the environment variable WORLD_SIZE is {world_size}, but RANK is not "
                        "set: unset WORLD_SIZE, or start with torchrun")
    rank = env_int("RANK", 0)
    if rank >= world_size:
        raise UserError(f"the environment variable RANK is {rank}, but WORLD_SIZE is {world_size}: "
                        f"set RANK to a number from 0 to {world_size - 1}, or unset both")
    return EnvRanks(rank, env_int("LOCAL_RANK", 0), world_size)


def env_rank() -> int:
    """The rank of this process in env_ranks, and 0 where env_ranks raises."""
    try:
        return env_ranks().rank
    except UserError:
        return 0


def cgroup_folders(controller: str) -> list[Path]:
    """
    The folders in which Linux may limit `controller` ("cpu" or "memory") for this process: those of
    its control groups, versions 1 and 2, and of their parents. Not all of them need exist.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = ["0::/"]
    folders = []
    for line in lines:  # "0::/path" of version 2, "4:cpu,cpuacct:/path" of version 1
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", controller if controllers else "")
        parts = Path(path.strip("/")).parts
        # inside a container, the path may be the host's: then only the root exists
        folders += [root.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]
    return folders


def available_cpus() -> int:
    """
    How many CPUs this process may use, at least 1. That is fewer than the machine has if taskset or
    a scheduler pins the process to some of them, or if a container's quota limits it.
    """
    pinned = hasattr(os, "sched_getaffinity")
    count: float = len(os.sched_getaffinity(0)) if pinned else os.cpu_count() or 1
    for folder in cgroup_folders("cpu"):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            try:
                text = " ".join((folder / name).read_text(encoding="utf-8") for name in names)
                quota, period = map(int, text.split())
            except (OSError, ValueError):  # no such file, or "max 100000", which is no limit
                continue
            if quota > 0 and period > 0:  # version 1 writes -1 for no limit
                count = min(count, quota / period)
    return max(1, math.ceil(count))


# -----------------------------------------------------------------------------
# errors


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that Python, numpy or torch on any device got no memory."""
    return isinstance(error, MemoryError) or bool(re.search(
        "out of memory|not enough memory|can't allocate memory|size calculation overflowed",
        str(error)))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def list_differences(saved: dict, current: dict) -> list[str]:
    """["NAME OLD, not NEW"] for every key of `current` whose value is another one in `saved`."""
    return [f"{name} {saved.get(name)}, not {value}" for name, value in current.items()
            if saved.get(name) != value]


# -----------------------------------------------------------------------------
# running a script


def explain(error: Exception) -> str:
    """What an error message says. The system's own errors name a file, but not what to do."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"cannot use {error.filename} ({error.strerror}): check the path and its permissions"
    return str(error).strip() or type(error).__name__


def print_error(message: str) -> None:
    """Print a line on stderr that begins with the script's name, and with the rank if not 0."""
    rank = env_rank()
    where = f"{Path(sys.argv[0]).name}: " + (f"rank {rank}: " if rank else "")
    print(where + " ".join(message.split()), file=sys.stderr)


def run_main(main: Callable[[], None], output_may_be_lost: bool = False) -> None:
    """
    Call `main()`. A UserError or OSError becomes one line on stderr and exit code 2.

    If stdout can no longer be written, `main` is stopped, quietly if the reader has gone as in
    `| head`. With `output_may_be_lost`, which is for scripts that write files, `main` goes on after
    a warning.
    """
    losses: list[OSError] = []  # why stdout was lost

    def on_loss(error: OSError) -> None:
        losses.append(error)
        if not output_may_be_lost:
            raise error
        print_error(f"warning: what is printed from here on is lost ({error}); all else goes on")

    open_standard_streams(on_loss)
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except SaidByMaster:
        code = 2
    except (UserError, OSError) as error:
        if error not in losses:
            print_error(f"error: {explain(error)}")
            code = 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print_error(f"error: not enough memory ({first_line(error):.200})")
        code = 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    with contextlib.suppress(OSError):  # which is in `losses`
        sys.stdout.flush()
    if losses and not output_may_be_lost and not code:
        reader_has_gone = losses[0].errno in (errno.EPIPE, errno.EINVAL)  # EINVAL on Windows
        code = 141 if reader_has_gone else 2  # 141 is what a shell reports for other programs
        if not reader_has_gone:
            print_error(f"error: the output cannot be written ({losses[0]}): make room for it, or "
                        "send it elsewhere")
    if code:
        sys.exit(code)
