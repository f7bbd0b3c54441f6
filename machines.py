"""
What suits a machine (B, dtype, compile) and whether a run could start on it. The recipe of a run
never depends on the machine: with another B, more or fewer micro-batches make the same update.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import fineweb
import parallel
from cli import UserError
from devices import init_distributed, pick_device, pick_dtype, sum_over_ranks
from loss import rows_at_once

DEMO_DATA, DEMO_TOKENIZER = "demo_data", "bpe:1536"
RUNS = {
    # two to three minutes on two CPU cores. In so short a time many small updates of a shallow
    # model beat few of a deep one. AdamW would want max_lr 3e-3
    "demo": dict(
        data_dir=DEMO_DATA, n_layer=2, n_head=4, n_embd=128, block_size=64, B=8, T=64,
        total_batch_size=512, max_steps=2_600, optimizer="muon", max_lr=8e-3, min_lr=1.6e-4,
        warmup_steps=80, eval_every=1_300, val_tokens=10_000_000, hellaswag_every=0,
        sample_every=0, sample_prompt="", save_every=1_300, print_every=100, device="cpu",
        dtype="float32"),
}
# the first five are known to run the 124M recipe on one such GPU; the others are careful guesses
MACHINES = {
    "a100-40g": dict(B=48, dtype="bfloat16", compile=True, compile_mode="reduce-overhead"),
    "a100-80g": dict(B=64, dtype="bfloat16", compile=True, compile_mode="reduce-overhead"),
    "5090": dict(B=48, dtype="bfloat16", compile=True, compile_mode="max-autotune"),
    "4090": dict(B=32, dtype="bfloat16", compile=True, compile_mode="max-autotune"),
    "t4": dict(B=8, dtype="float16", compile=False),
    "h100": dict(B=64, dtype="bfloat16", compile=True, compile_mode="reduce-overhead"),
    "mps": dict(B=4, dtype="float32", compile=False),
    "cpu": dict(B=4, dtype="float32", compile=False),
}
GIB = 2**30


def settings(preset):
    """Flags and their values for a machine's name, or for this one with "auto"."""
    if preset != "auto":
        return MACHINES[preset]
    device = pick_device()
    if device.type != "cuda":
        return MACHINES[device.type]
    properties = torch.cuda.get_device_properties(device)
    return MACHINES.get(name_gpu(properties.name, properties.total_memory)) or dict(
        B=max(int(0.8 * properties.total_memory / GIB), 1))  # 64 on 80 GiB, and so on down


def name_gpu(name, total_memory):
    """The key of MACHINES for what CUDA calls a GPU and its memory in bytes, or None."""
    if "A100" in name:
        return "a100-80g" if total_memory > 60 * GIB else "a100-40g"
    words = name.lower().replace("-", " ").split()
    return next((key for key in ("h100", "5090", "4090", "t4") if key in words), None)


def divisors_around(B, sequences):
    """(largest divisor of `sequences` up to B or None, smallest one above B or None)."""
    legal = [n for n in range(1, sequences + 1) if sequences % n == 0]
    return (max((n for n in legal if n <= B), default=None),
            min((n for n in legal if n > B), default=None))


def count_micro_steps(config, world_size):
    """grad_accum_steps of a TrainConfig; raises UserError with numbers that fit if they do not."""
    B, T, total = config.B, config.T, config.total_batch_size
    if total % (B * T * world_size) == 0:
        return total // (B * T * world_size)
    sequences, rest = divmod(total, T * world_size)
    if rest or not sequences:
        near = {max(sequences, 1) * T * world_size, (sequences + 1) * T * world_size}
        raise UserError(f"--total_batch_size {total} is no multiple of T x processes = {T} x "
                        f"{world_size}: the nearest that are: {', '.join(map(str, sorted(near)))}")
    near = [n for n in divisors_around(B, sequences) if n]
    raise UserError(f"B x T x processes = {B} x {T} x {world_size} does not divide "
                    f"total_batch_size {total}: the nearest --B that do: "
                    f"{', '.join(map(str, near))}")


def fit_B(config):
    """The B of a machine's preset, lowered until it divides the update; says so if it was."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    sequences, rest = divmod(config.total_batch_size, max(config.T, 1) * world_size)
    B = config.B if rest or config.B < 1 else divisors_around(config.B, sequences)[0] or config.B
    if B != config.B and os.environ.get("RANK", "0") == "0":
        print(f"B {config.B} does not divide the {sequences} sequences of an update on each "
              f"process: B {B} instead")
    return B


# -----------------------------------------------------------------------------
# --check


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
    processes = init_distributed(config.device)
    device, problems = processes.device, []
    dtype = pick_dtype(config.dtype, device)
    for split in fineweb.SPLITS:
        try:
            if not fineweb.check_shards(config.data_dir, split):
                problems.append(f"no {split} shards in {config.data_dir}: run python fineweb.py")
        except UserError as error:
            problems.append(str(error))
    for test in (lambda: check_config(config, processes.ddp_world_size),
                 lambda: parallel.check_combination(config, processes, dtype)):
        try:
            test()
        except UserError as error:
            problems.append(str(error))
    memory, checkpoint = estimate(shape, config, device, dtype, processes.ddp_world_size)
    free = free_memory(device)
    if free is not None and memory > free:
        problems.append("too little memory: lower --B, or add --grad_checkpoint or --fsdp")
    folder = next(p for p in (Path(config.log_dir).resolve(),
                              *Path(config.log_dir).resolve().parents) if p.exists())
    disk = shutil.disk_usage(folder).free
    if disk < 2 * checkpoint:  # a new one is written before an old one goes
        problems.append(f"too little disk for two checkpoints at {folder}: make room")
    if processes.master_process:
        for name, value in describe(device):
            print(f"{name}: {value}")
        print("--preset auto: " + ", ".join(f"{k} {v}" for k, v in settings("auto").items()))
        print(f"memory: about {memory / GIB:.1f} GiB a process expected"
              + (f", {free / GIB:.1f} GiB free" if free is not None else ""))
        print(f"disk: a checkpoint is about {checkpoint / GIB:.2f} GiB, {disk / GIB:.1f} GiB free")
    for problem in problems:
        print(f"rank {processes.ddp_rank}: {problem}", file=sys.stderr)
    bad = sum_over_ranks([bool(problems)], device)[0] > 0
    if processes.master_process:
        print("the run could not start" if bad else "the run can start")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 2 if bad else 0
