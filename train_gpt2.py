"""
GPT-2 and its training loop: everything there is to understand, top to bottom.

    python train_gpt2.py --preset demo                       # minutes on two CPU cores, no network
    python train_gpt2.py --B 4 --T 128 --total_batch_size 8192 --max_steps 2000        # a laptop
    torchrun --nproc_per_node=8 train_gpt2.py                # the 124M run on 10B tokens

A run is (model, optimizer, step): the learning rate, the batch and everything else is a pure
function of the step, so a run continues from a checkpoint exactly where it was.
"""

import itertools
import math
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint as recompute

import fineweb
import plot
from gpt2lab import (
    checkpoints,
    parallel,
    preflight,
    presets,
    pretrained,
    runlog,
    scoring,
    shards,
    tasks,
)
from gpt2lab.cli import UserError, add_options, make_parser, option, run_main
from gpt2lab.device import (
    autocast,
    flops_per_token,
    format_mfu,
    free_cache,
    paused_garbage_collection,
    pick_dtype,
    set_seed,
    synchronize,
    tune_malloc,
)
from gpt2lab.distributed import (
    Ranks,
    init_distributed,
    naming_lost_processes,
    on_master,
    sum_over_ranks,
)
from gpt2lab.generate import generate
from gpt2lab.kernels import Linear, gelu_linear
from gpt2lab.loss import cross_entropy
from gpt2lab.optim import OPTIMIZERS, make_optimizer
from gpt2lab.signals import Signals
from gpt2lab.tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# the model


@dataclass
class GPTConfig:
    """Shape of a GPT. The defaults are GPT-2 124M."""

    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257  # 50,000 BPE merges + 256 bytes + 1 end-of-text
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    # rows of the embedding; a multiple of 128 suits matrix units (50257 -> 50304). No token uses
    # the extra rows: whoever picks a token from logits cuts them at vocab_size
    padded_vocab_size: int | None = None

    def __post_init__(self):
        if self.padded_vocab_size is None:
            self.padded_vocab_size = math.ceil(self.vocab_size / 128) * 128
        if min(self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd) < 1:
            raise UserError(f"every size of the model must be positive, got {asdict(self)}")
        if self.n_embd % self.n_head:
            near = max(self.n_embd // self.n_head, 1) * self.n_head
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: "
                            f"choose n_embd {near}, or another n_head")


MODEL_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


class CausalSelfAttention(nn.Module):
    """Every token gathers from itself and the tokens before it, n_head times in parallel."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_head = config.n_head
        self.layer = layer  # which layer of a KV cache is ours
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # query, key, value at once
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, kv_cache=None, mask=None):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        # nh heads of size hs = C // nh, each attending by itself
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if kv_cache is not None:
            k, v = kv_cache.append(self.layer, k, v)  # (B, nh, S, hs), S = all tokens so far
        S = k.size(2)
        # is_causal aligns query 0 with key 0, which is right only if nothing is cached. One query
        # sees every key; several queries after cached keys need the mask spelled out
        is_causal = False
        if mask is None and T == S:
            is_causal = True  # a plain bool: a compiled graph breaks where it depends on a length
        elif mask is None and T > 1:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)  # (T, S)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again, (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Every token works on what it gathered, by itself."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4 C)
        # GPT-2 was trained with the tanh form of GELU, and the weights remember it
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return gelu_linear(x, self.c_proj.weight, self.c_proj.bias)  # keeps less for backward
        return self.c_proj(F.gelu(x, approximate="tanh"))  # (B, T, C)


class Block(nn.Module):
    """One layer: attention, then MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, kv_cache=None, mask=None):
        # the residual stream x is only ever added to: gradients reach every layer undiminished
        x = x + self.attn(self.ln_1(x), kv_cache, mask)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """
    GPT-2 (Radford et al. 2019), with the module names of OpenAI's and Hugging Face's weights.
    Without dropout, so train and eval mode are the same.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # whether training recomputes activations to save memory
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        # one matrix reads tokens in and out: tie first, then initialise it once
        self.transformer.wte.weight = self.lm_head.weight
        self._init_weights()

    def _init_weights(self):
        for name, p in self.named_parameters():
            if p.dim() < 2:  # biases start at 0; LayerNorm weights keep their 1
                if name.endswith("bias"):
                    nn.init.zeros_(p)
                continue
            # 2 * n_layer branches add to the residual stream: this scale keeps its variance near 1
            residual = name.endswith("c_proj.weight")
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    def forward(self, idx, targets=None, kv_cache=None, last_only=False):
        """
        idx: (B, T) int64 token ids; with a `kv_cache` they follow the tokens it holds already.
        Without targets: (logits, None), logits (B, T, V) at every position, (B, 1, V) with
        `last_only`; V is padded_vocab_size. With targets (B, T): (None, loss), the mean
        cross entropy in nats a token.
        """
        x = self.hidden(idx, kv_cache)  # (B, T, C)
        if last_only:
            x = x[:, -1:]  # the vocabulary product is a third of the work: only where needed
        if targets is None:
            return self.lm_head(x), None  # (B, T, V)
        return None, cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def hidden(self, idx, kv_cache=None, pos=None, mask=None):
        """
        What lm_head turns into logits, (B, T, C). Tokens that are no plain sequence bring their
        positions `pos` (B, T) and a bool `mask` (B, 1, T, T), True where a query sees a key.
        """
        T = idx.size(1)
        if pos is None:
            start = 0 if kv_cache is None else kv_cache.length
            assert start + T <= self.config.block_size, (
                f"{start + T} tokens do not fit block_size {self.config.block_size}")
            pos = torch.arange(start, start + T, device=idx.device)  # (T)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        for block in self.transformer.h:
            if self.grad_checkpoint and torch.is_grad_enabled():
                # keep the block's input alone, and run it again when backward gets there
                x = recompute(block, x, kv_cache, mask, use_reentrant=False)
            else:
                x = block(x, kv_cache, mask)
        if kv_cache is not None:
            kv_cache.length += T
        return self.transformer.ln_f(x)

    def configure_optimizers(self, weight_decay, learning_rate, betas=(0.9, 0.95), name="adamw",
                             verbose=False):
        """An optimizer that decays matrices and embeddings, but not biases and LayerNorms."""
        return make_optimizer(self, name, weight_decay, learning_rate, betas, verbose)

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """
        A GPT-2 with trained weights, from a Hugging Face hub name (gpt2, gpt2-medium, ...) or a
        folder with config.json and safetensors or bin weights. Raises UserError for anything
        else, other architectures included.
        """
        hf = pretrained.read_config(name_or_dir)
        model = cls.empty(GPTConfig(
            block_size=hf["n_positions"], vocab_size=hf["vocab_size"], n_layer=hf["n_layer"],
            n_head=hf["n_head"], n_embd=hf["n_embd"], padded_vocab_size=hf["vocab_size"]))
        pretrained.copy_weights(model, name_or_dir)
        return model

    @classmethod
    def empty(cls, config):
        """A GPT whose weights are yet to be filled in: no time lost on random numbers."""
        with pretrained.SkipInit():
            return cls(config)


# -----------------------------------------------------------------------------
# data


class DataLoaderLite:
    """
    Batches of a split as a pure function of the step: nothing to save, nothing to skip on resume.

    The split is a set of sequences of T tokens (and the target of the last one). Every epoch visits
    all of them in a new order: the shards shuffled, and the sequences inside each shard. Sequence
    row_id = ((step * grad_accum_steps + micro_step) * world_size + rank) * B + row is looked up,
    so the set that a step sees is the same for every B and world size.
    """

    def __init__(self, data_dir, split, B, T, rank=0, world_size=1, seed=1337, shuffle=True,
                 grad_accum_steps=1):
        self.B, self.T, self.rank, self.world_size = B, T, rank, world_size
        self.seed, self.shuffle, self.grad_accum_steps = seed, shuffle, grad_accum_steps
        meta = shards.read_meta(data_dir)
        self.vocab_size = meta["vocab_size"]
        totals = meta.get("splits", {}).get(split, {})  # unknown in build-nanogpt's folders
        self.bytes_per_token = totals["bytes"] / totals["tokens"] if totals.get("bytes") else None
        opened = shards.open_split(data_dir, split)  # mistakes show now, not in a day
        # a mapped file would count as resident, page by page: keep where to read instead
        self.shards = [(path, tokens.dtype, tokens.offset) for path, tokens in opened]
        if not opened:
            other = "holds no" if Path(data_dir).is_dir() else "does not exist, so there is no"
            raise UserError(f"{data_dir} {other} {split} shard: run python fineweb.py "
                            f"--out {data_dir} (or name another --data_dir)")
        self._orders = OrderedDict()  # of the sequences in the shards in use
        self.sequences = np.array([max(len(tokens) - 1, 0) // T for _, tokens in opened])
        self.num_sequences = int(self.sequences.sum())
        if self.num_sequences == 0:
            raise UserError(f"the {split} split of {data_dir} has no {T + 1} tokens in a row: "
                            "choose a smaller --T or more text")

    def _order(self, epoch, shard):
        """Order of the sequences in a shard; with shard -1, the order of the shards."""
        n = len(self.shards) if shard < 0 else self.sequences[shard]
        if not self.shuffle:
            return np.arange(n)
        key = (epoch, shard)
        if key not in self._orders:
            rng = np.random.default_rng([self.seed, epoch, shard + 1])
            self._orders[key] = rng.permutation(np.arange(n, dtype=np.uint32))
            if len(self._orders) > 4:  # two shards in use, and the order of the shards
                self._orders.popitem(last=False)
        return self._orders[key]

    def _sequence(self, row_id):
        """The T + 1 tokens of one sequence, as stored."""
        epoch, index = divmod(row_id, self.num_sequences)
        shards = self._order(epoch, -1)
        ends = np.cumsum(self.sequences[shards])
        place = int(np.searchsorted(ends, index, side="right"))
        shard = int(shards[place])
        start = int(self._order(epoch, shard)[index - ends[place] + self.sequences[shard]]) * self.T
        path, dtype, offset = self.shards[shard]
        tokens = np.fromfile(path, dtype, self.T + 1, offset=offset + start * dtype.itemsize)
        shards.check_ids(tokens, self.vocab_size, path)
        return tokens

    def rows(self, row_ids):
        """(x, y) for given sequence numbers, (len(row_ids), T) int64 each."""
        rows = np.stack([self._sequence(row_id) for row_id in row_ids]).astype(np.int64)
        rows = torch.from_numpy(rows)  # (B, T + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def batch(self, step, micro_step=0):
        """(x, y), (B, T) int64 each: this rank's share of a micro-step."""
        first = (step * self.grad_accum_steps + micro_step) * self.world_size + self.rank
        return self.rows(range(first * self.B, (first + 1) * self.B))

    def batches(self, start_step, device):
        """Yield the batches of all micro-steps from `start_step` on, reading one ahead."""
        def read(number):
            batch = self.batch(*divmod(number, self.grad_accum_steps))
            # only pinned memory is copied to a GPU while it computes
            return [t.pin_memory() for t in batch] if device.type == "cuda" else batch

        with ThreadPoolExecutor(1) as pool:
            numbers = itertools.count(start_step * self.grad_accum_steps)
            upcoming = pool.submit(read, next(numbers))
            for number in numbers:
                x, y = upcoming.result()
                upcoming = pool.submit(read, number)
                yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


# -----------------------------------------------------------------------------
# configuration


@dataclass
class TrainConfig:
    """Every knob of a run. The defaults are GPT-2 124M on 10B tokens of FineWeb-EDU."""

    data_dir: str = option("edu_fineweb10B", "folder of token shards, made by fineweb.py")
    log_dir: str = option("log", "folder for checkpoints and log.txt")
    resume: str | None = option(None, "continue from this checkpoint, or from the newest one in "
                              "log_dir, if there is one", nargs="?", const="newest")
    resume_anyway: bool = option(False, "--resume, although the run was another one")
    # model
    model: str = option("gpt2", "model shape", choices=tuple(MODEL_SIZES))
    n_layer: int | None = option(None, "layers, instead of the model's")
    n_head: int | None = option(None, "attention heads, instead of the model's")
    n_embd: int | None = option(None, "width, instead of the model's")
    block_size: int = option(1024, "longest sequence the model can see, in tokens")
    init_from: str | None = option(None, "start from these weights: hub name, folder or checkpoint")
    # batch
    B: int = option(64, "sequences in a micro-batch, on each process")
    T: int = option(1024, "tokens in a sequence")
    total_batch_size: int = option(524_288, "tokens in an update, over all processes: 2**19")
    shuffle: bool = option(True, "shuffle shards and sequences, anew every epoch")
    seed: int = option(1337, "seed of the initial weights and of the data order")
    # optimization: the GPT-3 paper's schedule for this size
    max_steps: int = option(19_073, "updates; 19,073 of 2**19 tokens are 10B tokens")
    max_lr: float = option(6e-4, "learning rate after warmup")
    min_lr: float = option(6e-5, "learning rate at the end")
    warmup_steps: int = option(715, "updates of linear warmup; 715 are 375M tokens")
    optimizer: str = option("adamw", "what turns gradients into updates", choices=OPTIMIZERS)
    weight_decay: float = option(0.1, "on matrices and embeddings")
    beta2: float = option(0.95, "AdamW's second moment decay")
    grad_clip: float = option(1.0, "largest gradient norm; 0 does not clip")
    max_bad_steps: int = option(5, "updates in a row without a finite loss that end the run")
    # evaluation
    eval_every: int = option(250, "updates between validation losses; 0: only at the end")
    val_tokens: int = option(0, "validation tokens; 0: 20 x total_batch_size, 10,485,760 by default")
    hellaswag_every: int = option(250, "updates between HellaSwag evaluations; 0: never")
    hellaswag_limit: int = option(0, "HellaSwag examples; 0: all on CUDA, 200 elsewhere")
    sample_every: int = option(250, "updates between samples; 0: only at the end")
    sample_prompt: str = option("Hello, I'm a language model,", "what samples start with")
    save_every: int = option(1000, "updates between checkpoints; 0: only at the end")
    keep_last: int = option(3, "checkpoints to keep, the newest ones; 0: all")
    keep_every: int = option(5000, "keep the checkpoints at multiples of this, too; 0: none")
    print_every: int = option(1, "updates between printed lines; log.txt has them all")
    plot_every: int = option(1000, "updates between drawings of log_dir/loss.png; 0: never")
    tensorboard: bool = option(False, "what log.txt gets goes to TensorBoard too")
    wandb: str | None = option(None, "what log.txt gets goes to this wandb project too")
    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = option("auto", "of autocast", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool | None = option(None, "compile the training step (default: on CUDA)")
    compile_mode: str = option("default", "how hard the compiler tries",
                             choices=("default", "reduce-overhead", "max-autotune"))
    grad_checkpoint: bool = option(False, "recompute activations: a third slower, far less memory")
    fsdp: bool = option(False, "shard weights, gradients and optimizer over the processes")
    deterministic: bool = option(False, "only kernels that give the same bits every time")
    check: bool = option(False, "print what this machine has and whether the run could start")


# what makes a run that run: a checkpoint is resumed only with these as they were
RECIPE = ("total_batch_size", "T", "seed", "shuffle", "max_steps", "max_lr", "min_lr",
          "warmup_steps", "optimizer", "weight_decay", "beta2", "grad_clip")


def parse_config(argv=None):
    """(preset or None, TrainConfig) from the command line; explicit flags win over the preset."""
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=(*presets.RUN_PRESETS, "auto", *presets.MACHINE_PRESETS),
                        help="values for other flags: a run, or what suits a machine")
    add_options(parser, TrainConfig)
    preset = parser.parse_known_args(argv)[0].preset
    if preset in presets.RUN_PRESETS:
        parser.set_defaults(**presets.RUN_PRESETS[preset])
    elif preset:
        parser.set_defaults(**presets.settings(preset))
    args = vars(parser.parse_args(argv))
    preset, config = args.pop("preset"), TrainConfig(**args)
    if preset and preset not in presets.RUN_PRESETS:
        config.B = presets.fit_B(config)
    return preset, config


def check_config(config, world_size):
    """Raise UserError for values that cannot work; returns grad_accum_steps."""
    for f in fields(config):
        value = getattr(config, f.name)
        lowest = 1 if f.name in ("B", "T", "total_batch_size") else 0
        if isinstance(value, int | float) and not value >= lowest:  # a NaN fails too
            raise UserError(f"--{f.name} {value} must be at least {lowest}")
    if config.T > config.block_size:
        raise UserError(f"--T {config.T} is longer than block_size {config.block_size}: "
                        f"lower --T or raise --block_size")
    return presets.count_micro_steps(config, world_size)


def get_lr(step, config):
    """Learning rate of update `step`: linear warmup, cosine down to min_lr, then constant."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps  # + 1: the first update moves too
    if step >= config.max_steps:
        return config.min_lr
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    coeff = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
    return config.min_lr + coeff * (config.max_lr - config.min_lr)


# -----------------------------------------------------------------------------
# trained models


def load_model(source):
    """
    A GPT on the CPU from a checkpoint, a log folder (its newest checkpoint), a Hugging Face folder
    or a hub name. Raises UserError if `source` is none of them.
    """
    path = checkpoints.resolve_checkpoint(source)
    if path is None:
        return GPT.from_pretrained(source)
    checkpoint = checkpoints.load_checkpoint(path)
    model = GPT.empty(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model


def load(source, device="cpu"):
    """
    (GPT on `device`, its Tokenizer) from the same sources as load_model. Raises UserError if the
    model does not know all ids of the tokenizer.
    """
    path = checkpoints.resolve_checkpoint(source)
    tokenizer = (pretrained.load_tokenizer(source) if path is None else
                 Tokenizer(**checkpoints.load_checkpoint(path)["tokenizer"]))
    model = load_model(source)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"the tokenizer of {source} has {tokenizer.vocab_size} tokens, but the "
                        f"model only {model.config.vocab_size}: put the model's own tokenizer.json "
                        "beside it")
    return model.to(device), tokenizer


# -----------------------------------------------------------------------------
# evaluation, on raw_model: its shapes vary, and a compiled model would compile for each anew


@torch.inference_mode()
def evaluate_loss(raw_model, loader, val_tokens, ranks, dtype, stop=lambda: False):
    """
    Mean loss (nats a token) over the first tokens of a split, shared out over all ranks; without a
    meaning if `stop()` ends it early.
    """
    num_sequences = max(val_tokens // loader.T, 1)
    rows = range(ranks.ddp_rank, num_sequences, ranks.ddp_world_size)
    loss_sum = 0.0
    for i in range(0, len(rows), loader.B):
        if stop():
            break
        x, y = (t.to(ranks.device) for t in loader.rows(rows[i:i + loader.B]))
        with autocast(ranks.device, dtype):
            _, loss = raw_model(x, y)
        loss_sum += loss.item() * len(x)
    return sum_over_ranks([loss_sum], ranks.device)[0] / num_sequences


# -----------------------------------------------------------------------------
# training


def open_data(config, ranks, grad_accum_steps, print0):
    """(train_loader, val_loader, val_tokens); says what there is."""
    train_loader = DataLoaderLite(
        config.data_dir, "train", config.B, config.T, ranks.ddp_rank, ranks.ddp_world_size,
        config.seed, config.shuffle, grad_accum_steps)
    val_loader = DataLoaderLite(config.data_dir, "val", config.B, config.T, shuffle=False)
    print0(f"found {len(train_loader.shards)} shards for split train")
    print0(f"found {len(val_loader.shards)} shards for split val")
    # the same tokens whatever B and the number of processes, or losses could not be compared
    val_tokens = config.val_tokens or 20 * config.total_batch_size
    all_tokens = val_loader.num_sequences * config.T
    if val_tokens >= all_tokens:
        print0(f"the val split is small: all of its {all_tokens:,} tokens are evaluated")
    return train_loader, val_loader, min(val_tokens, all_tokens)


def build_model(config, vocab_size):
    """The GPT to train: from scratch or from `--init_from`, for tokens below `vocab_size`."""
    if config.init_from:
        model = load_model(config.init_from)
        if model.config.vocab_size < vocab_size:
            raise UserError(f"{config.init_from} knows {model.config.vocab_size} tokens, but the "
                            f"shards in {config.data_dir} use {vocab_size}: make them with its "
                            "tokenizer")
        if model.config.block_size < config.T:
            raise UserError(f"--T {config.T} is longer than the block_size of {config.init_from}, "
                            f"{model.config.block_size}: lower --T")
        return model
    return GPT(make_model_config(config, vocab_size))


def make_model_config(config, vocab_size=50257):
    """The GPTConfig of a model from scratch: `--model`'s, with what other flags say."""
    shape = {name: size if getattr(config, name) is None else getattr(config, name)
             for name, size in MODEL_SIZES[config.model].items()}
    return GPTConfig(block_size=config.block_size, vocab_size=vocab_size, **shape)


def due(every, step, config):
    """Whether what happens every `every` steps happens now; at the last step it always does."""
    return step == config.max_steps or (every > 0 and step % every == 0)


@dataclass
class Run:
    """What a run is made of, once everything is set up. Only the weights and the step change."""

    config: TrainConfig
    ranks: Ranks
    dtype: torch.dtype  # of autocast
    grad_accum_steps: int
    tokenizer: Tokenizer
    train_loader: DataLoaderLite
    val_loader: DataLoaderLite
    val_tokens: int
    hellaswag_examples: list
    raw_model: GPT  # owns the parameters; is saved, evaluated and sampled
    model: nn.Module  # the same one, wrapped for the training step, whose shapes never change
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    keep_grads: bool  # CUDA graphs write gradients to the same memory every time
    flops_per_update: float
    recipe: dict
    start_step: int
    resumed_from: str | None
    log: Callable  # (step, **values), to log.txt on the master

    def print0(self, *args):
        """Print on the master only."""
        if self.ranks.master_process:
            print(*args, flush=True)


def set_up(config):
    """A Run as `config` says, resumed if it says so, its log folder ready."""
    ranks = init_distributed(config.device)
    device, master_process = ranks.device, ranks.master_process
    print0 = print if master_process else lambda *args, **kwargs: None  # only the master talks
    grad_accum_steps = check_config(config, ranks.ddp_world_size)
    dtype = pick_dtype(config.dtype, device)
    use_compile = parallel.resolve_compile(config, ranks, dtype)
    set_seed(config.seed, config.deterministic)  # the same initial weights on every process
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    print0(f"using device: {device}")
    print0(f"total desired batch size: {config.total_batch_size}")
    print0(f"=> calculated gradient accumulation steps: {grad_accum_steps}")

    train_loader, val_loader, val_tokens = open_data(config, ranks, grad_accum_steps, print0)
    tokenizer = shards.load_data_tokenizer(config.data_dir)
    raw_model = build_model(config, tokenizer.vocab_size).to(device)
    raw_model.grad_checkpoint = config.grad_checkpoint
    if config.fsdp:
        parallel.shard(raw_model, ranks)
    optimizer = raw_model.configure_optimizers(
        config.weight_decay, config.max_lr, (0.9, config.beta2), config.optimizer, master_process)
    # float16 gradients underflow unless the loss is scaled up; disabled, the scaler does nothing
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    recipe = {name: getattr(config, name) for name in RECIPE}
    recipe["data"] = shards.fingerprint(config.data_dir)
    start_step, resumed_from = checkpoints.resume(config, ranks, raw_model, optimizer, scaler, recipe)
    loggers = [lambda step, **values: None]
    # what takes its time comes later: a process that dies there must not find an earlier run
    on_master(ranks, lambda: loggers.append(
        runlog.open_logger(config, start_step, resumed_from)))
    model = parallel.wrap(raw_model, config, ranks, use_compile)
    if use_compile:
        model = parallel.compile_or_fall_back(
            model, raw_model, train_loader.batch(start_step), ranks, dtype)
    hellaswag_examples = tasks.load_evenly_spaced(
        config.hellaswag_limit, ranks) if config.hellaswag_every else []
    keep_grads = use_compile and device.type == "cuda" and config.compile_mode != "default"
    for p in raw_model.parameters() if keep_grads else ():
        p.grad = torch.zeros_like(p)
    flops = config.total_batch_size * flops_per_token(
        sum(p.numel() for p in raw_model.parameters()), raw_model.config, config.T)
    return Run(config, ranks, dtype, grad_accum_steps, tokenizer, train_loader, val_loader,
               val_tokens, hellaswag_examples, raw_model, model, optimizer, scaler, keep_grads,
               flops, recipe, start_step, resumed_from, loggers[-1])


def save(run, step):
    """Write model_{step}.pt and drop old ones. Returns its path; None if it cannot be written."""
    config, start = run.config, time.time()
    extra = {"config": asdict(config), "tokenizer": run.tokenizer.state(), "recipe": run.recipe}
    try:
        path = checkpoints.save_checkpoint(
            config.log_dir, step, run.raw_model, run.optimizer, run.scaler, extra)
        if run.ranks.master_process:
            checkpoints.prune_checkpoints(config.log_dir, config.keep_last, config.keep_every)
    except OSError as error:  # a full disk may have room again by the next time
        return run.print0(f"warning: step {step} is not saved, training goes on, and older "
                          f"checkpoints stay: {error}")
    run.print0(f"saved {path} in {time.time() - start:.1f}s")
    return path and str(path)


def evaluate(run, step, result, signals):
    """
    Validation loss, HellaSwag, samples, plot, where they are due; training does not notice. Returns
    whether any process was asked to stop meanwhile: what is not done then is left to the resume.
    """
    config, ranks = run.config, run.ranks

    def stopped():
        return sum_over_ranks([signals.stop], ranks.device)[0] > 0

    hellaswag_due = run.hellaswag_examples and due(config.hellaswag_every, step, config)
    samples_due = due(config.sample_every, step, config)
    if not (due(config.eval_every, step, config) or hellaswag_due or samples_due):
        return False
    free_cache(ranks.device)  # evaluation needs blocks of other sizes than training left
    model = parallel.unsharded_copy(run.raw_model, ranks.device)
    if due(config.eval_every, step, config):
        val_loss = evaluate_loss(model, run.val_loader, run.val_tokens, ranks, run.dtype,
                                 lambda: signals.stop)
        if stopped():
            return True
        result["val_loss"] = val_loss
        run.log(step, val=val_loss)
        line = f"validation loss: {val_loss:.4f}"
        if run.val_loader.bytes_per_token:  # the measure to compare tokenizers by
            result["bits_per_byte"] = val_loss / math.log(2) / run.val_loader.bytes_per_token
            run.log(step, bits_per_byte=result["bits_per_byte"])
            line += f" | {result['bits_per_byte']:.4f} bits per byte"
        run.print0(line)
    if hellaswag_due:
        with autocast(ranks.device, run.dtype):
            line, accuracy = scoring.summarize(
                model, run.tokenizer, run.hellaswag_examples, ranks, lambda: signals.stop)
        if stopped():
            return True
        run.print0(line)
        run.log(step, hella=accuracy)
    if samples_due and ranks.master_process:
        tokens = run.tokenizer.encode(config.sample_prompt)
        rows = generate(model, tokens, run.tokenizer.eot, run.tokenizer.vocab_size, num_samples=4,
                        max_new_tokens=64, top_k=50)
        for i, row in enumerate(rows):
            print(f"[Sample {i + 1}] {config.sample_prompt}{run.tokenizer.decode(row)}")
    del model
    free_cache(ranks.device)
    return stopped()


def update(run, step, batches, signals):
    """
    One update of the weights. Returns the mean loss (nats a token) over micro-steps and processes,
    the gradient norm, whether both are finite (no weight has changed if not), and whether any
    process was asked to stop, or to save.
    """
    config, device, model, scaler = run.config, run.ranks.device, run.model, run.scaler
    loss_accum = torch.zeros((), device=device)
    for micro_step in range(run.grad_accum_steps):
        x, y = next(batches)
        if isinstance(model, DDP):
            # gradients travel once an update. DDP reads this flag in forward already, so set it
            # before: set after, every update would lack the first micro-steps' gradients
            model.require_backward_grad_sync = micro_step == run.grad_accum_steps - 1
        if run.keep_grads:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(device, run.dtype):
            _, loss = model(x, y)
        loss = loss / run.grad_accum_steps  # so that gradients add up to those of one large batch
        loss_accum += loss.detach()
        scaler.scale(loss).backward()
    scaler.unscale_(run.optimizer)  # the norm to clip is that of the true gradients
    norm = parallel.clip_grad_norm(run.raw_model, config.grad_clip)
    lr = get_lr(step, config)
    for param_group in run.optimizer.param_groups:
        param_group["lr"] = lr
    loss, norm = torch.stack([loss_accum, norm]).tolist()  # waits for the device, once an update
    # the norm is the same everywhere: it is taken after DDP has averaged the gradients
    loss, stop, save_now = sum_over_ranks([loss, signals.stop, signals.save], device)
    loss /= run.ranks.ddp_world_size
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad(set_to_none=not run.keep_grads)
    return loss, norm, finite, stop > 0, save_now > 0


def train(config):
    """
    Train a GPT as `config` says. Returns {"step", "train_loss", "val_loss", "bits_per_byte",
    "seconds", "checkpoint", "stopped"}: losses in nats a token, bits_per_byte None where the shards
    do not tell their bytes, checkpoint None if the last one could not be written, stopped whether a
    signal ended the run. Raises UserError for what the user can mend, before anything is written.
    """
    run = set_up(config)
    start_step, device = run.start_step, run.ranks.device
    batches = run.train_loader.batches(start_step, device)
    result = dict.fromkeys(("train_loss", "val_loss", "bits_per_byte"))
    result["checkpoint"] = run.resumed_from
    start_time, bad_steps, stop, save_now = time.time(), 0, False, False
    with Signals() as signals, paused_garbage_collection():
        # one round more than updates: the last update is saved and evaluated too
        for step in range(start_step, config.max_steps + 1):
            # once in a while: save, before evaluation, which takes its time and may fail
            if step > start_step and (stop or save_now or due(config.save_every, step, config)):
                result["checkpoint"] = save(run, step)
                signals.save = False
            if stop:
                break
            if evaluate(run, step, result, signals):
                stop = True
                saved = step == start_step or due(config.save_every, step, config)
                result["checkpoint"] = result["checkpoint"] if saved else save(run, step)
                break
            if step and config.plot_every and due(config.plot_every, step, config):
                plot.try_to_plot(config.log_dir, run.ranks.master_process)
            if step == config.max_steps:
                break

            synchronize(device)
            t0 = time.time()
            if step == start_step:
                first_t0 = t0
            train_loss, norm, finite, stop, save_now = update(run, step, batches, signals)
            synchronize(device)
            dt = time.time() - t0  # seconds

            lr = get_lr(step, config)
            result["train_loss"] = train_loss
            run.log(step, train=train_loss, lr=lr, norm=norm)
            if not finite:
                bad_steps = report_bad_step(run, step, train_loss, norm, bad_steps)
                continue
            bad_steps = 0
            if step % max(config.print_every, 1) == 0 or step == config.max_steps - 1:
                done, left = step + 1 - start_step, config.max_steps - step - 1
                eta = (time.time() - first_t0) / done * left  # later evaluations included
                run.print0(f"step {step:5d} | loss: {train_loss:.6f} | lr {lr:.4e} | "
                           f"norm: {norm:.4f} | dt: {1000 * dt:.2f}ms | "
                           f"tok/sec: {config.total_batch_size / dt:.2f} | "
                           f"eta {timedelta(seconds=int(eta))}"
                           + format_mfu(run.ranks, run.dtype, run.flops_per_update / dt))
    batches.close()
    return result | {"step": step, "seconds": time.time() - start_time, "stopped": stop}


def report_bad_step(run, step, loss, norm, bad_steps):
    """Say which update was skipped and what it saw; returns how many in a row it makes."""
    rows = run.config.total_batch_size // run.config.T
    scale = run.scaler.get_scale()  # 1 unless float16
    run.print0(f"step {step:5d} | loss: {loss:.6f} | norm: {norm:.4f} | update skipped, it is not "
               f"finite; sequences {step * rows} to {(step + 1) * rows - 1}")
    run.log(step, skipped=1)
    if math.isfinite(loss) and scale > 1:
        return bad_steps  # float16 gradients too large: the scaler has halved its scale
    if bad_steps + 1 >= run.config.max_bad_steps > 0:
        raise UserError(f"step {step}: {bad_steps + 1} updates in a row were not finite; the last "
                        "checkpoint is good, resume it with a lower --max_lr and --resume_anyway")
    return bad_steps + 1


DEMO_NEXT = """\
next: python sample.py --style creative      # more of what it writes
next: python fineweb.py --source FILE.txt --tokenizer bpe:1536 --out my_data && \
python train_gpt2.py --preset demo --data_dir my_data      # learn your own text
next: python fineweb.py && torchrun --nproc_per_node=8 train_gpt2.py      # the real GPT-2 124M"""


def main():
    """The command line: build the demo's data if it is asked for, train, say what comes next."""
    # read when CUDA starts: blocks that grow leave fewer holes between evaluation and training
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # nothing to save before training starts
    preset, config = parse_config()
    if config.check:
        sys.exit(preflight.check(config, make_model_config(config), check_config))
    tune_malloc()
    master_process = os.environ.get("RANK", "0") == "0"
    if preset == "demo" and config.data_dir == presets.DEMO_DATA and master_process:
        # under torchrun the other ranks wait for this one where they join the process group
        fineweb.prepare(["builtin"], presets.DEMO_DATA, presets.DEMO_TOKENIZER)
    with naming_lost_processes():
        result = train(config)
    if dist.is_initialized():
        dist.destroy_process_group()
    if not master_process:
        return
    print("stopped by a signal at" if result["stopped"] else "trained to", f"step {result['step']} "
          f"in {timedelta(seconds=int(result['seconds']))}, "
          f"checkpoint: {checkpoints.find_checkpoint(config.log_dir)}")
    if result["checkpoint"] is None and result["step"]:
        print("error: the last checkpoint could not be written: make room and --resume",
              file=sys.stderr)
        sys.exit(1)
    if result["stopped"]:
        print("next: the same command with --resume")
    elif preset == "demo":
        print(DEMO_NEXT)


if __name__ == "__main__":
    run_main(main)
