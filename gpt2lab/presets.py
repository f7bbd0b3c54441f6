"""
What suits a machine (B, dtype, compile) and whether a run could start on it. The recipe of a run
never depends on the machine: with another B, more or fewer micro-batches make the same update.
"""

import os

import torch

from gpt2lab.cli import UserError, env_rank
from gpt2lab.device import pick_device

DEMO_DATA, DEMO_TOKENIZER = "demo_data", "bpe:1536"
RUN_PRESETS = {
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
MACHINE_PRESETS = {
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
        return MACHINE_PRESETS[preset]
    device = pick_device()
    if device.type != "cuda":
        return MACHINE_PRESETS[device.type]
    properties = torch.cuda.get_device_properties(device)
    return MACHINE_PRESETS.get(name_gpu(properties.name, properties.total_memory)) or dict(
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
    if B != config.B and env_rank() == 0:
        print(f"B {config.B} does not divide the {sequences} sequences of an update on each "
              f"process: B {B} instead")
    return B


# -----------------------------------------------------------------------------
# --check


