"""
Losses of continuations: prefix trees, batches of them, and the accuracy that follows.

The rows of an example begin alike, for example a question with each of its answers. score_trees
computes them as one prefix tree, in which every token is computed once and attends only to its
ancestors. score_rows computes every row whole, for models that cannot take a prefix tree.

score_examples scores the examples of any task. For HellaSwag, `prepare` turns examples into
batches, which score_hellaswag scores. Training prepares them once and scores them many times.

`model` is a GPT of train_gpt2.py. Its type here is Any, because gpt2lab does not import scripts.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2lab.device import attention_of_any_shape
from gpt2lab.distributed import Ranks, sum_over_ranks
from gpt2lab.tasks import RenderedExample, load_evenly_spaced, render_examples
from gpt2lab.tokenizer import Tokenizer

LOGIT_ROWS_AT_ONCE = 256  # 256 rows of 50,304 float32 logits take 52 MB

# -----------------------------------------------------------------------------
# prefix trees


class Rows(NamedTuple):
    """An example as token ids: rows of at least one token, each a context and then an ending."""

    rows: list[list[int]]
    num_scored: list[int]  # how many tokens at the end of each row are scored


class PrefixTree(NamedTuple):
    """
    The prefix tree of an example's rows. A node stands for a token together with all tokens before
    it, so rows share the nodes of their common beginning. Nodes are numbered, parents first.
    """

    tokens: list[int]  # the token of each node
    parents: list[int]  # the node of the token before, -1 at the beginning of a row
    depths: list[int]  # the position in the row
    scored: np.ndarray  # (S, 3) int32: (node, next token, row) for each token of each ending


def build_prefix_tree(rows: list[list[int]], num_scored: list[int]) -> PrefixTree:
    """The prefix tree of some Rows, without the last token of each row, which predicts nothing."""
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    scored: list[tuple[int, int, int]] = []
    nodes: dict[tuple[int, int], int] = {}  # (parent, token): node
    for i, (row, count) in enumerate(zip(rows, num_scored, strict=True)):
        parent = -1
        for depth, (token, next_token) in enumerate(pairwise(row)):
            node = nodes.get((parent, token))
            if node is None:
                node = nodes[parent, token] = len(tokens)
                tokens.append(token)
                parents.append(parent)
                depths.append(depth)
            if depth + 1 >= len(row) - count:
                scored.append((node, next_token, i))
            parent = node
    return PrefixTree(tokens, parents, depths, np.array(scored, dtype=np.int32).reshape(-1, 3))


class TreeBatch(NamedTuple):
    """
    B prefix trees of at most N nodes as arrays, with S scored tokens. The logits of a position
    predict the tokens that follow it in several endings, so there are P <= S positions.
    """

    idx: np.ndarray  # (B, N) int32, padded at the right
    pos: np.ndarray  # (B, N) int32, padded at the right
    # (B, 1, N, N / 8) uint8: the mask, eight values a byte. None if every tree has a single row,
    # because causal attention is then the same, and faster
    mask_bits: np.ndarray | None
    positions: np.ndarray  # (P) int32, in the flattened idx: where logits are needed
    inverse: np.ndarray  # (S) int32: which of the positions predicts each scored token
    targets: np.ndarray  # (S) int32: the scored tokens
    endings: np.ndarray  # (S) int32: whose ending it is, a row among the R rows of all trees
    num_rows: list[int]  # of each tree. They add up to R

    def mask(self) -> np.ndarray | None:
        """(B, 1, N, N) bool. mask[b, 0, i, j] is True where node i of tree b attends to node j."""
        if self.mask_bits is None:
            return None
        return np.unpackbits(self.mask_bits, axis=-1).view(bool)


def padded_size(num_nodes: int) -> int:
    """The nodes of a prefix tree in a batch: a multiple of 8, so that the same shapes come back."""
    return math.ceil(max(num_nodes, 1) / 8) * 8


def tree_mask(parents: list[int], N: int) -> np.ndarray:
    """(N, N) bool, True where a node of a prefix tree attends to another: itself, its ancestors."""
    # padding attends to itself, because a softmax over nothing is NaN
    mask = np.eye(N, dtype=bool)
    # nodes follow each other in runs, in which each is the parent of the next
    starts = [node for node, parent in enumerate(parents) if parent != node - 1 or node == 0]
    for start, end in pairwise([*starts, len(parents)]):
        mask[start:end, start:end] = np.tri(end - start, dtype=bool)
        if parents[start] >= 0:
            mask[start:end, :start] = mask[parents[start], :start]
    return mask


def collate_trees(trees: Sequence[PrefixTree], num_rows: list[int]) -> TreeBatch:
    """The batch of some prefix trees. `num_rows` says how many rows each tree holds."""
    N = padded_size(max(len(tree.tokens) for tree in trees))
    idx, pos = np.zeros((2, len(trees), N), dtype=np.int32)
    for i, tree in enumerate(trees):
        idx[i, :len(tree.tokens)] = tree.tokens
        pos[i, :len(tree.tokens)] = tree.depths
    mask_bits = None
    if max(num_rows) > 1:
        mask_bits = np.packbits([[tree_mask(tree.parents, N)] for tree in trees], axis=-1)
    first_rows = np.cumsum([0, *num_rows])
    scored = np.concatenate([tree.scored + np.array([i * N, 0, first_rows[i]], dtype=np.int32)
                             for i, tree in enumerate(trees)])  # (S, 3)
    all_positions, targets, endings = scored.T.copy()
    # several endings can begin with the same tokens: compute the logits of a position once
    positions, inverse = np.unique(all_positions, return_inverse=True)
    return TreeBatch(idx, pos, mask_bits, positions, inverse.astype(np.int32), targets, endings,
                     num_rows)


# -----------------------------------------------------------------------------
# losses of a batch


class TokenScores(NamedTuple):
    """What a model finds of S scored tokens, each with the tokens before it in its row."""

    losses: np.ndarray  # (S) float32, in nats
    greedy: np.ndarray  # (S) bool: whether this token is the likeliest one
    endings: np.ndarray  # (S) int: the row of each, in increasing order


def hidden_at(model: Any, idx: Tensor, pos: Tensor, mask: Tensor | None,
              positions: Tensor) -> Tensor:
    """
    The hidden states (P, C) of a GPT at some of its B * N positions, (P). They are those of
    model.hidden(idx, pos=pos, mask=mask), but no other position needs the last MLP, which is two
    thirds of the last layer.
    """
    *blocks, last = model.transformer.h
    x = model.transformer.wte(idx) + model.transformer.wpe(pos)  # (B, N, C)
    for block in blocks:
        x = block(x, mask=mask)
    x = (x + last.attn(last.ln_1(x), mask=mask)).flatten(0, 1)[positions]  # (P, C)
    x = x + last.mlp(last.ln_2(x))
    return model.transformer.ln_f(x)


@torch.inference_mode()
def score_trees(model: Any, batch: TreeBatch, device: torch.device, vocab_size: int) -> TokenScores:
    """The scores of the tokens of a batch, by a GPT."""
    mask = batch.mask()
    mask = None if mask is None else torch.from_numpy(mask).to(device)  # (B, 1, N, N)
    idx, pos, positions, inverse, targets = (
        torch.from_numpy(array).to(device).long()
        for array in (batch.idx, batch.pos, batch.positions, batch.inverse, batch.targets))
    x = hidden_at(model, idx, pos, mask, positions)  # (P, C)
    # -log softmax(logits)[target] = logsumexp(logits) - logits[target]
    logsumexps, likeliest = [], []
    for rows in x.split(LOGIT_ROWS_AT_ONCE):
        logits = model.lm_head(rows)[:, :vocab_size].float()  # (rows, vocab_size)
        logsumexps.append(logits.logsumexp(1))
        likeliest.append(logits.argmax(1))
    target_logits = (x[inverse].float() * model.transformer.wte.weight[targets].float()).sum(1)
    losses = torch.cat(logsumexps)[inverse] - target_logits  # (S)
    greedy = torch.cat(likeliest)[inverse] == targets  # (S)
    return TokenScores(losses.cpu().numpy(), greedy.cpu().numpy(), batch.endings)


@torch.inference_mode()
def score_rows(model: Any, batch: Sequence[RenderedExample], device: torch.device,
               vocab_size: int) -> TokenScores:
    """
    The scores of score_trees, for any `model` with `model(idx).logits`. Every row is computed
    whole, with logits at every position.
    """
    rows = [row for example in batch for row in example.rows]
    num_scored = [count for example in batch for count in example.num_scored]
    idx = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.int64)  # (R, N)
    scored = []  # (row, position that predicts the token, token)
    for i, (row, count) in enumerate(zip(rows, num_scored, strict=True)):
        idx[i, :len(row)] = torch.tensor(row)
        scored += [(i, t - 1, row[t]) for t in range(len(row) - count, len(row))]
    output = model(idx.to(device))
    logits = output.logits if hasattr(output, "logits") else output[0]  # (R, N, V)
    endings, positions, targets = torch.tensor(scored).reshape(-1, 3).T.to(device)
    logits = logits[endings, positions, :vocab_size].float()  # (S, V)
    losses = F.cross_entropy(logits, targets, reduction="none")
    greedy = logits.argmax(1) == targets
    return TokenScores(losses.cpu().numpy(), greedy.cpu().numpy(), endings.cpu().numpy())


def sum_losses(scores: TokenScores, num_rows: int) -> np.ndarray:
    """The summed losses (nats) of the endings of all rows, an array (num_rows)."""
    return np.bincount(scores.endings, scores.losses, minlength=num_rows)


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
# the examples of any task


class ExampleScores(NamedTuple):
    """What a model finds of the endings of an example's R rows."""

    loss_sums: np.ndarray  # (R) float64: the summed loss of each ending, in nats
    all_greedy: np.ndarray  # (R) bool: whether each of its tokens is the likeliest one
    last_greedy: np.ndarray  # (R) bool: whether its last token is the likeliest one


def default_batch_tokens(device: torch.device) -> int:
    """How many tokens are scored at once: enough for two CPU cores or a GPU, in less than 1 GB."""
    return 1024 if device.type == "cpu" else 8192


class Part(NamedTuple):
    """A prefix tree that holds all rows of an example, or one of them."""

    example: int
    row_numbers: list[int]  # of the example's rows
    tree: PrefixTree


def split_example(number: int, example: Rows) -> list[Part]:
    """
    The Parts of an example: one if all rows begin with the same token, else one for each row. Rows
    that lost their left parts share nothing, and would make the mask of one tree large.
    """
    row_numbers = list(range(len(example.rows)))
    if len({row[0] for row in example.rows}) == 1:
        return [Part(number, row_numbers, build_prefix_tree(*example))]
    return [Part(number, [i], build_prefix_tree([row], [count]))
            for i, row, count in zip(row_numbers, example.rows, example.num_scored, strict=True)]


def score_endings(model: Any, parts: Sequence[Part], device: torch.device,
                  vocab_size: int) -> ExampleScores:
    """The scores of the rows of all `parts`, one after the other, which are a batch of trees."""
    num_rows = [len(part.row_numbers) for part in parts]
    batch = collate_trees([part.tree for part in parts], num_rows)
    with attention_of_any_shape(device):
        scores = score_trees(model, batch, device, vocab_size)
    misses = np.bincount(scores.endings, ~scores.greedy, minlength=sum(num_rows))
    last_greedy = np.ones(sum(num_rows), dtype=bool)
    last_greedy[scores.endings] = scores.greedy  # a row's last token is the last one to be written
    return ExampleScores(sum_losses(scores, sum(num_rows)), misses == 0, last_greedy)


def score_examples(model: Any, examples: Sequence[Rows], device: torch.device, vocab_size: int,
                   batch_tokens: int | None = None) -> Iterator[tuple[int, ExampleScores]]:
    """
    Yield (index, ExampleScores) for each of the `examples`, in a mixed order. `model` is a GPT. No
    row may be longer than its block_size or without a token, or have all of its tokens scored,
    because no token comes before the first one.
    """
    parts = [part for i, example in enumerate(examples) for part in split_example(i, example)]
    results = [ExampleScores(np.zeros(len(example.rows)), *np.ones((2, len(example.rows)), bool))
               for example in examples]
    missing = [len(example.rows) for example in examples]  # rows without scores so far
    sizes = [padded_size(len(part.tree.tokens)) for part in parts]
    for group in group_by_size(sizes, batch_tokens or default_batch_tokens(device)):
        batch = [parts[i] for i in group]
        scores = score_endings(model, batch, device, vocab_size)
        start = 0
        for number, row_numbers, _ in batch:
            end = start + len(row_numbers)
            for whole, part in zip(results[number], scores, strict=True):
                whole[row_numbers] = part[start:end]
            start, missing[number] = end, missing[number] - len(row_numbers)
            if not missing[number]:
                yield number, results[number]


# -----------------------------------------------------------------------------
# HellaSwag's examples in batches


class Question(NamedTuple):
    """What make_result needs of an example, besides the losses of its endings."""

    number: int  # its place among the examples of all ranks
    ind: int  # its number in the official file
    label: int | None  # the right ending, None if unknown
    num_tokens: list[int]  # how many tokens of each ending are scored
    norm_lengths: list[int]  # acc_norm divides the summed loss of each ending by these
    truncated: bool  # whether a context lost its left part


class PreparedExamples(NamedTuple):
    """
    The examples of one rank in batches. All 10,042 official examples take 90 MB on one rank, for a
    GPT and the gpt2 tokenizer.
    """

    batches: list[tuple[list[Question], TreeBatch | list[RenderedExample]]]
    vocab_size: int  # of the tokenizer


def prepare(model: Any, tokenizer: Tokenizer, examples: Sequence[dict], ranks: Ranks,
            lm_eval_style: bool = False, batch_tokens: int | None = None) -> PreparedExamples:
    """
    Prepare this rank's share of the examples for score_hellaswag, in batches of at most
    `batch_tokens` tokens. Rank r scores the examples r, r + world_size, r + 2 world_size, ...

    The batches suit any model of the class and block_size of `model`.
    """
    batch_tokens = batch_tokens or default_batch_tokens(ranks.device)
    block_size = getattr(model.config, "block_size", None) or model.config.n_positions
    numbers = range(ranks.ddp_rank, len(examples), ranks.ddp_world_size)
    rendered = render_examples(
        [examples[number] for number in numbers], tokenizer, block_size, lm_eval_style)
    questions = [make_question(number, examples[number], rendering)
                 for number, rendering in zip(numbers, rendered, strict=True)]
    if hasattr(model, "hidden"):
        trees = [build_prefix_tree(example.rows, example.num_scored) for example in rendered]
        groups = group_by_size([padded_size(len(tree.tokens)) for tree in trees], batch_tokens)
        inputs: list = [collate_trees([trees[i] for i in group], [4] * len(group))
                        for group in groups]
    else:  # with 1,024 tokens, the logits take 200 MB
        sizes = [4 * max(map(len, example.rows)) for example in rendered]
        groups = group_by_size(sizes, min(batch_tokens, 1024))
        inputs = [[rendered[i] for i in group] for group in groups]
    batches = [([questions[i] for i in group], batch)
               for group, batch in zip(groups, inputs, strict=True)]
    return PreparedExamples(batches, tokenizer.vocab_size)


def prepare_for_training(model: Any, tokenizer: Tokenizer, config: Any,
                         ranks: Ranks) -> PreparedExamples | None:
    """
    The HellaSwag examples that a TrainConfig asks for, prepared for its evaluations. None, on every
    rank, if hellaswag_every is 0 or the official file cannot be downloaded.
    """
    if not config.hellaswag_every:
        return None
    examples = load_evenly_spaced(config.hellaswag_limit, ranks)
    return prepare(model, tokenizer, examples, ranks) if examples else None


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


def mcnemar(only_a: int, only_b: int) -> float:
    """
    Two-sided p-value of McNemar's exact test: the probability that only_a + only_b tosses of a fair
    coin split at least as unevenly as only_a : only_b. only_a counts the examples that only model a
    has right, only_b those that only model b has right.
    """
    n = only_a + only_b
    outcomes = 1  # how many of the 2**n outcomes have k heads, beginning with k = 0
    tail = 1  # how many have at most k heads
    for k in range(1, min(only_a, only_b) + 1):
        outcomes = outcomes * (n - k + 1) // k  # n choose k
        tail += outcomes
    return min(1.0, 2 * tail / 2 ** n)


def make_question(number: int, example: dict, rendered: RenderedExample) -> Question:
    """The Question for example `number`, which has a label or none."""
    label = example.get("label")
    return Question(number, example.get("ind", number),
                    int(label) if label not in (None, "") else None,
                    rendered.num_scored, rendered.norm_lengths, rendered.truncated)


def make_result(question: Question, loss_sums: np.ndarray) -> dict:
    """
    The result of a question, a dict of plain values: ind, label (None if unknown), the predictions
    pred (of acc) and pred_norm (of acc_norm), loss_sums (nats) and num_tokens of the four endings,
    and truncated.
    """
    return {"ind": question.ind, "label": question.label, "pred": int(np.argmin(loss_sums)),
            "pred_norm": int(np.argmin(loss_sums / question.norm_lengths)),
            "loss_sums": loss_sums.tolist(), "num_tokens": question.num_tokens,
            "truncated": question.truncated}


def count_correct(results: Sequence[dict]) -> Score:
    """The Score of a list of results of make_result."""
    labelled = [result for result in results if result["label"] is not None]
    return Score(total=len(labelled),
                 num_correct=sum(result["pred"] == result["label"] for result in labelled),
                 num_correct_norm=sum(result["pred_norm"] == result["label"]
                                      for result in labelled),
                 truncated=sum(result["truncated"] for result in labelled))


def score_hellaswag(
        model: Any, prepared: PreparedExamples, ranks: Ranks,
        on_result: Callable[[int, dict], Any] | None = None,
        stop: Callable[[], bool] = lambda: False) -> Score:
    """
    The Score of a model over the examples that all ranks have prepared. `model` is a GPT, or any
    model with `model(idx).logits`.

    `on_result(number, result)` is called for every example of this rank, in a mixed order, with
    what make_result returns. If `stop()` returns true, the remaining examples are not scored.
    """
    score_batch: Callable = score_trees if hasattr(model, "hidden") else score_rows
    results = []
    for questions, batch in prepared.batches:
        if stop():
            break
        with attention_of_any_shape(ranks.device):
            scores = score_batch(model, batch, ranks.device, prepared.vocab_size)
        loss_sums = sum_losses(scores, 4 * len(questions)).reshape(-1, 4)
        for question, ending_sums in zip(questions, loss_sums, strict=True):
            result = make_result(question, ending_sums)
            results.append(result)
            if on_result:
                on_result(question.number, result)
    return Score(*(int(total) for total in sum_over_ranks(count_correct(results), ranks.device)))


def summarize_accuracy(
        model: Any, prepared: PreparedExamples, ranks: Ranks,
        stop: Callable[[], bool] = lambda: False) -> tuple[str, float]:
    """
    (line to print, acc_norm) of a model over the examples of all ranks. Without a meaning if
    `stop()` ends it early.
    """
    start = time.perf_counter()
    score = score_hellaswag(model, prepared, ranks, stop=stop)
    total, correct = max(score.total, 1), score.num_correct_norm
    line = (f"HellaSwag accuracy: {correct}/{total}={correct / total:.4f} | standard error "
            f"{standard_error(correct, total):.4f} | {time.perf_counter() - start:.1f}s")
    return line, correct / total
