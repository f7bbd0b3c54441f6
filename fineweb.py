"""
Turns text into token shards that train_gpt2.py reads; owns the tokenizers and the shard format.

    python fineweb.py                                        # FineWeb-EDU sample-10BT, gpt2 tokens
    python fineweb.py --source a.txt b.jsonl.gz folder/ --tokenizer bpe:8192 --out my_data
    python fineweb.py --source builtin --tokenizer bpe:2048 --out demo_data   # offline, 2 MB

A folder of shards holds edufineweb_val_000000.npy and edufineweb_train_000001.npy onwards (1-D,
uint16 or uint32, each document preceded by the end-of-text token) and, written last, meta.json.
This module never imports torch.
"""

import argparse
import ast
import codecs
import functools
import gzip
import hashlib
import json
import os
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

FORMAT_VERSION = 1
END_OF_TEXT = "<|endoftext|>"
SHARD_NAME = re.compile(r"edufineweb_(val|train)_(\d{6})\.npy")
TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
TRAIN_SAMPLE_BYTES = 100_000_000  # a trained tokenizer learns from at most this much text
PIECE_CHARS = 1 << 18  # longer documents are tokenized in pieces of this size, cut at a line end
BATCH_CHARS = 1 << 22  # text handed to the tokenizer threads at once
BYTES_PER_TOKEN = 4  # a rough figure for English, used only to tell small corpora from large ones


class UserError(ValueError):
    """A mistake the user can mend; its message says how. Scripts print it as one line."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a bad command line costs one line of stderr, not the whole usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def run_main(main):
    """Call `main()`; what a user can cause ends in one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        rank = os.environ.get("RANK", "0")
        where = f"{Path(sys.argv[0]).name}: " + (f"rank {rank}: " if rank != "0" else "")
        print(f"{where}error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


# -----------------------------------------------------------------------------
# tokenizers

class Tokenizer:
    """
    Text to token ids and back, the same way for every kind of tokenizer.

    spec: "gpt2" or "bpe:N". tokenizer_json: the text of a Hugging Face tokenizer.json holding a
    byte-level BPE, for every spec but gpt2. `vocab_size` counts all ids, `eot` is end-of-text.
    Encoding never produces `eot`: the literal "<|endoftext|>" in a text is text.
    """

    def __init__(self, spec, tokenizer_json=None):
        self.spec = spec
        self.tokenizer_json = tokenizer_json
        if spec == "gpt2":
            self._gpt2 = _load_tiktoken_gpt2()
            self.vocab_size, self.eot = self._gpt2.n_vocab, self._gpt2.eot_token
            return
        import tokenizers
        self._gpt2 = None
        self._bpe = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._bpe.encode_special_tokens = True  # treat special tokens in the text as plain text
        self.vocab_size = self._bpe.get_vocab_size()
        self.eot = self._bpe.token_to_id(END_OF_TEXT)
        if self.eot is None:
            raise UserError(f"tokenizer {spec} has no {END_OF_TEXT} token: train one with bpe:N")
        self._bytes = _token_bytes(self._bpe)

    def encode_batch(self, texts):
        """Token ids of each text, as a list of 1-D uint32 arrays; uses all cores."""
        if self._gpt2:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken releases the GIL
                return list(pool.map(self._encode_gpt2, texts))
        encodings = self._bpe.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _encode_gpt2(self, text):
        return np.array(self._gpt2.encode_ordinary(text), dtype=np.uint32)

    def encode(self, text):
        """Token ids of one text, as a list of ints."""
        return self.encode_batch([text])[0].tolist()

    def decode_bytes(self, ids):
        """The UTF-8 bytes behind the ids; they may end inside a character."""
        ids = [int(i) for i in ids]
        return self._gpt2.decode_bytes(ids) if self._gpt2 else b"".join(map(self._bytes.get, ids))

    def decode(self, ids):
        """Text behind the ids: bad UTF-8 becomes U+FFFD, half a character at the end nothing."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return decoder.decode(self.decode_bytes(ids))

    def state(self):
        """Plain values from which `Tokenizer(**state)` is rebuilt; stored in checkpoints."""
        return {"spec": self.spec, "tokenizer_json": self.tokenizer_json}


def _load_tiktoken_gpt2():
    import requests
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except (requests.RequestException, OSError) as error:
        raise UserError(
            "cannot download the gpt2 tokenizer: where there is a network, set TIKTOKEN_CACHE_DIR "
            "to a folder and run python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"; "
            f"bring the folder here and set TIKTOKEN_CACHE_DIR to it ({type(error).__name__})"
        ) from error


def _token_bytes(bpe):
    """{id: bytes} of a byte-level BPE, which spells every byte as a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = sorted(set(range(256)) - set(printable))  # spelled chr(256), chr(257), ...
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(unprintable)}
    table = {}
    for token, i in bpe.get_vocab().items():
        spelled = token != END_OF_TEXT and all(char in byte_of for char in token)
        table[i] = bytes(byte_of[char] for char in token) if spelled else token.encode("utf-8")
    return table


def train_bpe(texts, vocab_size):
    """Train a byte-level BPE of `vocab_size` tokens with GPT-2's splitting rule, eot last."""
    if vocab_size < 257:
        raise UserError(f"bpe:{vocab_size} is too small: 256 bytes and end-of-text need bpe:257")
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens([END_OF_TEXT])
    return Tokenizer(f"bpe:{vocab_size}", bpe.to_str())


def parse_tokenizer_spec(spec):
    """None for "gpt2", the vocabulary size for "bpe:N"; raises UserError for anything else."""
    if spec == "gpt2":
        return None
    match = re.fullmatch(r"bpe:(\d+)", spec)
    if not match:
        raise UserError(f"unknown tokenizer {spec!r}: use gpt2 or bpe:N, for example bpe:8192")
    return int(match.group(1))


def load_data_tokenizer(data_dir):
    """The tokenizer that a folder of shards was made with."""
    meta = read_meta(data_dir)
    if "tokenizer_file" not in meta:
        return Tokenizer(meta["tokenizer"])
    path = Path(data_dir) / meta["tokenizer_file"]
    if not path.is_file():
        raise UserError(f"{path} is missing: make {data_dir} again with fineweb.py")
    text = path.read_text(encoding="utf-8")
    if hashlib.sha256(text.encode("utf-8")).hexdigest() != meta["tokenizer_sha256"]:
        raise UserError(f"{path} is not the tokenizer {data_dir} was made with: make it again")
    return Tokenizer(meta["tokenizer"], text)


# -----------------------------------------------------------------------------
# the shard format, reading side

def read_meta(data_dir):
    """meta.json of a folder of shards; a folder without one (build-nanogpt's) counts as gpt2."""
    path = Path(data_dir) / "meta.json"
    if not path.is_file():
        return {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): make the folder again") from error


def find_shards(data_dir, split):
    """Sorted paths of a split's shards; stray and temporary files are not among them."""
    folder = Path(data_dir)
    if not folder.is_dir():
        return []
    names = sorted(p.name for p in folder.iterdir() if SHARD_NAME.fullmatch(p.name))
    return [folder / name for name in names if SHARD_NAME.fullmatch(name).group(1) == split]


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


# -----------------------------------------------------------------------------
# the shard format, writing side

def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path`, then fsync and rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class ShardWriter:
    """Fills the shards of one split, `shard_size` tokens each; `close` writes the partial last."""

    def __init__(self, out_dir, split, first_index, shard_size, dtype):
        self.out_dir, self.split, self.index = out_dir, split, first_index
        self.buffer = np.empty(shard_size, dtype)
        self.filled = 0
        self.totals = {"tokens": 0, "documents": 0, "bytes": 0}

    def add(self, tokens):
        """Append a 1-D array of token ids, of any length."""
        self.totals["tokens"] += len(tokens)
        while len(tokens):
            part = tokens[:len(self.buffer) - self.filled]
            self.buffer[self.filled:self.filled + len(part)] = part
            self.filled += len(part)
            tokens = tokens[len(part):]
            if self.filled == len(self.buffer):
                self.close()

    def close(self):
        """Write what the buffer holds, if anything."""
        if self.filled:
            path = self.out_dir / f"edufineweb_{self.split}_{self.index:06d}.npy"
            write_atomically(path, lambda file: np.save(file, self.buffer[:self.filled]))
            self.index, self.filled = self.index + 1, 0


# -----------------------------------------------------------------------------
# sources of text: each yields (text, starts_document)

def iterate_source(sources, config=None, text_column="text"):
    """
    Yield (text, starts_document) over all sources, in a fixed order. Documents longer than
    PIECE_CHARS come in several pieces, which joined are the document.

    sources: "builtin", files or folders of .txt (a document each), .jsonl, .jsonl.gz or .parquet
    (a document a row), or one Hugging Face dataset name, whose `config`'s train split is read.
    """
    for source in map(str, sources):
        if source == "builtin":
            for text in builtin_documents():
                yield from cut_in_pieces(text)
        elif Path(source).exists():
            for path in list_text_files(Path(source)):
                yield from read_file(path, text_column)
        elif is_hub_name(source):
            yield from read_hub_dataset(source, config, text_column)
        else:
            raise UserError(f"source {source!r} is neither 'builtin', nor a file or folder here, "
                            "nor a Hugging Face dataset name (USER/NAME)")


def is_hub_name(source):
    """Whether `source` is spelled like USER/NAME and is not a path with a text suffix."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and not source.endswith(TEXT_SUFFIXES)


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


def read_file(path, text_column="text"):
    """Yield (text, starts_document) over one .txt, .jsonl, .jsonl.gz or .parquet file."""
    if path.name.endswith(".txt"):
        yield from read_txt(path)
        return
    rows = read_parquet(path, text_column) if path.suffix == ".parquet" else read_jsonl(path)
    for where, row in rows:
        text = row.get(text_column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{path}, {where}: no text in column {text_column!r} (--text_column)")
        # JSON can spell half a surrogate pair, which UTF-8 cannot
        yield from cut_in_pieces(text.encode("utf-8", errors="replace").decode("utf-8"))


def read_txt(path):
    """Yield the pieces of one UTF-8 text file, read as it is but for a leading byte order mark."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        starts, rest = True, ""
        try:
            while chunk := file.read(PIECE_CHARS):
                head, newline, rest = (rest + chunk).rpartition("\n")
                if not newline:  # a line that long is cut anywhere
                    head, rest = rest, ""
                yield head + newline, starts
                starts = False
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start} of a "
                            f"block): convert it, for example with iconv -t UTF-8") from error
    if rest:
        yield rest, starts


def cut_in_pieces(text):
    """Yield (piece, starts_document), the pieces cut after a line end where there is one."""
    starts = True
    while len(text) > PIECE_CHARS:
        cut = text.rfind("\n", 0, PIECE_CHARS) + 1 or PIECE_CHARS
        yield text[:cut], starts
        text, starts = text[cut:], False
    if text:
        yield text, starts


def read_jsonl(path):
    """Yield ("line N", row) over a .jsonl or .jsonl.gz file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", json.loads(line)
        except (ValueError, EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is no UTF-8 JSON lines file ({error})") from error


def read_parquet(path, text_column):
    """Yield ("row N", {text_column: text}) over a parquet file, a batch in memory at a time."""
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1000, columns=[text_column]):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no readable parquet file ({error})") from error


def read_hub_dataset(name, config, text_column):
    """Yield (text, starts_document) over a hub dataset's train split, one file kept at a time."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem, hf_hub_download
    try:
        files = load_dataset_builder(name, config).config.data_files["train"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot list the files of {name} ({config}): {error}; check the names and the "
            "network, set HF_ENDPOINT to a mirror, or HF_TOKEN to your token") from error
    for url in files:
        file = HfFileSystem().resolve_path(url)
        local = Path(hf_hub_download(
            file.repo_id, file.path_in_repo, repo_type="dataset", revision=file.revision))
        yield from read_file(local, text_column)
        for path in (local.resolve(), local):  # the cache's content and the link to it
            path.unlink(missing_ok=True)


@functools.cache  # parsing the library takes seconds, and every pass over the source asks for it
def builtin_documents():
    """
    Text that every Python carries, about 2 MB, in a fixed shuffled order: the language reference
    that help() shows, and the docstrings of the standard library with the names they belong to.
    """
    import sysconfig
    documents = []
    try:
        from pydoc_data import topics
        documents = list(topics.topics.values())
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


# -----------------------------------------------------------------------------
# from text to shards

def assign_splits(pieces, small_bytes, val_fraction):
    """
    Yield (split, text, starts_document) for a corpus of `small_bytes` bytes: the last
    `val_fraction` of them is val, cut at a line end if there is one; val opens a new document.
    """
    train_left = int(small_bytes * (1 - val_fraction))
    cutting = True
    for text, starts in pieces:
        data = text.encode("utf-8")
        if not cutting:
            yield "val", text, starts
        elif len(data) <= train_left:
            train_left -= len(data)
            yield "train", text, starts
        else:
            head = data[:data.rfind(b"\n", 0, train_left) + 1]
            head = head or data[:train_left].decode("utf-8", errors="ignore").encode("utf-8")
            if head:
                yield "train", head.decode("utf-8"), starts
            yield "val", data[len(head):].decode("utf-8"), True
            cutting = False


def measure_corpus(pieces, limit):
    """UTF-8 bytes of the pieces, or None as soon as they exceed `limit`."""
    total = 0
    for text, _ in pieces:
        total += len(text.encode("utf-8"))
        if total > limit:
            return None
    if total == 0:
        raise UserError("the source holds no text")
    return total


def tokenizer_sample(labelled, shard_size):
    """Texts to train a tokenizer on: train pieces (of a large corpus, those well past val)."""
    skip, taken = BYTES_PER_TOKEN * 3 // 2 * shard_size, 0
    for split, text, _ in labelled:
        if split is None and skip > 0:  # shard 0 becomes val: its text is in about this many bytes
            skip -= len(text)
        elif split != "val":
            yield text
            taken += len(text)
        if taken >= TRAIN_SAMPLE_BYTES:
            return


def write_shards(labelled, tokenizer, out_dir, shard_size):
    """Tokenize (split, text, starts_document) into shards; returns {split: totals}."""
    dtype = np.uint16 if tokenizer.vocab_size <= 65_535 else np.uint32
    val = ShardWriter(out_dir, "val", 0, shard_size, dtype)
    train = ShardWriter(out_dir, "train", 1, shard_size, dtype)
    progress = tqdm(unit="tok", unit_scale=True, desc=f"writing {out_dir}")
    for batch in batches_of_text(labelled):
        arrays = tokenizer.encode_batch([text for _, text, _ in batch])
        for (split, text, starts), tokens in zip(batch, arrays, strict=True):
            tokens = np.concatenate([[tokenizer.eot], tokens]).astype(dtype) if starts else tokens
            n_bytes = len(text.encode("utf-8"))
            # a large corpus comes without split labels: val is its first shard
            room = shard_size - val.totals["tokens"] if split is None else 0
            target = val if split == "val" or room > 0 else train
            target.totals["documents"] += starts
            if 0 < room < len(tokens):  # this piece straddles the end of the val shard
                val.add(tokens[:room])
                in_val = len(tokenizer.decode_bytes(tokens[int(starts):room]))
                val.totals["bytes"] += in_val
                tokens, n_bytes, target = tokens[room:], n_bytes - in_val, train
            target.add(tokens)
            target.totals["bytes"] += n_bytes
        progress.update(val.totals["tokens"] + train.totals["tokens"] - progress.n)
    progress.close()
    val.close()
    train.close()
    return {"val": val.totals, "train": train.totals}


def batches_of_text(labelled):
    """Group labelled pieces into lists of about BATCH_CHARS characters."""
    batch, chars = [], 0
    for item in labelled:
        batch.append(item)
        chars += len(item[1])
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def is_complete(out_dir, recipe):
    """
    Whether `out_dir` holds the shards of this recipe. A half-done folder of the same recipe is
    done again; anything else in the way raises UserError, so that nothing is overwritten.
    """
    done, doing = out_dir / "meta.json", out_dir / "in_progress.json"
    for path in (done, doing):
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8")).get("recipe", {})
            differing = [key for key in recipe if found.get(key) != recipe[key]]
            if differing:
                was = ", ".join(f"{k} {found.get(k)!r}, not {recipe[k]!r}" for k in differing)
                raise UserError(f"{out_dir} was made with {was}: choose another --out")
            return path == done
    if find_shards(out_dir, "train") or find_shards(out_dir, "val"):
        raise UserError(f"{out_dir} holds shards that were not made here: choose another --out")
    return False


def prepare(sources, out, tokenizer_spec, config=None, text_column="text", shard_size=100_000_000,
            val_fraction=0.1):
    """
    Write the folder of shards `out` from `sources` (see iterate_source); returns its meta.

    The first shard of `shard_size` tokens is val. A corpus too small for two shards (counting
    BYTES_PER_TOKEN) is split by text instead: its last `val_fraction` of bytes is val. Complete
    already with the same arguments: left as it is. Raises UserError for what the user can mend.
    """
    vocab_size = parse_tokenizer_spec(tokenizer_spec)
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction {val_fraction} must lie between 0 and 1")
    if shard_size < 1:
        raise UserError(f"--shard_size {shard_size} must be positive")
    recipe = {"source": [str(source) for source in sources], "config": config,
              "text_column": text_column, "tokenizer": tokenizer_spec,
              "shard_size": shard_size, "val_fraction": val_fraction}
    out_dir = Path(out)
    if is_complete(out_dir, recipe):
        print(f"{out_dir} is complete")
        return read_meta(out_dir)

    def labelled():
        pieces = iterate_source(sources, config, text_column)
        if corpus_bytes is None:
            return ((None, text, starts) for text, starts in pieces)
        return assign_splits(pieces, corpus_bytes, val_fraction)

    # everything that can be wrong with a small source shows here, before anything is written
    pieces = iterate_source(sources, config, text_column)
    on_hub = any(not Path(s).exists() and is_hub_name(str(s)) for s in sources)  # taken as large
    corpus_bytes = None if on_hub else measure_corpus(pieces, 2 * shard_size * BYTES_PER_TOKEN)
    if vocab_size is None:
        tokenizer = Tokenizer("gpt2")
    else:
        print(f"training the tokenizer {tokenizer_spec}")
        tokenizer = train_bpe(tokenizer_sample(labelled(), shard_size), vocab_size)

    out_dir.mkdir(parents=True, exist_ok=True)
    in_progress = out_dir / "in_progress.json"
    write_atomically(in_progress, lambda file: file.write(json.dumps({"recipe": recipe}).encode()))
    meta = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer_spec,
            "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
    if tokenizer.tokenizer_json:
        data = tokenizer.tokenizer_json.encode("utf-8")
        write_atomically(out_dir / "tokenizer.json", lambda file: file.write(data))
        meta["tokenizer_file"] = "tokenizer.json"
        meta["tokenizer_sha256"] = hashlib.sha256(data).hexdigest()
    meta["splits"] = write_shards(labelled(), tokenizer, out_dir, shard_size)
    meta["dtype"] = "uint16" if tokenizer.vocab_size <= 65_535 else "uint32"
    meta["recipe"] = recipe
    text = json.dumps(meta, indent=2, ensure_ascii=False)
    write_atomically(out_dir / "meta.json", lambda file: file.write(text.encode("utf-8")))
    in_progress.unlink()
    return meta


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", nargs="+", default=["HuggingFaceFW/fineweb-edu"],
                        help="files, folders, 'builtin', or a Hugging Face dataset")
    parser.add_argument("--config", default=None,
                        help="configuration of a hub dataset (fineweb-edu: sample-10BT)")
    parser.add_argument("--text_column", default="text", help="column or field that holds the text")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, or bpe:N to train one")
    parser.add_argument("--out", default="edu_fineweb10B", help="folder to write the shards to")
    parser.add_argument("--shard_size", type=int, default=100_000_000, help="tokens in a shard")
    parser.add_argument("--val_fraction", type=float, default=0.1,
                        help="share of a small corpus's bytes, at its end, that becomes val")
    args = parser.parse_args()
    if args.config is None and args.source == ["HuggingFaceFW/fineweb-edu"]:
        args.config = "sample-10BT"
    meta = prepare(args.source, args.out, args.tokenizer, args.config, args.text_column,
                   args.shard_size, args.val_fraction)
    for split, totals in meta["splits"].items():
        print(f"{split}: {totals['tokens']:,} tokens, {totals['documents']:,} documents, "
              f"{totals['bytes'] / max(totals['tokens'], 1):.2f} bytes per token")
    print(f"next: python train_gpt2.py --data_dir {args.out}")


if __name__ == "__main__":
    run_main(main)
