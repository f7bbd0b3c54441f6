"""
Checkpoints: how a run is saved, found again and continued.

model_{step}.pt holds tensors and plain values only: the weights, the optimizer's state, the float16
loss scale, and what the run is made of. It is written under a temporary name, put on the disk and
renamed, so that whatever happens leaves no half file.
"""

import os
import re
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from gpt2lab.cli import UserError, first_line
from gpt2lab.distributed import on_master, sum_over_ranks
from gpt2lab.files import write_atomically

CHECKPOINT_NAME = re.compile(r"model_(\d+)\.pt")


# -----------------------------------------------------------------------------
# writing


def save_checkpoint(log_dir, step, raw_model, optimizer, scaler, extra):
    """
    Write model_{step}.pt on the master; every process calls it, since a sharded model has to be
    gathered. Returns its path on the master, None elsewhere. Raises OSError if it cannot be
    written; the older checkpoints are not touched then.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    # whole tensors on the CPU of rank 0, named like the parameters of the raw model: no "module."
    # or "_orig_mod." before them, and no trace of how many processes there were
    options = StateDictOptions(full_state_dict=True, cpu_offload=dist.is_initialized())
    model_state, optimizer_state = get_state_dict(raw_model, optimizer, options=options)
    if dist.is_initialized() and dist.get_rank() > 0:
        return None
    checkpoint = {"step": step, "model": model_state, "optimizer": optimizer_state,
                  "model_config": asdict(raw_model.config), "scaler": scaler.state_dict(), **extra}
    path = Path(log_dir) / f"model_{step:05d}.pt"
    try:
        write_atomically(path, lambda file: torch.save(checkpoint, file))
    except RuntimeError as error:  # torch's writer stumbles over the write that failed
        raise OSError(error.__context__ or error) from error
    return path


def prune_checkpoints(log_dir, keep_last, keep_every):
    """Delete all but the newest `keep_last` checkpoints and the multiples of `keep_every` steps."""
    steps = list_checkpoints(log_dir)
    for step in sorted(steps)[:-keep_last] if keep_last else ():
        if not keep_every or step % keep_every:
            steps[step].unlink()


# -----------------------------------------------------------------------------
# reading


class PickledConfig:
    """Stands in for the GPTConfig that build-nanogpt pickles into its checkpoints."""


# the names that class may go by; weights_only refuses every other one
FOREIGN_CONFIGS = [(PickledConfig, f"{module}.GPTConfig")
                   for module in ("__main__", "train_gpt2", "model")]


def list_checkpoints(log_dir):
    """{step: path} of the model_{step}.pt in a folder."""
    folder = Path(log_dir)
    found = folder.iterdir() if folder.is_dir() else ()
    return {int(m.group(1)): p for p in found if (m := CHECKPOINT_NAME.fullmatch(p.name))}


def find_checkpoint(log_dir):
    """Path of the newest model_{step}.pt in a log folder, or None."""
    steps = list_checkpoints(log_dir)
    return steps[max(steps)] if steps else None


def load_checkpoint(path, mmap=True):
    """
    A checkpoint of train_gpt2.py, or of build-nanogpt, on the CPU, memory-mapped unless told
    otherwise: a dict with at least step, model, model_config and tokenizer. Raises UserError if it
    is neither.
    """
    try:
        # weights_only: a checkpoint from a stranger is data, never code to run
        with torch.serialization.safe_globals(FOREIGN_CONFIGS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if isinstance(checkpoint.get("config"), PickledConfig):
            checkpoint = convert_foreign(checkpoint)
        missing = {"step", "model", "model_config", "tokenizer"} - set(checkpoint)
    except OSError:
        raise  # not there, or not readable: says so itself
    except Exception as error:  # torch raises half a dozen kinds for a file that is not its own
        raise UserError(f"{path} is no checkpoint of train_gpt2.py, or a damaged one: name another "
                        f"({first_line(error):.100})") from error
    if missing:
        raise UserError(f"{path} is no checkpoint of train_gpt2.py (it lacks "
                        f"{', '.join(sorted(missing))}): name another")
    return checkpoint


def convert_foreign(checkpoint):
    """A checkpoint of build-nanogpt as ours: whatever wrapped the model leaves the names."""
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor
               for name, tensor in checkpoint["model"].items()
               if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # old causal masks
    config = vars(checkpoint["config"])
    rows = len(weights["lm_head.weight"])
    # it calls the rows of the embedding, 50304, the vocabulary; its tokens are always gpt2's
    shape = {name: config[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
    return {"step": int(checkpoint.get("step", 0)), "model": weights,
            "model_config": shape | {"vocab_size": min(rows, 50257), "padded_vocab_size": rows},
            "tokenizer": {"spec": "gpt2", "model": None}}


def newest_valid_checkpoint(log_dir):
    """(path, checkpoint) of the newest one that is not damaged, (None, None) if there is none."""
    steps = list_checkpoints(log_dir)
    for step in sorted(steps, reverse=True):
        try:
            return steps[step], load_training_checkpoint(steps[step])
        except (UserError, OSError) as error:
            print(f"warning: {error}; taking the one before")
    if steps:
        raise UserError(f"no checkpoint in {log_dir} can be read: see the warnings above; give "
                        "--resume PATH, or start anew without --resume")
    return None, None


def load_training_checkpoint(path):
    """load_checkpoint of one to train on from: all of it is read and compared with its CRCs."""
    # not mapped: the optimizer keeps these tensors, and the file would stay in use when it is old
    checkpoint = load_checkpoint(path, mmap=False)
    if not {"optimizer", "scaler", "recipe"} <= set(checkpoint):
        raise UserError(f"{path} holds no optimizer state, so no run can be resumed from it: "
                        "start from its weights with --init_from")
    try:
        damaged = zipfile.ZipFile(path).testzip()
    except zipfile.BadZipFile as error:
        damaged = error
    if damaged:
        raise UserError(f"{path} is damaged ({damaged}): name another")
    return checkpoint


def load_state(raw_model, optimizer, checkpoint):
    """
    Put a checkpoint's weights and optimizer state in place. Only the master needs to hold the
    checkpoint: the other processes pass None and get their part from it.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    checkpoint = checkpoint or {"model": {}, "optimizer": {}}
    ours = [{key: group[key] for key in ("weight_decay", "betas")}
            for group in optimizer.param_groups]
    set_model_state_dict(raw_model, checkpoint["model"], options=options)
    set_optimizer_state_dict(raw_model, optimizer, checkpoint["optimizer"], options=options)
    for group, kept in zip(optimizer.param_groups, ours, strict=True):
        group.update(kept)  # with --resume_anyway the flags count, not what they were


def check_recipe(checkpoint, model_config, recipe, anyway):
    """
    Raise UserError with all that differs between a checkpoint's run and this one. `anyway` lets
    everything pass but another model.
    """
    def differing(saved, ours):
        return [f"{name} {saved.get(name)}, not {ours[name]}" for name in ours
                if saved.get(name) != ours[name]]

    other_model = differing(checkpoint["model_config"], asdict(model_config))
    others = differing(checkpoint["recipe"], recipe)
    if other_model:
        raise UserError(f"the checkpoint is of another model ({'; '.join(other_model + others)}): "
                        "give the flags it was trained with, or another --log_dir")
    if others and not anyway:
        raise UserError(f"the checkpoint is of another run ({'; '.join(others)}): give the flags "
                        "it was trained with, or --resume_anyway")


def resume(config, ranks, raw_model, optimizer, scaler, recipe):
    """
    Load the checkpoint that `--resume` names into model, optimizer and scaler; returns its step and
    path, or (0, None) where there is none. The master reads it, and the others get it from there.
    """
    # a restart by torchrun goes on with what the run has saved since. Nodes count restarts each for
    # itself: all follow the one that knows of one
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    restarted = sum_over_ranks([restarts], ranks.device)[0] > 0
    if not (config.resume or config.resume_anyway or restarted):
        return 0, None
    start, checkpoint = time.time(), None

    def read():
        nonlocal checkpoint
        path = config.resume
        if path in (None, "newest") or (restarted and find_checkpoint(config.log_dir)):
            path, checkpoint = newest_valid_checkpoint(config.log_dir)
        else:
            path = resolve_checkpoint(path)
            if path is None:
                raise UserError(f"no checkpoint {config.resume} to resume: name a model_*.pt file")
            checkpoint = load_training_checkpoint(path)
        if path is None:
            print(f"no checkpoint in {config.log_dir} to resume: starting from scratch")
            return 0, None, None
        check_recipe(checkpoint, raw_model.config, recipe, config.resume_anyway)
        if checkpoint["step"] > config.max_steps:
            raise UserError(f"{path} is at step {checkpoint['step']} already: raise --max_steps")
        return checkpoint["step"], str(path), checkpoint["scaler"]

    step, path, scaler_state = on_master(ranks, read)
    if path is None:
        return 0, None
    load_state(raw_model, optimizer, checkpoint)
    if scaler.is_enabled() and scaler_state:
        scaler.load_state_dict(scaler_state)
    if ranks.master_process:
        print(f"resuming {path} at step {step}, read in {time.time() - start:.1f}s")
    return step, path


def resolve_checkpoint(source):
    """Path of the checkpoint that `source`, a file or log folder, names; None if it is neither."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path} holds neither a checkpoint model_*.pt nor a Hugging Face model")
    return checkpoint


def default_source():
    """GPT2_MODEL from the environment, else the newest run in log/, else OpenAI's gpt2."""
    return os.environ.get("GPT2_MODEL") or ("log" if find_checkpoint("log") else "gpt2")
