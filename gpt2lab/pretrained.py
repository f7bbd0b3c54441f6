"""
Weights and tokenizers in Hugging Face's format, read from the hub or from a folder into the GPT of
train_gpt2.py.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard
from zipfile import is_zipfile

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpt2lab.cli import UserError, first_line
from gpt2lab.files import read_json
from gpt2lab.tokenizer import (
    END_OF_TEXT,
    GPT2_VOCAB_SIZE,
    Tokenizer,
    make_byte_level_bpe,
    read_tokenizer,
)

# OpenAI stored these weights as (in, out), the transpose of nn.Linear's
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")
# endings of the files that are read from a Hugging Face folder
FILE_ENDINGS = (".json", ".safetensors", ".bin", ".txt", ".model")
# names that torch.compile, DDP and FSDP put into the names of tensors
WRAPPERS = {"_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module",
            "_checkpoint_wrapped_module"}
# a config.json may leave out values that are the same as in GPT-2 124M
GPT2_DEFAULTS = {"n_positions": 1024, "vocab_size": 50257,
                 "n_layer": 12, "n_head": 12, "n_embd": 768}
MAX_PADDED_VOCAB_SIZE = 51_200  # gpt2's, rounded up to a multiple of 1,024
# what a config.json may say about the architecture; train_gpt2.py implements nothing else
SUPPORTED = {"model_type": ("gpt2",), "tie_word_embeddings": (True,),
             "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "add_cross_attention": (False,), "layer_norm_epsilon": (1e-5,)}


class SkipInit(TorchFunctionMode):
    """
    A context in which modules are built without initialising their weights: the functions of
    torch.nn.init do nothing, so that no time is spent on numbers that are overwritten.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def fetch(name_or_dir: str | Path, file_name: str) -> Path | None:
    """
    Path of one file of a folder or of a hub repository, from which it is downloaded unless cached.
    None if the folder or repository has no such file. Raises UserError if there is no such
    repository or no network.
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
        raise UserError(f"{name_or_dir} is not a file or folder here, and the hub cannot be "
                        "reached: check the name and the network, or set HF_ENDPOINT to a "
                        "mirror") from error
    except EntryNotFoundError:
        return None
    except OSError as error:  # no such repository, or a private one
        raise UserError(f"cannot load {name_or_dir} from the hub: {error}") from error


def read_config(name_or_dir: str | Path) -> dict:
    """
    The config.json of a folder or hub repository, completed by GPT2_DEFAULTS. Raises UserError
    unless it describes a model that train_gpt2.py can build.
    """
    path = fetch(name_or_dir, "config.json")
    if path is None:
        raise UserError(f"{name_or_dir} is not a Hugging Face model: it has no config.json")
    config = GPT2_DEFAULTS | read_json(path, "download it again")
    for key, allowed in SUPPORTED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{name_or_dir} is not a GPT-2: its {key} is {config[key]!r}, "
                            f"not {allowed[0]!r}")
    for key in GPT2_DEFAULTS:
        if type(config[key]) is not int or not 0 < config[key] <= 1_000_000:
            raise UserError(f"{path} is damaged, because {key} is {config[key]!r}, which is not a "
                            "whole number from 1 to 1,000,000: download it again")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"{name_or_dir} is not a GPT-2: its n_inner is {config['n_inner']}, not "
                        f"4 x n_embd = {4 * config['n_embd']}")
    return config


def read_model_config(name_or_dir: str | Path) -> dict:
    """Keywords of GPTConfig for the model of a folder or hub repository. Raises UserError."""
    config = read_config(name_or_dir)
    sizes = {name: config[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return {**sizes, "block_size": config["n_positions"],
            "padded_vocab_size": config["vocab_size"]}  # as stored


# -----------------------------------------------------------------------------
# weights


def copy_weights(model: nn.Module, name_or_dir: str | Path) -> None:
    """
    Copy the weights of a folder or hub repository into a GPT, tensor by tensor, so that memory
    never holds a second copy of the model. Raises UserError for weights that do not fit the model.
    """
    params = dict(model.named_parameters())
    missing = set(params)
    for path in find_weight_files(name_or_dir):
        for stored_name, tensor in read_tensors(path):
            name = parameter_name(stored_name)
            if name not in params:
                continue  # a buffer, such as the causal mask that older files hold
            if not is_plain(tensor):
                raise UserError(f"{name_or_dir}: {name} does not hold plain floating-point numbers "
                                f"but {tensor.dtype}: name a model that is not quantized")
            if name.endswith(TRANSPOSED):
                tensor = tensor.mT if tensor.dim() == 2 else tensor
            param = params[name].data
            if param.shape != tensor.shape:
                raise UserError(f"{name_or_dir}: {name} has shape {tuple(tensor.shape)}, but "
                                f"config.json says {tuple(param.shape)}")
            # wte may be stored twice, the second time as lm_head: both must be equal
            if name not in missing and not torch.equal(param, tensor.to(param.dtype)):
                raise UserError(f"{name_or_dir} is not a GPT-2: its lm_head is untied, because it "
                                "differs from transformer.wte")
            param.copy_(tensor)
            missing.discard(name)
    if missing:
        raise UserError(f"{name_or_dir} lacks the tensors {', '.join(sorted(missing)[:3])} and "
                        f"others, {len(missing)} in all: download it again")


def is_plain(tensor: Any) -> TypeGuard[Tensor]:
    """
    Whether this is a tensor of floating-point numbers that are all stored. It is not if it is
    sparse, or if it repeats a few numbers, with which a small file could fill the memory.
    """
    return (isinstance(tensor, Tensor) and tensor.is_floating_point()
            and tensor.layout == torch.strided and not tensor.is_meta
            and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size())


def load_failure(error: Exception) -> str:
    """Why torch.load with weights_only has refused a file, in at most 100 characters."""
    # torch names the class or function that it has not called
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds {found[1]:.60}, which may run code"
    return f"{first_line(error):.100}"


def parameter_name(stored_name: str) -> str:
    """The name in GPT of a tensor that is stored with or without prefixes."""
    name = strip_wrappers(stored_name)
    name = name.removeprefix("transformer.")  # OpenAI's own upload has no prefix
    if name == "lm_head.weight":
        name = "wte.weight"  # one matrix under two names
    return f"transformer.{name}"


def strip_wrappers(name: str) -> str:
    """The name of a tensor in the plain model, without the WRAPPERS that it was saved in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def find_weight_files(name_or_dir: str | Path) -> list[Path]:
    """Paths of the files that hold the weights: a single file, or all that an index lists."""
    found = (fetch(name_or_dir, name) for name in WEIGHT_FILES)
    path = next((path for path in found if path), None)
    if path is None:
        raise UserError(f"{name_or_dir} has no weights: none of {', '.join(WEIGHT_FILES)}")
    if path.suffix != ".json":
        return [path]
    weight_map = read_json(path, "download it again").get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    # the weights lie beside the index: a name must not lead elsewhere
    if not all(isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name) for name in names):
        raise UserError(f"{path} must name the files beside it that hold the tensors: download it "
                        "again")
    paths = []
    for name in sorted(set(names)):
        path = fetch(name_or_dir, name)
        if path is None:
            raise UserError(f"{name_or_dir} lacks {name}: download it again")
        paths.append(path)
    return paths


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for a safetensors file, one tensor in memory at a time, or a .bin."""
    if path.suffix != ".safetensors":
        yield from read_torch_file(path).items()
        return
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as file:
            sizes = {name: math.prod(file.get_slice(name).get_shape())
                     for name in file.keys()}  # noqa: SIM118, because file is not a dict
        # the file is memory-mapped, and pages once read count as our memory until it is closed: so
        # open it again for each tensor. The largest tensors come first, while most of the model's
        # own memory has not been touched yet
        for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from error


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The state dict in a pytorch_model.bin. Raises UserError if it holds code or is damaged."""
    try:
        # files from before torch 1.6 are not zip files, and torch cannot map them
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        return {str(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # torch raises many types for a file that it cannot load
        raise UserError(f"{path} holds no weights, or is damaged ({load_failure(error)}): "
                        "download it again") from error


# -----------------------------------------------------------------------------
# the tokenizer


def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """
    The tokenizer of a folder or hub repository: its SentencePiece model, its tokenizer.json, or its
    vocab.json and merges.txt; gpt2 if it has none of these files. Raises UserError for other kinds.
    """
    for name in ("tokenizer.model", "tokenizer.json"):
        if path := fetch(name_or_dir, name):
            return read_tokenizer(path)
    vocab, merges = fetch(name_or_dir, "vocab.json"), fetch(name_or_dir, "merges.txt")
    if not (vocab and merges):
        if vocab or merges:
            raise UserError(f"{name_or_dir} has only one of vocab.json and merges.txt: put the "
                            "other one into the folder, or its tokenizer.json")
        size = read_config(name_or_dir)["vocab_size"]
        if not GPT2_VOCAB_SIZE <= size <= MAX_PADDED_VOCAB_SIZE:
            raise UserError(f"{name_or_dir} has no tokenizer, and gpt2's does not fit its "
                            f"vocabulary of {size} tokens: put its tokenizer.json into the folder")
        return Tokenizer("gpt2")
    from tokenizers import models
    try:
        bpe = make_byte_level_bpe(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # tokenizers raises plain Exceptions
        raise UserError(f"{vocab} or {merges.name} is damaged ({error}): download them again"
                        ) from error
    bpe.add_special_tokens([END_OF_TEXT])
    return Tokenizer(str(name_or_dir), bpe.to_str())
