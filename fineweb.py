"""
Turns text into token shards that train_gpt2.py reads; owns the shard format.

    python fineweb.py                                        # FineWeb-EDU sample-10BT, gpt2 tokens
    python fineweb.py --max_tokens 10M --out trial           # a trial of it
    python fineweb.py --source a.txt b.jsonl.gz folder/ --tokenizer bpe:8192 --out my_data
    python fineweb.py --source builtin --tokenizer bpe:1536 --out demo_data   # offline, 2 MB
    torchrun --nproc_per_node=4 fineweb.py                   # four processes share the files
    python fineweb.py --verify my_data                       # is the folder whole?

A folder of shards holds edufineweb_val_000000.npy and edufineweb_train_000001.npy onwards (1-D,
uint16 or uint32, each document preceded by the end-of-text token) and, written last, meta.json.
Stop it at any moment and start it again: it goes on behind the last finished shard, and the folder
ends up the same, byte for byte. This module never imports torch.
"""

import argparse
import contextlib
import math
import os
import re
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gpt2lab import sources
from gpt2lab.cli import UserError, env_rank, make_parser, run_main
from gpt2lab.files import read_json, sha256, write_atomically, write_json
from gpt2lab.shards import (
    FORMAT_VERSION,
    SPLITS,
    describe_head,
    describe_totals,
    find_shards,
    print_stats,
    read_meta,
    shard_name,
    verify,
)
from gpt2lab.sources import Input, RowCounter
from gpt2lab.tokenizer import check_spec, make_tokenizer

SAMPLE_BYTES = 100_000_000  # a trained tokenizer learns from at most this much text
KEPT_BYTES = 100_000_000  # a corpus up to this size is read once, and stays in memory
GROUP_CHARS = 1 << 18  # text that a tokenizer thread is handed at once
BYTES_PER_TOKEN = 4  # a rough figure for English, used only to tell small corpora from large ones


# -----------------------------------------------------------------------------
# the shard format, reading side


# -----------------------------------------------------------------------------
# the shard format, writing side


class TextChunk(NamedTuple):
    """Some text of one document, where it was read, and the split it is for (None: by place)."""

    text: str
    starts: bool  # whether it is the first of its document
    split: str | None
    file: int
    number: int  # in its file
    size: int  # of the text in UTF-8 bytes
    tokens: np.ndarray | None = None  # of the text, once they are known


class ShardWriter:
    """
    Cuts the token stream of one process into shards, and writes each with the state from which to
    go on behind it: "next", the [file, piece, tokens of it] to read first, and what is done so far.

    The first `val_size` tokens go to val unless pieces say their split. `max_tokens` ends it.
    """

    def __init__(self, out_dir, tokenizer, state, state_file, val_size, shard_size, max_tokens,
                 prefix):
        self.out_dir, self.tokenizer, self.prefix = out_dir, tokenizer, prefix
        self.state, self.state_file = state, state_file
        self.val_size, self.shard_size, self.max_tokens = val_size, shard_size, max_tokens
        self.dtype = np.uint16 if tokenizer.vocab_size <= 65_535 else np.uint32
        self.buffer, self.filled, self.split = None, 0, None
        self.total = sum(t["tokens"] for t in state["totals"].values())

    @property
    def full(self):
        """Whether max_tokens are there."""
        return self.max_tokens is not None and self.total >= self.max_tokens

    def place(self, piece):
        """(split, size) of the shard that the next token goes to."""
        if piece.split is not None:
            return piece.split, self.shard_size
        left = self.val_size - self.state["totals"]["val"]["tokens"]
        return ("val", self.filled + left) if left > 0 else ("train", self.shard_size)

    def add(self, piece, tokens):
        """Append the tokens of a piece, and write every shard that they complete."""
        if piece.starts:
            tokens = np.concatenate([np.array([self.tokenizer.eot], tokens.dtype), tokens])
        used = 0
        if [piece.file, piece.number] == self.state["next"][:2]:
            used = self.state["next"][2]  # these are in the last shard already
        while used < len(tokens) and not self.full:
            split, size = self.place(piece)
            if split != self.split:
                self.flush([piece.file, piece.number, used])
                self.split, self.buffer = split, np.empty(size, self.dtype)
            room = size - self.filled
            if self.max_tokens is not None:
                room = min(room, self.max_tokens - self.total)
            part = tokens[used:used + room]
            self.buffer[self.filled:self.filled + len(part)] = part
            self.filled += len(part)
            self.count(piece, part, whole=len(part) == len(tokens), first=used == 0)
            used += len(part)
            if self.filled == size:
                done = used == len(tokens)
                self.flush([piece.file, piece.number + done, 0 if done else used])

    def count(self, piece, part, whole, first):
        """Add a part of a piece to the totals of its split."""
        totals = self.state["totals"][self.split]
        eot = int(first and piece.starts)
        n_bytes = piece.size if whole else len(self.tokenizer.decode_bytes(part[eot:]))
        totals["tokens"] += len(part)
        totals["documents"] += eot
        totals["bytes"] += n_bytes
        self.total += len(part)

    def flush(self, position):
        """Write the tokens at hand as a shard, then the state to go on from at `position`."""
        if not self.filled:
            return
        tokens = self.buffer[:self.filled]
        index = sum(s["split"] == self.split for s in self.state["shards"])
        name = self.prefix + shard_name(self.split, index + (self.split == "train"))
        write_atomically(self.out_dir / name, lambda file: np.save(file, tokens))
        self.state["shards"].append({
            "name": name, "split": self.split, "tokens": len(tokens),
            "head": describe_head(tokens), "sha256": sha256(tokens)})
        self.state["next"] = position
        self.filled = 0
        write_json(self.state_file, self.state)


# -----------------------------------------------------------------------------
# from text to shards


def split_by_bytes(pieces, train_bytes):
    """
    Label the first `train_bytes` bytes of a small corpus train and the rest val. The cut is at a
    line end if there is one, and val opens a new document.
    """
    left, split = train_bytes, "train"
    for piece in pieces:
        if split == "train" and piece.size > left:
            data, piece = piece.text.encode("utf-8"), piece._replace(tokens=None)
            head = data[:data.rfind(b"\n", 0, left) + 1]
            head = head or data[:left].decode("utf-8", errors="ignore").encode("utf-8")
            if head:
                yield piece._replace(text=head.decode("utf-8"), split="train", size=len(head))
            piece = piece._replace(
                text=data[len(head):].decode("utf-8"), starts=True, size=len(data) - len(head))
            split = "val"
        left -= piece.size
        yield piece._replace(split=split)


def tokenizer_sample(pieces, skip):
    """Texts to train a tokenizer on, not val's; in unlabelled text, that is the first `skip`."""
    taken = 0
    for piece in pieces:
        if piece.split is None and skip > 0:
            skip -= len(piece.text)
        elif piece.split != "val" and piece.text:
            yield piece.text
            taken += piece.size
        if taken >= SAMPLE_BYTES:
            return


def tokenize(pieces, tokenizer, num_proc):
    """Yield (piece, tokens) in the order of the pieces; threads tokenize groups of them ahead."""
    with ThreadPoolExecutor(num_proc) as pool:
        pending, group, chars = deque(), [], 0
        for piece in pieces:
            group.append(piece)
            chars += len(piece.text)
            if chars < GROUP_CHARS:
                continue
            pending.append((group, pool.submit(tokenize_group, group, tokenizer)))
            group, chars = [], 0
            if len(pending) > 2 * num_proc:  # bounds memory, and keeps every thread busy
                done, future = pending.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in pending:
            yield from zip(done, future.result(), strict=True)
        yield from zip(group, tokenize_group(group, tokenizer), strict=True)


def tokenize_group(group, tokenizer):
    """The tokens of each of some pieces; of a small corpus, most are known."""
    new = [piece.text for piece in group if piece.tokens is None]
    encoded = iter(tokenizer.encode_batch(new) if new else ())
    return [next(encoded) if piece.tokens is None else piece.tokens for piece in group]


class Corpus:
    """The text of all inputs, in order; small ones are cut into train and val by bytes."""

    def __init__(self, inputs, text_column, downloads, prefetch):
        self.inputs, self.text_column = inputs, text_column
        self.downloads, self.prefetch = downloads, prefetch
        self.train_bytes = None  # of a small corpus, those in front that are train
        self.kept = self.kept_tally = None  # of a very small one, all that was read

    def pieces(self, indices=None, first=(0, 0), tally=None, drop=False):
        """Yield the Pieces of some inputs from position `first` (file, piece) on."""
        tally = tally or RowCounter(quiet=True)
        if self.kept:  # small corpora are always read from the start
            tally.take(self.kept_tally)
            return split_by_bytes(self.kept, self.train_bytes)
        indices = range(len(self.inputs)) if indices is None else indices
        read = sources.read_inputs(
            self.inputs, [i for i in indices if i >= first[0]], self.text_column,
            tally, self.downloads, drop, self.prefetch)
        pieces = (TextChunk(text, starts, None, file, number, len(text.encode("utf-8")))
                  for file, number, text, starts in read
                  if (file, number) >= tuple(first))  # those before are read, but not tokenized
        return pieces if self.train_bytes is None else split_by_bytes(pieces, self.train_bytes)

    def measure(self, limit, val_fraction, tokenizer, num_proc):
        """
        Whether the text is at most `limit` bytes; if so, it will be split by bytes. What is going
        to be kept is tokenized meanwhile, if there is a `tokenizer` yet.
        """
        if sources.is_on_hub(self.inputs):
            return False
        total, kept, tally = 0, [], RowCounter(quiet=True)
        pieces = self.pieces(tally=tally)
        # compressed text may well be four times as long
        times = 4 if self.inputs[0].name.endswith((".gz", ".parquet")) else 1
        if tokenizer and times * sum(item.size for item in self.inputs) <= KEPT_BYTES:
            pieces = (piece._replace(tokens=tokens)
                      for piece, tokens in tokenize(pieces, tokenizer, num_proc))
        for piece in pieces:
            total += piece.size
            if total > limit:
                return False
            if total <= KEPT_BYTES:
                kept.append(piece)
            else:
                kept.clear()
        if total == 0:
            raise UserError("the source holds no text")
        self.train_bytes = int(total * (1 - val_fraction))
        self.kept, self.kept_tally = kept, tally
        return True


def write_shards(pieces, tokenizer, writer, inputs, num_proc):
    """Tokenize the pieces into the writer, and show the progress."""
    size = sum(item.size for item in inputs)
    compressed = inputs[0].name.endswith((".gz", ".parquet"))
    bytes_per_size = 2.0 if compressed else 1.0  # a guess, until the first file is done
    options = dict(unit="tok", unit_scale=True, initial=writer.total, total=writer.max_tokens)
    file = None
    with tqdm(**options) as progress:  # closed before an error is printed
        for piece, tokens in tokenize(pieces, tokenizer, num_proc):
            writer.add(piece, tokens)
            if writer.full:
                break
            if piece.file == file and writer.total - progress.n < 500_000:
                continue
            totals = writer.state["totals"].values()
            n_bytes, documents = (sum(t[key] for t in totals) for key in ("bytes", "documents"))
            if piece.file != file and piece.file > 0:
                bytes_per_size = n_bytes / sum(item.size for item in inputs[:piece.file])
            if writer.max_tokens is None:  # an estimate, for the time left
                progress.total = int(writer.total * size * bytes_per_size / max(n_bytes, 1))
            file = piece.file
            progress.update(writer.total - progress.n)
            progress.set_postfix_str(f"{documents:,} docs, {Path(inputs[file].name).name}")
        writer.flush([len(inputs), 0, 0])
        progress.total = writer.total
        progress.update(writer.total - progress.n)


def check_arguments(recipe):
    """Raise UserError for arguments of `prepare` that cannot work."""
    check_spec(recipe["tokenizer"])
    if not 0 < recipe["val_fraction"] < 1:
        raise UserError(f"--val_fraction {recipe['val_fraction']} must lie between 0 and 1")
    for name in ("shard_size", "max_tokens"):
        if recipe[name] is not None and recipe[name] < 2:
            raise UserError(f"--{name} {recipe[name]} must be at least 2")


def find_state(out_dir, recipe, state_file):
    """
    The state to go on from, {} for a new folder, None if it is complete. Raises UserError where
    going on would overwrite anything else, naming the difference.
    """
    known = [p for p in (out_dir / "meta.json", *out_dir.glob("in_progress_*.json")) if p.is_file()]
    for path in known:
        found = read_json(path).get("recipe", {})
        differing = [key for key in recipe if found.get(key) != recipe[key]]
        if differing:
            was = ", ".join(f"{k} {found.get(k)!r}, not {recipe[k]!r}" for k in differing)
            raise UserError(f"{out_dir} was made with {was}: choose another --out")
        if path.name == "meta.json":
            return None
    if not known and (find_shards(out_dir, "train") or find_shards(out_dir, "val")):
        raise UserError(f"{out_dir} holds shards that were not made here: choose another --out")
    return read_json(state_file) if state_file.is_file() else {}


def find_inputs(recipe, state, out_dir):
    """The inputs of a run, which those of a half-done folder must still be."""
    before = [Input(*item) for item in state.get("inputs", ())]
    if sources.is_on_hub(before):
        return before  # pinned to the revision of the start; needs no network either
    names = [str(sources.spool_stdin(out_dir / "downloads")) if source == "-" else source
             for source in recipe["source"]]
    inputs = sources.list_inputs(names, recipe["config"], recipe["split"])
    if before and inputs != before:
        changed = [item.name for item in sorted(set(before) ^ set(inputs))]
        raise UserError(f"the sources have changed since {out_dir} was begun ({changed[0]}): "
                        "choose another --out, or remove it and start again")
    return inputs


def prepare(source, out, tokenizer="gpt2", config=None, split="train", text_column="text",
            shard_size=100_000_000, val_fraction=0.1, max_tokens=None, rank=0, world_size=1,
            num_proc=None, keep_downloads=False):
    """
    Write the folder of shards `out` from `source`, a list as sources.list_inputs takes it; returns
    its meta, or None while other ranks are at work. Raises UserError for what the user can mend.

    The first shard of `shard_size` tokens (with `max_tokens`, at most `val_fraction` of them) is
    val. A corpus too small for two shards, counting BYTES_PER_TOKEN, is split by text instead: its
    last `val_fraction` of bytes is val. Ranks take every world_size-th input.
    """
    recipe = {"source": [str(s) for s in source], "config": config, "split": split,
              "text_column": text_column, "tokenizer": str(tokenizer), "shard_size": shard_size,
              "val_fraction": val_fraction, "max_tokens": max_tokens, "world_size": world_size}
    check_arguments(recipe)
    out_dir, num_proc = Path(out), num_proc or os.cpu_count()
    state_file = out_dir / f"in_progress_{rank}.json"
    state = find_state(out_dir, recipe, state_file)
    if state is None:
        print(f"{out_dir} is complete")
        return read_meta(out_dir)
    # measured before anything is written; tokenizers are trained after that, without val
    inputs = find_inputs(recipe, state, out_dir)
    corpus = Corpus(inputs, text_column, out_dir / "downloads", prefetch=max_tokens is None)
    model = None if ":" in recipe["tokenizer"] else make_tokenizer(recipe["tokenizer"], None)
    small = corpus.measure(min(2 * shard_size * BYTES_PER_TOKEN, max_tokens or math.inf),
                           val_fraction, model, num_proc)
    val_size = min(shard_size, int(max_tokens * val_fraction) or 1) if max_tokens else shard_size
    model = model or make_tokenizer(recipe["tokenizer"], lambda: tokenizer_sample(
        corpus.pieces(), int(1.5 * BYTES_PER_TOKEN * val_size)))  # more than val takes of it

    mine = range(len(inputs))[rank::world_size]
    if small:  # nothing to share: rank 0 does it alone, and from the start
        mine, state, max_tokens = range(len(inputs) if rank == 0 else 0), {}, None
    state = state or {
        "recipe": recipe, "inputs": inputs, "done": False, "next": [0, 0, 0], "rows": {},
        "totals": {s: {"tokens": 0, "documents": 0, "bytes": 0} for s in ("val", "train")},
        "shards": []}
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(state_file, state)
    if not state["done"] and mine:
        writer = ShardWriter(
            out_dir, model, state, state_file, 0 if small or rank else val_size, shard_size,
            max_tokens and max_tokens // world_size, f"part_{rank:04d}_" if world_size > 1 else "")
        tally = RowCounter(state["rows"])
        pieces = corpus.pieces(mine, state["next"][:2], tally, not keep_downloads)
        write_shards(pieces, model, writer, inputs, num_proc)
    state["done"] = True
    write_json(state_file, state)
    return finish(out_dir, model, recipe, keep_downloads)


def finish(out_dir, tokenizer, recipe, keep_downloads):
    """
    Where all ranks are done, give the shards their final names and write meta.json; returns it, or
    None if some are not. Ranks may come here together: every act can be done twice.
    """
    paths = [out_dir / f"in_progress_{rank}.json" for rank in range(recipe["world_size"])]
    states = [read_json(path) for path in paths if path.is_file()]
    if (out_dir / "meta.json").is_file():
        return read_meta(out_dir)
    if len(states) < len(paths) or not all(state["done"] for state in states):
        print(f"{out_dir}: this share is done, {len(paths)} are to be")
        return None
    shards = []
    for split, first in (("val", 0), ("train", 1)):
        found = [s for state in states for s in state["shards"] if s["split"] == split]
        for index, shard in enumerate(found, first):
            name = shard_name(split, index)
            with contextlib.suppress(FileNotFoundError):  # another rank was faster
                os.replace(out_dir / shard["name"], out_dir / name)  # onto itself, if it is alone
            shards.append({**shard, "name": name})
    # the last input may have been read ahead of max_tokens: count those before it
    rows = [count for state in states for index, count in state["rows"].items()
            if int(index) < state["next"][0]]
    meta = {
        "format_version": FORMAT_VERSION, "tokenizer": tokenizer.spec,
        "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
        "dtype": "uint16" if tokenizer.vocab_size <= 65_535 else "uint32",
        "splits": {split: {key: sum(state["totals"][split][key] for state in states)
                           for key in ("tokens", "documents", "bytes")} for split in SPLITS},
        "rows_read": sum(r for r, _ in rows), "rows_skipped": sum(bad for _, bad in rows),
        "recipe": recipe, "inputs": states[0]["inputs"], "shards": shards}
    if tokenizer.model:
        data = tokenizer.model.encode("utf-8")
        meta["tokenizer_file"] = "tokenizer.json" if data[:1] == b"{" else "tokenizer.spm"
        meta["tokenizer_sha256"] = sha256(data)
        write_atomically(out_dir / meta["tokenizer_file"], lambda file: file.write(data))
    write_json(out_dir / "meta.json", meta)
    for path in paths:
        path.unlink(missing_ok=True)
    if not keep_downloads:
        shutil.rmtree(out_dir / "downloads", ignore_errors=True)
    return meta


# -----------------------------------------------------------------------------
# a look at a folder


# -----------------------------------------------------------------------------
# the command line


def parse_count(text):
    """A number like 10000, 10K, 2.5M or 1B as an int."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no number like 10000, 10K, 2.5M or 1B")
    return int(float(match.group(1)) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[match.group(2)])


def parse_args():
    """The command line of this script."""
    parser = make_parser(__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--source", nargs="+", default=["HuggingFaceFW/fineweb-edu"],
        help="files, folders, - for standard input, 'builtin', or Hugging Face datasets")
    add("--config", help="configuration of a hub dataset (fineweb-edu: sample-10BT)")
    add("--split", default="train", help="split of a hub dataset to read (%(default)s)")
    add("--text_column", default="text", help="column or field that holds the text")
    add("--tokenizer", default="gpt2",
        help="gpt2, bpe:N or spm:N to train one, or the path of a trained one")
    add("--out", default="edu_fineweb10B", help="folder to write to (%(default)s)")
    add("--shard_size", type=parse_count, default=10**8, help="tokens in a shard (100M)")
    add("--max_tokens", type=parse_count, help="stop after so many tokens, for example 10M")
    add("--val_fraction", type=float, default=0.1,
        help="share of a small corpus, or of --max_tokens, that becomes val (%(default)s)")
    add("--num_proc", type=int, help="tokenizer threads (all cores)")
    add("--rank", type=int, default=env_rank(),
        help="which share of the inputs is ours (torchrun sets it)")
    add("--world_size", type=int, default=int(os.environ.get("WORLD_SIZE", 1)),
        help="how many processes share the inputs (torchrun sets it)")
    add("--keep_downloads", action="store_true",
        help="keep downloaded files in OUT/downloads; else at most two lie there at a time")
    add("--verify", metavar="DIR", help="check a folder of shards, and do nothing else")
    add("--stats", metavar="DIR", help="describe a folder of shards, and do nothing else")
    args = parser.parse_args()
    if not 0 <= args.rank < args.world_size:
        raise UserError(f"--rank {args.rank} must be from 0 to {args.world_size - 1}")
    if args.num_proc is not None and args.num_proc < 1:
        raise UserError(f"--num_proc {args.num_proc} must be at least 1")
    if args.config is None and args.source == ["HuggingFaceFW/fineweb-edu"]:
        args.config = "sample-10BT"
    return args


def main():
    """The command line."""
    args = parse_args()
    if args.verify or args.stats:
        return verify(args.verify) if args.verify else print_stats(args.stats)
    if args.world_size > 1:
        os.environ["RANK"] = str(args.rank)  # tells temporary files and error lines apart
    # bpe tokenizers have threads of their own, which several processes share
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.num_proc or os.cpu_count()))
    meta = prepare(
        args.source, args.out, args.tokenizer, args.config, args.split, args.text_column,
        args.shard_size, args.val_fraction, args.max_tokens, args.rank, args.world_size,
        args.num_proc, args.keep_downloads)
    if meta is None:
        return
    for split in SPLITS:
        print(f"{split}: {meta['splits'][split]['tokens']:,} tokens" + describe_totals(meta, split))
    if meta["rows_skipped"]:
        print(f"skipped {meta['rows_skipped']} of {meta['rows_read']} rows that held no text")
    print(f"next: python train_gpt2.py --data_dir {args.out}")


if __name__ == "__main__":
    run_main(main)
