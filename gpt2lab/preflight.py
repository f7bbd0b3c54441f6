"""--check: what this machine has, what --preset auto would set, and whether a run could start."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend

from gpt2lab.checkpoints import has_room_for_copy, read_model_config
from gpt2lab.cli import UserError, available_cpus
from gpt2lab.device import explain_dtype, free_memory, missing_kernels, pick_dtype
from gpt2lab.distributed import Ranks, init_distributed, leave_distributed, sum_over_ranks
from gpt2lab.kernels import SLICE_ROWS, rows_at_once
from gpt2lab.parallel import resolve_compile
from gpt2lab.presets import (
    DEMO_DATA,
    GIB,
    check_batch_size,
    check_init_from,
    model_sizes,
    preset_flags,
)
from gpt2lab.shards import SPLITS, open_split, read_meta
from gpt2lab.tokenizer import GPT2_VOCAB_SIZE

PROCESS_BYTES = 350_000_000  # of Python and torch in a process that computes in the host's memory


def estimate_memory(
        model_config, config, device: torch.device, dtype: torch.dtype,
        world_size: int) -> tuple[int, int]:
    """
    (bytes of memory that a process will need, bytes of a checkpoint) for a GPTConfig and a
    TrainConfig. docs/machines.md compares it with measured peaks.
    """
    C, L, V = model_config.n_embd, model_config.n_layer, model_config.padded_vocab_size
    embeddings = (V + model_config.block_size) * C
    parameters = embeddings + L * (12 * C * C + 13 * C) + 2 * C
    need = activation_memory(model_config, config, device, dtype)
    need += 4 * V * C  # the loss's gradient of the vocabulary, in float32 until backward ends
    if config.fsdp:
        # each process has a part of the weights and of the two moments, and the whole embeddings
        # from forward to the end of backward. It keeps whole gradients until the last micro-step
        need += 12 * parameters // world_size + 4 * embeddings
        need += 4 * parameters // world_size if config.grad_checkpoint else 4 * parameters
    else:
        need += 16 * parameters  # weights, gradients and AdamW's two moments, in float32
        if dtype != torch.float32:
            need += 2 * L * 12 * C * C  # autocast's copies of the matrices, kept for backward
        if world_size > 1:
            need += 4 * parameters  # the buckets in which DDP sends the gradients
    if config.ema:
        need += 4 * parameters // (world_size if config.fsdp else 1)
    if device.type != "cuda":
        need += PROCESS_BYTES
    return need, (16 if config.ema else 12) * parameters


def activation_memory(
        model_config, config, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of activations and logits at the peak of a micro-step, as for estimate_memory."""
    C, L, V = model_config.n_embd, model_config.n_layer, model_config.padded_vocab_size
    compiled = device.type == "cuda" if config.compile is None else config.compile
    width = 4 if dtype == torch.float32 else 2  # bytes of a value that a matmul reads or writes
    # bytes that a layer keeps for backward, for each token and channel: the residual stream twice,
    # in float32, and what the matmuls read: both normalised copies of it, query, key, value,
    # attention's output, and the 4 values in front of GELU. The 4 values behind GELU are
    # recomputed, but torch.compile keeps them
    stream = 4
    layer = 2 * stream + (1 + 1 + 3 + 1 + 4) * width
    if compiled and not config.fsdp:
        layer += 4 * width
    if device.type == "mps":  # attention in training keeps a matrix of (T, T) for each head
        layer += 4 * model_config.n_head * config.T // C
    kept = L * (stream if config.grad_checkpoint else layer)
    # the peak comes when the loss is computed, or when the last layer's backward runs, where the
    # MLP's gradients in front of GELU and behind it are the largest. With --grad_checkpoint this
    # layer has been recomputed
    after_layers = 3 * stream  # the last LayerNorm, and the loss's input and its gradient
    backward = stream + (1 + 4 + 4) * width + (layer if config.grad_checkpoint else 0)
    tokens = config.B * config.T
    rows = min(rows_at_once(device), tokens)
    logits = rows * V * (width if device.type == "cuda" else 8)
    vocabulary = 0 if dtype == torch.float32 else V * C * width  # its copy in 16 bits
    kept_copy = 0
    if vocabulary and device.type == "cpu":
        kept_copy = vocabulary  # by kept_casts, until the update ends
        # the logits in 16 bits, and their float32 values or a chunk's gradient of the vocabulary
        logits = rows * V * width + max(min(SLICE_ROWS, rows) * V * (8 + width), vocabulary)
    at_the_loss = tokens * C * (kept + after_layers) + logits + vocabulary
    return max(at_the_loss, tokens * C * (kept + backward) + kept_copy)


# torch's kernels for attention
ATTENTIONS = {SDPBackend.FLASH_ATTENTION: "flash attention", SDPBackend.CUDNN_ATTENTION: "cuDNN's",
              SDPBackend.EFFICIENT_ATTENTION: "memory-efficient, slower than flash attention",
              SDPBackend.MATH: "matmuls, slower than flash attention, in more memory"}


def attention_in_training(device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that torch chooses for the attention of a model in training, in words."""
    # heads of 64 channels, which is GPT-2's size. Nothing is computed with this tensor
    try:
        q = torch.empty(1, 1, 128, 64, dtype=dtype, device=device, requires_grad=True)
    except RuntimeError:  # other processes hold all memory of the GPU
        return "not known, because no memory of the GPU is free"
    choice = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
    return ATTENTIONS.get(choice, choice.name)


def machine_facts(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """Yield (name, value) pairs that describe this machine. `dtype` is that of autocast."""
    yield "system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    yield "torch", torch.__version__
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        yield "device", (f"{torch.cuda.device_count()} x {properties.name}, "
                         f"{properties.total_memory / GIB:.0f} GiB, sm_{capability[0]}"
                         f"{capability[1]}, CUDA {torch.version.cuda}")
        yield "bfloat16", "yes" if capability >= (8, 0) else "no: float16 with loss scaling"
        yield "attention", attention_in_training(device, dtype)
    else:
        yield "device", f"{device.type}, {available_cpus()} of {os.cpu_count()} CPUs"
    backends = [name for name in ("nccl", "gloo") if getattr(dist, f"is_{name}_available")()]
    yield "distributed backends", ", ".join(backends) or "none"
    compiler = next((c for c in ("g++", "clang++", "cl", "gcc") if shutil.which(c)), None)
    yield "compiler for --compile", os.environ.get("CXX") or compiler or "none: runs uncompiled"


def find_problems(
        config, config_class: type, preset: str | None, ranks: Ranks,
        dtype: torch.dtype) -> tuple[Any, list[str]]:
    """
    (the GPTConfig of the model, what would stop a run of this TrainConfig before its first update,
    a sentence each). `config_class` is GPTConfig.
    """
    problems: list[str] = []
    makes_data = preset == "demo" and config.data_dir == DEMO_DATA  # the demo makes its own data
    vocab_size = GPT2_VOCAB_SIZE
    model_config = config_class(**model_sizes(config))

    def note_error(check: Callable, *args: Any) -> None:
        try:
            check(*args)
        except UserError as error:
            problems.append(str(error))

    def read_vocab_size() -> None:
        nonlocal vocab_size
        vocab_size = read_meta(config.data_dir)["vocab_size"]

    def read_model_sizes() -> None:
        nonlocal model_config
        if config.init_from:
            model_config = config_class(**read_model_config(config.init_from))
            check_init_from(config, model_config, vocab_size)
        else:
            model_config = config_class(**model_sizes(config, vocab_size))

    if not makes_data or Path(DEMO_DATA).exists():
        for split in SPLITS:
            note_error(open_split, config.data_dir, split)
        note_error(read_vocab_size)
    note_error(read_model_sizes)
    if config.resume not in (None, "newest") and not Path(config.resume).exists():
        problems.append(f"{config.resume} is not a checkpoint: name a model_*.pt file")
    note_error(check_batch_size, config.B, config.T, config.total_batch_size, ranks.ddp_world_size)
    note_error(resolve_compile, config, ranks, dtype)
    return model_config, problems


def describe_saving(copy: int, training: int) -> str:
    """
    The line that says where a checkpoint's copy of `copy` bytes finds memory, on a host of whose
    memory a process needs `training` bytes to train.
    """
    free = free_memory(torch.device("cpu"))
    if has_room_for_copy(None if free is None else free - training, copy):
        return (f"saving: {copy / GIB:.2f} GiB of the host's memory hold a copy of the state on "
                "the first process, so that training goes on while a checkpoint is written")
    return (f"saving: training pauses while a checkpoint is written, because {copy / GIB:.2f} GiB "
            "of the host's memory for a copy of the state are not free")


def report_preflight(config, config_class: type, preset: str | None = None) -> int:
    """
    Print what this machine has, what `--preset auto` would choose, and the memory and disk that a
    run of this TrainConfig needs, which comes from a command line with `preset`. Returns the exit
    code, the same on every rank: 0, or 2 if the run could not start. `config_class` is GPTConfig.
    """
    ranks = init_distributed(config.device, need_kernels=False)
    device = ranks.device
    dtype = pick_dtype(config.dtype, device)
    model_config, problems = find_problems(config, config_class, preset, ranks, dtype)
    memory, checkpoint = estimate_memory(model_config, config, device, dtype, ranks.ddp_world_size)
    if missing := missing_kernels(device):
        problems.append(missing)
    free = free_memory(device)
    if free is not None and memory > free:
        problems.append("too little memory: lower --B, or add --grad_checkpoint or --fsdp")
    log_dir = Path(config.log_dir).resolve()
    folder = next(path for path in (log_dir, *log_dir.parents) if path.exists())
    disk = shutil.disk_usage(folder).free
    if disk < 2 * checkpoint:  # a new checkpoint is written before an old one is deleted
        problems.append(f"too little disk for two checkpoints at {folder}: make room")
    for name, value in machine_facts(device, dtype):
        ranks.print0(f"{name}: {value}")
    if line := explain_dtype(config.dtype, device):
        ranks.print0(line)
    flags = ", ".join(f"{name} {value}" for name, value in preset_flags("auto").items())
    ranks.print0(f"--preset auto: {flags}")
    ranks.print0(f"memory: about {memory / GIB:.1f} GiB a process expected"
                 + (f", {free / GIB:.1f} GiB free" if free is not None else ""))
    ranks.print0(describe_saving(checkpoint, memory if device.type != "cuda" else 0))
    ranks.print0(f"disk: a checkpoint is about {checkpoint / GIB:.2f} GiB, "
                 f"{disk / GIB:.1f} GiB free")
    for problem in problems:
        print(f"rank {ranks.ddp_rank}: {problem}", file=sys.stderr)
    could_not_start = sum_over_ranks([bool(problems)], device)[0] > 0
    ranks.print0("the run could not start" if could_not_start else "the run can start")
    leave_distributed()
    return 2 if could_not_start else 0
