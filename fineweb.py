"""
Turns text into the token shards that train_gpt2.py reads.

    python fineweb.py                                        # FineWeb-EDU sample-10BT, gpt2 tokens
    python fineweb.py --max_tokens 10M --out trial           # a small part of it
    python fineweb.py --source a.txt b.jsonl.gz folder/ --tokenizer bpe:8192 --out my_data
    python fineweb.py --source builtin --tokenizer bpe:1536 --out demo_data   # offline, 2 MB
    python fineweb.py --import train.bin val.bin --out owt   # token files of nanoGPT or llm.c
    torchrun --nproc_per_node=4 fineweb.py                   # four processes share the files
    python fineweb.py --verify my_data                       # is the folder complete and undamaged?

A folder of shards holds edufineweb_val_000000.npy, edufineweb_train_000001.npy and so on: 1-D
uint16 or uint32, each document preceded by the end-of-text token. meta.json describes the folder
and is written last. Stop fineweb.py at any moment and start it again: it continues after the last
finished shard, and the folder ends up the same, byte for byte. This module never imports torch.
"""

import argparse
import contextlib
import itertools
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gpt2lab import sources
from gpt2lab.cli import (
    UserError,
    available_cpus,
    env_int,
    env_ranks,
    make_parser,
    run_main,
)
from gpt2lab.files import sha256, write_atomically, write_json
from gpt2lab.shards import (
    FIRST_INDEX,
    SPLITS,
    check_folder,
    check_writable,
    format_totals,
    head_checksum,
    new_state,
    print_stats,
    read_meta,
    read_state,
    shard_name,
    token_dtype,
    verify,
    write_folder,
)
from gpt2lab.sources import Input, RowCounter
from gpt2lab.token_files import check_heads, list_token_files, write_splits
from gpt2lab.tokenizer import Tokenizer, check_spec, make_tokenizer

SAMPLE_BYTES = 100_000_000  # a trained tokenizer learns from at most this much text
KEPT_BYTES = 100_000_000  # a corpus up to this size is read once, and stays in memory
MAX_THREADS = 256
GROUP_CHARS = 1 << 18  # how much text a tokenizer thread gets at a time
BYTES_PER_TOKEN = 4  # a rough figure for English, used only to tell small corpora from large ones
COMPRESSION = 4  # compressed text may be this many times as long as its file
PROGRESS_TOKENS = 500_000  # the progress bar moves at least this often
DOWNLOADS = "in_progress_downloads"  # folder inside the folder of shards, removed at the end


# -----------------------------------------------------------------------------
# text in chunks


class TextChunk(NamedTuple):
    """
    A chunk of a document's text with its position in the input. In a large corpus, split is None,
    because the order decides: the first val_size tokens become val.
    """

    text: str
    starts_document: bool
    split: str | None
    file: int  # index of the input
    number: int  # of the chunk in its input
    num_bytes: int  # of the text in UTF-8
    tokens: np.ndarray | None = None  # token ids of the text, if they are known already


def split_by_bytes(chunks: Iterable[TextChunk], train_bytes: int) -> Iterator[TextChunk]:
    """
    Label the first `train_bytes` bytes of a small corpus train and the rest val. The cut is after a
    line break if there is one. After the cut, val starts a new document.
    """
    left, split = train_bytes, "train"
    for chunk in chunks:
        if split == "train" and chunk.num_bytes > left:
            data, chunk = chunk.text.encode("utf-8"), chunk._replace(tokens=None)
            head = data[:data.rfind(b"\n", 0, left) + 1]
            if not head:  # no line break: cut between two characters
                head = data[:left].decode("utf-8", errors="ignore").encode("utf-8")
            if head:
                yield chunk._replace(text=head.decode("utf-8"), split="train", num_bytes=len(head))
            tail = data[len(head):]
            chunk = chunk._replace(
                text=tail.decode("utf-8"), starts_document=True, num_bytes=len(tail))
            split = "val"
        left -= chunk.num_bytes
        yield chunk._replace(split=split)


class Corpus:
    """
    The text of all inputs, in order. A small corpus is cut into train and val by bytes, and a very
    small one is kept in memory.
    """

    def __init__(self, inputs: Sequence[Input], text_column: str, separator: str | None,
                 download_dir: Path | None, prefetch: bool) -> None:
        self.inputs, self.text_column, self.separator = inputs, text_column, separator
        self.download_dir, self.prefetch = download_dir, prefetch
        self.train_bytes: int | None = None  # of a small corpus: how many bytes in front are train
        # of a very small corpus: all chunks, the row counts, and the messages about bad rows
        self.kept_chunks: list[TextChunk] = []
        self.kept_counts: dict[str, list[int]] = {}
        self.kept_messages: list[str] = []

    def chunks(self, indices: Sequence[int] | None = None, first: Sequence[int] = (0, 0),
               counter: RowCounter | None = None,
               delete_downloads: bool = False) -> Iterator[TextChunk]:
        """
        Yield the chunks of the inputs that `indices` lists (None: all inputs), from position
        `first`, (file, number), on. Without a `counter`, bad rows are not reported.
        """
        counter = counter or RowCounter(report=lambda message: None)
        if self.kept_chunks and self.train_bytes is not None:
            counter.counts.update(self.kept_counts)
            for message in self.kept_messages:
                counter.report(message)
            return split_by_bytes(self.kept_chunks, self.train_bytes)
        indices = range(len(self.inputs)) if indices is None else indices
        read = sources.read_inputs(
            self.inputs, [i for i in indices if i >= first[0]], self.text_column, counter,
            download_dir=self.download_dir, delete_downloads=delete_downloads,
            prefetch=self.prefetch, separator=self.separator)
        chunks = (TextChunk(text, starts, None, file, number, len(text.encode("utf-8")))
                  for file, number, text, starts in read
                  if (file, number) >= tuple(first))  # earlier chunks are read and thrown away
        return chunks if self.train_bytes is None else split_by_bytes(chunks, self.train_bytes)

    def measure(self, limit: float, tokenizer: Tokenizer | None, num_proc: int) -> int | None:
        """
        The corpus's size in UTF-8 bytes, or None if it is more than `limit`. Up to KEPT_BYTES, the
        chunks stay in memory, so that they need not be read again. If a `tokenizer` is given, they
        are tokenized while the text is read.
        """
        counter = RowCounter(report=self.kept_messages.append)
        chunks = self.chunks(counter=counter)
        file_bytes = sum(item.size for item in self.inputs)
        text_bytes = file_bytes * (COMPRESSION if sources.is_compressed(self.inputs) else 1)
        if tokenizer and text_bytes <= KEPT_BYTES:
            chunks = (chunk._replace(tokens=tokens)
                      for chunk, tokens in tokenize(chunks, tokenizer, num_proc))
        total, kept = 0, []
        for chunk in chunks:
            total += chunk.num_bytes
            if total > limit:
                return None
            if total <= KEPT_BYTES:
                kept.append(chunk)
            else:
                kept.clear()
        self.kept_chunks, self.kept_counts = kept, counter.counts
        return total


def tokenizer_sample(chunks: Iterable[TextChunk], skipped_chars: int) -> Iterator[str]:
    """
    Yield texts to train a tokenizer on, SAMPLE_BYTES in all. Text of val is left out; as long as
    chunks have no split, their first `skipped_chars` characters may be val's.
    """
    num_bytes, rest = 0, ""
    for chunk in chunks:
        if chunk.split is None and skipped_chars > 0:
            rest = chunk.text[skipped_chars:]
            skipped_chars -= len(chunk.text)
        elif chunk.split != "val" and chunk.text:
            yield chunk.text
            num_bytes += chunk.num_bytes
        if num_bytes >= SAMPLE_BYTES:
            return
    if num_bytes < len(rest):  # most of the text is in the chunk in which val ends
        yield rest


# -----------------------------------------------------------------------------
# from chunks to shards


def tokenize(chunks: Iterable[TextChunk], tokenizer: Tokenizer,
             num_proc: int) -> Iterator[tuple[TextChunk, np.ndarray]]:
    """Yield (chunk, its token ids) in the order of the chunks. Threads tokenize groups ahead."""
    pending: deque[tuple[list[TextChunk], Future]] = deque()
    group, chars = [], 0
    with ThreadPoolExecutor(num_proc) as pool:
        for chunk in chunks:
            group.append(chunk)
            chars += len(chunk.text)
            if chars < GROUP_CHARS:
                continue
            pending.append((group, pool.submit(tokenize_group, group, tokenizer)))
            group, chars = [], 0
            if len(pending) > 2 * num_proc:  # keeps all threads busy, and limits the memory
                done, future = pending.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in pending:
            yield from zip(done, future.result(), strict=True)
        yield from zip(group, tokenize_group(group, tokenizer), strict=True)


def tokenize_group(group: list[TextChunk], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of each chunk. Only the chunks whose token ids are not known yet are tokenized."""
    new_texts = [chunk.text for chunk in group if chunk.tokens is None]
    encoded = iter(tokenizer.encode_batch(new_texts) if new_texts else [])
    return [next(encoded) if chunk.tokens is None else chunk.tokens for chunk in group]


class ShardWriter:
    """
    Cuts the token stream of one process into shards. After each shard it saves `state`, from which
    to resume: the totals so far, and `next` = [file, chunk, tokens of that chunk already written].

    Chunks without a split go to val until val has `val_size` tokens, then to train. `max_tokens`
    limits both splits together. `prefix` comes before the names of the shards.
    """

    def __init__(self, out_dir: Path, tokenizer: Tokenizer, state: dict, state_file: Path, *,
                 val_size: int, shard_size: int, max_tokens: int | None, prefix: str) -> None:
        self.out_dir, self.tokenizer, self.prefix = out_dir, tokenizer, prefix
        self.state, self.state_file = state, state_file
        self.val_size, self.shard_size, self.max_tokens = val_size, shard_size, max_tokens
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.resumed_from = tuple(state["next"])
        self.split = ""  # of the shard in the buffer
        self.buffer, self.filled = np.empty(0, self.dtype), 0
        self.total = self.sum_totals("tokens")

    @property
    def full(self) -> bool:
        """Whether there are `max_tokens` tokens."""
        return self.max_tokens is not None and self.total >= self.max_tokens

    def sum_totals(self, key: str) -> int:
        """Number of "tokens", "documents" or "bytes" so far, both splits together."""
        return sum(totals[key] for totals in self.state["totals"].values())

    def split_and_size(self, chunk: TextChunk) -> tuple[str, int]:
        """(split, number of tokens) of the shard that the chunk's next token goes to."""
        if chunk.split is not None:
            return chunk.split, self.shard_size
        left = self.val_size - self.state["totals"]["val"]["tokens"]
        return ("val", self.filled + left) if left > 0 else ("train", self.shard_size)

    def add(self, chunk: TextChunk, tokens: np.ndarray) -> None:
        """Append the token ids of a chunk, and write every shard that they fill."""
        if chunk.starts_document:
            tokens = np.concatenate([np.array([self.tokenizer.eot], tokens.dtype), tokens])
        file, number, written = self.resumed_from
        used = written if (chunk.file, chunk.number) == (file, number) else 0
        while used < len(tokens) and not self.full:
            split, size = self.split_and_size(chunk)
            if split != self.split:
                self.flush([chunk.file, chunk.number, used])
                self.split, self.buffer = split, self.new_buffer(size)
            room = size - self.filled
            if self.max_tokens is not None:
                room = min(room, self.max_tokens - self.total)
            part = tokens[used:used + room]
            self.buffer[self.filled:self.filled + len(part)] = part
            self.filled += len(part)
            self.add_to_totals(chunk, part, whole=len(part) == len(tokens), first=used == 0)
            used += len(part)
            if self.filled == size:
                chunk_done = used == len(tokens)
                self.flush([chunk.file, chunk.number + 1, 0] if chunk_done
                           else [chunk.file, chunk.number, used])

    def new_buffer(self, size: int) -> np.ndarray:
        """An array for the tokens of a shard. Raises UserError if they do not fit into memory."""
        try:
            return np.empty(size, self.dtype)
        except (MemoryError, ValueError) as error:
            raise UserError(f"a shard of {size:,} tokens does not fit into memory: lower "
                            "--shard_size") from error

    def add_to_totals(self, chunk: TextChunk, part: np.ndarray, whole: bool, first: bool) -> None:
        """
        Add a part of a chunk to the totals of its split. `whole`: the part is the whole chunk.
        `first`: the chunk begins with it.
        """
        totals = self.state["totals"][self.split]
        eot = int(first and chunk.starts_document)
        num_bytes = chunk.num_bytes if whole else len(self.tokenizer.decode_bytes(part[eot:]))
        totals["tokens"] += len(part)
        totals["documents"] += eot
        totals["bytes"] += num_bytes
        self.total += len(part)

    def flush(self, position: list[int]) -> None:
        """Write the tokens in the buffer as a shard, then the state to resume at `position`."""
        if not self.filled:
            return
        tokens = self.buffer[:self.filled]
        index = sum(shard["split"] == self.split for shard in self.state["shards"])
        name = self.prefix + shard_name(self.split, FIRST_INDEX[self.split] + index)
        write_atomically(self.out_dir / name, lambda file: np.save(file, tokens))
        self.state["shards"].append({
            "name": name, "split": self.split, "tokens": len(tokens),
            "head": head_checksum(tokens), "sha256": sha256(tokens)})
        self.state["next"] = position
        self.filled = 0
        write_json(self.state_file, self.state)


def write_shards(chunks: Iterable[TextChunk], tokenizer: Tokenizer, writer: ShardWriter,
                 inputs: Sequence[Input], num_proc: int) -> None:
    """Tokenize the chunks, write them as shards, and show a progress bar on stderr."""
    size_before = list(itertools.accumulate((item.size for item in inputs), initial=0))
    text_per_size = 2.0 if sources.is_compressed(inputs) else 1.0  # a guess for the first file
    file = None
    options = dict(unit="tok", unit_scale=True, initial=writer.total, total=writer.max_tokens)
    with tqdm(**options) as progress:  # closed before an error is printed
        for chunk, tokens in tokenize(chunks, tokenizer, num_proc):
            writer.add(chunk, tokens)
            if writer.full:
                break
            if chunk.file == file and writer.total - progress.n < PROGRESS_TOKENS:
                continue
            num_bytes, documents = writer.sum_totals("bytes"), writer.sum_totals("documents")
            if chunk.file != file and size_before[chunk.file] > 0:
                text_per_size = num_bytes / size_before[chunk.file]
            if writer.max_tokens is None:  # an estimate, from which tqdm tells the time left
                tokens_per_byte = writer.total / max(num_bytes, 1)
                progress.total = int(size_before[-1] * text_per_size * tokens_per_byte)
            file = chunk.file
            # tqdm redraws the bar at most ten times a second, however many files there are
            progress.set_postfix_str(f"{documents:,} docs, {Path(inputs[file].name).name}",
                                     refresh=False)
            progress.update(writer.total - progress.n)
        writer.flush([len(inputs), 0, 0])
        progress.total = writer.total
        progress.update(writer.total - progress.n)


# -----------------------------------------------------------------------------
# from arguments to a folder of shards


def check_arguments(prepare_args: dict) -> None:
    """Raise UserError for arguments of `prepare` that cannot work."""
    check_spec(prepare_args["tokenizer"])
    if not 0 < prepare_args["val_fraction"] < 1:
        raise UserError(f"--val_fraction {prepare_args['val_fraction']} must lie between 0 and 1")
    if prepare_args["document_separator"] == "":
        raise UserError("--document_separator must not be empty")
    for name in ("shard_size", "max_tokens"):
        if prepare_args[name] is not None and prepare_args[name] < 2:
            raise UserError(f"--{name} {prepare_args[name]} must be at least 2")


def find_inputs(prepare_args: dict, earlier: list[Input], out_dir: Path) -> list[Input]:
    """
    The inputs to read. `earlier` are those of the half-done folder, [] for a new one. Raises
    UserError if the inputs have changed since.
    """
    if sources.is_on_hub(earlier):
        return earlier  # pinned to the revision of the start, and known without a network
    names = prepare_args["source"]
    if "-" in names:
        path = str(sources.spool_stdin(out_dir / DOWNLOADS))
        names = [path if name == "-" else name for name in names]
        old_path = str(out_dir / "downloads" / "stdin.txt")  # where earlier versions had it
        earlier = [item._replace(name=path) if item.name == old_path else item for item in earlier]
    inputs = sources.list_inputs(names, prepare_args["config"], prepare_args["split"])
    if not earlier:
        return inputs
    present, known = set(inputs), set(earlier)
    changed = [item.name for item in earlier if item not in present]
    if changed:
        raise UserError(f"the sources have changed since {out_dir} was begun ({changed[0]}): "
                        "choose another --out, or remove it and start again")
    added = [item.name for item in inputs if item not in known]
    if added:
        sources.print_to_stderr(f"left out what was not there when {out_dir} was begun: "
                                f"{sources.name_some(added)}")
    return earlier


def cut_small_corpus(corpus: Corpus, prepare_args: dict, tokenizer: Tokenizer | None,
                     num_proc: int) -> None:
    """
    Cut a corpus into train and val by bytes if it is too small for two shards at BYTES_PER_TOKEN.
    With a `tokenizer`, its text is tokenized in the same pass. Raises UserError if it has no text.
    """
    if sources.is_on_hub(corpus.inputs):  # measuring would mean downloading all of it
        return
    limit = 2 * prepare_args["shard_size"] * BYTES_PER_TOKEN
    if prepare_args["max_tokens"]:  # N bytes never give more than N tokens
        limit = min(limit, prepare_args["max_tokens"])
    num_bytes = corpus.measure(limit, tokenizer, num_proc)
    if num_bytes == 0:
        reason = f" ({corpus.kept_messages[0]})" if corpus.kept_messages else ""
        raise UserError(f"the source holds no text{reason}: name another --source")
    if num_bytes is not None:
        corpus.train_bytes = int(num_bytes * (1 - prepare_args["val_fraction"]))


def count_val_tokens(prepare_args: dict) -> int:
    """Tokens of val in a large corpus: one shard, but at most `val_fraction` of `max_tokens`."""
    if prepare_args["max_tokens"] is None:
        return prepare_args["shard_size"]
    share = int(prepare_args["max_tokens"] * prepare_args["val_fraction"])
    return min(prepare_args["shard_size"], max(share, 1))


def open_corpus(inputs: list[Input], prepare_args: dict, out_dir: Path,
                num_proc: int) -> tuple[Corpus, Tokenizer]:
    """The corpus, cut into train and val if it is small, and its tokenizer, trained if need be."""
    corpus = Corpus(inputs, prepare_args["text_column"], prepare_args["document_separator"],
                    out_dir / DOWNLOADS, prefetch=prepare_args["max_tokens"] is None)
    spec = prepare_args["tokenizer"]
    # a tokenizer is trained after the cut, because it must not see the text of val
    tokenizer = None if ":" in spec else make_tokenizer(spec)
    cut_small_corpus(corpus, prepare_args, tokenizer, num_proc)
    if tokenizer is None:
        # val is what comes first. 1.5 times its expected length is skipped, to be on the safe side
        val_chars = int(1.5 * BYTES_PER_TOKEN * count_val_tokens(prepare_args))
        tokenizer = make_tokenizer(spec, lambda: tokenizer_sample(corpus.chunks(), val_chars))
    return corpus, tokenizer


def prepare(source: Iterable[str | Path], out: str | Path, tokenizer: str | Path = "gpt2", *,
            config: str | None = None, split: str = "train", text_column: str = "text",
            document_separator: str | None = None, shard_size: int = 100_000_000,
            val_fraction: float = 0.1, max_tokens: int | None = None, rank: int = 0,
            world_size: int = 1, num_proc: int | None = None,
            keep_downloads: bool = False) -> dict | None:
    """
    Write the folder of shards `out` from `source`, a list as sources.list_inputs takes it. Returns
    the dict of its meta.json, or None while other ranks are still working. Raises UserError for
    everything that the user can fix. `document_separator` stands between documents of a .txt file.

    The first shard of `shard_size` tokens is val; with `max_tokens`, val has at most `val_fraction`
    of these tokens. A corpus too small for two shards is split by text instead: its last
    `val_fraction` of bytes is val. Each rank takes every world_size-th input.
    """
    prepare_args = {
        "source": [str(s) for s in source], "config": config, "split": split,
        "text_column": text_column, "document_separator": document_separator,
        "tokenizer": str(tokenizer), "shard_size": shard_size, "val_fraction": val_fraction,
        "max_tokens": max_tokens, "world_size": world_size}
    check_arguments(prepare_args)
    if "" in (*prepare_args["source"], str(out)):
        raise UserError("neither --source nor --out may be empty")
    out_dir = Path(out)
    check_folder(out_dir, prepare_args)
    if (out_dir / "meta.json").is_file():
        print(f"{out_dir} is complete")
        return read_meta(out_dir)
    check_writable(out_dir)
    state = read_state(out_dir, rank)
    inputs = find_inputs(prepare_args, [Input(*item) for item in state.get("inputs", [])], out_dir)
    num_proc = min(num_proc or available_cpus(), MAX_THREADS)
    # local files are read here, before anything is written, so that bad files leave no folder
    corpus, loaded_tokenizer = open_corpus(inputs, prepare_args, out_dir, num_proc)
    if not state or corpus.train_bytes is not None:  # a small corpus is written from the start
        state = new_state(prepare_args, inputs)
    meta = write_folder(
        out_dir, prepare_args, loaded_tokenizer, state,
        lambda state_file: write_share(corpus, loaded_tokenizer, prepare_args, state, state_file,
                                       rank, num_proc, keep_downloads), rank)
    if meta is not None:
        end_downloads(out_dir, keep_downloads)
    return meta


def write_share(corpus: Corpus, tokenizer: Tokenizer, prepare_args: dict, state: dict,
                state_file: Path, rank: int, num_proc: int, keep_downloads: bool) -> None:
    """Write the shards of this rank's inputs, continuing from `state`, and save that it is done."""
    world_size, max_tokens = prepare_args["world_size"], prepare_args["max_tokens"]
    indices = range(len(corpus.inputs))[rank::world_size]
    val_size = count_val_tokens(prepare_args) if rank == 0 else 0
    if corpus.train_bytes is not None:  # small: rank 0 writes all of it, and its chunks have splits
        indices = range(len(corpus.inputs) if rank == 0 else 0)
        val_size, max_tokens = 0, None
    if not state["done"] and indices:
        writer = ShardWriter(
            state_file.parent, tokenizer, state, state_file, val_size=val_size,
            shard_size=prepare_args["shard_size"],
            max_tokens=None if max_tokens is None else max_tokens // world_size,
            prefix=f"part_{rank:04d}_" if world_size > 1 else "")
        chunks = corpus.chunks(indices, state["next"][:2], RowCounter(state["rows"]),
                               delete_downloads=not keep_downloads)
        write_shards(chunks, tokenizer, writer, corpus.inputs, num_proc)
    state["done"] = True
    write_json(state_file, state)


def end_downloads(out_dir: Path, keep_downloads: bool) -> None:
    """Remove the downloads of a finished folder, or give them a name that was not there before."""
    if not keep_downloads:
        shutil.rmtree(out_dir / DOWNLOADS, ignore_errors=True)
        return
    names = itertools.chain(["downloads"], (f"downloads_{n}" for n in itertools.count(2)))
    name = next(name for name in names if not (out_dir / name).exists())
    with contextlib.suppress(FileNotFoundError):  # nothing was downloaded, or another rank was here
        os.rename(out_dir / DOWNLOADS, out_dir / name)


def import_tokens(files: Iterable[str | Path], out: str | Path, tokenizer: str | Path = "gpt2", *,
                  shard_size: int = 100_000_000) -> dict:
    """
    Write the folder of shards `out` from token files of nanoGPT or llm.c, which have "train" or
    "val" in their names. `tokenizer` is the one that made them. Returns the dict of meta.json.
    Raises UserError for everything that the user can fix.
    """
    recipe = {"import": [str(file) for file in files], "tokenizer": str(tokenizer),
              "shard_size": shard_size, "world_size": 1}
    check_import(recipe, str(out))
    out_dir = Path(out)
    check_folder(out_dir, recipe)
    if (out_dir / "meta.json").is_file():
        print(f"{out_dir} is complete")
        return read_meta(out_dir)
    state = read_state(out_dir)
    if not state and out_dir.is_dir() and any(
            not path.name.startswith("in_progress_") for path in out_dir.iterdir()):
        raise UserError(f"{out_dir} holds files already: choose another --out")
    check_writable(out_dir)
    token_files = list_token_files(recipe["import"])
    inputs = [Input(str(file.path), file.path.stat().st_size) for file in token_files]
    if state and [Input(*item) for item in state["inputs"]] != inputs:
        raise UserError(f"the token files have changed since {out_dir} was begun: choose another "
                        "--out, or remove it and start again")
    loaded_tokenizer = make_tokenizer(recipe["tokenizer"])
    check_heads(token_files, loaded_tokenizer)
    state = state or new_state(recipe, inputs)
    meta = write_folder(
        out_dir, recipe, loaded_tokenizer, state,
        lambda state_file: write_splits(token_files, loaded_tokenizer, state, state_file,
                                        shard_size))
    assert meta is not None  # no other process takes part
    return meta


def check_import(recipe: dict, out: str) -> None:
    """Raise UserError for arguments of `import_tokens` that cannot work."""
    spec = recipe["tokenizer"]
    check_spec(spec)
    if spec != "gpt2" and not Path(spec).is_file():
        raise UserError(f"--tokenizer {spec} would be trained, but --import needs the tokenizer "
                        "that made the token files: name gpt2 or its file")
    if recipe["shard_size"] < 2:
        raise UserError(f"--shard_size {recipe['shard_size']} must be at least 2")
    if not out:
        raise UserError("--out must not be empty")


# -----------------------------------------------------------------------------
# the command line


def parse_count(text: str) -> int:
    """A number like 10000, 10K, 2.5M or 1B as an int."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number like 10000, 10K, 2.5M or 1B")
    number, unit = match.groups()
    return int(float(number) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[unit])


def parse_args() -> argparse.Namespace:
    """The arguments of the command line. Raises UserError for those that cannot work."""
    parser = make_parser(__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--source", nargs="+", default=["HuggingFaceFW/fineweb-edu"],
        help="files, folders, - for standard input, 'builtin', or Hugging Face datasets")
    add("--import", dest="import_files", nargs="+", metavar="FILE",
        help="token files of nanoGPT or llm.c, instead of a --source")
    add("--config", help="configuration of a Hugging Face dataset (fineweb-edu: sample-10BT)")
    add("--split", default="train", help="split of a Hugging Face dataset to read (%(default)s)")
    add("--text_column", default="text", help="column or field that holds the text (%(default)s)")
    add("--document_separator", metavar="TEXT",
        help="what stands between the documents of a .txt file, for example '<|endoftext|>'")
    add("--tokenizer", default="gpt2",
        help="gpt2, bpe:N or spm:N to train one, or the path of a trained one (%(default)s)")
    add("--out", default="edu_fineweb10B", help="folder to write to (%(default)s)")
    add("--shard_size", type=parse_count, default=10**8, help="tokens in a shard (100M)")
    add("--max_tokens", type=parse_count, help="stop after so many tokens, for example 10M")
    add("--val_fraction", type=float, default=0.1,
        help="share of a small corpus, or of --max_tokens, that becomes val (%(default)s)")
    add("--num_proc", type=int, help="tokenizer threads (one for each CPU that may be used)")
    add("--rank", type=int, help="number of this process, from 0 (torchrun sets it)")
    add("--world_size", type=int, help="how many processes share the files (torchrun sets it)")
    add("--keep_downloads", action="store_true",
        help="keep downloaded files in OUT/downloads, not only two at a time")
    add("--verify", metavar="DIR", help="only check a folder of shards")
    add("--stats", metavar="DIR", help="only describe a folder of shards")
    args = parser.parse_args()
    set_rank(args)
    if args.import_files:
        check_import_flags(parser, args)
    if args.num_proc is not None and args.num_proc < 1:
        raise UserError(f"--num_proc {args.num_proc} must be at least 1")
    if args.config is None and args.source == ["HuggingFaceFW/fineweb-edu"]:
        args.config = "sample-10BT"
    return args


def check_import_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raise UserError if a command line has --import and a flag that is about text."""
    for name in ("source", "config", "split", "text_column", "document_separator", "max_tokens",
                 "val_fraction", "num_proc", "keep_downloads", "verify", "stats"):
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"--import reads token files, for which --{name} has no meaning: leave "
                            "one of them out")
    if args.world_size > 1:
        raise UserError("--import is the work of one process: start it without torchrun, "
                        "--world_size and WORLD_SIZE")


def set_rank(args: argparse.Namespace) -> None:
    """
    Take what the command line does not say of rank and world_size from torchrun's environment
    variables. Raises UserError if they contradict each other.
    """
    if args.rank is None and args.world_size is None:
        args.rank, _, args.world_size = env_ranks()
    if args.world_size is None:
        args.world_size = env_int("WORLD_SIZE", 1)
    if args.rank is None:
        args.rank = env_int("RANK", 0) if args.world_size > 1 else 0
    if not 0 <= args.rank < args.world_size:
        raise UserError(f"rank {args.rank} must be from 0 to {args.world_size - 1}: set --rank and "
                        "--world_size, or RANK and WORLD_SIZE in the environment")


def main() -> None:
    """Prepare, verify or describe a folder of shards, as the command line says."""
    args = parse_args()
    if args.verify:
        verify(args.verify)
        return
    if args.stats:
        print_stats(args.stats)
        return
    if args.world_size > 1:
        # temporary files and error lines name the rank
        os.environ.update(RANK=str(args.rank), WORLD_SIZE=str(args.world_size))
    # Hugging Face's tokenizers start threads of their own, as many as this says
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.num_proc or available_cpus()))
    if args.import_files:
        meta = import_tokens(
            args.import_files, args.out, args.tokenizer, shard_size=args.shard_size)
    else:
        meta = prepare(
            args.source, args.out, args.tokenizer, config=args.config, split=args.split,
            text_column=args.text_column, document_separator=args.document_separator,
            shard_size=args.shard_size, val_fraction=args.val_fraction, max_tokens=args.max_tokens,
            rank=args.rank, world_size=args.world_size, num_proc=args.num_proc,
            keep_downloads=args.keep_downloads)
    if meta is None:
        return
    for split in SPLITS:
        print(f"{split}: {meta['splits'][split]['tokens']:,} tokens" + format_totals(meta, split))
    if meta["rows_skipped"]:
        print(f"skipped {meta['rows_skipped']} of {meta['rows_read']} rows that held no text")
    print(f"next: python train_gpt2.py --data_dir {args.out}")


if __name__ == "__main__":
    run_main(main, output_may_be_lost=True)
