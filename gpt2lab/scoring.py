"""Losses of continuations: prefix trees, batches, and the accuracy that follows from them."""

import math
import random
import time
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from gpt2lab.distributed import sum_over_ranks
from gpt2lab.tasks import render_examples

ROWS_OF_LOGITS = 256  # at once: 51 MB


class PrefixTree(NamedTuple):
    """The prefix tree of an example's rows; a node is a token after all of its ancestors."""

    tokens: list
    parents: list  # the node before, -1 for none
    depths: list  # positions in the sequence
    scored: list  # (node, next token, row) for each token of each ending


def build_prefix_tree(rendered):
    """Tree of a Rendered. The last token of a row is not in it: nothing comes after."""
    tree, nodes = PrefixTree([], [], [], []), {}
    for i, (row, count) in enumerate(zip(rendered.rows, rendered.counts, strict=True)):
        node = -1
        for depth, (token, next_token) in enumerate(pairwise(row)):
            parent, node = node, nodes.setdefault((node, token), len(tree.tokens))
            if node == len(tree.tokens):  # not seen before
                tree.tokens.append(token)
                tree.parents.append(parent)
                tree.depths.append(depth)
            if depth + 1 >= len(row) - count:
                tree.scored.append((node, next_token, i))
    return tree


def collate_trees(trees):
    """idx (B, N), pos (B, N) and mask (B, 1, N, N) for GPT.hidden, padded at the right."""
    # lengths in steps of 8, so that shapes come back
    N = math.ceil(max(1, *(len(tree.tokens) for tree in trees)) / 8) * 8
    idx, pos = np.zeros((2, len(trees), N), dtype=np.int64)
    mask = np.zeros((len(trees), 1, N, N), dtype=bool)
    mask[:] = np.eye(N, dtype=bool)  # a node sees itself (padding too: a softmax of nothing is NaN)
    for i, tree in enumerate(trees):
        idx[i, :len(tree.tokens)] = tree.tokens
        pos[i, :len(tree.tokens)] = tree.depths
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                mask[i, 0, node] |= mask[i, 0, parent]  # and whatever its parent sees
    return idx, pos, mask


@torch.inference_mode()
def score_trees(model, batch, device, vocab_size):
    """Summed losses (nats) of the endings of a list of B Rendered, an array (B, 4). GPT only."""
    trees = [build_prefix_tree(rendered) for rendered in batch]
    arrays = collate_trees(trees)
    N = arrays[0].shape[1]
    idx, pos, mask = (torch.from_numpy(array).to(device) for array in arrays)
    scored = [(i * N + node, next_token, 4 * i + row)
              for i, tree in enumerate(trees) for node, next_token, row in tree.scored]
    sources, targets, endings = np.array(scored, dtype=np.int64).reshape(-1, 3).T
    sources, inverse = np.unique(sources, return_inverse=True)  # endings often begin alike
    sources, inverse, targets = (
        torch.from_numpy(array.copy()).to(device) for array in (sources, inverse, targets))
    x = model.hidden(idx, pos=pos, mask=mask).flatten(0, 1)[sources]  # (S, C), where needed only
    # -log softmax(logits)[target] = logsumexp(logits) - logits[target]
    norms = torch.cat([model.lm_head(rows)[:, :vocab_size].float().logsumexp(1)
                       for rows in x.split(ROWS_OF_LOGITS)])  # (S)
    target_logits = (x[inverse].float() * model.transformer.wte.weight[targets].float()).sum(1)
    losses = (norms[inverse] - target_logits).cpu().numpy()
    return np.bincount(endings, losses, minlength=4 * len(trees)).reshape(-1, 4)


@torch.inference_mode()
def score_rows(model, batch, device, vocab_size):
    """What score_trees does, from `model(idx)` alone: row by row, logits at every position."""
    rows = [row for rendered in batch for row in rendered.rows]
    counts = [count for rendered in batch for count in rendered.counts]
    idx = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.int64)  # (4 B, N)
    scored = []
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        idx[i, :len(row)] = torch.tensor(row)
        scored += [(i, t - 1, row[t]) for t in range(len(row) - count, len(row))]
    output = model(idx.to(device))
    logits = output.logits if hasattr(output, "logits") else output[0]
    ending, source, targets = torch.tensor(scored).reshape(-1, 3).T.to(device)
    logits = logits[ending, source, :vocab_size].float()  # (S, V)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return np.bincount(ending.cpu(), losses.cpu().numpy(), minlength=len(rows)).reshape(-1, 4)


def group_by_size(sizes, batch_tokens):
    """
    Indices in batches: neighbours in size, for little padding, as many as fit `batch_tokens`. The
    batches come in a mixed order, the same every time, so that figures on the way mean something.
    """
    order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    batches, start = [], 0
    while start < len(order):
        B = max(batch_tokens // max(sizes[order[start]], 1), 1)
        batches.append(order[start:start + B])
        start += B
    random.Random(0).shuffle(batches)
    return batches


class Score(NamedTuple):
    """Integer counts over all examples that have a label; `truncated` ones lost some context."""

    total: int
    num_correct: int
    num_correct_norm: int
    truncated: int


def standard_error(num_correct, total):
    """Standard error of an accuracy."""
    p = num_correct / total
    return math.sqrt(p * (1 - p) / total)


def tally(results):
    """Score of a list of results of `evaluate`."""
    results = [result for result in results if result["label"] is not None]
    return Score(len(results), sum(result["pred"] == result["label"] for result in results),
                 sum(result["pred_norm"] == result["label"] for result in results),
                 sum(result["truncated"] for result in results))


def describe(example, number, rendered, loss_sums):
    """The result of an example, a dict of plain values."""
    label = example.get("label")
    return {"ind": example.get("ind", number),
            "label": int(label) if label not in (None, "") else None,
            "pred": int(np.argmin(loss_sums)),
            "pred_norm": int(np.argmin(loss_sums / rendered.lengths)),
            "loss_sums": loss_sums.tolist(), "num_tokens": rendered.counts,
            "truncated": rendered.truncated}


def evaluate(model, tokenizer, examples, device, rank=0, world_size=1, lm_eval_style=False,
             batch_tokens=None, on_result=None, stop=lambda: False):
    """
    Score of a GPT, or of any model with `model(idx).logits`, over all ranks: every rank takes each
    world_size-th example. `on_result(number, result)` is called for those of this rank, in mixed
    order: dicts with ind, label, loss_sums (nats), num_tokens, pred, pred_norm, truncated. Ends
    early, with the score so far, when `stop()` says so.
    """
    if batch_tokens is None:  # what keeps two cores busy, or a GPU, in under 1 GB
        batch_tokens = 1024 if torch.device(device).type == "cpu" else 8192
    block_size = getattr(model.config, "block_size", None) or model.config.n_positions
    share = list(enumerate(examples))[rank::world_size]
    rendered = render_examples([e for _, e in share], tokenizer, block_size, lm_eval_style)
    if hasattr(model, "hidden"):
        score = score_trees
        sizes = [len(build_prefix_tree(r).tokens) for r in rendered]
    else:
        score, batch_tokens = score_rows, min(batch_tokens, 1024)  # all logits, 200 MB
        sizes = [4 * max(map(len, r.rows)) for r in rendered]
    results = []
    for batch in group_by_size(sizes, batch_tokens):
        if stop():
            break
        sums = score(model, [rendered[i] for i in batch], device, tokenizer.vocab_size)
        for i, loss_sums in zip(batch, sums, strict=True):
            number, example = share[i]
            results.append(describe(example, number, rendered[i], loss_sums))
            if on_result:
                on_result(number, results[-1])
    return Score(*map(int, sum_over_ranks(tally(results), device)))


def summarize(model, tokenizer, examples, ranks, stop=lambda: False):
    """(a line about the accuracy on examples, the accuracy), over all processes."""
    start = time.time()
    total, _, correct, _ = evaluate(model, tokenizer, examples, *ranks, stop=stop)
    total = max(total, 1)
    line = (f"HellaSwag accuracy: {correct}/{total}={correct / total:.4f} | standard error "
            f"{standard_error(correct, total):.4f} | {time.time() - start:.1f}s")
    return line, correct / total
