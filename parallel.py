"""
How a model is spread over processes and compiled: DDP, FSDP, torch.compile, and what goes together.
"""

import os
import re
import signal
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP

from cli import UserError
from devices import autocast, sum_over_ranks


def check_combination(config, processes, dtype):
    """
    Which of compile, gradient checkpointing, DDP and FSDP go together (README has the table).
    Returns whether to compile; raises UserError for what does not work.
    """
    if sum_over_ranks([config.B], processes.device)[0] != config.B * processes.ddp_world_size:
        raise UserError("not all processes have the same B: give --B instead of --preset auto")
    # worth minutes of compiling on CUDA only; on a CPU it gains nothing
    use_compile = processes.device.type == "cuda" if config.compile is None else config.compile
    if config.optimizer == "muon" and use_compile and config.compile_mode != "default":
        raise UserError("--optimizer muon drops gradients that CUDA graphs want kept: use "
                        "--compile_mode default")
    if not config.fsdp:
        return use_compile
    if processes.ddp_world_size == 1:
        raise UserError("--fsdp shares a model out over processes: start with torchrun "
                        "--nproc_per_node=N, or leave it out")
    if config.compile:
        raise UserError("--fsdp gathers every block's weights between graphs, which a compiled "
                        "model cannot: leave out --compile or --fsdp")
    if config.optimizer != "adamw":
        raise UserError(f"--fsdp leaves a process a part of every matrix, and {config.optimizer} "
                        "needs them whole: use --optimizer adamw")
    if dtype == torch.float16:
        raise UserError("--fsdp with float16 would scale the loss differently on each process: "
                        "use --dtype bfloat16 or float32")
    return False


def shard(raw_model, processes):
    """Share parameters, gradients and optimizer state out over all processes, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    # named, or FSDP takes any accelerator there is, also for a run with --device cpu
    mesh = init_device_mesh(processes.device.type, (processes.ddp_world_size,))
    for block in raw_model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(raw_model, mesh=mesh)  # the embeddings and the last LayerNorm


def whole_copy(raw_model, device):
    """
    A model to evaluate and sample with: `raw_model` itself, or, if it is sharded, an ordinary copy
    on every process. The sharded one runs only with all processes in step; evaluation is not.
    """
    if not any(isinstance(p, dist.tensor.DTensor) for p in raw_model.parameters()):
        return raw_model
    copy = raw_model.empty(raw_model.config).to(device)
    with torch.no_grad():
        for ours, theirs in zip(copy.parameters(), raw_model.parameters(), strict=True):
            ours.copy_(theirs.full_tensor())
    return copy


def wrap(raw_model, config, processes, use_compile):
    """The model for the training step, whose shapes never change; raw_model keeps the weights."""
    if config.fsdp:
        return raw_model  # sharded already, before the optimizer took hold of its parameters
    model = raw_model
    if use_compile:
        mode = None if config.compile_mode == "default" else config.compile_mode
        model = torch.compile(raw_model, mode=mode)
        # DDP cuts a compiled graph at its buckets, to send some gradients while others are being
        # computed; a graph that recomputes activations cannot be cut
        torch._dynamo.config.optimize_ddp = not config.grad_checkpoint
    if processes.ddp_world_size > 1:
        device = processes.device
        model = DDP(model, device_ids=[device.index] if device.type == "cuda" else None)
    return model


def compile_or_fall_back(model, raw_model, batch, processes, dtype):
    """
    Run forward and backward of a batch (x, y), which compiles `model`, and drop the gradients.
    Where that fails on any process, all go on with `raw_model`, and one line says so. Returns the
    model to train.
    """
    failure = ""
    x, y = (t.to(processes.device) for t in batch)
    start = time.time()
    try:
        if isinstance(model, DDP):
            model.require_backward_grad_sync = False  # a process that fails keeps nobody waiting
        with autocast(processes.device, dtype):
            _, loss = model(x, y)
        loss.backward()
    except torch.cuda.OutOfMemoryError:
        raise  # would fail without compile too
    except Exception as error:  # no C compiler, no triton, a bug: torch raises many kinds
        failure = (str(error) or type(error).__name__).strip().splitlines()[0]
    raw_model.zero_grad(set_to_none=True)
    failures = sum_over_ranks([bool(failure)], processes.device)[0]
    if not failures:
        if processes.master_process:
            print(f"compiled in {time.time() - start:.1f}s")
        return model
    if processes.master_process:
        print(f"warning: training goes on uncompiled, since compiling failed on "
              f"{failures:.0f} process(es): {failure or 'see the other processes':.200}")
    elif failure:
        print(f"warning: rank {processes.ddp_rank}: compiling failed: {failure:.200}")
    if isinstance(model, DDP):
        model.module = raw_model
        return model
    return raw_model


def clip_grad_norm(raw_model, max_norm):
    """Scale the gradients down to a total norm of `max_norm` (0: do not); the norm before that."""
    norm = nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, dist.tensor.DTensor) else norm


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
