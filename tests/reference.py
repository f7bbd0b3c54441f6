"""
References: the slow, obvious way to score HellaSwag and CORE, one example at a time. The tests
compare gpt2lab.scoring and gpt2lab.core with them, and the benchmarks of dev measure both.
"""

import random
from typing import NamedTuple

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


# -----------------------------------------------------------------------------
# CORE, by the algorithm of nanochat's core_eval


class CoreScore(NamedTuple):
    """What the reference finds of an item."""

    correct: bool
    mean_losses: list[float]  # of each scored row, in nats a token; NaN if none is scored
    num_scored: list[int]  # tokens of each row
    num_computed: int  # tokens that the model computed, padding included


def order_core_items(items):
    """The items of a task in the order in which they are numbered."""
    items = items[:]
    random.Random(1337).shuffle(items)
    return items


def word_core_item(task, item, number):
    """(the text before the delimiter, the text after it) of an item's choice or context."""
    if task.kind == "multiple_choice":
        return str(item["query"]), str(item["choices"][number])
    if task.kind == "schema":
        return str(item["context_options"][number]), str(item["continuation"])
    return str(item["context"]).strip(), str(item["continuation"])


def draw_core_shots(num_items, shots, index):
    """The indices of the solved items in front of item `index`."""
    others = [i for i in range(num_items) if i != index]
    return random.Random(1234 + index).sample(others, shots)


def word_core_prompts(task, items, index):
    """The prompts of an item, with the solved items in front of each."""
    start = ""
    for i in draw_core_shots(len(items), task.shots, index):
        question, answer = word_core_item(task, items[i], items[i].get("gold"))
        start += question + task.delimiter + answer + "\n\n"
    if task.kind == "language_modeling":
        question, answer = word_core_item(task, items[index], None)
        return [(start + question + task.delimiter).strip(),
                start + question + task.delimiter + answer]
    options = items[index]["context_options" if task.kind == "schema" else "choices"]
    return [start + task.delimiter.join(word_core_item(task, items[index], number))
            for number in range(len(options))]


def find_core_spans(task, rows):
    """(rows, spans) that are scored. A span (start, end) counts the tokens of its row from 0."""
    if task.kind == "language_modeling":
        without, whole = rows
        assert whole[:len(without)] == without
        return [whole], [(len(without), len(whole))]
    same, shortest = 0, min(map(len, rows))
    if task.kind == "schema":
        while same < shortest and all(row[-1 - same] == rows[0][-1 - same] for row in rows):
            same += 1
        return rows, [(len(row) - same, len(row)) for row in rows]
    while same < shortest and all(row[same] == rows[0][same] for row in rows):
        same += 1
    return rows, [(same, len(row)) for row in rows]


def crop_core_rows(rows, spans, block_size):
    """(rows, spans) of the last `block_size` tokens. The first token is never predicted."""
    excess = [max(len(row) - block_size, 0) for row in rows]
    return ([row[-block_size:] for row in rows],
            [(max(start - cut, 1), max(end - cut, 1))
             for (start, end), cut in zip(spans, excess, strict=True)])


@torch.inference_mode()
def score_core_item(model, tokenizer, task, items, index):
    """
    The CoreScore of one item. One forward computes its rows, padded at the right, with logits over
    the whole vocabulary at every position.
    """
    rows = [[tokenizer.eot, *tokenizer.encode(prompt)]
            for prompt in word_core_prompts(task, items, index)]
    rows, spans = crop_core_rows(*find_core_spans(task, rows), model.config.block_size)
    idx = torch.full((len(rows), max(map(len, rows))), tokenizer.eot)  # (R, N)
    for i, row in enumerate(rows):
        idx[i, :len(row)] = torch.tensor(row)
    logits = model(idx)[0][..., :tokenizer.vocab_size].float()  # (R, N, V)
    losses = F.cross_entropy(logits.flatten(0, 1), idx.roll(-1, dims=1).flatten(),
                             reduction="none").view(idx.shape)  # (R, N)
    losses[:, -1] = float("nan")  # the last position predicts nothing
    means = [losses[i, start - 1:end - 1].mean().item() for i, (start, end) in enumerate(spans)]
    if task.kind == "language_modeling":
        (start, end), = spans
        correct = bool((logits[0, start - 1:end - 1].argmax(-1) == idx[0, start:end]).all())
    else:
        correct = means.index(min(means)) == items[index]["gold"]
    return CoreScore(correct, means, [end - start for start, end in spans], idx.numel())
