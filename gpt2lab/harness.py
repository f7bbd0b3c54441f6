"""
Tasks of lm-eval (EleutherAI's harness, the optional package lm_eval) on a GPT.

lm-eval makes the requests of a task and computes its metrics. This module answers the requests:
texts that begin alike are scored as prefix trees, in which each shared token is computed once. The
results are those of `lm_eval --model hf` on the exported model.

`model` is a GPT of train_gpt2.py. Its type here is Any, because gpt2lab does not import scripts.
"""

import difflib
import functools
import io
import logging
import numbers
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from gpt2lab.cli import UserError, first_line
from gpt2lab.distributed import Ranks, on_master
from gpt2lab.generate import generate
from gpt2lab.scoring import Rows, score_examples
from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer

# how many characters of requests are turned into tokens and prefix trees at once: 100 MB of memory
WINDOW_CHARS = 2_000_000
# a CPU multiplies as fast with fewer tokens than score_examples takes by default, and small batches
# hold trees of more similar sizes, with less padding
CPU_BATCH_TOKENS = 512
# the mask of a prefix tree has the square of this many values
MAX_TREE_TOKENS = 2048
MAX_TREE_ROWS = 256
# standard errors of perplexities are bootstrapped. lm-eval's default of 100,000 iterations can take
# longer than the scoring, and with 1,000 the error is within a few percent of the same
BOOTSTRAP_ITERATIONS = 1000
FEWSHOT_SEED = 1234  # lm-eval's default, as are the next two
RANDOM_SEED, NUMPY_SEED = 0, 1234
MAX_NEW_TOKENS = 256  # lm-eval's default for a request that does not say how many
TOP_K = 50  # Hugging Face's default for a request that samples

# -----------------------------------------------------------------------------
# rows with common beginnings


def count_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the beginning of two rows are the same."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def group_rows(rows: Sequence[list[int]], n_embd: int) -> list[list[int]]:
    """
    Indices of `rows` in groups, each of which is scored as one prefix tree of a GPT of this n_embd.
    A row joins a group if this saves more operations than it costs.

    A shared token saves 24 n_embd^2 operations of the matmuls in a layer. A pair of tokens costs
    4 n_embd operations of attention, and takes about three times as long for each. In a tree, every
    token is paired with every other one, because the mask is applied afterwards.
    """
    groups: list[list[int]] = []
    num_nodes = 0  # of the last group's tree
    for i in sorted(range(len(rows)), key=rows.__getitem__):  # neighbours share most
        shared = count_shared(rows[groups[-1][-1]], rows[i]) if groups else 0
        added = len(rows[i]) - shared
        saved_pairs = 2 * n_embd * shared + len(rows[i]) ** 2
        if (shared and (2 * num_nodes + added) * added <= saved_pairs
                and num_nodes + added <= MAX_TREE_TOKENS and len(groups[-1]) < MAX_TREE_ROWS):
            groups[-1].append(i)
            num_nodes += added
        else:
            groups.append([i])
            num_nodes = len(rows[i])
    return groups


# -----------------------------------------------------------------------------
# answers to lm-eval's requests


def split_into_windows(requests: Sequence[Any]) -> Iterator[list[Any]]:
    """The requests in lists of about WINDOW_CHARS characters."""
    window, num_chars = [], 0
    for request in requests:
        window.append(request)
        num_chars += sum(len(part) for part in request.args if isinstance(part, str))
        if num_chars >= WINDOW_CHARS:
            yield window
            window, num_chars = [], 0
    if window:
        yield window


def sampling_options(options: dict) -> dict[str, float]:
    """The options of sample_token that a request's generation options ask for."""
    temperature = options.get("temperature")
    if options.get("num_beams", 1) != 1:
        raise UserError("the task asks for beam search, which this model does not have: run it "
                        "with lm_eval --model hf on the exported model")
    if not options.get("do_sample", bool(temperature)):
        temperature = 0.0
    return {"temperature": 1.0 if temperature is None else float(temperature),
            "top_k": int(options.get("top_k", TOP_K)), "top_p": float(options.get("top_p", 1)),
            "repetition_penalty": float(options.get("repetition_penalty", 1))}


def max_new_tokens(options: dict) -> int:
    """How many tokens a request's generation options allow."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return int(next((options[name] for name in names if options.get(name) is not None),
                    MAX_NEW_TOKENS))


class Answers:
    """
    What a GPT answers to the requests of a task. All ranks get the same requests. Each rank answers
    its share, and all ranks return all answers.

    on_requests: called with the number of requests that have been answered, a float.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, ranks: Ranks, batch_tokens: int | None,
                 on_requests: Callable[[float], Any]) -> None:
        self.model, self.tokenizer, self.ranks = model, tokenizer, ranks
        if batch_tokens is None and ranks.device.type == "cpu":
            batch_tokens = CPU_BATCH_TOKENS
        self.batch_tokens, self.on_requests = batch_tokens, on_requests
        self.block_size = model.config.block_size
        self.num_answered = self.window_size = 0

    def windows(self, requests: Sequence[Any]) -> Iterator[list[Any]]:
        """The requests in lists, each of which is answered before the next one is taken."""
        for window in split_into_windows(requests):
            self.window_size = len(window)
            yield window
            self.num_answered += self.window_size
            self.on_requests(self.num_answered)

    def report(self, share: float) -> None:
        """Report that this share of the current window, from 0 to 1, has been answered."""
        self.on_requests(self.num_answered + share * self.window_size)

    def gather(self, answers: dict[int, Any]) -> list[Any]:
        """The answers of all ranks, {number: answer} each, in the order of their numbers."""
        parts = [answers] * self.ranks.ddp_world_size
        if self.ranks.ddp_world_size > 1:
            dist.all_gather_object(parts, answers)
        return [answer for _, answer in sorted(pair for part in parts for pair in part.items())]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, in which <|endoftext|> becomes eot, as in Hugging Face's class."""
        ids = self.tokenizer.encode_batch(text.split(END_OF_TEXT))
        return [i for part in ids for i in (self.tokenizer.eot, *part.tolist())][1:]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, in which invalid UTF-8 becomes U+FFFD, also at the end."""
        return self.tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """
        For pairs of token ids (context, continuation): the log-likelihood of the continuation in
        nats, and whether each of its tokens is the likeliest one. A context that is too long loses
        its left part.
        """
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self.block_size:
            raise UserError(f"the task has an answer of {longest} tokens, which is longer than the "
                            f"model's block_size of {self.block_size}: choose another task")
        # the last token of a row is only predicted, so a row may have one token more
        rows = [((context or [self.tokenizer.eot]) + continuation)[-self.block_size - 1:]
                for context, continuation in pairs]
        groups = group_rows(rows, self.model.config.n_embd)
        groups = groups[self.ranks.ddp_rank::self.ranks.ddp_world_size]
        examples = [Rows([rows[i] for i in group], [len(pairs[i][1]) for i in group])
                    for group in groups]
        answers = {}
        for number, scores in score_examples(self.model, examples, self.ranks.device,
                                             self.tokenizer.vocab_size, self.batch_tokens):
            found = zip(groups[number], scores.loss_sums, scores.all_greedy, strict=True)
            answers.update({i: (-float(loss), bool(greedy)) for i, loss, greedy in found})
            self.report(min(len(answers) * self.ranks.ddp_world_size / len(rows), 1))
        return self.gather(answers)

    def cut_text(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """
        The pairs (context, continuation) for `score` that together predict each token of a text
        once, the first one after eot. Only the last of them has a context of other tokens.
        """
        ids = [self.tokenizer.eot, *self.encode(text)]
        for start in range(1, len(ids), self.block_size):
            end = min(start + self.block_size, len(ids))
            yield ids[max(end - self.block_size - 1, 0):start], ids[start:end]

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihoods in nats of whole texts of any length."""
        pairs, counts = [], []
        for text in texts:
            windows = list(self.cut_text(text))
            pairs += windows
            counts.append(len(windows))
        scores = iter(self.score(pairs))
        return [sum(loglikelihood for loglikelihood, _ in islice(scores, count))
                for count in counts]

    def continue_texts(self, requests: Sequence[tuple[str, dict]]) -> list[str]:
        """The continuation of each request, (text, generation options)."""
        numbers = range(self.ranks.ddp_rank, len(requests), self.ranks.ddp_world_size)
        answers = {}
        for number in numbers:
            answers[number] = self.continue_text(*requests[number], self.num_answered + number)
            self.report(len(answers) / len(numbers))
        return self.gather(answers)

    def continue_text(self, text: str, options: dict, number: int) -> str:
        """
        The continuation of a text before the first of the stop texts. Request `number` has random
        draws of its own. A text that leaves too little room in the block loses its left part.
        """
        stops = options.get("until") or []
        stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
        stops.append(END_OF_TEXT)
        length = max_new_tokens(options)
        room = self.block_size - length
        prompt = self.encode(text)[-(room if room > 0 else max(self.block_size // 2, 1)):]
        ids: list[int] = []

        def on_token(_: int, token: int | None) -> bool:
            ids.extend([] if token is None else [token])
            continuation = self.decode(ids)
            return any(stop in continuation for stop in stops)

        generate(self.model, prompt, self.tokenizer.eot, self.tokenizer.vocab_size,
                 max_new_tokens=length, first_sample=number, on_token=on_token,
                 **sampling_options(options))
        return re.split("|".join(map(re.escape, stops)), self.decode(ids), maxsplit=1)[0]


def make_lm(answers: Answers) -> Any:
    """The Answers as a model of lm-eval, which sees a single rank and all requests."""
    from lm_eval.api.model import TemplateLM

    class GPTModel(TemplateLM):
        """lm-eval's interface. TemplateLM splits texts into context and continuation."""

        eot_token_id = answers.tokenizer.eot
        max_length = answers.block_size
        max_gen_toks = MAX_NEW_TOKENS
        device = answers.ranks.device

        def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
            return answers.encode(string)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return [answer for window in answers.windows(requests)
                    for answer in super(GPTModel, self).loglikelihood(window, disable_tqdm=True)]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            return answers.score([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return [answer for window in answers.windows(requests)
                    for answer in answers.score_texts([request.args[0] for request in window])]

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return [answer for window in answers.windows(requests)
                    for answer in answers.continue_texts([request.args for request in window])]

    return GPTModel()


# -----------------------------------------------------------------------------
# lm-eval's tasks


class Nowhere(io.TextIOBase):
    """A stream that drops what is written. It stays open, because loggers may keep it."""

    def write(self, text: str) -> int:
        """Drop the text."""
        return len(text)


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Hide lm-eval's progress bars, warnings and prints in this block. Errors are raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(Nowhere()), redirect_stderr(Nowhere()):
            yield
    finally:
        logger.setLevel(level)


def import_lm_eval() -> None:
    """Import what is used of lm_eval. Raises UserError if the package is not installed."""
    try:
        import lm_eval.evaluator
        import lm_eval.tasks  # noqa: F401
    except (ImportError, AttributeError) as error:  # an old lm_eval misses names of transformers
        raise UserError(f"tasks of lm-eval need the package lm_eval ({first_line(error)}): "
                        'pip install --upgrade "lm_eval>=0.4.13,<1"') from error


def is_file_name(name: str) -> bool:
    """Whether the name of a task is the path of a file that defines it."""
    return name.endswith((".yaml", ".yml"))


def make_task_manager(names: Sequence[str]) -> Any:
    """
    lm-eval's TaskManager for these tasks. Raises UserError for an unknown name or a missing file.
    """
    from lm_eval.tasks import TaskManager
    for name in filter(is_file_name, names):
        if not Path(name).is_file():
            raise UserError(f"no file {name}, which should define a task of lm-eval: check the "
                            "path")
    # reading lm-eval's own 10,000 files takes seconds. A group in a file can name tasks in them
    need_own = any(not is_file_name(name) or re.search(
        "^group:", Path(name).read_text(encoding="utf-8"), re.MULTILINE) for name in names)
    manager = TaskManager(include_defaults=need_own)
    for name in names:
        if not is_file_name(name) and name not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks))
            raise UserError(f"lm-eval has no task {name!r}: " + (
                f"near names are {near}" if near else "lm_eval ls tasks lists the names"))
    return manager


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """
    {name: lm-eval's task object} with data, for names of tasks, groups and tags, and for paths of
    .yaml files. Raises UserError if one is unknown, cannot be loaded or cannot be run.
    """
    # some tasks draw while they load. All ranks must draw the same, and the same as lm-eval
    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)
    manager = make_task_manager(names)
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            tasks.update(manager.load([name])["tasks"])
        except ImportError as error:
            raise UserError(f"lm-eval's task {name} needs another package "
                            f"({first_line(error):.150}): install it") from error
        except Exception as error:  # whatever the task's own code or its download raises
            raise UserError(
                f"lm-eval cannot load the task {name} ({type(error).__name__}: "
                f"{first_line(error):.150}): check the network, or set HF_ENDPOINT to a mirror of "
                "the hub, or load the task's data where there is a network and copy the folder "
                "that HF_HOME names") from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"lm-eval's task {name} runs code that the model writes, or shows it "
                            "images: choose another task")
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks


def load_tasks_on_all_ranks(names: Sequence[str], ranks: Ranks) -> dict[str, Any]:
    """load_tasks, first on the master, so that the others find its downloads in the cache."""
    tasks: dict[str, Any] = {}
    on_master(ranks, lambda: tasks.update(load_tasks(names)))
    return tasks if ranks.master_process else load_tasks(names)


# -----------------------------------------------------------------------------
# results


def read_result(results: dict, name: str) -> dict[str, Any]:
    """What evaluate_with_lm_eval returns for a task, from what lm-eval's evaluate returns."""
    values, metrics = results["results"][name], {}
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
            continue
        stderr = values.get(f"{metric}_stderr,{filter_name}")
        metrics[metric if filter_name == "none" else key] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, numbers.Real) else None}
    result = {"shots": int(results["n-shot"][name]), "metrics": metrics,
              "examples": int(results["n-samples"][name]["effective"])}
    higher = {metric: bool(value)
              for metric, value in (results["higher_is_better"].get(name) or {}).items()
              if value is not None}
    return result | ({"higher_is_better": higher} if higher else {})


class Progress:
    """
    Calls on_progress(examples done, examples of all tasks) while tasks are run one after the other.
    Make it before quiet_lm_eval, so that on_progress can print.
    """

    def __init__(self, on_progress: Callable[[int, int], Any] | None) -> None:
        self.on_progress, self.streams = on_progress, (sys.stdout, sys.stderr)
        self.num_done = self.num_examples = 0

    def follow(self, task: Any, size: int) -> Callable[[float], None]:
        """A function for Answers, which is called with how many requests of a task are answered."""
        start = self.num_done
        self.num_done += size

        @functools.cache
        def count_requests() -> int:  # lm-eval makes them when it has been started
            return sum(instance.repeats for instance in task.instances)

        def on_requests(num_answered: float) -> None:
            if self.on_progress:
                num_done = start + int(size * num_answered / count_requests())
                with redirect_stdout(self.streams[0]), redirect_stderr(self.streams[1]):
                    self.on_progress(num_done, self.num_examples)

        return on_requests


def run_task(name: str, task: Any, answers: Answers, limit: int | None) -> dict[str, Any]:
    """The result of a task of load_tasks, the same on every rank."""
    from lm_eval.evaluator import evaluate
    # in this process, because a process with the threads of torch and gloo should not fork
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    master = answers.ranks.master_process
    results = evaluate(make_lm(answers), {name: task}, limit=limit, log_samples=False,
                       bootstrap_iters=BOOTSTRAP_ITERATIONS if master else 0)
    return on_master(answers.ranks, lambda: read_result(results, name))


def evaluate_with_lm_eval(
        model: Any, tokenizer: Tokenizer, task_names: Sequence[str], ranks: Ranks,
        limit: int | None = None, batch_tokens: int | None = None,
        on_progress: Callable[[int, int], Any] | None = None) -> dict[str, dict[str, Any]]:
    """
    The results of a GPT on tasks of lm-eval, the same on every rank: {task: {"shots": int,
    "metrics": {metric: {"value": float, "stderr": float or None}}, "examples": int,
    "higher_is_better": {metric: bool}}}. A metric behind a filter is named "METRIC,FILTER". The
    last key is missing where lm-eval does not say it.

    task_names: names of tasks, groups and tags, which become one entry for each task, or paths of
    .yaml files that define tasks. limit: score only the first examples of each task, at least 1.
    batch_tokens: how many tokens are scored at once. on_progress: called on the master with
    (examples done, examples of all tasks).

    Raises UserError if lm_eval is not installed, or if a task is unknown, cannot be loaded or does
    not fit the model. Python's and numpy's random generators are seeded as lm-eval does.
    """
    import_lm_eval()
    progress = Progress(on_progress if ranks.master_process else None)
    with quiet_lm_eval():
        tasks = load_tasks_on_all_ranks(task_names, ranks)
        sizes = {name: min(len(task.eval_docs), limit or sys.maxsize)
                 for name, task in tasks.items()}
        progress.num_examples = sum(sizes.values())
        return {name: run_task(name, task, Answers(model, tokenizer, ranks, batch_tokens,
                                                   progress.follow(task, sizes[name])), limit)
                for name, task in tasks.items()}
