"""
CORE (Li et al. 2024, "DataComp-LM"): 22 tasks that tell base models apart. What is here follows
nanochat's core_eval, which its leaderboard uses: the prompts, the examples drawn for them, what is
scored and how the accuracies become one number.

An item is a line of a task's file, a dict:
- multiple_choice: query, choices, gold (the number of the right choice);
- schema: context_options, continuation, gold (the number of the right context);
- language_modeling: context, continuation.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpt2lab.scoring import ExampleScores, Rows


class CoreTask(NamedTuple):
    """One of CORE's tasks."""

    name: str
    file_name: str
    kind: str  # multiple_choice, schema or language_modeling
    shots: int  # solved items in front of each item
    random_baseline: float  # the accuracy of guessing, or of always giving the same answer
    delimiter: str = " "  # between a question and its answer


ANSWER = "\nAnswer: "
# the baselines are those of nanochat's bundle, with which all its values of CORE were computed. For
# commonsense_qa, agi_eval_lsat_ar and bigbench_language_identification, DCLM's authors have
# replaced them since by .403, .25 and .25
CORE_TASKS = {task.name: task for task in (
    CoreTask("hellaswag_zeroshot", "hellaswag.jsonl", "multiple_choice", 0, .25),
    CoreTask("jeopardy", "jeopardy_all.jsonl", "language_modeling", 10, 0, ANSWER),
    CoreTask("bigbench_qa_wikidata", "bigbench_qa_wikidata.jsonl", "language_modeling", 10, 0),
    CoreTask("arc_easy", "arc_easy.jsonl", "multiple_choice", 10, .25, ANSWER),
    CoreTask("arc_challenge", "arc_challenge.jsonl", "multiple_choice", 10, .25, ANSWER),
    CoreTask("copa", "copa.jsonl", "multiple_choice", 0, .50),
    CoreTask("commonsense_qa", "commonsense_qa.jsonl", "multiple_choice", 10, .20),
    CoreTask("piqa", "piqa.jsonl", "multiple_choice", 10, .50, ANSWER),
    CoreTask("openbook_qa", "openbook_qa.jsonl", "multiple_choice", 0, .25),
    CoreTask("lambada_openai", "lambada_openai.jsonl", "language_modeling", 0, 0),
    CoreTask("hellaswag", "hellaswag.jsonl", "multiple_choice", 10, .25),
    CoreTask("winograd", "winograd_wsc.jsonl", "schema", 0, .50),
    CoreTask("winogrande", "winogrande.jsonl", "schema", 0, .50),
    CoreTask("bigbench_dyck_languages", "bigbench_dyck_languages.jsonl",
             "language_modeling", 10, 0),
    CoreTask("agi_eval_lsat_ar", "agi_eval_lsat_ar.jsonl", "multiple_choice", 3, .20),
    CoreTask("bigbench_cs_algorithms", "bigbench_cs_algorithms.jsonl", "language_modeling", 10, 0),
    CoreTask("bigbench_operators", "bigbench_operators.jsonl", "language_modeling", 10, 0),
    CoreTask("bigbench_repeat_copy_logic", "bigbench_repeat_copy_logic.jsonl",
             "language_modeling", 10, 0),
    CoreTask("squad", "squad.jsonl", "language_modeling", 10, 0),
    CoreTask("coqa", "coqa.jsonl", "language_modeling", 0, 0),
    CoreTask("boolq", "boolq.jsonl", "multiple_choice", 10, .62, ANSWER),
    CoreTask("bigbench_language_identification", "bigbench_language_identification.jsonl",
             "multiple_choice", 10, .091))}


def find_fault(item: dict, kind: str) -> str | None:
    """What is wrong with an item of a task of this kind, in words that follow "line 7 ", or None"""
    fields = {"multiple_choice": ("query", "choices", "gold"),
              "schema": ("context_options", "continuation", "gold"),
              "language_modeling": ("context", "continuation")}[kind]
    missing = [field for field in fields if field not in item]
    if missing:
        return f"lacks {', '.join(missing)}"
    for field in fields:
        value = item[field]
        if field == "gold":
            options = item[fields[0] if kind == "schema" else fields[1]]
            if type(value) is not int or not 0 <= value < len(options):
                return f"must have a gold from 0 to {len(options) - 1}"
        elif field in ("choices", "context_options"):
            if not isinstance(value, list) or len(value) < 2:
                return f"must have two or more {field}"
            if not all(is_text(option) for option in value):
                return f"has {field} that are not text"
        elif not is_text(value):
            return f"has a {field} that is not text"
    if kind == "language_modeling" and not str(item["continuation"]).strip():
        return "has an empty continuation"
    return None


def is_text(value: Any) -> bool:
    """Whether a value can stand in a prompt: text, or a number, which is written as text."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


# -----------------------------------------------------------------------------
# prompts


def shuffle_items(items: Sequence[dict]) -> list[dict]:
    """The items of a task's file in the order in which they are numbered."""
    shuffled = list(items)
    random.Random(1337).shuffle(shuffled)
    return shuffled


def draw_shots(number: int, num_items: int, shots: int) -> list[int]:
    """The numbers of the solved items in front of item `number`, which is not among them."""
    drawn = random.Random(1234 + number).sample(range(num_items - 1), shots)
    return [other + (other >= number) for other in drawn]


def make_prompts(task: CoreTask, items: Sequence[dict], number: int) -> list[str]:
    """
    The texts of item `number`: one for each choice or context. A language_modeling task has two,
    without and with the continuation.
    """
    solved = "".join(solve(task, items[other]) + "\n\n"
                     for other in draw_shots(number, len(items), task.shots))
    item = items[number]
    if task.kind == "multiple_choice":
        return [f"{solved}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{solved}{context}{task.delimiter}{item['continuation']}"
                for context in item["context_options"]]
    prompt = f"{solved}{str(item['context']).strip()}{task.delimiter}"
    # the prompt ends without a space, because the space belongs to the continuation's first token
    return [prompt.strip(), f"{prompt}{item['continuation']}"]


def solve(task: CoreTask, item: dict) -> str:
    """The text of an item with its right answer."""
    if task.kind == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    if task.kind == "schema":
        return f"{item['context_options'][item['gold']]}{task.delimiter}{item['continuation']}"
    return f"{str(item['context']).strip()}{task.delimiter}{item['continuation']}"


# -----------------------------------------------------------------------------
# what is scored


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows have in common at their beginning."""
    shortest = min(map(len, rows))
    for i in range(shortest):
        if len({row[i] for row in rows}) > 1:
            return i
    return shortest


def make_rows(task: CoreTask, encoded: Sequence[list[int]], eot: int, block_size: int) -> Rows:
    """
    The rows of an item, given the token ids of its prompts. Each begins with end-of-text. What is
    scored is where the rows differ: the choices, or what follows the contexts. A row longer than
    block_size loses its left part.
    """
    rows = [[eot, *tokens] for tokens in encoded]
    if task.kind == "schema":
        suffix = common_length([row[::-1] for row in rows])
        num_scored = [suffix] * len(rows)
    else:
        prefix = common_length(rows)
        num_scored = [len(row) - prefix for row in rows]
    if task.kind == "language_modeling":  # the first prompt only tells where the continuation is
        rows, num_scored = rows[1:], num_scored[1:]
    rows = [row[-block_size:] for row in rows]
    # the first token of a row has no token before it that could predict it
    return Rows(rows, [min(count, len(row) - 1)
                       for row, count in zip(rows, num_scored, strict=True)])


def is_correct(task: CoreTask, item: dict, rows: Rows, scores: ExampleScores) -> bool:
    """
    Whether the model is right about an item: the right choice or context has the lowest mean loss,
    or each token of the continuation is the likeliest one.
    """
    if task.kind == "language_modeling":
        return bool(scores.all_greedy[0])
    means = [loss_sum / count if count else float("nan")
             for loss_sum, count in zip(scores.loss_sums.tolist(), rows.num_scored, strict=True)]
    # min, and not numpy's, because the two treat the NaN of an empty choice differently
    return means.index(min(means)) == item["gold"]


def center(accuracy: float, random_baseline: float) -> float:
    """An accuracy on a scale on which guessing is 0 and perfection is 1."""
    return (accuracy - random_baseline) / (1 - random_baseline)
