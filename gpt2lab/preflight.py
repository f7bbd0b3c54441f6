"""--check: what this machine has, and whether a run could start on it."""

import os
import platform
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from gpt2lab import parallel, shards
from gpt2lab.cli import UserError
from gpt2lab.device import pick_dtype
from gpt2lab.distributed import init_distributed, sum_over_ranks
from gpt2lab.loss import rows_at_once
from gpt2lab.presets import GIB, settings


def estimate(shape, config, device, dtype, world_size):
    """(bytes of memory a process is expected to take, bytes of a checkpoint), roughly."""
    C, L = shape.n_embd, shape.n_layer
    embeddings = (shape.padded_vocab_size + shape.block_size) * C
    parameters = embeddings + L * (12 * C * C + 13 * C) + 2 * C
    state = 16 * parameters  # weights, gradients and AdamW's two moments, in float32
    if config.fsdp:
        state //= world_size
    width = 4 if dtype == torch.float32 else 2
    # some 13 values a token and channel are kept for backward in every layer (17 in Korthikanti et
    # al. 2022, without dropout and scores; 4 are GELU's, which is run again), or only the block's
    # input with --grad_checkpoint
    kept = L + 13 if config.grad_checkpoint else 13 * L
    logits = 3 * min(rows_at_once(device), config.B * config.T) * shape.padded_vocab_size * 4
    return state + config.B * config.T * kept * C * width + logits, 12 * parameters


def free_memory(device):
    """Free memory of a device in bytes, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):  # not Linux
        return None


def describe(device):
    """Lines of "name: value" about this machine."""
    yield "system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    yield "torch", torch.__version__
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        yield "device", (f"{torch.cuda.device_count()} x {properties.name}, "
                         f"{properties.total_memory / GIB:.0f} GiB, sm_{capability[0]}"
                         f"{capability[1]}, CUDA {torch.version.cuda}")
        yield "bfloat16", "yes" if capability >= (8, 0) else "no: float16 with loss scaling"
        yield "flash attention", "yes" if capability >= (8, 0) else "no: a slower kernel"
    else:
        yield "device", f"{device.type}, {os.cpu_count()} CPUs"
    backends = [name for name in ("nccl", "gloo") if getattr(dist, f"is_{name}_available")()]
    yield "talk between processes", ", ".join(backends) or "none"
    compiler = next((c for c in ("g++", "clang++", "cl", "gcc") if shutil.which(c)), None)
    yield "compiler for --compile", os.environ.get("CXX") or compiler or "none: runs uncompiled"


def check(config, shape, check_config):
    """
    Print what this machine has, what `--preset auto` would choose and what the run would take.
    Returns the exit code, the same on every process: 0, or 2 if the run could not start.
    """
    ranks = init_distributed(config.device)
    device, problems = ranks.device, []
    dtype = pick_dtype(config.dtype, device)
    for split in shards.SPLITS:
        try:
            if not shards.open_split(config.data_dir, split):
                problems.append(f"no {split} shards in {config.data_dir}: run python fineweb.py")
        except UserError as error:
            problems.append(str(error))
    for test in (lambda: check_config(config, ranks.ddp_world_size),
                 lambda: parallel.resolve_compile(config, ranks, dtype)):
        try:
            test()
        except UserError as error:
            problems.append(str(error))
    memory, checkpoint = estimate(shape, config, device, dtype, ranks.ddp_world_size)
    free = free_memory(device)
    if free is not None and memory > free:
        problems.append("too little memory: lower --B, or add --grad_checkpoint or --fsdp")
    folder = next(p for p in (Path(config.log_dir).resolve(),
                              *Path(config.log_dir).resolve().parents) if p.exists())
    disk = shutil.disk_usage(folder).free
    if disk < 2 * checkpoint:  # a new one is written before an old one goes
        problems.append(f"too little disk for two checkpoints at {folder}: make room")
    if ranks.master_process:
        for name, value in describe(device):
            print(f"{name}: {value}")
        print("--preset auto: " + ", ".join(f"{k} {v}" for k, v in settings("auto").items()))
        print(f"memory: about {memory / GIB:.1f} GiB a process expected"
              + (f", {free / GIB:.1f} GiB free" if free is not None else ""))
        print(f"disk: a checkpoint is about {checkpoint / GIB:.2f} GiB, {disk / GIB:.1f} GiB free")
    for problem in problems:
        print(f"rank {ranks.ddp_rank}: {problem}", file=sys.stderr)
    bad = sum_over_ranks([bool(problems)], device)[0] > 0
    if ranks.master_process:
        print("the run could not start" if bad else "the run can start")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 2 if bad else 0
