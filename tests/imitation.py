"""
Makes a Python process on Linux behave like one on Windows or macOS, where a script could notice the
difference. os.name and sys.platform stay, because the standard library itself depends on them.
"""

import builtins
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

SHARING_VIOLATION = 32  # Windows' error code for a file that is in use
# what Python for Windows lacks. It lacks SIGKILL, too, which torch for Linux uses
MODULES_OF_POSIX = ("fcntl", "grp", "pty", "pwd", "readline", "resource", "termios", "tty")
SIGNALS_OF_POSIX = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
LINUX_FOLDERS = ("/proc/", "/sys/fs/cgroup/")

real_open = io.open


def files_of_process(process: Path) -> Iterator[str]:
    """Yield the paths of the files that a process, /proc/PID, has mapped into memory or open."""
    with contextlib.suppress(OSError):  # it has just ended
        with real_open(process / "maps", encoding="utf-8", errors="replace") as maps:
            yield from (line.rstrip("\n").split(maxsplit=5)[-1] for line in maps)
        for entry in os.listdir(process / "fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                yield os.readlink(process / "fd" / entry)


def is_open(path: Path) -> bool:
    """Whether any process has a file open, or mapped into its memory."""
    return any(str(path) in files_of_process(process) for process in Path("/proc").glob("[0-9]*"))


def refuse_open_files(name: str, folder: str) -> None:
    """From now on, os.NAME(path, ...) raises PermissionError for open files in a folder."""
    original = getattr(os, name)

    def refuse(*paths, **options):
        for path in paths:
            real = Path(path).resolve()
            if real.is_relative_to(folder) and real.is_file() and is_open(real):
                error = PermissionError(errno.EACCES, "the file is used by another process", path)
                error.winerror = SHARING_VIOLATION
                raise error
        return original(*paths, **options)

    setattr(os, name, refuse)


def replace_open(newline: str | None) -> None:
    """
    From now on, open finds no file of LINUX_FOLDERS, and ends the lines of a text that is written
    with `newline`.
    """
    def imitated_open(file, mode="r", *args, **options):
        if str(file).startswith(LINUX_FOLDERS):
            raise FileNotFoundError(errno.ENOENT, "no such file", file)
        if "b" not in mode and "r" not in mode and len(args) < 3:
            options.setdefault("newline", newline)
        return real_open(file, mode, *args, **options)

    builtins.open = io.open = imitated_open


def imitate_windows(folder: str) -> None:
    """Behave like Windows. Open files in `folder` cannot be replaced, renamed or deleted."""
    import filelock  # noqa: F401, has locks on Windows, too, but without fcntl
    del os.fork, os.sched_getaffinity
    for name in SIGNALS_OF_POSIX:
        delattr(signal, name)
    for name in MODULES_OF_POSIX:
        sys.modules[name] = None  # an import raises ImportError
    for name in ("replace", "rename", "unlink", "remove"):
        refuse_open_files(name, folder)
    replace_open("\r\n")


def imitate_macos(folder: str) -> None:
    """Behave like macOS. Its fcntl.F_FULLFSYNC adds a line to full_fsync.txt in `folder`."""
    import fcntl
    original, F_FULLFSYNC = fcntl.fcntl, 51

    def imitated_fcntl(file, command, *args):
        if command != F_FULLFSYNC:
            return original(file, command, *args)
        with real_open(Path(folder) / "full_fsync.txt", "a", encoding="utf-8") as list_of_files:
            list_of_files.write(os.readlink(f"/proc/self/fd/{file}") + "\n")
        return 0

    fcntl.F_FULLFSYNC, fcntl.fcntl = F_FULLFSYNC, imitated_fcntl
    del os.sched_getaffinity
    replace_open(None)
