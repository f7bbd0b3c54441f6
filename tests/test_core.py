"""CORE's tasks: prompts, what is scored and predictions equal those of the reference."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import small_text
from reference import order_core_items, score_core_item, word_core_prompts

from gpt2lab import benchmarks, core, scoring
from gpt2lab.benchmarks import FoundFile, load_benchmark, parse_lines, score_benchmark
from gpt2lab.cli import UserError
from gpt2lab.core import CORE_TASKS, CoreTask
from gpt2lab.distributed import Ranks
from gpt2lab.tokenizer import train_bpe
from train_gpt2 import GPT, GPTConfig

CPU = torch.device("cpu")
KINDS = ("multiple_choice", "schema", "language_modeling")
WORDS = ("door", "green apple", "old, grey horse", "lamp", "sea", "the red boat of the smith")
ITEMS = {
    "multiple_choice": [
        {"query": f"Question {i}: where is the {word}? ", "gold": i % 3,
         "choices": ["in the house", f"under the {word}", 7 + i, "it is in a far country"]}
        for i, word in enumerate(WORDS)],
    "schema": [
        {"context_options": [f"The {word} and the stone", "She", f"A {word} or the man"],
         "continuation": f"fell into the water because it was number {i}.", "gold": i % 3}
        for i, word in enumerate(WORDS)],
    # small_model predicts " the" almost everywhere
    "language_modeling": [
        {"context": f" The {word} is in \n", "continuation": continuation}
        for word, continuation in zip(WORDS, (
            "the", "the the the", "the old the", "old", "the a the", "of the"), strict=True)]}


@pytest.fixture(scope="module")
def bpe300():
    """A tokenizer of 300 tokens."""
    return train_bpe([small_text()], 300)


def small_model(tokenizer, block_size):
    """A small GPT whose losses are far from uniform, and which likes the token " the" best."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=tokenizer.vocab_size, n_layer=2,
                          n_head=2, n_embd=16)).eval()
    the, = tokenizer.encode(" the")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
        model.transformer.ln_f.bias += 100 * model.transformer.wte.weight[the]
    return model


def make_task(kind, shots=2, delimiter="\nAnswer: "):
    """A task of CORE over a made-up file."""
    return CoreTask("made_up", "made_up.jsonl", kind, shots, 0.25, delimiter)


def score_items(model, tokenizer, task, items):
    """[(Rows, ExampleScores, whether the model is right)] of all items."""
    rows = [core.make_rows(task, [tokenizer.encode(prompt) for prompt
                                  in core.make_prompts(task, items, number)],
                           tokenizer.eot, model.config.block_size)
            for number in range(len(items))]
    scores = dict(scoring.score_examples(model, rows, CPU, tokenizer.vocab_size))
    return [(rows[number], scores[number],
             core.is_correct(task, item, rows[number], scores[number]))
            for number, item in enumerate(items)]


def check_against_reference(model, tokenizer, task, items):
    """Compare prompts, predictions and mean losses with the reference; returns what is correct."""
    all_correct = []
    for number, (rows, scores, correct) in enumerate(score_items(model, tokenizer, task, items)):
        assert core.make_prompts(task, items, number) == word_core_prompts(task, items, number)
        expected = score_core_item(model, tokenizer, task, items, number)
        assert rows.num_scored == expected.num_scored
        for loss_sum, count, mean in zip(scores.loss_sums, rows.num_scored, expected.mean_losses,
                                         strict=True):
            assert loss_sum / count == pytest.approx(mean, abs=1e-3) if count else math.isnan(mean)
        assert correct is expected.correct
        all_correct.append(correct)
    return all_correct


# predictions


@pytest.mark.parametrize("block_size", [512, 40, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_equal_those_of_the_reference(bpe300, kind, block_size):
    """With a block_size of 9 tokens, most continuations are cropped."""
    model = small_model(bpe300, block_size)
    for shots, delimiter in ((0, " "), (3, "\nAnswer: ")):
        correct = check_against_reference(
            model, bpe300, make_task(kind, shots, delimiter), ITEMS[kind])
        if kind == "language_modeling" and block_size == 512:
            assert correct == [True, True, False, False, False, False]
        elif block_size == 512:
            assert any(correct) and not all(correct)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_equal_those_of_the_reference_with_gpt2(gpt2_tokenizer, kind):
    check_against_reference(small_model(gpt2_tokenizer, 32), gpt2_tokenizer, make_task(kind),
                            ITEMS[kind][:3])


def test_real_items_are_scored_as_by_the_reference(real_data, bpe300):
    model = small_model(bpe300, 512)
    tasks = [task for task in CORE_TASKS.values() if task.name not in ("squad", "coqa")]
    for task in tasks:
        benchmark, = load_benchmark(task.name, real_data, Ranks(CPU), 2, None)
        results = score_benchmark(model, bpe300, benchmark, Ranks(CPU))
        assert list(results) and set(results) == set(benchmark.numbers)
        for number, result in results.items():
            expected = score_core_item(model, bpe300, task, benchmark.items, number)
            assert result == {"correct": expected.correct}, (task.name, number)
    assert len(tasks) == 20


@pytest.mark.parametrize("choices, gold, correct", [
    # nothing of "sit" is scored, because all choices begin with it. Its mean loss is NaN
    (["sit", "sit down"], 0, True), (["sit", "sit down"], 1, False),
    (["sit down", "sit"], 0, True), (["sit down", "sit"], 1, False),
    (["sit", "sit"], 0, True), (["sit", "sit"], 1, False),
    ([7, 7.5], 1, False), (["", " the the the"], 1, False)])
def test_empty_spans_are_treated_as_by_the_reference(bpe300, choices, gold, correct):
    """Guards against numpy's argmin, which takes every NaN for the lowest."""
    item = {"query": "Where is 3", "choices": choices, "gold": gold}
    assert check_against_reference(small_model(bpe300, 64), bpe300,
                                   make_task("multiple_choice", 0, " "), [item]) == [correct]


def test_the_lowest_mean_loss_counts_and_not_the_lowest_sum(bpe300):
    item = {"query": "It is in", "choices": ["q", "x x the the the the the"], "gold": 1}
    task, model = make_task("multiple_choice", 0, " "), small_model(bpe300, 64)
    (_, scores, correct), = score_items(model, bpe300, task, [item])
    assert scores.loss_sums[1] > scores.loss_sums[0] and correct
    assert check_against_reference(model, bpe300, task, [item]) == [True]


# prompts


def test_the_prompts_of_each_kind():
    """Guards against a change of the prompts together with the reference's."""
    items = [{"query": "1 + 1?", "choices": ["one", 2], "gold": 1},
             {"query": " 2 + 2? ", "choices": ["4", " five "], "gold": 0}]
    assert core.make_prompts(make_task("multiple_choice", 1), items, 1) == [
        "1 + 1?\nAnswer: 2\n\n 2 + 2? \nAnswer: 4",
        "1 + 1?\nAnswer: 2\n\n 2 + 2? \nAnswer:  five "]
    items = [{"context_options": ["He", "She"], "continuation": "sings", "gold": 1},
             {"context_options": ["Cats", "Dogs"], "continuation": "bark.", "gold": 1}]
    assert core.make_prompts(make_task("schema", 1, " "), items, 1) == [
        "She sings\n\nCats bark.", "She sings\n\nDogs bark."]
    items = [{"context": " One\n", "continuation": "two"},
             {"context": "\tThree  ", "continuation": " four "}]
    assert core.make_prompts(make_task("language_modeling", 1, " "), items, 1) == [
        "One two\n\nThree", "One two\n\nThree  four "]
    assert core.make_prompts(make_task("language_modeling", 1), items, 0) == [
        "Three\nAnswer:  four \n\nOne\nAnswer:",
        "Three\nAnswer:  four \n\nOne\nAnswer: two"]


@pytest.mark.parametrize("number, num_items, draws", [
    (0, 200, [113, 30, 2, 24, 150, 9, 172, 178, 22, 26]),
    (7, 11, [10, 8, 3, 2, 6, 1, 9, 5, 0, 4]),
    (59, 60, [19, 47, 3, 34, 35, 29, 30, 17, 39, 43]),
    (3, 60, [10, 57, 26]),
    (1000, 10_042, [1396, 1603, 6598, 8285, 9745, 8572, 10034, 9855, 534, 5812])])
def test_the_solved_items_are_those_of_nanochat(number, num_items, draws):
    """The numbers were drawn from a list of all other items, as nanochat draws them."""
    assert core.draw_shots(number, num_items, len(draws)) == draws


def test_items_are_numbered_in_the_order_of_nanochat():
    items = [{"i": i} for i in range(12)]
    shuffled = core.shuffle_items(items)
    assert [item["i"] for item in shuffled] == [6, 0, 1, 4, 10, 7, 3, 11, 2, 5, 8, 9]
    assert shuffled == order_core_items(items) and items[0] == {"i": 0}
    task = make_task("multiple_choice")
    assert benchmarks.Core(task, items, None).items == shuffled
    # a limit leaves out items, but not what can be drawn
    limited = benchmarks.Core(task, items, 3)
    assert limited.numbers == [0, 4, 8] and limited.items == shuffled


# what is scored


def test_rows_begin_with_end_of_text_and_end_where_they_differ():
    for kind, rows, num_scored in (
            ("multiple_choice", [[9, 1, 2, 3], [9, 1, 4]], [2, 1]),
            ("multiple_choice", [[9, 1, 2], [9, 1, 2, 3]], [0, 1]),
            ("multiple_choice", [[9, 1, 2, 3], [9, 1, 2, 4], [9, 5]], [3, 3, 1]),
            ("schema", [[9, 1, 2, 5, 6], [9, 3, 5, 6]], [2, 2]),
            ("schema", [[9, 1, 5, 6], [9, 3, 5, 6], [9, 4, 6]], [1, 1, 1]),
            ("language_modeling", [[9, 1], [9, 1, 2, 3]], [2])):
        task = make_task(kind)
        encoded = [row[1:] for row in rows]
        kept = rows[1:] if kind == "language_modeling" else rows
        assert core.make_rows(task, encoded, 9, 100) == (kept, num_scored)
        short = core.make_rows(task, encoded, 9, 3)
        assert short == ([row[-3:] for row in kept], [min(n, 2) for n in num_scored])


def test_the_first_token_of_a_row_is_never_scored():
    """Contexts that are equal share everything, even end-of-text."""
    assert core.make_rows(make_task("schema"), [[1, 2], [1, 2]], 9, 100).num_scored == [2, 2]
    assert core.make_rows(make_task("multiple_choice"), [[1, 2, 3], [4]], 9, 2).num_scored == [1, 1]


# the tasks


# name: kind, solved items, accuracy of guessing in percent, whether the answer follows "Answer:"
TABLE = """
hellaswag_zeroshot m 0 25 no
jeopardy l 10 0 yes
bigbench_qa_wikidata l 10 0 no
arc_easy m 10 25 yes
arc_challenge m 10 25 yes
copa m 0 50 no
commonsense_qa m 10 20 no
piqa m 10 50 yes
openbook_qa m 0 25 no
lambada_openai l 0 0 no
hellaswag m 10 25 no
winograd s 0 50 no
winogrande s 0 50 no
bigbench_dyck_languages l 10 0 no
agi_eval_lsat_ar m 3 20 no
bigbench_cs_algorithms l 10 0 no
bigbench_operators l 10 0 no
bigbench_repeat_copy_logic l 10 0 no
squad l 10 0 no
coqa l 0 0 no
boolq m 10 62 yes
bigbench_language_identification m 10 9.1 no
"""


def test_the_tasks_are_those_of_core():
    """Guards against a mistyped number in the table of tasks."""
    rows = [line.split() for line in TABLE.strip().splitlines()]
    assert [row[0] for row in rows] == list(CORE_TASKS) and len(rows) == 22
    for name, kind, shots, percent, answer in rows:
        task = CORE_TASKS[name]
        assert (task.name, task.kind[0], task.shots) == (name, kind, int(shots))
        assert task.random_baseline == pytest.approx(float(percent) / 100)
        assert task.delimiter == ("\nAnswer: " if answer == "yes" else " ")
        file_name = {"hellaswag_zeroshot": "hellaswag", "jeopardy": "jeopardy_all",
                     "winograd": "winograd_wsc"}.get(name, name)
        assert task.file_name == f"{file_name}.jsonl"


def test_centring_puts_guessing_at_0_and_perfection_at_1():
    assert core.center(0.25, 0.25) == 0 and core.center(1, 0.403) == pytest.approx(1)
    assert core.center(0.5, 0.25) == pytest.approx(1 / 3)
    assert core.center(0, 0.5) == -1 and core.center(0.3, 0) == 0.3


# lines that are not items

MULTIPLE_CHOICE = {"query": "a", "choices": ["b", "c"], "gold": 0}
SCHEMA = {"context_options": ["a", "b"], "continuation": "c", "gold": 0}
LANGUAGE_MODELING = {"context": "a", "continuation": "b"}


@pytest.mark.parametrize("kind, line, message", [
    ("multiple_choice", {"query": "a"}, "lacks choices, gold"),
    ("multiple_choice", MULTIPLE_CHOICE | {"gold": 2}, "must have a gold from 0 to 1"),
    ("multiple_choice", MULTIPLE_CHOICE | {"gold": -1}, "must have a gold from 0 to 1"),
    ("multiple_choice", MULTIPLE_CHOICE | {"gold": "1"}, "must have a gold from 0 to 1"),
    ("multiple_choice", MULTIPLE_CHOICE | {"gold": True}, "must have a gold from 0 to 1"),
    ("multiple_choice", MULTIPLE_CHOICE | {"choices": ["b"]}, "must have two or more choices"),
    ("multiple_choice", MULTIPLE_CHOICE | {"choices": "bc"}, "must have two or more choices"),
    ("multiple_choice", MULTIPLE_CHOICE | {"choices": ["b", None]}, "has choices that are not"),
    ("multiple_choice", MULTIPLE_CHOICE | {"choices": [True, "b"]}, "has choices that are not"),
    ("multiple_choice", MULTIPLE_CHOICE | {"query": ["a"]}, "has a query that is not text"),
    ("multiple_choice", MULTIPLE_CHOICE | {"query": "\ud800"}, "has a lone surrogate"),
    ("multiple_choice", MULTIPLE_CHOICE | {"choices": ["b", "c\udfff"]}, "has a lone surrogate"),
    ("schema", {"continuation": "c"}, "lacks context_options, gold"),
    ("schema", SCHEMA | {"gold": 2}, "must have a gold from 0 to 1"),
    ("schema", SCHEMA | {"context_options": ["a"]}, "must have two or more context_options"),
    ("schema", SCHEMA | {"context_options": ["a", 1.5, {}]}, "has context_options that are not"),
    ("schema", SCHEMA | {"continuation": None}, "has a continuation that is not text"),
    ("language_modeling", {"context": "a"}, "lacks continuation"),
    ("language_modeling", LANGUAGE_MODELING | {"context": False}, "has a context that is not"),
    ("language_modeling", LANGUAGE_MODELING | {"continuation": " \n"}, "has an empty contin"),
    ("language_modeling", [1, 2], "is not a JSON object"),
    ("language_modeling", "{", "is not JSON in UTF-8"),
    ("language_modeling", "\xff", "is not JSON in UTF-8")])
def test_a_bad_line_is_named(kind, line, message):
    good = {"multiple_choice": MULTIPLE_CHOICE, "schema": SCHEMA,
            "language_modeling": LANGUAGE_MODELING}[kind]
    bad = (line if isinstance(line, str) else json.dumps(line)).encode("latin-1")
    content = json.dumps(good).encode() + b"\n\n" + bad + b"\n"
    with pytest.raises(UserError, match=f"^made_up.jsonl, line 3 {message}"):
        parse_lines(FoundFile("made_up.jsonl", content, Path()),
                    lambda item: core.find_fault(item, kind))


def test_good_lines_are_items():
    for kind, item in (("multiple_choice", MULTIPLE_CHOICE | {"choices": [1, 2.5], "query": 3}),
                       ("schema", SCHEMA | {"gold": 1}),
                       ("language_modeling", LANGUAGE_MODELING | {"context": "", "more": None})):
        content = b"\xef\xbb\xbf" + json.dumps(item).encode() + b"\r\n \n"
        assert parse_lines(FoundFile("a", content, Path()),
                           lambda item, kind=kind: core.find_fault(item, kind)) == [item]


def test_an_empty_file_is_an_error():
    with pytest.raises(UserError, match=r"made_up\.jsonl is empty"):
        parse_lines(FoundFile("made_up.jsonl", b"\n \n", Path()), lambda item: None)


def test_too_few_lines_for_the_solved_items_are_an_error():
    items = [MULTIPLE_CHOICE] * 10
    with pytest.raises(UserError, match=r"made_up\.jsonl has 10 lines, .* more than 10"):
        benchmarks.Core(make_task("multiple_choice", 10), items, None)
    benchmark = benchmarks.Core(make_task("multiple_choice", 10), [*items, MULTIPLE_CHOICE], None)
    assert benchmark.texts(10)[0].count("\n\n") == 10
