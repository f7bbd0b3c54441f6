"""HellaSwag scored the slow, obvious way: what hellaswag.py is tested against and timed beside."""

import torch
from torch.nn import functional as F


def render_padded(example, tokenizer, block_size):
    """(tokens, mask), (4, N): a row for each ending, padded at the right; mask 1 at the ending."""
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
def score_one_by_one(model, tokenizer, example):
    """
    (sums, counts), two arrays (4,), by the plain definition: one example in a forward, its four
    rows padded, logits at every position, the mask shifted to where each token is predicted.
    """
    tokens, mask = render_padded(example, tokenizer, model.config.block_size)
    logits = model(tokens)[0][..., :tokenizer.vocab_size]  # (4, N, V)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(),
                             reduction="none").view(4, -1)  # (4, N - 1): loss of the next token
    scored = mask[:, 1:]
    return (losses * scored).sum(1).numpy(), scored.sum(1).numpy()
