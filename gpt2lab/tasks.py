"""HellaSwag's examples: the official files, reading them, turning them into tokens."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gpt2lab.cli import UserError
from gpt2lab.distributed import Ranks
from gpt2lab.downloads import OfficialFile, download_on_each_node, first_on_node
from gpt2lab.tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# the official files

DATA_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
DATA_FILE = Path("hellaswag") / "hellaswag_val.jsonl"  # the other splits go beside it
OFFICIAL_FILES = {  # split: (bytes, sha256)
    "train": (47_496_131, "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d"),
    "val": (12_246_618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
    "test": (11_752_147, "da082b00543e422b8d25394614d102944586986def4de5cd1bd36d86bcb76261"),
}


def official_file(split: str) -> OfficialFile:
    """
    The official file of a split: train, val or test. HELLASWAG_URL in the environment names a
    mirror; "{split}" in it stands for the split.
    """
    url = os.environ.get("HELLASWAG_URL") or DATA_URL
    return OfficialFile(DATA_FILE.with_name(f"hellaswag_{split}.jsonl"),
                        url.replace("{split}", split), "HELLASWAG_URL", *OFFICIAL_FILES[split])


def load_evenly_spaced(limit: int, ranks: Ranks) -> list[dict]:
    """
    Up to `limit` examples of the val split for evaluation during training, the same on every rank.
    With `limit` 0: all examples on CUDA, 200 on other devices. Prints a warning and returns an
    empty list if the file cannot be downloaded.
    """
    try:
        path = download_on_each_node(official_file("val"), ranks)
    except OSError as error:
        if first_on_node():
            print(f"warning: training goes on without HellaSwag: {error}")
        return []
    examples = list(iterate_examples(path))
    limit = limit or (len(examples) if ranks.device.type == "cuda" else 200)
    # the file is sorted by kind, so the first examples alone would not represent it
    stride = max(len(examples) / limit, 1)
    return [examples[int(i * stride)] for i in range(min(limit, len(examples)))]


# -----------------------------------------------------------------------------
# reading a file


def iterate_examples(
        path: Path, fields: Sequence[str] = ("ctx", "endings", "label")) -> Iterator[dict]:
    """
    Yield the examples of a HellaSwag .jsonl file, dicts with at least `fields`. Raises UserError
    that says which line is wrong, and what is wrong with it.
    """
    with open(path, "rb") as file:
        numbered_lines = ((n, line) for n, line in enumerate(file, 1) if line.strip())
        for number, line in numbered_lines:
            try:
                yield parse_example(line, fields)
            except ValueError as error:
                raise UserError(f"{path}, line {number} {error}") from error


def parse_json_object(line: bytes) -> dict:
    """The object in a line of JSON. Raises ValueError whose message follows "line 7 "."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON in UTF-8 ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value


def parse_example(line: bytes, fields: Sequence[str]) -> dict:
    """The example in a line of JSON. Raises ValueError whose message follows "line 7 "."""
    example = parse_json_object(line)
    missing = [field for field in fields if field not in example]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    endings = example["endings"]
    if not isinstance(endings, list) or len(endings) != 4:
        raise ValueError("must have four endings")
    texts = [example[field] for field in fields if field not in ("endings", "label")]
    if not all(isinstance(text, str) for text in (*texts, *endings)):
        raise ValueError("has a context or an ending that is not text")
    if re.search("[\ud800-\udfff]", "".join((*texts, *endings))):
        raise ValueError("has a lone surrogate, half of a character of UTF-16")
    # some copies of HellaSwag store the label as text
    if "label" in fields and example["label"] not in (0, 1, 2, 3, "0", "1", "2", "3"):
        raise ValueError("must have a label from 0 to 3")
    return example


# -----------------------------------------------------------------------------
# text to tokens


def lm_eval_clean(text: str) -> str:
    """A text of an example, cleaned as the hellaswag task of lm-eval (Eleuther's harness) does."""
    # the texts from WikiHow contain marks. [title] separates two sentences and becomes a full stop.
    # All other marks, such as [header], [step] and [substeps], are removed
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def lm_eval_texts(example: dict) -> tuple[str, list[str]]:
    """(context, endings) as lm-eval words them: cleaned, with the activity before the context."""
    context = f"{example['ctx_a']} {example['ctx_b'].capitalize()}"
    context = lm_eval_clean(f"{example['activity_label']}: {context}")
    return context, [lm_eval_clean(ending) for ending in example["endings"]]


class RenderedExample(NamedTuple):
    """An example as token ids: four rows, each the context followed by one of the endings."""

    rows: list[list[int]]
    num_scored: list[int]  # how many tokens at the end of each row are scored
    norm_lengths: list[int]  # acc_norm divides the summed loss of each row by these
    truncated: bool  # whether a context lost its left part


def render_examples(examples: Sequence[dict], tokenizer: Tokenizer, block_size: int,
                    lm_eval_style: bool = False) -> list[RenderedExample]:
    """
    The examples as token ids. A row longer than `block_size` loses the left part of its context.

    The completion style encodes the context by itself and each ending after a space, and divides a
    summed loss by the number of tokens for acc_norm. `lm_eval_style` encodes context and ending
    together, splits them where the context alone would end, and divides by the number of
    characters.
    """
    worded = [lm_eval_texts(example) if lm_eval_style else (example["ctx"], example["endings"])
              for example in examples]
    texts = []
    for context, endings in worded:
        if lm_eval_style:
            texts += [context.rstrip(), *(f"{context} {ending}" for ending in endings)]
        else:
            texts += [context, *(" " + ending for ending in endings)]
    encoded = iter(tokenizer.encode_batch(texts))  # five arrays for each example
    rendered = []
    for _, endings in worded:
        context_ids, *ending_ids = (tokens.tolist() for tokens in islice(encoded, 5))
        if lm_eval_style:
            ending_ids = [ids[len(context_ids):] for ids in ending_ids]
        rows = [(context_ids + ids)[-block_size:] for ids in ending_ids]
        # the first token of a row has no token before it that could predict it
        num_scored = [max(min(len(ids), len(row) - 1), 0)
                      for ids, row in zip(ending_ids, rows, strict=True)]
        lengths = [len(ending) for ending in endings] if lm_eval_style else num_scored
        truncated = any(len(context_ids) + len(ids) > block_size for ids in ending_ids)
        rendered.append(RenderedExample(
            rows, num_scored, [max(length, 1) for length in lengths], truncated))
    return rendered
