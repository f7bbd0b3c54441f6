"""
Several processes: joining the process group, sums over ranks, and naming a rank that died.

torchrun starts the processes and tells each its rank in the environment. Without torchrun there is
one process, and every function here does the obvious thing for it.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from gpt2lab.cli import SaidByMaster, UserError, env_int, env_ranks, explain, first_line
from gpt2lab.device import limit_threads, pick_device

# how long a rank waits for the others before it gives up. gloo and torchrun notice at once when a
# process dies; only a process that hangs is waited for this long
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# how long after SIGTERM a rank may wait for its device before it looks for ranks that died.
# torchrun kills it after 30 seconds
BLOCKED_SECONDS = 15.0
BLOCKING_BACKENDS = ("nccl",)  # whose collectives wait for ever for a rank that died


class Ranks(NamedTuple):
    """This process among those that torchrun started: its device, its rank and their number."""

    device: torch.device
    ddp_rank: int = 0
    ddp_world_size: int = 1

    @property
    def master_process(self) -> bool:
        """Whether this is the process that prints and saves."""
        return self.ddp_rank == 0

    def print0(self, *args) -> None:
        """Print on the master only. Lines of several threads do not mix."""
        if self.master_process:  # print itself would write the line's end separately
            sys.stdout.write(" ".join(map(str, args)) + "\n")
            sys.stdout.flush()


def init_distributed(device_name: str, need_kernels: bool = True) -> Ranks:
    """
    Join the process group if the environment says that there are several processes. Raises
    UserError. One process also gets a GPU for which torch has no kernels, if not `need_kernels`.
    """
    ddp_rank, ddp_local_rank, ddp_world_size = env_ranks()
    limit_threads(verbose=ddp_rank == 0)
    device = pick_device(device_name, need_kernels or ddp_world_size > 1)  # NCCL needs kernels
    if ddp_world_size == 1:
        return Ranks(device)
    if device.type == "mps":
        raise UserError("a Mac has one GPU: start without torchrun, or add --device cpu")
    if device.type == "cuda":
        if ddp_local_rank >= torch.cuda.device_count():
            raise UserError(f"process {ddp_local_rank} of this node has no GPU, torch sees "
                            f"{torch.cuda.device_count()}: lower --nproc_per_node")
        device = torch.device("cuda", ddp_local_rank)
        torch.cuda.set_device(device)
    if device.type == "cuda" and not dist.is_nccl_available() and os.name != "nt":
        raise UserError("this torch lacks NCCL, which GPUs need to communicate: install a CUDA "
                        "build of torch, or add --device cpu")
    if dist.is_initialized():
        return Ranks(device, ddp_rank, ddp_world_size)
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    address, port = os.environ.get("MASTER_ADDR"), env_int("MASTER_PORT", 0)
    if not address or not port:
        raise UserError(f"the environment variable WORLD_SIZE is {ddp_world_size}, but MASTER_ADDR "
                        "or MASTER_PORT is not set: unset WORLD_SIZE, or start with torchrun")
    try:
        dist.init_process_group(backend, store=fresh_store(), rank=ddp_rank,
                                world_size=ddp_world_size, timeout=COLLECTIVE_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the other processes at {address} port {port} "
                        f"({first_line(error):.200}): check MASTER_ADDR and MASTER_PORT") from error
    return Ranks(device, ddp_rank, ddp_world_size)


def leave_distributed() -> None:
    """Leave the process group, if init_distributed has joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fresh_store() -> dist.Store | None:
    """
    The rendezvous store for a single-node torchrun job, with a prefix for each restart. Without the
    prefix, restarted processes would find the addresses of the dead ones. None for several nodes,
    because each node counts its own restarts: torch then uses its default store.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env["GROUP_WORLD_SIZE"] != "1":
        return None
    # torch for Windows is built without libuv. torch's default store takes this into account
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False,
                          use_libuv=os.name != "nt")
    return dist.PrefixStore(f"attempt_{env['TORCHELASTIC_RESTART_COUNT']}", store)


def add_over_ranks(
        values: Sequence[float | torch.Tensor], device: torch.device) -> torch.Tensor:
    """
    The elementwise sum over all ranks of a list of numbers and of scalars on the device. The sums
    are one tensor (len(values)) on the device, for which this function does not wait. Callers
    divide by the world size where they want a mean, because gloo can add but not average.
    """
    dtype = torch.float64 if dist.is_initialized() else torch.float32  # MPS has no float64
    total = torch.tensor([0.0 if isinstance(value, torch.Tensor) else value for value in values],
                         dtype=dtype)
    if device.type == "cuda":
        total = total.pin_memory()  # a copy from other memory would wait for the device
    total = total.to(device, non_blocking=True)
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            total[i] = value
    if dist.is_initialized():
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """The elementwise sum of a list of numbers over all ranks."""
    if not dist.is_initialized():
        return list(values)
    return add_over_ranks(values, device).tolist()


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Every rank gets the same answer."""
    return sum_over_ranks([flag], device)[0] > 0


def on_master(ranks: Ranks, function: Callable[[], Any]) -> Any:
    """
    Call `function()` on the master only. Every rank returns its result, which must be small and
    plain, or raises its UserError or OSError, so that no rank waits for a master that gave up.
    """
    result, error_message = None, None
    if ranks.master_process:
        try:
            result = function()
        except (UserError, OSError) as error:
            error_message = explain(error)
    if dist.is_initialized():
        box = [result, error_message]
        dist.broadcast_object_list(box, src=0)
        result, error_message = box
    if error_message:
        raise UserError(error_message) if ranks.master_process else SaidByMaster(error_message)
    return result


# -----------------------------------------------------------------------------
# a rank that died


def say_alive() -> None:
    """Tell the other ranks' find_missing_ranks that this rank lives, although it is busy."""
    if dist.is_initialized():
        with suppress(RuntimeError, ValueError):  # the store may be gone
            dist.distributed_c10d._get_default_store().set(f"alive/{dist.get_rank()}", "1")


def find_missing_ranks(wait_seconds: float) -> list[str] | None:
    """
    The numbers of the ranks that died. Every survivor calls this function, which sets a key in
    torchrun's store. A rank whose key is missing after `wait_seconds` is gone. None if the store
    does not answer, because it was on the node that died.
    """
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"alive/{dist.get_rank()}", "1")
        time.sleep(wait_seconds)
        return [str(rank) for rank in range(dist.get_world_size())
                if not store.check([f"alive/{rank}"])]
    except (RuntimeError, ValueError):
        return None


def exit_for_lost_ranks(missing: list[str] | None, reason: str) -> NoReturn:
    """Print one line that names the ranks that find_missing_ranks has found, and exit with 1."""
    names = "another process"
    if missing:
        names = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(missing)
    print(f"rank {dist.get_rank()}: error: lost {names} ({reason:.100}): start again with --resume "
          "(torchrun --max_restarts=3 does it by itself)", file=sys.stderr, flush=True)
    os._exit(1)  # an ordinary exit would wait for the process group that lost a rank


def watch_for_lost_ranks(terminated: bool, is_blocked: Callable[[], bool]) -> None:
    """
    The `watch` of Signals. After SIGTERM, ask all ranks for an answer. If some do not answer within
    BLOCKED_SECONDS, and the main thread is still blocked, name these ranks and exit. Before
    SIGTERM, answer if another rank asks: a signal may reach one rank only.

    A collective of NCCL does not fail when a rank dies. It never ends, and the main thread waits
    for the GPU, so that it neither notices SIGTERM nor raises an error. torchrun sends SIGTERM to
    the survivors at once, and kills them 30 seconds later. gloo raises an error by itself.
    """
    if not dist.is_initialized() or dist.get_backend() not in BLOCKING_BACKENDS:
        return
    with suppress(RuntimeError, ValueError):  # the store may be gone, or the run at its end
        store = dist.distributed_c10d._get_default_store()
        if terminated:
            store.set("who is alive", "1")
        elif store.check(["who is alive"]):
            store.set(f"alive/{dist.get_rank()}", "1")
    if terminated:
        missing = find_missing_ranks(BLOCKED_SECONDS)
        if missing != [] and is_blocked():
            exit_for_lost_ranks(missing, "it ended, and a collective waits for it")


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """If a collective fails in this block, print one line that names the lost ranks, exit 1."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        failed_collective = re.search("gloo|nccl|connection|timed out", message, re.I)
        if not dist.is_initialized() or not failed_collective:
            raise
        # torchrun sends SIGTERM to the survivors at once. Ignore it until the line is printed
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        reason = message.splitlines()[0].split("] ", 1)[-1]  # without the line of gloo's source
        exit_for_lost_ranks(find_missing_ranks(wait_seconds=3), reason)
