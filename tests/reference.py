"""
Reference for scoring HellaSwag: the slow, obvious way, one example at a time. The tests compare
gpt2lab.scoring with it, and dev/bench.py measures both.
"""

import numpy as np
import torch
from torch.nn import functional as F


def render_padded(example, tokenizer, block_size):
    """(tokens, mask), (4, N) each: one row an ending, padded at the right; mask 1 at the ending."""
    context = tokenizer.encode(example["ctx"])
    endings = [tokenizer.encode(" " + ending) for ending in example["endings"]]
    rows = [(context + ending)[-block_size:] for ending in endings]
    N = max(len(row) for row in rows)
    tokens, mask = torch.zeros(4, N, dtype=torch.long), torch.zeros(4, N)
    for i, (row, ending) in enumerate(zip(rows, endings, strict=True)):
        tokens[i, :len(row)] = torch.tensor(row)
        mask[i, max(len(row) - len(ending), 0):len(row)] = 1
    return tokens, mask


@torch.inference_mode()
def score_one_by_one(model, tokenizer, example) -> tuple[np.ndarray, np.ndarray]:
    """
    (sums, counts), two arrays (4,): the summed loss (nats) and the number of tokens of each ending.

    One forward computes the four padded rows of an example, with logits at every position. The mask
    is shifted by one, because the logits at a position predict the next token.
    """
    tokens, mask = render_padded(example, tokenizer, model.config.block_size)
    logits = model(tokens)[0][..., :tokenizer.vocab_size]  # (4, N, V)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(),
                             reduction="none").view(4, -1)  # (4, N - 1), losses of the next token
    scored = mask[:, 1:]  # (4, N - 1)
    return (losses * scored).sum(1).numpy(), scored.sum(1).numpy()
