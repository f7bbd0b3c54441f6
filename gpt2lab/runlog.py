"""
What a run records while it trains: log.txt, run.json and, on request, TensorBoard and wandb or
trackio.

log.txt has one line "step stream value" for each number, for example "250 val 3.5818". run.json
holds the run's configuration.
"""

import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt2lab.cli import UserError
from gpt2lab.files import read_json, write_atomically, write_json
from gpt2lab.lock import lock_log_dir
from gpt2lab.shards import read_meta

# what a run leaves in its log folder, checkpoints apart
RUN_FILES = ("log.txt", "run.json", "loss.png", "tensorboard")
# how write_atomically names half a checkpoint
UNFINISHED_CHECKPOINT = re.compile(r"model_\d+\.pt\.(\d+\.)?tmp")
# what --wandb begins with if it names a project of trackio. wandb allows no colon in a name
TRACKIO_PREFIX = "trackio:"


# -----------------------------------------------------------------------------
# writing


def open_logger(config: Any, start_step: int = 0,
                resumed_from: str | Path | None = None) -> Callable[..., None]:
    """
    Prepare the log folder of a TrainConfig for a run from `start_step` on, and write run.json.
    Returns log(step, **values), which appends one line for each value to log.txt and sends the same
    values to TensorBoard (event files in log_dir/tensorboard) and wandb or trackio if the config
    says so. Raises UserError, before anything is written, if a package is missing or does not
    start.
    """
    log_dir = Path(config.log_dir)
    SummaryWriter = import_tensorboard() if config.tensorboard else None
    wandb_run = start_wandb(config.wandb, config, start_step > 0) if config.wandb else None
    if os.path.lexists(log_dir) and not log_dir.is_dir():
        raise UserError(f"{log_dir} is a file, or a link that leads nowhere: give another "
                        "--log_dir, or mount the disk that it is on")
    log_dir.mkdir(parents=True, exist_ok=True)
    lock_log_dir(log_dir)
    prepare_log_dir(log_dir, start_step, resumed_from)
    meta = read_meta(config.data_dir)
    write_json(log_dir / "run.json", {
        **asdict(config), "vocab_size": meta["vocab_size"],
        "source": meta.get("recipe", {}).get("source")})  # tells plot.py whether losses compare
    # purge_step: TensorBoard drops what was logged from start_step on, because it is logged again
    tensorboard = (SummaryWriter(str(log_dir / "tensorboard"), purge_step=start_step or None)
                   if SummaryWriter else None)

    log_file = log_dir / "log.txt"
    unwritten: list[str] = []  # lines for which a full disk has had no room yet

    def log(step: int, **values: float) -> None:
        unwritten.extend(f"{step} {name} {value:.6g}\n" for name, value in values.items())
        try:
            append_text(log_file, "".join(unwritten))
            unwritten.clear()
        except OSError as error:
            if len(unwritten) <= len(values):  # warn once, not at every step
                print(f"warning: {log_file} waits until there is room: {error}")
        if wandb_run:
            wandb_run.log(values, step=step)
        if tensorboard:
            for name, value in values.items():
                tensorboard.add_scalar(name, value, step)
            tensorboard.flush()  # a run may be killed at any moment

    return log


def append_text(path: Path, text: str) -> None:
    """Append text to a file. If that fails, the file stays as it was, and OSError is raised."""
    size_before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        os.truncate(path, size_before)
        raise


def import_tensorboard() -> Any:
    """torch's SummaryWriter class, which needs the optional package tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard, or "
                        "leave the flag out") from None
    return SummaryWriter


def start_wandb(project: str, config: Any, resumes: bool) -> Any:
    """
    A run in a project of wandb, or of trackio for "trackio:PROJECT", named after the log folder of
    a TrainConfig. If training `resumes`, trackio's run of this name continues. wandb starts a new
    one. Raises UserError if the package is missing or does not start.
    """
    name, options = Path(config.log_dir).resolve().name, asdict(config)
    if project.startswith(TRACKIO_PREFIX):
        return start_trackio(project.removeprefix(TRACKIO_PREFIX), name, options, resumes)
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb: pip install wandb, or leave the flag "
                        "out") from None
    try:
        return wandb.init(project=project, name=name, config=options)
    except Exception as error:  # not logged in, no network: wandb raises several types
        raise UserError(f"wandb does not start ({error}): run wandb login, or set "
                        "WANDB_MODE=offline") from error


def start_trackio(project: str, name: str, options: dict, resumes: bool) -> Any:
    """
    A run of trackio, whose functions are those of wandb. It writes to files of this machine, in
    the folder TRACKIO_DIR. If training `resumes`, the newest run of this name continues.
    """
    if not project.strip():
        raise UserError("--wandb trackio: lacks the name of a project: give trackio:PROJECT")
    try:
        import trackio
    except ImportError:
        raise UserError("--wandb trackio:PROJECT needs the package trackio: pip install trackio, "
                        "or leave the flag out") from None
    try:
        # embed would start a server and show its page if training runs in a notebook
        return trackio.init(project=project, name=name, config=options, embed=False,
                            resume="allow" if resumes else "never")
    except Exception as error:  # a server that its variables name: trackio raises several types
        raise UserError(f"trackio does not start ({error}): correct the environment variables "
                        "that begin with TRACKIO_, or leave the flag out") from error


# -----------------------------------------------------------------------------
# the log folder before a run


def prepare_log_dir(log_dir: Path, start_step: int, resumed_from: str | Path | None) -> None:
    """
    Clear the log folder of a run that starts at `start_step` of what is not part of this run. Files
    of an earlier run, and checkpoints past `start_step` of the same run, are moved into previous_N.
    Lines of log.txt that a resumed run will write again are cut.
    """
    for path in log_dir.glob("model_*.tmp"):
        if UNFINISHED_CHECKPOINT.fullmatch(path.name):  # of a run that was killed
            path.unlink()
    continues = resumed_from is not None and is_checkpoint_of(log_dir, Path(resumed_from))
    old_files = find_old_files(log_dir, start_step, continues)
    if old_files:
        folder = move_to_previous(log_dir, old_files)
        print(f"what {log_dir} held past step {start_step} is now in {folder}" if continues else
              f"{log_dir} held an earlier run, now in {folder}")
    cut_log(log_dir / "log.txt", start_step)


def is_checkpoint_of(log_dir: Path, path: Path) -> bool:
    """Whether a checkpoint is one of a log folder, be it by a link to another disk."""
    from gpt2lab.checkpoints import list_checkpoints  # imports torch, which plot.py does without
    return any(own.exists() and own.samefile(path) for own in list_checkpoints(log_dir).values())


def find_old_files(log_dir: Path, start_step: int, continues: bool) -> list[Path]:
    """
    Files in a log folder that are not part of the run about to start: checkpoints past `start_step`
    if the run continues the one in the folder, otherwise everything that a run leaves there.
    """
    from gpt2lab.checkpoints import list_checkpoints  # imports torch, which plot.py does without
    paths = list_checkpoints(log_dir)
    if continues:
        return [path for step, path in paths.items() if step > start_step]
    return [*paths.values(), *(log_dir / name for name in RUN_FILES if (log_dir / name).exists())]


def move_to_previous(log_dir: Path, paths: list[Path]) -> Path:
    """Move files of a log folder into previous_N, the first unused one, and return its path."""
    number = 1
    while os.path.lexists(log_dir / f"previous_{number}"):
        number += 1
    folder = log_dir / f"previous_{number}"
    folder.mkdir()
    for path in paths:
        if path.is_symlink():  # a relative link would lead nowhere from another folder
            (folder / path.name).symlink_to(log_dir.resolve() / path.readlink())
            path.unlink()
        else:
            path.rename(folder / path.name)
    return folder


def cut_log(log_file: Path, start_step: int) -> None:
    """Drop the lines of log.txt from `start_step` on, and a line that a killed run left half."""
    if not log_file.exists():
        return
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if re.fullmatch(r"\d+ \S+ \S+\n", line)
            and int(line.split()[0]) < start_step]
    # the file that a link leads to, so that the link stays
    write_atomically(log_file.resolve(), lambda file: file.write("".join(kept).encode("utf-8")))


# -----------------------------------------------------------------------------
# reading


def read_log(log_dir: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """
    {stream: (steps, values)} of log_dir/log.txt, sorted by step. If a step was logged twice, its
    last value counts. Damaged lines, which a killed run may leave, are skipped. Raises UserError if
    there is no log.txt or it has no lines yet.
    """
    path = Path(log_dir) / "log.txt"
    if not path.is_file():
        raise UserError(f"{log_dir} has no log.txt: name the log folder of a run")
    streams: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            step, stream, value = line.split()
            streams.setdefault(stream, {})[int(step)] = float(value)
        except ValueError:
            continue
    if not streams:
        raise UserError(f"{path} holds no line of 'step stream value' yet")
    return {stream: (sorted(by_step), [by_step[step] for step in sorted(by_step)])
            for stream, by_step in streams.items()}


def read_run(log_dir: str | Path) -> dict:
    """The content of log_dir/run.json, or {} if there is no such file."""
    path = Path(log_dir) / "run.json"
    return read_json(path) if path.is_file() else {}
