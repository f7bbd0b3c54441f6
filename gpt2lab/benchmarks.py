"""
The benchmarks that evaluate.py and training score: LAMBADA, WikiText, a text of one's own, and the
tasks of CORE. What they have in common is the class Benchmark. Where their files come from is at
the end.
"""

import difflib
import functools
import json
import lzma
import math
import os
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch.distributed as dist

from gpt2lab import core, distributed
from gpt2lab.cli import UserError, first_line, split_list
from gpt2lab.distributed import Ranks
from gpt2lab.downloads import OfficialFile, download_on_each_node
from gpt2lab.files import sha256
from gpt2lab.scoring import (
    ExampleScores,
    Rows,
    prepare_for_training,
    score_examples,
    standard_error,
    summarize_accuracy,
)
from gpt2lab.tasks import DATA_FILE as HELLASWAG_FILE
from gpt2lab.tasks import iterate_examples, lm_eval_texts, parse_json_object
from gpt2lab.tokenizer import Tokenizer

EXAMPLES_AT_ONCE = 256  # rendered together, and sorted by length


class Metric(NamedTuple):
    """A number that a benchmark measures."""

    name: str
    value: float
    standard_error: float | None  # None if it cannot be told


class Benchmark:
    """
    A list of numbered examples, and what is measured on them. The result of an example is a dict of
    plain values.
    """

    name: str
    shots = 0
    main_metric = "acc"  # what training logs
    numbers: list[int]  # of the examples that are scored
    path: Path  # of the file
    fingerprint = ""  # of the file, so that only results of the same examples are compared

    def prepare(self, tokenizer: Tokenizer, block_size: int) -> None:
        """Make what depends on the tokenizer or the block_size. Call this before all others."""

    def size(self, number: int) -> int:
        """About how much work an example is, compared with others, in characters."""
        raise NotImplementedError

    def texts(self, number: int) -> list[str]:
        """The texts of an example that `rows` needs as tokens."""
        raise NotImplementedError

    def rows(self, number: int, encoded: list[list[int]], eot: int, block_size: int) -> Rows:
        """The rows of an example, given its texts as tokens."""
        raise NotImplementedError

    def judge(self, number: int, rows: Rows, scores: ExampleScores) -> dict:
        """The result of an example."""
        raise NotImplementedError

    def metrics(self, results: Sequence[dict]) -> list[Metric]:
        """What is measured, from one or more results."""
        raise NotImplementedError

    def finished(self, results: dict[int, dict]) -> dict[int, dict]:
        """Those of the {number: result} of an interrupted benchmark that `metrics` can use."""
        return results


def accuracy(name: str, results: Sequence[dict], key: str = "correct") -> Metric:
    """The share of results in which `key` is true."""
    num_correct = sum(bool(result[key]) for result in results)
    return Metric(name, num_correct / len(results), standard_error(num_correct, len(results)))


def perplexity(name: str, losses: Sequence[float], lengths: Sequence[float]) -> Metric:
    """
    exp(sum of losses / sum of lengths), where each document has a summed loss (nats) and a length.
    The standard error is that of a ratio of two sums over documents, which vary together.
    """
    mean, error = ratio(losses, lengths)
    value = math.exp(min(mean, 700))  # an untrained model may exceed what a float can hold
    return Metric(name, value, None if error is None else value * error)


def ratio(totals: Sequence[float], lengths: Sequence[float]) -> tuple[float, float | None]:
    """(sum of totals / sum of lengths, its standard error, None for a single document)."""
    n, length = len(totals), sum(lengths)
    mean = sum(totals) / length
    if n < 2:
        return mean, None
    squares = sum((total - mean * part) ** 2 for total, part in zip(totals, lengths, strict=True))
    return mean, math.sqrt(n / (n - 1) * squares) / length


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """Up to `limit` of the numbers 0 to count - 1, evenly spaced, all of them without a limit."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


# -----------------------------------------------------------------------------
# CORE


class Core(Benchmark):
    """A task of CORE. --limit leaves out items, but all of them can be drawn as solved items."""

    def __init__(self, task: core.CoreTask, items: Sequence[dict], limit: int | None) -> None:
        if len(items) <= task.shots:
            raise UserError(f"{task.file_name} has {len(items)} lines, but {task.name} needs more "
                            f"than {task.shots}, which stand in front of each: get the whole file")
        self.task, self.items = task, core.shuffle_items(items)
        self.name, self.shots = task.name, task.shots
        self.numbers = evenly_spaced(len(items), limit)

    def size(self, number: int) -> int:
        """The characters of the item, and of as many like it as are solved in front of it."""
        return (self.shots + 1) * sum(len(str(value)) for value in self.items[number].values())

    def texts(self, number: int) -> list[str]:
        """The prompts of the item."""
        return core.make_prompts(self.task, self.items, number)

    def rows(self, number: int, encoded: list[list[int]], eot: int, block_size: int) -> Rows:
        """The rows of the item, whose ends are scored."""
        return core.make_rows(self.task, encoded, eot, block_size)

    def judge(self, number: int, rows: Rows, scores: ExampleScores) -> dict:
        """{"correct"}"""
        return {"correct": core.is_correct(self.task, self.items[number], rows, scores)}

    def metrics(self, results: Sequence[dict]) -> list[Metric]:
        """The accuracy."""
        return [accuracy("acc", results)]


# -----------------------------------------------------------------------------
# LAMBADA


class Lambada(Benchmark):
    """
    LAMBADA (Paperno et al. 2016) as OpenAI prepared it: predict the last word of a passage. Two
    conventions: the whole word, as lm-eval counts it, and its last token, as the GPT-2 paper does.
    """

    name = "lambada"

    def __init__(self, passages: Sequence[str], limit: int | None) -> None:
        self.passages = passages
        self.numbers = evenly_spaced(len(passages), limit)

    def size(self, number: int) -> int:
        """The characters of the passage."""
        return len(self.passages[number])

    def texts(self, number: int) -> list[str]:
        """The passage without its last word, and the whole passage."""
        passage = self.passages[number]
        return [passage.rpartition(" ")[0].rstrip(), passage]

    def rows(self, number: int, encoded: list[list[int]], eot: int, block_size: int) -> Rows:
        """One row, whose last word is scored."""
        context, passage = encoded
        row = passage if context else [eot, *passage]
        num_scored = max(len(passage) - len(context), 1)
        row = row[-block_size - 1:]  # the last token is predicted, but not read
        return Rows([row], [min(num_scored, len(row) - 1)])

    def judge(self, number: int, rows: Rows, scores: ExampleScores) -> dict:
        """{"correct", "last_token_correct", "loss" of the last word}"""
        return {"correct": bool(scores.all_greedy[0]),
                "last_token_correct": bool(scores.last_greedy[0]),
                "loss": float(scores.loss_sums[0])}

    def metrics(self, results: Sequence[dict]) -> list[Metric]:
        """Accuracy and perplexity of the last word, accuracy of its last token."""
        losses = [result["loss"] for result in results]
        return [accuracy("acc", results), perplexity("perplexity", losses, [1] * len(losses)),
                accuracy("last token acc", results, "last_token_correct")]


# -----------------------------------------------------------------------------
# perplexity of texts


class Document(NamedTuple):
    """A text whose perplexity is measured."""

    text: str  # what the model reads
    num_words: int
    num_bytes: int


class Perplexity(Benchmark):
    """
    Perplexity per word and bits per byte of documents, each token predicted once. An example is a
    window of a document, as long as the block_size allows. `limit` is a number of windows, but
    documents are scored whole: evenly spaced ones, as many as the limit allows, and at least one.
    """

    main_metric = "bits per byte"

    def __init__(self, name: str, documents: Sequence[Document], limit: int | None) -> None:
        self.name, self.documents, self.limit = name, documents, limit
        self.numbers = []
        self.windows: list[tuple[int, Rows]] = []  # (number of the document, its window)

    def prepare(self, tokenizer: Tokenizer, block_size: int) -> None:
        """Cut the documents into windows."""
        encoded = tokenizer.encode_batch([document.text for document in self.documents])
        windows = [list(self.cut(tokens.tolist(), tokenizer.eot, block_size))
                   for tokens in encoded]  # of each document
        count = len(self.documents)
        if self.limit is not None:
            count = max(self.limit * count // sum(map(len, windows)), 1)
        self.windows = [(i, window) for i in evenly_spaced(len(self.documents), count)
                        for window in windows[i]]
        self.numbers = list(range(len(self.windows)))

    def cut(self, tokens: list[int], eot: int, block_size: int) -> Iterator[Rows]:
        """
        Yield the windows of a document. The first one begins with end-of-text, so that the first
        token is predicted, too. The last one reaches back as far as the block_size allows, as in
        lm-eval.
        """
        tokens = [eot, *tokens]
        for start in range(1, len(tokens), block_size):
            end = min(start + block_size, len(tokens))
            yield Rows([tokens[max(end - block_size - 1, 0):end]], [end - start])

    def size(self, number: int) -> int:
        """About four characters a token."""
        return 4 * len(self.windows[number][1].rows[0])

    def texts(self, number: int) -> list[str]:
        """None, because the windows are tokens already."""
        return []

    def rows(self, number: int, encoded: list[list[int]], eot: int, block_size: int) -> Rows:
        """The window."""
        return self.windows[number][1]

    def judge(self, number: int, rows: Rows, scores: ExampleScores) -> dict:
        """{"document", "loss" summed over the window, "tokens" scored}"""
        return {"document": self.windows[number][0], "loss": float(scores.loss_sums[0]),
                "tokens": rows.num_scored[0]}

    def finished(self, results: dict[int, dict]) -> dict[int, dict]:
        """The results of the documents whose windows have all been scored."""
        unfinished = {document for number, (document, _) in enumerate(self.windows)
                      if number not in results}
        return {number: result for number, result in results.items()
                if result["document"] not in unfinished}

    def metrics(self, results: Sequence[dict]) -> list[Metric]:
        """Perplexity per word, and bits per byte, of the documents that have results."""
        losses: dict[int, float] = {}
        for result in results:
            losses[result["document"]] = losses.get(result["document"], 0) + result["loss"]
        documents = [self.documents[i] for i in losses]
        per_byte, error = ratio(list(losses.values()), [d.num_bytes for d in documents])
        bits = 1 / math.log(2)
        return [perplexity("word perplexity", list(losses.values()),
                           [document.num_words for document in documents]),
                Metric("bits per byte", per_byte * bits, None if error is None else error * bits)]


class Strided(Perplexity):
    """
    Perplexity per token of one text, as Hugging Face's documentation computes it: a window of
    block_size tokens every `stride` tokens. A token counts in the first window that has it, but the
    first token of the text, and of a window that overlaps no other, is not predicted.
    """

    main_metric = "token perplexity"

    def __init__(self, name: str, text: str, stride: int, limit: int | None = None) -> None:
        super().__init__(f"{name}, stride {stride}", [Document(text, 1, 1)], None)
        self.stride, self.num_windows = stride, limit

    def prepare(self, tokenizer: Tokenizer, block_size: int) -> None:
        """Cut the text into windows, and choose as many as the limit allows."""
        super().prepare(tokenizer, block_size)
        self.numbers = evenly_spaced(len(self.windows), self.num_windows)

    def finished(self, results: dict[int, dict]) -> dict[int, dict]:
        """All results, because a part of the windows has a perplexity, too."""
        return results

    def cut(self, tokens: list[int], eot: int, block_size: int) -> Iterator[Rows]:
        """Yield the windows. Raises UserError if they would leave out tokens."""
        if self.stride > block_size:
            raise UserError(f"--stride {self.stride} must be at most {block_size}, the model's "
                            "block_size")
        if len(tokens) < 2:
            raise UserError(f"{self.name}: the text must have two or more tokens: leave out "
                            "--stride")
        predicted = 0  # how many tokens at the beginning are done
        for start in range(0, len(tokens), self.stride):
            end = min(start + block_size, len(tokens))
            if (num_scored := end - max(predicted, start + 1)) > 0:
                yield Rows([tokens[start:end]], [num_scored])
            if end == len(tokens):
                return
            predicted = end

    def metrics(self, results: Sequence[dict]) -> list[Metric]:
        """Perplexity per token."""
        return [perplexity("token perplexity", [result["loss"] for result in results],
                           [result["tokens"] for result in results])]


def split_wikitext(text: str) -> list[str]:
    """The articles of WikiText's raw text, each from its title on, as lm-eval divides them."""
    pages: list[str] = []
    lines: list[str] = []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    pages.append("\n".join(lines))
    return [page for page in pages if page.strip()]


# what lm-eval replaces, one after the other, to turn WikiText's tokens back into text
WIKITEXT_REPLACEMENTS: tuple[tuple[str, str], ...] = (
    (r"s '", "s'"), (r"/' [0-9]/", "/'[0-9]/"), (r" @-@ ", "-"), (r" @,@ ", ","), (r" @\.@ ", "."),
    (r" : ", ": "), (r" ; ", "; "), (r" \. ", ". "), (r" ! ", "! "), (r" \? ", "? "),
    (r" , ", ", "), (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"), (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="), (r"= = =", "==="), (r"= =", "=="), (r" ° ", "°"), (r" \n", "\n"),
    (r"\n ", "\n"), (r" N ", " 1 "), (r" 's", "'s"))


def detokenize_wikitext(page: str) -> str:
    """An article of WikiText without the spaces around punctuation, as lm-eval has it."""
    for pattern, replacement in WIKITEXT_REPLACEMENTS:
        page = re.sub(pattern, replacement, page)
    return page


def make_document(original: str, text: str) -> Document:
    """The Document of a text. Its words and bytes are those of the `original`, as in lm-eval."""
    return Document(text, len(re.split(r"\s+", original)), len(original.encode("utf-8")))


def make_wikitext(text: str, limit: int | None, stride: int | None) -> list[Benchmark]:
    """The benchmarks of WikiText's raw test text. `stride` adds the perplexity per token."""
    documents = [make_document(page, detokenize_wikitext(page)) for page in split_wikitext(text)]
    benchmarks: list[Benchmark] = [Perplexity("wikitext", documents, limit)]
    if stride:  # Hugging Face's copy has a row for each line, and joins them with an empty line
        lines = text.removesuffix("\n").split("\n")
        rows = [line + "\n" if line.strip() else "" for line in lines]
        benchmarks.append(Strided("wikitext", "\n\n".join(rows), stride, limit))
    return benchmarks


# -----------------------------------------------------------------------------
# the files

DATA_DIR = Path("eval_data")
HUB = "https://huggingface.co"


def official_files() -> dict[str, OfficialFile]:
    """{name of what is in it: the file}. HF_ENDPOINT in the environment names a mirror of HUB."""
    hub = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    return {
        "core": OfficialFile(
            DATA_DIR / "eval_bundle.zip",  # as nanochat packs the tasks
            "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip", "CORE_URL", None,
            "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"),
        "lambada": OfficialFile(
            DATA_DIR / "lambada_test.jsonl",
            "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
            "LAMBADA_URL", 1_819_752,
            "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"),
        "wikitext": OfficialFile(
            DATA_DIR / "wikitext-2-raw-v1.zip",
            f"{hub}/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip", "WIKITEXT_URL",
            4_721_645, "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11")}


# {name: patterns of the file that holds it, the best first}
FILE_PATTERNS = {"lambada": ("lambada_test.jsonl", "lambada_openai.jsonl"),
                 "wikitext": ("wiki.test.raw", "wiki*test*")}
# the mean of these follows CORE closely over 13 published models (docs/evaluation.md)
CORE_LITE = ("hellaswag_zeroshot", "bigbench_qa_wikidata", "arc_easy", "piqa", "lambada_openai")
GROUPS = {"core": tuple(core.CORE_TASKS), "core_lite": CORE_LITE}
SINGLE_NAMES = (*FILE_PATTERNS, *core.CORE_TASKS)


def expand_names(names: Sequence[str]) -> list[str]:
    """Some of SINGLE_NAMES, each once, of which `names` may be groups. Raises UserError."""
    expanded: dict[str, None] = {}
    for name in names:
        if name not in (*SINGLE_NAMES, *GROUPS):
            near = difflib.get_close_matches(name.lower(), (*SINGLE_NAMES, *GROUPS), 1)
            raise UserError(f"there is no task {name!r}"
                            + (f", but {near[0]!r}" if near else "") + ": --help lists the tasks")
        expanded |= dict.fromkeys(GROUPS.get(name, (name,)))
    return list(expanded)


# what zipfile raises for a zip file that is damaged, encrypted or compressed in a rare way
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError,
              NotImplementedError)


class FoundFile(NamedTuple):
    """A file of a benchmark, in a folder or in a zip file."""

    name: str  # for messages
    content: bytes
    path: Path  # of the file itself, or of the zip file


def find_file(folder: Path, pattern: str) -> FoundFile | None:
    """The first file below a folder, or in one of its zip files, whose name matches a pattern."""
    for path in sorted(folder.rglob(pattern)):
        if path.is_file():
            return FoundFile(str(path), path.read_bytes(), path)
    for archive_path in sorted(folder.glob("*.zip")):
        try:
            if found := find_in_zip(archive_path, pattern):
                return found
        except ZIP_ERRORS as error:
            raise UserError(f"{archive_path} cannot be read ({first_line(error)}): remove it from "
                            "the folder, or get it again") from error
    return None


def find_in_zip(path: Path, pattern: str) -> FoundFile | None:
    """The first file in a zip file whose name matches a pattern. Raises one of ZIP_ERRORS."""
    with zipfile.ZipFile(path) as archive:
        for member in sorted(archive.namelist()):
            if PurePosixPath(member).match(pattern):
                return FoundFile(f"{member} in {path}", archive.read(member), path)
    return None


def find_first(folder: Path, patterns: Sequence[str]) -> FoundFile | None:
    """find_file for the first of several patterns that finds one."""
    return next((found for pattern in patterns if (found := find_file(folder, pattern))), None)


def patterns_of(name: str) -> tuple[str, ...]:
    """The patterns of the file that holds a benchmark."""
    return FILE_PATTERNS.get(name) or (core.CORE_TASKS[name].file_name,)


def find_benchmark_file(name: str, folder: Path | None) -> FoundFile | None:
    """The file that holds a benchmark, in a folder, or in DATA_DIR without one, or None."""
    patterns = patterns_of(name)
    found = find_first(folder or DATA_DIR, patterns)
    if found is None and patterns == ("hellaswag.jsonl",):
        found = convert_hellaswag(folder)
    return found


def check_files(names: Sequence[str], folder: Path | None) -> None:
    """Raise UserError if a folder that a user has named lacks the files of some benchmarks."""
    if folder is None:
        return
    missing = sorted({patterns_of(name)[0] for name in names
                      if not find_benchmark_file(name, folder)})
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: put what is missing there, name "
                        "other tasks, or leave out --data, so that it is downloaded")


def open_benchmark_file(name: str, folder: Path | None, ranks: Ranks) -> FoundFile:
    """
    The file that holds a benchmark, from a folder, or from DATA_DIR without one, to which it is
    downloaded if needed. All ranks call this together. Raises UserError, or OSError.
    """
    found = find_benchmark_file(name, folder)
    if distributed.on_any_rank(found is None, ranks.device) and folder is None:
        download_on_each_node(official_files()[name if name in FILE_PATTERNS else "core"], ranks)
        found = find_benchmark_file(name, None)
    if found is None:
        raise UserError(f"{name} needs the file {patterns_of(name)[0]}, which is not in "
                        f"{folder or DATA_DIR}: get the file, and name its folder with --data")
    return found


def convert_hellaswag(folder: Path | None) -> FoundFile | None:
    """HellaSwag's official val file in the format of CORE's, or None if there is none."""
    official = [HELLASWAG_FILE] if folder is None else sorted(folder.rglob("hellaswag_val*.jsonl"))
    for path in official:
        if path.is_file():
            items = []
            for example in iterate_examples(path, ("endings", "activity_label", "ctx_a", "ctx_b",
                                                   "label")):
                query, choices = lm_eval_texts(example)
                items.append({"query": query, "choices": choices, "gold": int(example["label"])})
            lines = "".join(json.dumps(item) + "\n" for item in items)
            return FoundFile(str(path), lines.encode("utf-8"), path)
    return None


def parse_lines(file: FoundFile, find_fault: Callable[[dict], str | None]) -> list[dict]:
    """The objects in a file of JSON lines. Raises UserError that names the first wrong line."""
    items = []
    for number, line in enumerate(file.content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            item = parse_json_object(line)
            fault = find_fault(item)
        except ValueError as error:
            fault = str(error)
        # not str(item), which writes a lone surrogate as ASCII characters
        if fault is None and re.search("[\ud800-\udfff]", json.dumps(item, ensure_ascii=False)):
            fault = "has a lone surrogate, half of a character of UTF-16"
        if fault:
            raise UserError(f"{file.name}, line {number} {fault}")
        items.append(item)
    if not items:
        raise UserError(f"{file.name} is empty: get it again, or name another folder")
    return items


def find_fault_of_passage(item: dict) -> str | None:
    """What is wrong with a line of LAMBADA, which has a text, or a context and its last word."""
    texts = [item["text"]] if "text" in item else [item.get("context"), item.get("continuation")]
    if all(isinstance(text, str) for text in texts) and str(texts[-1]).strip():
        return None
    return "lacks text"


def passage_of(item: dict) -> str:
    """The whole passage of a line of LAMBADA."""
    return item["text"] if "text" in item else f"{item['context'].rstrip()} {item['continuation']}"


def decode_text(file: FoundFile) -> str:
    """The text of a file. Raises UserError if it is not UTF-8, or empty."""
    try:
        text = file.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name} is not UTF-8 (byte {error.start}): convert it") from error
    if not text.strip():
        raise UserError(f"{file.name} is empty: name another file")
    return text


def load_benchmark(name: str, folder: Path | None, ranks: Ranks, limit: int | None,
                   stride: int | None) -> list[Benchmark]:
    """The benchmarks of one of NAMES that is not a group. Raises UserError, or OSError."""
    file = open_benchmark_file(name, folder, ranks)
    if name == "wikitext":
        text = decode_text(file).replace("\r\n", "\n")
        return sign(make_wikitext(text, limit, stride), file)
    if name == "lambada":
        passages = [passage_of(item) for item in parse_lines(file, find_fault_of_passage)]
        return sign([Lambada(passages, limit)], file)
    task = core.CORE_TASKS[name]
    items = parse_lines(file, lambda item: core.find_fault(item, task.kind))
    return sign([Core(task, items, limit)], file)


def load_text(path: Path, limit: int | None, stride: int | None,
              is_wikitext: bool = False) -> list[Benchmark]:
    """
    The benchmarks of a UTF-8 text file of one's own, which is a single document, or of another file
    in the format of WikiText's raw text.
    """
    file = FoundFile(str(path), path.read_bytes(), path)
    text, name = decode_text(file), f"text {path.name}"
    if is_wikitext:
        return sign(make_wikitext(text.replace("\r\n", "\n"), limit, stride), file)
    document = Document(text, len(text.split()), len(text.encode("utf-8")))
    found: list[Benchmark] = [Perplexity(name, [document], limit)]
    return sign([*found, Strided(name, text, stride, limit)] if stride else found, file)


def sign(made: list[Benchmark], file: FoundFile) -> list[Benchmark]:
    """The benchmarks `made` from a file, with its path and its fingerprint."""
    for benchmark in made:
        benchmark.path, benchmark.fingerprint = file.path, sha256(file.content)[:16]
    return made


# -----------------------------------------------------------------------------
# scoring


def score_benchmark(
        model: Any, tokenizer: Tokenizer, benchmark: Benchmark, ranks: Ranks,
        batch_tokens: int | None = None, on_result: Callable[[int, dict], Any] | None = None,
        stop: Callable[[], bool] = lambda: False) -> dict[int, dict]:
    """
    {number: result} of the examples that this rank scores: those at the places r, r + world_size,
    ... of benchmark.numbers on rank r. `model` is a GPT. `on_result(number, result)` is called for
    each. If `stop()` returns true, the remaining examples are not scored.
    """
    block_size, vocab_size = model.config.block_size, tokenizer.vocab_size
    share = benchmark.numbers[ranks.ddp_rank::ranks.ddp_world_size]
    results: dict[int, dict] = {}
    for start in range(0, len(share), EXAMPLES_AT_ONCE):
        numbers = share[start:start + EXAMPLES_AT_ONCE]
        texts = [benchmark.texts(number) for number in numbers]
        encoded = iter(tokenizer.encode_batch([text for group in texts for text in group]))
        rows = [benchmark.rows(number, [next(encoded).tolist() for _ in group], tokenizer.eot,
                               block_size)
                for number, group in zip(numbers, texts, strict=True)]
        for i, scores in score_examples(model, rows, ranks.device, vocab_size, batch_tokens):
            results[numbers[i]] = benchmark.judge(numbers[i], rows[i], scores)
            if on_result:
                on_result(numbers[i], results[numbers[i]])
            if stop():
                return results
    return results


def gather_results(results: dict[int, dict]) -> list[tuple[int, dict]]:
    """The (number, result) pairs of all ranks in the order of the numbers, the same on each."""
    by_rank = [results]
    if dist.is_initialized():
        by_rank = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(by_rank, results)
    return sorted((pair for part in by_rank for pair in part.items()), key=lambda pair: pair[0])


# -----------------------------------------------------------------------------
# during training


class Scheduled(NamedTuple):
    """A benchmark that is scored during training."""

    every: int  # updates between two scores
    # (model, stop) -> (line to print, {stream: value} to log). All ranks call it together. The
    # result has no meaning if stop() has ended it early
    score: Callable[[Any, Callable[[], bool]], tuple[str, dict[str, float]]]


def schedule(raw_model: Any, tokenizer: Tokenizer, config: Any, ranks: Ranks) -> list[Scheduled]:
    """
    What a TrainConfig says to score during training: HellaSwag, and the tasks of --eval_tasks.
    Raises UserError, or OSError if a file of a task cannot be downloaded. HellaSwag's file may be
    missing, because nobody has asked for it.
    """
    scheduled = []
    if prepared := prepare_for_training(raw_model, tokenizer, config, ranks):
        def score_hellaswag(model: Any, stop: Callable[[], bool]) -> tuple[str, dict[str, float]]:
            line, accuracy = summarize_accuracy(model, prepared, ranks, stop)
            return line, {"hella": accuracy}

        scheduled.append(Scheduled(config.hellaswag_every, score_hellaswag))
    for name in expand_names(split_list(config.eval_tasks)):
        for benchmark in load_benchmark(name, None, ranks, config.eval_tasks_limit or None, None):
            benchmark.prepare(tokenizer, raw_model.config.block_size)
            scheduled.append(Scheduled(config.eval_tasks_every, functools.partial(
                score_in_training, benchmark, tokenizer, ranks)))
    return scheduled


def score_in_training(benchmark: Benchmark, tokenizer: Tokenizer, ranks: Ranks, model: Any,
                      stop: Callable[[], bool]) -> tuple[str, dict[str, float]]:
    """(line to print, {stream: value} to log) of a benchmark, as Scheduled says."""
    start = time.perf_counter()
    results = gather_results(score_benchmark(model, tokenizer, benchmark, ranks, stop=stop))
    if not results:  # stopped at once
        return "", {}
    metrics = benchmark.metrics([result for _, result in results])
    line = ", ".join(f"{metric.name} {metric.value:.4f}" for metric in metrics)
    main = next(metric for metric in metrics if metric.name == benchmark.main_metric)
    return (f"{benchmark.name}: {line} | {len(results)} examples | "
            f"{time.perf_counter() - start:.1f}s"), {benchmark.name: main.value}
