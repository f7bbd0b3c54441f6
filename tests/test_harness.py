"""Tasks of lm-eval on a GPT: the same figures as lm-eval's own model class gives."""

import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import plain_model, small_text
from safetensors.torch import save_file

import export_hf
from gpt2lab import harness
from gpt2lab.cli import UserError
from gpt2lab.distributed import Ranks
from gpt2lab.harness import Answers, evaluate_with_lm_eval
from gpt2lab.tokenizer import train_bpe

CPU = torch.device("cpu")
BLOCK_SIZE = 32  # of plain_model


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of 300 tokens, trained on the small text."""
    return train_bpe([small_text()], 300)


@pytest.fixture(scope="module")
def lm_eval():
    """The package lm_eval. Skips the test where it is not installed."""
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def model():
    """A GPT of block size 32 whose losses are far from uniform."""
    model = plain_model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def hf(lm_eval, tmp_path_factory, model, tokenizer):
    """lm-eval's own model class on the exported model."""
    from lm_eval.models.huggingface import HFLM
    folder = tmp_path_factory.mktemp("hf")
    weights = export_hf.hf_weights(model.state_dict(), tokenizer.vocab_size, torch.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = export_hf.hf_config(asdict(model.config), tokenizer.eot, "float32")
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in export_hf.tokenizer_files(tokenizer, BLOCK_SIZE).items():
        (folder / name).write_bytes(content)
    lm = HFLM(pretrained=str(folder), device="cpu", batch_size=4, dtype="float32")
    lm.get_model_info = dict  # would ask the hub
    return lm


def make_answers(model, tokenizer, ranks=None, on_requests=lambda _: None):
    """The Answers of a model on one rank."""
    return Answers(model, tokenizer, ranks or Ranks(CPU), None, on_requests)


def make_requests(*args):
    """Requests as lm-eval makes them, as far as a model reads them."""
    return [SimpleNamespace(args=each, task_name=None) for each in args]


# -----------------------------------------------------------------------------
# beside lm-eval's own model class

LONG = small_text(2000)[1000:1400].strip()  # longer than the block
PAIRS = [
    *((context, ending) for context in ("The", "The statement is", LONG, "")
      for ending in (" a", " and", " an expression", "s", "\n")),
    ("The statement is ", "run"), ("A line\n", "end"), ("   ", "x"), ("The", " the" * 12),
    ("The statement is executed and", " is"), ("a<|endoftext|>b", " c"), ("", "<|endoftext|>a"),
    ("The", " c"), (LONG, LONG[:30]), ("你好", "，世界")]


def test_loglikelihoods_equal_those_of_lm_eval(hf, model, tokenizer):
    requests = make_requests(*(pair for pair in PAIRS if pair[0].strip() or not pair[0]))
    expected = hf.loglikelihood(requests, disable_tqdm=True)
    found = harness.make_lm(make_answers(model, tokenizer)).loglikelihood(requests)
    assert len({greedy for _, greedy in expected}) == 2
    for (loglikelihood, greedy), (other, other_greedy) in zip(found, expected, strict=True):
        assert loglikelihood == pytest.approx(other, abs=1e-4) and greedy == other_greedy


def test_rolling_loglikelihoods_equal_those_of_lm_eval(hf, model, tokenizer):
    ids = tokenizer.encode(small_text(3000))
    lengths = (0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE, 300)
    requests = make_requests(*((tokenizer.decode(ids[:length]),) for length in lengths))
    expected = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    found = harness.make_lm(make_answers(model, tokenizer)).loglikelihood_rolling(requests)
    assert found == pytest.approx(expected, abs=1e-3, rel=1e-6)


def test_greedy_continuations_equal_those_of_lm_eval(hf, model, tokenizer):
    options = [{"until": ["e"], "max_gen_toks": 12}, {"until": "\n\n", "max_gen_toks": 20},
               {"until": [], "max_new_tokens": 5, "do_sample": False, "temperature": 0.7},
               {"until": ["zz", " "], "max_gen_toks": 30, "repetition_penalty": 1.5}]
    requests = make_requests(*((context, option) for option in options
                               for context in ("The", "The statement is", LONG)))
    expected = hf.generate_until(requests, disable_tqdm=True)
    found = harness.make_lm(make_answers(model, tokenizer)).generate_until(requests)
    assert found == expected and len(set(found)) > 6


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """{task: .yaml file} for a task of each kind, with data in a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    words = small_text(20_000).split()
    docs = [{"question": " ".join(words[i * 20:i * 20 + 4 + 9 * (i % 4)]), "label": i % 3,
             "choices": words[i * 20 + 14:i * 20 + 17], "text": " ".join(words[i * 31:i * 33 + 9]),
             "word": words[i * 7][:4]}
            for i in range(12)]
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    choice = {"output_type": "multiple_choice", "doc_to_text": "Q: {{question}}\nA:",
              "doc_to_choice": "{{choices}}", "doc_to_target": "label",
              "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                              {"metric": "acc_norm"}]}
    kinds = {
        "choice": choice, "choice_2_shots": choice | {"num_fewshot": 2, "fewshot_split": "train"},
        "last_word": {"output_type": "loglikelihood",
                      "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
                      "doc_to_target": "{{' '+text.split(' ')[-1]}}",
                      "metric_list": [{"metric": "perplexity", "aggregation": "perplexity",
                                       "higher_is_better": False}, {"metric": "acc"}]},
        # two shots that fit into the block, and a metric that shows which ones they are
        "word_2_shots": {"output_type": "loglikelihood", "doc_to_text": "{{word}}",
                         "doc_to_target": "{{label}}", "num_fewshot": 2, "fewshot_split": "train",
                         "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}]},
        "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "",
                    "doc_to_target": "{{text}}",
                    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
        "generate": {"output_type": "generate_until", "doc_to_text": "{{question}}",
                     "doc_to_target": "{{choices[label]}}",
                     "generation_kwargs": {"until": ["e"], "max_gen_toks": 8},
                     "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
                     "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}]},
    }
    files = {}
    for name, config in kinds.items():
        config = config | {"task": name, "dataset_path": "json", "test_split": "train",
                           "dataset_kwargs": {"data_files": {"train": str(data)},
                                              "cache_dir": str(folder / "cache")}}
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML, too
    return {name: str(path) for name, path in files.items()}


def test_tasks_give_the_results_of_lm_eval(hf, model, tokenizer, task_files, monkeypatch, capfd):
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager
    progress = []
    found = evaluate_with_lm_eval(model, tokenizer, list(task_files.values()), Ranks(CPU), limit=9,
                                  on_progress=lambda *counts: progress.append(counts))
    assert capfd.readouterr() == ("", "")
    assert progress == sorted(progress) and progress[-1] == (54, 54) and len(progress) > 10
    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)  # takes seconds
    expected = evaluator.simple_evaluate(
        hf, tasks=list(task_files.values()), limit=9, log_samples=False,
        bootstrap_iters=harness.BOOTSTRAP_ITERATIONS,
        task_manager=TaskManager(include_defaults=False))
    assert list(found) == list(task_files)
    for name, result in found.items():
        assert result["examples"] == 9 and result["shots"] == 2 * name.endswith("2_shots")
        values = expected["results"][name]
        assert result["metrics"]
        for metric, numbers in result["metrics"].items():
            metric, _, filter_name = metric.partition(",")
            filter_name = filter_name or "none"
            assert numbers["value"] == pytest.approx(values[f"{metric},{filter_name}"], rel=1e-5)
            stderr = values[f"{metric}_stderr,{filter_name}"]
            assert numbers["stderr"] == (
                None if stderr == "N/A" else pytest.approx(stderr, rel=1e-4))
    assert found["choice"]["higher_is_better"]["acc"] is True
    assert found["last_word"]["higher_is_better"]["perplexity"] is False
    assert list(found["generate"]["metrics"]) == ["exact_match,first"]


# -----------------------------------------------------------------------------
# without lm-eval

# what the model class hf of lm_eval 0.4.13 with transformers 5.24 finds: for each context, the
# log-likelihoods of these continuations, and for whole texts their log-likelihoods
CONTINUATIONS = (" a", " and", "s")
STORED_LOGLIKELIHOODS = {
    "The": (-6.066322, -11.333954, -8.169113),
    "The statement is": (-5.850083, -12.867150, -7.731738),
    "": (-4.782176, -13.113143, -7.013922),
    LONG: (-6.053597, -13.040232, -7.179553)}
STORED_TEXTS = {"The statement": -48.834526, LONG[:100]: -430.058807, LONG: -1763.311783}


def encode_pair(tokenizer, context, continuation):
    """Token ids (context, continuation), which are encoded together."""
    start = len(tokenizer.encode(context))
    ids = tokenizer.encode(context + continuation)
    return ids[:start], ids[start:]


@pytest.fixture
def pairs(tokenizer):
    """Twelve pairs of token ids, in an order that separates those of one context."""
    return [encode_pair(tokenizer, context, continuation)
            for continuation in CONTINUATIONS for context in STORED_LOGLIKELIHOODS]


def test_loglikelihoods_equal_stored_ones_of_lm_eval(model, tokenizer, pairs):
    expected = [values[i] for i in range(3) for values in STORED_LOGLIKELIHOODS.values()]
    found = make_answers(model, tokenizer).score(pairs)
    assert [loglikelihood for loglikelihood, _ in found] == pytest.approx(expected, abs=1e-4)


def test_loglikelihoods_of_texts_equal_stored_ones_of_lm_eval(model, tokenizer):
    found = make_answers(model, tokenizer).score_texts(["", *STORED_TEXTS, ""])
    assert found == pytest.approx([0, *STORED_TEXTS.values(), 0], abs=1e-3)


def test_every_token_of_a_text_is_predicted_once(model, tokenizer):
    answers = make_answers(model, tokenizer)
    ids = tokenizer.encode(LONG)
    for length in (0, 1, 31, 32, 33, 64, 65, 200):
        windows = list(answers.cut_text(tokenizer.decode(ids[:length])))
        assert [i for _, continuation in windows for i in continuation] == ids[:length]
        assert all(len(context + continuation) == BLOCK_SIZE + 1  # as many as fit
                   for context, continuation in windows[1:])


def test_an_answer_that_fits_no_block_is_refused(model, tokenizer):
    answers = make_answers(model, tokenizer)
    assert len(answers.score([([1], [2] * BLOCK_SIZE)])) == 1
    with pytest.raises(UserError, match=r"answer of 33 tokens.*block_size of 32"):
        answers.score([([1], [2]), ([1], [2] * (BLOCK_SIZE + 1))])


def test_rows_with_a_common_beginning_become_one_group(monkeypatch):
    contexts = [[i] * 20 for i in range(5)]
    rows = [[*context, 50 + i, i] for i in range(4) for context in contexts]
    groups = harness.group_rows(rows, n_embd=64)
    assert sorted(map(sorted, groups)) == [list(range(i, 20, 5)) for i in range(5)]
    monkeypatch.setattr(harness, "MAX_TREE_ROWS", 3)
    assert sorted(map(len, harness.group_rows(rows, n_embd=64))) == [1] * 5 + [3] * 5
    monkeypatch.setattr(harness, "MAX_TREE_TOKENS", 24)
    assert sorted(map(len, harness.group_rows(rows, n_embd=64))) == [2] * 10


def test_a_short_common_beginning_is_not_worth_a_large_tree():
    rows = [[0, *[i] * 300] for i in range(1, 9)]
    assert len(harness.group_rows(rows, n_embd=64)) == 8
    few_shot = [[0] * 600 + [i] * 40 for i in range(1, 9)]  # share their examples
    assert len(harness.group_rows(few_shot, n_embd=64)) == 1


def test_two_ranks_answer_a_part_each(model, tokenizer, pairs, monkeypatch):
    expected = dict(enumerate(make_answers(model, tokenizer).score(pairs)))
    requests = [("The", {"max_gen_toks": 4}), (LONG, {"max_gen_toks": 3}),
                ("A", {"max_gen_toks": 4, "do_sample": True})]
    texts = dict(enumerate(make_answers(model, tokenizer).continue_texts(requests)))
    parts = []
    monkeypatch.setattr(harness.dist, "all_gather_object",
                        lambda gathered, part: (parts.append(part), gathered.clear()))
    for rank in range(2):
        answers = make_answers(model, tokenizer, Ranks(CPU, rank, 2))
        answers.score(pairs)
        answers.continue_texts(requests)
    assert all(len(part) < 12 for part in parts)
    scores = parts[0] | parts[2]
    assert len(parts[0]) + len(parts[2]) == 12 and len(scores) == 12
    for number, (loglikelihood, greedy) in scores.items():
        assert (pytest.approx(loglikelihood, abs=1e-4), greedy) == expected[number]
    assert len(parts[1]) + len(parts[3]) == 3 and parts[1] | parts[3] == texts


def test_windows_hold_all_requests_and_progress_counts_them(model, tokenizer, pairs, monkeypatch):
    monkeypatch.setattr(harness, "WINDOW_CHARS", 5)
    counts = []
    answers = make_answers(model, tokenizer, on_requests=counts.append)
    requests = make_requests(("abcd", {"until": "x"}), ("ef", {}), ("g" * 9, {}), ("h", {}))
    windows = []
    for window in answers.windows(requests):
        windows.append(len(window))
        answers.score(pairs)
    assert windows == [2, 1, 1]
    assert counts == sorted(counts) and counts[-1] == 4 and len(counts) > 6


def test_a_continuation_ends_before_its_first_stop_text(model, tokenizer):
    answers = make_answers(model, tokenizer)
    whole = answers.continue_text("The", {"max_gen_toks": 12}, 0)
    stop, later = whole[5], whole[8]
    assert answers.continue_text("The", {"max_gen_toks": 12, "until": [later, stop, ""]}, 0) == (
        whole[:whole.index(stop)])
    assert answers.continue_text("The", {"max_gen_toks": 0}, 0) == ""


def test_half_of_the_block_is_context_if_the_request_leaves_no_room(model, tokenizer):
    answers = make_answers(model, tokenizer)
    found = answers.continue_text(LONG, {"max_new_tokens": BLOCK_SIZE}, 0)
    context = tokenizer.decode(tokenizer.encode(LONG)[-BLOCK_SIZE // 2:])
    assert len(tokenizer.encode(context)) == BLOCK_SIZE // 2
    start = answers.continue_text(context, {"max_new_tokens": 8}, 0)
    assert start and found.startswith(start.rstrip("\ufffd"))


def test_generation_is_greedy_unless_the_request_samples(model, tokenizer):
    def texts(**options):
        answers = make_answers(model, tokenizer)
        return [answers.continue_text("The", {"max_gen_toks": 8, **options}, i) for i in range(4)]

    greedy = texts()
    assert len(set(greedy)) == 1 and greedy == texts(do_sample=False, temperature=2.0)
    assert len(set(texts(do_sample=True))) == 4 and len(set(texts(temperature=0.9))) == 4
    assert texts(do_sample=True, top_k=1) == greedy
    answers = make_answers(model, tokenizer)
    sampled = [("The", {"max_gen_toks": 8, "do_sample": True})]
    first = answers.continue_texts(sampled)
    answers.num_answered = 1  # a later window
    assert answers.continue_texts(sampled) != first
    with pytest.raises(UserError, match="beam search"):
        texts(num_beams=4)


# -----------------------------------------------------------------------------
# errors in one line


def check_error(message, model, tokenizer, *names):
    """Check that evaluate_with_lm_eval raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=message) as error:
        evaluate_with_lm_eval(model, tokenizer, names, Ranks(CPU))
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # the import fails
    check_error(r'pip install --upgrade "lm_eval>=0.4.13,<1"', model, tokenizer, "sciq")


def test_unknown_tasks_and_files_are_named(lm_eval, model, tokenizer, monkeypatch, tmp_path):
    import lm_eval.tasks
    check_error("no file .*none.yaml", model, tokenizer, str(tmp_path / "none.yaml"))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager",  # the real one takes seconds
                        lambda **_: SimpleNamespace(all_tasks=["sciq", "piqa", "squadv2"]))
    check_error("no task 'siq': near names are sciq", model, tokenizer, "siq")
    check_error("no task 'zzz': lm_eval ls tasks", model, tokenizer, "zzz")


def test_data_that_cannot_be_loaded_is_one_line(lm_eval, model, tokenizer, task_files, tmp_path,
                                                monkeypatch):
    import datasets
    path = tmp_path / "task.yaml"
    path.write_text("task: broken\noutput_type: generate_until\n", encoding="utf-8")
    check_error("cannot load the task .*task.yaml", model, tokenizer, str(path))

    def load_dataset(**_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for error in (ConnectionError("no route\nto the hub"), ValueError("unknown split")):
        check_error(f"{type(error).__name__}: .*HF_ENDPOINT", model, tokenizer,
                    task_files["choice"])
    error = ImportError("No module named 'sacrebleu'")
    check_error("another package .*sacrebleu", model, tokenizer, task_files["choice"])


def test_a_task_that_runs_code_of_the_model_is_refused(lm_eval, model, tokenizer, task_files,
                                                       monkeypatch):
    from lm_eval.api.task import ConfigurableTask
    monkeypatch.setattr(ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    check_error("choice runs code", model, tokenizer, task_files["choice"])
