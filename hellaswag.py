"""
HellaSwag (Zellers et al. 2019): four ways to go on, one of them right; which is the likeliest?

    python hellaswag.py                       # newest checkpoint in log/, else gpt2
    python hellaswag.py --model gpt2-xl --device=mps
    torchrun --nproc_per_node=8 hellaswag.py --model gpt2 --out results.jsonl
    python hellaswag.py --compare a.jsonl b.jsonl

The completion style of build-nanogpt and llm.c: the context as it is, each ending after a space;
the prediction is the ending with the lowest loss, summed (acc) or averaged over its tokens
(acc_norm). GPT-2 124M has acc 0.2859 and acc_norm 0.2955.

The four sequences of an example begin alike. They are scored as a tree (the context its trunk, the
endings its branches) in which every token is computed once and sees only its ancestors.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import time
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

import fineweb
from cli import keep_memory
from devices import init_distributed, sum_over_ranks
from fineweb import UserError

ROWS_OF_LOGITS = 256  # at once: 51 MB

# -----------------------------------------------------------------------------
# the examples

DATA_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
DATA_FILE = Path("hellaswag") / "hellaswag_val.jsonl"
OFFICIAL = {  # bytes and sha256 of the files
    "train": (47_496_131, "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d"),
    "val": (12_246_618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
    "test": (11_752_147, "da082b00543e422b8d25394614d102944586986def4de5cd1bd36d86bcb76261"),
}


def download(split="val"):
    """
    Path of a split's official file, fetched unless it is there: train, val (10,042 examples) or
    test. HELLASWAG_URL names a mirror, "{split}" in it stands for the split. Raises OSError when
    the network fails five times or the file is not the official one.
    """
    path = DATA_FILE.with_name(f"hellaswag_{split}.jsonl")
    if path.is_file():
        return path
    import requests
    url = os.environ.get("HELLASWAG_URL", DATA_URL).replace("{split}", split)
    size, sha256 = OFFICIAL[split]
    for attempt in range(5):
        try:
            response = requests.get(url, timeout=30)
            response.raise_for_status()
            if len(response.content) < size:
                raise requests.ConnectionError(f"{len(response.content)} of {size} bytes came")
            break
        except requests.RequestException as error:
            if attempt == 4:
                raise OSError(f"cannot download {url} ({error}); set HELLASWAG_URL to a mirror, or "
                              f"put the file at {path}") from error
            time.sleep(0.5 * 2 ** attempt)
    if hashlib.sha256(response.content).hexdigest() != sha256:
        raise OSError(f"{url} is not the official {split} file (its sha256 differs)")
    path.parent.mkdir(exist_ok=True)
    fineweb.write_atomically(path, lambda file: file.write(response.content))
    return path


def iterate_examples(path, fields=("ctx", "endings", "label")):
    """
    Yield the examples of a HellaSwag .jsonl file: dicts with at least `fields`. Raises UserError
    that names the line and what it lacks.
    """
    number = 1
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):  # noqa: B007, errors tell the number
                yield parse_example(line, fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}, line {number} is no HellaSwag example: {error}") from error
    except KeyError as error:
        raise UserError(f"{path}, line {number} lacks {error.args[0]}") from error


def load_evenly_spaced(limit, processes):
    """
    Up to `limit` val examples (0: all on CUDA, 200 elsewhere) for evaluation during training, the
    same ones on every process; none, and a warning, where there is no file to be had.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on every node
        try:
            download()
        except OSError as error:
            print(f"warning: training goes on without HellaSwag: {error}")
    sum_over_ranks([0], processes.device)  # wait for it
    # everybody or nobody, or processes would part ways
    if sum_over_ranks([not DATA_FILE.is_file()], processes.device)[0]:
        return []
    examples = list(iterate_examples(DATA_FILE))
    limit = limit or (len(examples) if processes.device.type == "cuda" else 200)
    stride = max(len(examples) / limit, 1)  # evenly spaced, since the file is sorted by kind
    return [examples[int(i * stride)] for i in range(min(limit, len(examples)))]


def parse_example(line, fields):
    """The example in a line of JSON; raises one of several errors if it is none."""
    example = json.loads(line)
    missing = [field for field in fields if field not in example]
    if missing:
        raise KeyError(", ".join(missing))
    texts = [example[field] for field in fields if field not in ("endings", "label")]
    good = (len(example["endings"]) == 4
            and all(isinstance(text, str) for text in (*texts, *example["endings"]))
            and ("label" not in fields or int(example["label"]) in range(4)))
    if not good:
        raise KeyError("texts, four endings or a label from 0 to 3")
    return example


def clean_text(text):
    """Text of an example as the Eleuther harness (lm-eval, its task hellaswag) cleans it."""
    # WikiHow's marks: [title] stands between sentences, [header], [step] and others go
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def harness_texts(example):
    """(context, endings) as the Eleuther harness words them: cleaned, after the activity."""
    context = f"{example['ctx_a']} {example['ctx_b'].capitalize()}"
    context = clean_text(f"{example['activity_label']}: {context}")
    return context, [clean_text(ending) for ending in example["endings"]]


class Rendered(NamedTuple):
    """An example as token ids: four sequences, each a context and one of the endings."""

    rows: list  # four lists of token ids
    counts: list  # how many tokens at the end of each row are scored
    lengths: list  # what a loss is divided by for acc_norm
    truncated: bool  # whether a context lost its left part


def render_examples(examples, tokenizer, block_size, lm_eval_style=False):
    """
    A list of Rendered. A row longer than `block_size` loses the left part of its context. In
    `lm_eval_style`, context and ending are encoded together, split where the context by itself
    would end, and a loss is divided by the characters of the ending.
    """
    texts = []
    for example in examples:
        if lm_eval_style:
            context, endings = harness_texts(example)
            texts += [context.rstrip(), *(f"{context} {ending}" for ending in endings)]
        else:
            texts += [example["ctx"], *(" " + ending for ending in example["endings"])]
    encoded = iter(tokenizer.encode_batch(texts))
    rendered = []
    for example in examples:
        context, *endings = (tokens.tolist() for tokens in islice(encoded, 5))
        if lm_eval_style:
            endings = [tokens[len(context):] for tokens in endings]
        rows = [(context + ending)[-block_size:] for ending in endings]
        # nothing predicts the first token of a row
        counts = [max(min(len(ending), len(row) - 1), 0)
                  for ending, row in zip(endings, rows, strict=True)]
        lengths = ([max(len(ending), 1) for ending in harness_texts(example)[1]]
                   if lm_eval_style else [max(count, 1) for count in counts])
        truncated = any(len(context) + len(ending) > block_size for ending in endings)
        rendered.append(Rendered(rows, counts, lengths, truncated))
    return rendered


# -----------------------------------------------------------------------------
# scoring


class Tree(NamedTuple):
    """The prefix tree of an example's rows; a node is a token after all of its ancestors."""

    tokens: list
    parents: list  # the node before, -1 for none
    depths: list  # positions in the sequence
    scored: list  # (node, next token, row) for each token of each ending


def plant(rendered):
    """Tree of a Rendered. The last token of a row is not in it: nothing comes after."""
    tree, nodes = Tree([], [], [], []), {}
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


def stack_trees(trees):
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
    trees = [plant(rendered) for rendered in batch]
    arrays = stack_trees(trees)
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


# -----------------------------------------------------------------------------
# evaluation


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
        sizes = [len(plant(r).tokens) for r in rendered]
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


# -----------------------------------------------------------------------------
# comparing two models


def summarize(model, tokenizer, examples, processes, stop=lambda: False):
    """(a line about the accuracy on examples, the accuracy), over all processes."""
    start = time.time()
    total, _, correct, _ = evaluate(model, tokenizer, examples, *processes, stop=stop)
    total = max(total, 1)
    line = (f"HellaSwag accuracy: {correct}/{total}={correct / total:.4f} | standard error "
            f"{standard_error(correct, total):.4f} | {time.time() - start:.1f}s")
    return line, correct / total


def mcnemar(only_a, only_b):
    """
    Two-sided p of McNemar's exact test: how often a fair coin parts the examples that just one of
    two models has right at least as unevenly as `only_a` to `only_b`.
    """
    n = only_a + only_b
    tail = ways = 1  # of n tosses, with 0 heads
    for k in range(1, min(only_a, only_b) + 1):
        ways = ways * (n - k + 1) // k  # n choose k
        tail += ways
    return min(1.0, 2 * tail / 2 ** n)


def read_results(path):
    """{ind: result} of a file written by --out. Raises UserError if it is none."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        return {row["ind"]: (row["label"], row["pred"], row["pred_norm"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by hellaswag.py --out") from error


def compare(path_a, path_b):
    """Print how two files of --out agree, and whether their accuracies differ beyond chance."""
    a, b = read_results(path_a), read_results(path_b)
    common = [ind for ind in a if ind in b and a[ind][0] is not None and a[ind][0] == b[ind][0]]
    if not common:
        raise UserError(f"{path_a} and {path_b} have no labelled example in common")
    print(f"{len(common)} examples in common, of {len(a)} and {len(b)}")
    for name, field in (("acc", 1), ("acc_norm", 2)):
        same = sum(a[ind][field] == b[ind][field] for ind in common)
        right_a = {ind for ind in common if a[ind][field] == a[ind][0]}
        right_b = {ind for ind in common if b[ind][field] == b[ind][0]}
        only_a, only_b = len(right_a - right_b), len(right_b - right_a)
        print(f"{name}: {len(right_a) / len(common):.4f} and {len(right_b) / len(common):.4f} | "
              f"same prediction: {same / len(common):.4f} | only the first right: {only_a}, "
              f"only the second: {only_b} | McNemar's exact p = {mcnemar(only_a, only_b):.4g}")


# -----------------------------------------------------------------------------
# the command line


def parse_args():
    """The flags. Raises UserError for those that do not go together."""
    parser = fineweb.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint, log folder, Hugging Face folder or hub name "
                        "(default: newest checkpoint in log/, else gpt2)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--split", choices=tuple(OFFICIAL), default="val",
                        help="test has no labels: use it with --out (%(default)s)")
    parser.add_argument("--data", help="a HellaSwag .jsonl file (default: the official one)")
    parser.add_argument("--limit", type=int, help="score only the first N examples")
    parser.add_argument("--batch_tokens", type=int, help="tokens scored at once, padding included "
                        "(default: 1024 on CPU, else 8192)")
    parser.add_argument("--lm_eval_style", action="store_true",
                        help="text and normalisation of the Eleuther harness (lm-eval)")
    parser.add_argument("--out", help="write a line of JSON for each example to this file")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"),
                        help="compare two files written with --out, and do nothing else")
    args = parser.parse_args()
    for name in ("limit", "batch_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    return args


def load_examples(args, processes):
    """The examples that the command line asks for; the master downloads, the others wait."""
    if args.data is None:
        if processes.master_process:
            download(args.split)
        sum_over_ranks([0], processes.device)
    path = Path(args.data) if args.data else download(args.split)
    fields = ["endings"]
    fields += ["activity_label", "ctx_a", "ctx_b"] if args.lm_eval_style else ["ctx"]
    fields += ["label"] if args.split != "test" else []
    examples = list(islice(iterate_examples(path, fields), args.limit))
    if not examples:
        raise UserError(f"{path} holds no example")
    return examples


def report(score, num_results):
    """Print standard errors and, on the last line, accuracies."""
    if score.truncated:
        print(f"{score.truncated} contexts lost their left part: they exceed the block_size")
    if not score.total:
        print(f"{num_results} examples scored, none with a label")
        return
    total, num_correct, num_correct_norm, _ = score
    print(f"standard error: acc {standard_error(num_correct, total):.4f}, "
          f"acc_norm {standard_error(num_correct_norm, total):.4f}")
    print(f"acc: {num_correct}/{total}={num_correct / total:.4f} | "
          f"acc_norm: {num_correct_norm}/{total}={num_correct_norm / total:.4f}")


def write_results(path, results, processes):
    """Write the (number, result) pairs of all ranks in the order of the examples, a line each."""
    if dist.is_initialized():
        shares = [None] * processes.ddp_world_size
        dist.all_gather_object(shares, results)
        results = [pair for share in shares for pair in share]
    if processes.master_process:
        results = sorted(results, key=lambda pair: pair[0])
        text = "".join(json.dumps(result) + "\n" for _, result in results)
        fineweb.write_atomically(Path(path), lambda file: file.write(text.encode("utf-8")))


def run(args, processes):
    """Score the model that the command line names, and print and write what it asks for."""
    from sample import default_model
    from train_gpt2 import load_model, load_tokenizer
    device, rank, world_size = processes
    examples = load_examples(args, processes)
    source = args.model or default_model()
    model, tokenizer = load_model(source, device), load_tokenizer(source)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"the tokenizer of {source} has {tokenizer.vocab_size} tokens, the model "
                        f"only {model.config.vocab_size}: put its tokenizer.json beside it")
    results, right = [], 0
    progress = tqdm(total=len(range(rank, len(examples), world_size)), unit="ex",
                    desc=f"HellaSwag, {source}", disable=rank > 0)

    def on_result(number, result):
        nonlocal right
        results.append((number, result))
        right += result["pred_norm"] == result["label"]
        progress.set_postfix_str(f"acc_norm {right / len(results):.4f}", refresh=False)
        progress.update()

    try:
        score = evaluate(model, tokenizer, examples, device, rank, world_size, args.lm_eval_style,
                         args.batch_tokens, on_result)
    except KeyboardInterrupt:
        progress.close()
        if processes.master_process:  # its share, so far
            report(tally([result for _, result in results]), len(results))
        raise
    progress.close()
    if args.out:
        write_results(args.out, results, processes)
    if processes.master_process:
        report(score, len(examples))


def main():
    """The command line: compare two files of results, or score a model."""
    keep_memory()
    args = parse_args()
    if args.compare:
        compare(*args.compare)
        return
    processes = init_distributed(args.device)
    run(args, processes)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    fineweb.run_main(main)
