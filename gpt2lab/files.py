"""Files: written whole or not at all, JSON, checksums."""

import hashlib
import json
import os
from pathlib import Path

from gpt2lab.cli import UserError, env_rank


def read_json(path: Path, remedy: str = "make the folder again") -> dict:
    """The dict in a JSON file. Raises UserError, which ends in `remedy`, if it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error


def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path`, then fsync and rename it into place."""
    rank = env_rank()  # processes that write the same file do not meet
    temporary = path.with_name(f"{path.name}.{rank}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, half a file is in the way
        raise
    if os.name == "posix":  # the rename itself is safe once the folder is on disk
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_json(path, value):
    """Write a JSON file atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def sha256(data):
    """Hexadecimal SHA-256 of bytes or of an array's memory."""
    return hashlib.sha256(data).hexdigest()
