"""What several tests share: a small real text, shards and runs made from it, running scripts."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import asdict
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

import pytest
import torch

import fineweb
import train_gpt2
from gpt2lab import kernels, presets, runlog, tasks
from gpt2lab.cli import UserError, run_main
from gpt2lab.tokenizer import Tokenizer
from train_gpt2 import GPT, GPTConfig, TrainConfig, train

ROOT = Path(__file__).resolve().parent.parent
# on a CPU, torch.compile writes C++ that includes Python's own header
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl")))
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile needs a C++ compiler and Python.h")


def small_text(chars=60_000):
    """Real English text that comes with Python."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))[:chars]


def plain_model(seed=0):
    """A small GPT as train_gpt2.py defines it, without the layers of gpt2lab.kernels."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=32))


# options of a two-layer model that trains for six quick steps
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, B=4, T=32, total_batch_size=256,
            max_steps=6, warmup_steps=2, max_lr=1e-3, min_lr=1e-4, hellaswag_every=0,
            plot_every=0, sample_prompt="", device="cpu", dtype="float32")


def tiny_config(data_dir, log_dir, **changes):
    """A TrainConfig with the options of TINY, except for `changes`."""
    return TrainConfig(data_dir=str(data_dir), log_dir=str(log_dir), **(TINY | changes))


def make_flags(**options):
    """Options as flags of a command line, ["--name", "value", ...]."""
    flags = []
    for name, value in options.items():
        flags += [f"--{name}", str(value)]
    return flags


def tiny_flags(**changes):
    """The options of TINY, except for `changes`, as flags of train_gpt2.py."""
    return make_flags(**(TINY | changes))


def parse_train_flags(*flags):
    """(preset or None, TrainConfig) that train_gpt2.py makes of its flags."""
    return presets.parse_command_line(TrainConfig, train_gpt2.__doc__, flags)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """
    Compute on one thread. A second one gains nothing for tiny models, and loses much on busy cores.
    """
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too


@pytest.fixture(scope="session", autouse=True)
def heed_ctrl_c():
    """Let processes that tests start heed Ctrl-C, which a shell makes commands with "&" ignore."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=os.name == "nt")
def skip_where_links_are_forbidden(monkeypatch):
    """Skip a test that makes a link where Windows does not allow it outside its developer mode."""
    original = Path.symlink_to

    def symlink_to(link, target):
        try:
            original(link, target, target_is_directory=(link.parent / target).is_dir())
        except OSError as error:
            pytest.skip(f"links are not allowed: {error}")

    monkeypatch.setattr(Path, "symlink_to", symlink_to)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """The small text in a file."""
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
    train(tiny_config(data_dir, path))
    return path


@functools.cache  # without a network, an attempt takes half a minute
def load_gpt2_tokenizer():
    """GPT-2's own tokenizer, or None where it cannot be loaded."""
    try:
        return Tokenizer("gpt2")
    except UserError:
        return None


@pytest.fixture
def gpt2_tokenizer():
    """GPT-2's own tokenizer. Skips the test where it cannot be loaded."""
    return load_gpt2_tokenizer() or pytest.skip(
        "no gpt2 tokenizer: TIKTOKEN_CACHE_DIR is not set and no network")


@pytest.fixture
def real_data():
    """A folder of real data sets. Skips the test where there is none, as on a fresh machine."""
    if "GPT2_TEST_DATA" not in os.environ:
        pytest.skip("GPT2_TEST_DATA names no folder of real data")
    return Path(os.environ["GPT2_TEST_DATA"])


@pytest.fixture
def hellaswag_examples(tmp_path, monkeypatch):
    """Eleven HellaSwag examples where training looks for them; tmp_path is the working folder."""
    monkeypatch.chdir(tmp_path)
    tasks.DATA_FILE.parent.mkdir()
    words = ["red", "green", "blue", "black", "white", "grey", "brown", "pink"]
    examples = [{"ctx": f"A man is {words[i % 8]} and", "label": i % 4,
                 "endings": [f"sits {words[i % 5]}", "is", "the", words[i % 7]]} for i in range(11)]
    tasks.DATA_FILE.write_text("".join(json.dumps(e) + "\n" for e in examples))


@pytest.fixture
def call_main(monkeypatch, capsys):
    """
    A function that runs a script in this process: call_main(module, *arguments) calls the module's
    main and returns (exit code, stdout, stderr).
    """

    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        code = 0
        try:
            run_main(module.main)
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def run_script(*args, cwd=None, env=None):
    """Run `python ARGS` as a process of its own; returns the CompletedProcess."""
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True,
                          encoding="utf-8", timeout=600, check=False,  # ends one that hangs
                          env={**os.environ, "PYTHONUTF8": "1", **(env or {})})


class MakesFolderWhenUnpickled:
    """An object whose pickle, if it is loaded without care, calls os.mkdir("hacked")."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


class JobResult(NamedTuple):
    """How a Job of tests/forked.py ended."""

    exit_codes: list  # one for each rank
    output: str  # stdout and stderr of all ranks


def run_jobs(tmp_path, jobs):
    """Run Jobs of tests/forked.py, one after the other; returns a JobResult for each."""
    for number, job in enumerate(jobs):
        job.output_file = str(tmp_path / f"job_{number}.out")
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    done = run_script(ROOT / "tests" / "forked.py", path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    outputs = [Path(job.output_file).read_text(encoding="utf-8") for job in jobs]
    print(*outputs)  # pytest shows it if the test fails
    return [JobResult(*result) for result in zip(json.loads(done.stdout), outputs, strict=True)]


def read_log(log_dir, stream):
    """{step: value} of one stream of log.txt, sorted by step; {} if the log has no such stream."""
    steps, values = runlog.read_log(log_dir).get(stream, ((), ()))
    return dict(zip(steps, values, strict=True))


@pytest.fixture
def onednn_at_any_size(monkeypatch):
    """Matmuls of small matrices go to oneDNN as those of large ones do."""
    monkeypatch.setattr(kernels, "ONEDNN_MIN_NUMEL", 1)
