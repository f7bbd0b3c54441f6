"""Several processes: joining the process group, sums over ranks, naming a rank that died."""

import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from gpt2lab.cli import UserError
from gpt2lab.device import pick_device

# how long a process waits for the others before it gives up. A process that dies is noticed at once
# with gloo, and by torchrun; one that hangs, after this
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


class Ranks(NamedTuple):
    """This process among those that torchrun started; alone, the only one of one."""

    device: torch.device
    ddp_rank: int = 0
    ddp_world_size: int = 1

    @property
    def master_process(self):
        """Whether this is the process that prints and saves."""
        return self.ddp_rank == 0


def init_distributed(device_name):
    """Join the process group if torchrun started us; returns Processes. Raises UserError."""
    if "RANK" not in os.environ:
        return Ranks(pick_device(device_name))
    ddp_rank, ddp_local_rank, ddp_world_size = (
        int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = pick_device(device_name)
    if device.type == "mps":
        raise UserError("a Mac has one GPU: start without torchrun, or add --device cpu")
    if device.type == "cuda":
        if ddp_local_rank >= torch.cuda.device_count():
            raise UserError(f"process {ddp_local_rank} of this node has no GPU, torch sees "
                            f"{torch.cuda.device_count()}: lower --nproc_per_node")
        device = torch.device("cuda", ddp_local_rank)
        torch.cuda.set_device(device)
    if device.type == "cuda" and not dist.is_nccl_available() and os.name != "nt":
        raise UserError("this torch has no NCCL, which GPUs talk through: install a CUDA build of "
                        "torch, or add --device cpu")
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=fresh_store(), rank=ddp_rank, world_size=ddp_world_size,
                            timeout=COLLECTIVE_TIMEOUT)
    return Ranks(device, ddp_rank, ddp_world_size)


def fresh_store():
    """
    Where the processes of one node meet: torchrun's store, but not what those wrote into it that a
    restart replaces, or the new ones would look for the dead. None: as torch does it.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env["GROUP_WORLD_SIZE"] != "1":
        return None  # nodes count restarts each for itself
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"attempt_{env['TORCHELASTIC_RESTART_COUNT']}", store)


def sum_over_ranks(values, device):
    """Add lists of numbers over all processes, elementwise: gloo knows sums, but no averages."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total.tolist()


def on_master(ranks, function):
    """
    Call `function()` on the master only; every process returns its result (plain and small) or
    raises its UserError or OSError, so that none waits for a master that has given up.
    """
    box = [None, None]
    if ranks.master_process:
        try:
            box[0] = function()
        except (UserError, OSError) as error:
            box[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    if box[1]:
        raise UserError(box[1])
    return box[0]


def missing_ranks(wait_seconds=3.0):
    """
    Who no longer answers, as "rank 1" or "ranks 1, 3", after communication failed: all that are
    left sign up in the rendezvous store, which torchrun keeps outside of them.
    """
    world_size, missing = dist.get_world_size(), []
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"alive/{dist.get_rank()}", "1")
        time.sleep(wait_seconds)
        missing = [str(rank) for rank in range(world_size)
                   if not store.check([f"alive/{rank}"])]
    except (RuntimeError, ValueError):
        pass  # the store was on the node that died
    if not missing:
        return "another process"
    return ("rank " if len(missing) == 1 else "ranks ") + ", ".join(missing)


@contextmanager
def naming_lost_processes():
    """Turn the failure of communication in this block into a line that says who is gone, exit 1."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not dist.is_initialized() or not re.search("gloo|nccl|connection|timed out", said, re.I):
            raise
        # torchrun wants the others gone at once: not before the line is out
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        reason = said.splitlines()[0].split("] ", 1)[-1]  # without the place in gloo's source
        print(f"rank {dist.get_rank()}: error: lost {missing_ranks()} ({reason:.100}): start again "
              "with --resume (torchrun --max_restarts=3 does it by itself)",
              file=sys.stderr, flush=True)
        os._exit(1)  # a process group that lost somebody cannot be left in good order
