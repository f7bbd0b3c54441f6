"""Text from a GPT, one token at a time: the KV cache, drawing a token, the loop."""

import numpy as np
import torch

from gpt2lab.cli import UserError


class KVCache:
    """
    Keys and values of all tokens seen so far, so that a new token costs a forward of one position.

    Allocated once, in the dtype of the weights, for `positions` tokens of `batch_size` rows.
    GPT.forward appends to it and counts `length` on. A prefill of one row fills all rows: samples
    of one prompt share it.
    """

    def __init__(self, model, batch_size, positions):
        config, weight = model.config, model.transformer.wte.weight
        shape = (config.n_layer, batch_size, config.n_head, positions,
                 config.n_embd // config.n_head)
        self.k = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def append(self, layer, k, v):
        """Store k, v (B, nh, T, hs) of one layer; returns all that layer holds, (B, nh, S, hs)."""
        B, end = k.size(0), self.length + k.size(2)
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :B, :, :end], self.v[layer, :B, :, :end]

    def keep(self, rows):
        """Go on with these rows only, a list of their numbers."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


def topk_lower_bound(count, logits):
    """A value that the `count` largest of logits (V,) reach and few others, found fast."""
    size = max(len(logits) // (16 * count), 1)
    maxima = logits[:len(logits) // size * size].reshape(-1, size).max(1)  # of blocks
    return np.partition(maxima, -count)[-count]


def sample_token(logits, rng, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seen=()):
    """
    Draw a token id from logits (V,), a numpy array on the CPU, in the order repetition_penalty on
    the ids in `seen`, temperature, top_k, top_p. Temperature 0 takes the likeliest. numpy, so that
    every device draws alike. Raises UserError if the logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise UserError("the model's logits are not finite: its weights are damaged, or its dtype "
                        "is too narrow for them (try --dtype float32)")
    logits = logits.astype(np.float64)
    if repetition_penalty != 1:  # Keskar et al. 2019
        seen = np.unique(np.asarray(seen, dtype=np.int64))
        old = logits[seen]
        logits[seen] = np.where(old > 0, old / repetition_penalty, old * repetition_penalty)
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        ids = np.flatnonzero(logits >= topk_lower_bound(top_k, logits))  # k of them, and some more
        ids = ids[np.argsort(-logits[ids], kind="stable")][:top_k]  # likeliest first, ties by id
    else:
        ids = np.arange(len(logits))
    share = np.exp((logits[ids] - logits.max()) / temperature)
    share /= share.sum()
    # tokens this unlikely make up less than 1 - top_p even together, so the likeliest of share
    # top_p are without them: that spares sorting the whole vocabulary
    likely = share >= (1 - top_p) / len(share)
    ids, share = ids[likely], share[likely]
    order = np.argsort(-share, kind="stable")
    cumulative = np.cumsum(share[order])
    cumulative = cumulative[:np.searchsorted(cumulative, top_p) + 1]  # at least one survives
    draw = rng.random() * cumulative[-1]
    place = np.searchsorted(cumulative, draw, side="right")
    return int(ids[order[min(place, len(cumulative) - 1)]])


@torch.inference_mode()
def generate(model, prompt, eot, vocab_size, num_samples=1, max_new_tokens=64, seed=42,
             first_sample=0, ignore_eot=False, on_token=None, **choice):
    """
    Continue `prompt` (a list of token ids; empty: start from `eot`) `num_samples` times; returns
    the lists of new ids. A row ends before `eot` (unless `ignore_eot`) or after max_new_tokens.
    Ids of `vocab_size` and above never come out. Sample i draws from a generator seeded with
    (seed, first_sample + i); `choice` are keywords of pick_token. `on_token(i, token)` is called
    with every new id, None if `eot` ended the row, and ends the row by returning true.

    When the context is full, its older half is dropped and the rest computed anew: positions are
    learned, so cached keys cannot move.
    """
    device, block_size = model.transformer.wte.weight.device, model.config.block_size
    prompt = list(prompt) or [eot]
    cache = KVCache(model, num_samples, min(len(prompt) + max_new_tokens, block_size))
    rngs = [np.random.default_rng([seed, first_sample + i]) for i in range(num_samples)]
    rows = [[] for _ in range(num_samples)]
    live = list(range(num_samples))  # the rows that go on
    idx = torch.tensor([prompt[-block_size:]], device=device)  # (1, T): one prefill for all rows
    for _ in range(max_new_tokens):
        if cache.length + idx.size(1) > block_size:
            cache.length = 0
            window = [(prompt + rows[i])[-max(block_size // 2, 1):] for i in live]
            idx = torch.tensor(window, device=device)  # (B, block_size // 2)
        logits, _ = model(idx, kv_cache=cache, last_only=True)  # (B, 1, V)
        logits = logits[:, -1, :vocab_size].float().cpu().numpy()  # (B, vocab_size)
        ended = set()
        for place, i in enumerate(live):
            # after a shared prefill all rows have the same logits, and each draws its own token
            token = sample_token(logits[place % len(logits)], rngs[i], seen=prompt + rows[i],
                               **choice)
            if token == eot and not ignore_eot:
                token = None
            else:
                rows[i].append(token)
            if (on_token and on_token(i, token)) or token is None:
                ended.add(place)
        if ended:
            going_on = [place for place in range(len(live)) if place not in ended]
            live = [live[place] for place in going_on]
            cache.keep(going_on)
        if not live:
            break
        idx = torch.tensor([[rows[i][-1]] for i in live], device=device)  # (B, 1)
    return rows
