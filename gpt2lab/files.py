"""Files: atomic writing, JSON, checksums."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from gpt2lab.cli import UserError, env_rank

# how file systems like SMB or Google Drive say that they cannot fsync a folder
FSYNC_REFUSALS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY,
                  errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}


def read_json(path: Path, remedy: str = "make the folder again") -> dict:
    """The dict in a JSON file. Raises UserError, ending in `remedy`, if the file is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object): {remedy}")
    return value


def flush_to_disk(file: BinaryIO) -> None:
    """Return when the data of an open file would survive a power failure. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())
    # on macOS, fsync leaves the data in the cache of the disk. F_FULLFSYNC empties this cache, too
    with contextlib.suppress(ImportError, OSError):  # Windows lacks fcntl, network disks refuse
        import fcntl
        if hasattr(fcntl, "F_FULLFSYNC"):
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """
    Call `write(file)` on a temporary file beside `path`, flush it to disk and rename it to `path`.
    If any of this fails, the temporary file is removed and `path` stays as it was.
    """
    # ranks may write the same path at the same time: each has a temporary file of its own
    temporary = path.with_name(f"{path.name}.{env_rank()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            flush_to_disk(file)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # on a full disk, half a file would take up space
        if isinstance(error, OSError) and error.filename is None:  # a write does not name its file
            raise OSError(f"cannot write {path} ({error}): make room on the disk, and give the "
                          "same command again") from error
        raise
    if os.name == "posix":  # fsync the folder too, so that the rename survives a power failure
        try:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:  # the file is in place, though some file systems refuse this
            if error.errno not in FSYNC_REFUSALS:
                raise


def check_output(path: str | Path, inputs: Iterable[str | Path] = ()) -> Path:
    """
    The path at which write_output can write a file that a user has named, with links followed.
    Raises UserError if it cannot, or if the file is one of `inputs`, which the run reads.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        return path  # a pipe, or a device such as /dev/null
    path = Path(os.path.realpath(path))  # a link stays, and the file that it names is replaced
    if path.is_symlink():
        raise UserError(f"{path} is a link that leads to itself: name another file")
    for other in (*inputs, 1, 2):  # the last two are stdout and stderr
        if path.exists() and os.path.exists(other) and os.path.samefile(path, other):
            raise UserError(f"{path} is in use by this run, and would be lost: name another file")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{path} is write-protected: name another file, or remove it")
    try:
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name).close()
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): make its folder, or name another "
                        "file") from error
    return path


def write_output(path: Path, data: bytes) -> None:
    """Write a file that check_output has accepted: atomically, or into a pipe or device."""
    if path.exists() and not path.is_file():
        try:
            path.write_bytes(data)
        except OSError as error:
            raise OSError(f"cannot write {path} ({error}): name another file") from error
    else:
        write_atomically(path, lambda file: file.write(data))


def write_json(path: Path, value: dict) -> None:
    """Write `value` to a JSON file atomically. read_json gives back the same value."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # a file name may hold bytes that are not UTF-8. Python has a lone surrogate for each of them,
    # and JSON can spell it with a backslash
    data = text.encode("utf-8", errors="backslashreplace")
    write_atomically(path, lambda file: file.write(data))


def sha256(data: Any) -> str:
    """Hexadecimal SHA-256 of bytes, or of the memory of a contiguous array."""
    return hashlib.sha256(data).hexdigest()
