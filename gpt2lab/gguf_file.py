"""
A GPT as one GGUF file. llama.cpp reads it, and so do Ollama and LM Studio, which are built on
llama.cpp.

The names, the number formats and the metadata are those of llama.cpp's own converter,
convert_hf_to_gguf.py. The package gguf, which is optional, writes the bytes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from gpt2lab.cli import UserError
from gpt2lab.files import write_atomically
from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer, make_byte_level_bpe

# the values of --gguf_type: the package's names for the format of a matrix, and for the whole file
GGUF_TYPES = {"f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"),
              "bf16": ("BF16", "MOSTLY_BF16"), "q8_0": ("Q8_0", "MOSTLY_Q8_0")}
# llama.cpp's kinds of tokens. It finds those that the user has defined before it splits a text, and
# takes control tokens in a text for characters
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
CONTEXT_STEP = 256  # llama.cpp rounds the length of a context up to a multiple of this


class Vocabulary(NamedTuple):
    """A byte-level BPE as a GGUF file stores it."""

    tokens: list[str]  # the spelling of each id, by id
    kinds: list[int]  # NORMAL, CONTROL, USER_DEFINED or UNUSED, by id
    merges: list[str]  # "a b" for each merge, the first one first
    eot: int  # the id of end-of-text


def import_gguf() -> Any:
    """The module gguf, an optional package. Raises UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("--gguf needs the package gguf: pip install gguf") from None
    return gguf


# -----------------------------------------------------------------------------
# the tokenizer


def read_vocabulary(tokenizer: Tokenizer, tokenizer_json: str, probe: str) -> Vocabulary:
    """
    The Vocabulary of a Tokenizer, from the text of its tokenizer.json. Raises UserError, with the
    reason, for a tokenizer that llama.cpp cannot run as a tokenizer of GPT-2, and for one that
    does not encode the text `probe` in the same way.
    """
    import tokenizers
    if reason := find_obstacle(json.loads(tokenizer_json)):
        raise UserError(f"the tokenizer {tokenizer.spec} cannot go into a GGUF file, because "
                        f"{reason}: leave out --gguf, or train with gpt2 or bpe:N")
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    kinds = [UNUSED] * tokenizer.vocab_size
    bpe = tokenizers.Tokenizer.from_str(tokenizer_json)
    for token, i in bpe.get_vocab(with_added_tokens=False).items():
        tokens[i], kinds[i] = token, NORMAL
    for i, added in bpe.get_added_tokens_decoder().items():
        # an added token that swallows spaces is encoded as characters, as special ones are
        as_characters = (added.special or added.lstrip or added.rstrip
                         or added.content == END_OF_TEXT)
        tokens[i], kinds[i] = added.content, CONTROL if as_characters else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge)
              for merge in json.loads(bpe.to_str())["model"]["merges"]]
    vocabulary = Vocabulary(tokens, kinds, merges, tokenizer.eot)
    if make_gpt2_bpe(vocabulary).encode(probe).ids != tokenizer.encode(probe):
        raise UserError(f"the tokenizer {tokenizer.spec} cannot go into a GGUF file, because its "
                        "merges and GPT-2's splitting give other tokens than it does: leave out "
                        "--gguf, or train with gpt2 or bpe:N")
    return vocabulary


def find_obstacle(content: dict) -> str | None:
    """Why llama.cpp cannot run the tokenizer of a tokenizer.json as it runs GPT-2's, or None."""
    model, splitting = content["model"], content.get("pre_tokenizer") or {}
    if model["type"] != "BPE":
        return "llama.cpp runs GPT-2 with a byte-level BPE, which SentencePiece's model is not"
    steps = splitting.get("pretokenizers", [splitting])
    if [(step.get("type"), step.get("use_regex", True)) for step in steps] != [("ByteLevel", True)]:
        return "it does not split text as GPT-2 does"
    if any(model.get(key) for key in ("ignore_merges", "continuing_subword_prefix",
                                      "end_of_word_suffix")):
        return "it does not merge bytes as GPT-2 does"
    if any(added["single_word"] for added in content["added_tokens"]):
        return "one of its added tokens is found between words only"
    if not model["merges"]:
        return "it has no merges, without which llama.cpp reads no file"
    return None


def make_gpt2_bpe(vocabulary: Vocabulary) -> Any:
    """
    A tokenizers.Tokenizer, Hugging Face's class, that follows llama.cpp's rules for GPT-2. It knows
    no added tokens.
    """
    from tokenizers import models
    ids = {token: i for i, (token, kind) in enumerate(zip(
        vocabulary.tokens, vocabulary.kinds, strict=True)) if kind == NORMAL}
    merges: Any = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    return make_byte_level_bpe(models.BPE(ids, merges))


# -----------------------------------------------------------------------------
# the file


def write_gguf(path: Path, weights: dict[str, Tensor], model_config: dict, vocabulary: Vocabulary,
               gguf_type: str, name: str, license: str | None = None) -> None:
    """
    Write a GGUF file, under a temporary name first. Its matrices are converted one at a time, so
    that memory never holds a second model.

    weights, model_config: GPT.state_dict(), and a dict with the fields of GPTConfig.
    gguf_type: a key of GGUF_TYPES. name, license: what the file says about the model.

    Raises UserError for a weight that is not finite in this format, and OSError if the file cannot
    be written; then no file is left.
    """
    gguf = import_gguf()
    tensors = list(list_tensors(weights, model_config, len(vocabulary.tokens), gguf_type))

    def write(file: BinaryIO) -> None:
        writer = gguf.GGUFWriter(file.name, "gpt2")  # opens the temporary file a second time
        try:
            add_metadata(writer, model_config, gguf_type, name, license,
                         sum(tensor.numel() for _, tensor, _ in tensors))
            add_vocabulary(writer, vocabulary)
            for stored_name, tensor, kind in tensors:
                numbers, bytes_ = gguf.GGML_QUANT_SIZES[kind]  # in a block
                writer.add_tensor_info(stored_name, tuple(tensor.shape), None,
                                       tensor.numel() // numbers * bytes_, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for stored_name, tensor, kind in tensors:
                writer.write_tensor_data(convert(stored_name, tensor, kind))
        finally:
            writer.close()

    write_atomically(path, write)


def list_tensors(weights: dict[str, Tensor], model_config: dict, vocab_size: int,
                 gguf_type: str) -> Iterator[tuple[str, Tensor, Any]]:
    """
    Yield (name in the file, tensor, its format) for GPT.state_dict(). The file has no row that pads
    the embedding, and no lm_head, in whose absence llama.cpp takes the embedding.
    """
    gguf = import_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model_config["n_layer"])
    kinds = gguf.GGMLQuantizationType
    for name, tensor in weights.items():
        if name == "lm_head.weight":
            continue
        if name == "transformer.wte.weight":
            tensor = tensor[:vocab_size]
        kind = kinds[GGUF_TYPES[gguf_type][0]]
        if tensor.dim() == 1 or name == "transformer.wpe.weight":
            kind = kinds.F32  # llama.cpp adds these to numbers in float32
        elif tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = kinds.F16  # a row is not a whole number of blocks
        stored_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored_name, f"gguf has no name for {name}"
        yield stored_name, tensor, kind


def convert(name: str, tensor: Tensor, kind: Any) -> Any:
    """
    A tensor as a numpy array in a format of gguf. Raises UserError if a number is not finite, for
    example because it is too large for float16.
    """
    gguf = import_gguf()
    number = tensor.half() if kind == gguf.GGMLQuantizationType.F16 else tensor.float()
    stored = number.bfloat16() if kind == gguf.GGMLQuantizationType.BF16 else number
    if kind == gguf.GGMLQuantizationType.Q8_0:
        stored = (number / 127).half()  # the scale of a block, whose largest integer is 127
    if not stored.isfinite().all():
        raise UserError(f"{name} is not finite in {kind.name}: use --gguf_type f32, or another "
                        "model if that fails too")
    return gguf.quantize(number.numpy(), kind)


def add_metadata(writer: Any, model_config: dict, gguf_type: str, name: str,
                 license: str | None, num_params: int) -> None:
    """Add what a GGUF file says about the model to a gguf.GGUFWriter."""
    gguf = import_gguf()
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(num_params, num_params, 0, 0))
    if license:
        writer.add_license(license)
    writer.add_file_type(gguf.LlamaFileType[GGUF_TYPES[gguf_type][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(model_config["n_layer"])
    writer.add_context_length(model_config["block_size"])
    writer.add_embedding_length(model_config["n_embd"])
    writer.add_feed_forward_length(4 * model_config["n_embd"])
    writer.add_head_count(model_config["n_head"])
    writer.add_layer_norm_eps(1e-5)  # torch's default


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add a Vocabulary to a gguf.GGUFWriter."""
    writer.add_tokenizer_model("gpt2")  # a byte-level BPE
    writer.add_tokenizer_pre("gpt-2")  # the rule that splits a text before bytes are merged
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.eot)
    writer.add_eos_token_id(vocabulary.eot)
    writer.add_add_bos_token(False)  # a prompt begins where it begins


def context_note(block_size: int) -> str | None:
    """A line about the use of a GGUF file if llama.cpp lets its texts become too long, or None."""
    if block_size % CONTEXT_STEP == 0:
        return None
    return (f"note: llama.cpp rounds a context up to a multiple of {CONTEXT_STEP} tokens, but this "
            f"model has {block_size} positions, beyond which llama.cpp ends with a failed "
            "assertion: choose -n so that a prompt and its continuation fit")


# -----------------------------------------------------------------------------
# Ollama


def modelfile_text(file_name: str, block_size: int) -> str:
    """
    The text of an Ollama Modelfile for a GGUF file in the same folder. The prompt reaches the model
    as it is, because a base model knows no chat. The sampling is that of sample.py's default style.
    """
    return f'''FROM ./{file_name}

# the model continues the prompt: it has not been trained to chat
TEMPLATE """{{{{ .Prompt }}}}"""

# the model has no positions beyond this number of tokens
PARAMETER num_ctx {block_size}
# a text that does not end by itself ends here
PARAMETER num_predict {max(1, block_size // 2)}
PARAMETER stop "{END_OF_TEXT}"

PARAMETER temperature 0.9
PARAMETER top_k 100
PARAMETER top_p 0.95
PARAMETER repeat_penalty 1.0
'''
