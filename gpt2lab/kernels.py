"""
Faster and leaner layers for a GPT with float32 weights, autocast or not. The results stay the same,
and so do the parameters' names. No target may be -100, F.cross_entropy's ignore_index.

`optimize(model)` swaps three things into the plain model of train_gpt2.py:
- FastLinear for nn.Linear: float32 matmuls by oneDNN where oneDNN beats MKL (x86 CPUs);
- LeanMLP for the MLP: backward recomputes GELU instead of keeping its output;
- chunked_cross_entropy for the loss: the logits never exist all at once.

`kept_casts()` is a context in which a CPU under autocast casts each weight once. `prepack(model)`
prepares a model for inference with several rows at once. `tune_malloc()` keeps freed memory in the
process.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from gpt2lab.cli import env_rank, first_line

# -----------------------------------------------------------------------------
# autocast on a CPU. Autocast casts a weight again in every micro-step, although the weights change
# only once an update, and in the loss and in LeanMLP, which call no operator that autocast knows.
# Casting 124M weights reads and writes 0.75 GB


# {(weight, its dtype under autocast, whether gradients are recorded): the copy}, None outside of
# kept_casts. A copy that was made without recording gradients would pass none on to its weight
casts: dict[tuple[Tensor, torch.dtype, bool], Tensor] | None = None


@contextmanager
def kept_casts() -> Iterator[None]:
    """
    A context in which a CPU under autocast casts each weight once, and in which no weight may
    change. The copies take 2 bytes a weight until the context ends.

    Copies that outlive a change of their weight would need a sign of the change. Tensor._version is
    not one, because fused AdamW and FSDP change weights and leave the version as it is.
    """
    global casts
    outer, casts = casts, {}
    try:
        yield
    finally:
        casts = outer


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight.to(dtype), whose gradient goes to `weight`. In kept_casts it is made only once."""
    if casts is None or weight.dtype == dtype or weight.device.type != "cpu":
        return weight.to(dtype)
    key = (weight, dtype, torch.is_grad_enabled())
    if key not in casts:
        casts[key] = weight.to(dtype)
    return casts[key]


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
    """F.linear(x, weight, bias) by the faster of the two libraries, or under autocast."""
    if not use_onednn(weight):
        # outside of kept_casts, autocast itself keeps its casts until its context ends
        kept = not torch.compiler.is_compiling() and casts is not None
        if kept and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            weight, bias = cast(weight, dtype), None if bias is None else cast(bias, dtype)
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
        x, weight, bias = x.to(dtype), cast(weight, dtype), cast(bias, dtype)
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
SLICE_ROWS = 128  # of a chunk in 16 bits on a CPU, which become float32 at once
CUDA_CHUNK_FACTOR = 8  # larger chunks on CUDA, because each one adds to the whole weight gradient
compile_failures: list[str] = []  # why softmax_gradient could not be compiled, if it could not


def rows_at_once(device: torch.device) -> int:
    """How many rows of logits chunked_cross_entropy makes at once on this device."""
    return CHUNK_ROWS * (CUDA_CHUNK_FACTOR if device.type == "cuda" else 1)


def softmax_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """
    The sum of the cross entropies of the rows of logits (n, V), in nats, float32. The logits are
    overwritten with their gradient. targets: (n) int64.

    Compiled for CUDA, this reads the logits twice and writes them once, and never writes float32
    values of the size of the logits.
    """
    log_probs = F.log_softmax(logits, dim=1, dtype=torch.float32)  # (n, V)
    loss = -log_probs.gather(1, targets[:, None]).sum()
    # d loss / d logits = probabilities, minus 1 at the target. They are not divided by the number
    # of rows yet, because float16 would lose what is much smaller than 1. The compiler fuses this
    # comparison with the rest, and would not fuse a scatter
    is_target = torch.arange(logits.size(1), device=logits.device) == targets[:, None]  # (n, V)
    logits.copy_(log_probs.exp() - is_target.float())
    return loss


def softmax_gradient_uncompiled(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the logits) of softmax_gradient, in fewer passes over memory on a CPU."""
    log_probs = F.log_softmax(logits, dim=1, dtype=torch.float32)  # (n, V)
    loss = -log_probs.gather(1, targets[:, None]).sum()
    gradient = log_probs.exp_()
    gradient.scatter_add_(1, targets[:, None], torch.full_like(gradient[:, :1], -1))
    return loss, gradient.to(logits.dtype)


def softmax_gradient_in_slices(logits: Tensor, targets: Tensor) -> Tensor:
    """
    softmax_gradient for a CPU and 16 bits. A few rows at a time become float32, in two buffers, so
    that no float32 values of the size of the logits are ever in memory.
    """
    loss = torch.zeros((), dtype=torch.float32)
    values = torch.empty(min(SLICE_ROWS, len(logits)), logits.size(1), dtype=torch.float32)
    buffer = torch.empty_like(values)
    for start in range(0, len(logits), SLICE_ROWS):
        part, index = logits[start:start + SLICE_ROWS], targets[start:start + SLICE_ROWS, None]
        log_probs = buffer[:len(part)]
        torch.log_softmax(values[:len(part)].copy_(part), 1, out=log_probs)
        loss -= log_probs.gather(1, index).sum()
        part.copy_(log_probs.exp_().scatter_add_(1, index, values.new_full(index.shape, -1)))
    return loss


def compiles_loss(device: torch.device) -> bool:
    """Whether softmax_gradient is compiled, even if nothing else is. On a CPU that gains nothing"""
    return device.type == "cuda"


@functools.cache
def compiled_softmax_gradient() -> Callable[[Tensor, Tensor], Tensor]:
    """softmax_gradient, to be compiled at its first call for each shape."""
    # a kernel that overwrites its input is slow to autotune, because torch restores the input
    # before each of a few hundred trials
    # fullgraph: after too many shapes, an error instead of silently uncompiled code
    return torch.compile(softmax_gradient, dynamic=False, fullgraph=True,
                         options={"triton.autotune_pointwise": False})


def differentiate(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """
    (loss, gradient of the logits) of softmax_gradient by what is fastest on this device. The logits
    may be overwritten.
    """
    if compiles_loss(logits.device) and not compile_failures:
        try:
            return compiled_softmax_gradient()(logits, targets), logits
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, no Triton, a bug: torch raises many types
            compile_failures.append(first_line(error))
            if env_rank() == 0:
                print(f"warning: the loss is computed uncompiled, which is slower, because "
                      f"compiling failed: {compile_failures[0]:.200}")
    if logits.device.type == "cpu" and logits.dtype != torch.float32:
        return softmax_gradient_in_slices(logits, targets), logits
    return softmax_gradient_uncompiled(logits, targets)


def add_matmul(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta * total + a @ b, for a `total` in float32, and a and b in float32 or 16 bits."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda" and (a.dtype == torch.float16
                                      or torch.cuda.get_device_capability(a.device) >= (8, 0)):
        # the matmul adds in float32, so that no product of the size of `total` is written
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    elif beta:
        total += a @ b
    else:
        total.copy_(a @ b)


def loss_and_gradients(
        x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    (sum of the cross entropies of the rows of x @ weight.T, its gradients for x and weight), for
    x (N, C), weight (V, C) in float32 and targets (N) int64. The matmuls run in the dtype of x.

    The gradients are computed here, while a chunk's logits exist. Backward only multiplies them by
    the incoming gradient, which is one number, because the loss ends the graph.
    """
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    W = cast(weight, x.dtype)  # (V, C)
    chunk = rows_at_once(x.device)
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        chunk_loss, grad = differentiate(fast_linear(x[rows], W), targets[rows])  # (), (n, V)
        loss += chunk_loss
        torch.mm(grad, W, out=grad_x[rows])
        add_matmul(grad_weight, grad.T, x[rows], beta=0 if start == 0 else 1)
        del grad  # before the next chunk's logits are made
    return loss, grad_x, grad_weight


# an operator of its own, because torch.compile would take the loop apart: it made the logits of all
# chunks first, and kept the weight gradients of all chunks for one sum
cross_entropy_op = torch.library.custom_op(
    "gpt2lab::cross_entropy", loss_and_gradients, mutates_args=())


@cross_entropy_op.register_fake
def _(x, weight, targets):
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)


def save_gradients(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep the gradients that cross_entropy_op has computed for cross_entropy_backward."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros of the size of grad_weight would be made
    ctx.save_for_backward(*output[1:])


def cross_entropy_backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and targets, given the gradient of the loss, a scalar."""
    grad_x, grad_weight = ctx.saved_tensors
    # in float32, because CUDA would round grad_loss to the 16 bits of grad_x
    grad_x = grad_x.float().mul_(grad_loss).to(grad_x.dtype)
    return grad_x, grad_weight.mul_(grad_loss), None


cross_entropy_op.register_autograd(cross_entropy_backward, setup_context=save_gradients)


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """
    The mean of F.cross_entropy(x @ weight.T, targets), in nats a token: x (N, C), weight (V, C),
    targets (N) int64. Under autocast the matmuls run in its dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled():
        return cross_entropy_op(x, weight, targets)[0] / len(x)
    loss, W = torch.zeros((), dtype=torch.float32, device=x.device), cast(weight, x.dtype)
    chunk = rows_at_once(x.device)
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        log_probs = F.log_softmax(fast_linear(x[rows], W), dim=1, dtype=torch.float32)  # (n, V)
        loss -= log_probs.gather(1, targets[rows, None]).sum()
    return loss / len(x)


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
