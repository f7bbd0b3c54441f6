"""
Checkpoints of build-nanogpt, nanoGPT and llm.c, in the format of checkpoints.load_checkpoint.

All three repositories train GPT-2 on gpt2's tokens. What their files hold of an optimizer is left
out, so that these checkpoints are starting points, and no run can be resumed from them.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2lab.cli import UserError
from gpt2lab.pretrained import is_plain, strip_wrappers
from gpt2lab.tokenizer import GPT2_VOCAB_SIZE

GPT2_ROWS = (GPT2_VOCAB_SIZE, 50304)  # of an embedding of gpt2's tokens, without and with padding
MAX_SIZE = 1_000_000  # no size of a model is larger
HEADER_INTS = 256  # int32 numbers in front of the weights in a file of llm.c
LLMC_MAGIC = 20240326  # the first of these numbers
LLMC_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "padded_vocab_size")
LLMC_NAME = re.compile(r"model_(\d+)\.bin")
NANOGPT_NOTE = ("note: nanoGPT computes GELU with erf, but GPT-2 and this project with tanh, so "
                "that logits and losses differ a little from nanoGPT's")


class PickledConfig:
    """Stands in for the GPTConfig that build-nanogpt pickles into its checkpoints."""


# torch.load with weights_only accepts a pickled object of these classes, and of no other class
PICKLED_CONFIG_NAMES: list = [(PickledConfig, f"{module}.GPTConfig")
                              for module in ("__main__", "train_gpt2", "model")]


def find_checkpoint(folder: Path) -> Path | None:
    """
    The checkpoint in a log folder of nanoGPT, ckpt.pt, or the newest model_{step}.bin in one of
    llm.c. None if there is neither. Raises UserError if there are both.
    """
    found = [folder / "ckpt.pt"] if (folder / "ckpt.pt").is_file() else []
    models = [(int(match[1]), path) for path in folder.glob("model_*.bin")
              if (match := LLMC_NAME.fullmatch(path.name))]
    if models:
        found.append(max(models)[1])
    if len(found) > 1:
        raise UserError(f"{folder} holds checkpoints of two kinds: name {found[0]} or {found[1]}")
    return found[0] if found else None


# -----------------------------------------------------------------------------
# sizes and shapes


def make_model_config(path: Path, sizes: dict, vocab_size: int, rows: int) -> dict:
    """
    Keywords of GPTConfig for a checkpoint with `rows` rows of the embedding. Raises UserError
    unless its sizes are possible and its tokens are gpt2's.
    """
    config: dict[str, Any] = {
        name: sizes.get(name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    config |= {"vocab_size": vocab_size, "padded_vocab_size": rows}
    for name, size in config.items():
        if type(size) is not int or not 0 < size <= MAX_SIZE:
            raise UserError(f"{path} is damaged, because its {name} is {size!r}, which is not a "
                            "whole number from 1 to 1,000,000: name another checkpoint")
    if rows < vocab_size or config["n_embd"] % config["n_head"]:
        raise UserError(f"{path} is damaged, because its sizes contradict each other ({config}): "
                        "name another checkpoint")
    if vocab_size != GPT2_VOCAB_SIZE:
        raise UserError(
            f"{path} has a vocabulary of {vocab_size} tokens, but only gpt2's 50257 tokens are "
            "known, because such a checkpoint does not hold its tokenizer (nanoGPT's "
            "character-level models are of this kind): make shards from the text with fineweb.py, "
            "and train on them instead")
    return config


def list_arrays(config: dict) -> dict[str, tuple[int, ...]]:
    """
    {name: shape} of the arrays in a model file of llm.c, in their order. An array with {} in its
    name holds the tensors of all layers, one after the other: (n_layer, ...).
    """
    L, C = config["n_layer"], config["n_embd"]
    layer = "transformer.h.{}."
    return {
        "transformer.wte.weight": (config["padded_vocab_size"], C),
        "transformer.wpe.weight": (config["block_size"], C),
        f"{layer}ln_1.weight": (L, C), f"{layer}ln_1.bias": (L, C),
        f"{layer}attn.c_attn.weight": (L, 3 * C, C), f"{layer}attn.c_attn.bias": (L, 3 * C),
        f"{layer}attn.c_proj.weight": (L, C, C), f"{layer}attn.c_proj.bias": (L, C),
        f"{layer}ln_2.weight": (L, C), f"{layer}ln_2.bias": (L, C),
        f"{layer}mlp.c_fc.weight": (L, 4 * C, C), f"{layer}mlp.c_fc.bias": (L, 4 * C),
        f"{layer}mlp.c_proj.weight": (L, C, 4 * C), f"{layer}mlp.c_proj.bias": (L, C),
        "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}


def tensor_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) for each tensor of a GPT, of which lm_head.weight is not one."""
    for name, shape in list_arrays(config).items():
        if "{}" not in name:
            yield name, shape
            continue
        for layer in range(config["n_layer"]):
            yield name.format(layer), shape[1:]


def pack(step: int, weights: dict[str, Tensor], model_config: dict) -> dict:
    """The dict that load_checkpoint returns for a checkpoint with gpt2's tokens."""
    return {"step": step, "model": weights, "model_config": model_config,
            "tokenizer": {"spec": "gpt2", "model": None}}


# -----------------------------------------------------------------------------
# build-nanogpt and nanoGPT


def convert(checkpoint: dict, path: Path) -> dict:
    """
    What torch.load has read of a checkpoint of build-nanogpt or nanoGPT, in the format of
    load_checkpoint. Other dicts are returned as they are. Raises UserError for a checkpoint of
    another architecture or with other tokens.
    """
    if isinstance(checkpoint.get("config"), PickledConfig):  # build-nanogpt
        args, step = vars(checkpoint["config"]), checkpoint.get("step", 0)
    elif "model_args" in checkpoint:  # nanoGPT
        args, step = checkpoint["model_args"], checkpoint.get("iter_num", 0)
    else:
        return checkpoint
    # what both call vocab_size is the number of rows of the embedding, 50304 for gpt2's tokens
    rows = args["vocab_size"]
    vocab_size = GPT2_VOCAB_SIZE if rows in GPT2_ROWS else rows
    model_config = make_model_config(path, args, vocab_size, rows)
    # torch.compile and DDP put prefixes before the names; the buffers are causal masks
    weights = {strip_wrappers(name): tensor for name, tensor in checkpoint["model"].items()
               if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    complete(weights, model_config, path, fill_biases=args.get("bias") is False)
    converted = pack(int(step), weights, model_config)
    return converted | ({"note": NANOGPT_NOTE} if "model_args" in checkpoint else {})


def complete(weights: dict[str, Tensor], model_config: dict, path: Path,
             fill_biases: bool) -> None:
    """
    Add biases of 0 where there are none, if `fill_biases`, and lm_head. Raises UserError unless the
    weights are then those of a GPT of these sizes.
    """
    wte = weights.get("transformer.wte.weight")
    lm_head = weights.setdefault("lm_head.weight", wte)
    missing = set(weights) - {"lm_head.weight"}
    for name, shape in tensor_shapes(model_config):
        if fill_biases and name.endswith(".bias"):
            # nanoGPT's bias=False leaves out the biases of linear layers and LayerNorms. Biases of
            # 0 compute exactly the same, so GPTConfig need not know this option
            weights.setdefault(name, torch.zeros(shape))
        tensor = weights.get(name)
        if not is_plain(tensor) or tuple(tensor.shape) != shape:
            raise UserError(f"{path} is not a GPT-2 of the sizes that it names, because it has no "
                            f"{name} of shape {shape}: name another checkpoint")
        missing.discard(name)
    if missing:
        raise UserError(f"{path} is not a GPT-2, because it has a tensor {min(missing)}: name "
                        "another checkpoint")
    if lm_head is not wte and not torch.equal(lm_head, wte):
        raise UserError(f"{path} is not a GPT-2, because its lm_head differs from its token "
                        "embedding: name another checkpoint")


# -----------------------------------------------------------------------------
# llm.c


def is_llmc(path: Path) -> bool:
    """Whether a file begins as a model file of llm.c does. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return file.read(4) == LLMC_MAGIC.to_bytes(4, "little")


def read_llmc(path: Path) -> dict:
    """
    A model file of llm.c in the format of load_checkpoint: 256 int32 numbers, then the weights, all
    float32 (version 3) or all bfloat16 (version 5). Raises UserError if the file is damaged.

    Each array is memory-mapped by itself, and the largest comes first. checkpoints.copy_weights
    drops what it has copied, so that memory never holds a second copy of the model.
    """
    header = np.fromfile(path, "<i4", HEADER_INTS).tolist()
    if len(header) < HEADER_INTS:
        raise UserError(f"{path} is cut off in its header: copy it again")
    if header[1] not in (3, 5):
        raise UserError(f"{path} is a model file of llm.c of version {header[1]}, but only 3 "
                        "(float32) and 5 (bfloat16) can be read: write it again with a newer llm.c")
    sizes = dict(zip(LLMC_SIZES, header[2:], strict=False))
    config = make_model_config(path, sizes, sizes["vocab_size"], sizes["padded_vocab_size"])
    arrays, offset = [], 4 * HEADER_INTS
    dtype = np.dtype("<f4" if header[1] == 3 else "<i2")  # numpy has no bfloat16
    for name, shape in list_arrays(config).items():
        arrays.append((math.prod(shape), name, shape, offset))
        offset += math.prod(shape) * dtype.itemsize
    if offset != path.stat().st_size:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, but its header asks for "
                        f"{offset:,}, so it is damaged: copy it again")
    weights: dict[str, Tensor] = {}
    for _, name, shape, start in sorted(arrays, reverse=True):
        # mode c: the tensor may be written to, and the file stays as it is
        array = torch.from_numpy(np.memmap(path, dtype, "c", start, shape))
        array = array.view(torch.bfloat16) if header[1] == 5 else array
        if "{}" in name:
            weights |= {name.format(layer): array[layer] for layer in range(config["n_layer"])}
        else:
            weights[name] = array
        if name == "transformer.wte.weight":  # one matrix under two names
            weights["lm_head.weight"] = array
    match = LLMC_NAME.fullmatch(path.name)
    return pack(int(match[1]) if match else 0, weights, config)
