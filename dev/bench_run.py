"""
The benchmarks `loop` and `save`: what a training run does besides forward and backward, with GPT-2
124M on the CPU in float32.

    python -m dev.bench loop
    python -m dev.bench save
"""

import functools
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

import train_gpt2
from dev.measure import english_texts, peak_mb
from gpt2lab import checkpoints, kernels, shards
from gpt2lab.device import prefetch
from gpt2lab.signals import Signals
from gpt2lab.tokenizer import Tokenizer


class Stopwatch:
    """Adds up the seconds that are spent in the functions that it wraps."""

    def __init__(self):
        self.seconds = 0.0

    def wrap(self, function):
        """A function that does the same and is timed."""
        def timed(*args):
            start = time.perf_counter()
            result = function(*args)
            self.seconds += time.perf_counter() - start
            return result
        return timed


def time_training_steps(run, num_updates):
    """
    (seconds of the last update, share of each update's time that is spent outside of forward and
    backward). The first update is left out, because it allocates memory.
    """
    stopwatch, shares = Stopwatch(), []
    original_backward = torch.Tensor.backward
    run.model = stopwatch.wrap(run.model)
    torch.Tensor.backward = stopwatch.wrap(original_backward)
    batches = prefetch(run.train_loader.batches(0), run.ranks.device)
    try:
        for step in range(num_updates + 1):
            stopwatch.seconds, start = 0.0, time.perf_counter()
            loss, norm, *_ = train_gpt2.training_step(run, step, batches, Signals())
            run.log(step, train=loss, lr=train_gpt2.get_lr(step, run.config), norm=norm)
            seconds = time.perf_counter() - start
            shares.append(1 - stopwatch.seconds / seconds)
    finally:
        torch.Tensor.backward = original_backward
        batches.close()
    return seconds, shares[1:]


def set_up_124m(folder, total_batch_size):
    """A Run that trains GPT-2 124M from scratch with B=4 and T=128; its files are in `folder`."""
    tokens = Tokenizer("gpt2").encode("\n".join(english_texts())[:4_000_000])
    for index, split in enumerate(shards.SPLITS):
        np.save(Path(folder) / shards.shard_name(split, index), np.uint16(tokens))
    run, _, _ = train_gpt2.setup(train_gpt2.TrainConfig(
        data_dir=folder, log_dir=folder, B=4, T=128, total_batch_size=total_batch_size,
        hellaswag_every=0, keep_last=1, device="cpu", dtype="float32"))
    return run


def bench_loop(num_updates=4):
    """
    The share of a 124M update that is not forward or backward: loader, optimizer, log, and asking
    all ranks whether to stop.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = set_up_124m(folder, total_batch_size=2048)
        seconds, shares = time_training_steps(run, num_updates)
    share = statistics.median(shares)
    print(f"an update of 2,048 tokens takes {seconds:.1f} s, {share:.1%} of it outside of forward "
          f"and backward")
    return {"share": share, "all": shares}


def time_saves(run, saver, may_write, num_saves, num_updates):
    """
    Seconds of saves that return while the thread writes; of saves in the foreground; and of updates
    while the thread writes (True) and while it is held up (False), which take turns.
    """
    batches = prefetch(run.train_loader.batches(0), run.ranks.device)
    pauses, foreground, updates = [], [], {False: [], True: []}

    def update():
        train_gpt2.training_step(run, 0, batches, Signals())

    update()  # a thread fetches the memory for the copy after it
    for step in range(num_saves):
        update()
        pauses.append(seconds_of(functools.partial(saver.save, step)))
        for writes in [False, True] * num_updates:
            (may_write.set if writes else may_write.clear)()
            seconds = seconds_of(update)
            updates[writes] += [seconds] if saver.writing else []
        may_write.set()
        saver.wait()
        foreground.append(seconds_of(functools.partial(saver.save, step, wait=True)))
    batches.close()
    return pauses, foreground, updates


def bench_save(num_saves=3, num_updates=5):
    """
    How long saving 124M stops training, in the background and in the foreground, and how much
    longer an update of 512 tokens takes while the thread writes than while it is held up.
    """
    kernels.tune_malloc()
    may_write, write = threading.Event(), checkpoints.StoppableFile.write
    checkpoints.StoppableFile.write = lambda *args: may_write.wait() and write(*args)
    with tempfile.TemporaryDirectory() as folder:
        run = set_up_124m(folder, total_batch_size=512)
        with checkpoints.Saver(run, None) as saver:
            pauses, foreground, updates = time_saves(
                run, saver, may_write, num_saves, num_updates)
    checkpoints.StoppableFile.write = write
    alone, meanwhile = (statistics.median(updates[writes]) for writes in (False, True))
    result = {"pauses": pauses, "foreground": statistics.median(foreground),
              "slowdown": meanwhile / alone - 1, "updates": updates, "mb": peak_mb()}
    print(f"a save stops training for {statistics.median(pauses):.2f} s (the first for "
          f"{pauses[0]:.2f} s), in the foreground for {result['foreground']:.1f} s; an update of "
          f"{alone:.2f} s takes {result['slowdown']:+.1%} of time during a write")
    return result


def seconds_of(function):
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
