"""
The optimizers beside AdamW: Muon, and AdamW whose state takes 8 bits.

train_gpt2.py sets the lr of every parameter group to get_lr(step). Where two groups need steps of
different lengths, the optimizer scales them.
"""

import math

import torch
from torch import Tensor, nn

from gpt2lab.cli import first_line
from gpt2lab.distributed import sum_over_ranks

OPTIMIZERS = ("adamw", "adamw8bit", "muon")
MOMENTUM = 0.9  # of Muon
# root mean square of an update at lr 1, for a matrix with as many rows as columns, so that one
# learning rate serves all groups. AdamW's is about 0.2 (Liu et al. 2025), and Muon tolerates more
UPDATE_RMS = 0.5


def print_groups(decayed: list[Tensor], others: list[Tensor]) -> None:
    """Print how many parameters weight decay is for, and how many it is not for."""
    for label, tensors in (("decayed", decayed), ("non-decayed", others)):
        print(f"num {label} parameter tensors: {len(tensors)}, "
              f"with {sum(p.numel() for p in tensors):,} parameters")


def find_adamw8bit(device: torch.device, verbose: bool) -> type[torch.optim.Optimizer] | None:
    """
    bitsandbytes' AdamW8bit, or None unless it is installed and works on the devices of all ranks.
    Prints which, if `verbose`.
    """
    try:
        import bitsandbytes
        # bitsandbytes keeps small tensors in 32 bits, so only a large one tries the 8-bit kernel
        p = nn.Parameter(torch.zeros(256, 256, device=device))
        p.grad = torch.ones_like(p)
        optimizer = bitsandbytes.optim.AdamW8bit([p], lr=1.0)
        optimizer.step()
        if not torch.all(p < -0.5):
            raise RuntimeError("a trial step went wrong")
        found = bitsandbytes.optim.AdamW8bit
    except Exception as error:  # each release fails in its own way where it lacks a kernel
        found = None
        if verbose:
            print(f"warning: no adamw8bit on {device.type}, AdamW instead: pip install "
                  f"bitsandbytes ({first_line(error):.100})")
    # all ranks or none, because different optimizers would let the weights drift apart
    if sum_over_ranks([found is None], device)[0]:
        return None
    if verbose:
        print("using 8-bit AdamW: True")
    return found


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer,
            scaler: torch.amp.GradScaler) -> None:
    """
    Step the optimizer, unless `finite`, a bool scalar on the device of the weights, is False.
    Nothing changes then.
    """
    kernel_decides = (type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
                      and finite.device.type in ("cuda", "cpu") and not scaler.is_enabled())
    if kernel_decides:
        # the fused kernel reads the answer by itself, so that the update is on its way to the GPU
        # before this process waits for any number
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        del optimizer.found_inf
    elif finite.item():
        scaler.step(optimizer)


@torch.no_grad()
def update_average(average: nn.Module, raw_model: nn.Module, decay: float, step: int) -> None:
    """
    Move the weights of `average` towards those of `raw_model` after update `step`, so that they are
    an exponential moving average: average = decay * average + (1 - decay) * weights.
    """
    # early in a run, over the last tenth of the updates only, because the first weights are random
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(raw_model.parameters()), 1 - decay)


def make_muon(raw_model: nn.Module, groups: list[dict], options: dict, verbose: bool) -> "Muon":
    """
    Muon for the matrices inside the blocks of a GPT, AdamW for all other parameters. `groups` are
    AdamW's: decayed parameters, then the others. `options` are keywords of AdamW.
    """
    query_key_value = [block.attn.c_attn.weight for block in raw_model.transformer.h]
    hidden = [layer.weight for block in raw_model.transformer.h
              for layer in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)]
    if verbose:
        print(f"using Muon for {len(query_key_value + hidden)} of them, with "
              f"{sum(p.numel() for p in query_key_value + hidden):,} parameters")
    by_muon = set(query_key_value + hidden)
    decayed, others = groups
    weight_decay = decayed["weight_decay"]
    return Muon([
        {**decayed, "params": [p for p in decayed["params"] if p not in by_muon]}, others,
        {"params": query_key_value, "weight_decay": weight_decay, "parts": 3},
        {"params": hidden, "weight_decay": weight_decay, "parts": 1}], **options)


class Muon(torch.optim.AdamW):
    """
    Muon (Jordan et al. 2024) for the matrices of groups that have "parts", AdamW for the rest.

    Muon orthogonalizes the momentum, so that rare directions get as large a step as frequent ones.
    "parts" is the number of matrices stacked in one weight, 3 in c_attn. Each is orthogonalized by
    itself.
    """

    def __init__(self, groups: list[dict], **options):
        super().__init__(groups, **options)
        # GradScaler then skips a step with infinite gradients, instead of telling fused AdamW
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            if "parts" in group:
                self._muon_step(group)
        super().step()

    def _muon_step(self, group):
        by_shape = {}  # shape: [(matrix, its update)], to orthogonalize equal shapes in one batch
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]  # with the names of AdamW's state, whose load_state_dict reads it
            if not state:
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 1 - MOMENTUM)
            update = p.grad.lerp_(state["exp_avg"], MOMENTUM)  # Nesterov's: one gradient ahead
            for pair in zip(p.chunk(group["parts"]), update.chunk(group["parts"]), strict=True):
                by_shape.setdefault(pair[0].shape, []).append(pair)
            p.grad = None  # so that AdamW's step passes over this parameter
        for (rows, _), pairs in by_shape.items():
            # the size of the update's singular values. It does not grow with the columns, because
            # a layer with more inputs would otherwise change its outputs more
            length = UPDATE_RMS * math.sqrt(rows)
            updates = torch.stack([update for _, update in pairs])
            if updates.is_cuda and torch.cuda.get_device_capability(updates.device) >= (8, 0):
                updates = updates.bfloat16()  # multiplied several times as fast there
            updates = orthogonalize(updates)
            for (matrix, _), update in zip(pairs, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * length)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """
    Matrices (n, rows, cols) with their singular values moved to between 0.7 and 1.2 by
    Newton-Schulz iteration (Jordan et al. 2024), which needs nothing but matmuls and can run in
    bfloat16.
    """
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices  # so that X @ X.mT is the smaller of the two squares
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(steps):
        # an odd polynomial of X, whose coefficients raise small singular values fast
        A = X @ X.mT  # (n, rows, rows)
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X.mT if tall else X
