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

import json
from itertools import islice
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from gpt2lab.checkpoints import default_source
from gpt2lab.cli import UserError, make_parser, run_main
from gpt2lab.device import tune_malloc
from gpt2lab.distributed import init_distributed, sum_over_ranks
from gpt2lab.files import write_atomically
from gpt2lab.scoring import evaluate, standard_error, tally
from gpt2lab.tasks import OFFICIAL_FILES, download, iterate_examples
from train_gpt2 import load

# -----------------------------------------------------------------------------
# the examples


# -----------------------------------------------------------------------------
# scoring


# -----------------------------------------------------------------------------
# evaluation


# -----------------------------------------------------------------------------
# comparing two models


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
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="checkpoint, log folder, Hugging Face folder or hub name "
                        "(default: newest checkpoint in log/, else gpt2)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--split", choices=tuple(OFFICIAL_FILES), default="val",
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


def load_examples(args, ranks):
    """The examples that the command line asks for; the master downloads, the others wait."""
    if args.data is None:
        if ranks.master_process:
            download(args.split)
        sum_over_ranks([0], ranks.device)
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


def write_results(path, results, ranks):
    """Write the (number, result) pairs of all ranks in the order of the examples, a line each."""
    if dist.is_initialized():
        shares = [None] * ranks.ddp_world_size
        dist.all_gather_object(shares, results)
        results = [pair for share in shares for pair in share]
    if ranks.master_process:
        results = sorted(results, key=lambda pair: pair[0])
        text = "".join(json.dumps(result) + "\n" for _, result in results)
        write_atomically(Path(path), lambda file: file.write(text.encode("utf-8")))


def run(args, ranks):
    """Score the model that the command line names, and print and write what it asks for."""
    device, rank, world_size = ranks
    examples = load_examples(args, ranks)
    source = args.model or default_source()
    model, tokenizer = load(source, device)
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
        if ranks.master_process:  # its share, so far
            report(tally([result for _, result in results]), len(results))
        raise
    progress.close()
    if args.out:
        write_results(args.out, results, ranks)
    if ranks.master_process:
        report(score, len(examples))


def main():
    """The command line: compare two files of results, or score a model."""
    tune_malloc()
    args = parse_args()
    if args.compare:
        compare(*args.compare)
        return
    ranks = init_distributed(args.device)
    run(args, ranks)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
