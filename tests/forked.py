"""
Runs training jobs in forked processes, one job after the other. torch is imported once, so that
dozens of runs can start, communicate and be killed in seconds.

    python tests/forked.py JOBS.json        # prints a JSON list: each job's exit codes, one a rank

JOBS.json is a list of Jobs as dicts. conftest.run_jobs writes it. A process that has computed
gradients cannot fork, so pytest cannot do this itself.
"""

import faulthandler
import gc
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint.state_dict  # or every child would import it

import train_gpt2
from gpt2lab import checkpoints
from gpt2lab.checkpoints import list_checkpoints
from gpt2lab.cli import UserError


@dataclass
class Job:
    """A run of train_gpt2.train, and what happens to it."""

    config: train_gpt2.TrainConfig
    world_size: int = 1  # number of processes
    # SIGKILL the run this many times at random moments and resume it each time, before the run that
    # may end. Only for one process
    kills: int = 0
    # SIGKILL the run once before that, while the checkpoint of this step is half written and
    # training goes on, and resume it
    killed_in_write: int | None = None
    # send SIGTERM to this rank as soon as there is a checkpoint of 5 updates or more
    sigterm_rank: int | None = None
    # on this rank, the losses of the updates `nan_steps` are NaN
    nan_rank: int | None = None
    nan_steps: list[int] | None = None
    # on this rank, the first call of a compiled model raises an error. The other ranks do not
    # compile either, but succeed
    no_compiler_rank: int | None = None
    # a checkpoint is written after the next update, or when the run waits for it
    late_writes: bool = False
    output_file: str = ""  # receives the stdout and stderr of all ranks


def start_rank(job, rank, port):
    """Fork a process that trains as one rank of a job; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    exit_code = 1
    try:
        output = os.open(job.output_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.enable()  # says where a signal such as SIGABRT came from
        if job.world_size > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                              WORLD_SIZE=str(job.world_size), MASTER_PORT=str(port))
        if rank == job.nan_rank:
            make_losses_nan(job.nan_steps)
        if job.killed_in_write:
            die_while_writing(job.killed_in_write)
        if job.late_writes:
            delay_writes()
        if job.no_compiler_rank is not None:
            torch.compile = lambda model, mode: (
                NoCompiler(model) if rank == job.no_compiler_rank else model)
        train_gpt2.train(job.config)
        exit_code = 0
    except UserError as error:
        print(error, file=sys.stderr)
        exit_code = 2
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(exit_code)  # an ordinary exit would run what the parent has registered


class NoCompiler(torch.nn.Module):
    """A compiled model on a machine where nothing can compile it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        raise RuntimeError("no working C++ compiler")


def make_losses_nan(steps):
    """From now on, make the losses of these updates NaN in this process."""
    original = train_gpt2.training_step

    def training_step(run, step, batches, signals):
        if step not in steps:
            return original(run, step, batches, signals)
        hook = run.raw_model.transformer.ln_f.register_forward_hook(
            lambda module, args, output: output * float("nan"))
        result = original(run, step, batches, signals)
        hook.remove()
        return result

    train_gpt2.training_step = training_step


def die_while_writing(killed_in):
    """From now on, SIGKILL this process an update after the checkpoint of a step is half written"""
    original_save, original_step = torch.save, train_gpt2.training_step
    half_written = threading.Event()

    def save(checkpoint, file):
        if checkpoint["step"] == killed_in:
            file.write(b"half")
            file.flush()
            half_written.set()
            threading.Event().wait()
        original_save(checkpoint, file)

    def training_step(run, step, *args):
        result = original_step(run, step, *args)
        if step == killed_in:
            half_written.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    torch.save, train_gpt2.training_step = save, training_step


def delay_writes():
    """From now on, write a checkpoint after the next update, or when the run waits for it."""
    original_write, original_wait = checkpoints.write_checkpoint, checkpoints.Saver.wait
    original_step, may_write = train_gpt2.training_step, threading.Event()

    def write_checkpoint(*args):
        may_write.wait()
        original_write(*args)

    def training_step(*args):
        result = original_step(*args)
        may_write.set()
        return result

    def wait(saver):
        may_write.set()
        original_wait(saver)
        may_write.clear()

    checkpoints.write_checkpoint, checkpoints.Saver.wait = write_checkpoint, wait
    train_gpt2.training_step = training_step


def wait_for_step(log_dir, step):
    """Wait until there is a checkpoint of `step` updates or more."""
    while max(list_checkpoints(log_dir), default=0) < step:
        time.sleep(0.002)


def kill_and_resume(job):
    """Start a job as often as it is to be killed, and kill it each time at a random moment."""
    rng, log_dir = random.Random(0), job.config.log_dir
    if job.killed_in_write:
        pid = start_rank(job, 0, None)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the run ended before it was killed"
        assert len(list(Path(log_dir).glob("model_*.tmp"))) == 1
        job.killed_in_write, job.config.resume = None, "newest"
    for number in range(job.kills):
        pid = start_rank(job, 0, None)
        before = max(list_checkpoints(log_dir), default=0)
        wait_for_step(log_dir, before + rng.randrange(6 if number else 1))
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the run ended before it was killed"
        job.config.resume = "newest"


def find_free_port():
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_job(job):
    """Run a job to its end; returns the exit code of each rank."""
    kill_and_resume(job)
    port = find_free_port()
    pids = [start_rank(job, rank, port) for rank in range(job.world_size)]
    if job.sigterm_rank is not None:
        wait_for_step(job.config.log_dir, 5)
        os.kill(pids[job.sigterm_rank], signal.SIGTERM)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def read_jobs(path):
    """The Jobs of a file that conftest.run_jobs wrote."""
    jobs = [Job(**values) for values in json.loads(Path(path).read_text(encoding="utf-8"))]
    for job in jobs:
        job.config = train_gpt2.TrainConfig(**job.config)
    return jobs


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # or every child would copy all memory to look for garbage in it
    print(json.dumps([run_job(job) for job in read_jobs(sys.argv[1])]))
