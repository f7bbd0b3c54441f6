"""HellaSwag: the scores are those of the plain definition, and none is lost or counted twice."""

import hashlib
import http.server
import json
import re
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, read_log, run_script, tiny_config
from one_by_one import score_one_by_one
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
from gpt2lab import scoring, tasks
from gpt2lab.cli import UserError
from gpt2lab.tokenizer import train_bpe
from train_gpt2 import load, load_model, train

EXAMPLES = [
    {"ind": i, "ctx": f"A man {verb} a {thing}. He", "label": i % 4,
     "endings": [f"{verb} it again and again.", f"drops the {thing}.", "sleeps.",
                 f"sells the old {thing} to a friend who wants it."]}
    for i, (verb, thing) in enumerate(
        (verb, thing) for verb in ("paints", "washes", "repairs") for thing in ("car", "door"))]


@pytest.fixture
def examples_file(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in EXAMPLES), encoding="utf-8")
    return path


def evaluate(model, tokenizer, examples, **flags):
    """(Score, results in the order of the examples)."""
    results = {}
    score = scoring.evaluate(model, tokenizer, examples, "cpu",
                               on_result=results.__setitem__, **flags)
    return score, [results[number] for number in sorted(results)]


def check_against_one_by_one(model, tokenizer, examples, score, results):
    """Losses within 1e-3, predictions and counts equal. The model may be another one's twin."""
    correct = correct_norm = 0
    for example, result in zip(examples, results, strict=True):
        sums, counts = score_one_by_one(model, tokenizer, example)
        assert result["num_tokens"] == counts.tolist()
        assert result["loss_sums"] == pytest.approx(sums, abs=1e-3)
        assert result["pred"] == np.argmin(sums)
        assert result["pred_norm"] == np.argmin(sums / counts)
        correct += result["pred"] == int(example["label"])
        correct_norm += result["pred_norm"] == int(example["label"])
    assert score[:3] == (len(examples), correct, correct_norm)


def sharpened(model):
    """The same model with larger weights: losses far from uniform, so that mistakes show."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


@pytest.mark.parametrize("batch_tokens", [1, 100, None])
def test_scores_are_those_of_one_by_one(log_dir, batch_tokens):
    model, tokenizer = load(log_dir)
    sharpened(model)
    examples = [*EXAMPLES, EXAMPLES[0] | {"ctx": "", "endings": ["same", "same", "sa", "other"]}]
    score, results = evaluate(model, tokenizer, examples, batch_tokens=batch_tokens)
    check_against_one_by_one(model, tokenizer, examples, score, results)
    assert 0 < score.truncated < 7  # contexts that do not fit are among them


def test_logits_come_a_few_rows_at_a_time(log_dir, monkeypatch):
    model, tokenizer = load(log_dir)
    _, expected = evaluate(model, tokenizer, EXAMPLES)
    monkeypatch.setattr(scoring, "ROWS_OF_LOGITS", 5)
    rows = []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    _, results = evaluate(model, tokenizer, EXAMPLES)
    assert max(rows) == 5 < sum(rows)
    for result, other in zip(results, expected, strict=True):
        assert result["loss_sums"] == pytest.approx(other["loss_sums"], abs=1e-4)


def test_a_model_that_only_knows_logits_scores_alike(log_dir, tmp_path):
    torch.manual_seed(0)
    _, tokenizer = load(log_dir)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=2,
                                    initializer_range=0.2)).eval()
    hf.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    score, results = evaluate(hf, tokenizer, EXAMPLES, batch_tokens=500)
    check_against_one_by_one(model, tokenizer, EXAMPLES, score, results)
    assert score == evaluate(model, tokenizer, EXAMPLES)[0]


def test_a_tree_holds_shared_beginnings_once():
    rows = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 7], [1, 2, 7]]
    tree = scoring.build_prefix_tree(tasks.Rendered(rows, [2, 3, 1, 1], None, False))
    assert tree.tokens == [1, 2, 3, 5] and tree.parents == [-1, 0, 1, 2]
    assert tree.depths == [0, 1, 2, 3]
    assert tree.scored == [(1, 3, 0), (2, 4, 0), (1, 3, 1), (2, 5, 1), (3, 6, 1),
                           (1, 7, 2), (1, 7, 3)]
    branches = scoring.build_prefix_tree(tasks.Rendered([[1, 2, 4], [1, 3, 4]], [1, 1], None, False))
    idx, pos, mask = scoring.collate_trees([branches])
    assert idx[0].tolist() == [1, 2, 3, 0, 0, 0, 0, 0] and pos[0, :3].tolist() == [0, 1, 1]
    assert mask[0, 0, :4, :4].tolist() == [  # the branches do not see each other
        [True, False, False, False], [True, True, False, False],
        [True, False, True, False], [False, False, False, True]]


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_ranks_share_the_examples(log_dir, world_size):
    model, tokenizer = load(log_dir)
    shares = [evaluate(model, tokenizer, EXAMPLES, rank=rank, world_size=world_size)
              for rank in range(world_size)]
    whole, _ = evaluate(model, tokenizer, EXAMPLES)
    assert tuple(map(sum, zip(*(score for score, _ in shares), strict=True))) == whole
    inds = [result["ind"] for _, results in shares for result in results]
    assert sorted(inds) == list(range(6))


def test_two_processes_score_as_one(log_dir, examples_file, tmp_path):
    flags = ("--model", log_dir, "--data", examples_file, "--device=cpu", "--limit", 5, "--out")
    one = run_script(ROOT / "hellaswag.py", *flags, tmp_path / "one.jsonl")
    two = run_script("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                     ROOT / "hellaswag.py", *flags, tmp_path / "two.jsonl")
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    assert two.stdout == one.stdout and "/5=" in one.stdout
    a, b = (read_rows(tmp_path / name) for name in ("one.jsonl", "two.jsonl"))
    assert [row["ind"] for row in b] == [0, 1, 2, 3, 4]
    for row, other in zip(a, b, strict=True):
        assert row.pop("loss_sums") == pytest.approx(other.pop("loss_sums"), abs=1e-4)
        assert row == other


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_script(call, log_dir, examples_file, tmp_path):
    code, out, err = call(hellaswag, "--model", log_dir, "--data", examples_file, "--device=cpu",
                          "--out", tmp_path / "out.jsonl", "--limit", 5)
    assert code == 0
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["ind"] for row in rows] == [0, 1, 2, 3, 4]
    n = sum(row["pred"] == row["label"] for row in rows)
    n_norm = sum(row["pred_norm"] == row["label"] for row in rows)
    assert out.splitlines()[-1] == f"acc: {n}/5={n / 5:.4f} | acc_norm: {n_norm}/5={n_norm / 5:.4f}"
    se = (scoring.standard_error(n, 5), scoring.standard_error(n_norm, 5))
    assert f"standard error: acc {se[0]:.4f}, acc_norm {se[1]:.4f}" in out
    assert "acc_norm" in err  # the progress bar


def test_a_folder_with_a_tokenizer_of_its_own(call, tmp_path):
    tokenizer = train_bpe(["滿紙荒唐言，一把辛酸淚！都云作者痴，誰解其中味？"], 270)
    GPT2LMHeadModel(GPT2Config(vocab_size=270, n_positions=64, n_embd=32, n_layer=1,
                               n_head=2)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.model, encoding="utf-8")
    example = {"ctx": "滿紙荒唐言", "endings": ["一把辛酸淚", "作者痴", "味", "紙"], "label": 2}
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps(example), encoding="utf-8")
    flags = ("--model", tmp_path, "--data", path, "--device=cpu", "--out", tmp_path / "out.jsonl")
    code, out, _ = call(hellaswag, *flags)
    assert code == 0 and "/1=" in out
    assert read_rows(tmp_path / "out.jsonl")[0]["num_tokens"] == [
        len(tokenizer.encode(" " + ending)) for ending in example["endings"]]
    tokenizer = train_bpe(["滿紙荒唐言，一把辛酸淚！"], 280)
    (tmp_path / "tokenizer.json").write_text(tokenizer.model, encoding="utf-8")
    code, _, err = call(hellaswag, *flags)
    assert code == 2 and "280 tokens, the model only 270" in err


def test_standard_error_of_the_whole_set():
    assert scoring.standard_error(2967, 10_042) == pytest.approx(0.00455, abs=1e-5)


def test_control_c_prints_the_result_so_far(call, log_dir, examples_file, monkeypatch):
    score_trees, calls = scoring.score_trees, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score_trees(*args)

    monkeypatch.setattr(scoring, "score_trees", interrupted)
    code, out, err = call(hellaswag, "--model", log_dir, "--data", examples_file, "--device=cpu",
                          "--batch_tokens", 1)
    assert code == 130 and "interrupted" in err
    assert re.match(r"acc: \d/2=", out.splitlines()[-1])


def test_a_split_without_labels(call, log_dir, tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in e.items() if k != "label"}) + "\n"
                            for e in EXAMPLES), encoding="utf-8")
    flags = ("--model", log_dir, "--data", path, "--device=cpu", "--out", tmp_path / "out.jsonl")
    code, _, err = call(hellaswag, *flags)
    assert code == 2 and "line 1 lacks label" in err
    code, out, _ = call(hellaswag, *flags, "--split", "test")
    assert code == 0 and out == "6 examples scored, none with a label\n"
    assert [row["label"] for row in read_rows(tmp_path / "out.jsonl")] == [None] * 6


# comparing


def write_results(path, preds):
    path.write_text("".join(json.dumps({"ind": i, "label": 0, "pred": pred, "pred_norm": 0}) + "\n"
                            for i, pred in enumerate(preds)), encoding="utf-8")


def test_compare(call, tmp_path):
    write_results(tmp_path / "a", [0] * 8 + [1, 1])
    write_results(tmp_path / "b", [1, 0, 0, 0, 0, 0, 0, 1, 0, 2, 0])
    code, out, _ = call(hellaswag, "--compare", tmp_path / "a", tmp_path / "b")
    assert code == 0 and out.splitlines() == [
        "10 examples in common, of 10 and 11",
        "acc: 0.8000 and 0.7000 | same prediction: 0.6000 | only the first right: 2, "
        "only the second: 1 | McNemar's exact p = 1",
        "acc_norm: 1.0000 and 1.0000 | same prediction: 1.0000 | only the first right: 0, "
        "only the second: 0 | McNemar's exact p = 1"]
    (tmp_path / "c").write_text('{"ind": 3}\n')
    code, _, err = call(hellaswag, "--compare", tmp_path / "a", tmp_path / "c")
    assert code == 2 and "--out" in err and err.count("\n") == 1


@pytest.mark.parametrize("only_a, only_b, p", [
    (0, 0, 1), (5, 5, 1), (0, 10, 2 / 1024), (9, 1, 22 / 1024), (3000, 2800, 0.00894)])
def test_mcnemar(only_a, only_b, p):
    assert hellaswag.mcnemar(only_a, only_b) == pytest.approx(p, rel=1e-2)


# the harness's style

# real examples and what lm-eval 0.4.13 makes of them (its task hellaswag, process_docs)
HARNESS = [  # (example, context, endings), made up in the two forms of the official file
    ({"ind": 1, "activity_label": "Painting a door", "ctx_a": "A woman stands at a door.",
      "ctx_b": "she", "ctx": "A woman stands at a door. she", "label": 2,
      "endings": ["eats it.", "swims away from it.", "paints it blue.", "is a door."]},
     "Painting a door: A woman stands at a door. She",
     ["eats it.", "swims away from it.", "paints it blue.", "is a door."]),
    ({"ind": 2, "activity_label": "Home", "ctx_b": "", "label": 0,
      "ctx_a": "[header] How to bake [title] Heat it. [step] Wait a while.",
      "endings": ["Look. [substeps] Then eat.", "Go out. [title] Come in.", "Café.", "No."]},
     "Home: How to bake. Heat it. Wait a while.",
     ["Look. Then eat.", "Go out.. Come in.", "Café.", "No."]),
]


@pytest.mark.parametrize("example, context, endings", HARNESS)
def test_harness_texts(example, context, endings):
    assert tasks.harness_texts(example) == (context, endings)


def test_harness_style_encodes_together_and_divides_by_characters(log_dir):
    model, tokenizer = load(log_dir)
    sharpened(model)
    model.transformer.wpe = torch.nn.Embedding(512, 32)  # room for whole examples
    model.config.block_size = 512
    examples = [example for example, _, _ in HARNESS]
    score, results = evaluate(model, tokenizer, examples, lm_eval_style=True)
    norm = 0
    for (example, context, endings), result in zip(HARNESS, results, strict=True):
        means = []
        for ending, loss_sum, n in zip(
                endings, result["loss_sums"], result["num_tokens"], strict=True):
            whole = tokenizer.encode(f"{context} {ending}")
            start = len(tokenizer.encode(context))
            idx = torch.tensor([whole])
            log_probs = model(idx)[0][0, :, :tokenizer.vocab_size].log_softmax(-1)
            picked = log_probs[range(start - 1, len(whole) - 1), whole[start:]]
            assert loss_sum == pytest.approx(-picked.sum().item(), abs=1e-3)
            assert n == len(whole) - start
            means.append(loss_sum / len(ending))
        assert result["pred_norm"] == np.argmin(means)
        norm += int(np.argmin(means)) == example["label"]
    assert score.num_correct_norm == norm


def test_harness_style_needs_its_fields(call, log_dir, examples_file):
    code, _, err = call(hellaswag, "--model", log_dir, "--data", examples_file, "--lm_eval_style")
    assert code == 2 and "line 1 lacks activity_label" in err


# real examples, and training


def test_real_examples(log_dir, real_data):
    examples = list(tasks.iterate_examples(real_data / "hellaswag_val_402.jsonl"))
    assert len(examples) == 402 and examples[0]["ind"] == 24
    model, tokenizer = load(log_dir)
    sharpened(model)
    score, results = evaluate(model, tokenizer, examples[::20])
    check_against_one_by_one(model, tokenizer, examples[::20], score, results)


def test_training_does_not_notice(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tasks.DATA_FILE.parent.mkdir()
    tasks.DATA_FILE.write_text("".join(json.dumps(e) + "\n" for e in EXAMPLES))
    train(tiny_config(data_dir, tmp_path / "a"))
    train(tiny_config(data_dir, tmp_path / "b", hellaswag_every=1))
    for stream in ("train", "norm"):
        assert read_log(tmp_path / "a", stream) == read_log(tmp_path / "b", stream)
    score, _ = evaluate(*load(tmp_path / "b"), EXAMPLES)
    accuracy = read_log(tmp_path / "b", "hella")[6]
    assert accuracy == pytest.approx(score.num_correct_norm / 6, rel=1e-5)
    lines = [line for line in capsys.readouterr().out.splitlines() if "HellaSwag" in line]
    assert len(lines) == 7
    assert re.fullmatch(r"HellaSwag accuracy: \d/6=0\.\d{4} \| standard error 0\.\d{4} "
                        r"\| \d+\.\ds", lines[-1])


@pytest.mark.parametrize("line, message", [
    ("nonsense", "line 7"), ('{"ctx": "a", "label": 0}', "line 7 lacks endings"),
    ('{"ctx": "a", "endings": ["a", "b", "c", "d"]}', "line 7 lacks label"),
    ('{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}', "label from 0 to 3"),
    ('{"ctx": "a", "label": 0, "endings": ["a"]}', "four endings"), ("[1]", "line 7"),
    ('{"ctx": 1, "label": 0, "endings": ["a", "b", "c", "d"]}', "lacks texts"), ("5", "line 7")])
def test_a_bad_line_is_named(examples_file, line, message):
    with open(examples_file, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        list(tasks.iterate_examples(examples_file))


# the download


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """A server that fails twice and then serves some content; yields its settings."""
    settings = {"failures": 2, "content": b'{"some": "examples"}\n', "requests": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            settings["requests"] += 1
            ok = settings["requests"] > settings["failures"]
            self.send_response(200 if ok else 503)
            self.send_header("Content-Length", str(len(settings["content"])))
            self.end_headers()
            self.wfile.write(settings["content"])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HELLASWAG_URL", f"http://127.0.0.1:{server.server_port}/val.jsonl")
    content = settings["content"]
    monkeypatch.setitem(tasks.OFFICIAL_FILES, "val",
                        (len(content), hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(tasks.time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    yield settings
    server.shutdown()


def test_download_once_and_through_failures(mirror):
    tasks.download()
    tasks.download()
    assert tasks.DATA_FILE.read_bytes() == mirror["content"] and mirror["requests"] == 3


def test_a_mirror_that_stays_down_or_serves_something_else(mirror, monkeypatch, call):
    mirror["failures"] = 99
    code, _, err = call(hellaswag)
    assert code == 2 and err.count("\n") == 1 and "HELLASWAG_URL" in err
    mirror["failures"] = 0
    monkeypatch.setitem(tasks.OFFICIAL_FILES, "val", (1000, "0" * 64))
    with pytest.raises(OSError, match="21 of 1000 bytes came"):
        tasks.download()
    monkeypatch.setitem(tasks.OFFICIAL_FILES, "val", (10, "0" * 64))
    with pytest.raises(OSError, match="not the official"):
        tasks.download()
    assert not tasks.DATA_FILE.exists()
