"""
The benchmark `evaluate`: examples of CORE's tasks that an untrained GPT-2 124M scores in a second
on the CPU, in float32.

    python -m dev.bench evaluate

"ours" is what evaluate.py does. "nanochat's way" is the plain model, which scores one example at a
time: padded rows, logits over the whole vocabulary at every position. GPT2_TEST_DATA names a folder
with the files of the tasks. Without it, they are downloaded.
"""

import functools
import os
import statistics
from pathlib import Path

import numpy as np
import torch

import train_gpt2
from dev.measure import RemoteObject, median_seconds, peak_mb, resident_mb, sgemm_gflops
from gpt2lab import benchmarks, core, kernels, scoring
from gpt2lab.distributed import Ranks
from gpt2lab.tokenizer import GPT2_VOCAB_SIZE, Tokenizer

# kind: {task: how many of its items}
ITEMS = {
    "multiple choice": {"arc_easy": 2, "piqa": 2, "commonsense_qa": 2, "boolq": 1,
                        "bigbench_language_identification": 1},
    "schema": {"winograd": 8, "winogrande": 8},
    "language modeling": {"lambada_openai": 8, "jeopardy": 3, "bigbench_qa_wikidata": 3,
                          "bigbench_dyck_languages": 2}}
RANKS = Ranks(torch.device("cpu"))


def load_items(name):
    """The benchmark of a task of CORE, limited to the items that are measured."""
    folder = os.environ.get("GPT2_TEST_DATA")
    limit = next(tasks[name] for tasks in ITEMS.values() if name in tasks)
    benchmark, = benchmarks.load_benchmark(name, Path(folder) if folder else None, RANKS, limit,
                                           None)
    return benchmark


class Nanochat:
    """The plain model, which scores one example at a time, as nanochat does."""

    def __init__(self):
        self.resident_mb = resident_mb()
        self.tokenizer = Tokenizer("gpt2")
        torch.manual_seed(0)
        self.model = train_gpt2.GPT(train_gpt2.GPTConfig()).eval()
        self.benchmarks = {name: load_items(name) for tasks in ITEMS.values() for name in tasks}

    def score(self, name):
        """[(whether the model is right, mean loss of each row)] of a task's items."""
        from tests.reference import score_core_item
        benchmark = self.benchmarks[name]
        return [score_core_item(self.model, self.tokenizer, benchmark.task, benchmark.items,
                                number)[:2] for number in benchmark.numbers]

    def scoring_mb(self):
        """The peak memory beyond the weights, tokenizer and items included."""
        weights = sum(4 * p.numel() for p in self.model.parameters()) / 2**20
        return peak_mb() - self.resident_mb - weights


class Ours(Nanochat):
    """evaluate.py: the optimized model, which scores batches of prefix trees."""

    def __init__(self):
        kernels.tune_malloc()
        super().__init__()
        kernels.optimize(self.model)
        for benchmark in self.benchmarks.values():
            benchmark.judge = functools.partial(self.judge, benchmark)

    @staticmethod
    def judge(benchmark, number, rows, scores):
        """What `score` returns of an item."""
        correct = core.is_correct(benchmark.task, benchmark.items[number], rows, scores)
        return correct, (scores.loss_sums / np.maximum(rows.num_scored, 1)).tolist()

    def score(self, name):
        """[(whether the model is right, mean loss of each row)] of a task's items."""
        benchmark = self.benchmarks[name]
        results = benchmarks.score_benchmark(self.model, self.tokenizer, benchmark, RANKS)
        return [results[number] for number in benchmark.numbers]


def count_work(names, tokenizer, block_size=1024):
    """
    (tokens that a prefix tree holds, tokens of the padded rows, GFLOP of the matmuls of our way)
    for the items of some tasks.
    """
    nodes = padded = logit_rows = 0
    for benchmark in map(load_items, names):
        for number in benchmark.numbers:
            encoded = [tokenizer.encode(text) for text in benchmark.texts(number)]
            rows = benchmark.rows(number, encoded, tokenizer.eot, block_size)
            trees = [part.tree for part in scoring.split_example(0, rows)]
            nodes += sum(len(tree.tokens) for tree in trees)
            logit_rows += sum(len({node for node, _, _ in tree.scored}) for tree in trees)
            padded += len(rows.rows) * max(map(len, rows.rows))
    return nodes, padded, 2 * (nodes * 12 * 12 * 768**2 + logit_rows * GPT2_VOCAB_SIZE * 768) / 1e9


def largest_difference(ours, theirs):
    """The largest difference of mean losses; raises AssertionError if a prediction differs."""
    difference = 0.0
    for (our_correct, our_means), (correct, means) in zip(ours, theirs, strict=True):
        assert our_correct == correct
        difference = max(difference, np.nanmax(np.abs(np.subtract(our_means, means))))
    return float(difference)


def time_tasks(names, contenders, rates):
    """
    ({contender: median seconds}, largest difference of mean losses) for the items of some tasks.
    Appends to `rates` what sgemm_gflops measures in between.
    """
    results = {}

    def score(contender, name):
        results[contender, name] = contenders[contender].call("score", name)

    turns = {"sgemm": lambda: rates.append(sgemm_gflops()), **{
        (contender, name): functools.partial(score, contender, name)
        for name in names for contender in contenders}}
    medians = median_seconds(turns)
    seconds = {contender: sum(medians[contender, name] for name in names)
               for contender in contenders}
    return seconds, max(largest_difference(results["ours", name], results["nanochat", name])
                        for name in names)


def bench_evaluate():
    """Examples of CORE a second of each kind of task, beside nanochat's way."""
    tokenizer, rates, result = Tokenizer("gpt2"), [], {}
    with RemoteObject(Nanochat) as nanochat, RemoteObject(Ours) as ours:
        contenders = {"nanochat": nanochat, "ours": ours}
        for contender in contenders.values():
            contender.call("score", "winograd")  # warms up
        for kind, tasks in ITEMS.items():
            seconds, difference = time_tasks(tasks, contenders, rates)
            nodes, padded, gflop = count_work(tasks, tokenizer)
            n, ratio = sum(tasks.values()), seconds["nanochat"] / seconds["ours"]
            share = gflop / seconds["ours"] / statistics.median(rates)
            result[kind] = {"examples": n, "seconds": seconds, "ratio": ratio,
                            "share_of_tokens": nodes / padded, "share_of_sgemm": share,
                            "largest_difference": difference}
            print(f"{kind:17} {n / seconds['ours']:5.2f} examples/s, nanochat's way "
                  f"{n / seconds['nanochat']:5.2f}: {ratio:.2f} times as fast | "
                  f"{nodes / padded:.1%} of the tokens | {share:.1%} of sgemm | mean losses differ "
                  f"by at most {difference:.1e}", flush=True)
        result["scoring_mb"] = {name: contender.call("scoring_mb")
                                for name, contender in contenders.items()}
    together = [sum(result[kind]["seconds"][name] for kind in ("multiple choice", "schema"))
                for name in contenders]
    result["ratio, multiple choice and schema"] = together[0] / together[1]
    print(f"multiple choice and schema together: {together[0] / together[1]:.2f} times as fast")
    for name, megabytes in result["scoring_mb"].items():
        print(f"{name:8} needs {megabytes:.0f} MB beyond the weights")
    return result
