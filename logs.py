"""
What a run tells while it trains: log.txt, run.json and, where asked for, TensorBoard and wandb.
"""

from dataclasses import asdict
from pathlib import Path

import fineweb
from checkpoints import start_log_dir
from fineweb import UserError


def open_logger(config, start_step=0, tensorboard=False, wandb=None):
    """
    Make the log folder of a TrainConfig ready for a run from `start_step` on, and return its
    log(step, **values): it appends lines of "step stream value" to log.txt and gives the same
    scalars to TensorBoard (event files in log_dir/tensorboard) and to the wandb project named
    `wandb`. Raises UserError, before anything is written, if a package is missing or wandb refuses.
    """
    log_dir = Path(config.log_dir)
    SummaryWriter = import_tensorboard() if tensorboard else None
    run = start_wandb(wandb, config) if wandb else None
    log_file = start_log_dir(log_dir, start_step)
    meta = fineweb.read_meta(config.data_dir)
    fineweb.write_json(log_dir / "run.json", {
        **asdict(config), "vocab_size": meta["vocab_size"],
        "source": meta.get("recipe", {}).get("source")})  # plot.py draws the axes by it
    # after a resume, TensorBoard forgets what is logged anew
    board = (SummaryWriter(str(log_dir / "tensorboard"), purge_step=start_step or None)
             if tensorboard else None)

    def log(step, **values):
        with open(log_file, "a", encoding="utf-8") as file:
            file.writelines(f"{step} {name} {value:.6g}\n" for name, value in values.items())
        if run:
            run.log(values, step=step)
        if board:
            for name, value in values.items():
                board.add_scalar(name, value, step)
            board.flush()  # a run may be killed at any moment

    return log


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
