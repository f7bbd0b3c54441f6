"""
Cross entropy of a language model without its logits: (B x T, V) of them, in float32, several times
over, would be the largest thing in memory by far. A few rows at a time never are.
"""

import torch
from torch.nn import functional as F

from gpt2lab.kernels import linear

CHUNK_ROWS = 512  # of 50,304 logits in float32: 103 MB. Fewer rows make slow matrix products
CUDA_CHUNKS = 4  # times as many there: each chunk adds to the whole weight gradient


def rows_at_once(device):
    """How many rows of logits exist at once."""
    return CHUNK_ROWS * (CUDA_CHUNKS if device.type == "cuda" else 1)


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    Sum of the cross entropies of x @ weight.T, in nats. Each chunk's logits turn into its share of
    the gradients at once, in forward, since nobody is going to see them again: the loss is the end
    of the graph, so all that backward has left to do is to scale.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_grad):
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        W = weight.to(dtype)  # (V, C)
        grad_x = torch.empty_like(x) if with_grad else None
        grad_weight = None
        chunk = rows_at_once(x.device)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            x_rows, y_rows = x[rows].to(dtype), targets[rows, None]  # (n, C), (n, 1)
            log_probs = F.log_softmax(linear(x_rows, W), dim=1, dtype=torch.float32)  # (n, V)
            loss -= log_probs.gather(1, y_rows).sum()
            if with_grad:
                # d loss / d logits = probabilities, less 1 at the target. Between -1 and 1, not
                # yet divided by the number of rows: float16 would lose what is smaller
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
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None, None


def cross_entropy(x, weight, targets):
    """
    Mean of F.cross_entropy(x @ weight.T, targets) in nats a token, and its gradients: x (N, C),
    weight (V, C), targets (N) int64. Under autocast the products run in its dtype.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    loss = ChunkedCrossEntropy.apply(x, weight, targets, dtype, torch.is_grad_enabled())
    return loss / len(x)
