"""Checkpoints that a thread writes while training goes on: what they hold, who waits for them."""

import gc
import os
import signal
import sys
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from test_resume import expect_same_state

import train_gpt2
from gpt2lab import checkpoints, distributed, preflight
from gpt2lab.checkpoints import Saver, list_checkpoints
from gpt2lab.cli import UserError
from train_gpt2 import train

OPTIONS = dict(sample_every=0, eval_every=0, keep_last=0)


class Writes:
    """
    The checkpoints that are being written. Each write waits for the event `may_write`. While the
    run waits for a file, `may_write` is set.
    """

    def __init__(self):
        self.may_write, self.steps, self.threads, self.tensors = threading.Event(), [], [], []
        self.under_way = 0

    def write_checkpoint(self, path, checkpoint, stopped):
        """Takes the place of checkpoints.write_checkpoint."""
        self.under_way += 1
        assert self.under_way == 1, "two files are being written"
        self.steps.append(checkpoint["step"])
        self.threads.append(threading.current_thread())
        states = checkpoint["optimizer"]["state"].values()
        self.tensors.append([*checkpoint["model"].values(), *(s["exp_avg"] for s in states)])
        if threading.current_thread() is not threading.main_thread():
            assert self.may_write.wait(60)
        try:
            write_checkpoint(path, checkpoint, stopped)
        finally:
            self.under_way -= 1

    def wait(self, saver):
        """Takes the place of Saver.wait."""
        self.may_write.set()
        wait(saver)
        self.may_write.clear()


write_checkpoint, wait = checkpoints.write_checkpoint, Saver.wait


@pytest.fixture
def writes(monkeypatch):
    """Writes that take until the run waits for them, or until the test sets `may_write`."""
    writes = Writes()
    monkeypatch.setattr(checkpoints, "write_checkpoint", writes.write_checkpoint)
    monkeypatch.setattr(Saver, "wait", lambda saver: writes.wait(saver))
    return writes


@pytest.fixture
def before_update(monkeypatch):
    """before_update(step, function): the function is called before the update of this step."""
    original, functions = train_gpt2.training_step, {}

    def training_step(run, step, *args):
        functions.pop(step, lambda: None)()
        return original(run, step, *args)

    monkeypatch.setattr(train_gpt2, "training_step", training_step)
    return functions.__setitem__


def test_the_state_of_its_step_is_written_although_training_goes_on(
        data_dir, tmp_path, writes, before_update):
    """Guards against a checkpoint that holds, in part, the weights of a later update."""
    config = tiny_config(data_dir, tmp_path / "a", save_every=3, ema=0.5, optimizer="muon",
                         dtype="float16", **OPTIONS)
    before_update(5, lambda: (writes.may_write.set(), writes.threads[0].join()))
    train(config)
    assert writes.steps == [3, 6] and threading.main_thread() not in writes.threads
    straight = replace(config, log_dir=str(tmp_path / "b"))
    before_update(3, lambda: (writes.may_write.set(), writes.threads[2].join()))
    train(straight)
    for name in ("model_00003.pt", "model_00006.pt"):
        expect_same_state(tmp_path / "a" / name, tmp_path / "b" / name)
        a, b = (torch.load(tmp_path / log / name, weights_only=True) for log in "ab")
        assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]  # lr
        assert all(torch.equal(average, b["ema"][key]) for key, average in a["ema"].items())


def test_a_second_save_waits_for_the_first_and_says_so(data_dir, tmp_path, writes, capsys):
    result = train(tiny_config(data_dir, tmp_path, save_every=2, **OPTIONS))
    out = capsys.readouterr().out
    said = [line.split(" in ")[0] for line in out.splitlines() if "waiting" in line
            or line.startswith("saved")]
    waiting = "step {}: waiting until the checkpoint before it is written"
    saved = f"saved {tmp_path}{os.sep}model_0000{{}}.pt"
    assert said == [waiting.format(4), saved.format(2), waiting.format(6), saved.format(4),
                    saved.format(6)]
    assert result["checkpoint"] == str(tmp_path / "model_00006.pt")
    assert out.count(", training paused 0.") == 3


def test_an_error_in_training_waits_for_the_file(data_dir, tmp_path, writes, before_update):
    def fail():
        raise RuntimeError("a bug")

    before_update(4, fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(tiny_config(data_dir, tmp_path, save_every=3, **OPTIONS))
    assert list(list_checkpoints(tmp_path)) == [3] and not list(tmp_path.glob("*.tmp"))


def test_a_run_that_diverges_names_the_file_that_was_being_written(
        data_dir, tmp_path, writes, monkeypatch):
    """Guards against a remedy that names an older checkpoint, or none, because a file is late."""
    numbers = (float("nan"), float("nan"), False, False, False)
    monkeypatch.setattr(train_gpt2, "training_step", lambda *args: numbers)
    with pytest.raises(UserError, match=r"model_00001\.pt with a"):
        train(tiny_config(data_dir, tmp_path, save_every=1, max_bad_steps=2, **OPTIONS))


def test_a_signal_waits_for_the_file_and_saves(data_dir, tmp_path, writes, before_update, capsys):
    before_update(4, lambda: signal.raise_signal(signal.SIGTERM))
    result = train(tiny_config(data_dir, tmp_path, save_every=3, **OPTIONS))
    assert result["stopped"] and result["checkpoint"] == str(tmp_path / "model_00005.pt")
    assert sorted(list_checkpoints(tmp_path)) == [3, 5]
    # nothing is gained by a copy if the process is about to end
    assert writes.threads[1] is threading.main_thread()


def test_a_second_ctrl_c_gives_the_file_up(data_dir, tmp_path, monkeypatch, before_update, capsys):
    """Guards against a process that goes on for seconds, and against a file that stays half."""
    begun, stopped = threading.Event(), []

    def save(checkpoint, file):
        file.write(b"half")
        begun.set()
        stopped.append(file.stopped.wait(60))
        file.write(b"the other half")

    def interrupt():
        assert begun.wait(60) and len(list(tmp_path.glob("*.tmp"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save)
    before_update(4, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(data_dir, tmp_path, save_every=3, **OPTIONS))
    assert stopped == [True] and not list(tmp_path.glob("model_*"))
    assert "is not saved" not in capsys.readouterr().out


def test_old_checkpoints_are_deleted_after_the_new_one_is_in_place(
        data_dir, tmp_path, writes, before_update):
    found = []
    before_update(5, lambda: found.extend(list_checkpoints(tmp_path)))
    train(tiny_config(data_dir, tmp_path, save_every=2, **OPTIONS | {"keep_last": 1}))
    assert found == [2] and list(list_checkpoints(tmp_path)) == [6]


def test_all_saves_use_the_same_memory_and_leave_none_behind(data_dir, tmp_path, writes):
    """Guards against memory that grows with every save, as the garbage collector is switched off"""
    gc.collect()
    gc.disable()
    try:
        train(tiny_config(data_dir, tmp_path, save_every=2, **OPTIONS))
        first, *others = [[t.data_ptr() for t in tensors] for tensors in writes.tensors]
        assert others == [first, first]
        left = [weakref.ref(t) for tensors in writes.tensors for t in tensors]
        writes.tensors.clear()
        assert not any(ref() is not None for ref in left)
    finally:
        gc.enable()


def run_out_of_memory(*args):
    """Takes the place of checkpoints.copy_to_host."""
    raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")


@pytest.mark.parametrize("name, function", [
    ("free_memory", lambda device: 500_000), ("copy_to_host", run_out_of_memory)])
def test_without_memory_for_a_copy_training_pauses_and_says_so_once(
        data_dir, tmp_path, writes, monkeypatch, capsys, name, function):
    monkeypatch.setattr(checkpoints, name, function)
    train(tiny_config(data_dir, tmp_path, save_every=2, **OPTIONS))
    out = capsys.readouterr().out
    assert out.count("training pauses while a checkpoint is written, because 0.00 GiB") == 1
    assert "training paused" not in out and out.count("saved ") == 3
    assert set(writes.threads) == {threading.main_thread()}


@pytest.mark.parametrize("free, pauses", [(None, False), (2.6e9, False), (2.4e9, True)])
def test_check_says_whether_saving_pauses_training(monkeypatch, free, pauses):
    monkeypatch.setattr(preflight, "free_memory", lambda device: free)
    line = preflight.describe_saving(10**9, training=1_250_000_000)
    assert line.startswith("saving: training pauses" if pauses else "saving: 0.93 GiB")


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority on Linux only")
def test_the_thread_that_writes_stands_back(data_dir, tmp_path, writes, before_update):
    """Guards against a write that takes a core away from training."""
    niceness = []
    before_update(4, lambda: niceness.extend(
        os.getpriority(os.PRIO_PROCESS, thread) for thread in (0, writes.threads[0].native_id)))
    train(tiny_config(data_dir, tmp_path, save_every=3, **OPTIONS))
    own, of_thread = niceness
    assert of_thread == min(own + checkpoints.NICENESS, 19)


def test_a_master_that_waits_for_its_file_is_not_lost(data_dir, tmp_path, writes, monkeypatch):
    """Guards against survivors that name the master, too, because its file takes long."""
    said = []
    monkeypatch.setattr(checkpoints, "say_alive", lambda: said.append(list(list_checkpoints(
        tmp_path))))
    numbers = (float("nan"), float("nan"), False, False, False)
    monkeypatch.setattr(train_gpt2, "training_step", lambda *args: numbers)
    with pytest.raises(UserError):
        train(tiny_config(data_dir, tmp_path, save_every=0, max_bad_steps=1, **OPTIONS))
    assert said == [[]]
    distributed.say_alive()  # alone
