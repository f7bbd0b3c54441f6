"""
Losses of continuations: prefix trees, batches of them, and the accuracy that follows.

The four rows of an example begin alike. score_trees computes them as one prefix tree, in which
every token is computed once and attends only to its ancestors. score_rows computes every row whole,
for models that cannot take a prefix tree.

`model` is a GPT of train_gpt2.py. Its type here is Any, because gpt2lab does not import scripts.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from gpt2lab.distributed import Ranks, sum_over_ranks
from gpt2lab.tasks import RenderedExample, render_examples
from gpt2lab.tokenizer import Tokenizer

LOGIT_ROWS_AT_ONCE = 256  # 256 rows of 50,304 float32 logits take 52 MB

# -----------------------------------------------------------------------------
# prefix trees


class PrefixTree(NamedTuple):
    """
    The prefix tree of an example's rows. A node stands for a token together with all tokens before
    it, so rows share the nodes of their common beginning. Nodes are numbered, parents first.
    """

    tokens: list[int]  # the token of each node
    parents: list[int]  # the node of the token before, -1 at the beginning of a row
    depths: list[int]  # the position in the row
    scored: list[tuple[int, int, int]]  # (node, next token, row) for each token of each ending


def build_prefix_tree(example: RenderedExample) -> PrefixTree:
    """The prefix tree of an example, without the last token of each row, which predicts nothing."""
    tree = PrefixTree([], [], [], [])
    nodes: dict[tuple[int, int], int] = {}  # (parent, token): node
    for i, (row, num_scored) in enumerate(zip(example.rows, example.num_scored, strict=True)):
        parent = -1
        for depth, (token, next_token) in enumerate(pairwise(row)):
            node = nodes.get((parent, token))
            if node is None:
                node = nodes[parent, token] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(parent)
                tree.depths.append(depth)
            if depth + 1 >= len(row) - num_scored:
                tree.scored.append((node, next_token, i))
            parent = node
    return tree


def collate_trees(trees: Sequence[PrefixTree]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    A batch for GPT.hidden: idx (B, N) int64 and pos (B, N) int64, padded at the right, and mask
    (B, 1, N, N) bool. mask[b, 0, i, j] is True where node i of tree b attends to node j.
    """
    # N is a multiple of 8, so that the same shapes come back
    N = math.ceil(max(1, *(len(tree.tokens) for tree in trees)) / 8) * 8
    idx, pos = np.zeros((2, len(trees), N), dtype=np.int64)
    mask = np.zeros((len(trees), 1, N, N), dtype=bool)
    # every node attends to itself. So does padding, because a softmax over nothing is NaN
    mask[:] = np.eye(N, dtype=bool)
    for i, tree in enumerate(trees):
        idx[i, :len(tree.tokens)] = tree.tokens
        pos[i, :len(tree.tokens)] = tree.depths
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                mask[i, 0, node] |= mask[i, 0, parent]  # a node attends to all its ancestors
    return idx, pos, mask


# -----------------------------------------------------------------------------
# losses of a batch


@torch.inference_mode()
def score_trees(model: Any, batch: Sequence[RenderedExample], device: torch.device,
                vocab_size: int) -> np.ndarray:
    """
    Summed losses (nats) of the endings of B examples, an array (B, 4). `model` must have a GPT's
    `hidden`, which takes positions and a mask.
    """
    trees = [build_prefix_tree(example) for example in batch]
    idx, pos, mask = (torch.from_numpy(array).to(device) for array in collate_trees(trees))
    N = idx.size(1)
    # for each scored token: the position that predicts it in the flattened batch, its id, and the
    # number of its ending in the batch
    scored = [(i * N + node, next_token, 4 * i + row)
              for i, tree in enumerate(trees) for node, next_token, row in tree.scored]
    all_positions, all_targets, endings = np.array(scored, dtype=np.int64).reshape(-1, 3).T
    # several endings can begin with the same tokens: compute the logits of a position once
    distinct_positions, inverse_index = np.unique(all_positions, return_inverse=True)
    positions, inverse, targets = (torch.from_numpy(array.copy()).to(device) for array in
                                   (distinct_positions, inverse_index, all_targets))
    x = model.hidden(idx, pos=pos, mask=mask).flatten(0, 1)[positions]  # (S, C)
    # -log softmax(logits)[target] = logsumexp(logits) - logits[target]
    logsumexps = torch.cat([model.lm_head(rows)[:, :vocab_size].float().logsumexp(1)
                            for rows in x.split(LOGIT_ROWS_AT_ONCE)])  # (S)
    target_logits = (x[inverse].float() * model.transformer.wte.weight[targets].float()).sum(1)
    losses = (logsumexps[inverse] - target_logits).cpu().numpy()
    return np.bincount(endings, losses, minlength=4 * len(trees)).reshape(-1, 4)


@torch.inference_mode()
def score_rows(model: Any, batch: Sequence[RenderedExample], device: torch.device,
               vocab_size: int) -> np.ndarray:
    """
    The same losses as score_trees, for any `model` with `model(idx).logits`. Every row is computed
    whole, with logits at every position.
    """
    rows = [row for example in batch for row in example.rows]
    num_scored = [count for example in batch for count in example.num_scored]
    idx = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.int64)  # (4 B, N)
    scored = []  # (row, position that predicts the token, token)
    for i, (row, count) in enumerate(zip(rows, num_scored, strict=True)):
        idx[i, :len(row)] = torch.tensor(row)
        scored += [(i, t - 1, row[t]) for t in range(len(row) - count, len(row))]
    output = model(idx.to(device))
    logits = output.logits if hasattr(output, "logits") else output[0]  # (4 B, N, V)
    endings, positions, targets = torch.tensor(scored).reshape(-1, 3).T.to(device)
    logits = logits[endings, positions, :vocab_size].float()  # (S, V)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return np.bincount(endings.cpu(), losses.cpu().numpy(), minlength=len(rows)).reshape(-1, 4)


def group_by_size(sizes: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """
    Indices of `sizes` in batches of at most `batch_tokens` tokens, padding included. A batch holds
    examples of similar size, so that padding is short. The batches are shuffled, always in the same
    way, so that the accuracy shown on the way is not that of the longest examples.
    """
    order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    batches, start = [], 0
    while start < len(order):
        B = max(batch_tokens // max(sizes[order[start]], 1), 1)
        batches.append(order[start:start + B])
        start += B
    random.Random(0).shuffle(batches)
    return batches


# -----------------------------------------------------------------------------
# accuracy


class Score(NamedTuple):
    """Integer counts over the examples that have a label."""

    total: int
    num_correct: int  # for acc: the right ending has the lowest summed loss
    num_correct_norm: int  # for acc_norm: the right ending has the lowest loss for its length
    truncated: int  # how many examples lost the left part of a context


def standard_error(num_correct: int, total: int) -> float:
    """Standard error of the accuracy num_correct / total."""
    p = num_correct / total
    return math.sqrt(p * (1 - p) / total)


def make_result(example: dict, number: int, rendered: RenderedExample,
                loss_sums: np.ndarray) -> dict:
    """
    The result of example `number`, a dict of plain values: ind, label (None if unknown), the
    predictions pred (of acc) and pred_norm (of acc_norm), loss_sums (nats) and num_tokens of the
    four endings, and truncated.
    """
    label = example.get("label")
    return {"ind": example.get("ind", number),
            "label": int(label) if label not in (None, "") else None,
            "pred": int(np.argmin(loss_sums)),
            "pred_norm": int(np.argmin(loss_sums / rendered.norm_lengths)),
            "loss_sums": loss_sums.tolist(), "num_tokens": rendered.num_scored,
            "truncated": rendered.truncated}


def count_correct(results: Sequence[dict]) -> Score:
    """The Score of a list of results of make_result."""
    labelled = [result for result in results if result["label"] is not None]
    return Score(total=len(labelled),
                 num_correct=sum(result["pred"] == result["label"] for result in labelled),
                 num_correct_norm=sum(result["pred_norm"] == result["label"]
                                      for result in labelled),
                 truncated=sum(result["truncated"] for result in labelled))


def score_hellaswag(
        model: Any, tokenizer: Tokenizer, examples: Sequence[dict], ranks: Ranks,
        lm_eval_style: bool = False, batch_tokens: int | None = None,
        on_result: Callable[[int, dict], Any] | None = None,
        stop: Callable[[], bool] = lambda: False) -> Score:
    """
    The Score of a model over the examples of all ranks. `model` is a GPT, or any model with
    `model(idx).logits`. Rank r scores the examples r, r + world_size, r + 2 world_size, ...

    `on_result(number, result)` is called for every example of this rank, in a mixed order, with
    what make_result returns. If `stop()` returns true, the remaining examples are not scored.
    """
    if batch_tokens is None:  # enough for two CPU cores or a GPU, in less than 1 GB
        batch_tokens = 1024 if ranks.device.type == "cpu" else 8192
    block_size = getattr(model.config, "block_size", None) or model.config.n_positions
    numbers = range(ranks.ddp_rank, len(examples), ranks.ddp_world_size)  # this rank's examples
    rendered = render_examples(
        [examples[number] for number in numbers], tokenizer, block_size, lm_eval_style)
    if hasattr(model, "hidden"):
        score_batch = score_trees
        sizes = [len(build_prefix_tree(example).tokens) for example in rendered]
    else:
        score_batch = score_rows
        sizes = [4 * max(map(len, example.rows)) for example in rendered]
        batch_tokens = min(batch_tokens, 1024)  # their logits take 200 MB
    results = []
    for batch in group_by_size(sizes, batch_tokens):
        if stop():
            break
        loss_sums = score_batch(
            model, [rendered[i] for i in batch], ranks.device, tokenizer.vocab_size)  # (B, 4)
        for i, ending_sums in zip(batch, loss_sums, strict=True):
            number = numbers[i]
            result = make_result(examples[number], number, rendered[i], ending_sums)
            results.append(result)
            if on_result:
                on_result(number, result)
    return Score(*(int(total) for total in sum_over_ranks(count_correct(results), ranks.device)))


def summarize_accuracy(
        model: Any, tokenizer: Tokenizer, examples: Sequence[dict], ranks: Ranks,
        stop: Callable[[], bool] = lambda: False) -> tuple[str, float]:
    """
    (line to print, acc_norm) of a model over the examples of all ranks. Without a meaning if
    `stop()` ends it early.
    """
    start = time.perf_counter()
    score = score_hellaswag(model, tokenizer, examples, ranks, stop=stop)
    total, correct = max(score.total, 1), score.num_correct_norm
    line = (f"HellaSwag accuracy: {correct}/{total}={correct / total:.4f} | standard error "
            f"{standard_error(correct, total):.4f} | {time.perf_counter() - start:.1f}s")
    return line, correct / total
