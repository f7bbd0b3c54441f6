"""What a run of train_gpt2.py prints, and the guard against updates that are not finite."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from gpt2lab.checkpoints import Saver, find_checkpoint
from gpt2lab.cli import UserError, env_rank, first_line, is_out_of_memory
from gpt2lab.device import explain_dtype, format_mfu
from gpt2lab.distributed import Ranks, on_master
from gpt2lab.generate import generate
from gpt2lab.runlog import open_logger
from gpt2lab.tokenizer import Tokenizer

# of the samples. At temperature 1, the demo's model of Tiny Shakespeare writes half again as many
# words that the text does not have
SAMPLING = dict(temperature=0.8, top_k=50)


def open_log(config, ranks: Ranks, start_step: int, resumed_from: str | None) -> Callable:
    """
    The function log(step, name=value, ...) of a run. It writes on the master only, where the log
    folder is made ready. An error on the master is raised on all ranks.
    """
    def log(step: int, **values: float) -> None:
        pass

    def open_on_master() -> None:
        nonlocal log
        log = open_logger(config, start_step, resumed_from)

    on_master(ranks, open_on_master)
    return log


@contextmanager
def saying_what_saves_memory() -> Iterator[None]:
    """If memory runs out in this block, raise UserError with the options that need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"not enough memory ({first_line(error):.150}): lower --B, add --grad_checkpoint, or "
            "--fsdp with several processes, or choose a smaller model; --check estimates what a "
            "run needs") from error


def samples(model, tokenizer: Tokenizer, prompt: str) -> None:
    """Print four texts with which a GPT continues a prompt, and how they are drawn."""
    drawn = ", ".join(f"{name} {value}" for name, value in SAMPLING.items())
    print(f"samples ({drawn}):")
    rows = generate(model, tokenizer.encode(prompt), tokenizer.eot, tokenizer.vocab_size,
                    num_samples=4, max_new_tokens=64, **SAMPLING)
    for i, row in enumerate(rows):
        print(f"[Sample {i + 1}] {prompt}{tokenizer.decode(row)}")


def batch_size(config, ranks: Ranks, grad_accum_steps: int) -> None:
    """Print the device and the dtype of a run, and how an update is cut into micro-steps."""
    ranks.print0(f"using device: {ranks.device}")
    if line := explain_dtype(config.dtype, ranks.device):
        ranks.print0(line)
    ranks.print0(f"total desired batch size: {config.total_batch_size}")
    ranks.print0(f"=> calculated gradient accumulation steps: {grad_accum_steps}")


def found_data(train_loader, val_loader, config, ranks: Ranks) -> None:
    """Print how many shards two DataLoaderLite have, and whether the val split is small."""
    ranks.print0(f"found {len(train_loader.shards)} shards for split train")
    ranks.print0(f"found {len(val_loader.shards)} shards for split val")
    all_tokens = val_loader.num_sequences * config.T
    if all_tokens <= config.num_val_tokens:
        ranks.print0(f"the val split is small: all of its {all_tokens:,} tokens are evaluated")


def val_loss(run, step: int, loss: float, stream: str) -> dict:
    """
    Print and log a validation loss (nats a token) in the stream "val", or "val_ema" for that of the
    averaged weights. Returns what is new for the result of `train`. Bits per byte, the measure that
    compares tokenizers, are None if the shards do not tell their bytes.
    """
    run.log(step, **{stream: loss})
    averaged = stream == "val_ema"
    line = f"validation loss{' of the averaged weights' if averaged else ''}: {loss:.4f}"
    bits_per_byte = None
    if run.val_loader.bytes_per_token:
        bits_per_byte = loss / math.log(2) / run.val_loader.bytes_per_token
        line += f" | {bits_per_byte:.4f} bits per byte"
    run.ranks.print0(line)
    if averaged:
        return {"val_ema": loss}
    if bits_per_byte is not None:
        run.log(step, bits_per_byte=bits_per_byte)
    return {"val_loss": loss, "bits_per_byte": bits_per_byte}


def update(run, step: int, loss: float, lr: float, norm: float, dt: float,
           seconds_per_step: float) -> None:
    """
    Print the line of an update: mean loss (nats a token), learning rate, gradient norm, its own
    seconds `dt`, and the time left if the run goes on at `seconds_per_step`.
    """
    config = run.config
    tokens_per_sec = config.total_batch_size / max(dt, 1e-9)
    eta = seconds_per_step * (config.max_steps - step - 1)  # seconds
    mfu = format_mfu(run.raw_model, config.T, tokens_per_sec, run.dtype, run.ranks.ddp_world_size)
    run.ranks.print0(f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
                     f"dt: {1000 * dt:.2f}ms | tok/sec: {tokens_per_sec:.2f} | "
                     f"eta {timedelta(seconds=int(eta))}{mfu}")


def skipped_update(run, step: int, loss: float, norm: float, bad_steps: int, saver: Saver) -> int:
    """
    Print which update was skipped because its loss or norm is not finite. Returns how many in a row
    that makes, `bad_steps` having come before. Raises UserError if they are too many, when the
    Saver has written what it is writing.
    """
    rows = run.config.total_batch_size // run.config.T  # sequences of an update
    scale = run.scaler.get_scale()  # 1 unless float16
    run.ranks.print0(f"step {step:5d} | loss: {loss:.6f} | norm: {norm:.4f} | update skipped, it "
                     f"is not finite; sequences {step * rows} to {(step + 1) * rows - 1}")
    run.log(step, skipped=1)
    if math.isfinite(loss) and scale > 1:
        return bad_steps  # float16 gradients overflowed, and the scaler has halved its scale
    if bad_steps + 1 >= run.config.max_bad_steps > 0:
        saver.wait()
        path = on_master(run.ranks, lambda: str(find_checkpoint(run.config.log_dir) or ""))
        remedy = (f"resume {path} with a lower --max_lr and --resume_anyway" if path else
                  "nothing is saved yet, start again with a lower --max_lr or more --warmup_steps")
        raise UserError(f"step {step}: {bad_steps + 1} updates in a row were not finite: {remedy}")
    return bad_steps + 1


def end(config, result: dict, what_next: str | None) -> int:
    """
    Print how a run ended, given what `train` returned, and `what_next` if it reached its last step.
    Returns the exit code, 1 if the last checkpoint could not be written. Only the master prints.
    """
    if env_rank() > 0:
        return 0
    how = "stopped by a signal at" if result["stopped"] else "trained to"
    print(f"{how} step {result['step']} in {timedelta(seconds=int(result['seconds']))}, "
          f"checkpoint: {find_checkpoint(config.log_dir) or 'none yet'}")
    if result["checkpoint"] is None and result["step"]:
        print("error: the last checkpoint could not be written: make room and --resume",
              file=sys.stderr)
        return 1
    if result["stopped"]:
        print("next: the same command with --resume")
    elif what_next:
        print(what_next)
    return 0
