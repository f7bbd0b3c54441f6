"""
What a run tells while it trains: log.txt, run.json and, where asked for, TensorBoard and wandb.
"""

import itertools
import os
import re
from dataclasses import asdict
from pathlib import Path

from gpt2lab.checkpoints import list_checkpoints
from gpt2lab.cli import UserError
from gpt2lab.files import read_json, write_atomically, write_json
from gpt2lab.shards import read_meta

RUN_FILES = ("log.txt", "run.json", "loss.png", "tensorboard")  # what it leaves beside checkpoints


def open_logger(config, start_step=0, resumed_from=None):
    """
    Make the log folder of a TrainConfig ready for a run from `start_step` on, and return its
    log(step, **values): it appends lines of "step stream value" to log.txt and gives the same
    scalars to TensorBoard (event files in log_dir/tensorboard) and wandb where the config says so.
    Raises UserError, before anything is written, if a package is missing or wandb refuses.
    """
    log_dir = Path(config.log_dir)
    SummaryWriter = import_tensorboard() if config.tensorboard else None
    run = start_wandb(config.wandb, config) if config.wandb else None
    log_file = start_log_dir(log_dir, start_step, resumed_from)
    meta = read_meta(config.data_dir)
    write_json(log_dir / "run.json", {
        **asdict(config), "vocab_size": meta["vocab_size"],
        "source": meta.get("recipe", {}).get("source")})  # plot.py draws the axes by it
    # after a resume, TensorBoard forgets what is logged anew
    board = (SummaryWriter(str(log_dir / "tensorboard"), purge_step=start_step or None)
             if config.tensorboard else None)

    waiting = []  # lines that a full disk has no room for yet

    def log(step, **values):
        waiting.extend(f"{step} {name} {value:.6g}\n" for name, value in values.items())
        try:
            append(log_file, "".join(waiting))
            waiting.clear()
        except OSError as error:
            if len(waiting) <= len(values):  # once, not for every step
                print(f"warning: {log_file} waits until there is room: {error}")
        if run:
            run.log(values, step=step)
        if board:
            for name, value in values.items():
                board.add_scalar(name, value, step)
            board.flush()  # a run may be killed at any moment

    return log


def append(path, text):
    """Add text to a file, or nothing of it: raises OSError and leaves the file as it was."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        os.truncate(path, before)
        raise


def import_tensorboard():
    """torch's writer of TensorBoard's event files; the package behind it is optional."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard, or "
                        "leave the flag out") from None
    return SummaryWriter


def start_wandb(project, config):
    """A wandb run; every start of train_gpt2.py is one, named for its log folder."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb: pip install wandb, or leave the flag "
                        "out") from None
    try:
        return wandb.init(project=project, name=Path(config.log_dir).resolve().name,
                          config=asdict(config))
    except Exception as error:  # not logged in, no network: several kinds
        raise UserError(f"wandb does not start ({error}): give wandb login, or set "
                        "WANDB_MODE=offline") from error


def start_log_dir(log_dir, start_step, resumed_from=None):
    """
    Make log_dir ready for a run from `start_step` on, and return the path of log.txt. Whatever an
    earlier run left that this one does not continue goes to previous_N; lines of log.txt that a
    resumed run is going to write again are cut.
    """
    log_dir = Path(log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    for path in log_dir.glob("model_*.tmp"):  # of a run that was killed while it saved
        path.unlink()
    log_file = log_dir / "log.txt"
    ours = resumed_from is not None and Path(resumed_from).resolve().parent == log_dir.resolve()
    last = start_step if ours else -1
    aside = [path for step, path in list_checkpoints(log_dir).items() if step > last]
    if not ours:
        aside += [path for name in RUN_FILES if (path := log_dir / name).exists()]
    if aside:
        folder = next(p for n in itertools.count(1)
                      if not (p := log_dir / f"previous_{n}").exists())
        folder.mkdir()
        for path in aside:
            path.rename(folder / path.name)
        print(f"{log_dir} held an earlier run, now in {folder}" if not ours else
              f"what {log_dir} held past step {start_step} is now in {folder}")
    if log_file.exists():
        cut_log(log_file, start_step)
    return log_file


def cut_log(log_file, start_step):
    """Drop the lines of log.txt from a step on, and half a line that a killed run left."""
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if re.fullmatch(r"\d+ \S+ \S+\n", line)
            and int(line.split()[0]) < start_step]
    write_atomically(log_file, lambda file: file.write("".join(kept).encode("utf-8")))


def read_log(log_dir):
    """
    {stream: (steps, values)} of log_dir/log.txt, two lists each, by step. A step that was done
    twice counts as it came out last. Damaged lines are skipped: a killed run may leave one. Raises
    UserError if there is no log.
    """
    path = Path(log_dir) / "log.txt"
    if not path.is_file():
        raise UserError(f"{log_dir} has no log.txt: name the log folder of a run")
    streams = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            step, stream, value = line.split()
            streams.setdefault(stream, {})[int(step)] = float(value)
        except ValueError:
            continue
    if not streams:
        raise UserError(f"{path} holds no line of 'step stream value' yet")
    return {name: (sorted(at), [at[step] for step in sorted(at)]) for name, at in streams.items()}


def read_run(log_dir):
    """run.json, which a run leaves beside its log.txt, as a dict; empty if there is none."""
    path = Path(log_dir) / "run.json"
    return read_json(path) if path.is_file() else {}
