"""
What this machine computes with: the device, the dtype of its matmuls, its peak rate, its memory and
its random seeds. Every script gets the same answer from here.
"""

import gc
import math
import os
import platform
import random
import re
import sys
import warnings
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2lab.cli import UserError, available_cpus, cgroup_folders

# -----------------------------------------------------------------------------
# device and dtype


def set_seed(seed: int, deterministic: bool = False) -> None:
    """
    Seed Python, numpy and torch on all devices. With `deterministic`, torch uses only kernels that
    give the same bits every time.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires this
        torch.use_deterministic_algorithms(True)


def limit_threads(verbose: bool = True) -> None:
    """
    Compute on no more threads than this process has CPUs, unless OMP_NUM_THREADS says how many.
    torch itself counts the CPUs that taskset leaves, but does not know of a container's quota.
    """
    cpus = available_cpus()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cpus:
        torch.set_num_threads(cpus)
        if verbose:
            print(f"computing on {cpus} thread(s), because this process may use {cpus} CPU(s); "
                  "OMP_NUM_THREADS overrides it", file=sys.stderr)


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """
    Whether a GPU of this compute capability (major, minor) runs kernels that were built for an
    `architecture` of torch.cuda.get_arch_list(): sm_86, sm_90a, compute_120.
    """
    parts = re.fullmatch(r"(\w+)_(\d+)(\d)(\w?)", architecture)
    if parts is None:
        return True  # a name of another kind, for example ROCm's gfx942, refuses no run
    kind, major, minor, variant = parts.groups()
    built_for = (int(major), int(minor))
    if kind == "compute":  # PTX, which the driver compiles for every newer architecture
        return built_for <= capability
    if variant == "a":  # machine code that uses what only this architecture has
        return built_for == capability
    return built_for[0] == capability[0] and built_for <= capability


def missing_kernels(device: torch.device) -> str | None:
    """
    A sentence if this torch has no kernels that the device can run, else None. torch.cuda accepts a
    GPU of any architecture, and then the first kernel fails.
    """
    if device.type != "cuda":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says in ten lines what is below
        capability = torch.cuda.get_device_capability(device)
    architectures = torch.cuda.get_arch_list()  # empty if the build does not say
    if not architectures or any(runs_on(each, capability) for each in architectures):
        return None
    return (f"this torch has no kernels for sm_{capability[0]}{capability[1]}, the architecture of "
            f"{torch.cuda.get_device_name(device)}, but for {', '.join(architectures)}: "
            "install another build of torch (docs/machines.md), or add --device cpu")


def pick_device(name: str = "auto", need_kernels: bool = True) -> torch.device:
    """
    The device that a --device flag names, or the best one for "auto". Raises UserError, also if
    torch has no kernels for the device, unless `need_kernels` is False.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"no device {name}: torch sees {count} CUDA devices; use --device auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("no device mps: it takes a Mac with an Apple GPU; use --device auto")
    if (problem := missing_kernels(device)) and need_kernels:
        raise UserError(problem)
    return device


# values of ONEDNN_MAX_CPU_ISA that leave oneDNN an instruction which multiplies bfloat16
BFLOAT16_ISA = re.compile("default|all|.*(bf16|fp16|amx|avx10).*", re.IGNORECASE)


def cpu_bfloat16() -> tuple[bool, str]:
    """
    (whether torch multiplies bfloat16 on this CPU with instructions for it, why, as a sentence). A
    CPU without them emulates bfloat16, which is many times slower than float32.
    """
    emulates = "this CPU has no instructions for it that torch uses"
    if not torch.backends.mkldnn.is_available() or sys.platform == "darwin":
        return False, emulates
    if platform.machine().lower() in ("aarch64", "arm64"):
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported, "this CPU has Arm's BF16 instructions" if supported else emulates
    names = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}  # of torch and of the makers
    found = [name for key, name in names.items() if torch.cpu.get_capabilities().get(key)]
    if not found:
        return False, emulates
    # oneDNN multiplies, and the user may have forbidden torch or oneDNN the instructions
    if not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AVX10")):
        return False, "ATEN_CPU_CAPABILITY rules out this CPU's instructions for it"
    variables = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # oneDNN heeds the first that is set
    name, limit = next(((name, os.environ[name]) for name in variables if os.environ.get(name)),
                       ("", "all"))
    if not BFLOAT16_ISA.fullmatch(limit):
        return False, f"{name}={limit} rules out this CPU's instructions for it"
    return True, f"this CPU has instructions for it ({', '.join(found)})"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """
    The dtype of autocast that a --dtype flag names. "auto" is bfloat16 on GPUs that have it
    (compute capability 8.0) and on CPUs with instructions for it, float16 on other CUDA GPUs and
    float32 elsewhere.
    """
    if name == "auto":
        name = "float32"
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            name = "bfloat16" if capability >= (8, 0) else "float16"
        elif device.type == "cpu" and cpu_bfloat16()[0]:
            name = "bfloat16"
    return getattr(torch, name)


def explain_dtype(name: str, device: torch.device) -> str | None:
    """
    A line on the dtype that a --dtype flag names on a CPU: what "auto" has chosen and why, or a
    warning if bfloat16 is emulated. None if there is nothing to say.
    """
    if device.type != "cpu" or name not in ("auto", "bfloat16"):
        return None
    fast, reason = cpu_bfloat16()
    if name == "auto":
        chosen = "bfloat16" if fast else "float32, not in bfloat16"
        return f"computing in {chosen}, because {reason}"
    if fast:
        return None
    return (f"warning: bfloat16 will be many times slower than float32, because {reason}: use "
            "--dtype float32, unless you want the exact values of bfloat16")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """A context in which matmuls run in `dtype`. float32 needs no autocast."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def attention_of_any_shape(device: torch.device) -> AbstractContextManager:
    """
    A context for sampling and scoring, in which CUDA's attention costs no preparation for a new
    shape. On the newest GPUs torch would choose cuDNN, which makes a plan for every new shape, and
    each sampled token has a new shape. Training has a single shape and keeps torch's choice.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, so that a clock measures all of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def prefetch(batches: Iterator, device: torch.device) -> Generator:
    """Yield the (x, y) of `batches` on `device`. A thread makes the next pair meanwhile."""
    def read() -> list[torch.Tensor]:
        x, y = next(batches)
        # CUDA copies only pinned memory while it computes
        return [x.pin_memory(), y.pin_memory()] if device.type == "cuda" else [x, y]

    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(read)
        while True:
            x, y = upcoming.result()
            upcoming = pool.submit(read)
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


# -----------------------------------------------------------------------------
# model FLOPs utilization (MFU)

# dense 16-bit matmuls with float32 accumulation, in 10^12 operations a second, from NVIDIA's data
# sheets and white papers. Another variant of a card (Laptop, D, Ti, MIG) has another peak
PEAK_TFLOPS = {
    "B200": 2250, "B300 SXM6 AC": 2250, "GB200": 2500, "GB300": 2500,
    "GH200": 989, "H200": 989, "H200 NVL": 835, "H100": 989, "H100 NVL": 835, "H100 PCIe": 756,
    "H800": 989, "H800 PCIe": 756, "H20": 148,
    "A100 SXM4": 312, "A100 PCIe": 312, "A800 SXM4": 312, "A800 PCIe": 312,
    "A40": 150, "A30": 165, "A10": 125, "L40S": 362, "L40": 181, "L20": 119.5, "L4": 121,
    "V100 SXM2": 125, "V100 PCIe": 112, "V100S PCIe": 130, "T4": 65,
    "RTX PRO 6000 Blackwell Workstation Edition": 504, "RTX 6000 Ada Generation": 364,
    "RTX A6000": 155, "RTX 5090": 209.5, "RTX 4090": 165, "RTX 3090": 71,
}
# words of a card's name that do not change its peak: the maker, the series, the memory
NEUTRAL_WORDS = r"NVIDIA|Tesla|GeForce|\d+GB?|HBM3e?"


def find_peak_tflops(device_name: str) -> float | None:
    """The peak of a card by its name in CUDA. None if PEAK_TFLOPS lacks exactly this variant."""
    words = device_name.replace("PCIE", "PCIe").replace("-", " ").split()
    return PEAK_TFLOPS.get(" ".join(w for w in words if not re.fullmatch(NEUTRAL_WORDS, w)))


def flops_per_token(num_parameters: int, config, T: int) -> int:
    """
    Floating-point operations of forward and backward for one token of a sequence of T tokens, for
    the model of a GPTConfig: 6 for each parameter, plus those of attention (Chowdhery et al. 2022).
    The tied matrix counts once, because the embedding lookup does not multiply with it.
    """
    return 6 * num_parameters + 12 * config.n_layer * config.n_embd * T


def model_flops_utilization(
        flops_per_sec: float, device_name: str, world_size: int = 1) -> float | None:
    """The share of the GPUs' peak rate, from 0 to 1. None if the card's peak is not known."""
    peak = find_peak_tflops(device_name)
    return None if peak is None else flops_per_sec / (peak * 1e12 * world_size)


def format_mfu(
        model: torch.nn.Module, T: int, tokens_per_sec: float, dtype: torch.dtype,
        world_size: int) -> str:
    """" | mfu 45.0%" for a GPT on CUDA in 16 bits whose card's peak is known, else ""."""
    device = next(model.parameters()).device
    if device.type != "cuda" or dtype == torch.float32:
        return ""
    flops = flops_per_token(sum(p.numel() for p in model.parameters()), model.config, T)
    mfu = model_flops_utilization(
        tokens_per_sec * flops, torch.cuda.get_device_name(device), world_size)
    return "" if mfu is None else f" | mfu {mfu:.1%}"


# -----------------------------------------------------------------------------
# memory

# both set torch's allocator. If both are set, torch reads the second
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def set_allocator_defaults() -> None:
    """
    Make the memory segments of CUDA expandable, because they leave fewer holes between evaluation
    and training. This must come before CUDA starts. A user's own settings stay. Other systems than
    Linux have no expandable segments, and torch would print a warning.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def free_memory(device: torch.device) -> int | None:
    """Free memory of a device in bytes, None where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):  # not Linux
        return None
    return int(min([free, *map(free_in_cgroup, cgroup_folders("memory"))]))


# files of a control group, versions 2 and 1: limit, usage, and the name in memory.stat of the page
# cache, which counts as usage but is given up for programs
CGROUP_MEMORY = (("memory.max", "memory.current", "inactive_file"),
                 ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


def free_in_cgroup(folder: Path) -> float:
    """Bytes that the processes of a control group may still use, infinite if it has no limit."""
    for limit, usage, cache in CGROUP_MEMORY:
        try:
            limit_bytes, used = (int((folder / name).read_text()) for name in (limit, usage))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such file, or "max", which is no limit
            continue
        return max(limit_bytes - used + int(stat.get(cache, 0)), 0)
    return math.inf


def free_cache(device: torch.device) -> None:
    """Return cached memory to the device, because the next tensors will have other shapes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@contextmanager
def paused_gc() -> Iterator[None]:
    """
    Switch the garbage collector off for a hot loop, because a collection walks all objects and
    comes at arbitrary times.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
