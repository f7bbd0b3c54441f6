"""
Faster and leaner layers for a GPT with float32 weights, autocast or not. The results stay the same,
and so do the parameters' names. No target may be -100, F.cross_entropy's ignore_index.

`optimize(model)` swaps three things into the plain model of train_gpt2.py:
- FastLinear for nn.Linear: float32 matmuls by oneDNN where oneDNN beats MKL (x86 CPUs);
- LeanMLP for the MLP: backward recomputes GELU instead of keeping its output;
- chunked_cross_entropy for the loss: the logits never exist all at once.

`prepack(model)` prepares a model for inference with several rows at once. `tune_malloc()` keeps
freed memory in the process.
"""

import ctypes
import functools
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

# -----------------------------------------------------------------------------
# matmuls by oneDNN. F.linear calls MKL for float32. PyTorch ships oneDNN, too, which was up to a
# quarter faster at 512 rows by GPT-2's large matrices, and up to twice as fast at 1 to 16 rows
# (2 threads, AMD Zen 4)

ONEDNN_MIN_NUMEL = 2**19  # elements of a weight. With smaller weights, oneDNN is slower than MKL


@functools.cache
def have_onednn() -> bool:
    """Whether this is an x86 CPU and PyTorch was built with oneDNN."""
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return x86 and torch.backends.mkldnn.is_available()


def use_onednn(weight: Tensor) -> bool:
    """Whether oneDNN should multiply with this weight: it is large, in float32 and on the CPU."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    if weight.numel() < ONEDNN_MIN_NUMEL:
        return False
    # torch.compile chooses its own kernels, autocast asks for another dtype, and sample.py --safe
    # switches oneDNN off
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return have_onednn() and torch.backends.mkldnn.enabled


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias by oneDNN: x (..., in), weight (out, in), bias (out) or None."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, given the gradient of x @ weight.T + bias."""
    rows = grad.flatten(0, -2)  # (N, out)
    return grad @ weight, rows.T @ x.flatten(0, -2), rows.sum(0)


class OneDNNLinearFunction(torch.autograd.Function):
    """Forward by oneDNN. Backward by MKL, because MKL is as fast at both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = linear_backward(grad, *ctx.saved_tensors)
        return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias) by the faster of the two libraries."""
    if not use_onednn(weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return onednn_linear(x, weight, bias)
    # training has many rows. MKL is then as fast at a layer that does not widen its input
    if weight.size(0) <= weight.size(1):
        return F.linear(x, weight, bias)
    return OneDNNLinearFunction.apply(x, weight, bias)


class FastLinear(nn.Module):
    """An nn.Linear that calls fast_linear. It holds the very parameters of the `linear` given."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # so that tied weights stay tied

    def forward(self, x: Tensor) -> Tensor:
        return fast_linear(x, self.weight, self.bias)


# -----------------------------------------------------------------------------
# an MLP that keeps less for backward


class GELULinearFunction(torch.autograd.Function):
    """
    F.linear(gelu(x), weight, bias) that saves only x for backward and recomputes gelu(x), the
    largest activation of a layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x, approximate="tanh"), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_gelu, grad_weight, grad_bias = linear_backward(
            grad, F.gelu(x, approximate="tanh"), weight)
        grad_x = torch.ops.aten.gelu_backward(grad_gelu, x, approximate="tanh")
        return grad_x, grad_weight, grad_bias


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear(F.gelu(x, approximate="tanh"), weight, bias), saving only x for backward."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return GELULinearFunction.apply(x, weight, bias)


class LeanMLP(nn.Module):
    """The MLP of a Block with the layers of the `mlp` given, by gelu_linear in training."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.c_fc, self.c_proj = mlp.c_fc, mlp.c_proj

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4 C)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return gelu_linear(x, self.c_proj.weight, self.c_proj.bias)
        return self.c_proj(F.gelu(x, approximate="tanh"))  # (B, T, C)


# -----------------------------------------------------------------------------
# cross entropy without holding all logits: 64 x 1024 tokens x 50,304 float32 values are 13 GB. They
# are made a chunk of rows at a time

CHUNK_ROWS = 512  # of 50,304 float32 logits: 103 MB. With fewer rows the matmuls become slow
CUDA_CHUNK_FACTOR = 4  # larger chunks on CUDA, because each one adds to the whole weight gradient


def rows_at_once(device: torch.device) -> int:
    """How many rows of logits chunked_cross_entropy makes at once on this device."""
    return CHUNK_ROWS * (CUDA_CHUNK_FACTOR if device.type == "cuda" else 1)


class ChunkedCrossEntropyFunction(torch.autograd.Function):
    """
    Sum of the cross entropies of the rows of x @ weight.T, in nats.

    The gradients are computed in forward, while a chunk's logits exist. Backward only multiplies
    them by the incoming gradient, which is one number, because the loss ends the graph.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype,
                with_grad: bool) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        W = weight.to(dtype)  # (V, C)
        grad_x: Any = torch.empty_like(x) if with_grad else None
        grad_weight: Any = None
        chunk = rows_at_once(x.device)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            x_rows, y_rows = x[rows].to(dtype), targets[rows, None]  # (n, C), (n, 1)
            log_probs = F.log_softmax(fast_linear(x_rows, W), dim=1, dtype=torch.float32)  # (n, V)
            loss -= log_probs.gather(1, y_rows).sum()
            if with_grad:
                # d loss / d logits = probabilities, minus 1 at the target. They are not divided by
                # the number of rows yet, because float16 would lose what is much smaller than 1
                grad = log_probs.exp_()
                grad.scatter_add_(1, y_rows, torch.full_like(grad[:, :1], -1))
                grad = grad.to(dtype)  # (n, V)
                grad_x[rows] = grad @ W
                if grad_weight is None:
                    grad_weight = (grad.T @ x_rows).to(weight.dtype)
                elif dtype == weight.dtype:
                    grad_weight.addmm_(grad.T, x_rows)
                else:
                    grad_weight += grad.T @ x_rows
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None, None


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """
    The mean of F.cross_entropy(x @ weight.T, targets), in nats a token: x (N, C), weight (V, C),
    targets (N) int64. Under autocast the matmuls run in its dtype.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    with_grad = torch.is_grad_enabled()
    return ChunkedCrossEntropyFunction.apply(x, weight, targets, dtype, with_grad) / len(x)


# -----------------------------------------------------------------------------
# swapping them in


def optimize(model: nn.Module) -> None:
    """
    Swap the layers of this module into a GPT, in place, after model.to(device). Parameters are
    shared, so optimizers and checkpoints do not notice. A second call changes nothing.
    """
    model.linear_cross_entropy = chunked_cross_entropy
    for block in model.transformer.h:
        if not isinstance(block.mlp, LeanMLP):
            block.mlp = LeanMLP(block.mlp)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.device.type == "cpu":
                setattr(parent, name, FastLinear(child))


class PackedLinear(nn.Module):
    """
    A linear layer for inference, whose weight oneDNN has laid out in the order in which it reads
    it. A matmul with 2 to 64 rows is up to one and a half times as fast again.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        # the best layout for 16 rows, because sample.py draws at most 16 samples at once
        self.weight = torch.ops.mkldnn._reorder_linear_weight(original.weight.detach(), 16)
        self.bias = original.bias

    def forward(self, x: Tensor) -> Tensor:
        return onednn_linear(x, self.weight, self.bias)


def prepack(model: nn.Module) -> None:
    """
    Lay out the large matrices of a GPT for inference, in place, where that is faster. The model can
    neither train nor be saved afterwards. lm_head is in memory twice then, because the token
    embedding still reads the plain matrix row by row.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():  # one matrix at a time exists twice
            if isinstance(child, nn.Linear | FastLinear) and use_onednn(child.weight):
                setattr(parent, name, PackedLinear(child))


# -----------------------------------------------------------------------------
# memory


def tune_malloc() -> None:
    """
    Stop glibc from returning freed memory to the kernel, because fetching it back costs page faults
    in every step. Does nothing without glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # M_MMAP_MAX 0: large blocks come from the heap, too. M_TRIM_THRESHOLD: the heap never shrinks.
    # M_TOP_PAD: the heap grows by 256 MB at a time. M_ARENA_MAX: all threads share one heap
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1)):
        mallopt(option, value)
