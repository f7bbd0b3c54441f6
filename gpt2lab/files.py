"""Files: atomic writing, JSON, checksums."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from gpt2lab.cli import UserError, env_rank


def read_json(path: Path, remedy: str = "make the folder again") -> dict:
    """The dict in a JSON file. Raises UserError, ending in `remedy`, if the file is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """
    Call `write(file)` on a temporary file beside `path`, fsync this file and rename it to `path`.
    If any of this fails, the temporary file is removed and `path` stays as it was.
    """
    # ranks may write the same path at the same time: each has a temporary file of its own
    temporary = path.with_name(f"{path.name}.{env_rank()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, half a file would take up space
        raise
    if os.name == "posix":  # fsync the folder too, so that the rename survives a power failure
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_json(path: Path, value: dict) -> None:
    """Write `value` to a JSON file atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def sha256(data: Any) -> str:
    """Hexadecimal SHA-256 of bytes, or of the memory of a contiguous array."""
    return hashlib.sha256(data).hexdigest()
