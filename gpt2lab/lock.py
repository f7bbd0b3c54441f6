"""One process at a time writes to a folder, so that two never mix their logs or their shards."""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from gpt2lab.cli import UserError

# {path of the lock file: the lock} of the folders that this process writes. The system releases a
# lock when its process ends, in whatever way, so that a killed run never leaves one behind
_locks: dict[Path, Any] = {}


def path_of_lock(log_dir: str | Path) -> Path:
    """The file that is locked while a run writes to a log folder. Its text names the process."""
    return Path(log_dir).resolve() / "run.lock"


def lock_log_dir(log_dir: str | Path) -> None:
    """Keep other processes from training in an existing log folder, as lock_folder does."""
    lock_folder(path_of_lock(log_dir), "is training in", "--log_dir")


def lock_folder(path: Path, does_what: str, flag: str) -> None:
    """
    Keep other processes from writing to the folder of the lock file `path`. Raises UserError if one
    does already. Prints a warning if the file system has no locks.
    """
    from filelock import FileLock, Timeout
    folder = path.parent
    if path in _locks:
        return
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed run
    try:
        lock.acquire(timeout=1)
    except Timeout:
        raise UserError(f"{read_lock(path)} {does_what} {folder}: give another {flag}, or wait "
                        "until it has ended") from None
    except (OSError, NotImplementedError) as error:
        print(f"warning: {folder} cannot be locked ({error}): do not start a second run in it")
        return
    _locks[path] = lock
    with suppress(OSError):  # Windows refuses to write to a locked file; a disk may be full
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")


def read_lock(path: Path) -> str:
    """Who holds a lock, for example "process 17 on node3", as far as its file can be read."""
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except (OSError, UnicodeDecodeError):  # Windows refuses to read a locked file
        return "another process"


def unlock(path: Path) -> None:
    """Release a lock, if this process holds it, and delete its file."""
    if lock := _locks.pop(path, None):
        with suppress(OSError):  # Windows cannot delete a file that is open
            path.unlink()
        lock.release()


def unlocks_log_dir(train: Callable) -> Callable:
    """A decorator: train(config) releases the lock of config.log_dir, however it ends."""
    @wraps(train)
    def train_and_unlock(config: Any) -> Any:
        try:
            return train(config)
        finally:
            unlock(path_of_lock(config.log_dir))

    return train_and_unlock
