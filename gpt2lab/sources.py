"""
Where text comes from: local files, Hugging Face datasets, and the text that every Python carries.

A source is a list of inputs in a fixed order. Each input is read as a stream of
(text, starts_document). A document longer than CHUNK_CHARS comes in several chunks, and their
texts joined are the document.
"""

import ast
import functools
import gzip
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from gpt2lab.cli import UserError

TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".parquet")
CHUNK_CHARS = 1 << 18  # about 60,000 tokens of English
HUB_ATTEMPTS = 5  # on top of huggingface_hub's own retries
HUB_HELP = ("check the name and the network, set HF_ENDPOINT to a mirror of the hub or HF_TOKEN to "
            "your token, or set HF_HUB_OFFLINE=1 to use the hub's cache; finished shards are kept")


class Input(NamedTuple):
    """One file to read: a local path, a "hf://..." address, or "builtin"; and its size in bytes."""

    name: str
    size: int


def print_to_stderr(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr)


class RowCounter:
    """
    Counts the rows of each input, and the bad ones: those that hold no text.

    counts: {index of the input as a str: [rows, bad rows]} of every input that was read to its end.
    report: called with a line of text for each of an input's first ten bad rows.
    """

    def __init__(self, counts: dict[str, list[int]] | None = None,
                 report: Callable[[str], Any] = print_to_stderr) -> None:
        self.counts: dict[str, list[int]] = {} if counts is None else counts
        self.report = report
        self.rows = self.bad_rows = 0  # of the input that is being read
        self.first_bad_row = ""

    def count_bad_row(self, where: str, why: str) -> None:
        """Count and report a bad row. Raises UserError if too many rows of a long input are bad."""
        self.bad_rows += 1
        self.first_bad_row = self.first_bad_row or f"{where}: {why}"
        if self.bad_rows <= 10:
            last = " (further bad rows are only counted)" if self.bad_rows == 10 else ""
            self.report(f"skipped {where}: {why}{last}")
        if self.rows >= 10_000:  # do not read a long input to its end if all of it is bad
            self.check_bad_rows()

    def check_bad_rows(self) -> None:
        """Raise UserError if more than 1 % of the input's rows are bad."""
        if self.bad_rows > self.rows * 0.01:
            raise UserError(f"{self.bad_rows} of {self.rows} rows hold no text, the first is "
                            f"{self.first_bad_row} (--text_column names the right column)")

    def end_input(self, index: int) -> None:
        """Store the counts of an input that was read to its end, and start with the next one."""
        self.check_bad_rows()
        self.counts[str(index)] = [self.rows, self.bad_rows]
        self.rows = self.bad_rows = 0
        self.first_bad_row = ""


# -----------------------------------------------------------------------------
# inputs


def list_inputs(sources: Iterable[str], config: str | None, split: str) -> list[Input]:
    """
    The inputs of all sources. A source is "builtin", a text file, a folder (its text files, sorted)
    or a Hugging Face dataset (the files of one configuration and split). Raises UserError for
    anything else.
    """
    inputs = []
    for source in sources:
        if source == "builtin":
            inputs.append(Input("builtin", sum(map(len, builtin_documents()))))
        elif Path(source).exists():
            inputs += [Input(str(p), p.stat().st_size) for p in list_text_files(Path(source))]
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.endswith(TEXT_SUFFIXES):
            inputs += list_hub_files(source, config, split)
        else:
            raise UserError(f"source {source!r} is neither 'builtin', nor a file or folder here, "
                            "nor a Hugging Face dataset (USER/NAME)")
    return inputs


def is_on_hub(inputs: Sequence[Input]) -> bool:
    """Whether any of the inputs has to be downloaded from the Hugging Face hub."""
    return any(item.name.startswith("hf://") for item in inputs)


def is_compressed(inputs: Sequence[Input]) -> bool:
    """Whether the first input is compressed. The others are taken to be of the same kind."""
    return inputs[0].name.endswith(COMPRESSED_SUFFIXES)


def list_text_files(path: Path) -> list[Path]:
    """The text files in the folder `path`, sorted; or [path] if it is a text file."""
    if path.is_file():
        if not path.name.endswith(TEXT_SUFFIXES):
            raise UserError(f"cannot read {path}: its name must end in one of "
                            f"{', '.join(TEXT_SUFFIXES)}")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(TEXT_SUFFIXES))
    if not files:
        raise UserError(f"{path} holds no {', '.join(TEXT_SUFFIXES)} file: name another folder")
    return files


def list_hub_files(name: str, config: str | None, split: str) -> list[Input]:
    """The files of a hub dataset's split as "hf://" inputs, pinned to the current revision."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem
    try:
        files = load_dataset_builder(name, config).config.data_files[split]
        return [Input(url, HfFileSystem().info(url)["size"]) for url in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot list the files of dataset {name}, configuration {config}, split "
                        f"{split} ({error}): {HUB_HELP}") from error


def read_inputs(inputs: Sequence[Input], indices: Sequence[int], text_column: str,
                counter: RowCounter, *, download_dir: Path | None, delete_downloads: bool,
                prefetch: bool) -> Iterator[tuple[int, int, str, bool]]:
    """
    Yield (index, number of the chunk in its input, text, starts_document) over the inputs that
    `indices` lists.

    Hub files are downloaded to `download_dir`. With `prefetch`, the next one is downloaded while
    one is read. With `delete_downloads`, each one is deleted after it was read, so that at most two
    are in the folder at a time.
    """
    with ThreadPoolExecutor(1) as pool:
        upcoming = None  # the download that was started ahead
        for position, index in enumerate(indices):
            fetching = upcoming or pool.submit(fetch_input, inputs[index], download_dir)
            path, was_downloaded = fetching.result()
            upcoming = None
            if prefetch and position + 1 < len(indices):
                following = inputs[indices[position + 1]]
                upcoming = pool.submit(fetch_input, following, download_dir)
            chunks = read_builtin() if path is None else read_file(path, text_column, counter)
            for number, (text, starts_document) in enumerate(chunks):
                yield index, number, text, starts_document
            counter.end_input(index)
            if path is not None and was_downloaded and delete_downloads:
                path.unlink()


def fetch_input(item: Input, download_dir: Path | None) -> tuple[Path | None, bool]:
    """
    (path of an input, whether it was downloaded to `download_dir`). The path of "builtin" is None.
    A hub file that lies in the hub's cache is used from there.
    """
    if item.name == "builtin":
        return None, False
    if not item.name.startswith("hf://"):
        return Path(item.name), False
    from huggingface_hub import HfFileSystem, try_to_load_from_cache
    file = HfFileSystem().resolve_path(item.name)
    location = dict(repo_id=file.repo_id, filename=file.path_in_repo, repo_type="dataset",
                    revision=file.revision)
    cached = try_to_load_from_cache(**location)
    if isinstance(cached, str):
        return Path(cached), False
    return download_hub_file(item.name, location, download_dir), True


def download_hub_file(name: str, location: dict[str, Any], download_dir: Path | None) -> Path:
    """
    Download a file of the hub to `download_dir` and return its path. Raises UserError if all
    attempts fail. `location` holds the arguments of hf_hub_download that say which file it is.
    """
    from huggingface_hub import hf_hub_download
    attempt = 1
    while True:
        try:  # hf_hub_download continues a partial download, and checks the length of the file
            return Path(hf_hub_download(**location, local_dir=download_dir))
        except (OSError, RuntimeError) as error:
            if attempt == HUB_ATTEMPTS or "offline" in str(error).lower():
                raise UserError(f"cannot download {name} ({error}): {HUB_HELP}") from error
            seconds = retry_after(error) or 2 ** (attempt - 1)
            print_to_stderr(f"download failed, trying again in {seconds} s: {error}")
            time.sleep(seconds)
            attempt += 1


def retry_after(error: Exception) -> int | None:
    """
    Seconds that a server asked to wait, from the header Retry-After of the response that an HTTP
    error carries; None if the server did not ask.
    """
    response = getattr(error, "response", None)
    if response is None:
        return None
    value = response.headers.get("Retry-After", "")
    return int(value) if value.isdigit() else None


def spool_stdin(folder: Path) -> Path:
    """Copy standard input to a file, because it is read more than once; returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stdin.txt"
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path


# -----------------------------------------------------------------------------
# readers


def cut_into_chunks(text: str) -> Iterator[tuple[str, bool]]:
    """
    Yield (chunk, starts_document) of at most CHUNK_CHARS characters. The cuts are after a line
    break if there is one.
    """
    starts_document = True
    while len(text) > CHUNK_CHARS:
        cut = text.rfind("\n", 0, CHUNK_CHARS) + 1 or CHUNK_CHARS
        yield text[:cut], starts_document
        text, starts_document = text[cut:], False
    if text:
        yield text, starts_document


def read_file(path: Path, text_column: str, counter: RowCounter) -> Iterator[tuple[str, bool]]:
    """Yield (text, starts_document) over one .txt, .jsonl, .jsonl.gz or .parquet file."""
    if path.name.endswith(".txt"):
        yield from read_txt(path)
        return
    rows = read_parquet(path, text_column) if path.suffix == ".parquet" else read_jsonl(path)
    for where, row in rows:
        counter.rows += 1
        text = row.get(text_column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            counter.count_bad_row(f"{path}, {where}", f"no text in column {text_column!r}")
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can hold a lone surrogate, which UTF-8 cannot encode
            text = text.encode("utf-8", errors="replace").decode("utf-8")
        yield from cut_into_chunks(text)


def read_txt(path: Path) -> Iterator[tuple[str, bool]]:
    """
    Yield (text, starts_document) over a UTF-8 text file, which is one document. Nothing is changed,
    but a byte order mark at the start is left out. Raises UserError for another encoding.
    """
    starts_document, rest = True, ""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for block in iter(lambda: file.read(CHUNK_CHARS), ""):
                text = rest + block
                cut = text.rfind("\n") + 1 or len(text)  # a long line is cut anywhere
                yield text[:cut], starts_document
                rest, starts_document = text[cut:], False
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): convert it, for example "
                        "with iconv -f GB18030 -t UTF-8") from error
    if rest:
        yield rest, starts_document


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ("line N", bytes) over a .jsonl or .jsonl.gz file, without a byte order mark."""
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                yield f"line {number}", line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"")
        except (EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is a damaged gzip file ({error}): get it again") from error


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("line N", row) over a .jsonl or .jsonl.gz file. A malformed row is None."""
    return ((where, parse_line(line)) for where, line in read_lines(path) if line.strip())


def parse_line(line: bytes) -> Any:
    """The JSON value of a line of UTF-8, or None if the line is malformed."""
    try:
        return json.loads(line)
    except ValueError:  # malformed JSON and malformed UTF-8 both raise a kind of ValueError
        return None


def read_parquet(path: Path, text_column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield ("row N", {text_column: text}) over a parquet file, with one batch of rows in memory at a
    time. Raises UserError if the file is damaged or lacks the column.
    """
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_column not in file.schema_arrow.names:
            raise UserError(f"{path} has no column {text_column!r}: --text_column can be one of "
                            f"{', '.join(file.schema_arrow.names)}")
        number = 0
        for batch in file.iter_batches(batch_size=500, columns=[text_column]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield f"row {number}", {text_column: text}
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file ({error}): get it again") from error


# -----------------------------------------------------------------------------
# the text that every Python carries


def read_builtin() -> Iterator[tuple[str, bool]]:
    """Yield (text, starts_document) over builtin_documents()."""
    for text in builtin_documents():
        yield from cut_into_chunks(text)


@functools.cache  # parsing the library takes seconds, and every pass over the source needs it
def builtin_documents() -> list[str]:
    """
    About 2 MB of English in a fixed shuffled order: the language reference that help() shows, and
    the docstrings of the standard library under the names that they describe. Raises UserError if
    this Python does not carry its library's source code.
    """
    import sysconfig
    documents: list[str] = []
    try:
        from pydoc_data import topics
        documents += topics.topics.values()
    except ImportError:
        pass  # some distributions put it into a package of its own
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skipped.isdisjoint(relative.parts):
            documents.append(module_docstrings(path, ".".join(relative.with_suffix("").parts)))
    documents = [text for text in documents if text]
    if sum(map(len, documents)) < 100_000:
        raise UserError("this Python carries no readable standard library: use --source FILE")
    # shuffled so that train and val hold the same kinds of text
    random.Random(1337).shuffle(documents)
    return documents


def module_docstrings(path: Path, module_name: str) -> str:
    """
    The docstrings of one source file, each below the name and the arguments that it describes; ""
    for a file that this Python cannot parse.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    sections = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node)
        if docstring:
            arguments = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
            name = getattr(node, "name", module_name)
            sections.append(f"{name}{arguments}\n\n{docstring}\n")
    return "\n".join(sections)
