"""
Trains in forked processes, one job after the other: torch is imported once, so that dozens of runs
can start, talk to each other and be killed in seconds. A parent that has computed gradients cannot
fork, hence a script of its own: python tests/forked.py JOBS.json prints a JSON line for each job.
"""

import gc
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed.checkpoint.state_dict  # or every child would import it

import train_gpt2
from gpt2lab.checkpoints import list_checkpoints
from gpt2lab.cli import UserError


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(job, rank, port):
    """Fork a process that trains as one rank of a job; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if job.get("world_size", 1) > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                              WORLD_SIZE=str(job["world_size"]), MASTER_PORT=str(port))
        if rank == job.get("nan_rank"):
            poison(job["nan_steps"])
        if "no_compiler_rank" in job:
            torch.compile = lambda model, mode: (
                NoCompiler(model) if rank == job["no_compiler_rank"] else model)
        os.dup2(os.open(job["stdout"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        train_gpt2.train(train_gpt2.TrainConfig(**job["config"]))
        sys.stdout.flush()
        code = 0
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        code = 2
    finally:
        os._exit(code)


class NoCompiler(torch.nn.Module):
    """A compiled model where nothing can compile it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        raise RuntimeError("no working C++ compiler")


def poison(steps):
    """Make the loss of these updates NaN, in this process alone."""
    update = train_gpt2.update

    def poisoned(run, step, batches, signals):
        handle = run.raw_model.transformer.ln_f.register_forward_hook(
            lambda module, args, output: output * float("nan")) if step in steps else None
        result = update(run, step, batches, signals)
        if handle:
            handle.remove()
        return result

    train_gpt2.update = poisoned


def wait_for_step(log_dir, step):
    """Wait until a checkpoint of `step` updates or more is there."""
    while max(list_checkpoints(log_dir), default=0) < step:
        time.sleep(0.002)


def run(job):
    """Run a job to its end; a job with "kills" is killed that often at random moments, resumed."""
    rng, log_dir = random.Random(0), job["config"]["log_dir"]
    for kill in range(job.get("kills", 0)):
        pid = start(job, 0, None)
        before = max(list_checkpoints(log_dir), default=0)
        wait_for_step(log_dir, before + rng.randrange(6 if kill else 1))
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it was not the kill that ended it"
        job["config"]["resume"] = "newest"
    port = free_port()
    pids = [start(job, rank, port) for rank in range(job.get("world_size", 1))]
    if "signal_rank" in job:
        wait_for_step(log_dir, 5)
        os.kill(pids[job["signal_rank"]], signal.SIGTERM)
    return {"codes": [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # or every child would copy all memory to look for garbage in it
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(json.dumps(run(job)), flush=True)
