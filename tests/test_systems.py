"""
Windows and macOS: runs on a Linux that imitates them (imitation.py), and their special cases one by
one. The workflow in .github runs all tests on real machines.
"""

import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_log, tiny_config, tiny_flags

from gpt2lab import checkpoints, distributed, files
from gpt2lab.checkpoints import list_checkpoints
from train_gpt2 import train

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="imitates the system on Linux")
# the system's encoding is ASCII, which lacks even more characters than cp1252
WINDOWS = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "LC_ALL": "C",
           "PYTHONCOERCECLOCALE": "0"}

# {system} and {folder} are filled in. A script that runs in this process is quick, because torch is
# imported once
RUN_SCRIPTS = """
import sys
import imitation
imitation.imitate_{system}({folder!r})
import fineweb, sample, train_gpt2
from gpt2lab.checkpoints import list_checkpoints, load_checkpoint
from gpt2lab.cli import run_main

def run(module, *flags):
    sys.argv = [module.__name__ + ".py", *flags]
    try:
        run_main(module.main, output_may_be_lost=True)
    except SystemExit as end:
        assert not end.code, (module, flags)

def train(*flags):
    run(train_gpt2, *sys.orig_argv[4:], *flags)

run(fineweb, "--source", sys.argv[1], "--tokenizer", "bpe:300", "--out", "data", "--num_proc", "2")
"""


def run_on(system, script, folder, text_file, **options):
    """
    Run RUN_SCRIPTS and then `script` in a folder, on an imitation of a system. train(*flags) in the
    script trains with the options of conftest.TINY, changed by `options`. Returns stdout as bytes.
    """
    flags = tiny_flags(data_dir="data", log_dir="log", **options)
    script = RUN_SCRIPTS.format(system=system, folder=str(folder)) + script
    env = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests", ROOT)))}
    done = subprocess.run([sys.executable, "-c", script, str(text_file), *flags], cwd=folder,
                          capture_output=True, timeout=600, check=False,
                          env={**os.environ, **env, **(WINDOWS if system == "windows" else {})})
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def expect_same_files(folder, expected):
    """
    Two folders hold the same files, byte for byte. The lock is left out: on Windows, filelock
    deletes it when it is released, because we cannot delete it before.
    """
    contents = [{path.name: path.read_bytes() for path in root.iterdir() if path.suffix != ".lock"}
                for root in (folder, expected)]
    assert contents[0] == contents[1]


RUN_ON_WINDOWS = """
train("--max_steps", "2")
mapped = load_checkpoint("log/model_00002.pt")["model"]  # as sample.py does while it reads one
train("--max_steps", "6", "--resume_anyway")
assert sorted(list_checkpoints("log")) == [2, 6]
model, tokenizer = sample.load("log/model_00002.pt")
assert (mapped["lm_head.weight"] == model.lm_head.weight).all()
del mapped
print("no more warnings", flush=True)
train("--max_steps", "8", "--resume_anyway")
assert list(list_checkpoints("log")) == [8]  # of those deleted, this process has read two
run(sample, "--device", "cpu", "--num_samples", "2", "--max_new_tokens", "20")
"""


@linux_only
def test_a_run_on_windows_from_text_to_samples(text_file, data_dir, tmp_path):
    """
    Guards against a run on Windows that ends because a checkpoint is being read, because a
    character cannot be printed, or because the system has no fork, SIGHUP or SIGUSR1.
    """
    out = run_on("windows", RUN_ON_WINDOWS, tmp_path, text_file, save_every=2, keep_last=1,
                 keep_every=0, sample_prompt="a", sample_every=2, plot_every=8)
    expect_same_files(tmp_path / "data", data_dir)
    before, after = out.split(b"no more warnings")
    assert before.count(b"model_00002.pt cannot be deleted and stays") == 2  # at steps 4 and 6
    assert b"saved log/model_00006.pt" in before
    assert b"warning" not in after and b"is not saved" not in out
    assert rb"\ufffd" in out  # a random model does not write UTF-8, and cp1252 lacks this character
    assert list(read_log(tmp_path / "log", "train")) == list(range(8))
    assert b"[Sample 2]" in after


RUN_ON_MACOS = """
train("--max_steps", "3")
train("--resume_anyway")
train("--check")
run(sample, "--device", "cpu", "--num_samples", "2", "--max_new_tokens", "20")
"""


@linux_only
def test_a_run_on_macos_from_text_to_samples(text_file, data_dir, tmp_path):
    """Guards against a need of /proc or sched_getaffinity, and data left in the disk's cache."""
    out = run_on("macos", RUN_ON_MACOS, tmp_path, text_file, save_every=3)
    expect_same_files(tmp_path / "data", data_dir)
    assert b"the run can start" in out and b"[Sample 2]" in out
    assert list(read_log(tmp_path / "log", "train")) == list(range(6))
    flushed = (tmp_path / "full_fsync.txt").read_text().splitlines()
    for name in ("data/edufineweb_train_000001.npy", "data/meta.json", "log/model_00006.pt"):
        assert any(line.startswith(str(tmp_path / name)) for line in flushed), name


@pytest.mark.parametrize("refusal", [None, errno.ENOTSUP])
def test_a_file_is_flushed_through_the_disks_cache_where_it_can_be(tmp_path, monkeypatch, refusal):
    """Guards against a checkpoint that macOS's fsync has left in the cache of the disk."""
    calls = []

    def fcntl(number, command):
        calls.append(("full", command))
        if refusal:  # as SMB does
            raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setitem(sys.modules, "fcntl", SimpleNamespace(fcntl=fcntl, F_FULLFSYNC=51))
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync"))
    files.write_atomically(tmp_path / "a", lambda file: file.write(b"data"))
    assert calls[:2] == ["fsync", ("full", 51)]
    assert (tmp_path / "a").read_bytes() == b"data"


def test_a_checkpoint_that_cannot_be_pruned_is_no_lost_checkpoint(
        data_dir, tmp_path, capsys, monkeypatch):
    """Guards against "step 4 is not saved" and exit code 1 because an old file is in use."""
    original = os.unlink

    def unlink(path, *args, **options):
        if str(path).endswith("model_00002.pt"):
            raise PermissionError(errno.EACCES, "the file is used by another process", str(path))
        original(path, *args, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    options = dict(save_every=1, keep_last=1, keep_every=0, sample_every=0)
    result = train(tiny_config(data_dir, tmp_path, **options))
    assert result["checkpoint"] == str(tmp_path / "model_00006.pt")
    assert sorted(list_checkpoints(tmp_path)) == [2, 6]
    out = capsys.readouterr().out
    assert out.count("model_00002.pt cannot be deleted and stays: the file is used") == 4
    assert out.count("saved ") == 6 and "is not saved" not in out
    monkeypatch.undo()
    checkpoints.prune_checkpoints(tmp_path, 1, 0)
    assert sorted(list_checkpoints(tmp_path)) == [6]


@pytest.mark.parametrize("name, libuv", [("posix", True), ("nt", False)])
def test_torchruns_store_is_joined_without_libuv_on_windows(monkeypatch, name, libuv):
    """Guards against "use_libuv was requested but PyTorch was built without libuv support"."""
    options = {}

    def TCPStore(address, port, **kwargs):
        options.update(kwargs)
        return torch.distributed.HashStore()

    monkeypatch.setattr(distributed.dist, "TCPStore", TCPStore)
    for key, value in dict(
            TORCHELASTIC_USE_AGENT_STORE="True", GROUP_WORLD_SIZE="1", MASTER_ADDR="localhost",
            MASTER_PORT="29500", TORCHELASTIC_RESTART_COUNT="0").items():
        monkeypatch.setenv(key, value)
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", name)
        distributed.fresh_store()
    assert options["use_libuv"] is libuv
