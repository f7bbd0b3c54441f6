"""
Checkpoints: how a run is saved, found again and resumed.

model_{step}.pt holds only tensors and plain values: the weights, the optimizer's state, the scale
of the float16 loss, the configuration and the tokenizer. It is written under a temporary name,
flushed to disk and then renamed, so that a crash or a full disk never leaves half a checkpoint.
A thread writes it from a copy of the state, so that training goes on meanwhile.
"""

import ctypes
import errno
import os
import re
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import nn

from gpt2lab import foreign, pretrained
from gpt2lab.cli import (
    UserError,
    env_int,
    env_rank,
    first_line,
    is_out_of_memory,
    list_differences,
)
from gpt2lab.device import free_memory, pick_dtype
from gpt2lab.distributed import Ranks, on_master, say_alive, sum_over_ranks
from gpt2lab.files import write_atomically
from gpt2lab.lock import lock_log_dir
from gpt2lab.tokenizer import Tokenizer

EMA_HELP = "use the moving average of the weights that --ema of train_gpt2.py keeps"
CHECKPOINT_NAME = re.compile(r"model_(\d+)\.pt")
# the options of a run on which its losses depend, so that a resumed run must have the same
RESUME_KEYS = ("total_batch_size", "T", "seed", "shuffle", "max_steps", "max_lr", "min_lr",
               "warmup_steps", "schedule", "decay_start", "optimizer", "weight_decay", "beta2",
               "grad_clip", "ema")


# -----------------------------------------------------------------------------
# writing


def gather_state(raw_model: nn.Module, optimizer: torch.optim.Optimizer,
                 average: nn.Module | None = None) -> dict[str, Any]:
    """
    {"model", "optimizer" and, with an average of the weights, "ema"}: names and tensors of a run
    without "module." or "_orig_mod.", so that they do not depend on the number of ranks. The
    tensors are the run's own. Those of a sharded model are gathered instead, in the host memory of
    the master, which all ranks must take part in; the other ranks get empty dicts.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
    )
    sharded = is_sharded(raw_model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=sharded)
    model_state, optimizer_state = get_state_dict(raw_model, optimizer, options=options)
    state = {"model": model_state, "optimizer": optimizer_state}
    if average is not None:
        state["ema"] = get_model_state_dict(average, options=options)
    if sharded and model_state:
        for weights in (state["model"], state.get("ema", {})):
            if weights:  # the tied matrix has been gathered twice
                weights["lm_head.weight"] = weights["transformer.wte.weight"]
        # the counts of updates are not sharded. They still are the optimizer's own
        for values in optimizer_state["state"].values():
            values["step"] = values["step"].clone()
    return state


def is_sharded(raw_model: nn.Module) -> bool:
    """Whether FSDP has shared a model out over the ranks."""
    from torch.distributed.tensor import DTensor
    return any(isinstance(p, DTensor) for p in raw_model.parameters())


class StoppableFile:
    """What torch.save needs of a file. Once the event `stopped` is set, a write fails."""

    def __init__(self, file: BinaryIO, stopped: threading.Event) -> None:
        self.file, self.stopped = file, stopped
        self.flush = file.flush

    def write(self, data: Any) -> int:
        """Write bytes. Raises OSError."""
        if self.stopped.is_set():
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        return self.file.write(data)


def write_checkpoint(path: Path, checkpoint: dict, stopped: threading.Event) -> None:
    """
    Write a checkpoint under a temporary name and rename it to `path`. Raises OSError if it cannot
    be written, or if another thread has set `stopped`; the temporary file is then removed.
    """
    try:
        write_atomically(path, lambda file: torch.save(checkpoint, StoppableFile(file, stopped)))
    except RuntimeError as error:  # torch raises this after a write has failed with an OSError
        raise OSError(error.__context__ or error) from error


def resume_settings(config: Any, data_fingerprint: str) -> dict:
    """The settings of a TrainConfig, and the data, that must match the checkpoint's on resume."""
    return {name: getattr(config, name) for name in RESUME_KEYS} | {"data": data_fingerprint}


def machine_settings(ranks: Ranks, dtype: torch.dtype) -> dict:
    """What results depend on bit for bit, apart from the settings that must match on resume."""
    return {"device": ranks.device.type, "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "torch": str(torch.__version__),
            "processes": ranks.ddp_world_size}


def prune_checkpoints(log_dir: str | Path, keep_last: int, keep_every: int) -> None:
    """
    Delete all checkpoints but the newest `keep_last` (0: delete none) and those whose step is a
    multiple of `keep_every` (0: no such exception). Prints a warning for each that cannot be
    deleted, for example because another process has it open on Windows. The next call tries again.
    """
    if keep_last == 0:
        return
    paths = list_checkpoints(log_dir)
    for step in sorted(paths)[:-keep_last]:
        if keep_every and step % keep_every == 0:
            continue
        try:
            paths[step].unlink(missing_ok=True)
        except OSError as error:
            print(f"warning: the old checkpoint {paths[step]} cannot be deleted and stays: "
                  f"{error.strerror}")


# -----------------------------------------------------------------------------
# writing while training goes on

# of the thread that writes. Where training uses all cores, the thread gets a twentieth of one. With
# a niceness of 10, an update took 13 % longer on 2 cores while a file was being written
NICENESS = 13


def has_room_for_copy(free: int | None, copy: int) -> bool:
    """
    Whether the host's free memory in bytes, None if it is not known, is enough for a copy of a
    run's state, and for a quarter of it to spare.
    """
    return free is None or free > 1.25 * copy


def copy_tensor(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a tensor to host memory."""
    if source.device.type == "cpu" and source.is_contiguous():
        # with one thread, since it reaches the memory's speed. torch uses all cores, and wherever
        # one of them has something else to do, each tensor waits for it
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source)


def fetch_memory(target: torch.Tensor, source: torch.Tensor) -> None:
    """Write zeros to a tensor in host memory, so that the system provides this memory."""
    ctypes.memset(target.data_ptr(), 0, target.nbytes)


def copy_to_host(value: Any, kept: dict, shared: dict, copy: Callable = copy_tensor,
                 place: tuple = ()) -> Any:
    """
    A copy of nested dicts, lists and tuples whose tensors are in host memory, where
    `copy(target, source)` has written them. Tensors in the same memory, which `shared` collects,
    share a copy. `kept` holds the copies by their `place` in `value`: the next call with the same
    `kept` uses their memory again.
    """
    # not a closure that calls itself: it would be a reference cycle and keep the copies alive
    if isinstance(value, dict):
        return {key: copy_to_host(item, kept, shared, copy, (*place, key))
                for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_host(item, kept, shared, copy, (*place, i))
                           for i, item in enumerate(value))
    if not isinstance(value, torch.Tensor):
        return value
    memory = (value.data_ptr(), value.shape, value.dtype)
    if memory not in shared:
        target = kept.get(place)
        if target is None or (target.shape, target.dtype) != (value.shape, value.dtype):
            target = kept[place] = torch.empty_like(value, device="cpu")
        copy(target, value)
        shared[memory] = target
    return shared[memory]


def set_niceness(thread: threading.Thread, niceness: int) -> None:
    """
    Let a thread stand back by `niceness` behind this one (Linux). To bring it back to 0 is allowed
    to root only, so without root this does nothing.
    """
    if sys.platform == "linux" and thread.native_id:  # elsewhere, a whole process has a priority
        with suppress(OSError):  # not allowed, or the thread has ended
            os.setpriority(os.PRIO_PROCESS, thread.native_id,
                           os.getpriority(os.PRIO_PROCESS, 0) + niceness)


def start_quietly(function: Callable, *args: Any) -> threading.Thread:
    """Start a thread that calls `function` at low priority. The process ends after it."""
    thread = threading.Thread(target=function, args=args)
    thread.start()
    set_niceness(thread, NICENESS)
    return thread


def finish(thread: threading.Thread | None) -> None:
    """Return when a thread, if there is one, has ended. It gets the usual priority for the rest."""
    if thread:
        set_niceness(thread, 0)
        thread.join()


class Saver:
    """
    Saves a Run of train_gpt2.py while its training goes on: `save` copies the state, and a thread
    of the master writes the copy. A context manager. Leaving it waits for the file, whatever the
    reason is, except for KeyboardInterrupt, which gives the file up. `newest` is the path of the
    checkpoint that was saved last, or resumed, and None if it could not be written, or on other
    ranks after a save.

    If another rank is lost, the master waits for the file, too. torchrun kills it 30 seconds later.
    Where distributed.exit_for_lost_ranks ends the process first, and after SIGKILL, the file keeps
    its temporary name, and the next run in this log folder deletes it.
    """

    def __init__(self, run: Any, resumed_from: str | None) -> None:
        # imported now, because the import takes a second, and would be part of the first pause
        import torch.distributed.checkpoint.state_dict
        self.newest = resumed_from
        self._run = run
        self._thread: threading.Thread | None = None  # of the write that has begun last
        self._stopped = threading.Event()
        # the copies stay for the next save, because to fetch memory from the system takes several
        # times as long as the copy
        self._kept: dict[tuple, torch.Tensor] = {}
        self._has_room: bool | None = None  # for the copies. Not known before the first update
        # for the first save, a thread fetches the memory after the first update, which has made the
        # state of the optimizer
        self._fetching: threading.Thread | None = None
        if run.ranks.master_process and run.config.save_every and not run.config.fsdp:
            self._hook = run.optimizer.register_step_post_hook(lambda *_: self._fetch_memory())

    @property
    def writing(self) -> bool:
        """Whether the thread is writing a file. Always False on ranks other than the master."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, wait: bool = False) -> None:
        """
        Save the state after `step` updates, delete old checkpoints, and print a line. All ranks
        must call this method, because the parameters of sharded models are gathered. With `wait`,
        return when the file is written. Waits for the file of the step before, if there is one.
        """
        start, run = time.perf_counter(), self._run
        finish(self._fetching)
        if self.writing:
            run.ranks.print0(f"step {step}: waiting until the checkpoint before it is written")
        self.wait()
        background = not wait and run.ranks.master_process and self._find_room()
        state = gather_state(run.raw_model, run.optimizer, run.average)
        self.newest = None
        if not run.ranks.master_process:
            return
        if background and not run.config.fsdp:  # with FSDP, the gathered state is a copy already
            state, background = self._copy(state)
        checkpoint = {
            "step": step, **state, "model_config": dict(vars(run.raw_model.config)),
            "scaler": run.scaler.state_dict(), "config": asdict(run.config),
            "tokenizer": run.tokenizer.state(),
            "recipe": resume_settings(run.config, run.train_loader.fingerprint),
            "machine": machine_settings(run.ranks, run.dtype)}
        if background:
            pause = time.perf_counter() - start
            self._thread = start_quietly(self._write, checkpoint, start, pause)
        else:
            self._write(checkpoint, start)

    def _fetch_memory(self) -> None:
        """Let a thread fetch the memory for the copies. Called after the first update."""
        self._hook.remove()
        if self._find_room():
            state = gather_state(self._run.raw_model, self._run.optimizer, self._run.average)
            self._fetching = start_quietly(self._copy, state, fetch_memory)

    def _find_room(self) -> bool:
        """Whether there is memory for the copies. The first call decides for the whole run."""
        if self._has_room is None:
            self._has_room = has_room_for_copy(free_memory(torch.device("cpu")), self._size)
            if not self._has_room:
                self._say_no_room()
        return self._has_room

    @property
    def _size(self) -> int:
        """Bytes of a copy of the state: weights, two moments and the average, in float32."""
        parameters = sum(p.numel() for p in self._run.raw_model.parameters())
        return 4 * (4 if self._run.average else 3) * parameters

    def _say_no_room(self) -> None:
        print(f"training pauses while a checkpoint is written, because {self._size / 2**30:.2f} "
              "GiB of the host's memory for a copy of the state are not free", flush=True)

    def _copy(self, state: dict, copy: Callable = copy_tensor) -> tuple[dict, bool]:
        """(a copy of `state`, True), or (`state` itself, False) if memory runs out."""
        try:
            return copy_to_host(state, self._kept, {}, copy), True
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        self._kept.clear()
        self._has_room = False
        self._say_no_room()
        return state, False

    def _write(self, checkpoint: dict, start: float, pause: float | None = None) -> None:
        """
        Write a checkpoint, whose save began at the time `start` and stopped training for `pause`
        seconds if this is the thread. Sets `newest`, unless the file cannot be written.
        """
        run, step = self._run, checkpoint["step"]
        path = Path(run.config.log_dir) / f"model_{step:05d}.pt"
        try:
            write_checkpoint(path, checkpoint, self._stopped)
        except (OSError, MemoryError) as error:  # a full disk may have room again at the next one
            if not self._stopped.is_set():
                run.ranks.print0(f"warning: step {step} is not saved, training goes on, and older "
                                 f"checkpoints stay: {first_line(error)}")
            return
        self.newest = str(path)
        paused = "" if pause is None else f", training paused {pause:.2f}s"
        run.ranks.print0(f"saved {path} in {time.perf_counter() - start:.1f}s{paused}")
        prune_checkpoints(run.config.log_dir, run.config.keep_last, run.config.keep_every)

    def wait(self) -> None:
        """Return when the file that is being written, if there is one, is whole or has failed."""
        finish(self._thread)
        self._thread = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if error_type is KeyboardInterrupt:
            self._stopped.set()
        elif error_type:
            say_alive()
        try:
            finish(self._fetching)
            self.wait()
        except KeyboardInterrupt:
            self._stopped.set()
            raise


# -----------------------------------------------------------------------------
# finding


def list_checkpoints(log_dir: str | Path) -> dict[int, Path]:
    """{step: path} of the files model_{step}.pt in a folder; {} if there is no such folder."""
    paths = {}
    for path in Path(log_dir).glob("model_*.pt"):
        if match := CHECKPOINT_NAME.fullmatch(path.name):
            paths[int(match[1])] = path
    return paths


def find_checkpoint(log_dir: str | Path) -> Path | None:
    """Path of the newest model_{step}.pt in a log folder, or None."""
    paths = list_checkpoints(log_dir)
    return paths[max(paths)] if paths else None


def resolve_checkpoint(source: str | Path) -> Path | None:
    """
    Path of a checkpoint: `source` itself if it is a file, the newest checkpoint if it is a log
    folder of train_gpt2.py, nanoGPT or llm.c. None for everything else, a Hugging Face model for
    example. Raises UserError for a folder that contains neither kind of model.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    checkpoint = find_checkpoint(path) or foreign.find_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path} holds neither a checkpoint (model_*.pt, ckpt.pt or model_*.bin) "
                        "nor a Hugging Face model: name another folder, or a file")
    return checkpoint


def read_model_config(source: str | Path) -> dict:
    """Keywords of GPTConfig for a source of GPT.from_pretrained, without reading its weights."""
    path = resolve_checkpoint(source)
    if path is None:
        return pretrained.read_model_config(str(source))
    return load_checkpoint(path)["model_config"]


def list_model_files(source: str | Path) -> list[Path]:
    """The files on this machine that hold a model, so that no output overwrites them."""
    path, folder = resolve_checkpoint(source), Path(source)
    if path is None and folder.is_dir():
        return [file for file in folder.iterdir() if file.suffix in pretrained.FILE_ENDINGS]
    return [path] if path else []


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer that belongs to a checkpoint, log folder, Hugging Face folder or hub name."""
    path = resolve_checkpoint(source)
    if path is None:
        return pretrained.load_tokenizer(str(source))
    return Tokenizer(**load_checkpoint(path)["tokenizer"])


def default_source() -> str:
    """The model to use if none is named: GPT2_MODEL, else the newest run in log/, else gpt2."""
    return os.environ.get("GPT2_MODEL") or ("log" if find_checkpoint("log") else "gpt2")


# -----------------------------------------------------------------------------
# reading


def load_checkpoint(path: str | Path, mmap: bool = True) -> dict:
    """
    The checkpoint in a file of train_gpt2.py, build-nanogpt, nanoGPT or llm.c: a dict with at least
    step, model, model_config and tokenizer. Its tensors are on the CPU, memory-mapped if `mmap`.
    Raises UserError if the file is not a checkpoint or is damaged, OSError if it cannot be read.
    """
    path = Path(path)
    if path.name.startswith("pytorch_model") or path.suffix == ".safetensors":
        raise UserError(f"{path} is one file of a Hugging Face model: name its folder, "
                        f"{path.parent}, in which config.json must be")
    if foreign.is_llmc(path):
        return foreign.read_llmc(path)
    try:
        # weights_only: a checkpoint from a stranger may contain code, which must not run
        with torch.serialization.safe_globals(foreign.PICKLED_CONFIG_NAMES):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        checkpoint = foreign.convert(checkpoint, path)
        check_parts(checkpoint, path)
    except UserError:
        raise
    except Exception as error:  # torch raises many types for a file that it cannot load
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be opened
        reason = pretrained.load_failure(error)
        if not zipfile.is_zipfile(path):
            reason = "it is neither a complete file of torch.save nor a model file of llm.c"
        raise UserError(f"{path} is not a checkpoint of train_gpt2.py, or is damaged: name another "
                        f"({reason})") from error
    return checkpoint


def check_parts(checkpoint: dict, path: Path) -> None:
    """Raise UserError unless a checkpoint has the parts that load_checkpoint promises."""
    kinds = {"step": int, "model": dict, "model_config": dict, "tokenizer": dict}
    if "ema" in checkpoint or checkpoint.get("recipe", {}).get("ema"):
        kinds["ema"] = dict  # the average of the weights
    lacking = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind)]
    if lacking:
        raise UserError(f"{path} is not a checkpoint of train_gpt2.py (it lacks "
                        f"{', '.join(sorted(lacking))}): name another")
    parts = [part for part in ("model", "ema") if part in checkpoint]
    for name, tensor in (item for part in parts for item in checkpoint[part].items()):
        if not pretrained.is_plain(tensor):
            raise UserError(f"{path} is damaged, because its {name} is not a tensor of stored "
                            "floating-point numbers: name another")
    shapes = [{name: tensor.shape for name, tensor in checkpoint[part].items()} for part in parts]
    if shapes[0] != shapes[-1]:
        raise UserError(f"{path} is damaged, because the average of the weights does not have the "
                        "shapes of the weights: name another")


def load_weights(model: nn.Module, source: str | Path, ema: bool = False) -> None:
    """
    Copy the weights of a source of GPT.from_pretrained into a GPT of the same sizes, or with `ema`
    the average of the weights. Raises UserError if the source holds none, or is damaged.
    """
    path = resolve_checkpoint(source)
    if path is not None:
        copy_weights(model, choose_weights(load_checkpoint(path), source, ema))
    else:
        choose_weights({}, source, ema)
        pretrained.copy_weights(model, source)


def choose_weights(checkpoint: dict, source: str | Path, ema: bool) -> dict:
    """A checkpoint, whose "model" is the average of the weights if `ema`. Raises UserError."""
    if not ema:
        return checkpoint
    if "ema" not in checkpoint:
        raise UserError(f"{source} holds no average of the weights: leave out --ema, or train with "
                        "--ema 0.999, for example")
    return checkpoint | {"model": checkpoint["ema"]}


@torch.no_grad()
def copy_weights(model: nn.Module, checkpoint: dict) -> None:
    """
    Move the weights of load_checkpoint's dict into a GPT. Each is removed from the dict when it has
    been copied, so that its memory map can end. The master prints what the checkpoint has to note.
    Raises UserError if the weights do not fit the model.
    """
    weights, state = checkpoint["model"], model.state_dict()
    shapes = [{name: tensor.shape for name, tensor in tensors.items()}
              for tensors in (weights, state)]
    if shapes[0] != shapes[1]:
        raise UserError("the weights of the checkpoint do not have the shapes that its sizes ask "
                        "for, so it is damaged: name another")
    for name in list(weights):
        state[name].copy_(weights.pop(name))
    if "note" in checkpoint and env_rank() == 0:
        print(checkpoint["note"], file=sys.stderr)  # stdout is for what the scripts produce


def load_training_checkpoint(path: str | Path) -> dict:
    """
    load_checkpoint for a checkpoint to resume from. All bytes of the file are read and compared
    with its checksums. Raises UserError if it is damaged or holds no optimizer state.
    """
    # no memory map: the optimizer keeps these tensors, and a mapped file could not be pruned later
    checkpoint = load_checkpoint(path, mmap=False)
    if not {"optimizer", "scaler", "recipe"} <= set(checkpoint):
        raise UserError(f"{path} holds no optimizer state, so no run can be resumed from it: "
                        "start from its weights with --init_from")
    if damage := find_damage(path):
        raise UserError(f"{path} is damaged ({damage}): name another")
    return checkpoint


def find_damage(path: str | Path) -> str | None:
    """The first part of a checkpoint whose CRC is wrong, or why it is not a zip file, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except zipfile.BadZipFile as error:
        return str(error)


def newest_valid_checkpoint(log_dir: str | Path) -> tuple[Path | None, dict]:
    """
    (path, checkpoint) of the newest undamaged checkpoint in a log folder, (None, {}) if the folder
    has no checkpoints. Raises UserError if every checkpoint in it is damaged.
    """
    paths = list_checkpoints(log_dir)
    for step in sorted(paths, reverse=True):
        try:
            return paths[step], load_training_checkpoint(paths[step])
        except (UserError, OSError) as error:
            print(f"warning: {error}; trying the checkpoint before it")
    if paths:
        raise UserError(f"no checkpoint in {log_dir} can be read, see the warnings above: give "
                        "--resume PATH, or leave out --resume to start from scratch")
    return None, {}


# -----------------------------------------------------------------------------
# resuming


def resume(config: Any, ranks: Ranks, raw_model: nn.Module, optimizer: torch.optim.Optimizer,
           scaler: torch.amp.GradScaler, data_fingerprint: str,
           average: nn.Module | None = None) -> tuple[int, str | None]:
    """
    Load the checkpoint that a TrainConfig says to resume into model, optimizer, scaler and the
    average of the weights. The master reads the file and sends the other ranks their part. Returns
    the checkpoint's step and path, or (0, None) if the run starts from scratch. Raises UserError.
    """
    # after torchrun has restarted the processes, resume even without --resume. Each node counts its
    # own restarts, so sum the counts: if one node restarted, all ranks resume
    restarts = env_int("TORCHELASTIC_RESTART_COUNT", 0)
    restarted = sum_over_ranks([restarts], ranks.device)[0] > 0
    if not (config.resume or config.resume_anyway or restarted):
        return 0, None
    start = time.perf_counter()
    checkpoint: dict = {}  # filled on the master only

    def read() -> tuple[int, str | None, dict | None]:
        if os.path.isdir(config.log_dir):
            lock_log_dir(config.log_dir)  # or another run might delete what is being read
        recipe = resume_settings(config, data_fingerprint)
        path, found = read_checkpoint_to_resume(config, restarted, vars(raw_model.config), recipe)
        checkpoint.update(found)
        return found.get("step", 0), path, found.get("scaler")

    step, path, scaler_state = on_master(ranks, read)
    if path is None:
        return 0, None
    load_state(raw_model, optimizer, average, checkpoint)
    if scaler.is_enabled() and scaler_state:
        scaler.load_state_dict(scaler_state)
    if ranks.master_process:
        print(f"resuming {path} at step {step}, read in {time.perf_counter() - start:.1f}s")
        print_machine_differences(checkpoint, machine_settings(
            ranks, pick_dtype(config.dtype, ranks.device)))
    return step, path


def read_checkpoint_to_resume(config: Any, restarted: bool, model_config: dict,
                              recipe: dict) -> tuple[str | None, dict]:
    """
    (path, checkpoint) that `resume` loads, (None, {}) if the log folder has none. If torchrun has
    restarted the processes, the checkpoints in the log folder win over the one that --resume names,
    because the run saved them later. Raises UserError.
    """
    path: Path | None
    if config.resume in (None, "newest") or (restarted and find_checkpoint(config.log_dir)):
        path, checkpoint = newest_valid_checkpoint(config.log_dir)
        if path is None:
            print(f"no checkpoint in {config.log_dir} to resume: starting from scratch")
            return None, {}
    else:
        path = resolve_checkpoint(config.resume)
        if path is None:
            raise UserError(f"{config.resume} is not a checkpoint: name a model_*.pt file")
        checkpoint = load_training_checkpoint(path)
    check_recipe(checkpoint, model_config, recipe, config.resume_anyway)
    if checkpoint["step"] > config.max_steps:
        raise UserError(f"{path} is at step {checkpoint['step']} already: raise --max_steps")
    return str(path), checkpoint


def check_recipe(checkpoint: dict, model_config: dict, recipe: dict, anyway: bool) -> None:
    """
    Raise UserError with all differences between a checkpoint's run and this run. With `anyway`,
    only a different model is an error.
    """
    model_differences = list_differences(checkpoint["model_config"], model_config)
    saved = checkpoint["recipe"]  # checkpoints of earlier versions know no other values than these
    saved = {"schedule": "cosine", "decay_start": saved.get("warmup_steps"), "ema": 0.0} | saved
    if (saved["schedule"] == recipe["schedule"] == "wsd"
            and checkpoint["step"] <= min(saved["decay_start"], recipe["decay_start"])):
        # up to here both plans are the same
        saved |= {name: recipe[name] for name in ("max_steps", "decay_start")}
    differences = list_differences(saved, recipe)
    if model_differences:
        listed = "; ".join(model_differences + differences)
        raise UserError(f"the checkpoint is of another model ({listed}): give the flags it was "
                        "trained with, or another --log_dir")
    if differences and not anyway:
        raise UserError(f"the checkpoint is of another run ({'; '.join(differences)}): give the "
                        "flags it was trained with, or --resume_anyway")


def print_machine_differences(checkpoint: dict, machine: dict) -> None:
    """Print a line if a resumed run cannot be equal bit for bit to an uninterrupted one."""
    saved = checkpoint.get("machine", machine)  # checkpoints of earlier versions do not say
    if differences := list_differences(saved, machine):
        print(f"the checkpoint was made with {'; '.join(differences)}: losses may differ in their "
              "last digits from those of an uninterrupted run")


def load_state(raw_model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None,
               checkpoint: dict) -> None:
    """
    Load a checkpoint's weights, optimizer state and average of the weights. The master passes the
    checkpoint; the other ranks pass {} and receive their part from the master.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    weights, optimizer_state = checkpoint.get("model", {}), checkpoint.get("optimizer", {})
    from_flags = [{key: group[key] for key in ("weight_decay", "betas")}
                  for group in optimizer.param_groups]
    # a copy of the dict, because FSDP puts its own tensors into the dict that it gets
    set_model_state_dict(raw_model, dict(weights), options=options)
    if average is not None:  # after --resume_anyway without an average, it begins with the weights
        set_model_state_dict(average, checkpoint.get("ema", weights), options=options)
    set_optimizer_state_dict(raw_model, optimizer, optimizer_state, options=options)
    # the checkpoint's weight_decay and betas may differ after --resume_anyway: the flags win
    for group, values in zip(optimizer.param_groups, from_flags, strict=True):
        group.update(values)
