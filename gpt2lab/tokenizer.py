"""
Tokenizers behind one class: OpenAI's gpt2, a byte-level BPE (bpe:N) or a SentencePiece model
(spm:N) trained on the corpus, or a trained one from a file.
"""

import base64
import codecs
import functools
import io
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2lab.cli import UserError, available_cpus

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257  # 50,000 BPE merges + 256 bytes + 1 end-of-text
GPT2_EOT = 50256  # gpt2's id of END_OF_TEXT, the last one
# GPT-2's pre-tokenization regex. It finds the same words as OpenAI's, but all alternatives that
# need no look-ahead are in one group here, which tiktoken's engine matches 1.6 times as fast
GPT2_PATTERN = (r"(?: ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+)"
                r"|\s++$|\s+(?!\S)|\s")


# texts that a tokenizer must give back unchanged. Together they hold every byte of UTF-8
PROBES = (
    " two  spaces, a tab\t, line ends\r\n\n and a space at the end ", "MiXeD Case, İ ß ΣΑΣ",
    "e\u0301 \u1e9b\u0323 ﬁ Ａ① ½ 한글 \u212b \u00ad\u200b\u3000", "你好，世界。😀👩‍👩‍👧",
    END_OF_TEXT,
    "".join(map(chr, range(0x80))), "".join(map(chr, range(0x80, 0xC0))),
    "".join(map(chr, (*range(0xC0, 0x800, 0x40), 0x800, *range(0x1000, 0x10000, 0x1000),
                      *range(0x10000, 0x110000, 0x30000)))))
LOSSLESS_HELP = (
    "Train one with bpe:N or spm:N; or, in a tokenizer.json, set normalizer to null; or train a "
    "SentencePiece model with byte_fallback=true, normalization_rule_name=identity, "
    "add_dummy_prefix=false and remove_extra_whitespaces=false")
SPM_LINE_BYTES = 4192  # SentencePiece leaves longer lines out of the training
SPM_LINE_CHARS = SPM_LINE_BYTES // 4  # no character has more than four bytes

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
        else:
            try:
                loaded = load_bpe(model) if model.startswith("{") else load_spm(model)
            except UserError as error:
                raise UserError(f"tokenizer {spec}: {error}") from error
        self._encode_batch, self._decode_bytes, self.vocab_size, eot = loaded
        if eot is None:
            raise UserError(f"tokenizer {spec} has no {END_OF_TEXT} token: train one with bpe:N")
        self.eot: int = eot
        self.check_probes()

    def check_probes(self) -> None:
        """Raise UserError if the tokenizer changes a text, or makes end-of-text of its name."""
        for text, ids in zip(PROBES, self._encode_batch(PROBES), strict=True):
            decoded = self._decode_bytes(ids.tolist()).decode("utf-8", errors="replace")
            if self.eot in ids:
                raise UserError(f"tokenizer {self.spec} makes end-of-text of the characters "
                                f"{END_OF_TEXT} in a text. {LOSSLESS_HELP}")
            if decoded == text:
                continue
            same = sum(1 for _ in itertools.takewhile(bool, map(str.__eq__, decoded, text)))
            part = slice(max(0, same - 4), same + 8)
            raise UserError(f"tokenizer {self.spec} changes text: {text[part]!r} becomes "
                            f"{decoded[part]!r}. {LOSSLESS_HELP}")

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

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
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
    if '"ByteLevel"' not in tokenizer_json or not isinstance(bpe.model, tokenizers.models.BPE):
        raise UserError("only byte-level BPE tokenizers are supported: train one with bpe:N")
    keep_all_text(bpe)
    byte_of = {char: byte for byte, char in byte_spelling().items()}
    added = {i: token.content for i, token in bpe.get_added_tokens_decoder().items()}
    bytes_of_id = {}
    for token, i in bpe.get_vocab().items():
        if i not in added and all(char in byte_of for char in token):
            bytes_of_id[i] = bytes(byte_of[char] for char in token)
        else:  # an added token, which is stored as plain text
            bytes_of_id[i] = token.encode("utf-8")

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        encodings = bpe.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode_bytes(ids: Sequence[int]) -> bytes:
        return b"".join(bytes_of_id.get(i, b"") for i in ids)  # some files leave out ids

    return encode_batch, decode_bytes, max(bytes_of_id) + 1, bpe.token_to_id(END_OF_TEXT)


def keep_all_text(bpe: Any) -> None:
    """
    Switch off what makes the encoding of a tokenizers.Tokenizer, Hugging Face's class, lossy or
    random. Its file may have been saved with such settings, which are meant for other models.
    """
    from tokenizers import normalizers, pre_tokenizers
    bpe.no_truncation()
    bpe.no_padding()
    bpe.model.dropout = None
    # special tokens in a text are encoded as characters. So is an added token that swallows spaces
    bpe.encode_special_tokens = True
    bpe.add_special_tokens([
        token.content for token in bpe.get_added_tokens_decoder().values()
        if token.content == END_OF_TEXT or token.lstrip or token.rstrip])
    if all(isinstance(step, normalizers.NFC) for step in list_steps(bpe.normalizer)):
        bpe.normalizer = None  # most text is in this form, and keeps its token ids
    for step in list_steps(bpe.pre_tokenizer):
        if isinstance(step, pre_tokenizers.ByteLevel):
            step.add_prefix_space = False


def list_steps(step: Any) -> list[Any]:
    """The steps of a normalizer or a pre-tokenizer, which may be a Sequence of others."""
    return list(step) if hasattr(step, "__getitem__") else [step]


def load_spm(model: str) -> Loaded:
    """A SentencePiece model from the base64 of its file. Raises UserError for other contents."""
    spm = import_sentencepiece().SentencePieceProcessor()
    try:
        spm.load_from_serialized_proto(base64.b64decode(model))
    except (RuntimeError, ValueError) as error:
        raise UserError("this is neither a tokenizer.json nor a SentencePiece model: name another "
                        "file, or train one with bpe:N") from error
    eot = spm.piece_to_id(END_OF_TEXT)

    def piece_bytes(i: int) -> bytes:
        piece = spm.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if spm.is_byte(i) else piece.encode()  # <0x0A> is \n

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(spm.encode(text), dtype=np.uint32) for text in texts]

    def decode_bytes(ids: Sequence[int]) -> bytes:
        # U+2581 stands for a space. It is written in bytes if the training text had no space
        return b"".join(map(piece_bytes, ids)).replace("\u2581".encode(), b" ")

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


def cut_long_line(line: str) -> list[str]:
    """The line in parts of at most SPM_LINE_BYTES bytes, cut before white space if there is any."""
    if len(line.encode("utf-8")) <= SPM_LINE_BYTES:
        return [line]
    return re.findall(rf"(?s:.{{1,{SPM_LINE_CHARS}}}(?!\S)|.{{1,{SPM_LINE_CHARS}}})", line)


def train_spm(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """
    Train a SentencePiece model of `vocab_size` tokens: a unigram model that falls back to bytes for
    rare characters. Raises UserError if the text is too small for so many tokens.
    """
    sentencepiece = import_sentencepiece()
    model = io.BytesIO()
    lines = (part for text in texts for line in text.splitlines() if line.strip()
             for part in cut_long_line(line))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=vocab_size, byte_fallback=True,
            character_coverage=0.9995, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, bos_id=-1, eos_id=1, eos_piece=END_OF_TEXT, pad_id=-1,
            unk_id=0, input_sentence_size=2_000_000, shuffle_input_sentence=False,
            num_threads=available_cpus(), minloglevel=2)
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]  # without the place in SentencePiece's source
        raise UserError(f"spm:{vocab_size} cannot be trained on this text ({reason}): choose "
                        "another number, or use bpe:N") from error
    return Tokenizer(f"spm:{vocab_size}", base64.b64encode(model.getvalue()).decode("ascii"))


# -----------------------------------------------------------------------------
# by spec or by file


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, which is a tokenizer.json or a SentencePiece model."""
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()
    if not data.startswith(b"{"):
        return Tokenizer(str(path), base64.b64encode(Path(path).read_bytes()).decode("ascii"))
    try:
        return Tokenizer(str(path), data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer {path} is not UTF-8 text ({error}): name another file, or "
                        "train one with bpe:N") from error


def check_spec(spec: str) -> None:
    """Raise UserError unless `spec` is gpt2, bpe:N, spm:N or an existing file."""
    if not (spec == "gpt2" or re.fullmatch(r"(bpe|spm):\d{1,8}", spec) or Path(spec).is_file()):
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
