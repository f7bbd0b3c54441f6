"""
How a model is spread over processes and compiled: DDP, FSDP, torch.compile, and what goes together.
"""

import time

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gpt2lab.cli import UserError, first_line
from gpt2lab.device import autocast
from gpt2lab.distributed import sum_over_ranks


def resolve_compile(config, ranks, dtype):
    """
    Which of compile, gradient checkpointing, DDP and FSDP go together (README has the table).
    Returns whether to compile; raises UserError for what does not work.
    """
    if sum_over_ranks([config.B], ranks.device)[0] != config.B * ranks.ddp_world_size:
        raise UserError("not all processes have the same B: give --B instead of --preset auto")
    # worth minutes of compiling on CUDA only; on a CPU it gains nothing
    use_compile = ranks.device.type == "cuda" if config.compile is None else config.compile
    if config.optimizer == "muon" and use_compile and config.compile_mode != "default":
        raise UserError("--optimizer muon drops gradients that CUDA graphs want kept: use "
                        "--compile_mode default")
    if not config.fsdp:
        return use_compile
    if ranks.ddp_world_size == 1:
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


def shard(raw_model, ranks):
    """Share parameters, gradients and optimizer state out over all processes, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    # named, or FSDP takes any accelerator there is, also for a run with --device cpu
    mesh = init_device_mesh(ranks.device.type, (ranks.ddp_world_size,))
    for block in raw_model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(raw_model, mesh=mesh)  # the embeddings and the last LayerNorm


def unsharded_copy(raw_model, device):
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


def wrap(raw_model, config, ranks, use_compile):
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
    if ranks.ddp_world_size > 1:
        device = ranks.device
        model = DDP(model, device_ids=[device.index] if device.type == "cuda" else None)
    return model


def compile_or_fall_back(model, raw_model, batch, ranks, dtype):
    """
    Run forward and backward of a batch (x, y), which compiles `model`, and drop the gradients.
    Where that fails on any process, all go on with `raw_model`, and one line says so. Returns the
    model to train.
    """
    failure = ""
    x, y = (t.to(ranks.device) for t in batch)
    start = time.time()
    try:
        if isinstance(model, DDP):
            model.require_backward_grad_sync = False  # a process that fails keeps nobody waiting
        with autocast(ranks.device, dtype):
            _, loss = model(x, y)
        loss.backward()
    except torch.cuda.OutOfMemoryError:
        raise  # would fail without compile too
    except Exception as error:  # no C compiler, no triton, a bug: torch raises many kinds
        failure = first_line(error)
    raw_model.zero_grad(set_to_none=True)
    failures = sum_over_ranks([bool(failure)], ranks.device)[0]
    if not failures:
        if ranks.master_process:
            print(f"compiled in {time.time() - start:.1f}s")
        return model
    if ranks.master_process:
        print(f"warning: training goes on uncompiled, since compiling failed on "
              f"{failures:.0f} process(es): {failure or 'see the other processes':.200}")
    elif failure:
        print(f"warning: rank {ranks.ddp_rank}: compiling failed: {failure:.200}")
    if isinstance(model, DDP):
        model.module = raw_model
        return model
    return raw_model


def clip_grad_norm(raw_model, max_norm):
    """Scale the gradients down to a total norm of `max_norm` (0: do not); the norm before that."""
    norm = nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, dist.tensor.DTensor) else norm


