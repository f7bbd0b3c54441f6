"""
The shard format: file names, meta.json, opening a split, finishing and verifying a folder.

A shard is a .npy file with a 1-D array of token ids, uint16 or uint32. Each document is preceded by
the end-of-text token. fineweb.py writes shards.
"""

import contextlib
import json
import os
import re
import tokenize
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2lab.cli import UserError, list_differences
from gpt2lab.files import read_json, sha256, write_atomically, write_json
from gpt2lab.lock import lock_folder, unlock
from gpt2lab.tokenizer import GPT2_EOT, GPT2_VOCAB_SIZE, Tokenizer

FORMAT_VERSION = 1
SPLITS = ("val", "train")
FIRST_INDEX = {"val": 0, "train": 1}  # number of a split's first shard
SHARD_NAME = re.compile(r"edufineweb_(val|train)_(\d{6})\.npy")
HEAD_TOKENS = 4096  # how many tokens the quick checksum of a shard covers
TOKENIZER_FILES = {"bpe": "tokenizer.json", "spm": "tokenizer.spm"}  # in a folder of shards
CHECKED_IDS = 100_000  # how many tokens of each shard are compared with the vocabulary on opening


# -----------------------------------------------------------------------------
# names, and what a folder says about itself


def shard_name(split: str, index: int) -> str:
    """File name of a shard; `index` starts at FIRST_INDEX[split]."""
    return f"edufineweb_{split}_{index:06d}.npy"


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that stores the token ids of a vocabulary: uint16, or uint32 for a large one."""
    return np.dtype("uint16" if vocab_size <= 65_535 else "uint32")


def read_meta(data_dir: str | Path) -> dict:
    """
    The dict in meta.json of a folder of shards. A folder without meta.json counts as gpt2, because
    build-nanogpt writes none. Raises UserError if fineweb.py has not finished the folder, or if
    meta.json is damaged.
    """
    path = Path(data_dir) / "meta.json"
    if path.is_file():
        meta = read_json(path)
        for name, kind, default in (("tokenizer", str, None), ("vocab_size", int, None),
                                    ("shards", list, [])):
            if not isinstance(meta.get(name, default), kind):
                raise UserError(f"{path} has no {name!r}, so it is damaged or not written by "
                                "fineweb.py: bring the right file back, or make the folder again")
        return meta
    if next(Path(data_dir).glob("in_progress_*.json"), None):
        raise UserError(f"{data_dir} is half done: run the same fineweb.py command again to finish "
                        "it")
    return {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB_SIZE, "eot": GPT2_EOT}


def bytes_per_token(data_dir: str | Path, split: str) -> float | None:
    """UTF-8 bytes of a split's text for each of its tokens; None in build-nanogpt's folders."""
    totals = read_meta(data_dir).get("splits", {}).get(split, {})
    return totals["bytes"] / totals["tokens"] if totals.get("bytes") else None


def fingerprint(data_dir: str | Path) -> str:
    """Hash of a shard folder's contents, 16 hexadecimal digits, independent of its path."""
    meta = read_meta(data_dir)
    files = [(path.name, path.stat().st_size) for split in SPLITS
             for path in find_shards(data_dir, split)]
    contents = [meta["tokenizer"], meta.get("tokenizer_sha256"), meta.get("shards"), files]
    return sha256(json.dumps(contents, sort_keys=True).encode("utf-8"))[:16]


def load_data_tokenizer(data_dir: str | Path) -> Tokenizer:
    """
    The tokenizer that a folder of shards was made with. Raises UserError if its file is missing or
    is not the file that meta.json describes.
    """
    meta = read_meta(data_dir)
    if "tokenizer_file" not in meta:
        return Tokenizer(meta["tokenizer"])
    path = Path(data_dir) / meta["tokenizer_file"]
    if not path.is_file():
        raise UserError(f"{path} is missing: make {data_dir} again with fineweb.py")
    model = path.read_bytes().decode("utf-8", errors="replace")
    if sha256(model.encode("utf-8")) != meta["tokenizer_sha256"]:
        raise UserError(f"{path} is not the tokenizer that {data_dir} was made with: bring that "
                        "file back, or make the folder again")
    return Tokenizer(meta["tokenizer"], model)


# -----------------------------------------------------------------------------
# opening a split


def find_shards(data_dir: str | Path, split: str) -> list[Path]:
    """
    Sorted paths of a split's shards, [] if there are none. Raises UserError if a shard is missing
    between two others.
    """
    folder = Path(data_dir)
    found = {}
    for path in folder.glob("edufineweb_*.npy"):
        match = SHARD_NAME.fullmatch(path.name)  # None for temporary and foreign files
        if match and match.group(1) == split:
            found[int(match.group(2))] = path
    if not found:
        return []
    for index in range(min(found), max(found)):
        if index not in found:
            raise UserError(f"{folder} lacks {shard_name(split, index)}: bring it back, or make "
                            "the folder again")
    return [found[index] for index in sorted(found)]


def open_shard(path: Path) -> np.memmap:
    """A shard as a read-only memory map, 1-D uint16 or uint32. Raises UserError for other files."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:
        raise UserError(f"{path} is truncated or not a .npy file ({error}): make it again with "
                        "fineweb.py") from error
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise UserError(f"{path} is not a token shard, because it holds {tokens.ndim}-D "
                        f"{tokens.dtype}, not 1-D uint16 or uint32: remove it, or make it again "
                        "with fineweb.py")
    return tokens


def open_split(data_dir: str | Path, split: str) -> list[tuple[Path, np.memmap]]:
    """
    [(path, read-only memory map)] of a split's shards, in order. Raises UserError if there are
    none, or for a shard that is missing, damaged, of another tokenizer or of another folder. Only
    the first tokens of each shard are read.
    """
    meta = read_meta(data_dir)
    listed = {entry["name"]: entry for entry in meta.get("shards", [])}
    shards = [(path, open_shard(path)) for path in find_shards(data_dir, split)]
    if not shards:
        problem = "holds no" if Path(data_dir).is_dir() else "does not exist, so there is no"
        raise UserError(f"{data_dir} {problem} {split} shard: run python fineweb.py --out "
                        f"{data_dir} (or name another --data_dir)")
    for path, tokens in shards:
        check_ids(tokens[:CHECKED_IDS], meta["vocab_size"], path)
        entry = listed.get(path.name)
        if listed and (entry is None or head_checksum(tokens) != entry["head"]):
            raise UserError(f"{path} is not the shard that meta.json describes, so two data sets "
                            "may be mixed here: bring back the right shard, or make the folder "
                            "again")
    missing = {name for name in listed if f"_{split}_" in name} - {path.name for path, _ in shards}
    if missing:
        raise UserError(f"{data_dir} lacks {min(missing)}: bring it back, or make the folder again")
    return shards


@lru_cache(maxsize=4)  # around the end of an epoch: two shards, and two orders of the shards
def permutation(seed: int | None, epoch: int, shard: int, n: int) -> np.ndarray:
    """
    The numbers below n in a random order that belongs to (seed, epoch, shard), uint32. It is the
    order of the n sequences in a shard, or of the n shards themselves for shard -1. Without a seed,
    the numbers are in their natural order.
    """
    if seed is None:
        return np.arange(n, dtype=np.uint32)
    rng = np.random.default_rng([seed, epoch, shard + 1])
    return rng.permutation(np.arange(n, dtype=np.uint32))


@lru_cache(maxsize=2)
def first_cut(seed: int | None, epoch: int, T: int) -> int:
    """
    Where the first sequence of T tokens begins in each shard: 0 in the first epoch and without a
    seed, and in each later epoch a random number below T that belongs to (seed, epoch). A model
    that reads a small text many times then learns each token after contexts of many lengths.
    """
    if seed is None or epoch == 0:
        return 0
    return int(np.random.default_rng([seed, epoch]).integers(T))


class Location(NamedTuple):
    """
    Where the tokens of a shard lie in its file. The loader keeps this instead of a memory map,
    because every page of a map that was once read would count as our memory.
    """

    path: Path
    dtype: np.dtype
    offset: int  # of the first token, in bytes
    num_tokens: int


def read_tokens(shard: Location, start: int, count: int, vocab_size: int) -> np.ndarray:
    """
    `count` token ids of a shard from number `start` on, 1-D uint16 or uint32. Raises UserError for
    one outside the vocabulary.
    """
    offset = shard.offset + start * shard.dtype.itemsize
    tokens = np.fromfile(shard.path, shard.dtype, count, offset=offset)
    check_ids(tokens, vocab_size, shard.path)
    return tokens


def check_ids(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    """Raise UserError if a token id is outside the vocabulary; `path` is the file they are from."""
    if len(tokens) and tokens.max() >= vocab_size:
        raise UserError(f"{path} has token id {tokens.max()}, but the vocabulary has only "
                        f"{vocab_size} tokens, so the shard is of another tokenizer: bring back "
                        "the right shard, or make the folder again")


def head_checksum(tokens: np.ndarray) -> str:
    """A quick checksum of a shard: its dtype, its length and the CRC-32 of its first tokens."""
    head = np.ascontiguousarray(tokens[:HEAD_TOKENS])
    return f"{tokens.dtype} {len(tokens)} {zlib.crc32(head.tobytes()):08x}"


# -----------------------------------------------------------------------------
# writing a folder


def check_folder(out_dir: Path, recipe: dict) -> None:
    """
    Raise UserError if `out_dir` holds shards that were made with other arguments or not by
    fineweb.py, or a file that would be overwritten.
    """
    paths = [out_dir / "meta.json"]
    if not paths[0].is_file():
        paths = list(out_dir.glob("in_progress_*.json"))
    for path in paths:
        differences = list_differences(read_json(path).get("recipe", {}), recipe)
        if differences:
            raise UserError(f"{out_dir} was made with {', '.join(differences)}: choose another "
                            "--out")
    if paths:
        return
    if find_shards(out_dir, "train") or find_shards(out_dir, "val"):
        raise UserError(f"{out_dir} holds shards that were not made here: choose another --out")
    for name in TOKENIZER_FILES.values():
        if recipe["tokenizer"] != "gpt2" and (out_dir / name).exists():
            raise UserError(f"{out_dir} holds a {name} already, which would be overwritten: "
                            "remove it, or choose another --out")


def check_writable(out_dir: Path) -> None:
    """Raise UserError if `out_dir` is not a folder that can be made or written to."""
    parent = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write to {out_dir}, because {parent} is not a folder that may be "
                        "written to: choose another --out")


def new_state(recipe: dict, inputs: Sequence) -> dict:
    """
    What in_progress_{rank}.json holds before the first shard is written. Its keys must not change,
    because folders that an earlier version began are continued.
    """
    totals = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
    return {"recipe": recipe, "inputs": inputs, "done": False, "next": [0, 0, 0], "rows": {},
            "totals": totals, "shards": []}


def read_state(out_dir: Path, rank: int = 0) -> dict:
    """The state that a rank has saved in a half-done folder, in the form of new_state, or {}."""
    path = out_dir / f"in_progress_{rank}.json"
    return read_json(path) if path.is_file() else {}


def write_folder(out_dir: Path, recipe: dict, tokenizer: Tokenizer, state: dict,
                 write: Callable[[Path], None], rank: int = 0) -> dict | None:
    """
    Make the folder `out_dir`, save `state`, call `write` with the path of the state's file, and
    finish the folder. Returns the dict of meta.json, or None while other ranks are still working.
    Raises UserError if another process writes to the folder. When `write` returns, the state must
    be saved with True for "done".
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    lock_file = out_dir.resolve() / f"in_progress_{rank}.lock"
    lock_folder(lock_file, "is writing to", "--out")
    try:
        check_folder(out_dir, recipe)  # another process may have written it meanwhile
        if not (out_dir / "meta.json").is_file():
            state_file = out_dir / f"in_progress_{rank}.json"
            write_json(state_file, state)
            write(state_file)
        return finish_folder(out_dir, tokenizer, recipe)
    finally:
        unlock(lock_file)


def finish_folder(out_dir: Path, tokenizer: Tokenizer, recipe: dict) -> dict | None:
    """
    If all ranks are done, rename their shards, write meta.json and return it; otherwise return
    None. Several ranks may do this at the same time, so every step can be repeated without harm.
    """
    paths = [out_dir / f"in_progress_{rank}.json" for rank in range(recipe["world_size"])]
    states = [read_json(path) for path in paths if path.is_file()]
    if (out_dir / "meta.json").is_file():
        return read_meta(out_dir)
    if len(states) < len(paths) or not all(state["done"] for state in states):
        print(f"{out_dir}: this process is done; the last one of {len(paths)} finishes the folder")
        return None
    meta = make_meta(tokenizer, recipe, states, rename_shards(out_dir, states))
    if tokenizer.model:
        model = tokenizer.model.encode("utf-8")
        write_atomically(out_dir / meta["tokenizer_file"], lambda file: file.write(model))
    write_json(out_dir / "meta.json", meta)
    for path in paths:
        path.unlink(missing_ok=True)
    return meta


def rename_shards(out_dir: Path, states: list[dict]) -> list[dict]:
    """Number the shards of all ranks, give them their final names, and return their entries."""
    renamed = []
    for split in SPLITS:
        entries = [e for state in states for e in state["shards"] if e["split"] == split]
        for index, entry in enumerate(entries, FIRST_INDEX[split]):
            name = shard_name(split, index)
            with contextlib.suppress(FileNotFoundError):  # another rank has renamed it already
                os.replace(out_dir / entry["name"], out_dir / name)
            renamed.append({**entry, "name": name})
    return renamed


def make_meta(tokenizer: Tokenizer, recipe: dict, states: list[dict],
              shards: list[dict]) -> dict:
    """The dict of meta.json, from the states of all ranks and the entries of all shards."""
    totals = {split: {key: sum(state["totals"][split][key] for state in states)
                      for key in ("tokens", "documents", "bytes")} for split in SPLITS}
    # with max_tokens, the last input may have been read ahead: count the rows of those before it
    rows = [counts for state in states for index, counts in state["rows"].items()
            if int(index) < state["next"][0]]
    meta = {
        "format_version": FORMAT_VERSION, "tokenizer": tokenizer.spec,
        "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot,
        "dtype": token_dtype(tokenizer.vocab_size).name, "splits": totals,
        "rows_read": sum(num_rows for num_rows, _ in rows),
        "rows_skipped": sum(num_bad for _, num_bad in rows),
        "recipe": recipe, "inputs": states[0]["inputs"], "shards": shards}
    if tokenizer.model:
        kind = "bpe" if tokenizer.model.startswith("{") else "spm"
        meta["tokenizer_file"] = TOKENIZER_FILES[kind]
        meta["tokenizer_sha256"] = sha256(tokenizer.model.encode("utf-8"))
    return meta


# -----------------------------------------------------------------------------
# verifying and describing a folder


def verify(data_dir: str | Path) -> None:
    """
    Read all shards of a folder and print a line about each, "good" or what is wrong with it. Raises
    UserError if anything about the folder is wrong.
    """
    found = find_shards(data_dir, "val") + find_shards(data_dir, "train")
    if not found:
        raise UserError(f"{data_dir} holds no shards: make them with fineweb.py, or name another "
                        "folder")
    meta = read_meta(data_dir)
    listed = {entry["name"]: entry for entry in meta.get("shards", [])}
    names = sorted(set(listed) | {path.name for path in found})
    num_damaged = 0
    for name in names:
        damage = find_damage(Path(data_dir) / name, listed, meta)
        num_damaged += damage is not None
        print(f"{name}  {listed.get(name, {}).get('tokens', '?'):>12}  {damage or 'good'}")
    if "tokenizer_file" in meta:
        load_data_tokenizer(data_dir)
    if num_damaged:
        raise UserError(f"{num_damaged} of {len(names)} shards of {data_dir} are damaged: bring "
                        "back the right shards, or make the folder again")
    print(f"{data_dir} is whole: {len(names)} shards" + ("" if listed else ", without checksums"))


def find_damage(path: Path, listed: dict[str, dict], meta: dict) -> str | None:
    """What is wrong with a shard, or None. `listed` is {file name: its entry in meta.json}."""
    if not path.is_file():
        return "is missing"
    if listed and path.name not in listed:
        return "is not in meta.json"
    try:
        tokens = open_shard(path)
        check_ids(tokens, meta["vocab_size"], path)
    except UserError as error:
        return str(error)
    if "_val_" in path.name and len(tokens) and tokens[0] != meta.get("eot", tokens[0]):
        return "does not begin with end-of-text"
    if listed and str(tokens.dtype) != meta["dtype"]:
        return f"is {tokens.dtype}, not {meta['dtype']}"
    if listed and sha256(np.ascontiguousarray(tokens)) != listed[path.name]["sha256"]:
        return "differs from its checksum"
    return None


def print_stats(data_dir: str | Path) -> None:
    """Print a folder's tokenizer, the size of each split, and the first words of each split."""
    meta, tokenizer = read_meta(data_dir), load_data_tokenizer(data_dir)
    print(f"tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} tokens")
    for split in SPLITS:
        shards = open_split(data_dir, split) if find_shards(data_dir, split) else []
        num_tokens = sum(len(tokens) for _, tokens in shards)
        print(f"{split}: {len(shards)} shards, {num_tokens:,} tokens{format_totals(meta, split)}")
        if shards:
            _, first_shard = shards[0]
            print(f"  {tokenizer.decode(first_shard[1:80])!r}")  # token 0 is mostly end-of-text


def format_totals(meta: dict, split: str) -> str:
    """
    ", 59 documents, 2.72 bytes per token" of a split, to append to a line; "" if meta.json does
    not say or the split is empty.
    """
    totals = meta.get("splits", {}).get(split)
    if not totals or not totals["tokens"]:
        return ""
    return (f", {totals['documents']:,} documents, "
            f"{totals['bytes'] / totals['tokens']:.2f} bytes per token")
