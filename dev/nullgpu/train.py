"""
Train with train_gpt2.py on a null GPU, and count what the GPU was asked for in each update.

    dev/nullgpu/run python -m dev.nullgpu.train FLAGS               # the flags of train_gpt2.py
    NULL_DEVICES=2 dev/nullgpu/run torchrun --nproc_per_node=2 -m dev.nullgpu.train FLAGS

Each update prints a line "counted N {...}" with a JSON object: the counters of dev/nullgpu from the
beginning of update N to the beginning of the next one, so that evaluation and checkpoints in
between are included, and torch's peak of allocated memory so far. The processes of a run
communicate by gloo, because the null GPU does not imitate NCCL.
"""

import ctypes
import json

import torch
import torch.distributed as dist

import train_gpt2
from gpt2lab import cli, optim

STATES = ("rank", "allocated_bytes", "peak_allocated_bytes")  # counters that do not count events


def read_counters() -> dict:
    """The counters of this process. Raises UserError without a null GPU."""
    try:
        statistics = ctypes.CDLL(None).null_statistics
    except AttributeError:
        raise cli.UserError("there is no null GPU: start with dev/nullgpu/run") from None
    statistics.restype = ctypes.c_char_p
    return json.loads(statistics())


def count_updates() -> None:
    """Make train_gpt2.training_step print what has happened since it was called last."""
    run_update, previous = train_gpt2.training_step, []  # previous: [(step, counters)]

    def training_step(run, step, *args, **kwargs):
        now = read_counters()
        if previous:
            last_step, before = previous.pop()
            counted = {name: now[name] - before[name] for name in now if name not in STATES}
            counted |= {"rank": now["rank"], "peak_bytes": torch.cuda.max_memory_allocated()}
            print(f"counted {last_step} {json.dumps(counted)}", flush=True)
        previous.append((step, now))
        return run_update(run, step, *args, **kwargs)

    train_gpt2.training_step = training_step


def use_gloo() -> None:
    """Make torch.distributed communicate by gloo, whatever it is told."""
    init_process_group = dist.init_process_group

    def init_with_gloo(backend=None, **options):
        init_process_group("gloo", **options)

    dist.init_process_group = init_with_gloo


def call_updates_finite() -> None:
    """Make every update a step of the optimizer, also where the host asks whether it is finite."""
    step_if = optim.step_if

    def step(finite, optimizer, scaler):
        if scaler.is_enabled() or type(optimizer) is not torch.optim.AdamW:
            # a number from the host comes back as it is, because no kernel is launched in between
            finite = torch.tensor(True, device=finite.device)
        step_if(finite, optimizer, scaler)

    optim.step_if = step


def imitate_the_rest() -> None:
    """Change what keeps train_gpt2.py from a whole run on a null GPU: NCCL and numbers."""
    use_gloo()
    call_updates_finite()


def main() -> None:
    """The command line: that of train_gpt2.py."""
    read_counters()  # fails at once where there is no null GPU
    imitate_the_rest()
    count_updates()
    train_gpt2.main()


if __name__ == "__main__":
    cli.run_main(main, output_may_be_lost=True)
