"""
The optimizers of --optimizer: fused AdamW, AdamW whose state takes 8 bits, and Muon.

Every group's lr is get_lr(step): what differs between groups is left to the optimizer.
"""

import math

import torch

from gpt2lab.cli import first_line
from gpt2lab.distributed import sum_over_ranks

OPTIMIZERS = ("adamw", "adamw8bit", "muon")
# of Muon
MOMENTUM = 0.9
# root mean square of a step of lr 1. AdamW's is about 0.2 (Liu et al. 2025); Muon bears longer ones
STEP_LENGTH = 0.5


def make_optimizer(raw_model, name, weight_decay, learning_rate, betas=(0.9, 0.95),
                   verbose=False):
    """
    A torch Optimizer for a GPT, by its name in OPTIMIZERS. Matrices and embeddings decay, biases
    and LayerNorm weights do not.
    """
    decayed = [p for p in raw_model.parameters() if p.dim() >= 2]
    kept = [p for p in raw_model.parameters() if p.dim() < 2]
    device = decayed[0].device
    if verbose:
        for label, tensors in (("decayed", decayed), ("non-decayed", kept)):
            print(f"num {label} parameter tensors: {len(tensors)}, "
                  f"with {sum(p.numel() for p in tensors):,} parameters")
    groups = [{"params": decayed, "weight_decay": weight_decay},
              {"params": kept, "weight_decay": 0.0}]
    options = dict(lr=learning_rate, betas=betas, eps=1e-8)
    if name == "adamw8bit":
        AdamW8bit = find_adamw8bit(device, verbose)
        # all processes or none, or their weights would drift apart
        if not sum_over_ranks([AdamW8bit is None], device)[0]:
            return AdamW8bit(groups, **options)
    # one kernel for all parameters instead of a few dozen for each
    options["fused"] = device.type in ("cuda", "mps", "cpu")
    if verbose:
        print(f"using fused AdamW: {options['fused']}")
    if name != "muon":
        return torch.optim.AdamW(groups, **options)
    query_key_value = [block.attn.c_attn.weight for block in raw_model.transformer.h]
    hidden = [m.weight for block in raw_model.transformer.h
              for m in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)]
    if verbose:
        print(f"using Muon for {len(query_key_value + hidden)} of them, with "
              f"{sum(p.numel() for p in query_key_value + hidden):,} parameters")
    by_muon = set(query_key_value + hidden)
    groups[0]["params"] = [p for p in decayed if p not in by_muon]
    groups += [{"params": query_key_value, "weight_decay": weight_decay, "parts": 3},
               {"params": hidden, "weight_decay": weight_decay, "parts": 1}]
    return Muon(groups, **options)


def find_adamw8bit(device, verbose):
    """bitsandbytes' AdamW8bit, if it is installed and works on `device`; else says so, -> None."""
    try:
        import bitsandbytes
        # small tensors stay in 32 bits: only a large one tells whether there is a kernel
        p = torch.nn.Parameter(torch.zeros(256, 256, device=device))
        p.grad = torch.ones_like(p)
        optimizer = bitsandbytes.optim.AdamW8bit([p], lr=1.0)
        optimizer.step()
        if not torch.all(p < -0.5):
            raise RuntimeError("a trial step went wrong")
    except Exception as error:  # each release fails in its own way where it lacks a kernel
        if verbose:
            print(f"warning: no adamw8bit on {device.type}, AdamW instead: pip install "
                  f"bitsandbytes ({first_line(error):.100})")
        return None
    if verbose:
        print("using 8-bit AdamW: True")
    return bitsandbytes.optim.AdamW8bit


class Muon(torch.optim.AdamW):
    """
    Muon (Jordan et al. 2024) for the matrices of groups that have "parts", AdamW for the rest.

    Muon steps along the momentum made orthogonal: as far in directions that few gradients point to
    as in those that many do. `parts` matrices stacked in a weight are taken one by one.
    """

    def __init__(self, groups, **options):
        super().__init__(groups, **options)
        self._step_supports_amp_scaling = False  # GradScaler leaves out a step that overflows

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            if "parts" in group:
                self._muon_step(group)
        return super().step()

    def _muon_step(self, group):
        by_shape = {}  # shape: [(matrix, where it should go)], to do equal ones at once
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]  # by the names of AdamW, whose load_state_dict reads it
            if not state:
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 1 - MOMENTUM)
            update = p.grad.lerp_(state["exp_avg"], MOMENTUM)  # Nesterov's: one gradient ahead
            for pair in zip(p.chunk(group["parts"]), update.chunk(group["parts"]), strict=True):
                by_shape.setdefault(pair[0].shape, []).append(pair)
            p.grad = None  # done with: AdamW passes over what has no gradient
        for shape, pairs in by_shape.items():
            # an orthogonal matrix has elements of 1 / sqrt(max(shape)): one lr for all shapes
            length = STEP_LENGTH * math.sqrt(max(shape))
            updates = orthogonalize(torch.stack([update for _, update in pairs]))
            for (matrix, _), update in zip(pairs, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * length)


def orthogonalize(matrices, steps=5):
    """
    Matrices (n, rows, cols) with their singular values brought near 1, between 0.7 and 1.2, by
    Newton-Schulz iteration: products of matrices are all it takes, and bfloat16 will do.
    """
    bfloat16 = matrices.is_cuda and torch.cuda.get_device_capability(matrices.device) >= (8, 0)
    X = matrices.bfloat16() if bfloat16 else matrices.float()  # slow on CPUs without units for it
    tall = X.size(1) > X.size(2)
    X = X.mT if tall else X  # so that X @ X.mT is the smaller of the two squares
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(steps):
        # the odd polynomial of Jordan et al., chosen to lift small singular values fast
        A = X @ X.mT  # (n, rows, rows)
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X.mT if tall else X
