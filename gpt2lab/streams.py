"""Standard streams that print any text, and that may go away without ending the script."""

import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any


class Output(io.RawIOBase):
    """
    The bytes of stdout or stderr. If they cannot be written, because the reader has gone or the
    disk is full, they are dropped. `on_loss(error)` is called when that happens for the first time.
    """

    def __init__(self, stream: Any, raw: Any, on_loss: Callable[[OSError], None]) -> None:
        self.stream = stream  # the text stream around `raw`, which would close it when collected
        self.raw, self.on_loss, self.lost = raw, on_loss, False

    def fileno(self) -> int:
        return self.raw.fileno()

    def isatty(self) -> bool:
        return self.raw.isatty()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write bytes; returns how many were written or dropped."""
        try:
            while (written := self.raw.write(data)) is None:
                select.select([], [self.raw], [])  # the reader has made the pipe non-blocking
            return written
        except OSError as error:
            if not self.lost:
                self.lost = True
                self.on_loss(error)
            return len(data)


def choose_encoding(stream: Any) -> str:
    """
    UTF-8 for a pipe or a file, whatever the system's encoding is. A terminal keeps its own, and
    PYTHONIOENCODING, in which a user names an encoding, counts for all.
    """
    named = os.environ.get("PYTHONIOENCODING", "").split(":")[0]
    return stream.encoding if named or stream.isatty() else "utf-8"


def open_output(name: str, on_loss: Callable[[OSError], None]) -> None:
    """
    Replace sys.stdout or sys.stderr by a stream on an Output. Characters that its encoding lacks
    are written as \\xe9 or \\u2019.
    """
    stream = getattr(sys, name)
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with python -u there is no buffer around the raw file
    if isinstance(raw, io.RawIOBase):  # not in a notebook
        setattr(sys, name, io.TextIOWrapper(
            io.BufferedWriter(Output(stream, raw, on_loss)), encoding=choose_encoding(stream),
            errors="backslashreplace", line_buffering=stream.line_buffering or buffer is raw))


def open_standard_streams(on_loss: Callable[[OSError], None]) -> None:
    """
    Make stdin, stdout and stderr fit for any text. `on_loss(error)` is called when stdout is lost.
    The loss of stderr changes nothing, because it holds nothing but progress and warnings.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: no file that is opened later may get its number
            setattr(sys, name, open(os.devnull, encoding="utf-8"))  # noqa: SIM115
    if hasattr(sys.stdin, "reconfigure"):  # a byte that is not text becomes a lone surrogate
        sys.stdin.reconfigure(encoding=choose_encoding(sys.stdin), errors="surrogateescape")
    open_output("stdout", on_loss)
    open_output("stderr", lambda error: None)
