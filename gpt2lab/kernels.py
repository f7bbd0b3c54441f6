"""
Linear layers: by the faster of PyTorch's two libraries on x86 CPUs, and one that keeps less.

F.linear calls MKL for float32. oneDNN, which PyTorch ships as well, was up to a quarter faster at
512 rows by GPT-2's large matrices and up to twice as fast at 1 to 16 (2 threads, AMD Zen 4).
"""

import functools

import torch
import torch.nn as nn
from torch.nn import functional as F

ONEDNN_MIN_NUMEL = 2**19  # elements of a weight: with smaller ones oneDNN loses


@functools.cache
def have_onednn():
    """Whether this is an x86 CPU, and a PyTorch with oneDNN."""
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return x86 and torch.backends.mkldnn.is_available()


def use_onednn(weight):
    """Whether a product with this weight is one for oneDNN: float32, on the CPU, large."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < ONEDNN_MIN_NUMEL:
        return False
    # torch.compile chooses by itself; autocast wants another dtype; --safe switches oneDNN off
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")) and (
        have_onednn() and torch.backends.mkldnn.enabled)


def multiply(x, weight, bias):
    """oneDNN's x @ weight.T + bias."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """oneDNN's product, with gradients by MKL, which is as fast at those."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight, grad_bias = linear_backward(grad, *ctx.saved_tensors)
        return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None


class GELULinear(torch.autograd.Function):
    """
    F.linear(gelu(x), weight, bias) that keeps x for backward, and makes gelu(x), the largest thing
    that a layer would keep, again from it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x, approximate="tanh"), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_gelu, grad_weight, grad_bias = linear_backward(
            grad, F.gelu(x, approximate="tanh"), weight)
        grad_x = torch.ops.aten.gelu_backward(grad_gelu, x, approximate="tanh")
        return grad_x, grad_weight, grad_bias


def linear_backward(grad, x, weight):
    """Gradients of x, weight and bias from that of x @ weight.T + bias."""
    rows = grad.flatten(0, -2)  # (N, out)
    return grad @ weight, rows.T @ x.flatten(0, -2), rows.sum(0)


def gelu_linear(x, weight, bias):
    """F.linear(F.gelu(x, approximate="tanh"), weight, bias), which keeps x alone for backward."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return GELULinear.apply(x, weight, bias)


def linear(x, weight, bias=None):
    """F.linear(x, weight, bias), by the faster library."""
    if not use_onednn(weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return multiply(x, weight, bias)
    if weight.size(0) <= weight.size(1):  # many rows, and no wider than they were: MKL is as fast
        return F.linear(x, weight, bias)
    return OneDNNLinear.apply(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by the faster library."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """
    A Linear whose weight oneDNN has laid out in the order it reads it: a product with 2 to 64 rows
    is faster still, by up to a half. For inference only.
    """

    def __init__(self, original):
        super().__init__()
        # laid out best for 16 rows: sample.py draws no more at once
        self.weight = torch.ops.mkldnn._reorder_linear_weight(original.weight.detach(), 16)
        self.bias = original.bias

    def forward(self, x):
        return multiply(x, self.weight, self.bias)


def prepack(model):
    """
    Lay out the large matrices of a GPT for inference, in place, where that helps; it can then
    neither train nor be saved. Its lm_head is in memory twice: the token embedding reads it row by
    row.
    """
    for parent in [m for m in model.modules() if not isinstance(m, nn.Linear)]:
        for name, child in parent.named_children():  # one matrix at a time exists twice
            if isinstance(child, nn.Linear) and use_onednn(child.weight):
                setattr(parent, name, PackedLinear(child))
