"""
A rank that waits for its device when another rank dies, as with NCCL, whose collectives do not fail
then. A mutex that is never released stands in for the GPU: the main thread cannot run Python.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from gpt2lab import distributed
from gpt2lab.signals import Signals

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")

BLOCK_FOR_EVER = """
import ctypes
mutex = ctypes.create_string_buffer(256)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
"""

# argument: "killed" if rank 1 dies, "slow" if rank 0 alone gets SIGTERM while it waits long for its
# device
RANK = BLOCK_FOR_EVER + """
import os, signal, sys, threading
import torch.distributed as dist
from gpt2lab import distributed, signals, streams
# writes each line at once, as in the scripts: torchrun's python -u writes its end separately, so
# that the lines of two ranks can mix
streams.open_standard_streams(lambda error: None)
ranks = distributed.init_distributed("cpu")
distributed.BLOCKED_SECONDS = 5
distributed.BLOCKING_BACKENDS = ("gloo",)  # stands in for nccl
signals.WATCH_SECONDS = 0.5
with signals.Signals(distributed.watch_for_lost_ranks) as recorded:
    store = dist.distributed_c10d._get_default_store()
    store.set(f"ready/{ranks.ddp_rank}", "1")
    # not a barrier, which fails on a rank that has not left it when another rank dies
    store.wait([f"ready/{rank}" for rank in range(3)])
    if sys.argv[1] == "killed" and ranks.ddp_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "slow":
        threading.Timer(8, lambda: ctypes.CDLL(None).pthread_mutex_unlock(mutex)).start()
        if ranks.ddp_rank == 0:
            threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    lock(mutex)  # as if in torch.cuda.synchronize
print(f"rank {ranks.ddp_rank}: stop {recorded.stop}")
"""


def run_ranks(tmp_path, what):
    """Run RANK with an argument on three ranks; returns the CompletedProcess of torchrun."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", str(script)]
    return subprocess.run([*torchrun, what], capture_output=True, text=True, timeout=600, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def test_a_rank_that_waits_for_its_gpu_says_which_rank_died(tmp_path):
    """torchrun sends SIGTERM, which Python cannot handle now. After 30 s it kills every rank."""
    done = run_ranks(tmp_path, "killed")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "error: lost" in line]
    assert sorted(line.split(" (")[0] for line in lines) == [
        "rank 0: error: lost rank 1", "rank 2: error: lost rank 1"]
    assert all("--resume" in line for line in lines)
    assert "exitcode  : -9" in done.stderr  # of rank 1, and of no other
    assert done.stderr.count("exitcode  : 1 ") == 2, done.stderr


def test_ranks_that_got_no_signal_are_not_lost(tmp_path):
    """Guards against a rank that ends a healthy run, because it alone was asked to stop."""
    done = run_ranks(tmp_path, "slow")
    assert done.returncode == 0, done.stderr
    assert "lost" not in done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "rank 0: stop True", "rank 1: stop False", "rank 2: stop False"]


@pytest.fixture
def found_missing(monkeypatch):
    """Pretends to be in a process group in which find_missing_ranks finds what the list holds."""
    found, exits = [[]], []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(distributed.dist.distributed_c10d, "_get_default_store", dist.HashStore)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "find_missing_ranks", lambda seconds: found[0])
    monkeypatch.setattr(distributed, "exit_for_lost_ranks", lambda *args: exits.append(args[0]))
    return found, exits


@pytest.mark.parametrize("missing, is_blocked, exits", [
    ([], True, False),  # all ranks were asked to stop, and an update takes long
    (["1"], False, False),  # this rank has noticed the signal, and does what it has to
    (["1"], True, True),
    (None, True, True)])  # the store was on the node that died
def test_only_a_blocked_rank_that_misses_another_exits(
        found_missing, missing, is_blocked, exits):
    found_missing[0][0] = missing
    distributed.watch_for_lost_ranks(True, lambda: is_blocked)
    assert found_missing[1] == ([missing] if exits else [])


def test_gloo_is_left_alone(found_missing, monkeypatch):
    """Its collectives fail by themselves, and wait long for a slow rank, which is not lost."""
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "gloo")
    found_missing[0][0] = ["1"]
    distributed.watch_for_lost_ranks(True, lambda: True)
    assert found_missing[1] == []


def test_the_watching_thread_hears_sigterm_between_other_signals(capsys):
    heard = threading.Event()
    with Signals(lambda terminated, is_blocked: terminated and heard.set()) as signals:
        signal.raise_signal(signal.SIGUSR1)
        assert signals.save
        signal.raise_signal(signal.SIGTERM)
        assert signals.stop
        assert heard.wait(timeout=60)
        signals.save = False
        signal.raise_signal(signal.SIGUSR1)  # the socket still takes signals
        assert signals.save
    assert "wakeup fd" not in capsys.readouterr().err


def test_signals_leave_no_thread_and_no_descriptor_behind():
    before = set(threading.enumerate())
    with socket.socket() as other:  # what asyncio or a notebook has installed
        other.setblocking(False)
        signal.set_wakeup_fd(other.fileno())
        with Signals(lambda terminated, is_blocked: None) as signals:
            (watching,) = set(threading.enumerate()) - before
        watching.join(timeout=60)
        assert not watching.is_alive()
        assert signal.set_wakeup_fd(-1) == other.fileno()
    assert [end.fileno() for end in signals._sockets] == [-1, -1]  # closed
