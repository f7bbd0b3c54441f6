"""The shard format: names of the files, meta.json, opening a split, verifying a folder."""

import json
import re
import zlib
from pathlib import Path

import numpy as np

from gpt2lab.cli import UserError
from gpt2lab.files import read_json, sha256
from gpt2lab.tokenizer import Tokenizer

FORMAT_VERSION = 1
SPLITS = ("val", "train")
SHARD_NAME = re.compile(r"edufineweb_(val|train)_(\d{6})\.npy")
HEAD_TOKENS = 4096  # what the quick checksum of a shard covers


def read_meta(data_dir):
    """meta.json of a folder of shards; a folder without one (build-nanogpt's) counts as gpt2."""
    path = Path(data_dir) / "meta.json"
    if path.is_file():
        return read_json(path)
    if next(Path(data_dir).glob("in_progress_*.json"), None):
        raise UserError(f"{data_dir} is half done: give the fineweb.py command that began it again")
    return {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256}


def fingerprint(data_dir):
    """A short text that differs for folders of other tokens, wherever they lie."""
    meta = read_meta(data_dir)
    shards = [(path.name, path.stat().st_size) for split in SPLITS
              for path in find_shards(data_dir, split)]
    known = [meta["tokenizer"], meta.get("tokenizer_sha256"), meta.get("shards"), shards]
    return sha256(json.dumps(known, sort_keys=True).encode("utf-8"))[:16]


def load_data_tokenizer(data_dir):
    """The tokenizer that a folder of shards was made with."""
    meta = read_meta(data_dir)
    if "tokenizer_file" not in meta:
        return Tokenizer(meta["tokenizer"])
    path = Path(data_dir) / meta["tokenizer_file"]
    if not path.is_file():
        raise UserError(f"{path} is missing: make {data_dir} again with fineweb.py")
    model = path.read_text(encoding="utf-8")
    if sha256(model.encode("utf-8")) != meta["tokenizer_sha256"]:
        raise UserError(f"{path} is not the tokenizer {data_dir} was made with: make it again")
    return Tokenizer(meta["tokenizer"], model)


def find_shards(data_dir, split):
    """Sorted paths of a split's shards. Raises UserError where one is missing in the middle."""
    folder = Path(data_dir)
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = SHARD_NAME.fullmatch(path.name)  # neither strays nor temporary files
        if match and match.group(1) == split:
            found[int(match.group(2))] = path
    if found and sorted(found) != list(range(min(found), min(found) + len(found))):
        missing = min(set(range(min(found), max(found))) - set(found))
        raise UserError(f"{folder} lacks edufineweb_{split}_{missing:06d}.npy: bring it back, or "
                        "make the folder again")
    return [found[index] for index in sorted(found)]


def open_shard(path):
    """A shard as a read-only memory map, 1-D uint16 or uint32. Raises UserError for other files."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is truncated or no .npy file ({error}): make it again") from error
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise UserError(f"{path} is no token shard: it holds {tokens.ndim}-D {tokens.dtype}, "
                        "not 1-D uint16 or uint32; remove it or make it with fineweb.py")
    return tokens


def open_split(data_dir, split):
    """
    Open a split as meta.json describes it: [(path, memory map)]. Raises UserError for a shard that
    is missing, damaged, of another tokenizer or of another folder; reads little of each.
    """
    meta = read_meta(data_dir)
    listed = {s["name"]: s for s in meta.get("shards", [])}
    shards = [(path, open_shard(path)) for path in find_shards(data_dir, split)]
    for path, tokens in shards:
        check_ids(tokens[:100_000], meta["vocab_size"], path)
        entry = listed.get(path.name)
        if listed and (entry is None or describe_head(tokens) != entry["head"]):
            raise UserError(f"{path} is not the shard that meta.json describes: are two data sets "
                            "mixed here? bring back the right one, or make the folder again")
    lost = {n for n in listed if f"_{split}_" in n} - {path.name for path, _ in shards}
    if lost and shards:
        raise UserError(f"{data_dir} lacks {min(lost)}: bring it back or make the folder again")
    return shards


def check_ids(tokens, vocab_size, path):
    """Raise UserError if a token id is outside of the vocabulary."""
    if len(tokens) and tokens.max() >= vocab_size:
        raise UserError(f"{path} has token id {tokens.max()}, but the vocabulary has only "
                        f"{vocab_size} tokens: the shard is of another tokenizer")


def describe_head(tokens):
    """A quick mark of a shard's content: dtype, length and the CRC of its first tokens."""
    head = np.ascontiguousarray(tokens[:HEAD_TOKENS])
    return f"{tokens.dtype} {len(tokens)} {zlib.crc32(head.tobytes()):08x}"


def shard_name(split, index):
    """File name of a shard; val starts at 0, train at 1."""
    return f"edufineweb_{split}_{index:06d}.npy"


def verify(data_dir):
    """Print a table of the shards of a folder; raises UserError if anything about it is wrong."""
    if not find_shards(data_dir, "train") + find_shards(data_dir, "val"):
        raise UserError(f"{data_dir} holds no shards")
    meta = read_meta(data_dir)
    listed = {shard["name"]: shard for shard in meta.get("shards", ())}
    damage = 0
    found = find_shards(data_dir, "val") + find_shards(data_dir, "train")
    names = sorted(set(listed) | {path.name for path in found})
    for name in names:
        trouble = verify_shard(Path(data_dir) / name, listed, meta)
        damage += trouble is not None
        print(f"{name}  {listed.get(name, {}).get('tokens', '?'):>12}  {trouble or 'good'}")
    if "tokenizer_file" in meta:
        load_data_tokenizer(data_dir)
    if damage:
        raise UserError(f"{damage} of {len(names)} shards of {data_dir} are damaged: make it again")
    print(f"{data_dir} is whole: {len(names)} shards" + ("" if listed else ", without checksums"))


def verify_shard(path, listed, meta):
    """What is wrong with a shard, in a few words, or None."""
    if not path.is_file():
        return "is missing"
    if listed and path.name not in listed:
        return "is not in meta.json"
    try:
        tokens = open_shard(path)
        check_ids(tokens, meta["vocab_size"], path)
    except UserError as error:
        return str(error)
    if "_val_" in path.name and len(tokens) and tokens[0] != meta["eot"]:
        return "does not open with end-of-text"
    if listed and str(tokens.dtype) != meta["dtype"]:
        return f"is {tokens.dtype}, not {meta['dtype']}"
    if listed and sha256(np.ascontiguousarray(tokens)) != listed[path.name]["sha256"]:
        return "differs from its checksum"
    return None


def print_stats(data_dir):
    """Print the size of each split of a folder, and how it begins."""
    meta, tokenizer = read_meta(data_dir), load_data_tokenizer(data_dir)
    print(f"tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} tokens")
    for split in SPLITS:
        shards = open_split(data_dir, split)
        num_tokens = sum(len(tokens) for _, tokens in shards)
        totals = describe_totals(meta, split)
        print(f"{split}: {len(shards)} shards, {num_tokens:,} tokens{totals}")
        if shards:
            print(f"  {tokenizer.decode(shards[0][1][1:80])!r}")


def describe_totals(meta, split):
    """Documents and bytes per token of a split, where meta.json tells."""
    totals = meta.get("splits", {}).get(split)
    if not totals or not totals["tokens"]:
        return ""
    return (f", {totals['documents']:,} documents, "
            f"{totals['bytes'] / totals['tokens']:.2f} bytes per token")
