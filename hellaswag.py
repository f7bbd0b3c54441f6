"""
Scores a model on HellaSwag (Zellers et al. 2019): which of four endings does it find the likeliest?

    python hellaswag.py                       # newest checkpoint in log/, else gpt2
    python hellaswag.py --model gpt2-xl --device=mps
    torchrun --nproc_per_node=8 hellaswag.py --model gpt2 --out results.jsonl
    python hellaswag.py --compare a.jsonl b.jsonl

This is the completion style of build-nanogpt and llm.c: the context is left as it is, and each
ending follows after a space. The model predicts the ending with the lowest loss, either summed over
the tokens of the ending (acc) or averaged over them (acc_norm). GPT-2 124M reaches acc 0.2859 and
acc_norm 0.2955.

The four sequences of an example begin alike. They are scored as a tree, whose trunk is the context
and whose branches are the endings. Every token is computed once and attends only to its ancestors.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from gpt2lab import kernels
from gpt2lab.checkpoints import EMA_HELP, default_source, list_model_files
from gpt2lab.cli import UserError, check_positive, make_parser, run_main
from gpt2lab.device import autocast, explain_dtype
from gpt2lab.distributed import Ranks, init_distributed, leave_distributed, on_master
from gpt2lab.downloads import download_on_each_node
from gpt2lab.files import check_output, write_output
from gpt2lab.scoring import (
    Score,
    count_correct,
    mcnemar,
    prepare,
    score_hellaswag,
    standard_error,
)
from gpt2lab.tasks import OFFICIAL_FILES, iterate_examples, official_file
from train_gpt2 import load

# -----------------------------------------------------------------------------
# comparing two models


def read_results(path: str) -> dict[int, dict]:
    """
    {ind: result} of a file written by --out. Raises UserError if it is another file, is empty, or
    has two results for an example.
    """
    try:
        rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        results = {row["ind"]: {key: row[key] for key in ("label", "pred", "pred_norm")}
                   for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by hellaswag.py --out: name another file"
                        ) from error
    if not results:
        raise UserError(f"{path} is empty: write it again with hellaswag.py --out")
    if len(results) < len(rows):
        raise UserError(f"{path} has two results for an example: score data without doubles")
    return results


def compare(path_a: str, path_b: str) -> None:
    """Print how two files of --out agree, and whether their accuracies differ beyond chance."""
    a, b = read_results(path_a), read_results(path_b)
    common = [ind for ind in a if ind in b and a[ind]["label"] is not None]
    if not all(a[ind]["label"] == b[ind]["label"] for ind in common):
        raise UserError(f"{path_a} and {path_b} give an example of the same number different "
                        "labels, so they come from different files or splits: compare two models "
                        "on the same examples")
    if not common:
        raise UserError(f"{path_a} and {path_b} have no labelled example in common: compare two "
                        "models on the same examples")
    print(f"{len(common)} examples in common, of {len(a)} and {len(b)}")
    for name, key in (("acc", "pred"), ("acc_norm", "pred_norm")):
        same = sum(a[ind][key] == b[ind][key] for ind in common)
        right_a = {ind for ind in common if a[ind][key] == a[ind]["label"]}
        right_b = {ind for ind in common if b[ind][key] == b[ind]["label"]}
        only_a, only_b = len(right_a - right_b), len(right_b - right_a)
        print(f"{name}: {len(right_a) / len(common):.4f} and {len(right_b) / len(common):.4f} | "
              f"same prediction: {same / len(common):.4f} | only the first right: {only_a}, "
              f"only the second: {only_b} | McNemar's exact p = {mcnemar(only_a, only_b):.4g}")


# -----------------------------------------------------------------------------
# scoring a model


def load_examples(args: argparse.Namespace, ranks: Ranks) -> list[dict]:
    """The examples that the command line asks for. Raises UserError or OSError."""
    path = Path(args.data) if args.data is not None else download_on_each_node(
        official_file(args.split), ranks)
    fields = ["endings"]
    fields += ["activity_label", "ctx_a", "ctx_b"] if args.lm_eval_style else ["ctx"]
    if args.split != "test":
        fields.append("label")
    examples = list(islice(iterate_examples(path, fields), args.limit))
    if not examples:
        raise UserError(f"{path} is empty: name another file")
    return examples


def print_score(score: Score, num_results: int) -> None:
    """Print the standard errors and, on the last line, the accuracies."""
    if score.truncated:
        print(f"{score.truncated} contexts lost their left part, because they are longer than the "
              "block_size")
    if not score.total:
        print(f"{num_results} examples scored, none with a label")
        return
    total, num_correct, num_correct_norm, _ = score
    print(f"standard error: acc {standard_error(num_correct, total):.4f}, "
          f"acc_norm {standard_error(num_correct_norm, total):.4f}")
    print(f"acc: {num_correct}/{total}={num_correct / total:.4f} | "
          f"acc_norm: {num_correct_norm}/{total}={num_correct_norm / total:.4f}")


def write_results(path: Path, results: list[tuple[int, dict]], ranks: Ranks) -> None:
    """Write the (number, result) pairs of all ranks, ordered by number, as lines of JSON."""
    if dist.is_initialized():
        results_by_rank: list = [None] * ranks.ddp_world_size
        dist.all_gather_object(results_by_rank, results)
        results = [pair for pairs in results_by_rank for pair in pairs]
    if ranks.master_process:
        results = sorted(results, key=lambda pair: pair[0])
        text = "".join(json.dumps(result) + "\n" for _, result in results)
        write_output(path, text.encode("utf-8"))


def score_model(args: argparse.Namespace, ranks: Ranks) -> None:
    """Score the model that the command line names; print the accuracies and write --out."""
    source = default_source() if args.model is None else args.model
    if args.out is not None:
        inputs = [*list_model_files(source), *([] if args.data is None else [args.data])]
        out = on_master(ranks, lambda: check_output(args.out, inputs))
    examples = load_examples(args, ranks)
    model, tokenizer = load(source, ranks.device, args.ema)
    if args.ema:
        source = f"{source} (averaged weights)"
    if line := explain_dtype(args.dtype, ranks.device):
        ranks.print0(line)
    kernels.optimize(model)
    prepared = prepare(
        model, tokenizer, examples, ranks, args.lm_eval_style, args.batch_tokens)
    results, num_correct_norm = [], 0  # of this rank
    share = range(ranks.ddp_rank, len(examples), ranks.ddp_world_size)
    progress = tqdm(total=len(share), unit="ex", desc=f"HellaSwag, {source}",
                    disable=not ranks.master_process)

    def on_result(number, result):
        nonlocal num_correct_norm
        results.append((number, result))
        num_correct_norm += result["pred_norm"] == result["label"]
        progress.set_postfix_str(f"acc_norm {num_correct_norm / len(results):.4f}", refresh=False)
        progress.update()

    try:
        with autocast(ranks.device, getattr(torch, args.dtype)):
            score = score_hellaswag(model, prepared, ranks, on_result)
    except KeyboardInterrupt:
        progress.close()
        if ranks.master_process:  # only its own results, since the other ranks may be gone
            print_score(count_correct([result for _, result in results]), len(results))
        raise
    progress.close()
    try:
        if args.out is not None:
            write_results(out, results, ranks)
    finally:  # the disk may be full
        if ranks.master_process:
            print_score(score, len(examples))


# -----------------------------------------------------------------------------
# the command line


def parse_args() -> argparse.Namespace:
    """The parsed command line. Raises UserError for numbers below 1."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="checkpoint, log folder, Hugging Face folder or hub name "
                        "(default: GPT2_MODEL in the environment, else the newest checkpoint in "
                        "log/, else gpt2)")
    parser.add_argument("--ema", action="store_true", help=EMA_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="dtype of the matmuls (%(default)s)")
    parser.add_argument("--split", choices=tuple(OFFICIAL_FILES), default="val",
                        help="which official file to score; test has no labels, so use it with "
                        "--out (%(default)s)")
    parser.add_argument("--data", help="a HellaSwag .jsonl file to score instead")
    parser.add_argument("--limit", type=int, help="score only the first N examples")
    parser.add_argument("--batch_tokens", type=int, help="how many tokens to score at once, "
                        "padding included (default: 1024 on a CPU, else 8192)")
    parser.add_argument("--lm_eval_style", action="store_true", help="prepare the text and "
                        "normalize the losses as lm-eval (Eleuther's harness) does")
    parser.add_argument("--out", help="write a line of JSON for each example to this file")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"),
                        help="compare two files written with --out, and score nothing")
    args = parser.parse_args()
    check_positive(args, "limit", "batch_tokens")
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
