"""
Scores a model on LAMBADA, WikiText and CORE, the 22 tasks that nanochat's leaderboard uses.

    python evaluate.py                                # what needs no download; newest in log/
    python evaluate.py --tasks core --model gpt2 --out gpt2.json
    python evaluate.py --tasks lambada piqa arc_easy --limit 500
    python evaluate.py --tasks wikitext --stride 1024
    python evaluate.py --data my_text.txt             # perplexity of a text of your own
    python evaluate.py --tasks lm_eval:sciq           # any task of lm-eval
    torchrun --nproc_per_node=8 evaluate.py --tasks core --model gpt2-xl
    python evaluate.py --compare small.json medium.json

The answers of a question begin alike, and so do the solved examples in front of it. They are
computed once, as a prefix tree, and only what is scored is multiplied by the vocabulary matrix.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from gpt2lab import benchmarks, core, harness, kernels
from gpt2lab.benchmarks import Benchmark, Metric
from gpt2lab.checkpoints import EMA_HELP, default_source, list_model_files
from gpt2lab.cli import UserError, check_positive, make_parser, run_main, split_list
from gpt2lab.device import autocast, explain_dtype
from gpt2lab.distributed import Ranks, init_distributed, leave_distributed, on_master
from gpt2lab.files import check_output, read_json, write_output
from gpt2lab.scoring import mcnemar
from train_gpt2 import load

# -----------------------------------------------------------------------------
# published values of OpenAI's models, to compare with

MODELS = {"GPT-2 124M": 124_439_808, "GPT-2 355M": 354_823_168, "GPT-2 774M": 774_030_080,
          "GPT-2 1558M": 1_557_611_200}
# {(task, metric): (the values of MODELS in this order, key of SOURCES)}
PUBLISHED: dict[tuple[str, str], tuple[tuple[float | None, ...], str]] = {
    ("lambada", "acc"): ((.3256, .4306, None, .5121), "lm-eval"),
    ("lambada", "perplexity"): ((40.06, None, None, 10.63), "lm-eval"),
    ("lambada", "last token acc"): ((.4599, .5548, .6012, .6324), "paper"),
    ("wikitext", "word perplexity"): ((37.37, None, None, None), "lm-eval"),
    ("wikitext", "bits per byte"): ((.9769, None, None, None), "lm-eval"),
    ("wikitext, stride 1024", "token perplexity"): ((29.94, None, 19.44, None), "transformers"),
    ("hellaswag_zeroshot", "acc"): ((.309, .390, .440, .502), "nanochat"),
    ("lambada_openai", "acc"): ((.323, .426, .488, .523), "nanochat"),
    ("hellaswag", "acc"): ((.308, .395, .444, .512), "nanochat"),
    ("piqa", "acc"): ((.623, .670, .698, .725), "nanochat"),
    ("arc_easy", "acc"): ((.412, .480, .535, .595), "nanochat"),
    ("arc_challenge", "acc"): ((.222, .262, .264, .299), "nanochat"),
    ("CORE", "CORE"): ((.1139, .1849, .2146, .2565), "nanochat")}
SOURCES = {
    "lm-eval": "lambada and wikitext by lm-eval (its issues 2159 and 911, the README of gpt-neo, "
               "transformers' issue 13761)",
    "nanochat": "CORE's tasks by nanochat (dev/estimate_gpt3_core.ipynb)",
    "bundle": "CORE's tasks by nanochat (the tables in its eval_bundle.zip)",
    "paper": "last token of lambada by the GPT-2 paper, table 3 (bflm counted .4667 for 124M)",
    "transformers": "token perplexity by the documentation of transformers, and its issue 13761"}
# nanochat's tables of MODELS, in its bundle
BUNDLE_TABLES = {"GPT-2 124M": "openai-community-gpt2.csv",
                 "GPT-2 355M": "openai-community-gpt2-medium.csv",
                 "GPT-2 774M": "openai-community-gpt2-large.csv",
                 "GPT-2 1558M": "openai-community-gpt2-xl.csv"}


def nearest_model(num_parameters: int) -> str:
    """The one of MODELS whose size is nearest to a number of parameters, as a ratio."""
    return min(MODELS, key=lambda name: abs(math.log(MODELS[name] / num_parameters)))


def find_published(model: str, folder: Path) -> dict[tuple[str, str], tuple[float, str]]:
    """
    {(task, metric): (value, key of SOURCES)} of what has been published for one of MODELS. The
    tables in nanochat's bundle, if it is in `folder`, have more tasks and more digits.
    """
    index = list(MODELS).index(model)
    published = {key: (values[index], source) for key, (values, source) in PUBLISHED.items()
                 if values[index] is not None}
    table = None
    with contextlib.suppress(UserError, OSError):  # a zip file that is not the bundle
        table = benchmarks.find_file(folder, BUNDLE_TABLES[model])
    for line in table.content.decode("utf-8", "replace").splitlines() if table else ():
        with contextlib.suppress(ValueError):  # the header, and cells that are empty
            task, accuracy, centered = (cell.strip() for cell in line.split(","))
            metric = ("CORE", "CORE") if task == "CORE" else (task, "acc")
            published[metric] = float(accuracy or centered), "bundle"
    return published


# -----------------------------------------------------------------------------
# results


class TaskResult(NamedTuple):
    """What a model has reached in one task."""

    task: str
    shots: int
    metrics: list[Metric]
    num_examples: int
    seconds: float
    fingerprint: str = ""  # of the task's data
    results: Sequence[tuple[int, dict]] = ()  # (number, result) of each example


def summarize(benchmark: Benchmark, results: Sequence[tuple[int, dict]],
              seconds: float) -> TaskResult:
    """The TaskResult of a benchmark, from the (number, result) pairs of its examples."""
    if not results:
        raise UserError(f"{benchmark.name} has no token to predict: name a longer text")
    metrics = benchmark.metrics([result for _, result in results])
    return TaskResult(benchmark.name, benchmark.shots, metrics, len(results), seconds,
                      benchmark.fingerprint, results)


def summarize_core(done: Sequence[TaskResult]) -> Metric | None:
    """
    The mean of the centered accuracies of the tasks of CORE in a list of results, and its standard
    error. None for fewer than two tasks.
    """
    accuracies = {result.task: result.metrics[0] for result in done
                  if result.task in core.CORE_TASKS}
    if len(accuracies) < 2:
        return None
    total, variance = 0.0, 0.0
    for task, metric in accuracies.items():
        baseline = core.CORE_TASKS[task].random_baseline
        total += core.center(metric.value, baseline)
        variance += ((metric.standard_error or 0) / (1 - baseline)) ** 2
    n = len(accuracies)
    name = "CORE" if n == len(core.CORE_TASKS) else f"mean over {n} of the 22 tasks of CORE"
    return Metric(name, total / n, math.sqrt(variance) / n)


def table_rows(done: Sequence[TaskResult],
               published: dict[tuple[str, str], tuple[float, str]]) -> list[list[str]]:
    """The cells of the table, row by row, with the values that find_published has found."""
    rows = []
    for result in done:
        for i, metric in enumerate(result.metrics):
            task = core.CORE_TASKS.get(result.task)
            centered = core.center(metric.value, task.random_baseline) if task else None
            rows.append([
                result.task, "" if i else str(result.shots), metric.name,
                format_value(metric.value), format_value(metric.standard_error),
                format_value(centered), "" if i else str(result.num_examples),
                "" if i else f"{result.seconds:.1f}",
                format_value(published.get((result.task, metric.name), (None, ""))[0])])
    return rows


def format_value(value: float | None) -> str:
    """A number with four digits that count, or nothing for None."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}" if value < 1e6 else f"{value:.3g}"


def print_table(done: Sequence[TaskResult], num_parameters: int, folder: Path) -> None:
    """Print all results, and beside them the published values of the GPT-2 nearest in size."""
    model = nearest_model(num_parameters)
    published = find_published(model, folder)
    header = ["task", "shots", "metric", "value", "std error", "centered", "examples", "seconds",
              model]
    rows = table_rows(done, published)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        cells = [cell.ljust(width) if i in (0, 2) else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
    shown = {(result.task, metric.name) for result in done for metric in result.metrics}
    if metric := summarize_core(done):
        line = f"{metric.name}: {metric.value:.4f}, standard error {metric.standard_error:.4f}"
        if metric.name == "CORE":
            shown.add(("CORE", "CORE"))
            line += f"; {model}: {published['CORE', 'CORE'][0]:.4f}"
        print(line)
    for source in sorted({published[key][1] for key in shown if key in published}):
        print(f"{model}: {SOURCES[source]}")


def to_json(source: str, num_parameters: int, done: Sequence[TaskResult]) -> bytes:
    """The content of a file of --out."""
    tasks = {}
    for result in done:
        columns: dict[str, list] = {}
        for number, values in result.results:
            for key, value in {"number": number, **values}.items():
                columns.setdefault(key, []).append(value)
        tasks[result.task] = {
            "shots": result.shots, "examples": result.num_examples,
            "seconds": round(result.seconds, 3), "data": result.fingerprint,
            "metrics": {metric.name: {"value": metric.value, "standard_error":
                                      metric.standard_error} for metric in result.metrics},
            "results": columns}
    core_metric = summarize_core(done)
    summary = {} if core_metric is None else {core_metric.name: {
        "value": core_metric.value, "standard_error": core_metric.standard_error}}
    text = json.dumps({"model": source, "parameters": num_parameters, "summary": summary,
                       "tasks": tasks}, ensure_ascii=False)
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


# -----------------------------------------------------------------------------
# comparing two models


def is_task(task: dict) -> bool:
    """Whether a dict is what to_json writes of a task. Raises KeyError, TypeError and the like."""
    columns = task["results"]
    values = [value for column in columns.values() for value in column]
    return (isinstance(task["data"], str)
            and all(len(column) == task["examples"] for column in columns.values())
            and all(isinstance(value, int | float) for value in values)
            and (not columns or len(set(columns["number"])) == task["examples"]))


def read_results(path: str) -> dict[str, dict]:
    """{task: what to_json wrote of it} of a file. Raises UserError if it is another file."""
    remedy = "name a file written by evaluate.py --out"
    tasks = read_json(Path(path), remedy).get("tasks")
    try:
        valid = all(is_task(task) for task in tasks.values())
    except (AttributeError, KeyError, TypeError):
        valid = False
    if not valid:
        raise UserError(f"{path} was not written by evaluate.py --out: {remedy}")
    return tasks


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float | None]:
    """(mean of b - a over pairs, its standard error, None for a single pair)."""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    n, mean = len(differences), sum(differences) / len(differences)
    if n < 2:
        return mean, None
    squares = sum((difference - mean) ** 2 for difference in differences)
    return mean, math.sqrt(squares / (n - 1) / n)


def values_by_example(task: dict, key: str) -> dict[int, float]:
    """{example: value} of a column of a task's results. Losses are summed over a document."""
    values: dict[int, float] = {}
    columns = task["results"]
    for number, value in zip(columns.get("document", columns["number"]), columns[key], strict=True):
        values[number] = values.get(number, 0) + value
    return values


# {column of the results: what it is}
COMPARED = {"correct": "acc", "last_token_correct": "last token acc", "loss": "loss"}


def compare_task(name: str, a: dict, b: dict) -> list[str]:
    """A line for each column that two models' results of a task have in common."""
    lines = []
    for key, metric in COMPARED.items():
        if key not in a["results"] or key not in b["results"]:
            continue
        first, second = values_by_example(a, key), values_by_example(b, key)
        common = sorted(first.keys() & second.keys())
        if not common:
            continue
        pairs = [first[i] for i in common], [second[i] for i in common]
        difference, error = paired_difference(*pairs)
        means = [sum(values) / len(common) for values in pairs]
        line = (f"{name} {metric}: {format_value(means[0])} and {format_value(means[1])} | "
                f"difference {difference:+.4f}")
        if error is not None:
            line += f" | standard error {error:.4f}"
        if key != "loss":
            only_a = sum(x > y for x, y in zip(*pairs, strict=True))
            only_b = sum(x < y for x, y in zip(*pairs, strict=True))
            line += (f" | only the first right: {only_a}, only the second: {only_b} | McNemar's "
                     f"exact p = {mcnemar(only_a, only_b):.4g}")
        lines.append(f"{line} | {len(common)} in common")
    return lines


def compare(path_a: str, path_b: str) -> None:
    """Print for each task how the results in two files of --out differ."""
    a, b = read_results(path_a), read_results(path_b)
    lines: list[str] = []
    for name in {**a, **b}:
        if name not in a or name not in b:
            print(f"{name}: not compared, because only one of the files has this task")
        elif a[name]["data"] != b[name]["data"]:
            print(f"{name}: not compared, because the two files come from different data")
        elif name.startswith("lm_eval:"):
            print(f"{name}: not compared, because lm-eval's examples are not in the files")
        else:
            lines += compare_task(name, a[name], b[name])
    if not lines:
        raise UserError(f"{path_a} and {path_b} have no example of a task in common: score both "
                        "models on the same tasks and data")
    print("\n".join(lines))


# -----------------------------------------------------------------------------
# scoring a model


def choose_tasks(args: argparse.Namespace, folder: Path | None) -> tuple[list[str], list[str]]:
    """
    (names of benchmarks, names of tasks of lm-eval) that the command line asks for. By default all
    benchmarks whose files are there. Raises UserError, also if `folder` lacks a file.
    """
    if not args.tasks:
        found = [name for name in benchmarks.SINGLE_NAMES
                 if benchmarks.find_benchmark_file(name, folder)]
        if not found:
            raise UserError(f"there are no files of a benchmark in {folder or benchmarks.DATA_DIR}"
                            ": name one to download, for example --tasks lambada, or core")
        return found, []
    prefix = "lm_eval:"
    names = [name for part in args.tasks for name in split_list(part)]
    if not names:
        raise UserError("--tasks names no task: --help lists the tasks")
    lm_eval_names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if lm_eval_names:
        harness.import_lm_eval()  # raises now if the package is missing
    names = benchmarks.expand_names([name for name in names if not name.startswith(prefix)])
    benchmarks.check_files(names, folder)
    return names, lm_eval_names


def load_benchmarks(args: argparse.Namespace, ranks: Ranks) -> tuple[list[Benchmark], list[str]]:
    """(benchmarks, names of tasks of lm-eval) to score. Raises UserError, or OSError."""
    data = None if args.data is None else Path(args.data)
    if data is not None and not data.is_dir():
        if args.tasks not in (None, ["wikitext"]):
            raise UserError(f"{data} is not a folder: name the folder of the tasks' files, or "
                            "leave out --tasks for the perplexity of a text")
        return benchmarks.load_text(data, args.limit, args.stride, bool(args.tasks)), []
    # the master chooses, because a default depends on the files of one node
    names, lm_eval_names = on_master(ranks, lambda: choose_tasks(args, data))
    loaded = [benchmark for name in names
              for benchmark in benchmarks.load_benchmark(name, data, ranks, args.limit,
                                                         args.stride)]
    return loaded, lm_eval_names


def make_progress(loaded: Sequence[Benchmark], ranks: Ranks) -> tqdm:
    """A progress bar over the work of all benchmarks, with the time that is left."""
    total = sum(benchmark.size(number) for benchmark in loaded for number in
                benchmark.numbers[ranks.ddp_rank::ranks.ddp_world_size])
    return tqdm(total=total, disable=not loaded or not ranks.master_process,
                bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left")


def score_one(model: Any, tokenizer: Any, benchmark: Benchmark, ranks: Ranks,
              args: argparse.Namespace, progress: tqdm, done: list[TaskResult]) -> None:
    """
    Score a model on a benchmark, and append the TaskResult to `done`. After Ctrl-C, it is that of
    the examples that this rank has finished.
    """
    results: dict[int, dict] = {}
    start = time.perf_counter()

    def on_result(number: int, result: dict) -> None:
        results[number] = result
        progress.update(benchmark.size(number))

    progress.set_description_str(f"{benchmark.name}: ")
    try:
        benchmarks.score_benchmark(
            model, tokenizer, benchmark, ranks, args.batch_tokens, on_result)
        gathered = benchmarks.gather_results(results)
    except KeyboardInterrupt:
        if finished := sorted(benchmark.finished(results).items()):
            result = summarize(benchmark, finished, time.perf_counter() - start)
            done.append(result._replace(task=f"{result.task} (interrupted)"))
        raise
    done.append(summarize(benchmark, gathered, time.perf_counter() - start))


def score_with_lm_eval(model: Any, tokenizer: Any, names: list[str], ranks: Ranks,
                       args: argparse.Namespace, done: list[TaskResult]) -> None:
    """Score a model on tasks of lm-eval, and append each TaskResult to `done`."""
    if not names:
        return
    start = time.perf_counter()
    with tqdm(desc="lm-eval", unit="ex", disable=not ranks.master_process) as progress:
        def on_progress(num_done: int, total: int) -> None:
            progress.total = total
            progress.update(num_done - progress.n)

        found = harness.evaluate_with_lm_eval(
            model, tokenizer, names, ranks, args.limit, args.batch_tokens, on_progress)
    seconds = time.perf_counter() - start
    num_examples = sum(result["examples"] for result in found.values())
    for task, result in found.items():
        metrics = [Metric(metric, entry["value"], entry["stderr"])
                   for metric, entry in result["metrics"].items()]
        share = result["examples"] / num_examples  # lm-eval does not tell the seconds of each task
        done.append(TaskResult(f"lm_eval:{task}", result["shots"], metrics, result["examples"],
                               seconds * share))


def score_model(args: argparse.Namespace, ranks: Ranks) -> None:
    """Score the model that the command line names; print the table and write --out."""
    source = default_source() if args.model is None else args.model
    loaded, lm_eval_names = load_benchmarks(args, ranks)
    if args.out is not None:
        inputs = [*list_model_files(source), *(each.path for each in loaded), *lm_eval_names]
        out = on_master(ranks, lambda: check_output(args.out, inputs))
    model, tokenizer = load(source, ema=args.ema)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{source} has weights that are NaN or infinite: name another model")
    if args.ema:
        source = f"{source} (averaged weights)"
    if line := explain_dtype(args.dtype, ranks.device):
        ranks.print0(line)
    kernels.optimize(model.to(ranks.device))
    for benchmark in loaded:
        benchmark.prepare(tokenizer, model.config.block_size)
    num_parameters = sum(p.numel() for p in model.parameters())
    folder = benchmarks.DATA_DIR if args.data is None else Path(args.data)
    ranks.print0(f"{source}: {num_parameters:,} parameters, tokenizer {tokenizer.spec}, "
                 f"{args.dtype} on {ranks.device}")
    done: list[TaskResult] = []
    try:
        with autocast(ranks.device, getattr(torch, args.dtype)), \
                make_progress(loaded, ranks) as progress:
            # lm-eval first, because only here it turns out whether it knows the names
            score_with_lm_eval(model, tokenizer, lm_eval_names, ranks, args, done)
            for benchmark in loaded:
                score_one(model, tokenizer, benchmark, ranks, args, progress, done)
        if args.out is not None and ranks.master_process:
            write_output(out, to_json(source, num_parameters, done))
    finally:  # after Ctrl-C, after a task of lm-eval that cannot be loaded, or on a full disk
        if ranks.master_process and done:
            print_table(done, num_parameters, folder)


# -----------------------------------------------------------------------------
# the command line


def parse_args() -> argparse.Namespace:
    """The parsed command line. Raises UserError for numbers below 1."""
    parser = make_parser(__doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--tasks", nargs="+", metavar="TASK", help="lambada, wikitext, core, core_lite, tasks of "
        f"CORE ({', '.join(core.CORE_TASKS)}), and lm_eval:NAME (default: those whose files are "
        "in --data)")
    add("--model", help="checkpoint, log folder, Hugging Face folder or hub name (default: "
        "GPT2_MODEL in the environment, else the newest checkpoint in log/, else gpt2)")
    add("--ema", action="store_true", help=EMA_HELP)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="dtype of the matmuls (%(default)s)")
    add("--data", help="folder with the tasks' files; or a UTF-8 text, whose perplexity is "
        f"measured (default: {benchmarks.DATA_DIR}, to which files are downloaded)")
    add("--limit", type=int, help="score only N examples of each task, evenly spaced "
        "(a text is scored whole)")
    add("--stride", type=int, help="also measure the perplexity per token of wikitext or a text, "
        "in windows that begin every N tokens")
    add("--batch_tokens", type=int, help="how many tokens to score at once, padding included "
        "(default: 1024 on a CPU, else 8192)")
    add("--out", help="write all results to this JSON file")
    add("--compare", nargs=2, metavar=("A", "B"),
        help="compare two files written with --out, and score nothing")
    args = parser.parse_args()
    check_positive(args, "limit", "stride", "batch_tokens")
    if args.compare and args.out is not None:
        raise UserError("--compare scores nothing, so it has nothing to write: leave out --out")
    return args


def main() -> None:
    """Compare two files of results, or score a model."""
    kernels.tune_malloc()
    args = parse_args()
    if args.compare:
        compare(*args.compare)
        return
    ranks = init_distributed(args.device)
    score_model(args, ranks)
    leave_distributed()


if __name__ == "__main__":
    run_main(main)
