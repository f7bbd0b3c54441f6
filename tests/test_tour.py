"""README's commands in a newcomer's order, at a small size: from a book to an exported model."""

import json
import shlex
import shutil

import pytest
from conftest import ROOT, small_text

import evaluate
import export_hf
import fineweb
import hellaswag
import plot
import sample
import train_gpt2

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {f"{module.__name__}.py": module
           for module in (evaluate, export_hf, fineweb, hellaswag, plot, sample, train_gpt2)}


@pytest.fixture
def run_readme(call_main, tmp_path, monkeypatch):
    """
    Returns a function that runs a command of README in an empty folder, with more flags that make
    it small, and returns the output. The function fails if README does not show the command.
    """
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)

    def run(command, *more_flags):
        assert f"{command}\n" in README or f"{command} " in README or f"`{command}`" in README
        _, script, *flags = shlex.split(command)
        code, out, err = call_main(SCRIPTS[script], *flags, *more_flags)
        assert code == 0, err
        return out

    return run


def test_from_a_book_to_an_exported_model(run_readme, tmp_path):
    (tmp_path / "book.txt").write_text(small_text(300_000), encoding="utf-8")
    cpu = ("--device", "cpu")
    short = ("--max_steps", 4, "--save_every", 2, "--val_tokens", 512, "--warmup_steps", 1)
    run_readme("python fineweb.py --source book.txt --tokenizer bpe:1536 --out my_data")
    assert "is whole" in run_readme("python fineweb.py --verify my_data")
    assert "bytes per token" in run_readme("python fineweb.py --stats my_data")
    assert "the run can start" in run_readme(
        "python train_gpt2.py --check", "--preset", "demo", "--data_dir", "my_data")
    train, short = "python train_gpt2.py --data_dir my_data --minutes 5", (*short, *cpu)
    assert "trained to step 4" in run_readme(train, *short, "--minutes", 0.02)
    (tmp_path / "log" / "model_00004.pt").unlink()  # as if the run had been killed
    assert "at step 2, read in" in run_readme(train, *short, "--resume")
    assert (tmp_path / "log" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert run_readme("python sample.py --style creative", "--max_new_tokens", 5, *cpu)
    assert run_readme('python sample.py --prompt "" --style focused', "--max_new_tokens", 5, *cpu)

    assert "wrote log" in run_readme("python plot.py")
    shutil.copytree(tmp_path / "log", tmp_path / "other_log")
    run_readme("python plot.py log other_log --out both.png")
    assert (tmp_path / "both.png").is_file()

    examples = [{"ctx": f"Number {i} is", "ctx_a": f"Number {i} is", "ctx_b": "", "label": i % 4,
                 "activity_label": "Counting", "endings": ["a", "b", "c", "even so"]}
                for i in range(5)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    for out in ("small.jsonl", "medium.jsonl"):
        text = run_readme("python hellaswag.py", "--data", "few.jsonl", "--out", out, *cpu)
        assert "/5=" in text
    assert "5" in run_readme("python hellaswag.py --compare small.jsonl medium.jsonl")

    run_readme("python export_hf.py log my_gpt2")
    assert run_readme("python sample.py --style creative", "--model", "my_gpt2",
                      "--max_new_tokens", 5, *cpu)
    assert "/5=" in run_readme("python hellaswag.py", "--lm_eval_style", "--model", "my_gpt2",
                               "--data", "few.jsonl", *cpu)
    (tmp_path / "book.txt").write_text(small_text(3_000), encoding="utf-8")
    assert "bits per byte" in run_readme("python evaluate.py --data book.txt", "--model",
                                         "my_gpt2", *cpu)
