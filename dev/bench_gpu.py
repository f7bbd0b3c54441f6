"""
The benchmark `gpu`: speed, MFU and memory of training GPT-2 124M on a CUDA device, and the losses
of a short run. It needs no network.

    python -m dev.bench gpu

Every contender trains in a process of its own, alone on the device, so that the peak memory is its
own. All of them run the same updates of random tokens through the same loop, training_step of
train_gpt2.py. "plain" is the model as train_gpt2.py defines it, with F.cross_entropy over all
logits. "ours" is the model with the layers and the loss of gpt2lab.kernels.
"""

import itertools
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

import fineweb
import train_gpt2
from dev import check_curve
from gpt2lab import kernels, parallel, presets, runlog
from gpt2lab.cli import UserError
from gpt2lab.device import (
    find_peak_tflops,
    flops_per_token,
    model_flops_utilization,
    pick_device,
    pick_dtype,
    set_allocator_defaults,
    set_seed,
    synchronize,
)
from gpt2lab.distributed import Ranks
from gpt2lab.signals import Signals

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2  # updates that are not timed, because memory has its full size after a whole update

# -----------------------------------------------------------------------------
# the contenders


class Contender(NamedTuple):
    """A way to train."""

    name: str
    optimized: bool  # with the layers and the loss of gpt2lab.kernels
    compile_mode: str | None  # of torch.compile, None for eager


class Workload(NamedTuple):
    """What every contender does."""

    device: str
    model_config: train_gpt2.GPTConfig
    B: int
    T: int = 1024
    micro_steps: int = 8  # of an update
    updates: int = 5  # that are timed


def list_contenders(preset_mode):
    """The Contenders for a machine preset with this compile_mode."""
    contenders = [Contender("plain, eager", False, None),
                  Contender("plain, compiled", False, "default"),
                  Contender("ours, eager", True, None),
                  Contender("ours, compiled", True, "default"),
                  Contender("ours, reduce-overhead", True, "reduce-overhead")]
    if preset_mode == "max-autotune":
        contenders.append(Contender("ours, max-autotune", True, "max-autotune"))
    return contenders


def plain_cross_entropy(x, weight, targets):
    """The mean cross entropy of x (N, C) @ weight.T (C, V), with all logits (N, V) at once."""
    return F.cross_entropy(F.linear(x, weight), targets)


def make_run(contender, workload):
    """(Run, seconds that compiling took, batches without an end) of a contender."""
    ranks = Ranks(pick_device(workload.device))
    device, B, T = ranks.device, workload.B, workload.T
    dtype = pick_dtype("auto", device)
    config = train_gpt2.TrainConfig(
        B=B, T=T, total_batch_size=B * T * workload.micro_steps,
        compile=contender.compile_mode is not None,
        compile_mode=contender.compile_mode or "default")
    set_seed(0)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as in train_gpt2.py
    rows = torch.randint(workload.model_config.vocab_size, (B, T + 1)).to(device)
    batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # (B, T) each
    raw_model = train_gpt2.GPT(workload.model_config).to(device)
    if contender.optimized:
        kernels.optimize(raw_model)
    else:
        raw_model.linear_cross_entropy = plain_cross_entropy
    optimizer = raw_model.configure_optimizers(config.weight_decay, config.max_lr)
    model = train_gpt2.wrap_model(raw_model, config, ranks, config.compile)
    start = time.perf_counter()
    if config.compile:
        model = parallel.compile_or_fall_back(model, raw_model, batch, config, ranks, dtype)
    compile_seconds = time.perf_counter() - start
    run = train_gpt2.Run(
        config=config, ranks=ranks, tokenizer=None, val_loader=None,
        train_loader=types.SimpleNamespace(grad_accum_steps=workload.micro_steps),
        benchmarks=[], raw_model=raw_model, average=None, model=model, optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16), log=None)
    return run, compile_seconds, itertools.repeat(batch)


def measure(contender, workload):
    """
    A dict of plain values for a contender, which runs in this process. None if the device has too
    little memory for the workload.
    """
    set_allocator_defaults()
    try:
        run, compile_seconds, batches = make_run(contender, workload)
        seconds = []
        for step in range(WARM_UP + workload.updates):
            synchronize(run.ranks.device)
            start = time.perf_counter()
            train_gpt2.training_step(run, step, batches, Signals())
            synchronize(run.ranks.device)
            seconds.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        return None
    device, model = run.ranks.device, run.raw_model
    rate = workload.B * workload.T * workload.micro_steps / statistics.median(seconds[WARM_UP:])
    result = {"B": workload.B, "tokens_per_sec": rate, "compile_seconds": compile_seconds,
              "compiled": run.model is not model}
    if device.type == "cuda":
        num_parameters = sum(p.numel() for p in model.parameters())
        flops = flops_per_token(num_parameters, model.config, workload.T)
        result["mfu"] = model_flops_utilization(rate * flops, torch.cuda.get_device_name(device))
        # CUDA graphs keep memory that counts as reserved, and not always as allocated
        result["allocated_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        result["reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    return result


def measure_alone(contender, workload):
    """What `measure` returns, from a process of its own, with the largest B that fits."""
    while True:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(measure, contender, workload).result()
        if result is not None or workload.B == 1:
            return result
        # the same tokens in an update
        workload = workload._replace(B=workload.B // 2, micro_steps=2 * workload.micro_steps)
        print(f"{contender.name}: out of memory, again with B {workload.B}", flush=True)


def format_result(name, result, peer):
    """A line of the table. `peer` is the result of "plain, compiled", or None."""
    if result is None:
        return f"{name:22} out of memory"
    line = f"{name:22} B {result['B']:3d} {result['tokens_per_sec']:9,.0f} tokens/s"
    if peer:
        line += f" {result['tokens_per_sec'] / peer['tokens_per_sec']:5.2f} x plain, compiled"
    if result.get("mfu"):
        line += f" | mfu {result['mfu']:.1%}"
    if "allocated_gb" in result:
        line += f" | {result['allocated_gb']:.1f} GB, {result['reserved_gb']:.1f} GB reserved"
    if result["compiled"]:
        line += f" | compiled in {result['compile_seconds']:.0f} s"
    return line


def bench_contenders(workload, preset_mode):
    """{contender: its result}, a row of a table each. They take their turns alone."""
    results = {}
    for contender in list_contenders(preset_mode):
        results[contender.name] = measure_alone(contender, workload)
        print(f"{contender.name}: done", flush=True)
    for name, result in results.items():
        print(format_result(name, result, results["plain, compiled"]))
    return results


# -----------------------------------------------------------------------------
# losses of a short run

# a fixed text, batch and seed: all devices compute the same losses, but for rounding. The model is
# small, so that a CPU computes them, too
LOSS_FLAGS = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "T": 256, "B": 8,
              "total_batch_size": 4096, "max_steps": 200, "warmup_steps": 20, "max_lr": 2e-3,
              "min_lr": 2e-4, "print_every": 20, "eval_every": 0, "hellaswag_every": 0,
              "sample_every": 0, "save_every": 0, "plot_every": 0}
# losses of the same run in float32 on a CPU, by step
CPU_LOSSES = {0: 7.3615, 20: 5.4192, 40: 5.1721, 60: 4.5617, 80: 4.0880, 100: 3.6802, 120: 3.4253,
              140: 3.3336, 160: 3.1129, 180: 3.0696}


def bench_losses(device, num_words=600_000, **changes):
    """
    Train 200 updates of a small model with train_gpt2.py, in the device's default dtype; returns
    the losses. The text is made up, because it is then the same on every machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(check_curve.make_text(num_words), encoding="utf-8", newline="\n")
        fineweb.prepare([str(text)], Path(folder) / "data", "bpe:1536")
        flags = LOSS_FLAGS | {"data_dir": Path(folder) / "data", "log_dir": Path(folder) / "log",
                              "device": device} | changes
        command = [sys.executable, "train_gpt2.py"]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code != 0:
            print(f"the run ended with exit code {code}")
        _, losses = runlog.read_log(Path(folder) / "log").get("train", ((), ()))
    for step, expected in CPU_LOSSES.items():
        if step < len(losses):
            print(f"loss at step {step}: {losses[step]:.4f}, in float32 on a CPU {expected:.4f}")
    return list(losses)


# -----------------------------------------------------------------------------
# the benchmark


def describe_device(device):
    """The device and the software, a dict of plain values."""
    facts = {"python": platform.python_version(), "torch": torch.__version__,
             "system": platform.platform(), "cpus": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"card": properties.name, "memory_gb": properties.total_memory / 1e9,
                  "capability": f"{properties.major}.{properties.minor}",
                  "cuda": torch.version.cuda, "peak_tflops": find_peak_tflops(properties.name)}
    return facts


def bench_gpu():
    """Tokens a second, MFU and peak memory of GPT-2 124M on this machine's GPU, and 200 losses."""
    device = pick_device()
    if device.type != "cuda":
        raise UserError("the benchmark gpu measures a CUDA device, but torch sees none")
    facts = describe_device(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    preset = presets.preset_flags("auto")
    workload = Workload("cuda", train_gpt2.GPTConfig(), preset["B"])
    print(f"GPT-2 124M, updates of {workload.micro_steps} x {workload.B} x {workload.T} tokens in "
          f"{pick_dtype('auto', device)}", flush=True)
    contenders = bench_contenders(workload, preset.get("compile_mode"))
    print("200 updates of train_gpt2.py", flush=True)
    return {"machine": facts, "contenders": contenders, "losses": bench_losses("cuda")}
