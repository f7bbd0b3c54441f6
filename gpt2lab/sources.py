"""
Where text comes from: local files, Hugging Face datasets, and what every Python carries.

A source is a list of inputs in a fixed order, each read as a stream of pieces (text,
starts_document). A document longer than PIECE_CHARS comes in several pieces, which joined are it.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from gpt2lab.cli import UserError

TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
CHUNK_CHARS = 1 << 18  # about 60,000 tokens of English
HUB_ATTEMPTS = 5  # on top of huggingface_hub's own retries
HUB_HELP = ("check the name and the network, set HF_ENDPOINT to a mirror of the hub or HF_TOKEN to "
            "your token, or HF_HUB_OFFLINE=1 to use what is in the cache; what is finished stays")


class Input(NamedTuple):
    """One file to read: a local path, a "hf://..." address, or "builtin"; and its size in bytes."""

    name: str
    size: int


class RowCounter:
    """
    Counts the rows of a file and names the first that hold no text; more than 1 % are an error.
    `files` keeps {index of the input: [rows, bad rows]} of every file that was read to its end. A
    quiet one keeps what it would say, for another to take.
    """

    def __init__(self, files=None, quiet=False):
        self.files, self.quiet = {} if files is None else files, quiet
        self.rows = self.bad = 0
        self.first_bad, self.unsaid = None, []

    def take(self, other):
        """Count what a quiet tally counted, and say it."""
        self.files.update(other.files)
        for line in other.unsaid:
            self.say(line)

    def say(self, line):
        """Print a line to stderr, or keep it."""
        if self.quiet:
            self.unsaid.append(line)
        else:
            print(line, file=sys.stderr)

    def skip(self, where, why):
        """Count a row without text."""
        self.bad += 1
        self.first_bad = self.first_bad or f"{where}: {why}"
        if self.bad <= 10:
            more = " (further ones are only counted)" if self.bad == 10 else ""
            self.say(f"skipped {where}: {why}{more}")
        if self.rows >= 10_000:  # a long file that is all wrong need not be read to its end
            self.check()

    def check(self):
        """Raise UserError if more than 1 % of the file's rows are bad."""
        if self.bad > self.rows * 0.01:
            raise UserError(f"{self.bad} of {self.rows} rows hold no text, the first is "
                            f"{self.first_bad} (--text_column names the right one)")

    def end_file(self, index):
        """Note a file that was read to its end, and start counting the next."""
        self.check()
        self.files[str(index)] = [self.rows, self.bad]
        self.rows = self.bad = 0


# -----------------------------------------------------------------------------
# inputs


def list_inputs(sources, config, split):
    """
    The inputs of all sources: "builtin", files, folders (their text files, sorted), or hub datasets
    (the files of one configuration and split). Raises UserError for anything else.
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


def is_on_hub(inputs):
    """Whether any of the inputs is to be downloaded."""
    return any(i.name.startswith("hf://") for i in inputs)


def list_text_files(path):
    """The text files under `path`, sorted; `path` itself if it is a file."""
    if path.is_file():
        if not path.name.endswith(TEXT_SUFFIXES):
            raise UserError(f"cannot read {path}: it is none of {', '.join(TEXT_SUFFIXES)}")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(TEXT_SUFFIXES))
    if not files:
        raise UserError(f"no {', '.join(TEXT_SUFFIXES)} file in {path}")
    return files


def list_hub_files(name, config, split):
    """The files of a hub dataset's split, pinned to the revision of now, as "hf://" inputs."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem
    try:
        files = load_dataset_builder(name, config).config.data_files[split]
        return [Input(url, HfFileSystem().info(url)["size"]) for url in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot list the files of dataset {name}, configuration {config}, split "
                        f"{split} ({error}): {HUB_HELP}") from error


def read_inputs(inputs, indices, text_column, tally, downloads, drop, prefetch):
    """
    Yield (index, piece_number, text, starts_document) over the inputs that `indices` lists. With
    `prefetch` the next hub file downloads to the folder `downloads` while one is read; with `drop`
    those that were read are deleted, so that at most two lie there.
    """
    with ThreadPoolExecutor(1) as pool:
        upcoming = None
        for place, index in enumerate(indices):
            upcoming = upcoming or pool.submit(local_path, inputs[index], downloads)
            path, ours = upcoming.result()
            upcoming = None
            if prefetch and place + 1 < len(indices):
                upcoming = pool.submit(local_path, inputs[indices[place + 1]], downloads)
            pieces = read_builtin() if path is None else read_file(path, text_column, tally)
            for number, (text, starts) in enumerate(pieces):
                yield index, number, text, starts
            tally.end_file(index)
            if ours and drop:
                path.unlink()


def local_path(item, downloads):
    """(path, ours): where an input lies on disk, downloaded first if need be; ours to delete?"""
    if item.name == "builtin":
        return None, False
    if not item.name.startswith("hf://"):
        return Path(item.name), False
    from huggingface_hub import HfFileSystem, hf_hub_download, try_to_load_from_cache
    file = HfFileSystem().resolve_path(item.name)
    what = dict(repo_id=file.repo_id, filename=file.path_in_repo, repo_type="dataset",
                revision=file.revision)
    cached = try_to_load_from_cache(**what)
    if isinstance(cached, str):
        return Path(cached), False
    for attempt in range(HUB_ATTEMPTS):
        try:  # continues a partial download, and checks the length of the whole
            return Path(hf_hub_download(**what, local_dir=downloads)), True
        except (OSError, RuntimeError) as error:
            if attempt == HUB_ATTEMPTS - 1 or "offline" in str(error).lower():
                raise UserError(f"cannot download {item.name} ({error}): {HUB_HELP}") from error
            wait = retry_after(error) or min(2 ** attempt, 60)
            print(f"download failed, again in {wait} s: {error}", file=sys.stderr)
            time.sleep(wait)


def retry_after(error):
    """Seconds a server asked to wait, from the response that an HTTP error carries; else None."""
    response = getattr(error, "response", None)
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return int(value) if value.isdigit() else None


def spool_stdin(folder):
    """Copy standard input to a file, since it is read more than once; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stdin.txt"
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path


# -----------------------------------------------------------------------------
# readers


def cut_in_chunks(text):
    """Yield (piece, starts_document), the pieces cut after a line end where there is one."""
    starts = True
    while len(text) > CHUNK_CHARS:
        cut = text.rfind("\n", 0, CHUNK_CHARS) + 1 or CHUNK_CHARS
        yield text[:cut], starts
        text, starts = text[cut:], False
    if text:
        yield text, starts


def read_file(path, text_column, tally):
    """Yield (text, starts_document) over one .txt, .jsonl, .jsonl.gz or .parquet file."""
    if path.name.endswith(".txt"):
        yield from read_txt(path)
        return
    rows = read_parquet(path, text_column) if path.suffix == ".parquet" else read_jsonl(path)
    for where, row in rows:
        tally.rows += 1
        text = row.get(text_column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            tally.skip(f"{path}, {where}", f"no text in column {text_column!r}")
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which UTF-8 cannot
            text = text.encode("utf-8", errors="replace").decode("utf-8")
        yield from cut_in_chunks(text)


def read_txt(path):
    """Yield the pieces of one UTF-8 text file, read as it is but for a leading byte order mark."""
    starts, rest = True, ""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for chunk in iter(lambda: file.read(CHUNK_CHARS), ""):
                head, newline, rest = (rest + chunk).rpartition("\n")
                head, rest = (head, rest) if newline else (rest, "")  # long lines: cut anywhere
                yield head + newline, starts
                starts = False
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): convert it, for example "
                        "with iconv -f GB18030 -t UTF-8") from error
    if rest:
        yield rest, starts


def read_lines(path):
    """Yield ("line N", bytes) over a .jsonl or .jsonl.gz file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                yield f"line {number}", line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"")
        except (EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is a damaged gzip file ({error}): get it again") from error


def read_jsonl(path):
    """Yield ("line N", row) over a .jsonl or .jsonl.gz file; None for a malformed row."""
    return ((where, parse_line(line)) for where, line in read_lines(path) if line.strip())


def parse_line(line):
    """The JSON value of a line of UTF-8, or None if it is malformed."""
    try:
        return json.loads(line)
    except ValueError:  # both of JSON and of UTF-8
        return None


def read_parquet(path, text_column):
    """Yield ("row N", {text_column: text}) over a parquet file, a batch in memory at a time."""
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
        raise UserError(f"{path} is no readable parquet file ({error}): get it again") from error


# -----------------------------------------------------------------------------
# the text that every Python carries


def read_builtin():
    """Yield the pieces of builtin_documents()."""
    for text in builtin_documents():
        yield from cut_in_chunks(text)


@functools.cache  # parsing the library takes seconds, and every pass over the source asks for it
def builtin_documents():
    """
    About 2 MB of English in a fixed shuffled order: the language reference that help() shows, and
    the docstrings of the standard library with the names they belong to.
    """
    import sysconfig
    documents = []
    try:
        from pydoc_data import topics
        documents += topics.topics.values()
    except ImportError:
        pass  # some distributions package it apart
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


def module_docstrings(path, name):
    """The docstrings of one source file, each under the name and arguments it belongs to."""
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
            sections.append(f"{getattr(node, 'name', name)}{arguments}\n\n{docstring}\n")
    return "\n".join(sections)
