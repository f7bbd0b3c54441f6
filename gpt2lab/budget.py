"""
--minutes: the sizes and the schedule of a run that is to take a given time on this machine.

`plan` trains models of growing size for a moment each, and takes the largest one that will see
enough tokens in the time. docs/minutes.md has the rule, and the measured runs on which it rests.
"""

import io
import math
import shlex
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from gpt2lab.checkpoints import list_checkpoints, load_checkpoint, resolve_checkpoint
from gpt2lab.cli import UserError, env_int, is_out_of_memory
from gpt2lab.device import free_cache, prefetch, synchronize
from gpt2lab.distributed import Ranks, init_distributed, on_master, sum_over_ranks
from gpt2lab.lock import path_of_lock, unlock
from gpt2lab.presets import (
    check_batch_size,
    fit_B_to_gpu,
    given_flags,
    model_sizes,
    nearest_divisors,
)


class Shape(NamedTuple):
    """Sizes of a model, with the batch and the learning rate that suit it."""

    n_layer: int
    n_head: int
    n_embd: int
    T: int  # and block_size
    total_batch_size: int  # tokens in an update
    max_lr: float  # of Muon, and of AdamW for GPT2_124M


GPT2_124M = Shape(12, 12, 768, 1024, 524_288, 6e-4)
SHAPES = (
    Shape(2, 2, 64, 64, 512, 1.2e-2),
    Shape(2, 4, 128, 64, 512, 1.2e-2),
    Shape(3, 6, 192, 64, 512, 1.2e-2),
    Shape(4, 4, 256, 128, 2048, 8e-3),
    Shape(6, 6, 384, 256, 4096, 6e-3),
    Shape(8, 8, 512, 512, 32_768, 4e-3),
    GPT2_124M,
)
# tokens that a model must see for each weight in the matrices of its layers. If it sees fewer, a
# smaller model learns more in the same time
TOKENS_PER_WEIGHT = 1.6
MIN_UPDATES = 200  # with fewer, a model learns little more than how often each token occurs
MIN_TOKENS = 20_000  # of the train split. A model learns a shorter text by heart in seconds
# the more often a run reads the same text, the more weight decay keeps it from learning the text by
# heart. More often than MAX_EPOCHS nothing was measured
WEIGHT_DECAY_PER_EPOCH, MAX_EPOCHS = 0.04, 20
FULL_RUN_TOKENS = 19_073 * 524_288  # of the 124M run
HOST_MICRO_BATCH = 8192  # tokens. On a CPU or a Mac, larger micro-batches are not faster
EVALUATION_SHARE = 0.05  # of the time, at most, is for validation losses
MAX_VAL_TOKENS = 20 * 524_288  # for a validation loss, as in the 124M run
SAVE_EVERY_SECONDS = 600
SAVE_BYTES_PER_SECOND = 3e8  # which a slow disk writes
END_SECONDS = 1.5  # for the samples and the plot at the end
SPARE_SHARE = 0.03  # of the time, because a machine is not equally fast in every minute
PLANNED = ("n_layer", "n_head", "n_embd", "block_size", "B", "T", "total_batch_size", "max_steps",
           "max_lr", "min_lr", "warmup_steps", "schedule", "optimizer", "weight_decay", "beta2",
           "ema", "eval_every", "val_tokens", "hellaswag_every", "sample_every", "sample_prompt",
           "save_every", "plot_every", "print_every")


class Timing(NamedTuple):
    """What `measure` finds out about a TrainConfig."""

    seconds: float  # an update, as all ranks see it
    setup_seconds: float  # before the first update
    parameters: int
    train_tokens: int
    val_tokens: int


class Trainer(NamedTuple):
    """The functions of train_gpt2.py with which a run is timed, and the ranks that take part."""

    setup: Callable
    training_step: Callable
    ranks: Ranks


# -----------------------------------------------------------------------------
# the plan


def plan(config: Any, setup: Callable, training_step: Callable) -> Any:
    """
    The TrainConfig of a run that takes config.minutes, or `config` itself if this is None. Flags of
    the command line stay as they are. A run that is resumed keeps what was planned when it began.
    `setup` and `training_step` are those of train_gpt2.py. All ranks must call this, and all get
    the same. Raises UserError.
    """
    if config.minutes is None:
        return config
    # the time of the imports counts, too. It is about the processor time that they took
    start = time.perf_counter() - time.process_time()
    minutes, given = config.minutes, given_flags(type(config))
    ranks = init_distributed(config.device)
    earlier = on_master(ranks, lambda: read_earlier_plan(config, given))
    if earlier:
        ranks.print0(f"--minutes {minutes:g}: the run goes on as it was planned when it began")
        return replace(config, **earlier, minutes=None)
    ranks.print0(f"--minutes {minutes:g}: timing models of growing size on this machine")
    trainer = Trainer(setup, training_step, ranks)
    chosen = choose_shape(config, given, trainer)
    timing = measure(chosen, trainer, seconds=min(max(0.03 * 60 * minutes, 1), 20))
    used = mean_seconds_since(start, ranks)
    planned = fit_schedule(chosen, timing, minutes, used, given)
    for line in describe_plan(planned, timing):
        ranks.print0(line)
    return planned


def read_earlier_plan(config: Any, given: set[str]) -> dict | None:
    """
    The planned options of the run that a TrainConfig resumes, as its checkpoint has them, without
    those of `given`. None if there is no checkpoint to resume. Raises UserError.
    """
    restarted = env_int("TORCHELASTIC_RESTART_COUNT", 0) > 0
    if not (config.resume or config.resume_anyway or restarted):
        return None
    paths = list_checkpoints(config.log_dir)
    candidates = [paths[step] for step in sorted(paths, reverse=True)]
    if config.resume not in (None, "newest") and not (restarted and candidates):
        candidates = [path for path in [resolve_checkpoint(config.resume)] if path]
    for path in candidates:
        with suppress(UserError):  # training says that it is damaged, and takes the one before
            saved = load_checkpoint(path).get("config", {})
            return {name: saved[name] for name in PLANNED if name in saved and name not in given}
    return None


def choose_shape(config: Any, given: set[str], trainer: Trainer) -> Any:
    """A TrainConfig with the options that follow from the best of SHAPES. Prints every timing."""
    ranks, chosen, tokens = trainer.ranks, None, math.inf
    for shape in shapes_to_try(config, given):
        candidate = replace(config, minutes=None, **shape_flags(shape, config, given, ranks))
        check_batch_size(candidate.B, candidate.T, candidate.total_batch_size,
                         ranks.ddp_world_size)
        if model_sizes(candidate)["n_embd"] % model_sizes(candidate)["n_head"]:
            continue  # a flag gives a number of heads that does not divide this width
        weights = layer_weights(candidate)
        # the time of a token goes with the weights. If a CPU that computes at twice the rate would
        # read too few tokens, do not even time it
        expected = 2 * tokens * layer_weights(chosen or candidate) / weights
        if ranks.device.type == "cpu" and expected < TOKENS_PER_WEIGHT * weights:
            break
        try:
            timing = measure(replace(candidate, compile=False), trainer, seconds=0.5)
        except (MemoryError, RuntimeError) as error:
            if chosen is None or not is_out_of_memory(error):
                raise
            break  # the models from here on do not fit into the memory
        if timing.train_tokens < MIN_TOKENS:
            raise UserError(f"{config.data_dir} has {timing.train_tokens:,} tokens to train on, "
                            f"and --minutes needs {MIN_TOKENS:,}: add text, or give the sizes of "
                            "the run instead of --minutes")
        tokens = min(60 * config.minutes * candidate.total_batch_size / timing.seconds,
                     MAX_EPOCHS * timing.train_tokens)
        ranks.print0(
            f"  {describe_sizes(candidate)}: {1000 * timing.seconds:.1f} ms an update of "
            f"{candidate.total_batch_size:,} tokens; {tokens:,.0f} tokens in the time, "
            f"{tokens / weights:.2g} for each weight of the layers")
        least = max(TOKENS_PER_WEIGHT * weights, 1.5 * MIN_UPDATES * candidate.total_batch_size)
        if chosen and tokens < least:
            break
        chosen = candidate
    if chosen is None:
        raise UserError(f"--n_head {config.n_head} divides no width that --minutes knows: give "
                        "--n_embd, too")
    return chosen


def layer_weights(config: Any) -> int:
    """The number of weights in the matrices of the layers of a TrainConfig's model."""
    sizes = model_sizes(config)
    return 12 * sizes["n_layer"] * sizes["n_embd"]**2


def shapes_to_try(config: Any, given: set[str]) -> tuple[Shape, ...]:
    """
    SHAPES or, if flags give all sizes of the model, the one shape that is nearest to it, because
    the batch and the learning rate of this shape suit the model.
    """
    if "model" not in given and not {"n_layer", "n_head", "n_embd"} <= given:
        return SHAPES
    weights = layer_weights(config)
    return (min(SHAPES, key=lambda shape: abs(
        math.log(weights / (12 * shape.n_layer * shape.n_embd**2)))),)


def shape_flags(shape: Shape, config: Any, given: set[str], ranks: Ranks) -> dict:
    """The options of a TrainConfig that follow from a shape, without those of `given`."""
    flags: dict[str, Any] = shape._asdict() | dict(hellaswag_every=0, sample_every=0)
    if "model" in given:
        flags |= dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    elif "n_embd" in given and "n_head" not in given:
        flags["n_head"] = math.gcd(shape.n_head, config.n_embd)
    if shape == GPT2_124M:
        flags |= dict(optimizer="adamw", min_lr=6e-5, beta2=0.95, schedule="cosine", ema=0.0)
    else:
        flags |= dict(optimizer="adamw" if config.fsdp else "muon", min_lr=0.0, beta2=0.99,
                      schedule="linear", ema=0.998, sample_prompt="")
    optimizer = config.optimizer if "optimizer" in given else flags["optimizer"]
    # Muon's best learning rate is three times AdamW's
    if optimizer == "muon" and shape == GPT2_124M:
        flags |= dict(max_lr=3 * shape.max_lr, min_lr=3 * flags["min_lr"])
    elif optimizer != "muon" and shape != GPT2_124M:
        flags["max_lr"] = shape.max_lr / 3
    T = config.T if "T" in given else shape.T
    if "block_size" in given and "T" not in given:
        T = flags["T"] = min(T, config.block_size)
    flags["block_size"] = T
    # the processes, and a B that a flag gives, must divide the sequences of an update
    unit = T * ranks.ddp_world_size * (config.B if "B" in given else 1)
    flags["total_batch_size"] = math.ceil(shape.total_batch_size / unit) * unit
    if "total_batch_size" in given:
        flags["total_batch_size"] = config.total_batch_size
    micro_batch = HOST_MICRO_BATCH  # tokens
    if ranks.device.type == "cuda":
        memory = torch.cuda.get_device_properties(ranks.device).total_memory
        micro_batch = 1024 * fit_B_to_gpu(memory)
    sequences = max(flags["total_batch_size"] // (T * ranks.ddp_world_size), 1)
    flags["B"] = nearest_divisors(max(micro_batch // T, 1), sequences)[0]
    return {name: value for name, value in flags.items() if name not in given}


# -----------------------------------------------------------------------------
# timing


def measure(config: Any, trainer: Trainer, seconds: float) -> Timing:
    """
    Train as a TrainConfig says for about `seconds`. Nothing of it is kept. An update of many
    micro-steps is not made, but computed from updates of one and of two micro-steps.
    """
    micro_batch = config.B * config.T * trainer.ranks.ddp_world_size  # tokens, of all ranks
    micro_steps = config.total_batch_size // micro_batch
    timings = []
    for n in range(1, min(micro_steps, 2) + 1):
        trial = replace(config, total_batch_size=n * micro_batch, resume=None, resume_anyway=False,
                        hellaswag_every=0, eval_tasks=None, tensorboard=False, wandb=None)
        timings.append(time_updates(trial, trainer, seconds))
        free_cache(trainer.ranks.device)  # of the model that was timed
    first, last = timings[0], timings[-1]
    more = (micro_steps - len(timings)) * max(last.seconds - first.seconds, 0)
    return last._replace(seconds=last.seconds + more)


def time_updates(config: Any, trainer: Trainer, seconds: float) -> Timing:
    """The Timing of the updates of a TrainConfig, which are made for about `seconds`."""
    ranks, start = trainer.ranks, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        try:
            run, _, _ = trainer.setup(replace(config, log_dir=folder))
        finally:
            unlock(path_of_lock(folder))
    setup_seconds = mean_seconds_since(start, ranks)
    batches = prefetch(run.train_loader.batches(0), ranks.device)
    no_signals = SimpleNamespace(stop=False, save=False)

    def update_all(steps: range) -> float:
        """Make updates. Returns the mean seconds of one."""
        t0 = time.perf_counter()
        for step in steps:
            trainer.training_step(run, step, batches, no_signals)
        synchronize(ranks.device)
        return mean_seconds_since(t0, ranks) / len(steps)

    update_all(range(1))  # allocates memory
    first = update_all(range(1, 2))
    mean = update_all(range(2, 3 + min(int(seconds / first), 10_000)))
    batches.close()
    return Timing(mean, setup_seconds, sum(p.numel() for p in run.raw_model.parameters()),
                  run.train_loader.num_sequences * config.T,
                  run.val_loader.num_sequences * config.T)


def mean_seconds_since(start: float, ranks: Ranks) -> float:
    """Seconds since `start` of time.perf_counter, the mean over the ranks, so that all agree."""
    return sum_over_ranks([time.perf_counter() - start], ranks.device)[0] / ranks.ddp_world_size


# -----------------------------------------------------------------------------
# the schedule


def fit_schedule(config: Any, timing: Timing, minutes: float, used_seconds: float,
                 given: set[str]) -> Any:
    """
    A TrainConfig with as many updates as fit into `minutes`, of which `used_seconds` are over, with
    evaluation and saving. Raises UserError if the time is too little.
    """
    seconds = 60 * minutes * (1 - SPARE_SHARE) - used_seconds
    # forward is a third of an update. There are two losses, if the weights are averaged
    val_token_seconds = (2 if config.ema else 1) * timing.seconds / config.total_batch_size / 3
    rounds, val_tokens = fit_validation(
        config, timing.val_tokens, EVALUATION_SHARE * seconds / val_token_seconds, given)
    fixed = timing.setup_seconds + END_SECONDS + rounds * val_tokens * val_token_seconds
    fixed += (16 if config.ema else 12) * timing.parameters / SAVE_BYTES_PER_SECOND
    each = timing.seconds  # for an update, and its part of the evaluations that a flag asks for
    if "eval_every" in given and config.eval_every:
        each += val_tokens * val_token_seconds / config.eval_every
    steps = int((seconds - fixed) / each)
    if steps < MIN_UPDATES and "max_steps" not in given:
        least = (used_seconds + fixed + MIN_UPDATES * each) / (1 - SPARE_SHARE)
        raise UserError(f"--minutes {minutes:g} is too little for this machine, where "
                        f"{MIN_UPDATES} updates, and what comes before and after them, take "
                        f"{math.ceil(least / 6) / 10:g} minutes: give more time")
    most = MAX_EPOCHS * timing.train_tokens // config.total_batch_size + 1
    steps = config.max_steps if "max_steps" in given else min(steps, max(most, MIN_UPDATES))
    warmup, weight_decay = 715, 0.1  # of the 124M run
    if config.schedule == "linear":
        warmup = 80  # of the demo
        epochs = steps * config.total_batch_size / timing.train_tokens
        weight_decay = max(round(WEIGHT_DECAY_PER_EPOCH * min(epochs, MAX_EPOCHS), 2), 0.1)
    pause = max(min(math.ceil(steps / 2), int(SAVE_EVERY_SECONDS / each)), 1)
    flags = dict(max_steps=steps, warmup_steps=min(warmup, steps // 10), weight_decay=weight_decay,
                 val_tokens=val_tokens,
                 eval_every=math.ceil(steps / (rounds - 1)) if rounds > 1 else 0, save_every=pause,
                 plot_every=pause, print_every=max(steps // 30, 1))
    return replace(config, **{name: value for name, value in flags.items() if name not in given})


def fit_validation(config: Any, all_tokens: int, affordable: float,
                   given: set[str]) -> tuple[int, int]:
    """
    How often the validation loss is computed, and over how many tokens. The val split has
    `all_tokens`, and the time allows `affordable` tokens in all.
    """
    if "val_tokens" in given or "eval_every" in given:
        asked = config.num_val_tokens if "val_tokens" in given else MAX_VAL_TOKENS
        return 1, min(all_tokens, asked)
    val_tokens = min(all_tokens, MAX_VAL_TOKENS)
    # at the start and after every quarter; at the start and after each half; or only at the end
    rounds = next((n for n in (5, 3) if n * val_tokens <= affordable), 1)
    return rounds, max(min(val_tokens, int(affordable / rounds)), config.T)


# -----------------------------------------------------------------------------
# what is printed


def describe_sizes(config: Any) -> str:
    """The sizes of the model of a TrainConfig, in words."""
    sizes = model_sizes(config)
    return f"{sizes['n_layer']} layers of width {sizes['n_embd']}, T {config.T}"


def describe_plan(config: Any, timing: Timing) -> list[str]:
    """Lines that say what a planned run is, and the command that repeats it."""
    tokens = config.max_steps * config.total_batch_size
    epochs = tokens / timing.train_tokens
    lines = [f"chosen: {describe_sizes(config)}, {timing.parameters:,} parameters; "
             f"{config.max_steps:,} updates of {config.total_batch_size:,} tokens, which read the "
             f"text {epochs:.2g} times"]
    if MAX_EPOCHS <= epochs < MAX_EPOCHS + 1:
        lines.append(f"the run takes {config.max_steps * timing.seconds / 60:.1f} minutes, because "
                     "this model would learn the text by heart in the rest: add text")
    if layer_weights(config) >= 12 * GPT2_124M.n_layer * GPT2_124M.n_embd**2:
        lines.append(f"the time is enough for {tokens / FULL_RUN_TOKENS:.2g} of the 10B tokens of "
                     "the 124M run")
    return [*lines, f"the same run again: {explicit_command(config)}"]


def explicit_command(config: Any) -> str:
    """The command of a TrainConfig, with all flags whose values are not their defaults."""
    flags = []
    for f in fields(config):
        value = getattr(config, f.name)
        # the default of the learning rates depends on the optimizer
        is_default = value == f.default and f.name not in ("max_lr", "min_lr")
        if is_default or f.name in ("resume", "resume_anyway"):
            continue
        if isinstance(value, bool):
            flags.append(f"--{f.name}" if value else f"--no_{f.name}")
        else:
            between = "=" if str(value).startswith("-") else " "
            flags.append(f"--{f.name}{between}{shlex.quote(str(value))}")
    processes = env_int("LOCAL_WORLD_SIZE", 1)
    start = f"torchrun --nproc_per_node={processes}" if processes > 1 else "python"
    return " ".join([start, "train_gpt2.py", *flags])
