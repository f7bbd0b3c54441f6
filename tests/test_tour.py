"""README's commands, in a stranger's order, at a small size: from a book to an exported model."""

import json
import shlex
import shutil

import pytest
from conftest import ROOT, small_text

import export_hf
import fineweb
import hellaswag
import plot
import sample
import train_gpt2

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {f"{module.__name__}.py": module
           for module in (export_hf, fineweb, hellaswag, plot, sample, train_gpt2)}


@pytest.fixture
def follow(call, tmp_path, monkeypatch):
    """Run a command that README shows, with flags that make it small; returns its output."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)

    def run(command, *smaller):
        assert f"{command}\n" in README or f"{command} " in README or f"`{command}`" in README
        _, script, *flags = shlex.split(command)
        code, out, err = call(SCRIPTS[script], *flags, *smaller)
        assert code == 0, err
        return out

    return run


def test_from_a_book_to_an_exported_model(follow, tmp_path):
    (tmp_path / "book.txt").write_text(small_text(300_000), encoding="utf-8")
    short = ("--max_steps", 4, "--save_every", 2, "--val_tokens", 512, "--warmup_steps", 1)
    cpu = ("--device", "cpu")
    follow("python fineweb.py --source book.txt --tokenizer bpe:1536 --out my_data")
    assert "is whole" in follow("python fineweb.py --verify my_data")
    assert "bytes per token" in follow("python fineweb.py --stats my_data")
    assert "the run can start" in follow("python train_gpt2.py --check", "--preset", "demo",
                                         "--data_dir", "my_data")
    train = "python train_gpt2.py --preset demo --data_dir my_data"
    out = follow(train, *short)
    assert "trained to step 4" in out and "next: python sample.py" in out
    (tmp_path / "log" / "model_00004.pt").unlink()  # as if killed
    assert "at step 2, read in" in follow(train, *short, "--resume")
    assert (tmp_path / "log" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert follow("python sample.py --style creative", "--max_new_tokens", 5, *cpu)
    assert follow('python sample.py --prompt "" --style focused', "--max_new_tokens", 5, *cpu)

    assert "wrote log" in follow("python plot.py")
    shutil.copytree(tmp_path / "log", tmp_path / "other_log")
    follow("python plot.py log other_log --out both.png")
    assert (tmp_path / "both.png").is_file()

    examples = [{"ctx": f"Number {i} is", "ctx_a": f"Number {i} is", "ctx_b": "", "label": i % 4,
                 "activity_label": "Counting", "endings": ["a", "b", "c", "even so"]}
                for i in range(5)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    for out in ("small.jsonl", "medium.jsonl"):
        text = follow("python hellaswag.py", "--data", "few.jsonl", "--out", out, *cpu)
        assert "/5=" in text
    assert "5" in follow("python hellaswag.py --compare small.jsonl medium.jsonl")

    follow("python export_hf.py log my_gpt2")
    follow("python export_hf.py log half --dtype bfloat16")
    assert follow("python sample.py --style creative", "--model", "my_gpt2",
                  "--max_new_tokens", 5, *cpu)
    assert "/5=" in follow("python hellaswag.py --lm_eval_style", "--model", "my_gpt2", "--data",
                           "few.jsonl", *cpu)
