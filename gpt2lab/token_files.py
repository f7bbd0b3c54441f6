"""
Token files of nanoGPT and llm.c: checking them, and writing their tokens as shards.

A file of nanoGPT is a row of uint16 token ids. A file of llm.c has a header of 256 int32 numbers in
front of them: a magic number, a version and the number of tokens. Neither names its tokenizer.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gpt2lab.cli import UserError
from gpt2lab.files import sha256, write_atomically, write_json
from gpt2lab.shards import FIRST_INDEX, SPLITS, head_checksum, shard_name, token_dtype
from gpt2lab.tokenizer import Tokenizer

HEADER_INTS = 256
MAGIC = 20240520  # of llm.c's files with gpt2's tokens
LLAMA_MAGIC = 20240801  # of llm.c's files with Llama 3's tokens, which are uint32
PIECE_TOKENS = 1 << 21  # how many tokens are read at a time
FROM_TEXT = "make shards from the text with --source instead"


class TokenFile(NamedTuple):
    """A file of uint16 token ids, which begin at byte `offset`."""

    path: Path
    split: str
    offset: int
    num_tokens: int


class TokenStream(NamedTuple):
    """
    The tokens of a split: those of its files, one file after the other. As in all shards, a
    document begins with end-of-text. If the first file does not, `eot_in_front` puts one there. If
    the last file then ends with one, as in nanoGPT's format, `num_tokens` leaves that one out.
    """

    files: list[TokenFile]
    eot_in_front: bool
    num_tokens: int


# -----------------------------------------------------------------------------
# checking the files


def list_token_files(names: Sequence[str | Path]) -> list[TokenFile]:
    """
    The token files with these names, sorted by their file names. A file that is named twice, be it
    through a link, is read once. Raises UserError for a file that is damaged or of an unknown kind,
    or if a split has no file.
    """
    paths = {os.path.realpath(name): Path(name) for name in names}.values()
    files = [open_token_file(path) for path in sorted(paths, key=lambda path: (path.name, path))]
    for split in SPLITS:
        if not any(file.split == split for file in files):
            raise UserError(f"--import needs a file of each split, but none is of {split}: add a "
                            f"file with {split} in its name")
    return files


def open_token_file(path: Path) -> TokenFile:
    """A token file, whose size and header are checked. Raises UserError."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}: give --import the names of token files")
    if path.suffix == ".npy":
        raise UserError(f"{path} is a shard already: name its folder as train_gpt2.py's --data_dir")
    if path.with_name("meta.pkl").exists():
        raise UserError(f"{path} has ids of characters, because a meta.pkl of nanoGPT lies beside "
                        f"it, and no tokenizer here has these ids: {FROM_TEXT}")
    split = split_of(path)
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", HEADER_INTS).tolist()
    magic = header[0] if header else None
    if magic == LLAMA_MAGIC:
        raise UserError(f"{path} has token ids of Llama 3, whose tokenizer is not one of those "
                        f"here: {FROM_TEXT}")
    offset = 4 * HEADER_INTS if magic == MAGIC else 0
    if magic == MAGIC and len(header) < HEADER_INTS:
        raise UserError(f"{path} is cut off in its header: copy or make it again")
    if size % 2 or size == offset:
        what = "is empty" if size == offset else f"has an odd number of bytes, {size:,}"
        raise UserError(f"{path} {what}, so it holds no uint16 token ids: copy or make it again")
    num_tokens = (size - offset) // 2
    if magic == MAGIC and header[1:3] != [1, num_tokens]:
        raise UserError(
            f"{path} has {size:,} bytes and the header {header[:3]}, but llm.c's header of such a "
            f"file is [{MAGIC}, 1, {num_tokens}]: copy or make it again")
    return TokenFile(path, split, offset, num_tokens)


def split_of(path: Path) -> str:
    """The split that a file's name holds. Raises UserError if it holds none or both."""
    found = [split for split in SPLITS if split in path.name.lower()]
    if len(found) != 1:
        raise UserError(f"the name of {path} says neither that it is of train nor that it is of "
                        "val, or says both: rename it so that it holds one of these words")
    return found[0]


def open_stream(files: Sequence[TokenFile], split: str, eot: int) -> TokenStream:
    """The tokens of a split, for the end-of-text id `eot`."""
    chosen = [file for file in files if file.split == split]
    num_tokens = sum(file.num_tokens for file in chosen)
    if read_ids(chosen[0], 0, 1)[0] == eot:
        return TokenStream(chosen, False, num_tokens)
    last = read_ids(chosen[-1], chosen[-1].num_tokens - 1, 1)[0]
    return TokenStream(chosen, True, num_tokens + 1 - int(last == eot))


# -----------------------------------------------------------------------------
# reading and writing


def read_ids(file: TokenFile, start: int, count: int) -> np.ndarray:
    """`count` token ids of a file from number `start` on, 1-D uint16. Raises UserError."""
    ids = np.fromfile(file.path, "<u2", count, offset=file.offset + 2 * start)
    if len(ids) < count:
        raise UserError(f"{file.path} has become shorter while it was read: give the same command "
                        "again when nothing writes to it")
    return ids


def read_pieces(stream: TokenStream, start: int, end: int,
                eot: int) -> Iterator[tuple[Path, np.ndarray]]:
    """
    Yield (file, 1-D array of integers) for the tokens from number `start` to before `end` of a
    split, in pieces of at most PIECE_TOKENS.
    """
    first = 0  # number of a file's first token in the split
    if stream.eot_in_front:
        first = 1
        if start == 0:
            yield stream.files[0].path, np.array([eot])
    for file in stream.files:
        stop = min(end, first + file.num_tokens)
        for begin in range(max(start, first), stop, PIECE_TOKENS):
            count = min(PIECE_TOKENS, stop - begin)
            yield file.path, read_ids(file, begin - first, count)
        first += file.num_tokens


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of UTF-8 each token id stands for, int64. End-of-text stands for none."""
    lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    lengths[tokenizer.eot] = 0
    return lengths


def check_heads(files: Sequence[TokenFile], tokenizer: Tokenizer) -> None:
    """
    Raise UserError if the first tokens of a file are outside the vocabulary or are not uint16, so
    that a wrong tokenizer or format is found before anything is written.
    """
    for file in files:
        ids = read_ids(file, 0, min(PIECE_TOKENS, file.num_tokens))
        count_ids(file.path, ids, tokenizer)
        if len(ids) >= 100 and not ids[1::2].any():  # the upper halves of small uint32 numbers
            raise UserError(f"{file.path} seems to hold uint32 numbers, because every second "
                            "uint16 number is 0: write its token ids as uint16")


def write_splits(files: Sequence[TokenFile], tokenizer: Tokenizer, state: dict, state_file: Path,
                 shard_size: int) -> None:
    """
    Write the tokens of both splits as shards of `shard_size` tokens into the folder of
    `state_file`. `state` has the form of shards.new_state. It lists the shards that are there
    already, and is saved after each one. Raises UserError for a token id outside the vocabulary.
    """
    lengths, done = token_lengths(tokenizer), {entry["name"] for entry in state["shards"]}
    streams = {split: open_stream(files, split, tokenizer.eot) for split in SPLITS}
    total = sum(stream.num_tokens for stream in streams.values())
    before = sum(totals["tokens"] for totals in state["totals"].values())
    todo = [(split, shard_name(split, index), start) for split in SPLITS
            for index, start in enumerate(
                range(0, streams[split].num_tokens, shard_size), FIRST_INDEX[split])]
    with tqdm(unit="tok", unit_scale=True, total=total, initial=before) as progress:
        for split, name, start in todo:
            if name in done:
                continue
            size = min(shard_size, streams[split].num_tokens - start)
            checksums, counts = write_shard(
                state_file.with_name(name), streams[split], start, size, tokenizer, progress)
            state["shards"].append({"name": name, "split": split, "tokens": size, **checksums})
            totals = state["totals"][split]
            totals["tokens"] += size
            totals["documents"] += int(counts[tokenizer.eot])
            totals["bytes"] += int(counts @ lengths)
            write_json(state_file, state)
    state["done"] = True
    write_json(state_file, state)


def write_shard(path: Path, stream: TokenStream, start: int, size: int, tokenizer: Tokenizer,
                progress: tqdm) -> tuple[dict, np.ndarray]:
    """
    Write the `size` tokens of a split from number `start` on as a shard. Returns its checksums for
    meta.json, and how often each token id occurs, (vocab_size,) int64. Raises UserError.
    """
    tokens = np.empty(size, token_dtype(tokenizer.vocab_size))
    counts, filled = np.zeros(tokenizer.vocab_size, np.int64), 0
    for source, piece in read_pieces(stream, start, start + size, tokenizer.eot):
        # these counts tell the documents and the bytes, and whether an id is too large
        counts += count_ids(source, piece, tokenizer)
        tokens[filled:filled + len(piece)] = piece
        filled += len(piece)
        progress.update(len(piece))
    assert filled == size
    write_atomically(path, partial(np.save, arr=tokens))
    return {"head": head_checksum(tokens), "sha256": sha256(tokens)}, counts


def count_ids(path: Path, ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """
    How often each token id of the vocabulary occurs in `ids`, (vocab_size,) int64. Raises UserError
    for an id outside the vocabulary; `path` is the file that holds the ids.
    """
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    if len(counts) > tokenizer.vocab_size:
        raise UserError(f"{path} has token id {len(counts) - 1}, but {tokenizer.spec} has only "
                        f"{tokenizer.vocab_size} tokens: name the tokenizer that made the file "
                        "with --tokenizer")
    return counts
