"""evaluate.py: the table, the file of results, comparing two of them, and scores in training."""

import json
import math
import zipfile

import matplotlib.figure
import pytest
import torch
from conftest import ROOT, read_log, run_script, tiny_config

import evaluate
import plot
from gpt2lab import benchmarks, core
from gpt2lab.benchmarks import Metric
from gpt2lab.cli import UserError
from gpt2lab.distributed import Ranks
from train_gpt2 import load, train

WORDS = ("statement", "value", "function", "object", "class", "name", "module", "list")


def write_jsonl(path, rows):
    """Write a line of JSON for each row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def eval_data(tmp_path, monkeypatch):
    """A working folder whose eval_data holds a few made-up lines of four benchmarks."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "eval_data"
    folder.mkdir()
    write_jsonl(folder / "piqa.jsonl", [
        {"query": f"Question: what is a {WORDS[i % 8]}?", "gold": i % 2,
         "choices": [f"a {WORDS[(i + 1) % 8]}", f"the {WORDS[i % 5]} of it"]} for i in range(14)])
    write_jsonl(folder / "winograd_wsc.jsonl", [
        {"context_options": [f"The {word} is a name because the {word}", "The name is a name, so"],
         "continuation": "has a value.", "gold": i % 2} for i, word in enumerate(WORDS)])
    write_jsonl(folder / "lambada_test.jsonl", [
        {"text": f"The {word} is bound to the {WORDS[i - 1]}"} for i, word in enumerate(WORDS)])
    (folder / "wiki.test.raw").write_text(
        " \n = Names = \n \n A name , as it is used here , is a @-@ name . \n"
        " \n = Values = \n \n A value has a type . \n", encoding="utf-8")
    return folder


def read_tasks(path):
    """The tasks in a file of --out, without the seconds that they took."""
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    for task in tasks.values():
        assert task.pop("seconds") >= 0
    return tasks


# the table and the file


def test_all_that_is_there_is_scored_by_default(call_main, log_dir, eval_data, tmp_path):
    code, out, err = call_main(evaluate, "--model", log_dir, "--device=cpu", "--out", "r.json")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines[1:10]] == [
        "task", "lambada", "lambada", "lambada", "wikitext", "wikitext", "piqa", "winograd",
        "mean"]
    assert lines[1][-2:] == ["GPT-2", "124M"]
    tasks = read_tasks(tmp_path / "r.json")
    assert {name: (task["shots"], task["examples"]) for name, task in tasks.items()} == {
        "lambada": (0, 8), "wikitext": (0, 3), "piqa": (10, 14), "winograd": (0, 8)}
    correct = tasks["piqa"]["results"]["correct"]
    assert tasks["piqa"]["metrics"]["acc"]["value"] == sum(correct) / 14
    assert {f"{sum(correct) / 14:.4f}", f"{2 * (sum(correct) / 14 - .5):.4f}"} < set(lines[7])


def test_two_processes_give_the_results_of_one(log_dir, eval_data, tmp_path):
    flags = ("--model", log_dir, "--device=cpu", "--stride", 16, "--out")
    one = run_script(ROOT / "evaluate.py", *flags, "one.json", cwd=tmp_path)
    two = run_script("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                     ROOT / "evaluate.py", *flags, "two.json", cwd=tmp_path)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    a, b = read_tasks(tmp_path / "one.json"), read_tasks(tmp_path / "two.json")
    assert len(a) == 5 and list(a) == list(b)
    for name in a:
        for key, column in a[name]["results"].items():
            assert b[name]["results"][key] == pytest.approx(column, abs=1e-4)
    assert [line.split()[:3] for line in two.stdout.splitlines()] == [
        line.split()[:3] for line in one.stdout.splitlines()]


def test_a_text_of_ones_own(call_main, log_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("A name is a value.\nA value is a name.\n", encoding="utf-8")
    code, out, err = call_main(evaluate, "--model", log_dir, "--device=cpu", "--data", "my.txt",
                               "--stride", 8)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        "task", "text", "text", "text"]
    assert "token perplexity" in out


def test_control_c_prints_what_is_there(call_main, log_dir, eval_data, monkeypatch):
    judge, judged = benchmarks.Core.judge, []

    def interrupt(self, *args):
        judged.append(self.name)
        if judged.count("winograd") == 4:
            raise KeyboardInterrupt
        return judge(self, *args)

    monkeypatch.setattr(benchmarks.Core, "judge", interrupt)
    code, out, err = call_main(evaluate, "--model", log_dir, "--device=cpu", "--tasks",
                               "piqa,winograd")
    assert code == 130 and "interrupted" in err
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert rows["piqa"][6] == "14"
    assert rows["winograd"][1] == "(interrupted)" and rows["winograd"][6] == "3"


def test_control_c_leaves_out_documents_that_are_not_finished(
        call_main, log_dir, eval_data, tmp_path, monkeypatch):
    """Guards against the losses of a few windows that are divided by the bytes of all."""
    judge, judged = benchmarks.Perplexity.judge, []

    def interrupt(self, number, *args):
        result = judge(self, number, *args)
        judged.append(result["document"])
        if len(judged) == 3:
            raise KeyboardInterrupt
        return result

    flags = ("--model", log_dir, "--device=cpu", "--tasks", "wikitext", "--batch_tokens", 1)
    call_main(evaluate, *flags, "--out", "whole.json")
    columns = read_tasks(tmp_path / "whole.json")["wikitext"]["results"]
    monkeypatch.setattr(benchmarks.Perplexity, "judge", interrupt)
    code, out, _ = call_main(evaluate, *flags)
    # of the two windows that are done, the second one ends a document, which has two windows or one
    (finished,) = (document for document in {*judged[:2]}
                   if judged[:2].count(document) == columns["document"].count(document))
    loss = sum(loss for document, loss in zip(columns["document"], columns["loss"], strict=True)
               if document == finished)
    text = benchmarks.split_wikitext((eval_data / "wiki.test.raw").read_text("utf-8"))[finished]
    bits = loss / math.log(2) / len(text.encode("utf-8"))
    assert code == 130 and [line.split()[5] for line in out.splitlines()
                            if "bits per byte" in line] == [f"{bits:.4f}"]


def test_the_data_of_a_task_that_is_not_scored_is_not_read(call_main, log_dir, eval_data):
    (eval_data / "piqa.jsonl").write_text("nonsense", encoding="utf-8")
    code, _, err = call_main(evaluate, "--model", log_dir, "--device=cpu", "--tasks", "winograd")
    assert code == 0, err


@pytest.mark.parametrize("flags, message", [
    (("--tasks", "piq"), "no task 'piq', but 'piqa'"), (("--limit", 0), "--limit 0 must be"),
    (("--tasks", "core", "--data", "eval_data"), "lacks agi_eval_lsat_ar.jsonl, arc_challenge"),
    (("--data", "nothing"), "nothing"), (("--data", "empty"), "no files of a benchmark in empty"),
    (("--tasks", "piqa", "--data", "eval_data/piqa.jsonl"), "is not a folder"),
    (("--data", "binary"), "binary is not UTF-8"), (("--data", "blank"), "blank is empty"),
    (("--tasks", "wikitext", "--stride", 33), "--stride 33 must be at most 32"),
    (("--out", "eval_data"), "is a folder"), (("--tasks", ","), "names no task"),
    (("--tasks", "piqa", "--out", "eval_data/piqa.jsonl"), "is in use"),
    (("--tasks", " LAMBADA"), "but 'lambada'"), (("--tasks", "piqa", "--limit", "x"), "--limit"),
    (("--compare", "a", "b", "--out", "c"), "leave out --out"),
    (("--data", "eval_data/piqa.jsonl", "--out", "eval_data/piqa.jsonl"), "is in use")])
def test_a_bad_command_line_is_one_line(call_main, log_dir, eval_data, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(b"a\xff")
    (tmp_path / "blank").write_text(" \n", encoding="utf-8")
    code, _, err = call_main(evaluate, "--model", log_dir, "--device=cpu", *flags)
    lines = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and len(lines) == 1 and message in lines[0], err


def test_weights_that_are_not_finite_are_refused(call_main, log_dir, eval_data, tmp_path):
    """Guards against accuracies of a model whose losses are all NaN, so that each choice is 0."""
    path = max(log_dir.glob("model_*.pt"))
    checkpoint = torch.load(path)
    checkpoint["model"]["transformer.ln_f.bias"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pt")
    code, _, err = call_main(evaluate, "--model", "nan.pt", "--device=cpu", "--tasks", "piqa")
    assert code == 2 and "NaN" in err and err.count("\n") == 1


def test_a_zip_file_that_is_not_the_bundle_does_no_harm(call_main, log_dir, eval_data):
    (eval_data / "other.zip").write_bytes(b"PK nonsense")
    code, out, err = call_main(evaluate, "--model", log_dir, "--device=cpu", "--tasks", "piqa")
    assert code == 0 and "piqa" in out, err


def test_the_mean_over_core_is_called_core_only_if_it_is_whole():
    results = [evaluate.TaskResult(name, task.shots, [Metric("acc", 0.7, 0.01)], 100, 1.0)
               for name, task in core.CORE_TASKS.items()]
    whole = evaluate.summarize_core(results)
    baselines = [task.random_baseline for task in core.CORE_TASKS.values()]
    assert whole.name == "CORE"
    assert whole.value == pytest.approx(sum((0.7 - b) / (1 - b) for b in baselines) / 22)
    assert whole.standard_error == pytest.approx(
        sum((0.01 / (1 - b)) ** 2 for b in baselines) ** 0.5 / 22)
    part = evaluate.summarize_core(results[:3])
    assert part.name == "mean over 3 of the 22 tasks of CORE"
    assert evaluate.summarize_core(results[:1]) is None


@pytest.mark.parametrize("num_parameters, name", [
    (1_000_000, "GPT-2 124M"), (200_000_000, "GPT-2 124M"), (250_000_000, "GPT-2 355M"),
    (774_030_080, "GPT-2 774M"), (9_000_000_000, "GPT-2 1558M")])
def test_the_published_model_nearest_in_size(num_parameters, name):
    assert evaluate.nearest_model(num_parameters) == name


def test_published_values_have_a_source_and_a_task():
    for (task, metric), (values, source) in evaluate.PUBLISHED.items():
        assert source in evaluate.SOURCES and metric
        assert len(values) == len(evaluate.MODELS)
        assert task in (*benchmarks.SINGLE_NAMES, "CORE") or task.startswith("wikitext, stride")
    assert set(evaluate.BUNDLE_TABLES) == set(evaluate.MODELS)


def test_the_tables_in_the_bundle_have_more_published_values(tmp_path):
    before = evaluate.find_published("GPT-2 355M", tmp_path)
    assert before["piqa", "acc"] == (.670, "nanochat") and ("copa", "acc") not in before
    with zipfile.ZipFile(tmp_path / "eval_bundle.zip", "w") as archive:
        archive.writestr("eval_bundle/openai-community-gpt2-medium.csv",
                         "Task , Accuracy , Centered \npiqa , 0.671234, 0.342468\n"
                         "copa, 0.650000  , 0.300000\nCORE , , 0.184912\n")
    after = evaluate.find_published("GPT-2 355M", tmp_path)
    assert after["piqa", "acc"] == (.671234, "bundle") and after["copa", "acc"][0] == .65
    assert after["CORE", "CORE"] == (.184912, "bundle")
    assert after["lambada", "acc"] == (.4306, "lm-eval")


# comparing two files


def write_results(path, correct, losses=(1.0, 2.0), data="same"):
    """A file of --out with a task of accuracy and one of losses."""
    numbers = list(range(len(correct)))
    path.write_text(json.dumps({"tasks": {
        "piqa": {"examples": len(correct), "data": data,
                 "results": {"number": numbers, "correct": correct}},
        "wikitext": {"examples": 3, "data": "same", "results": {
            "number": [0, 1, 2], "document": [0, 0, 1], "loss": [losses[0], 0.5, losses[1]]}},
    }}), encoding="utf-8")


def test_compare_prints_paired_differences(call_main, tmp_path):
    write_results(tmp_path / "a", [True] * 8 + [False] * 2)
    write_results(tmp_path / "b", [True] * 6 + [False] * 3 + [True], losses=(1.5, 3.5))
    code, out, _ = call_main(evaluate, "--compare", tmp_path / "a", tmp_path / "b")
    # differences of piqa: -1, -1, +1 and seven times 0; of wikitext: 0.5 and 1.5
    assert code == 0 and out.splitlines() == [
        "piqa acc: 0.8000 and 0.7000 | difference -0.1000 | standard error 0.1795 | only the first "
        "right: 2, only the second: 1 | McNemar's exact p = 1 | 10 in common",
        "wikitext loss: 1.7500 and 2.7500 | difference +1.0000 | standard error 0.5000 | "
        "2 in common"]


def test_results_of_other_data_are_not_compared(call_main, tmp_path):
    write_results(tmp_path / "a", [True] * 8)
    write_results(tmp_path / "b", [True] * 8, data="other")
    code, out, _ = call_main(evaluate, "--compare", tmp_path / "a", tmp_path / "b")
    assert code == 0 and "piqa: not compared" in out and "piqa acc" not in out


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"tasks": 3}', '{"tasks": {"piqa": {}}}', '{"tasks": {"piqa": 3}}', "\xff",
    '{"tasks": {}}', '{"tasks": {"piqa": {"data": "", "examples": 1, "results": {"number": []}}}}',
    '{"tasks": {"piqa": {"data": "", "examples": 1, "results": {"correct": [true]}}}}',
    '{"tasks": {"piqa": {"data": "", "examples": 1, "results": {"number": [[]]}}}}',
    '{"tasks": {"piqa": {"data": "", "examples": 2, "results": {"number": [1, 1]}}}}'])
def test_only_files_of_results_are_compared(call_main, tmp_path, content):
    write_results(tmp_path / "a", [True] * 8)
    (tmp_path / "c").write_text(content, encoding="latin-1")
    for pair in (("a", "c"), ("c", "a")):
        code, out, err = call_main(evaluate, "--compare", *(tmp_path / name for name in pair))
        assert code == 2 and "evaluate.py" in err and err.count("\n") == 1
        assert " acc" not in out


# in training


def test_tasks_in_training_are_logged_and_leave_the_training_unchanged(
        data_dir, eval_data, tmp_path, capsys):
    train(tiny_config(data_dir, tmp_path / "a"))
    train(tiny_config(data_dir, tmp_path / "b", eval_tasks="lambada,piqa,wikitext",
                      eval_tasks_every=3, eval_tasks_limit=4))
    assert read_log(tmp_path / "a", "train") == read_log(tmp_path / "b", "train")
    for stream in ("lambada", "piqa", "wikitext"):
        assert list(read_log(tmp_path / "b", stream)) == [0, 3, 6]
    assert "piqa: acc" in capsys.readouterr().out
    # the last score is that of the script
    model, tokenizer = load(tmp_path / "b")
    (piqa,) = benchmarks.load_benchmark("piqa", None, Ranks(torch.device("cpu")), 4, None)
    results = benchmarks.score_benchmark(model, tokenizer, piqa, Ranks(torch.device("cpu")))
    assert read_log(tmp_path / "b", "piqa")[6] == pytest.approx(
        piqa.metrics(list(results.values()))[0].value)


def test_an_unknown_task_is_refused_before_the_log_folder_is_touched(data_dir, tmp_path):
    with pytest.raises(UserError, match="no task 'piq'"):
        tiny_config(data_dir, tmp_path, eval_tasks="lambada,piq")


def test_tasks_are_drawn_beside_hellaswag(tmp_path, monkeypatch):
    figures, Figure = [], matplotlib.figure.Figure
    monkeypatch.setattr(matplotlib.figure, "Figure",
                        lambda **options: figures.append(Figure(**options)) or figures[-1])
    (tmp_path / "log.txt").write_text(
        "0 val 3.5\n0 piqa 0.5\n0 wikitext 1.5\n9 piqa 0.6\n", encoding="utf-8")
    plot.plot([tmp_path], tmp_path / "loss.png")
    accuracy = figures[0].axes[1]
    assert [line.get_ydata().tolist() for line in accuracy.lines if len(line.get_ydata())] == [
        [0.5, 0.6]]
    assert "piqa" in [text.get_text() for text in accuracy.texts]
    assert "dashed" in accuracy.get_title()
