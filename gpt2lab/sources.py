"""
Where text comes from: local files, Hugging Face datasets, and the text that every Python carries.

A source is a list of inputs in a fixed order. Each input is read as a stream of
(text, starts_document). A document longer than CHUNK_CHARS comes in several chunks, and their
texts joined are the document.
"""

import ast
import contextlib
import csv
import functools
import gzip
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from gpt2lab.cli import UserError, env_rank, first_line
from gpt2lab.files import write_atomically
from gpt2lab.tokenizer import END_OF_TEXT

FORMATS_HELP = ".txt, .jsonl, .json, .csv or .parquet, each also followed by .gz or .zst"
COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}
OWN_FILE = re.compile(r"meta\.json|tokenizer\.json|in_progress_\d+\.json")  # of fineweb.py
FILE_NAME = re.compile(r".*\.(txt|jsonl|json|csv|parquet)(?:\.(gz|zst))?", re.DOTALL)
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


def name_some(names: Sequence[str]) -> str:
    """The first five names in one line, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class RowCounter:
    """
    Counts the rows of each input, and the bad ones: those that hold no text.

    counts: {index of the input as a str: [rows, bad rows]} of every input that was read to its end.
    report: called with a line of text for each of an input's first ten bad rows.
    hinted: whether the hint about --document_separator was reported. Once is enough.
    """

    def __init__(self, counts: dict[str, list[int]] | None = None,
                 report: Callable[[str], Any] = print_to_stderr) -> None:
        self.counts: dict[str, list[int]] = {} if counts is None else counts
        self.report = report
        self.hinted = False
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
                            f"{self.first_bad_row}")

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
    or a Hugging Face dataset (the files of one configuration and split). A file that is named twice
    is left out the second time, and this is printed. Raises UserError for anything else.
    """
    inputs: dict[str, Input] = {}  # by real path, because links lead to one file by several names
    doubles = []
    for source in sources:
        for item in list_source(source, config, split):
            is_local = item.name != "builtin" and not item.name.startswith("hf://")
            key = os.path.realpath(item.name) if is_local else item.name
            if key in inputs:
                doubles.append(item.name)
            inputs.setdefault(key, item)
    if doubles and env_rank() == 0:
        print_to_stderr(f"left out what is named twice: {name_some(doubles)}")
    return list(inputs.values())


def list_source(source: str, config: str | None, split: str) -> list[Input]:
    """The inputs of one source. Raises UserError if it is not a source."""
    path = Path(source)
    if source == "builtin":
        return [Input("builtin", sum(map(len, builtin_documents())))]
    if path.is_dir():
        return [Input(str(p), p.stat().st_size) for p in list_text_files(path)]
    if path.is_file():
        if not FILE_NAME.fullmatch(source.lower()):
            raise UserError(f"cannot read {path}: its name must end in {FORMATS_HELP}")
        return [Input(str(path), path.stat().st_size)]
    if path.exists():
        raise UserError(f"cannot read {path}, because it is neither a file nor a folder: pipe its "
                        "text into --source -")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not FILE_NAME.fullmatch(source.lower()):
        return list_hub_files(source, config, split)
    raise UserError(f"source {source!r} is neither 'builtin', nor a file or folder here, nor a "
                    "Hugging Face dataset (USER/NAME)")


def is_on_hub(inputs: Sequence[Input]) -> bool:
    """Whether any of the inputs has to be downloaded from the Hugging Face hub."""
    return any(item.name.startswith("hf://") for item in inputs)


def is_compressed(inputs: Sequence[Input]) -> bool:
    """Whether the first input is compressed. The others are taken to be of the same kind."""
    return inputs[0].name.lower().endswith((".gz", ".zst", ".parquet"))


def list_text_files(folder: Path) -> list[Path]:
    """
    The text files in a folder and its subfolders, also the linked ones, sorted. What is left out is
    printed in one line. Raises UserError if there is no text file.
    """
    files: list[Path] = []
    left_out: list[Any] = []
    seen = set()  # the real paths of all subfolders, because links can lead in a circle

    def note_unreadable(error: OSError) -> None:
        left_out.append(error.filename)

    for parent, subfolders, names in os.walk(folder, onerror=note_unreadable, followlinks=True):
        subfolders.sort()
        if os.path.realpath(parent) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(parent))
        for path in (Path(parent, name) for name in names):
            is_text = (FILE_NAME.fullmatch(path.name.lower()) and os.path.isfile(path)
                       and not OWN_FILE.fullmatch(path.name))
            (files if is_text else left_out).append(path)
    if not files:
        raise UserError(f"{folder} holds no file that ends in {FORMATS_HELP}: name another folder")
    if left_out and env_rank() == 0:
        relative = [os.path.relpath(path, folder) for path in sorted(map(str, left_out))]
        print_to_stderr(f"left out of {folder}: {name_some(relative)} (read are {FORMATS_HELP})")
    return sorted(files)


def list_hub_files(name: str, config: str | None, split: str) -> list[Input]:
    """The files of a hub dataset's split as "hf://" inputs, pinned to the current revision."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem
    try:
        files = load_dataset_builder(name, config).config.data_files[split]
        inputs = [Input(url, HfFileSystem().info(url)["size"]) for url in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot list the files of dataset {name}, configuration {config}, split "
                        f"{split} ({error}): {HUB_HELP}") from error
    for url in files:
        if not FILE_NAME.fullmatch(url.lower()):
            raise UserError(f"cannot read {url}: its name must end in {FORMATS_HELP}")
    return inputs


def read_inputs(inputs: Sequence[Input], indices: Sequence[int], text_column: str,
                counter: RowCounter, *, download_dir: Path | None, delete_downloads: bool,
                prefetch: bool,
                separator: str | None = None) -> Iterator[tuple[int, int, str, bool]]:
    """
    Yield (index, number of the chunk in its input, text, starts_document) over the inputs that
    `indices` lists. `separator` stands between the documents of a .txt file.

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
            chunks = (read_builtin() if path is None
                      else read_file(path, text_column, counter, separator))
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
    write_atomically(path, lambda file: shutil.copyfileobj(sys.stdin.buffer, file))
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


def read_file(path: Path, text_column: str, counter: RowCounter,
              separator: str | None = None) -> Iterator[tuple[str, bool]]:
    """
    Yield (text, starts_document) over one file. A row that holds no text is skipped and counted.
    Raises UserError if the file is damaged.
    """
    match = FILE_NAME.fullmatch(path.name.lower())
    kind, compression = match.groups() if match else ("jsonl", None)
    try:
        if kind == "txt":
            yield from read_txt(path, separator, counter)
            return
        for where, row in ROW_READERS[kind](path, text_column, counter):
            counter.rows += 1
            text = row.get(text_column) if isinstance(row, dict) else None
            if isinstance(text, str):
                yield from cut_into_chunks(replace_surrogates(text))
            elif isinstance(row, ValueError):
                counter.count_bad_row(f"{path}, {where}", str(row))
            else:
                counter.count_bad_row(f"{path}, {where}", f"no text in column {text_column!r} "
                                      "(--text_column names another)")
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, "filename", None):  # a message like "Permission denied: 'a.txt'"
            raise
        fault = "cannot be read"
        if compression and not getattr(error, "errno", None):
            fault = f"is a damaged {COMPRESSIONS[compression]} file"
        raise UserError(f"{path} {fault} ({first_line(error)}): get it again") from error


def replace_surrogates(text: str) -> str:
    """The text with "?" for lone surrogates, which JSON can hold, but UTF-8 cannot encode."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="replace").decode("utf-8")


def open_file(path: Path) -> Any:
    """A file opened for reading bytes, uncompressed if its name ends in .gz or .zst."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() != ".zst":
        return open(path, "rb")
    import pyarrow
    try:
        return io.BufferedReader(pyarrow.input_stream(open(path, "rb"), compression="zstd"))
    except pyarrow.ArrowException as error:  # some builds of pyarrow lack zstd
        raise UserError(f"cannot read {path} ({error}): uncompress it first") from error


def read_txt(path: Path, separator: str | None,
             counter: RowCounter) -> Iterator[tuple[str, bool]]:
    """
    Yield (text, starts_document) over a UTF-8 text file, which is one document, or several with a
    `separator` between them. Nothing else is changed, but a byte order mark at the start is left
    out. Raises UserError for another encoding.
    """
    chunks = read_text_chunks(path)
    if separator is not None:
        num_documents = 0
        for text, starts_document in split_at_separator(chunks, separator):
            num_documents += starts_document
            yield text, starts_document
        if num_documents == 1 and not counter.hinted:
            counter.hinted = True
            counter.report(f"{path} is one document, because no {separator!r} parts it")
        return
    for number, text in enumerate(chunks):
        if END_OF_TEXT in text and not counter.hinted:
            counter.hinted = True
            counter.report(f"{path} holds {END_OF_TEXT}: with --document_separator "
                           f"'{END_OF_TEXT}' each part is a document of its own")
        yield text, number == 0


def read_text_chunks(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in parts that end after a line break if there is one."""
    rest = ""
    try:
        with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="") as file:
            for block in iter(lambda: file.read(CHUNK_CHARS), ""):
                text = rest + block
                cut = text.rfind("\n") + 1 or len(text)  # a long line is cut anywhere
                yield text[:cut]
                rest = text[cut:]
    except UnicodeDecodeError:
        raise UserError(describe_bad_utf8(path)) from None
    if rest:
        yield rest


def describe_bad_utf8(path: Path) -> str:
    """Which byte of a text file is not UTF-8, and what to do about it."""
    with open_file(path) as file:
        faults = (describe_bad_line(line) for line in file)
        number, fault = next(((n, f) for n, f in enumerate(faults, 1) if f), (1, "it has changed"))
        for _ in file:  # a damaged compressed file may fail only at its end, with a better message
            pass
    return f"{path}, line {number}: {fault}"


def describe_bad_line(line: bytes) -> str | None:
    """Which byte of a line is not UTF-8, and what to do about it; None if there is none."""
    try:
        line.decode("utf-8")
        return None
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return ("the file ends in the middle of a character. Get the whole file, or convert it "
                    "if its text is not in UTF-8")
        return (f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8 "
                f"({error.reason}). Repair it, or convert the file if its text is in another "
                "encoding, for example with iconv -f GB18030 -t UTF-8")


def split_at_separator(chunks: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """
    Yield (text, starts_document) over the documents between separators. A line break that follows a
    separator belongs to the separator.
    """
    rest, starts_document, follows_separator = "", True, False
    for chunk in chunks:
        parts = (rest + chunk).split(separator)
        last = parts.pop()
        # the end of the text may be the beginning of a separator, and then waits for the next chunk
        waiting = next((n for n in range(min(len(separator) - 1, len(last)), 0, -1)
                        if separator.startswith(last[-n:])), 0)
        rest = last[len(last) - waiting:]
        for number, part in enumerate([*parts, last[:len(last) - waiting]]):
            if number > 0:
                starts_document = follows_separator = True
            if follows_separator and part:
                part = re.sub(r"\A\r?\n", "", part)
                follows_separator = False
            if part:
                yield part, starts_document
                starts_document = False
    if rest:
        yield rest, starts_document


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ("line N", bytes) over the lines of a file that are not blank, without a BOM."""
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"")
            if line.strip():
                yield f"line {number}", line


# The readers below yield (where, row) over the rows of a file: a dict with the text in
# `text_column`, another value, or a ValueError that says why the row cannot be read


def read_jsonl(path: Path, text_column: str, counter: RowCounter) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file with a JSON value in each line."""
    return ((where, parse_json(line)) for where, line in read_lines(path))


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8, or a ValueError if it is malformed."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        return ValueError(f"this is not JSON ({first_line(error)})")


def read_json(path: Path, text_column: str, counter: RowCounter) -> Iterator[tuple[str, Any]]:
    """
    Yield the rows of a .json file, which has a row in each line, or is one array of rows. An array
    is read into memory as a whole. A file of one other object, like settings, is left out.
    """
    lines = (line for _, line in read_lines(path))
    first, second = next(lines, b""), next(lines, b"")
    if not first or (second and isinstance(parse_json(first), dict)):
        yield from read_jsonl(path, text_column, counter)
        return
    with open_file(path) as file:
        value = parse_json(file.read())
    if isinstance(value, list):
        yield from ((f"item {number}", row) for number, row in enumerate(value, 1))
    elif isinstance(value, dict) and text_column not in value:
        counter.report(f"left out {path}: it is one JSON object without {text_column!r}")
    elif isinstance(value, ValueError) and not first.lstrip().startswith(b"["):
        yield from read_jsonl(path, text_column, counter)
    else:
        yield "its only value", value


def read_csv(path: Path, text_column: str, counter: RowCounter) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a .csv file, whose first line names the columns."""
    csv.field_size_limit(2**31 - 1)
    # a byte that is not UTF-8 becomes a lone surrogate, so that only its own row is bad
    with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", errors="surrogateescape",
                          newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            check_column(path, text_column, rows.fieldnames or [text_column])
            for row in rows:
                text = row[text_column] or ""
                good = replace_surrogates(text) == text
                yield f"line {rows.line_num}", row if good else ValueError("the text is not UTF-8")
        except csv.Error as error:
            raise UserError(f"{path}, after line {rows.line_num}: this is not CSV ({error}). "
                            "Repair the file, or get it again") from error


def check_column(path: Path, text_column: str, names: Sequence[str]) -> None:
    """Raise UserError if a file's columns, `names`, do not include the text column."""
    if text_column not in names:
        raise UserError(f"{path} has no column {text_column!r}: --text_column can be one of "
                        f"{', '.join(names)[:500]}")


def read_parquet(path: Path, text_column: str, counter: RowCounter) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a parquet file, with one batch of them in memory at a time."""
    import pyarrow.parquet
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_file(path))
        if path.suffix.lower() != ".parquet":  # a compressed file cannot be read from its end
            compressed, file = file, stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(compressed, file)
        try:
            table = pyarrow.parquet.ParquetFile(file)
            check_column(path, text_column, table.schema_arrow.names)
            batches = table.iter_batches(batch_size=500, columns=[text_column])
            texts = (text for batch in batches for text in list_texts(batch.column(0)))
            for number, text in enumerate(texts, 1):
                is_bad = isinstance(text, ValueError)
                yield f"row {number}", text if is_bad else {text_column: text}
        except UserError:
            raise
        except Exception as error:  # damage raises many kinds of errors in pyarrow
            raise UserError(f"{path} is not a readable parquet file ({first_line(error)}): get it "
                            "again") from error


def list_texts(column: Any) -> list[Any]:
    """The values of a pyarrow.Array. Bytes become text; what is not UTF-8 becomes a ValueError."""
    try:
        values = column.to_pylist()
        if not any(isinstance(value, bytes) for value in values):
            return values
    except UnicodeDecodeError:
        pass

    def decode(item: Any) -> Any:
        try:
            value = item.as_py()
            return value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            return error

    return [decode(item) for item in column]


ROW_READERS = {"jsonl": read_jsonl, "json": read_json, "csv": read_csv, "parquet": read_parquet}


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
