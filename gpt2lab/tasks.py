"""HellaSwag's examples: where they come from, and how they become tokens."""

import hashlib
import json
import os
import re
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gpt2lab.cli import UserError
from gpt2lab.distributed import sum_over_ranks
from gpt2lab.files import write_atomically

DATA_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
DATA_FILE = Path("hellaswag") / "hellaswag_val.jsonl"
OFFICIAL_FILES = {  # bytes and sha256 of the files
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
    size, sha256 = OFFICIAL_FILES[split]
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
    write_atomically(path, lambda file: file.write(response.content))
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


def load_evenly_spaced(limit, ranks):
    """
    Up to `limit` val examples (0: all on CUDA, 200 elsewhere) for evaluation during training, the
    same ones on every process; none, and a warning, where there is no file to be had.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on every node
        try:
            download()
        except OSError as error:
            print(f"warning: training goes on without HellaSwag: {error}")
    sum_over_ranks([0], ranks.device)  # wait for it
    # everybody or nobody, or processes would part ways
    if sum_over_ranks([not DATA_FILE.is_file()], ranks.device)[0]:
        return []
    examples = list(iterate_examples(DATA_FILE))
    limit = limit or (len(examples) if ranks.device.type == "cuda" else 200)
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
