"""HellaSwag: the scores are those of the plain definition, and none is lost or counted twice."""

import hashlib
import http.server
import json
import threading

import numpy as np
import pytest
import torch

import hellaswag
from fineweb import UserError
from train_gpt2 import load_model, load_tokenizer

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


@torch.no_grad()
def plain_losses(model, tokenizer, example):
    """(sum, count) for each ending, token by token as the definition says."""
    context = tokenizer.encode(example["ctx"])
    scores = []
    for ending in example["endings"]:
        tokens = context + tokenizer.encode(" " + ending)
        tokens = tokens[-model.config.block_size:]
        n = min(len(tokenizer.encode(" " + ending)), len(tokens) - 1)
        log_probs = model(torch.tensor([tokens]))[0][0, :, :tokenizer.vocab_size].log_softmax(-1)
        scores.append((-sum(log_probs[i - 1, tokens[i]].item()
                            for i in range(len(tokens) - n, len(tokens))), n))
    return scores


def test_render_example_marks_the_endings(log_dir):
    tokenizer = load_tokenizer(log_dir)
    tokens, mask, label = hellaswag.render_example(EXAMPLES[1], tokenizer)
    assert label == 1 and tokens.shape == mask.shape and tokens.dtype == torch.int64
    for row, marked, ending in zip(tokens, mask, EXAMPLES[1]["endings"], strict=True):
        assert tokenizer.decode(row[marked == 1]) == " " + ending
        context = row[:int(marked.argmax())]
        assert tokenizer.decode(context) == EXAMPLES[1]["ctx"]


def test_scores_are_those_of_the_definition(log_dir):
    model, tokenizer = load_model(log_dir), load_tokenizer(log_dir)
    results = []
    totals = hellaswag.evaluate(model, tokenizer, EXAMPLES, "cpu",
                                on_result=lambda result, _: results.append(result))
    correct = correct_norm = truncated = 0
    for example, result in zip(EXAMPLES, results, strict=True):
        sums, counts = zip(*plain_losses(model, tokenizer, example), strict=True)
        assert result["num_tokens"] == list(counts)
        assert result["loss_sums"] == pytest.approx(sums, abs=1e-3)
        correct += int(np.argmin(sums)) == example["label"]
        correct_norm += int(np.argmin(np.divide(sums, counts))) == example["label"]
        truncated += len(tokenizer.encode(example["ctx"])) + max(counts) > model.config.block_size
    assert totals == (6, correct, correct_norm)
    assert truncated > 0  # contexts that do not fit are among them


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_ranks_share_the_examples(log_dir, world_size):
    model, tokenizer = load_model(log_dir), load_tokenizer(log_dir)
    shares = [hellaswag.evaluate(model, tokenizer, EXAMPLES, "cpu", rank, world_size)
              for rank in range(world_size)]
    whole = hellaswag.evaluate(model, tokenizer, EXAMPLES, "cpu")
    assert tuple(map(sum, zip(*shares, strict=True))) == whole and whole[0] == 6


def test_script(call, log_dir, examples_file, tmp_path):
    code, out, err = call(hellaswag, "--model", log_dir, "--data", examples_file, "--device=cpu",
                          "--out", tmp_path / "out.jsonl", "--limit", 5)
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["ind"] for row in rows] == [0, 1, 2, 3, 4]
    n = sum(row["pred"] == row["label"] for row in rows)
    n_norm = sum(row["pred_norm"] == row["label"] for row in rows)
    assert out.splitlines()[-1] == f"acc: {n}/5={n / 5:.4f} | acc_norm: {n_norm}/5={n_norm / 5:.4f}"
    assert "acc_norm" in err  # the progress bar


def test_real_examples(log_dir, real_data):
    examples = list(hellaswag.iterate_examples(real_data / "hellaswag_val_402.jsonl"))
    assert len(examples) == 402 and examples[0]["ind"] == 24
    total, _, _ = hellaswag.evaluate(
        load_model(log_dir), load_tokenizer(log_dir), examples[:20], "cpu")
    assert total == 20


@pytest.mark.parametrize("line, message", [
    ("nonsense", "line 7"), ('{"ctx": "a", "label": 0}', "line 7 lacks endings"),
    ('{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}', "label from 0 to 3"),
    ('{"ctx": "a", "label": 0, "endings": ["a"]}', "four endings"), ("[1]", "line 7")])
def test_a_bad_line_is_named(examples_file, line, message):
    with open(examples_file, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        list(hellaswag.iterate_examples(examples_file))


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
    monkeypatch.setattr(hellaswag, "DATA_SHA256", hashlib.sha256(settings["content"]).hexdigest())
    monkeypatch.setattr(hellaswag.time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    yield settings
    server.shutdown()


def test_download_once_and_through_failures(mirror):
    hellaswag.download()
    hellaswag.download()
    assert hellaswag.DATA_FILE.read_bytes() == mirror["content"] and mirror["requests"] == 3


def test_a_mirror_that_stays_down_or_serves_something_else(mirror, monkeypatch, call):
    mirror["failures"] = 99
    code, _, err = call(hellaswag)
    assert code == 2 and err.count("\n") == 1 and "HELLASWAG_URL" in err
    mirror["failures"] = 0
    monkeypatch.setattr(hellaswag, "DATA_SHA256", "0" * 64)
    with pytest.raises(OSError, match="not the official"):
        hellaswag.download()
    assert not hellaswag.DATA_FILE.exists()
