"""
Tokenizers: OpenAI's gpt2, a byte-level BPE (bpe:N) or SentencePiece (spm:N) trained on the text at
hand, or one from a file. To the rest of the project they are all one class.
"""

import base64
import codecs
import functools
import io
import itertools
import os
import re
from pathlib import Path

import numpy as np

from gpt2lab.cli import UserError

END_OF_TEXT = "<|endoftext|>"
# GPT-2's rule for cutting text into words. It finds the words that OpenAI's spelling of it finds;
# what needs no look ahead is one group here, which the regex engine takes in one go: 1.6 x as fast
GPT2_PATTERN = (r"(?: ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+)"
                r"|\s++$|\s+(?!\S)|\s")


class Tokenizer:
    """
    Text to token ids and back, the same way for every kind of tokenizer.

    spec: "gpt2", "bpe:N", "spm:N" or the path of a trained one. model: what was trained, as text:
    for spm a SentencePiece model in base64, otherwise a Hugging Face tokenizer.json with a
    byte-level BPE; None for gpt2. `vocab_size` counts all ids, `eot` is end-of-text. Encoding never
    produces `eot`: the literal "<|endoftext|>" in a text is text.
    """

    def __init__(self, spec, model=None):
        self.spec, self.model = spec, model
        if model is None:
            self._encode_batch, self._decode_bytes, self.vocab_size, self.eot = load_gpt2()
        elif model.startswith("{"):
            self._encode_batch, self._decode_bytes, self.vocab_size, self.eot = load_bpe(model)
        else:
            self._encode_batch, self._decode_bytes, self.vocab_size, self.eot = load_spm(model)
        if self.eot is None:
            raise UserError(f"tokenizer {spec} has no {END_OF_TEXT} token: train one with bpe:N")

    def encode_batch(self, texts):
        """Token ids of each text, as a list of 1-D uint32 arrays."""
        return self._encode_batch(texts)

    def encode(self, text):
        """Token ids of one text, as a list of ints."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # terminals can send others
        return self._encode_batch([text])[0].tolist()

    def decode_bytes(self, ids):
        """The UTF-8 bytes behind the ids; they may end inside a character."""
        return self._decode_bytes([int(i) for i in ids])

    def decode(self, ids):
        """Text behind the ids: bad UTF-8 becomes U+FFFD, half a character at the end nothing."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return decoder.decode(self.decode_bytes(ids))

    def state(self):
        """Plain values from which `Tokenizer(**state)` is rebuilt; stored in checkpoints."""
        return {"spec": self.spec, "model": self.model}


@functools.cache  # parsing the merges takes a third of a second
def load_gpt2():
    """GPT-2's own tokenizer: (encode_batch, decode_bytes, vocab_size, eot)."""
    import requests
    import tiktoken
    from tiktoken_ext import openai_public
    try:
        ranks = openai_public.gpt2()["mergeable_ranks"]
    except (requests.RequestException, OSError):
        ranks = fetch_gpt2_from_hub()
    gpt2 = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: 50256}, explicit_n_vocab=50257)

    def encode_batch(texts):
        joined = END_OF_TEXT.join(texts)
        if joined.count(END_OF_TEXT) != len(texts) - 1:  # nothing is special in data
            return [gpt2.encode_to_numpy(text, disallowed_special=()) for text in texts]
        # one call for all: between calls a thread waits until Python's lock is free
        ids = gpt2.encode_to_numpy(joined, allowed_special="all")
        starts = [0, *(np.flatnonzero(ids == gpt2.eot_token) + 1), len(ids) + 1]
        return [ids[a:b - 1] for a, b in itertools.pairwise(starts)]

    return encode_batch, gpt2.decode_bytes, gpt2.n_vocab, gpt2.eot_token


def fetch_gpt2_from_hub():
    """gpt2's {token bytes: id} from the hub's copy of its files, which HF_ENDPOINT may mirror."""
    from huggingface_hub import hf_hub_download
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    try:
        merges, vocab = (hf_hub_download("openai-community/gpt2", name)
                         for name in ("merges.txt", "vocab.json"))
        return data_gym_to_mergeable_bpe_ranks(  # raises ValueError for other contents
            merges, vocab, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
    except (OSError, ValueError) as error:
        raise UserError(
            "cannot download the gpt2 tokenizer: where there is a network, set TIKTOKEN_CACHE_DIR "
            "to a folder and run python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"; "
            "bring the folder here and set TIKTOKEN_CACHE_DIR to it, or set HF_ENDPOINT to a "
            f"mirror of the hub ({type(error).__name__})") from error


def byte_spelling():
    """{byte: the printable character that spells it} in the vocabulary of a byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = sorted(set(range(256)) - set(printable))  # spelled chr(256), chr(257), ...
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(unprintable)}


def load_bpe(tokenizer_json):
    """A byte-level BPE from the text of a tokenizer.json, as load_gpt2 returns it."""
    import tokenizers
    try:
        bpe = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"this is no tokenizer.json of Hugging Face tokenizers: {error}") from error
    if '"ByteLevel"' not in tokenizer_json:
        raise UserError("only byte-level BPE tokenizers are supported: train one with bpe:N")
    bpe.encode_special_tokens = True  # special tokens in a text are text
    byte_of = {char: byte for byte, char in byte_spelling().items()}
    table = {}
    for token, i in bpe.get_vocab().items():
        spelled = token != END_OF_TEXT and all(char in byte_of for char in token)
        table[i] = bytes(byte_of[char] for char in token) if spelled else token.encode("utf-8")

    def encode_batch(texts):
        encodings = bpe.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode_bytes(ids):
        return b"".join(table[i] for i in ids)

    return encode_batch, decode_bytes, bpe.get_vocab_size(), bpe.token_to_id(END_OF_TEXT)


def load_spm(model):
    """A SentencePiece model from base64, as load_gpt2 returns it."""
    spm = import_sentencepiece().SentencePieceProcessor(model_proto=base64.b64decode(model))
    eot = spm.piece_to_id(END_OF_TEXT)

    def piece_bytes(i):
        piece = spm.id_to_piece(i)
        if spm.is_byte(i):  # spelled <0x0A>
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode("utf-8")

    def encode_batch(texts):
        return [np.array(spm.encode(text), dtype=np.uint32) for text in texts]

    def decode_bytes(ids):
        return b"".join(map(piece_bytes, ids))

    return encode_batch, decode_bytes, len(spm), eot if eot != spm.unk_id() else None


def import_sentencepiece():
    """The optional package behind spm:N."""
    try:
        import sentencepiece
    except ImportError:
        raise UserError("spm tokenizers need the package sentencepiece: pip install sentencepiece, "
                        "or use bpe:N") from None
    return sentencepiece


def byte_level(model):
    """A Hugging Face tokenizer that splits text as GPT-2 does, around a tokenizers.models.BPE."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, pre_tokenizers
    bpe = HFTokenizer(model)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def train_bpe(texts, vocab_size):
    """Train a byte-level BPE of `vocab_size` tokens with GPT-2's splitting rule, eot last."""
    if vocab_size < 257:
        raise UserError(f"bpe:{vocab_size} is too small: 256 bytes and end-of-text need bpe:257")
    from tokenizers import models, pre_tokenizers, trainers
    bpe = byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens([END_OF_TEXT])
    return Tokenizer(f"bpe:{vocab_size}", bpe.to_str())


def train_spm(texts, vocab_size):
    """Train a SentencePiece model (unigram, bytes for rare characters) of `vocab_size` tokens."""
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
        raise UserError(f"spm:{vocab_size} cannot be trained on this text: {error}") from error
    return Tokenizer(f"spm:{vocab_size}", base64.b64encode(model.getvalue()).decode("ascii"))


def read_tokenizer(path):
    """The tokenizer in a file: a tokenizer.json or a SentencePiece .model."""
    data = Path(path).read_bytes()
    text = data.decode("utf-8") if data.lstrip()[:1] == b"{" else base64.b64encode(data).decode()
    return Tokenizer(str(path), text)


def check_spec(spec):
    """Raise UserError unless `spec` is gpt2, bpe:N, spm:N or an existing file."""
    if not (spec == "gpt2" or re.fullmatch(r"(bpe|spm):\d+", spec) or Path(spec).is_file()):
        raise UserError(f"unknown tokenizer {spec!r}: use gpt2, bpe:N (for example bpe:8192), "
                        "spm:N or the path of a trained one")


def make_tokenizer(spec, sample):
    """The tokenizer of a spec; `sample()` gives texts to train on where it has to be trained."""
    if spec == "gpt2":
        return Tokenizer(spec)
    if Path(spec).is_file():
        return read_tokenizer(spec)
    kind, vocab_size = spec.split(":")
    print(f"training the tokenizer {spec}")
    return (train_bpe if kind == "bpe" else train_spm)(sample(), int(vocab_size))
