"""
GPT-2 and its training loop, to be read from top to bottom: the model, the data loader, the options,
the loop. gpt2lab/ holds what the loop calls and a first reading can skip.

    python train_gpt2.py --preset demo                       # minutes on two CPU cores, no network
    python train_gpt2.py --B 4 --T 128 --total_batch_size 8192 --max_steps 2000        # a laptop
    torchrun --nproc_per_node=8 train_gpt2.py                # the 124M run on 10B tokens

A run is (model, optimizer, step). The learning rate, the batch and everything else is a function of
the step, so that a run continues from a checkpoint exactly where it was.
"""

import copy
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint as recompute

import fineweb
import plot
from gpt2lab import (
    benchmarks,
    budget,
    checkpoints,
    cli,
    distributed,
    kernels,
    lock,
    optim,
    parallel,
    preflight,
    presets,
    pretrained,
    report,
    shards,
)
from gpt2lab.cli import UserError, option
from gpt2lab.device import (
    autocast,
    paused_gc,
    pick_dtype,
    prefetch,
    set_allocator_defaults,
    set_seed,
    synchronize,
)
from gpt2lab.signals import Signals

# -----------------------------------------------------------------------------
# the model. Shapes: B sequences of T tokens, C = n_embd, nh heads of size hs = C / nh, V logits


@dataclass
class GPTConfig:
    """The sizes of a GPT. The defaults are GPT-2 124M."""

    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257  # 50,000 BPE merges + 256 bytes + 1 end-of-text token
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    # V, the rows of the embedding: by default vocab_size rounded up to a multiple of 128 (50304),
    # which GPUs multiply faster. Sampling and scoring ignore logits past vocab_size
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


class CausalSelfAttention(nn.Module):
    """
    Multi-head causal self-attention: each token averages values of itself and of earlier tokens,
    weighted by the similarity of its query with their keys.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.n_head = config.n_head
        self.layer = layer  # the index of this layer in a KV cache
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, kv_cache=None, mask=None):
        B, T, C = x.size()  # batch size, sequence length, embedding size
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        # every head attends by itself, as if it were a further dimension of the batch
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if kv_cache is not None:
            k, v = kv_cache.append(self.layer, k, v)  # (B, nh, S, hs), S = all tokens so far
        S = k.size(2)
        # is_causal aligns query 0 with key 0, which is right only if nothing is cached. One query
        # after cached keys sees all of them. Several queries after cached keys need a mask
        is_causal = False
        if mask is None and T == S:
            is_causal = True  # a plain bool, because a symbolic length would break a compiled graph
        elif mask is None and T > 1:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)  # (T, S)
        # softmax(q @ k.T / sqrt(hs)) @ v in one kernel (FlashAttention), without a (T, S) matrix
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again, (B, T, C)
        return self.c_proj(y)  # (B, T, C)


class MLP(nn.Module):
    """Feed-forward layer, applied to each position by itself: expand 4x, GELU, project back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4 C)
        # the tanh approximation, because GPT-2's weights were trained with it
        x = F.gelu(x, approximate="tanh")  # (B, T, 4 C)
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    """One layer: attention, then MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, kv_cache=None, mask=None):
        # layers only add to the residual stream x, so that gradients reach every layer undiminished
        x = x + self.attn(self.ln_1(x), kv_cache, mask)  # tokens exchange information
        x = x + self.mlp(self.ln_2(x))  # each token processes what it has
        return x


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) without dropout. Hugging Face's weights have the same names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # whether training recomputes activations to save memory
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),  # token embeddings
            wpe=nn.Embedding(config.block_size, config.n_embd),  # position embeddings
            h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        # one matrix embeds tokens and predicts them: tie first, then initialise it once
        self.transformer.wte.weight = self.lm_head.weight
        # (x, weight, targets) -> cross_entropy(x @ weight.T, targets)
        self.linear_cross_entropy = F.linear_cross_entropy
        self._init_weights()

    def _init_weights(self):
        for name, p in self.named_parameters():
            if p.dim() < 2:  # biases start at 0, LayerNorm weights keep their 1
                if name.endswith("bias"):
                    nn.init.zeros_(p)
                continue
            # 2 * n_layer projections add into the residual stream. 1/sqrt(2 * n_layer) keeps the
            # variance of their sum independent of depth
            residual = name.endswith("c_proj.weight")
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    def forward(self, idx, targets=None, kv_cache=None, last_only=False):
        """
        idx: (B, T) int64 token ids; with a `kv_cache` they follow the tokens that it holds already.
        Without targets: (logits, None), logits (B, T, V), or (B, 1, V) with `last_only`.
        With targets (B, T): (None, loss), the mean cross entropy in nats a token.
        """
        x = self.hidden(idx, kv_cache)  # (B, T, C)
        if last_only:
            x = x[:, -1:]  # (B, 1, C): the matmul with the vocabulary is a third of the work
        if targets is None:
            return self.lm_head(x), None  # (B, T, V)
        # no logits are returned with a loss, so that kernels.optimize need not hold all of them
        x, targets = x.flatten(0, 1), targets.flatten()  # (B * T, C), (B * T)
        return None, self.linear_cross_entropy(x, self.lm_head.weight, targets)

    def hidden(self, idx, kv_cache=None, pos=None, mask=None):
        """
        The hidden states (B, T, C), which lm_head turns into logits. Tokens of a prefix tree have
        positions `pos` (B, T) and a bool `mask` (B, 1, T, T), True where a query sees a key.
        """
        T = idx.size(1)
        if pos is None:
            start = 0 if kv_cache is None else kv_cache.length
            assert start + T <= self.config.block_size, "the sequence exceeds block_size"
            pos = torch.arange(start, start + T, device=idx.device)  # (T)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        for block in self.transformer.h:
            if self.grad_checkpoint and torch.is_grad_enabled():
                # keep only the block's input; backward runs the block again when it gets there
                x = recompute(block, x, kv_cache, mask, use_reentrant=False)
            else:
                x = block(x, kv_cache, mask)
        if kv_cache is not None:
            kv_cache.length += T
        return self.transformer.ln_f(x)  # (B, T, C)

    def configure_optimizers(self, weight_decay, learning_rate, betas=(0.9, 0.95), name="adamw",
                             verbose=False):
        """An optimizer of optim.OPTIMIZERS that decays only weights that take part in matmuls."""
        decayed = [p for p in self.parameters() if p.dim() >= 2]  # matrices and embeddings
        others = [p for p in self.parameters() if p.dim() < 2]  # biases and LayerNorm weights
        groups = [{"params": decayed, "weight_decay": weight_decay},
                  {"params": others, "weight_decay": 0.0}]
        if verbose:
            optim.print_groups(decayed, others)
        options = dict(lr=learning_rate, betas=betas, eps=1e-8)
        device = decayed[0].device
        if name == "adamw8bit" and (AdamW8bit := optim.find_adamw8bit(device, verbose)):
            return AdamW8bit(groups, **options)
        # one fused kernel updates all parameters, instead of a few dozen kernels for each
        options["fused"] = device.type in ("cuda", "mps", "cpu")
        if verbose:
            print(f"using fused AdamW: {options['fused']}")
        if name == "muon":
            return optim.make_muon(self, groups, options, verbose)
        return torch.optim.AdamW(groups, **options)

    @classmethod
    def from_pretrained(cls, source, ema=False):
        """
        A trained GPT from a checkpoint, a log folder (its newest checkpoint), a Hugging Face folder
        or a hub name (gpt2, ...); with `ema`, the average of the weights. Raises UserError for
        anything else, or another architecture.
        """
        source = checkpoints.resolve_checkpoint(source) or source  # a run may save a newer one
        model = cls.empty(GPTConfig(**checkpoints.read_model_config(source)))
        checkpoints.load_weights(model, source, ema)
        return model

    @classmethod
    def empty(cls, config):
        """A GPT whose weights are still to be filled in, made without drawing random numbers."""
        with pretrained.SkipInit():
            return cls(config)


def load(source, device="cpu", ema=False):
    """(GPT, Tokenizer) from a source of GPT.from_pretrained. UserError if they do not fit."""
    tokenizer, model = checkpoints.load_tokenizer(source), GPT.from_pretrained(source, ema)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{source} knows {model.config.vocab_size} tokens, but its tokenizer has "
                        f"{tokenizer.vocab_size}: put the model's own tokenizer.json beside it")
    return model.to(device), tokenizer


# -----------------------------------------------------------------------------
# data


class DataLoaderLite:
    """
    Batches of a split as a pure function of the step, with no state to save or to resume.

    The split is a set of sequences of T tokens (and the target of the last one). Every epoch visits
    all of them in a new order, of shards and inside each shard, and cuts them at other places. The
    sequence number row_id = ((step * grad_accum_steps + micro_step) * world_size + rank) * B + row
    is looked up, so that a step sees the same set for every B and world size.
    """

    def __init__(self, data_dir, split, B, T, rank=0, world_size=1, seed=1337, shuffle=True,
                 grad_accum_steps=1):
        self.B, self.T, self.rank, self.world_size = B, T, rank, world_size
        self.seed, self.grad_accum_steps = seed if shuffle else None, grad_accum_steps
        self.vocab_size = shards.read_meta(data_dir)["vocab_size"]
        self.fingerprint = shards.fingerprint(data_dir)  # tells other data apart on resume
        self.bytes_per_token = shards.bytes_per_token(data_dir, split)  # None if unknown
        opened = shards.open_split(data_dir, split)  # a damaged shard is found now, not in a day
        self.shards = [shards.Location(path, tokens.dtype, tokens.offset, len(tokens))
                       for path, tokens in opened]
        # how many sequences each shard holds. The last target needs one token more
        self.sequences = np.array([max(len(tokens) - 1, 0) // T for _, tokens in opened])
        self.num_sequences = int(self.sequences.sum())
        if self.num_sequences == 0:
            raise UserError(f"the {split} split of {data_dir} has no {T + 1} tokens in a row: "
                            "choose a smaller --T or more text")

    def _sequence(self, row_id):
        """The T + 1 tokens of one sequence, as stored."""
        epoch, index = divmod(row_id, self.num_sequences)
        shard_order = shards.permutation(self.seed, epoch, -1, len(self.shards))
        ends = np.cumsum(self.sequences[shard_order])  # where each shard ends, in sequences
        position = int(np.searchsorted(ends, index, side="right"))
        shard = int(shard_order[position])
        n = int(self.sequences[shard])
        index_in_shard = index - int(ends[position]) + n
        number = int(shards.permutation(self.seed, epoch, shard, n)[index_in_shard])
        start = number * self.T + shards.first_cut(self.seed, epoch, self.T)  # in tokens
        # the last sequence of the shard may have to begin earlier, and repeats some tokens then
        start = min(start, self.shards[shard].num_tokens - self.T - 1)
        return shards.read_tokens(self.shards[shard], start, self.T + 1, self.vocab_size)

    def rows(self, row_ids):
        """(x, y) for given sequence numbers, (len(row_ids), T) int64 each."""
        rows = np.stack([self._sequence(row_id) for row_id in row_ids]).astype(np.int64)
        rows = torch.from_numpy(rows)  # (B, T + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # y is the token after x

    def batch(self, step, micro_step=0):
        """(x, y), (B, T) int64 each: this rank's share of a micro-step."""
        first = (step * self.grad_accum_steps + micro_step) * self.world_size + self.rank
        return self.rows(range(first * self.B, (first + 1) * self.B))

    def batches(self, start_step):
        """Yield the batches of all micro-steps from `start_step` on, without an end."""
        for number in itertools.count(start_step * self.grad_accum_steps):
            yield self.batch(*divmod(number, self.grad_accum_steps))


# -----------------------------------------------------------------------------
# options


@dataclass
class TrainConfig:
    """All options of a run. The defaults are GPT-2 124M on 10B tokens of FineWeb-EDU."""

    data_dir: str = option("edu_fineweb10B", "folder of token shards, made by fineweb.py")
    log_dir: str = option("log", "folder for checkpoints and log.txt")
    resume: str | None = option(None, "continue from this checkpoint, or from the newest one in "
                                "log_dir, if there is one", nargs="?", const="newest")
    resume_anyway: bool = option(False, "resume even if data, batch size or schedule differ")
    minutes: float | None = option(None, "plan a run that takes so many minutes", 0.01)
    # model
    model: str = option("gpt2", "model shape", choices=tuple(presets.MODEL_SIZES))
    n_layer: int | None = option(None, "layers, instead of the model's")
    n_head: int | None = option(None, "attention heads, instead of the model's")
    n_embd: int | None = option(None, "width, instead of the model's")
    block_size: int = option(1024, "longest sequence the model can see, in tokens")
    init_from: str | None = option(None, "start from these weights: hub name, folder or checkpoint")
    # batch
    B: int = option(64, "sequences in a micro-batch, on each process", lowest=1, highest=10**6)
    T: int = option(1024, "tokens in a sequence", lowest=1)
    total_batch_size: int = option(524_288, "tokens in an update, over all processes", lowest=1)
    shuffle: bool = option(True, "shuffle shards and sequences, anew every epoch")
    seed: int = option(1337, "seed of the initial weights and the data order", highest=2**64 - 1)
    # optimization: the GPT-3 paper's schedule for this size
    max_steps: int = option(19_073, "updates; 19,073 of 2**19 tokens are 10B", highest=10**9)
    max_lr: float = option(6e-4, "learning rate after warmup; three times as much with muon")
    min_lr: float = option(6e-5, "learning rate at the end; three times as much with muon")
    warmup_steps: int = option(715, "updates of linear warmup; 715 are 375M tokens")
    schedule: str = option("cosine", "how the lr falls", choices=("cosine", "linear", "wsd"))
    decay_fraction: float = option(0.5, "share of the updates in which wsd falls", highest=1)
    optimizer: str = option("adamw", "turns gradients into updates", choices=optim.OPTIMIZERS)
    weight_decay: float = option(0.1, "on matrices and embeddings")
    beta2: float = option(0.95, "AdamW's second moment decay", highest=0.999999)
    grad_clip: float = option(1.0, "largest gradient norm; 0 does not clip")
    ema: float = option(0.0, "decay of a moving average of the weights; 0: none", highest=0.999999)
    max_bad_steps: int = option(5, "updates in a row without a finite loss that end the run")
    # evaluation
    eval_every: int = option(250, "updates between validation losses; 0: only at the end")
    val_tokens: int = option(0, "validation tokens; 0: 20 x total_batch_size, that is 10,485,760")
    hellaswag_every: int = option(250, "updates between HellaSwag evaluations; 0: never")
    hellaswag_limit: int = option(0, "HellaSwag examples; 0: all on CUDA, 200 elsewhere")
    eval_tasks: str | None = option(None, "also score these of evaluate.py, such as lambada,piqa")
    eval_tasks_every: int = option(1000, "updates between evaluations of these; 0: only at the end")
    eval_tasks_limit: int = option(500, "examples of each of these; 0: all")
    sample_every: int = option(250, "updates between samples; 0: only at the end")
    sample_prompt: str = option("Hello, I'm a language model,", "what samples start with")
    save_every: int = option(1000, "updates between checkpoints; 0: only at the end")
    keep_last: int = option(3, "checkpoints to keep, the newest ones; 0: all")
    keep_every: int = option(5000, "keep the checkpoints at multiples of this, too; 0: none")
    print_every: int = option(1, "updates between printed lines; log.txt has them all")
    plot_every: int = option(1000, "updates between drawings of log_dir/loss.png; 0: never")
    tensorboard: bool = option(False, "send the values of log.txt to TensorBoard, too")
    wandb: str | None = option(None, "send them to this wandb project, or to trackio:PROJECT")
    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = option("auto", "of autocast", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool | None = option(None, "compile the training step (default: on CUDA)")
    compile_mode: str = option("default", "how hard compile tries", choices=parallel.COMPILE_MODES)
    grad_checkpoint: bool = option(False, "recompute activations: a third slower, far less memory")
    fsdp: bool = option(False, "shard weights, gradients and optimizer over the processes")
    deterministic: bool = option(False, "only kernels that give the same bits every time")
    check: bool = option(False, "print what this machine has and whether the run could start")

    def __post_init__(self):
        presets.check_options(self)

    @property
    def num_val_tokens(self):
        """Tokens to evaluate: the same for every B and world size, so that losses compare."""
        return self.val_tokens or 20 * self.total_batch_size

    @property
    def decay_start(self):
        """The update from which the learning rate falls."""
        plateau_end = self.max_steps - round(self.decay_fraction * self.max_steps)
        return max(self.warmup_steps, plateau_end if self.schedule == "wsd" else 0)


def get_lr(step, config):
    """Learning rate of update `step`: linear warmup to max_lr, then a decay to min_lr."""
    # 1) linear warmup. + 1, because a first update of lr 0 would move nothing
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    # 2) after max_steps, the smallest learning rate
    if step >= config.max_steps:
        return config.min_lr
    # 3) between warmup and decay, if there is a plateau (Hu et al. 2024)
    if step < config.decay_start:
        return config.max_lr
    # 4) the decay: half a cosine (Brown et al. 2020), or a straight line
    progress = (step - config.decay_start) / (config.max_steps - config.decay_start)
    coeff = 1 - progress  # from 1 to 0
    if config.schedule == "cosine":
        coeff = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + coeff * (config.max_lr - config.min_lr)


def due(every, step, config):
    """Whether what happens every `every` steps happens now. At the last step it always does."""
    return step == config.max_steps or (every > 0 and step % every == 0)


# -----------------------------------------------------------------------------
# setting up a run


@dataclass
class Run:
    """What a run is made of. Only the weights and the state of optimizer and scaler change."""

    config: TrainConfig
    ranks: distributed.Ranks  # this process among all of the run, and its device
    tokenizer: object  # the gpt2lab.tokenizer.Tokenizer of the data
    train_loader: DataLoaderLite
    val_loader: DataLoaderLite
    benchmarks: list[benchmarks.Scheduled]  # HellaSwag and those of --eval_tasks
    raw_model: GPT  # owns the weights: it is saved, evaluated and sampled
    average: GPT | None  # its weights are the moving average of raw_model's, with --ema
    model: nn.Module  # raw_model, compiled and in DDP: only for the training step's fixed shapes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of float16, disabled otherwise
    log: Callable  # log(step, name=value, ...) appends to log.txt, on the master

    @property
    def dtype(self):
        """The dtype of autocast."""
        return pick_dtype(self.config.dtype, self.ranks.device)


def build_model(config, vocab_size):
    """The GPT to train, from scratch or from --init_from, for token ids below `vocab_size`."""
    if not config.init_from:
        return GPT(GPTConfig(**presets.model_sizes(config, vocab_size)))
    model = GPT.from_pretrained(config.init_from)
    presets.check_init_from(config, model.config, vocab_size)
    return model


def open_data(config, ranks, grad_accum_steps):
    """(train_loader, val_loader) of a TrainConfig."""
    train_loader = DataLoaderLite(
        config.data_dir, "train", config.B, config.T, ranks.ddp_rank, ranks.ddp_world_size,
        config.seed, config.shuffle, grad_accum_steps)
    val_loader = DataLoaderLite(config.data_dir, "val", config.B, config.T, shuffle=False)
    report.found_data(train_loader, val_loader, config, ranks)
    return train_loader, val_loader


def setup(config):
    """(Run, step to start from, path of the checkpoint that was resumed or None)."""
    ranks = distributed.init_distributed(config.device)
    device, world_size = ranks.device, ranks.ddp_world_size
    presets.check_batch_size(config.B, config.T, config.total_batch_size, world_size)
    grad_accum_steps = config.total_batch_size // (config.B * config.T * world_size)
    dtype = pick_dtype(config.dtype, device)
    use_compile = parallel.resolve_compile(config, ranks, dtype)
    set_seed(config.seed, config.deterministic)  # the same initial weights on every rank
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    report.batch_size(config, ranks, grad_accum_steps)
    train_loader, val_loader = open_data(config, ranks, grad_accum_steps)
    tokenizer = shards.load_data_tokenizer(config.data_dir)

    raw_model = build_model(config, tokenizer.vocab_size).to(device)  # owns the weights
    kernels.optimize(raw_model)  # the same results, faster and in less memory
    raw_model.grad_checkpoint = config.grad_checkpoint
    average = copy.deepcopy(raw_model) if config.ema else None
    if config.fsdp:  # before the optimizer, which holds shards
        parallel.apply_fsdp([raw_model, average] if average else [raw_model], ranks, dtype)
    optimizer = raw_model.configure_optimizers(
        config.weight_decay, config.max_lr, (0.9, config.beta2), config.optimizer,
        verbose=ranks.master_process)
    # float16 gradients underflow unless the loss is scaled up. A disabled scaler does nothing
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    start_step, resumed_from = checkpoints.resume(
        config, ranks, raw_model, optimizer, scaler, train_loader.fingerprint, average)
    # the log folder comes before the slow steps (compiling, downloading): if a rank dies in one of
    # those, the restart must not find an older run's checkpoints
    log = report.open_log(config, ranks, start_step, resumed_from)
    model = wrap_model(raw_model, config, ranks, use_compile)
    if use_compile:
        model = parallel.compile_or_fall_back(
            model, raw_model, train_loader.batch(start_step), config, ranks, dtype)
    scheduled = benchmarks.schedule(raw_model, tokenizer, config, ranks)
    run = Run(config=config, ranks=ranks, tokenizer=tokenizer, train_loader=train_loader,
              val_loader=val_loader, benchmarks=scheduled, raw_model=raw_model, average=average,
              model=model, optimizer=optimizer, scaler=scaler, log=log)
    return run, start_step, resumed_from


def wrap_model(raw_model, config, ranks, use_compile):
    """What the training step calls: `raw_model`, compiled if `use_compile`, in DDP if needed."""
    model = raw_model
    if use_compile:
        mode = None if config.compile_mode == "default" else config.compile_mode
        # DDP splits the compiled graph at its buckets, to send some gradients while others are
        # being computed
        model = torch.compile(raw_model, mode=mode)
    if ranks.ddp_world_size > 1 and not config.fsdp:
        device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        # averages gradients over the ranks, in the memory in which they are sent
        model = DDP(model, device_ids=device_ids, gradient_as_bucket_view=True)
    return model


# -----------------------------------------------------------------------------
# evaluation uses raw_model, because its shapes vary and a compiled model compiles for each new one


@torch.inference_mode()
def evaluate_loss(raw_model, loader, val_tokens, ranks, dtype, stop=lambda: False):
    """
    Mean loss (nats a token) over the first `val_tokens` of a split, or all of it. All ranks share
    the work. The result has no meaning if `stop()` ended it early.
    """
    num_sequences = min(max(val_tokens // loader.T, 1), loader.num_sequences)
    row_ids = range(ranks.ddp_rank, num_sequences, ranks.ddp_world_size)  # of this rank
    loss_sum = 0.0
    for i in range(0, len(row_ids), loader.B):
        if stop():
            break
        x, y = (t.to(ranks.device) for t in loader.rows(row_ids[i:i + loader.B]))  # (B, T) each
        with autocast(ranks.device, dtype):
            _, loss = raw_model(x, y)
        loss_sum += loss.item() * len(x)
    return distributed.sum_over_ranks([loss_sum], ranks.device)[0] / num_sequences


def evaluate(run, step, result, signals):
    """
    Run the evaluations due at this step. They use no shared random state, so training is the same
    with or without them. Returns whether a signal stopped any rank. The resumed run then repeats
    the evaluation.
    """
    config, ranks = run.config, run.ranks
    if due(config.eval_every, step, config):
        for stream, weights in (("val", run.raw_model), ("val_ema", run.average)):
            if weights is None:
                continue
            with parallel.evaluation_model(weights, ranks.device) as model:
                loss = evaluate_loss(model, run.val_loader, config.num_val_tokens, ranks, run.dtype,
                                     lambda: signals.stop)
            if distributed.on_any_rank(signals.stop, ranks.device):
                return True
            result.update(report.val_loss(run, step, loss, stream))
    benchmarks_due = [each for each in run.benchmarks if due(each.every, step, config)]
    samples_due = due(config.sample_every, step, config)
    if not (benchmarks_due or samples_due):
        return False
    with parallel.evaluation_model(run.raw_model, ranks.device) as model:
        for benchmark in benchmarks_due:
            with autocast(ranks.device, run.dtype):
                line, values = benchmark.score(model, lambda: signals.stop)
            if distributed.on_any_rank(signals.stop, ranks.device):
                return True
            ranks.print0(line)
            run.log(step, **values)
        if samples_due and ranks.master_process:
            report.samples(model, run.tokenizer, config.sample_prompt)
    return distributed.on_any_rank(signals.stop, ranks.device)


# -----------------------------------------------------------------------------
# training


def training_step(run, step, batches, signals):
    """
    One update of the weights. Returns (mean loss over micro-steps and ranks in nats a token,
    gradient norm before clipping, whether both are finite (if not, no weight has changed), whether
    a signal asked any rank to stop, or to save).
    """
    config, device, model, scaler = run.config, run.ranks.device, run.model, run.scaler
    cuda_graphs = parallel.uses_cuda_graphs(config, device)
    grad_accum_steps, loss_accum = run.train_loader.grad_accum_steps, torch.zeros((), device=device)
    with kernels.kept_casts():  # weights do not change in here, so a CPU casts each of them once
        for micro_step in range(grad_accum_steps):
            x, y = next(batches)  # (B, T) each
            last = micro_step == grad_accum_steps - 1
            if isinstance(model, DDP):
                # all-reduce the gradients once an update. DDP reads this flag in forward, so set it
                # before: set after it, every update would lack the first micro-steps' gradients
                model.require_backward_grad_sync = last
            elif config.fsdp:  # until then ranks hold whole gradients, so not if memory is short
                model.set_requires_gradient_sync(last or config.grad_checkpoint)
            if cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()  # the next replay may overwrite outputs
            with autocast(device, run.dtype):
                _, loss = model(x, y)
            loss = loss / grad_accum_steps  # so that gradients add up to those of one large batch
            loss_accum += loss.detach()
            scaler.scale(loss).backward()
    scaler.unscale_(run.optimizer)  # clip the norm of the true gradients
    norm = parallel.clip_grad_norm(run.raw_model, config.grad_clip)
    for param_group in run.optimizer.param_groups:
        param_group["lr"] = get_lr(step, config)
    numbers = distributed.add_over_ranks([loss_accum, norm, signals.stop, signals.save], device)
    optim.step_if(numbers.isfinite().all(), run.optimizer, scaler)
    if run.average:
        optim.update_average(run.average, run.raw_model, config.ema, step)
    scaler.update()
    run.optimizer.zero_grad(set_to_none=not cuda_graphs)
    # wait for the device, once an update, when it has been given all of its work
    loss, norm, stop, save_now = numbers.tolist()
    # the norm is the same on all ranks: DDP has averaged the gradients, or FSDP has summed the norm
    loss, norm = loss / run.ranks.ddp_world_size, norm / run.ranks.ddp_world_size
    return loss, norm, math.isfinite(loss + norm), stop > 0, save_now > 0


@lock.unlocks_log_dir
def train(config):
    """
    Train a GPT. Returns {"step", "train_loss", "val_loss", "val_ema" (all three in nats a token),
    "bits_per_byte" (None where the shards do not tell their bytes), "seconds", "checkpoint" (None
    if the last one could not be written), "stopped" (by a signal)}. Raises UserError, or OSError.
    """
    run, start_step, resumed_from = setup(config)
    device = run.ranks.device
    batches = prefetch(run.train_loader.batches(start_step), device)
    result = dict.fromkeys(("train_loss", "val_loss", "bits_per_byte", "val_ema"))
    saver = checkpoints.Saver(run, resumed_from)
    start_time, first_t0, bad_steps, stop, save_now = time.perf_counter(), None, 0, False, False
    with Signals(distributed.watch_for_lost_ranks) as signals, paused_gc(), saver:
        # one round more than there are updates, so that the last update is evaluated and saved, too
        for step in range(start_step, config.max_steps + 1):
            # once in a while: a checkpoint (all ranks), before the evaluation, which may fail
            save_due = due(config.save_every, step, config)
            if step > start_step and (save_due or save_now or stop):
                saver.save(step, wait=stop)
                signals.save = False
            if stop:
                break
            # once in a while: validation loss and HellaSwag (all ranks), samples (the master)
            stop = evaluate(run, step, result, signals)
            if stop and step > start_step and not save_due:
                saver.save(step, wait=True)
            if stop:
                break
            # once in a while: the curves so far (the master)
            if step and config.plot_every and due(config.plot_every, step, config):
                plot.try_to_plot(config.log_dir, run.ranks.master_process)
            if step == config.max_steps:
                break
            # one update of the weights (all ranks)
            synchronize(device)
            t0 = time.perf_counter()
            first_t0 = first_t0 or t0  # of the first update
            train_loss, norm, finite, stop, save_now = training_step(run, step, batches, signals)
            synchronize(device)
            dt = time.perf_counter() - t0  # seconds
            result["train_loss"], lr = train_loss, get_lr(step, config)
            run.log(step, train=train_loss, lr=lr, norm=norm)
            if not finite:
                bad_steps = report.skipped_update(run, step, train_loss, norm, bad_steps, saver)
                continue
            bad_steps = 0
            if step % max(config.print_every, 1) == 0 or step == config.max_steps - 1:
                seconds_per_step = (time.perf_counter() - first_t0) / (step + 1 - start_step)
                report.update(run, step, train_loss, lr, norm, dt, seconds_per_step)
    batches.close()
    return result | {"step": step, "seconds": time.perf_counter() - start_time, "stopped": stop,
                     "checkpoint": saver.newest}


def main():
    """The command line: make the demo's data if needed, train, say what to do next."""
    set_allocator_defaults()  # before CUDA starts
    Signals.ignore_save_requests()  # there is nothing to save before training starts
    preset, config = presets.parse_command_line(TrainConfig, __doc__)
    if config.check:
        sys.exit(preflight.report_preflight(config, GPTConfig, preset))
    kernels.tune_malloc()
    if preset == "demo" and config.data_dir == presets.DEMO_DATA and cli.env_rank() == 0:
        # under torchrun the other ranks wait for this one where they join the process group
        fineweb.prepare(["builtin"], presets.DEMO_DATA, presets.DEMO_TOKENIZER)
    with distributed.naming_lost_ranks(), report.saying_what_saves_memory():
        result = train(budget.plan(config, setup, training_step))  # as --minutes asks
    distributed.leave_distributed()
    sys.exit(report.end(config, result, presets.AFTER_THE_DEMO if preset == "demo" else None))


if __name__ == "__main__":
    cli.run_main(main, output_may_be_lost=True)
