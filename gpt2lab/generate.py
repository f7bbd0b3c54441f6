"""
Sampling from a GPT, one token at a time: the KV cache, drawing a token from logits, the loop.

`model` is a GPT of train_gpt2.py. Its type here is Any, because gpt2lab does not import scripts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2lab.cli import UserError
from gpt2lab.device import attention_of_any_shape

# -----------------------------------------------------------------------------
# the KV cache


class KVCache:
    """
    Keys and values of all tokens seen so far, so that a new token costs a forward of one position.

    The cache is allocated once, in the dtype of the weights, for `positions` tokens of `batch_size`
    rows. GPT.forward appends to it and then adds the number of new tokens to `length`. If the first
    forward has one row, its keys and values are stored in all rows, because the samples of one
    prompt share it.
    """

    def __init__(self, model: Any, batch_size: int, positions: int) -> None:
        config, weight = model.config, model.transformer.wte.weight
        shape = (config.n_layer, batch_size, config.n_head, positions,
                 config.n_embd // config.n_head)
        self.k = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, nh, T, hs) of a layer; returns all it holds, (B, nh, S, hs) each."""
        B, end = k.size(0), self.length + k.size(2)
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :B, :, :end], self.v[layer, :B, :, :end]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


# -----------------------------------------------------------------------------
# one token


def topk_lower_bound(k: int, logits: np.ndarray) -> float:
    """
    A lower bound on the k-th largest of logits (V,), found from the maxima of blocks: one cheap
    pass, and few other logits reach it.
    """
    # k of the maxima are at least as large as the k-th largest maximum, so k logits are, too
    size = max(len(logits) // (16 * k), 1)
    maxima = logits[:len(logits) // size * size].reshape(-1, size).max(1)  # (V // size,)
    return np.partition(maxima, -k)[-k]


def topk_ids(k: int, logits: np.ndarray) -> np.ndarray:
    """Ids of the k largest of logits (V,), the largest first. Of equal logits, lower ids win."""
    ids = np.flatnonzero(logits >= topk_lower_bound(k, logits))  # those k ids, and a few more
    return ids[np.argsort(-logits[ids], kind="stable")][:k]


def penalize_repetition(logits: np.ndarray, seen: Sequence[int], penalty: float) -> None:
    """Make the ids in `seen` less likely, in place, by a penalty above 1 (Keskar et al. 2019)."""
    ids = np.unique(np.asarray(seen, dtype=np.int64))
    before = logits[ids]
    logits[ids] = np.where(before > 0, before / penalty, before * penalty)


def sample_token(logits: np.ndarray, rng: np.random.Generator, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0,
                 seen: Sequence[int] = ()) -> int:
    """
    Draw a token id from logits (V,). The options apply in this order: repetition_penalty on the ids
    in `seen`, temperature (0 takes the likeliest token), top_k (0: all tokens), top_p. Raises
    UserError if the logits are not finite.

    Logits and generator are numpy's, on the CPU, so that the same seed draws the same tokens for
    every device.
    """
    if not np.isfinite(logits).all():
        raise UserError("the model's logits are not finite, because its weights are damaged or its "
                        "dtype is too narrow for them: try --dtype float32")
    logits = logits.astype(np.float64)  # a copy: other samples read the same logits
    if repetition_penalty != 1:
        penalize_repetition(logits, seen, repetition_penalty)
    if temperature == 0:
        return int(logits.argmax())
    ids = topk_ids(top_k, logits) if 0 < top_k < len(logits) else np.arange(len(logits))
    probs = np.exp((logits[ids] - logits.max()) / temperature)
    probs /= probs.sum()
    # top_p keeps the fewest likeliest tokens whose probabilities add up to top_p. Tokens below this
    # threshold add up to less than 1 - top_p, so none of them is kept. Dropping them first avoids
    # sorting the whole vocabulary
    likely = probs >= (1 - top_p) / len(probs)
    ids, probs = ids[likely], probs[likely]
    order = np.argsort(-probs, kind="stable")  # the likeliest first
    cumulative = np.cumsum(probs[order])
    cumulative = cumulative[:np.searchsorted(cumulative, top_p) + 1]  # keeps at least one token
    draw = rng.random() * cumulative[-1]
    index = np.searchsorted(cumulative, draw, side="right")
    return int(ids[order[min(index, len(cumulative) - 1)]])  # min: draw can be rounded up


# -----------------------------------------------------------------------------
# the loop


def next_logits(model: Any, idx: Tensor, cache: KVCache, vocab_size: int) -> np.ndarray:
    """
    The logits (B, vocab_size) of the token after idx (B, T), float32. The tokens of idx follow
    those that the cache holds, and are appended to it.
    """
    with attention_of_any_shape(idx.device):
        logits, _ = model(idx, kv_cache=cache, last_only=True)  # (B, 1, V)
    return logits[:, -1, :vocab_size].float().cpu().numpy()


@torch.inference_mode()
def generate(model: Any, prompt: Sequence[int], eot: int, vocab_size: int, num_samples: int = 1,
             max_new_tokens: int = 64, seed: int = 42, first_sample: int = 0,
             ignore_eot: bool = False, on_token: Callable[[int, int | None], Any] | None = None,
             **sampling: Any) -> list[list[int]]:
    """
    Continue a prompt `num_samples` times; returns a list of new token ids for each sample.

    An empty `prompt` starts from the end-of-text id `eot`. A sample ends before `eot` (unless
    `ignore_eot`) or after max_new_tokens. Ids of `vocab_size` and above are never drawn. Sample i
    uses a generator of its own, seeded with (seed, first_sample + i). `on_token(i, id)` is called
    for each new id, or with None if `eot` ended sample i; if it returns true, the sample ends.
    `sampling` holds options of sample_token, which can raise UserError.

    When the context is full, the older half of it is dropped and the keys and values of the rest
    are computed again. Cached keys cannot move, because they contain learned position embeddings.
    """
    device, block_size = model.transformer.wte.weight.device, model.config.block_size
    prompt = list(prompt) or [eot]
    cache = KVCache(model, num_samples, min(len(prompt) + max_new_tokens, block_size))
    rngs = [np.random.default_rng([seed, first_sample + i]) for i in range(num_samples)]
    samples: list[list[int]] = [[] for _ in range(num_samples)]
    penalized = sampling.get("repetition_penalty", 1) != 1
    live = list(range(num_samples))  # the samples that have not ended, one for each row of idx
    idx = torch.tensor([prompt[-block_size:]], device=device)  # (1, T), one row for all samples
    for _ in range(max_new_tokens):
        if cache.length + idx.size(1) > block_size:
            cache.length = 0
            windows = [(prompt + samples[i])[-max(block_size // 2, 1):] for i in live]
            idx = torch.tensor(windows, device=device)  # (B, block_size // 2)
        logits = next_logits(model, idx, cache, vocab_size)  # (B, vocab_size)
        kept_rows = []
        for row, i in enumerate(live):
            # the forward of the prompt has a single row, from which every sample draws
            seen = prompt + samples[i] if penalized else ()  # a prompt can have millions of ids
            token = sample_token(logits[row % len(logits)], rngs[i], seen=seen, **sampling)
            ended = token == eot and not ignore_eot
            if not ended:
                samples[i].append(token)
            if on_token and on_token(i, None if ended else token):
                ended = True
            if not ended:
                kept_rows.append(row)
        if len(kept_rows) < len(live):
            live = [live[row] for row in kept_rows]
            cache.select_rows(kept_rows)
        if not live:
            break
        idx = torch.tensor([[samples[i][-1]] for i in live], device=device)  # (B, 1)
    return samples
