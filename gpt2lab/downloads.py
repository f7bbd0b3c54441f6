"""Downloads the official files of benchmarks: retries, mirrors, checksums, one process a node."""

import hashlib
import os
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gpt2lab.cli import env_ranks
from gpt2lab.distributed import Ranks, sum_over_ranks
from gpt2lab.files import flush_to_disk

ATTEMPTS = 5
SHOW_PROGRESS_BYTES = 10_000_000  # smaller files arrive before anybody asks how long it takes


class OfficialFile(NamedTuple):
    """A file that its authors publish."""

    path: Path  # where it is kept
    url: str
    variable: str  # the environment variable that names the URL of a mirror
    size: int | None  # in bytes, None if not known
    sha256: str


def download(file: OfficialFile) -> Path:
    """
    Download a file unless it is there, and return its path. Raises OSError if ATTEMPTS fail, if
    more of them would be in vain, if the file is not the official one, or if the disk is full.
    """
    if file.path.is_file():
        return file.path
    file.path.parent.mkdir(parents=True, exist_ok=True)
    # another process may download the same file at the same time
    temporary = file.path.with_name(f"{file.path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as out:
            url = os.environ.get(file.variable) or file.url
            fetch(url, file, out)
            out.seek(0)
            if hashlib.file_digest(out, "sha256").hexdigest() != file.sha256:
                raise OSError(f"{url} is not the official {file.path.name}, because its sha256 "
                              f"differs: set {file.variable} to another mirror, or put the file "
                              f"at {file.path}")
            flush_to_disk(out)
        os.replace(temporary, file.path)
    finally:
        temporary.unlink(missing_ok=True)  # half a file would take up space
    return file.path


def fetch(url: str, file: OfficialFile, out: BinaryIO) -> None:
    """Write what is at `url` to an empty file `out`, in several attempts if needed."""
    import requests
    for attempt in range(ATTEMPTS):
        try:
            receive(url, file, out)
            return
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", None)
            # the answer stays the same if there is no such file (404) or the URL is not one, but
            # not if the server is too busy (429)
            final = isinstance(error, ValueError) or (status in range(300, 500) and status != 429)
            if final or attempt == ATTEMPTS - 1:
                raise OSError(f"cannot download {url} ({error}): set {file.variable} to a mirror, "
                              f"or put the file at {file.path}") from error
            time.sleep(0.5 * 2 ** attempt)
        except OSError as error:
            raise OSError(f"cannot write {file.path} ({error}): make room on the disk") from error


def receive(url: str, file: OfficialFile, out: BinaryIO) -> None:
    """One attempt of `fetch`, which continues where the attempt before it has ended."""
    import requests
    from tqdm import tqdm
    start = out.tell()
    headers = {"Range": f"bytes={start}-"} if start else {}
    with requests.get(url, timeout=30, stream=True, headers=headers) as response:
        response.raise_for_status()
        if start and response.status_code != 206:  # the server sends the file from its beginning
            start = 0
            out.seek(0)
            out.truncate()
        total = file.size
        if total is None and (to_come := response.headers.get("Content-Length", "")).isdigit():
            total = start + int(to_come)
        with tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=file.path.name,
                  disable=(total or 0) < SHOW_PROGRESS_BYTES) as progress:
            for block in response.iter_content(1 << 16):
                out.write(block)
                progress.update(len(block))
    if total and out.tell() < total:
        raise requests.ConnectionError(f"received only {out.tell()} of {total} bytes")


def first_on_node() -> bool:
    """Whether this process is the first of those that torchrun started on this node."""
    return env_ranks().local_rank == 0


def download_on_each_node(file: OfficialFile, ranks: Ranks) -> Path:
    """
    Path of an official file, for all ranks to call together. The first process of each node
    downloads the file, and the others wait. If any rank lacks the file, every rank raises OSError,
    so that no rank waits for one that gave up.
    """
    error: OSError | None = None
    if first_on_node():
        try:
            download(file)
        except OSError as caught:
            error = caught
    sum_over_ranks([0], ranks.device)  # waits until every node has finished its download
    if sum_over_ranks([not file.path.is_file()], ranks.device)[0]:
        raise error or OSError(f"another process could not download {file.path}")
    return file.path
