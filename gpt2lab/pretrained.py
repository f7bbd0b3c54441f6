"""
Reads GPT-2 weights in Hugging Face's format, from the hub or a folder, into the GPT of
train_gpt2.py.
"""

import math
import re
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch.overrides import TorchFunctionMode

from gpt2lab.cli import UserError, first_line
from gpt2lab.files import read_json
from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer, byte_level, read_tokenizer

# OpenAI stored these as (in, out), the transpose of nn.Linear
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")
# what a config.json leaves out is as in GPT-2 124M
GPT2_DEFAULTS = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}


class SkipInit(TorchFunctionMode):
    """Modules built in this context keep what their memory holds, instead of random numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def fetch(name_or_dir, file_name):
    """
    Path of one file of a folder or hub repository (downloaded unless cached), None if it has no
    such file. Raises UserError where there is no such repository or no network.
    """
    folder = Path(name_or_dir)
    if folder.exists():
        return folder / file_name if (folder / file_name).is_file() else None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name_or_dir)):
        raise UserError(f"no such file or folder: {name_or_dir}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    try:
        return Path(hf_hub_download(str(name_or_dir), file_name))
    except LocalEntryNotFoundError as error:
        raise UserError(f"{name_or_dir} is no file or folder here, and the hub cannot be reached: "
                        "check the name and the network, or set HF_ENDPOINT to a mirror") from error
    except EntryNotFoundError:
        return None
    except OSError as error:  # no such repository, or not for us
        raise UserError(f"cannot load {name_or_dir} from the hub: {error}") from error


def read_config(name_or_dir):
    """config.json as a dict. Raises UserError unless it describes the model of train_gpt2.py."""
    path = fetch(name_or_dir, "config.json")
    if path is None:
        raise UserError(f"{name_or_dir} is no Hugging Face model: it has no config.json")
    config = GPT2_DEFAULTS | read_json(path, "download it again")
    expected = {"model_type": ("gpt2",), "tie_word_embeddings": (True,),
                "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,), "layer_norm_epsilon": (1e-5,)}
    for key, allowed in expected.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{name_or_dir} is no GPT-2: its {key} is {config[key]!r}, "
                            f"not {allowed[0]!r}")
    for key in GPT2_DEFAULTS:
        if type(config[key]) is not int:
            raise UserError(f"{path} is damaged: {key} is {config[key]!r}, no whole number")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"{name_or_dir} is no GPT-2: its n_inner is {config['n_inner']}, not "
                        f"4 x n_embd = {4 * config['n_embd']}")
    return config


def copy_weights(model, name_or_dir):
    """Fill `model` tensor by tensor, so that two models never stand in memory."""
    params = dict(model.named_parameters())
    missing = set(params)  # the tied matrix counts once, as transformer.wte
    for path in weight_files(name_or_dir):
        for name, tensor in read_tensors(path):
            # OpenAI's own upload has no prefix; the buffers of old causal masks are no weights
            name = "transformer." + name.removeprefix("transformer.")
            tied = name == "transformer.lm_head.weight"
            name = "transformer.wte.weight" if tied else name
            if (param := params.get(name)) is None:
                continue
            tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
            if param.shape != tensor.shape:
                raise UserError(f"{name_or_dir}: {name} has shape {tuple(tensor.shape)}, but "
                                f"config.json says {tuple(param.shape)}")
            # stored under both of its names: once is enough
            if name not in missing and not torch.equal(param.data, tensor.to(param.dtype)):
                raise UserError(f"{name_or_dir} is no GPT-2: its lm_head is untied, another "
                                "matrix than transformer.wte")
            param.data.copy_(tensor)
            missing.discard(name)
    if missing:
        raise UserError(f"{name_or_dir} lacks the tensors {', '.join(sorted(missing))}")


def weight_files(name_or_dir):
    """Paths of the files that hold the weights: one, or those an index lists."""
    path = next((p for name in WEIGHT_FILES if (p := fetch(name_or_dir, name))), None)
    if path is None:
        raise UserError(f"{name_or_dir} has no weights: none of {', '.join(WEIGHT_FILES)}")
    if path.suffix != ".json":
        return [path]
    names = sorted(set(read_json(path, "download it again").get("weight_map", {}).values()))
    paths = [fetch(name_or_dir, name) for name in names]
    if None in paths:
        raise UserError(f"{name_or_dir} lacks {names[paths.index(None)]}: download it again")
    return paths


def read_tensors(path):
    """Yield (name, tensor) over a safetensors file (one in memory at a time) or a torch file."""
    if path.suffix != ".safetensors":
        yield from read_torch_file(path).items()
        return
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as file:
            sizes = {name: math.prod(file.get_slice(name).get_shape())
                     for name in file.keys()}  # noqa: SIM118, it is no dict
        # the file is memory-mapped, and pages once read count as ours until it is closed: so it
        # is opened anew for each tensor, the largest first, while most of the model is untouched
        for name in sorted(sizes, key=sizes.get, reverse=True):
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from error


def read_torch_file(path):
    """The state dict in a pytorch_model.bin. Raises UserError if it is none, or holds code."""
    try:  # files from before torch 1.6 are no zip, and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # torch raises half a dozen kinds
        raise UserError(f"{path} holds no weights, or is damaged ({first_line(error):.100}): download it "
                        "again") from error


def load_tokenizer(name_or_dir):
    """
    The tokenizer of a folder or hub repository: its SentencePiece model, tokenizer.json, or vocab
    and merges; gpt2 where it has none of them. Raises UserError for other kinds.
    """
    for name in ("tokenizer.model", "tokenizer.json"):
        if path := fetch(name_or_dir, name):
            return read_tokenizer(path)
    vocab, merges = fetch(name_or_dir, "vocab.json"), fetch(name_or_dir, "merges.txt")
    if not (vocab and merges):
        return Tokenizer("gpt2")
    from tokenizers import models
    bpe = byte_level(models.BPE.from_file(str(vocab), str(merges)))
    bpe.add_special_tokens([END_OF_TEXT])
    return Tokenizer(str(name_or_dir), bpe.to_str())
