"""
How a model is spread over processes and compiled: FSDP, an unsharded copy, torch.compile with a
fallback, and which options go together.
"""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gpt2lab import kernels
from gpt2lab.cli import UserError, first_line
from gpt2lab.device import autocast, free_cache
from gpt2lab.distributed import Ranks, sum_over_ranks

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # of torch.compile


def resolve_compile(config, ranks: Ranks, dtype: torch.dtype) -> bool:
    """
    Whether to compile the training step of a TrainConfig. By default it is compiled on CUDA only,
    because on a CPU compiling takes minutes and gains nothing. Raises UserError for options that do
    not go together: docs/processes.md has the table.
    """
    if sum_over_ranks([config.B], ranks.device)[0] != config.B * ranks.ddp_world_size:
        raise UserError("not all processes have the same B: give --B instead of --preset auto")
    use_compile = ranks.device.type == "cuda" if config.compile is None else config.compile
    if config.optimizer == "muon" and use_compile and config.compile_mode != "default":
        raise UserError("--optimizer muon drops gradients, but CUDA graphs need the gradients kept "
                        "in the same memory: use --compile_mode default")
    if not config.fsdp:
        return use_compile
    if ranks.ddp_world_size == 1:
        raise UserError("--fsdp shares a model out over processes: start with torchrun "
                        "--nproc_per_node=N, or leave --fsdp out")
    if config.compile:
        raise UserError("--fsdp gathers the weights of a block before the block runs, which a "
                        "compiled model cannot do: leave out --compile or --fsdp")
    if config.optimizer != "adamw":
        raise UserError(f"--fsdp leaves each process a part of every matrix, but {config.optimizer}"
                        " needs whole matrices: use --optimizer adamw")
    if dtype == torch.float16:
        raise UserError("--fsdp with float16 would scale the loss differently on each process: "
                        "use --dtype bfloat16 or float32")
    return False


def apply_fsdp(models: list[nn.Module], ranks: Ranks, dtype: torch.dtype) -> None:
    """
    Shard parameters, gradients and optimizer state of GPTs over all ranks, block by block, in
    place. `dtype` is that of autocast.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    # without a mesh, FSDP would take any accelerator that it finds, even with --device cpu
    mesh = init_device_mesh(ranks.device.type, (ranks.ddp_world_size,))
    # the matrices of a block are sent in the dtype in which autocast multiplies with them, and
    # gradients are added in float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    # linear layers return views, which torch forbids to change in place. Block never does
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for raw_model in models:
        for block in raw_model.transformer.h:
            fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy)
        fully_shard(raw_model, mesh=mesh)  # embeddings and LayerNorms, which stay in float32


def unsharded_copy(raw_model: nn.Module, device: torch.device) -> nn.Module:
    """
    `raw_model` itself if it is not sharded, else an ordinary copy of it on every rank. A sharded
    model runs only if all ranks run it in step, and evaluation does not.
    """
    from torch.distributed.tensor import DTensor
    if not any(isinstance(p, DTensor) for p in raw_model.parameters()):
        return raw_model
    copy = raw_model.empty(raw_model.config).to(device)
    kernels.optimize(copy)
    with torch.no_grad():
        for whole, sharded in zip(copy.parameters(), raw_model.parameters(), strict=True):
            whole.copy_(sharded.full_tensor())
    return copy


@contextmanager
def evaluation_model(raw_model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """
    The model to evaluate and sample with, uncompiled and unsharded. Its weights must not change
    here. Cached memory is returned to the device before and after, because evaluation needs tensors
    of other shapes than training.
    """
    free_cache(device)
    model = unsharded_copy(raw_model, device)
    try:
        with kernels.kept_casts():
            yield model
    finally:
        if model is not raw_model:
            model.to("meta")  # frees the copy, although the caller still has a name for it
        free_cache(device)


def uses_cuda_graphs(config, device: torch.device) -> bool:
    """Whether the compiled training step of a TrainConfig replays CUDA graphs."""
    compiled = config.compile is not False and not config.fsdp
    return compiled and device.type == "cuda" and config.compile_mode != "default"


def try_pass(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], device: torch.device,
             dtype: torch.dtype) -> None:
    """One forward and backward pass over a batch (x, y), as in training_step."""
    x, y = (t.to(device) for t in batch)
    torch.compiler.cudagraph_mark_step_begin()
    with autocast(device, dtype):
        _, loss = model(x, y)
    loss.backward()


def compile_or_fall_back(
        model: nn.Module, raw_model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor],
        config, ranks: Ranks, dtype: torch.dtype) -> nn.Module:
    """
    The model to train: `model`, compiled by forward and backward passes over a batch (x, y), or
    the uncompiled `raw_model` if compiling failed on any rank. Prints one line that says which.
    The gradients are dropped; with CUDA graphs they are kept, and are zero.
    """
    failure, start = "", time.perf_counter()
    cuda_graphs = uses_cuda_graphs(config, ranks.device)
    if cuda_graphs:
        for p in raw_model.parameters():
            p.grad = torch.zeros_like(p)  # the graphs read and write this memory in every update
    if isinstance(model, DDP):
        model.require_backward_grad_sync = False  # so that no rank waits for one that failed
    if config.compile_mode == "max-autotune":
        from torch._inductor import select_algorithm
        select_algorithm.PRINT_AUTOTUNE = False  # it prints hundreds of lines, on every rank
    try:
        # CUDA graphs are recorded in the second pass and replayed in the third
        for _ in range(3 if cuda_graphs else 1):
            try_pass(model, batch, ranks.device, dtype)
    except torch.cuda.OutOfMemoryError:
        raise  # the uncompiled model would run out of memory, too
    except Exception as error:  # no C compiler, no Triton, a bug: torch raises many types
        failure = first_line(error)
    raw_model.zero_grad(set_to_none=not cuda_graphs)
    failures = sum_over_ranks([bool(failure)], ranks.device)[0]
    if not failures:
        ranks.print0(f"compiled in {time.perf_counter() - start:.1f}s")
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


def clip_grad_norm(raw_model: nn.Module, max_norm: float) -> torch.Tensor:
    """
    Scale the gradients down to a total norm of `max_norm`; 0 leaves them as they are. Returns the
    norm before scaling, a scalar.
    """
    from torch.distributed.tensor import DTensor
    norm = nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
