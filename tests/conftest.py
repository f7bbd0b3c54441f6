"""What several tests share: a small real text, shards and a run made from it, and scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import pytest
import torch

import fineweb
import train_gpt2
from gpt2lab import kernels
from gpt2lab.cli import UserError, run_main
from gpt2lab.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def small_text(chars=60_000):
    """Real English text that every Python carries."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))[:chars]


TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, B=4, T=32, total_batch_size=256,
            max_steps=6, warmup_steps=2, max_lr=1e-3, min_lr=1e-4, hellaswag_every=0,
            plot_every=0, sample_prompt="", device="cpu")


def tiny_config(data_dir, log_dir, **changes):
    """A TrainConfig of a two-layer model that trains for six quick steps."""
    return train_gpt2.TrainConfig(data_dir=str(data_dir), log_dir=str(log_dir), **(TINY | changes))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models gain nothing from a second thread, and lose much where cores are busy."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # and in the processes that tests start


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(small_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, text_file):
    """Shards of the small text with a tokenizer of 300 tokens."""
    out = tmp_path_factory.mktemp("shards") / "data"
    fineweb.prepare([str(text_file)], out, "bpe:300")
    return out


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory, data_dir):
    """The log folder of a finished tiny run."""
    path = tmp_path_factory.mktemp("run") / "log"
    train_gpt2.train(tiny_config(data_dir, path))
    return path


@pytest.fixture
def gpt2_tokenizer():
    try:
        return Tokenizer("gpt2")
    except UserError:
        pytest.skip("no gpt2 tokenizer: TIKTOKEN_CACHE_DIR is not set and no network")


@pytest.fixture
def real_data():
    """Folder of real data sets, which a fresh machine does not have."""
    if "GPT2_TEST_DATA" not in os.environ:
        pytest.skip("GPT2_TEST_DATA names no folder of real data")
    return Path(os.environ["GPT2_TEST_DATA"])


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main in this process; returns (exit code, stdout, stderr)."""

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        code = 0
        try:
            run_main(module.main)
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def run_script(*args, cwd=None, env=None, timeout=120):
    """Run `python ARGS` as a process of its own; returns the CompletedProcess."""
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True,
                          encoding="utf-8", timeout=timeout, check=False,
                          env={**os.environ, "PYTHONUTF8": "1", **(env or {})})


def forked(tmp_path, jobs):
    """Run jobs for tests/forked.py in one process that forks; returns what each came to."""
    for number, job in enumerate(jobs):
        job.setdefault("stdout", str(tmp_path / f"job_{number}.out"))
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    done = run_script(ROOT / "tests" / "forked.py", path)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(jobs), done.stdout + done.stderr
    return [result | {"stderr": done.stderr} for result in results]


def read_log(log_dir, stream):
    """{step: value} of one stream of log.txt."""
    lines = (Path(log_dir) / "log.txt").read_text(encoding="utf-8").split("\n")[:-1]
    return {int(s): float(v) for s, name, v in map(str.split, lines) if name == stream}


@pytest.fixture
def any_size(monkeypatch):
    """Products of small matrices are done as those of large ones."""
    monkeypatch.setattr(kernels, "ONEDNN_MIN_NUMEL", 1)
