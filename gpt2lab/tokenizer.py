"""
Tokenizers behind one class: OpenAI's gpt2, a byte-level BPE (bpe:N) or a SentencePiece model
(spm:N) trained on the corpus, or a trained one from a file.
"""

import base64
import codecs
import functools
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2lab.cli import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257  # 50,000 BPE merges + 256 bytes + 1 end-of-text
GPT2_EOT = 50256  # gpt2's id of END_OF_TEXT, the last one
# GPT-2's pre-tokenization regex. It finds the same words as OpenAI's, but all alternatives that
# need no look-ahead are in one group here, which tiktoken's engine matches 1.6 times as fast
GPT2_PATTERN = (r"(?: ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+)"
                r"|\s++$|\s+(?!\S)|\s")


# what a loader returns: encode_batch, decode_bytes, vocab_size, eot (None if it has none)
Loaded = tuple[Callable[[Sequence[str]], list[np.ndarray]], Callable[[list[int]], bytes],
               int, int | None]


class Tokenizer:
    """
    Text to token ids and back, the same way for every kind of tokenizer.

    spec: "gpt2", "bpe:N", "spm:N" or the path of a trained tokenizer.
    model: the trained model as text, None for gpt2. For SentencePiece it is the model file in
    base64; for a byte-level BPE it is Hugging Face's tokenizer.json.
    vocab_size: the number of token ids. eot: the id of end-of-text, <|endoftext|>.

    Encoding never produces eot: the characters "<|endoftext|>" in a text are encoded as characters.
    """

    def __init__(self, spec: str, model: str | None = None) -> None:
        self.spec, self.model = spec, model
        if model is None:
            loaded = load_gpt2()
        elif model.startswith("{"):
            loaded = load_bpe(model)
        else:
            loaded = load_spm(model)
        self._encode_batch, self._decode_bytes, self.vocab_size, eot = loaded
        if eot is None:
            raise UserError(f"tokenizer {spec} has no {END_OF_TEXT} token: train one with bpe:N")
        self.eot: int = eot

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, as 1-D uint32 arrays."""
        return self._encode_batch(texts)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        # a terminal can pass lone surrogates, which UTF-8 cannot encode: they become "?"
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        return self._encode_batch([text])[0].tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of the token ids. They may end in the middle of a character."""
        return self._decode_bytes([int(i) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """
        The text of the token ids. Invalid UTF-8 becomes U+FFFD; an unfinished character at the end
        is left out.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return decoder.decode(self.decode_bytes(ids))

    def state(self) -> dict[str, str | None]:
        """Plain values from which `Tokenizer(**state)` is rebuilt. Checkpoints hold them."""
        return {"spec": self.spec, "model": self.model}


# -----------------------------------------------------------------------------
# loading


@functools.cache  # parsing the merges takes a third of a second
def load_gpt2() -> Loaded:
    """GPT-2's own tokenizer. Raises UserError if its files cannot be downloaded."""
    import requests
    import tiktoken
    from tiktoken_ext import openai_public
    try:
        ranks = openai_public.gpt2()["mergeable_ranks"]
    except (requests.RequestException, OSError):
        ranks = fetch_gpt2_from_hub()
    gpt2 = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: GPT2_EOT},
                             explicit_n_vocab=GPT2_VOCAB_SIZE)

    def encode_batch(texts):
        joined = END_OF_TEXT.join(texts)
        if joined.count(END_OF_TEXT) != len(texts) - 1:  # a text contains <|endoftext|>
            return [gpt2.encode_to_numpy(text, disallowed_special=()) for text in texts]
        # one call for all texts, because between calls a thread has to wait for Python's lock
        ids = gpt2.encode_to_numpy(joined, allowed_special="all")
        starts = [0, *(np.flatnonzero(ids == gpt2.eot_token) + 1), len(ids) + 1]
        return [ids[start:end - 1] for start, end in itertools.pairwise(starts)]

    return encode_batch, gpt2.decode_bytes, gpt2.n_vocab, gpt2.eot_token


def fetch_gpt2_from_hub() -> dict[bytes, int]:
    """
    gpt2's {token bytes: id} from its files on the Hugging Face hub. HF_ENDPOINT can name a mirror
    of the hub. Raises UserError if the files cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    try:
        merges, vocab = (hf_hub_download("openai-community/gpt2", name)
                         for name in ("merges.txt", "vocab.json"))
        return data_gym_to_mergeable_bpe_ranks(  # raises ValueError for another sha256
            merges, vocab, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot download the gpt2 tokenizer ({type(error).__name__}): set HF_ENDPOINT to a "
            "mirror of the hub. Or, on a machine with a network, set TIKTOKEN_CACHE_DIR to a "
            "folder and run python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"; then "
            "copy the folder here and set TIKTOKEN_CACHE_DIR to it") from error


def byte_spelling() -> dict[int, str]:
    """
    {byte: the printable character that stands for it} in the vocabulary of a byte-level BPE, as
    bytes_to_unicode in OpenAI's GPT-2 code has it.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = sorted(set(range(256)) - set(printable))  # chr(256), chr(257), ...
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(unprintable)}


def load_bpe(tokenizer_json: str) -> Loaded:
    """A byte-level BPE from the text of a tokenizer.json. Raises UserError for other contents."""
    import tokenizers
    try:
        bpe = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise UserError(f"this is not a tokenizer.json of Hugging Face's tokenizers ({error}): "
                        "name another file, or train a tokenizer with bpe:N") from error
    if '"ByteLevel"' not in tokenizer_json:
        raise UserError("only byte-level BPE tokenizers are supported: train one with bpe:N")
    bpe.encode_special_tokens = True  # special tokens in a text are encoded as characters
    byte_of = {char: byte for byte, char in byte_spelling().items()}
    bytes_of_id = {}
    for token, i in bpe.get_vocab().items():
        if token != END_OF_TEXT and all(char in byte_of for char in token):
            bytes_of_id[i] = bytes(byte_of[char] for char in token)
        else:  # an added token, which is stored as plain text
            bytes_of_id[i] = token.encode("utf-8")

    def encode_batch(texts):
        encodings = bpe.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode_bytes(ids):
        return b"".join(bytes_of_id[i] for i in ids)

    return encode_batch, decode_bytes, bpe.get_vocab_size(), bpe.token_to_id(END_OF_TEXT)


def load_spm(model: str) -> Loaded:
    """A SentencePiece model from the base64 of its file."""
    spm = import_sentencepiece().SentencePieceProcessor(model_proto=base64.b64decode(model))
    eot = spm.piece_to_id(END_OF_TEXT)

    def piece_bytes(i):
        piece = spm.id_to_piece(i)
        if spm.is_byte(i):  # written <0x0A>
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode("utf-8")

    def encode_batch(texts):
        return [np.array(spm.encode(text), dtype=np.uint32) for text in texts]

    def decode_bytes(ids):
        return b"".join(map(piece_bytes, ids))

    return encode_batch, decode_bytes, len(spm), eot if eot != spm.unk_id() else None


def import_sentencepiece() -> Any:
    """The module sentencepiece, an optional package. Raises UserError if it is not installed."""
    try:
        import sentencepiece
    except ImportError:
        raise UserError("spm tokenizers need the package sentencepiece: pip install sentencepiece, "
                        "or use bpe:N") from None
    return sentencepiece


# -----------------------------------------------------------------------------
# training


def make_byte_level_bpe(model: Any) -> Any:
    """
    A tokenizers.Tokenizer, Hugging Face's class, around a tokenizers.models.BPE. It splits text as
    GPT-2 does.
    """
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, pre_tokenizers
    bpe = HFTokenizer(model)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """
    Train a byte-level BPE of `vocab_size` tokens, the last of which is end-of-text. It splits text
    as GPT-2 does. Raises UserError if `vocab_size` is too small.
    """
    if vocab_size < 257:
        raise UserError(f"bpe:{vocab_size} is too small: 256 bytes and end-of-text need bpe:257")
    from tokenizers import models, pre_tokenizers, trainers
    bpe = make_byte_level_bpe(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens([END_OF_TEXT])
    return Tokenizer(f"bpe:{vocab_size}", bpe.to_str())


def train_spm(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """
    Train a SentencePiece model of `vocab_size` tokens: a unigram model that falls back to bytes for
    rare characters. Raises UserError if the text is too small for so many tokens.
    """
    sentencepiece = import_sentencepiece()
    model = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=vocab_size, byte_fallback=True,
            character_coverage=0.9995, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, bos_id=-1, eos_id=1, eos_piece=END_OF_TEXT, pad_id=-1,
            unk_id=0, input_sentence_size=2_000_000, shuffle_input_sentence=False,
            num_threads=os.cpu_count(), minloglevel=2)
    except RuntimeError as error:
        raise UserError(f"spm:{vocab_size} cannot be trained on this text ({error}): choose "
                        "another number, or use bpe:N") from error
    return Tokenizer(f"spm:{vocab_size}", base64.b64encode(model.getvalue()).decode("ascii"))


# -----------------------------------------------------------------------------
# by spec or by file


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, which is a tokenizer.json or a SentencePiece model."""
    data = Path(path).read_bytes()
    if data.lstrip().startswith(b"{"):
        return Tokenizer(str(path), data.decode("utf-8").lstrip())
    return Tokenizer(str(path), base64.b64encode(data).decode("ascii"))


def check_spec(spec: str) -> None:
    """Raise UserError unless `spec` is gpt2, bpe:N, spm:N or an existing file."""
    if not (spec == "gpt2" or re.fullmatch(r"(bpe|spm):\d+", spec) or Path(spec).is_file()):
        raise UserError(f"unknown tokenizer {spec!r}: use gpt2, bpe:N (for example bpe:8192), "
                        "spm:N or the path of a trained one")


def make_tokenizer(spec: str,
                   training_texts: Callable[[], Iterable[str]] | None = None) -> Tokenizer:
    """
    The tokenizer of a spec that check_spec has accepted. Only bpe:N and spm:N need
    `training_texts`, which is called for the texts to train on.
    """
    if spec == "gpt2":
        return Tokenizer(spec)
    if Path(spec).is_file():
        return read_tokenizer(spec)
    assert training_texts is not None, f"{spec} has to be trained"
    kind, vocab_size = spec.split(":")
    print(f"training the tokenizer {spec}")
    train = train_bpe if kind == "bpe" else train_spm
    return train(training_texts(), int(vocab_size))
