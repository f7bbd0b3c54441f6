"""
Values for many flags at once: the demo run, and what suits known machines.

A preset for a machine sets B, dtype, compile and compile_mode only. What a run computes does not
depend on the machine, because another B means more or fewer micro-steps in the same update.
"""

import math
import sys
from dataclasses import fields

import torch

from gpt2lab.benchmarks import expand_names
from gpt2lab.cli import (
    UserError,
    add_options,
    check_ranges,
    env_int,
    env_rank,
    make_parser,
    split_list,
)
from gpt2lab.device import pick_device
from gpt2lab.tokenizer import GPT2_VOCAB_SIZE

DEMO_DATA, DEMO_TOKENIZER = "demo_data", "bpe:1536"
RUN_PRESETS: dict[str, dict] = {
    # two to three minutes on two CPU cores. In so short a time, many small updates of a shallow
    # model learn more than few updates of a deep one
    "demo": dict(
        data_dir=DEMO_DATA, n_layer=2, n_head=4, n_embd=128, block_size=64, B=8, T=64,
        total_batch_size=512, max_steps=3_000, optimizer="muon", schedule="linear", min_lr=0.0,
        warmup_steps=80, ema=0.998, eval_every=1_500, val_tokens=10_000_000, hellaswag_every=0,
        sample_every=0, sample_prompt="", save_every=1_500, print_every=100, device="cpu",
        dtype="float32"),
}
# AdamW makes 4,000 updates in the time in which Muon makes 3,000
DEMO_WITH_ADAMW = dict(max_lr=4e-3, beta2=0.99, max_steps=4_000, eval_every=2_000, save_every=2_000)
# values that suit one optimizer, in a run preset or (None) in any other run. dev/experiments.md has
# the measurements of the demo. In them, Muon's best learning rate is three times AdamW's
OPTIMIZER_PRESETS: dict[tuple[str | None, str], dict] = {
    (None, "muon"): dict(max_lr=1.8e-3, min_lr=1.8e-4),
    ("demo", "muon"): dict(max_lr=1.2e-2, beta2=0.99),
    ("demo", "adamw"): DEMO_WITH_ADAMW,
    ("demo", "adamw8bit"): DEMO_WITH_ADAMW,
}
GIB = 2**30


def fit_B_to_gpu(total_memory: float) -> int:
    """
    The largest power of two of sequences of 1,024 tokens with which GPT-2 124M, compiled and in 16
    bits, leaves a tenth of a GPU's memory in bytes free. Powers of two divide the default update.
    """
    # the two numbers are those of measured peaks, in docs/machines.md: a sequence adds 0.347 GB
    sequences = (0.9 * total_memory - 2.89e9) / 0.347e9
    return 2 ** int(math.log2(max(sequences, 1)))


def gpu_preset(memory_gib: float, compile_mode: str, dtype: str = "bfloat16") -> dict:
    """Values for a GPU on which CUDA sees this much memory in GiB."""
    return dict(B=fit_B_to_gpu(memory_gib * GIB), dtype=dtype, compile=True,
                compile_mode=compile_mode)


MACHINE_PRESETS: dict[str, dict] = {
    "a100-40g": gpu_preset(39.4, "reduce-overhead"),
    "a100-80g": gpu_preset(79.1, "reduce-overhead"),
    "5090": gpu_preset(31.3, "max-autotune"),
    "4090": gpu_preset(23.5, "max-autotune"),
    "t4": gpu_preset(14.6, "default", dtype="float16"),
    "h100": gpu_preset(79.1, "reduce-overhead"),
    "mps": dict(B=4, dtype="float32", compile=False),
    "cpu": dict(B=4, dtype="auto", compile=False),  # bfloat16 or float32, as the CPU is
}
MODEL_SIZES: dict[str, dict] = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
PRESET_NAMES = (*RUN_PRESETS, "auto", *MACHINE_PRESETS)

AFTER_THE_DEMO = """\
next: python sample.py --style creative      # more of what it writes
next: python fineweb.py --source FILE.txt --tokenizer bpe:1536 --out my_data && \
python train_gpt2.py --preset demo --data_dir my_data      # learn your own text
next: python fineweb.py && torchrun --nproc_per_node=8 train_gpt2.py      # the real GPT-2 124M"""


def model_sizes(config, vocab_size: int = GPT2_VOCAB_SIZE) -> dict:
    """Keywords of GPTConfig for a TrainConfig: the sizes of --model, unless other flags differ."""
    sizes = dict(MODEL_SIZES[config.model], block_size=config.block_size, vocab_size=vocab_size)
    for name in ("n_layer", "n_head", "n_embd"):
        if getattr(config, name) is not None:
            sizes[name] = getattr(config, name)
    return sizes


def parse_command_line(config_class: type, docstring: str, argv: list[str] | None = None) -> tuple:
    """(preset or None, TrainConfig) from a command line. Its flags win over the preset's values."""
    parser = make_parser(docstring)
    parser.add_argument("--preset", choices=PRESET_NAMES,
                        help="values for other flags: a run, or what suits a machine")
    add_options(parser, config_class)
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**preset_flags(preset))
    optimizer = parser.parse_known_args(argv)[0].optimizer  # the preset's, unless a flag names one
    run_preset = preset if preset in RUN_PRESETS else None
    parser.set_defaults(**OPTIMIZER_PRESETS.get((run_preset, optimizer), {}))
    args = vars(parser.parse_args(argv))
    del args["preset"]
    if preset and preset not in RUN_PRESETS:
        args["B"] = fit_B(args["B"], args["T"], args["total_batch_size"])
    return preset, config_class(**args)


def given_flags(config_class: type, argv: list[str] | None = None) -> set[str]:
    """The options of a TrainConfig that a command line gives, rather than a preset or a default."""
    words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    return {f.name for f in fields(config_class) if {f"--{f.name}", f"--no_{f.name}"} & words}


def preset_flags(preset: str | None) -> dict:
    """{flag: value} of a preset. "auto" stands for this machine's preset, None for no preset."""
    if preset is None:
        return {}
    if preset in RUN_PRESETS:
        return RUN_PRESETS[preset]
    if preset != "auto":
        return MACHINE_PRESETS[preset]
    device = pick_device(need_kernels=False)  # --check says what is missing
    if device.type != "cuda":
        return MACHINE_PRESETS[device.type]
    properties = torch.cuda.get_device_properties(device)
    name = name_gpu(properties.name, properties.total_memory)
    return MACHINE_PRESETS[name] if name else dict(B=fit_B_to_gpu(properties.total_memory))


def name_gpu(name: str, total_memory: int) -> str | None:
    """The MACHINE_PRESETS key for a GPU's name in CUDA and its memory in bytes, or None."""
    if "A100" in name:
        return "a100-80g" if total_memory > 60 * GIB else "a100-40g"
    words = name.lower().replace("-", " ").split()
    return next((key for key in ("h100", "5090", "4090", "t4") if key in words), None)


def nearest_divisors(B: int, sequences: int) -> tuple[int | None, int | None]:
    """The largest divisor of `sequences` up to B, and the smallest one above B; None if none."""
    small = [n for n in range(1, math.isqrt(sequences) + 1) if sequences % n == 0]
    divisors = {*small, *(sequences // n for n in small)}
    return (max((n for n in divisors if n <= B), default=None),
            min((n for n in divisors if n > B), default=None))


def fit_B(B: int, T: int, total_batch_size: int) -> int:
    """The largest B, up to the B given, that divides an update. Prints a line if it is smaller."""
    world_size = max(env_int("WORLD_SIZE", 1), 1)
    sequences, rest = divmod(total_batch_size, max(T, 1) * world_size)
    if rest or B < 1:
        return B  # check_batch_size will say what is wrong
    fitting = nearest_divisors(B, sequences)[0] or B
    if fitting != B and env_rank() == 0:
        print(f"B {B} does not divide the {sequences} sequences of an update on each process: "
              f"B {fitting} instead")
    return fitting


def check_options(config) -> None:
    """Raise UserError for values of a TrainConfig that cannot work on any machine."""
    check_ranges(config)
    expand_names(split_list(config.eval_tasks))  # raises for an unknown name
    if config.minutes and (config.check or config.init_from):
        raise UserError("--minutes plans a new model and trains it: leave out --minutes, or "
                        f"{'--check' if config.check else '--init_from'}")
    if config.minutes:
        return  # what is compared below is still to be planned
    if config.min_lr > config.max_lr:
        raise UserError(f"--min_lr {config.min_lr} is larger than --max_lr {config.max_lr}: give "
                        "both, because the learning rate falls from max_lr to min_lr")
    if config.T > config.block_size:
        raise UserError(f"--T {config.T} is longer than block_size {config.block_size}: "
                        "lower --T or raise --block_size")


def check_init_from(config, model_config, vocab_size: int) -> None:
    """
    Raise UserError unless the GPTConfig of --init_from suits a TrainConfig and shards whose token
    ids are below `vocab_size`.
    """
    source = config.init_from
    if model_config.vocab_size < vocab_size:
        raise UserError(f"{source} knows {model_config.vocab_size} tokens, but the shards in "
                        f"{config.data_dir} use {vocab_size}: make the shards with the model's "
                        "tokenizer")
    if model_config.block_size < config.T:
        raise UserError(f"--T {config.T} is longer than the block_size of {source}, "
                        f"{model_config.block_size}: lower --T")


def check_batch_size(B: int, T: int, total_batch_size: int, world_size: int) -> None:
    """Raise UserError, with the nearest numbers that fit, unless micro-steps fill an update."""
    if total_batch_size % (B * T * world_size) == 0:
        return
    sequences, rest = divmod(total_batch_size, T * world_size)
    if rest or not sequences:
        near = {max(sequences, 1) * T * world_size, (sequences + 1) * T * world_size}
        raise UserError(f"--total_batch_size {total_batch_size} is not a multiple of T x processes "
                        f"= {T} x {world_size}: the nearest that are: "
                        f"{', '.join(map(str, sorted(near)))}")
    fitting = [str(n) for n in nearest_divisors(B, sequences) if n]
    raise UserError(f"B x T x processes = {B} x {T} x {world_size} does not divide "
                    f"total_batch_size {total_batch_size}: the nearest --B that do: "
                    f"{', '.join(fitting)}")
