"""
What this machine is: the device, the number type of its matrix products, and the processes that
torchrun started. One answer for every script.
"""

import ctypes
import gc
import os
import random
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from gpt2lab.cli import UserError


def set_seed(seed, deterministic=False):
    """Seed Python, numpy and torch on all devices; `deterministic` excludes kernels that vary."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)


def pick_device(name="auto"):
    """torch.device for a --device flag: the best there is, or the one named. Raises UserError."""
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
    return device


def pick_dtype(name, device):
    """torch dtype of autocast for a --dtype flag; auto takes bfloat16 where the GPU has it."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        name = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    return getattr(torch, name)


def autocast(device, dtype):
    """Context in which matrix products run in `dtype`; float32 needs none."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def synchronize(device):
    """Wait until the device has done all it was given, so that clocks tell the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# dense 16-bit products with float32 sums, 10^12 operations a second, from the makers' data sheets.
# The first entry counts whose words are all part of the card's name
PEAK_TFLOPS = {
    "Laptop": None, "MIG": None,  # part of a card, or a slower one of the same name
    "B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756,
    "H100": 989, "H800": 989, "A100": 312, "A800": 312, "A10": 125, "L40S": 362, "L40": 181,
    "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
}


def flops_per_token(num_parameters, config, T):
    """
    Floating point operations of forward and backward for one token (Chowdhery et al. 2022): 6 for
    each parameter (the tied matrix counts once, it is multiplied with once), and attention over T.
    """
    return 6 * num_parameters + 12 * config.n_layer * config.n_embd * T


def model_flops_utilization(flops_per_sec, device_name, world_size=1):
    """Share of what the GPUs could do at most, 0 to 1; None for a card that is not in the table."""
    words = set(device_name.replace("-", " ").split())
    peaks = [peak for card, peak in PEAK_TFLOPS.items() if words.issuperset(card.split())]
    return flops_per_sec / (peaks[0] * 1e12 * world_size) if peaks and peaks[0] else None


def format_mfu(ranks, dtype, flops_per_sec):
    """The end of a step's line for GPUs whose peak is known, empty elsewhere."""
    if ranks.device.type != "cuda" or dtype == torch.float32:
        return ""
    name = torch.cuda.get_device_name(ranks.device)
    mfu = model_flops_utilization(flops_per_sec, name, ranks.ddp_world_size)
    return "" if mfu is None else f" | mfu {mfu:.1%}"


def free_cache(device):
    """Drop garbage, and give memory that torch keeps back to the device: other shapes need it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@contextmanager
def paused_garbage_collection():
    """No garbage collector in a hot loop: it walks every object there is, at its own times."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def tune_malloc():
    """
    Have the C library keep what is freed: handing large tensors back to the system and having it
    zero them anew, page by page, in every step costs time. Linux with glibc; nothing elsewhere.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt  # glibc's name
    except (OSError, AttributeError):
        return
    # M_MMAP_MAX: no tensor in a mapping of its own; M_TRIM_THRESHOLD: the heap never shrinks;
    # M_TOP_PAD: it grows by 256 MB at a time; M_ARENA_MAX: and there is one of it
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1)):
        mallopt(option, value)
