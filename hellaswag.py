"""
HellaSwag (Zellers et al. 2019): four ways to go on, one of them right; which is the likeliest?

    python hellaswag.py                       # newest checkpoint in log/, else gpt2
    python hellaswag.py --model gpt2-xl --device=mps
    python hellaswag.py --limit 400 --out results.jsonl

The completion style of build-nanogpt and llm.c: the context as it is, each ending after a space;
the prediction is the ending with the lowest loss, summed (acc) or averaged over its tokens
(acc_norm). GPT-2 124M has acc 0.2859 and acc_norm 0.2955.
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import fineweb
from devices import pick_device
from fineweb import UserError

DATA_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
DATA_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
DATA_FILE = Path("hellaswag") / "hellaswag_val.jsonl"


def download():
    """
    Fetch the 10,042 validation examples to DATA_FILE unless it is there. HELLASWAG_URL names a
    mirror. Raises OSError when the network fails five times or the file is not the official one.
    """
    if DATA_FILE.is_file():
        return
    import requests
    url = os.environ.get("HELLASWAG_URL", DATA_URL)
    for attempt in range(5):
        try:
            response = requests.get(url, timeout=30)
            response.raise_for_status()
            break
        except requests.RequestException as error:
            if attempt == 4:
                raise OSError(f"cannot download {url} ({error}); set HELLASWAG_URL to a mirror, or "
                              f"put the file at {DATA_FILE}") from error
            time.sleep(0.5 * 2 ** attempt)
    if hashlib.sha256(response.content).hexdigest() != DATA_SHA256:
        raise OSError(f"{url} is not the official validation file (its sha256 differs)")
    DATA_FILE.parent.mkdir(exist_ok=True)
    fineweb.write_atomically(DATA_FILE, lambda file: file.write(response.content))


def iterate_examples(path):
    """Yield the examples of a HellaSwag .jsonl file: dicts with ctx, endings (four) and label."""
    with open(path, encoding="utf-8") as file:
        number = 0
        try:
            for line in file:
                number += 1
                example = json.loads(line)
                good = (isinstance(example.get("ctx"), str) and len(example["endings"]) == 4
                        and int(example["label"]) in range(4))
                if not good:
                    raise KeyError("a ctx, four endings and a label from 0 to 3")
                yield example
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number} is no HellaSwag example: {error}") from error
        except KeyError as error:
            raise UserError(f"{path}, line {number} lacks {error.args[0]}") from error


def render_example(example, tokenizer, block_size=None):
    """
    (tokens, mask, label): tokens (4, N) int64, a row for each ending, padded with zeros at the
    right; mask (4, N), 1 where a token belongs to the ending; label, the right row. A row longer
    than `block_size` loses the left part of its context.
    """
    context = tokenizer.encode(example["ctx"])
    endings = [tokenizer.encode(" " + ending) for ending in example["endings"]]
    rows = [context + ending for ending in endings]
    if block_size is not None:
        rows = [row[-block_size:] for row in rows]
    N = max(len(row) for row in rows)
    tokens = torch.zeros(4, N, dtype=torch.long)
    mask = torch.zeros(4, N)
    for i, (row, ending) in enumerate(zip(rows, endings, strict=True)):
        tokens[i, :len(row)] = torch.tensor(row)
        mask[i, max(len(row) - len(ending), 0):len(row)] = 1
    return tokens, mask, int(example["label"])


@torch.inference_mode()
def score_example(model, tokens, mask, vocab_size):
    """Summed loss (nats) and number of tokens of each ending, two arrays (4,)."""
    logits = model(tokens)[0][..., :vocab_size]  # (4, N, V)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(),
                             reduction="none").view(4, -1)  # (4, N - 1): loss of the next token
    scored = mask[:, 1:]  # a token's loss stands one place to its left
    return (losses * scored).sum(1).cpu().numpy(), scored.sum(1).cpu().numpy()


def evaluate(model, tokenizer, examples, device, rank=0, world_size=1, on_result=None):
    """
    Score every world_size-th example from `rank`; returns (total, num_correct, num_correct_norm),
    integers to be summed over ranks. `on_result(result, counts)` is called after each example.
    """
    total = num_correct = num_correct_norm = 0
    for example in examples[rank::world_size]:
        tokens, mask, label = render_example(example, tokenizer, model.config.block_size)
        tokens, mask = tokens.to(device), mask.to(device)
        sums, counts = score_example(model, tokens, mask, tokenizer.vocab_size)
        pred, pred_norm = int(np.argmin(sums)), int(np.argmin(sums / np.maximum(counts, 1)))
        total += 1
        num_correct += pred == label
        num_correct_norm += pred_norm == label
        if on_result:
            result = {"ind": example.get("ind"), "label": label, "pred": pred,
                      "pred_norm": pred_norm, "loss_sums": sums.tolist(),
                      "num_tokens": counts.astype(int).tolist()}
            on_result(result, (total, num_correct, num_correct_norm))
    return total, num_correct, num_correct_norm


def main():
    parser = fineweb.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint, log folder, Hugging Face folder or hub name "
                        "(default: newest checkpoint in log/, else gpt2)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--data", help="a HellaSwag .jsonl file (default: the official one)")
    parser.add_argument("--limit", type=int, help="score only the first N examples")
    parser.add_argument("--out", help="write a line of JSON for each example to this file")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} must be at least 1")

    from sample import default_model
    from train_gpt2 import load_model, load_tokenizer
    device = pick_device(args.device)
    if args.data is None:
        download()
    examples = list(iterate_examples(args.data or DATA_FILE))[:args.limit]
    if not examples:
        raise UserError(f"{args.data or DATA_FILE} holds no example")
    source = args.model or default_model()
    model, tokenizer = load_model(source, device), load_tokenizer(source)

    results = []
    progress = tqdm(total=len(examples), unit="ex", desc=f"HellaSwag, {source}")

    def on_result(result, counts):
        results.append(result)
        progress.update()
        progress.set_postfix_str(f"acc_norm {counts[2] / counts[0]:.4f}")

    total, num_correct, num_correct_norm = evaluate(
        model, tokenizer, examples, device, on_result=on_result)
    progress.close()
    if args.out:
        lines = "".join(json.dumps(result) + "\n" for result in results)
        fineweb.write_atomically(Path(args.out), lambda file: file.write(lines.encode("utf-8")))
    print(f"acc: {num_correct}/{total}={num_correct / total:.4f} | "
          f"acc_norm: {num_correct_norm}/{total}={num_correct_norm / total:.4f}")


if __name__ == "__main__":
    fineweb.run_main(main)
