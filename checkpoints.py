"""
Checkpoints and log.txt: what a run leaves in its log folder, and how it is found again.

model_{step}.pt holds tensors and plain values only. It is written under a temporary name and
renamed, so that a crash leaves no half file.
"""

import itertools
import re
from dataclasses import asdict
from pathlib import Path

import torch

import fineweb
import pretrained
from cli import UserError

CHECKPOINT_NAME = re.compile(r"model_(\d+)\.pt")


def find_checkpoint(log_dir):
    """Path of the newest model_{step}.pt in a log folder, or None."""
    folder = Path(log_dir)
    found = folder.iterdir() if folder.is_dir() else ()
    steps = {int(m.group(1)): p for p in found if (m := CHECKPOINT_NAME.fullmatch(p.name))}
    return steps[max(steps)] if steps else None


def save_checkpoint(log_dir, step, raw_model, optimizer, scaler, config, tokenizer):
    """Write model_{step}.pt, tensors and plain values only; a crash leaves no half file. -> path"""
    checkpoint = {
        "step": step,  # updates done
        "model": raw_model.state_dict(),  # raw: no "module." or "_orig_mod." before the names
        "model_config": asdict(raw_model.config),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "config": asdict(config),
        "tokenizer": tokenizer.state(),
    }
    path = Path(log_dir) / f"model_{step:05d}.pt"
    fineweb.write_atomically(path, lambda file: torch.save(checkpoint, file))
    return path


def load_checkpoint(path):
    """What save_checkpoint wrote, memory-mapped on the CPU. Raises UserError if it is not that."""
    try:
        # weights_only: a checkpoint from a stranger is data, never code to run
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = {"step", "model", "model_config", "tokenizer"} - set(checkpoint)
    except OSError:
        raise  # not there, or not readable: says so itself
    except Exception as error:  # torch raises half a dozen kinds for a file that is not its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is no checkpoint of train_gpt2.py, or a damaged one: name another "
                        f"({reason:.100})") from error
    if missing:
        raise UserError(f"{path} is no checkpoint of train_gpt2.py (it lacks "
                        f"{', '.join(sorted(missing))}): name another")
    return checkpoint


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


def load_tokenizer(source):
    """The tokenizer that goes with load_model(source); where none is stored, gpt2's."""
    path = resolve_checkpoint(source)
    if path is not None:
        return fineweb.Tokenizer(**load_checkpoint(path)["tokenizer"])
    path = pretrained.fetch(source, "tokenizer.json")
    if path is None:
        return fineweb.Tokenizer("gpt2")
    return fineweb.Tokenizer(str(path), path.read_text(encoding="utf-8"))


def start_log_dir(log_dir, start_step):
    """
    Make log_dir ready and return the path of log.txt. A new run sets an earlier run's files aside
    in previous_N; a resumed one cuts the lines that it is going to write again.
    """
    log_dir = Path(log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    log_file = log_dir / "log.txt"
    if start_step > 0:
        lines = log_file.read_text("utf-8").splitlines(keepends=True) if log_file.exists() else []
        kept = "".join(line for line in lines if int(line.split()[0]) < start_step)
        fineweb.write_atomically(log_file, lambda file: file.write(kept.encode("utf-8")))
        return log_file
    earlier = [p for p in log_dir.iterdir() if CHECKPOINT_NAME.fullmatch(p.name) or p == log_file]
    if earlier:
        aside = next(p for n in itertools.count(1)
                     if not (p := log_dir / f"previous_{n}").exists())
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        print(f"{log_dir} held an earlier run, now in {aside}")
    return log_file
