"""
Samples text from a trained model.

    python sample.py --style creative                    # newest checkpoint in log/, else gpt2
    python sample.py --model gpt2-xl --prompt "The meaning of life is" --max_new_tokens 100
"""

import argparse

import numpy as np
import torch

import fineweb
from devices import pick_device
from fineweb import UserError

# temperature flattens (> 1) or sharpens (< 1) the distribution; top_k keeps the k likeliest tokens
# (0: all); top_p then keeps the fewest of them that together have this share of the probability
STYLES = {
    "focused": dict(temperature=0.7, top_k=40, top_p=0.90),
    "creative": dict(temperature=0.9, top_k=100, top_p=0.95),
    "wild": dict(temperature=1.2, top_k=0, top_p=0.98),
}


class KVCache:
    """
    Keys and values of all tokens seen so far, so that a new token costs a forward of one position.

    Allocated once for block_size positions of `batch_size` rows. GPT.forward appends to it and
    counts `length` on. A prefill of one row fills all rows: samples of one prompt share it.
    """

    def __init__(self, model, batch_size):
        config, weight = model.config, model.lm_head.weight
        shape = (config.n_layer, batch_size, config.n_head, config.block_size,
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


def pick_token(logits, rng, temperature=1.0, top_k=0, top_p=1.0):
    """
    Draw a token id from logits (V,), a numpy array on the CPU, in the order temperature, top_k,
    top_p. Temperature 0 takes the likeliest. numpy, so that every device draws alike.
    """
    if not np.isfinite(logits).all():
        raise UserError("the model's logits are not finite: its weights are damaged, or its dtype "
                        "is too narrow for them")
    if temperature == 0:
        return int(logits.argmax())
    k = min(top_k, len(logits)) or len(logits)
    kept = np.argpartition(-logits, k - 1)[:k]
    kept = kept[np.lexsort((kept, -logits[kept]))]  # likeliest first; ties by id
    scaled = logits[kept].astype(np.float64) / temperature
    probs = np.exp(scaled - scaled[0])
    cumulative = np.cumsum(probs / probs.sum())
    count = int(np.searchsorted(cumulative, top_p)) + 1  # at least one survives
    cumulative = cumulative[:count]
    draw = rng.random() * cumulative[-1]
    return int(kept[min(np.searchsorted(cumulative, draw, side="right"), len(cumulative) - 1)])


@torch.inference_mode()
def generate(model, prompt, eot, vocab_size, num_samples=1, max_new_tokens=64, temperature=1.0,
             top_k=0, top_p=1.0, seed=42):
    """
    Continue `prompt` (a list of token ids; empty: start from `eot`) `num_samples` times; returns
    the lists of new ids, each ended by `eot` or `max_new_tokens`. Ids of `vocab_size` and above
    never come out. Sample i draws from a generator seeded with (seed, i).

    When the context is full, its older half is dropped and the rest computed anew: positions are
    learned, so cached keys cannot move.
    """
    device = model.lm_head.weight.device
    block_size = model.config.block_size
    cache = KVCache(model, num_samples)
    rngs = [np.random.default_rng([seed, i]) for i in range(num_samples)]
    prompt = list(prompt) or [eot]
    rows = [[] for _ in range(num_samples)]
    finished = [False] * num_samples
    idx = torch.tensor([prompt[-block_size:]], device=device)  # (1, T): one prefill for all rows
    for _ in range(max_new_tokens):
        if cache.length + idx.size(1) > block_size:
            cache.length = 0
            window = [(prompt + row)[-max(block_size // 2, 1):] for row in rows]
            idx = torch.tensor(window, device=device)  # (num_samples, block_size // 2)
        logits, _ = model(idx, kv_cache=cache, last_only=True)  # (B, 1, V)
        logits = logits[:, -1, :vocab_size].float().cpu().numpy()  # (B, vocab_size)
        for i, row in enumerate(rows):
            # after a shared prefill all rows have the same logits, and each draws its own token
            row.append(eot if finished[i] else pick_token(
                logits[i % len(logits)], rngs[i], temperature, top_k, top_p))
            finished[i] = row[-1] == eot
        if all(finished):
            break
        idx = torch.tensor([[row[-1]] for row in rows], device=device)  # (num_samples, 1)
    return [row[:row.index(eot)] if eot in row else row for row in rows]


def default_model():
    """The newest run in log/ if there is one, else OpenAI's gpt2."""
    from train_gpt2 import find_checkpoint
    return "log" if find_checkpoint("log") else "gpt2"


def main():
    parser = fineweb.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint, log folder, Hugging Face folder or hub name "
                        "(default: newest checkpoint in log/, else gpt2)")
    parser.add_argument("--prompt", default="Hello, I'm a language model,",
                        help="text to continue; empty: start from end-of-text (%(default)s)")
    parser.add_argument("--style", choices=tuple(STYLES), default="creative",
                        help=f"values of the next three flags: {STYLES}")
    parser.add_argument("--temperature", type=float, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens; 0: all")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest tokens of this share")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--num_samples", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="(%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    args = parser.parse_args()
    style = dict(STYLES[args.style])
    style.update({name: value for name in style if (value := getattr(args, name)) is not None})
    if not style["temperature"] >= 0 or style["top_k"] < 0 or not 0 <= style["top_p"] <= 1:
        raise UserError("--temperature and --top_k must be at least 0, --top_p between 0 and 1")
    if args.max_new_tokens < 1 or args.num_samples < 1 or args.seed < 0:
        raise UserError("--max_new_tokens and --num_samples must be at least 1, --seed at least 0")

    from train_gpt2 import load_model, load_tokenizer
    device = pick_device(args.device)
    source = args.model or default_model()
    model, tokenizer = load_model(source, device), load_tokenizer(source)
    rows = generate(model, tokenizer.encode(args.prompt), tokenizer.eot, tokenizer.vocab_size,
                    args.num_samples, args.max_new_tokens, seed=args.seed, **style)
    for i, row in enumerate(rows):
        print(f"[Sample {i + 1}] {args.prompt}{tokenizer.decode(row)}")


if __name__ == "__main__":
    fineweb.run_main(main)
