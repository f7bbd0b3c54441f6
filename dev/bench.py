"""
Measures the speeds that this project claims, each beside a peer where there is one, in one run.

    python -m dev.bench             # all that this machine can run, twenty minutes without a GPU
    python -m dev.bench data        # text to shards, beside build-nanogpt's way and bare tiktoken
    python -m dev.bench loader      # reading a batch, beside a training step
    python -m dev.bench hellaswag   # examples a second, beside scoring them one by one
    python -m dev.bench evaluate    # CORE's examples a second, beside nanochat's way
    python -m dev.bench sample      # tokens a second, beside Hugging Face and CTranslate2
    python -m dev.bench step        # training GPT-2 124M, beside plain PyTorch and Hugging Face
    python -m dev.bench loop        # what an update spends outside of forward and backward
    python -m dev.bench save        # how long saving 124M stops training, and what it slows down
    python -m dev.bench memory      # a long step: seconds and peak memory, beside plain PyTorch
    python -m dev.bench gpu         # training on a CUDA device, beside plain PyTorch; losses

Start it in the project's root. The speed of a machine drifts, so the contenders take turns, and
their medians are compared: trust the ratios more than the times. The last line of the output is
JSON.
"""

import contextlib
import copy
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import deque
from pathlib import Path

import numpy as np
import torch

import fineweb
import train_gpt2
from dev.bench_evaluate import bench_evaluate
from dev.bench_gpu import bench_gpu
from dev.bench_run import bench_loop, bench_save
from dev.measure import (
    RemoteObject,
    english_texts,
    median_seconds,
    peak_mb,
    resident_mb,
    sgemm_gflops,
)
from gpt2lab import kernels, scoring, shards, sources, tasks
from gpt2lab.cli import make_parser, run_main
from gpt2lab.device import autocast, cpu_bfloat16, flops_per_token
from gpt2lab.distributed import Ranks
from gpt2lab.generate import generate
from gpt2lab.tokenizer import END_OF_TEXT, GPT2_EOT, GPT2_VOCAB_SIZE, Tokenizer, train_bpe

ROOT = Path(__file__).resolve().parent.parent


# -----------------------------------------------------------------------------
# data


class BuildNanogpt:
    """
    build-nanogpt's way from text to a shard: a pool of cpu_count // 2 processes, in which each task
    is one document.
    """

    encoding = None  # tiktoken's gpt2, in each process of the pool

    @classmethod
    def load_encoding(cls):
        """Load gpt2. This runs once in each process of the pool."""
        import tiktoken
        cls.encoding = tiktoken.get_encoding("gpt2")

    @classmethod
    def tokenize(cls, text):
        """The tokens of one document, uint16. This runs in a process of the pool."""
        tokens = np.array([cls.encoding.eot_token, *cls.encoding.encode_ordinary(text)])
        assert (tokens >= 0).all() and (tokens < 2**16).all()
        return tokens.astype(np.uint16)

    @classmethod
    def write_shard(cls, jsonl, path):
        """Tokenize the documents of a jsonl file into one shard."""
        num_processes = max(1, os.cpu_count() // 2)
        with (open(jsonl, encoding="utf-8") as file,
              multiprocessing.Pool(num_processes, cls.load_encoding) as pool):
            texts = (json.loads(line)["text"] for line in file)
            tokens = np.concatenate(list(pool.imap(cls.tokenize, texts, chunksize=16)))
        np.save(path, tokens)


def time_data(texts, folder):
    """({contender: median seconds}, number of tokens) for texts that become shards in `folder`."""
    import pyarrow.parquet
    import tiktoken
    jsonl, parquet = folder / "texts.jsonl", folder / "texts.parquet"
    with open(jsonl, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), parquet)
    gpt2, num_threads = tiktoken.get_encoding("gpt2"), os.cpu_count()
    corpus = fineweb.Corpus(sources.list_inputs([str(jsonl)], None, "train"), "text", None,
                            prefetch=False)
    chunks, tokenizer = list(corpus.chunks()), Tokenizer("gpt2")
    numbers = itertools.count()

    def prepare(source, tokenizer="gpt2"):
        # into a new folder every time, because a folder that is complete stays as it is
        fineweb.prepare([source], folder / f"shards_{next(numbers)}", tokenizer)

    seconds = median_seconds({
        "build-nanogpt's way": lambda: BuildNanogpt.write_shard(jsonl, folder / "pool.npy"),
        "bare tiktoken": lambda: gpt2.encode_ordinary_batch(texts, num_threads=num_threads),
        "fineweb.py, jsonl": lambda: prepare(jsonl),
        "fineweb.py, parquet": lambda: prepare(parquet),
        "fineweb.py, bpe:8192": lambda: prepare(jsonl, "bpe:8192"),
        # a deque of length 0 takes everything from an iterator and keeps nothing
        "reading jsonl alone": lambda: deque(corpus.chunks(), 0),
        "tokenizing alone": lambda: deque(fineweb.tokenize(chunks, tokenizer, num_threads), 0)})
    splits = shards.read_meta(folder / "shards_0")["splits"]  # of the gpt2 tokenizer
    return seconds, sum(split["tokens"] for split in splits.values())


def bench_data():
    """The speed from jsonl to shards, beside build-nanogpt's way and bare tiktoken."""
    texts = english_texts()
    texts *= 1 + 52_000_000 // sum(map(len, texts))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        seconds, num_tokens = time_data(texts, Path(folder))
    print(f"{megabytes:.0f} MB, {num_tokens / 1e6:.1f} M tokens, {os.cpu_count()} cores")
    pool, bare = seconds["build-nanogpt's way"], seconds["bare tiktoken"]
    for name, value in seconds.items():
        print(f"{name:20} {value:6.2f} s {megabytes / value:6.1f} MB/s "
              f"{pool / value:5.2f} x build-nanogpt {bare / value:5.2f} x tiktoken")
    return {"mb": megabytes, "tokens": num_tokens, "seconds": seconds}


# -----------------------------------------------------------------------------
# loader


def write_random_shards(folder, num_tokens):
    """Write a train shard of `num_tokens` random tokens, and a val shard of 10,000."""
    for index, (split, size) in enumerate((("val", 10_000), ("train", num_tokens))):
        tokens = np.random.default_rng(0).integers(0, GPT2_EOT, size, dtype=np.uint16)
        np.save(folder / shards.shard_name(split, index), tokens)


def bench_loader(B=4, T=128, num_tokens=100_000_000):
    """Opening a shard of 100M tokens, and reading a batch beside a training step of GPT-2 124M."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(Path(folder), num_tokens)
        before = resident_mb()

        def open_and_read():
            loader = train_gpt2.DataLoaderLite(folder, "train", B, T)
            loader.batch(0)
            return loader

        opening = median_seconds({"open": open_and_read})["open"]
        loader = open_and_read()
        grown = resident_mb() - before
        steps = itertools.count(1)
        torch.manual_seed(0)
        model = train_gpt2.GPT(train_gpt2.GPTConfig())
        kernels.optimize(model)
        optimizer = model.configure_optimizers(0.1, 6e-4)

        def train_step():
            _, loss = model(*loader.batch(0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = median_seconds(
            {"batch": lambda: loader.batch(next(steps)), "step": train_step}, rounds=5)
    share = seconds["batch"] / seconds["step"]
    print(f"open {num_tokens / 1e6:.0f}M tokens and read a batch: {1000 * opening:.1f} ms, "
          f"+{grown:.1f} MB resident")
    print(f"a batch of {B} x {T}: {1000 * seconds['batch']:.2f} ms, {share:.3%} of a 124M step")
    return {"open_seconds": opening, "resident_mb": grown, "batch_share_of_step": share}


# -----------------------------------------------------------------------------
# sampling: random GPT-2 124M weights, 64 new tokens, top_k 50, on the CPU

NEW_TOKENS = 64
PROMPT = list(range(100, 108))  # 8 tokens


def save_random_gpt2(folder):
    """Save a random GPT-2 124M and a small tokenizer in a folder; returns Hugging Face's model."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    model.save_pretrained(folder)
    # a tokenizer of 300 tokens, padded to the size of GPT-2's with tokens that no text contains
    bpe = json.loads(train_bpe([fineweb.__doc__], 300).model)
    bpe["model"]["vocab"] |= {f"unused{i}": i for i in range(299, GPT2_EOT)}
    bpe["added_tokens"][0]["id"] = GPT2_EOT
    path = Path(folder) / "tokenizer.json"
    path.write_text(json.dumps(bpe), encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    PreTrainedTokenizerFast(tokenizer_file=str(path), **special).save_pretrained(folder)
    return model


class OurSampler:
    """sample.py: optimized layers, and packed ones for several rows."""

    def __init__(self, folder, dtype=torch.float32):
        self.model, _ = train_gpt2.load(folder)
        self.model.to(dtype)
        kernels.optimize(self.model)
        self.packed_model = copy.deepcopy(self.model)
        kernels.prepack(self.packed_model)

    def sample(self, rows):
        """Draw `rows` samples at once."""
        model = self.packed_model if rows > 1 else self.model
        samples = generate(model, PROMPT, GPT2_EOT, GPT2_VOCAB_SIZE, rows, NEW_TOKENS, top_k=50,
                           ignore_eot=True)
        assert [len(tokens) for tokens in samples] == [NEW_TOKENS] * rows


class HuggingFaceSampler:
    """Hugging Face's generate."""

    def __init__(self, model):
        self.model = model

    def sample(self, rows):
        """Draw `rows` samples at once."""
        with torch.inference_mode():
            samples = self.model.generate(
                torch.tensor([PROMPT] * rows), do_sample=True, top_k=50, pad_token_id=GPT2_EOT,
                attention_mask=torch.ones(rows, len(PROMPT)), min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS)
        assert samples.shape == (rows, len(PROMPT) + NEW_TOKENS)


class CTranslate2Sampler:
    """CTranslate2. It needs a process of its own, because its threads slow down torch's."""

    def __init__(self, folder, num_threads):
        import ctranslate2
        out = Path(folder) / "ctranslate2"
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(out))
        self.generator = ctranslate2.Generator(str(out), intra_threads=num_threads)
        vocabulary = json.loads((out / "vocabulary.json").read_text(encoding="utf-8"))
        self.prompt = [vocabulary[i] for i in PROMPT]

    def sample(self, rows):
        """Draw `rows` samples at once."""
        samples = self.generator.generate_batch(
            [self.prompt] * rows, sampling_topk=50, min_length=NEW_TOKENS, max_length=NEW_TOKENS,
            include_prompt_in_result=False)
        assert [len(tokens.sequences_ids[0]) for tokens in samples] == [NEW_TOKENS] * rows


def make_samplers(folder):
    """{contender: function of the number of rows to draw}, of a model that is saved in `folder`."""
    samplers = {"Hugging Face": HuggingFaceSampler(save_random_gpt2(folder)).sample,
                "sample.py": OurSampler(folder).sample,
                "sample.py bfloat16": OurSampler(folder, torch.bfloat16).sample}
    if importlib.util.find_spec("ctranslate2"):
        remote = RemoteObject(CTranslate2Sampler, folder, torch.get_num_threads())
        samplers["CTranslate2"] = functools.partial(remote.call, "sample")
    return samplers


def time_first_token(folder):
    """{contender: median seconds} from a command to the end of its text of one token."""
    pipeline = ("from transformers import pipeline; "
                f"print(pipeline('text-generation', {str(folder)!r})('def', max_new_tokens=1))")
    commands = {
        "sample.py": [sys.executable, "sample.py", "--model", str(folder), "--prompt", "def",
                      "--max_new_tokens", "1", "--num_samples", "1", "--device", "cpu"],
        "Hugging Face pipeline": [sys.executable, "-c", pipeline]}
    return median_seconds({name: functools.partial(subprocess.run, command, check=True, cwd=ROOT,
                                                   capture_output=True)
                           for name, command in commands.items()})


def bench_sample():
    """Tokens a second at 1, 4 and 16 rows, and seconds from the command to its first token."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        samplers = make_samplers(folder)
        for sample in samplers.values():
            sample(1)  # warms up
        for rows in (1, 4, 16):
            seconds = median_seconds({
                name: functools.partial(sample, rows) for name, sample in samplers.items()
                if rows == 1 or "bfloat16" not in name})
            rates = {name: rows * NEW_TOKENS / value for name, value in seconds.items()}
            for name, rate in rates.items():
                result[f"{name}, {rows} rows"] = rate
                print(f"{rows:3d} rows  {name:20s} {rate:7.1f} tokens/s  "
                      f"{rate / rates['Hugging Face']:5.2f} x Hugging Face", flush=True)
        for name, value in time_first_token(folder).items():
            result[f"first token, {name}, seconds"] = value
            print(f"first token  {name:22s} {value:6.2f} s", flush=True)
    return result


# -----------------------------------------------------------------------------
# HellaSwag: an untrained GPT-2 124M on the CPU


class OneByOneScorer:
    """The plain model, which scores one example at a time, as build-nanogpt does."""

    def __init__(self):
        self.tokenizer = Tokenizer("gpt2")
        torch.manual_seed(0)
        self.model = train_gpt2.GPT(train_gpt2.GPTConfig())

    def score(self, examples):
        """The summed losses of each example's endings, (4,) each."""
        from tests.reference import score_one_by_one
        return [score_one_by_one(self.model, self.tokenizer, example)[0] for example in examples]


class OurScorer(OneByOneScorer):
    """hellaswag.py: the optimized model, which scores batches of prefix trees."""

    def __init__(self):
        kernels.tune_malloc()
        super().__init__()
        kernels.optimize(self.model)

    def score(self, examples):
        """The summed losses of each example's endings, four each."""
        results = {}
        ranks = Ranks(torch.device("cpu"))
        prepared = scoring.prepare(self.model, self.tokenizer, examples, ranks)
        scoring.score_hellaswag(self.model, prepared, ranks, on_result=results.__setitem__)
        return [results[i]["loss_sums"] for i in range(len(examples))]


SCORERS = {"one by one": OneByOneScorer, "now": OurScorer}


def hellaswag_gflop(rendered):
    """Billions of operations in the matmuls that score a list of RenderedExamples with 124M."""
    trees = [scoring.build_prefix_tree(*example[:2]) for example in rendered]
    nodes = sum(len(tree.tokens) for tree in trees)
    logit_rows = sum(len({node for node, _, _ in tree.scored}) for tree in trees)
    return 2 * (nodes * 12 * 12 * 768**2 + logit_rows * GPT2_VOCAB_SIZE * 768) / 1e9


def groups_of_similar_length(rendered, num_groups, size):
    """
    Lists of `size` numbers of examples, from short to long ones. The examples of a group have
    similar lengths, as in a batch of the whole set.
    """
    lengths = [len(scoring.build_prefix_tree(*example[:2]).tokens) for example in rendered]
    order = sorted(range(len(rendered)), key=lengths.__getitem__)
    middles = [round((i + 0.5) / num_groups * len(rendered)) for i in range(num_groups)]
    return [order[middle - size // 2:][:size] for middle in middles]


def time_scoring(examples, scorers, rates):
    """
    ({contender: median seconds}, largest difference between the summed losses of the contenders)
    for a group of examples. Appends to `rates` what sgemm_gflops measures in between.
    """
    sums = {}

    def score(name):
        sums[name] = scorers[name].call("score", examples)

    for name in scorers:
        score(name)  # warms up
    seconds = median_seconds({"sgemm": lambda: rates.append(sgemm_gflops()), **{
        name: functools.partial(score, name) for name in scorers}})
    return seconds, np.abs(np.subtract(*sums.values())).max()


class FreeModel:
    """A model that computes nothing, so that scoring with it is the host's work alone."""

    def __init__(self):
        self.config = train_gpt2.GPTConfig()
        self.hidden = None  # which only a GPT has
        embedding = torch.nn.Embedding(self.config.padded_vocab_size, 1)
        layers = dict.fromkeys(("ln_1", "attn", "ln_2", "mlp"), lambda x, mask=None: x)
        self.transformer = types.SimpleNamespace(
            wte=embedding, wpe=embedding, h=[types.SimpleNamespace(**layers)], ln_f=lambda x: x)

    def lm_head(self, rows):
        """Zeros (n, 1)."""
        return rows


def time_host(examples, count=10_042):
    """
    {name: median seconds} to prepare `count` examples, as training does once, and of the host's
    work in each evaluation of them, in batches for a GPU. `examples` are repeated.
    """
    examples = list(itertools.islice(itertools.cycle(examples), count))
    model, tokenizer, ranks = FreeModel(), Tokenizer("gpt2"), Ranks(torch.device("cpu"))
    prepare = functools.partial(
        scoring.prepare, model, tokenizer, examples, ranks, batch_tokens=8192)
    prepared = prepare()
    return median_seconds({"prepare": prepare, "evaluation": functools.partial(
        scoring.score_hellaswag, model, prepared, ranks)})


def bench_hellaswag(num_groups=4, size=12):
    """HellaSwag examples a second, beside scoring one example at a time."""
    folder = os.environ.get("GPT2_TEST_DATA")
    path = Path(folder) / "hellaswag_val_402.jsonl" if folder else tasks.DATA_FILE
    examples = list(tasks.iterate_examples(path))
    rendered = tasks.render_examples(examples, Tokenizer("gpt2"), 1024)
    seconds, differences, rates, gflop = dict.fromkeys(SCORERS, 0.0), [], [], 0.0
    with (RemoteObject(SCORERS["one by one"]) as one_by_one, RemoteObject(SCORERS["now"]) as now):
        scorers = {"one by one": one_by_one, "now": now}
        for numbers in groups_of_similar_length(rendered, num_groups, size):
            medians, difference = time_scoring([examples[i] for i in numbers], scorers, rates)
            seconds = {name: seconds[name] + medians[name] for name in scorers}
            differences.append(difference)
            gflop += hellaswag_gflop([rendered[i] for i in numbers])
    n, ratio = size * num_groups, seconds["one by one"] / seconds["now"]
    for name, value in seconds.items():
        print(f"{name:10}  {n / value:5.2f} examples/s, {value / n * 10_042 / 3600:.2f} hours for "
              f"10,042")
    sgemm = statistics.median(rates)
    share = gflop / seconds["now"] / sgemm
    print(f"{ratio:.2f} times as fast, {share:.1%} of sgemm ({sgemm:.0f} GFLOP/s); summed losses "
          f"differ by at most {max(differences):.1e}")
    host = time_host(examples)
    print(f"the host's work for 10,042 examples in training: {host['prepare']:.1f} s once, "
          f"{host['evaluation']:.2f} s an evaluation")
    return {"examples": n, "ratio": ratio, "share_of_sgemm": share, "host_seconds": host,
            "largest_difference": float(max(differences)),
            **{f"examples_per_sec, {name}": n / value for name, value in seconds.items()}}


# -----------------------------------------------------------------------------
# the training step: GPT-2 124M, random tokens, clipping and optimizer included. In float32, and
# where the CPU multiplies bfloat16 in hardware, also in bfloat16


class Trainer:
    """What all contenders do with the `model` and the `optimizer` that `make` makes."""

    def __init__(self, dtype=torch.float32):
        """`dtype` is that of autocast."""
        self.dtype = dtype
        torch.manual_seed(0)
        self.make()

    def loss(self, x, y):
        """The mean loss of a batch, (B, T) int64 each."""
        return self.model(x, y)[1]

    def run_micro_step(self, B, T):
        """Forward and backward."""
        rows = torch.randint(50257, (B, T + 1), generator=torch.Generator().manual_seed(0))
        with autocast(torch.device("cpu"), self.dtype):
            loss = self.loss(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        (loss / 4).backward()

    def run_update(self):
        """Clipping and the optimizer's step."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_mb(self):
        """The most memory that was ever resident in this process, in MB (Linux)."""
        return peak_mb()


class PlainTrainer(Trainer):
    """
    The GPT of train_gpt2.py, not optimized, and AdamW without its fused kernel, as build-nanogpt
    has them without a GPU.
    """

    def make(self):
        """The model and the optimizer."""
        self.model = train_gpt2.GPT(train_gpt2.GPTConfig())
        groups = [{key: group[key] for key in ("params", "weight_decay")}
                  for group in self.model.configure_optimizers(0.1, 6e-4).param_groups]
        self.optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=False)


class HuggingFaceTrainer(Trainer):
    """Hugging Face's model, with torch's AdamW as it is."""

    def make(self):
        """The model and the optimizer."""
        from transformers import GPT2Config, GPT2LMHeadModel
        self.model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 6e-4)

    def loss(self, x, y):
        """The mean loss of a batch, (B, T) int64 each."""
        return self.model(x, labels=x).loss  # this model shifts the labels itself


class OurTrainer(Trainer):
    """The GPT and the optimizer as train_gpt2.py sets them up."""

    def make(self):
        """The model and the optimizer."""
        kernels.tune_malloc()
        self.model = train_gpt2.GPT(train_gpt2.GPTConfig())
        kernels.optimize(self.model)
        self.optimizer = self.model.configure_optimizers(0.1, 6e-4)
        self.casts = contextlib.ExitStack()  # which holds the context of an update's micro-steps
        self.casts.enter_context(kernels.kept_casts())

    def run_update(self):
        """Clipping and the optimizer's step."""
        self.casts.close()
        super().run_update()
        self.casts.enter_context(kernels.kept_casts())


TRAINERS = {"plain": PlainTrainer, "Hugging Face": HuggingFaceTrainer, "ours": OurTrainer}
BFLOAT16_TRAINERS = {"plain, bfloat16": PlainTrainer, "ours, bfloat16": OurTrainer}


def time_updates(B, T, micro_steps):
    """
    ({contender: seconds of an update}, {contender: peak MB}, GFLOP/s of sgemm). A turn is a single
    micro-step: the shorter the turns, the less it matters what else the machine does.
    """
    trainers = {name: RemoteObject(cls) for name, cls in TRAINERS.items()}
    fast, reason = cpu_bfloat16()
    if fast:
        trainers |= {name: RemoteObject(cls, torch.bfloat16)
                     for name, cls in BFLOAT16_TRAINERS.items()}
    else:
        print(f"bfloat16 is left out, because {reason}")
    rates = []
    turns = {("sgemm", 0): lambda: rates.append(sgemm_gflops())}
    for i in range(micro_steps):
        turns |= {(name, i): functools.partial(trainer.call, "run_micro_step", B, T)
                  for name, trainer in trainers.items()}
    turns |= {(name, "update"): functools.partial(trainer.call, "run_update")
              for name, trainer in trainers.items()}
    median_seconds(turns, rounds=1)  # warms up: memory has its full size after a whole update
    rates.clear()
    medians = median_seconds(turns)
    seconds = {name: sum(medians[name, i] for i in (*range(micro_steps), "update"))
               for name in trainers}
    peaks = {name: trainer.call("peak_mb") for name, trainer in trainers.items()}
    for trainer in trainers.values():
        trainer.pool.shutdown()
    return seconds, peaks, statistics.median(rates)


def bench_step(B=4, T=128, micro_steps=4):
    """
    Tokens a second of an update of 4 micro-steps of 4 x 128 tokens, the share of sgemm, and what
    bfloat16 gains over float32 and over plain PyTorch in bfloat16.
    """
    seconds, peaks, sgemm = time_updates(B, T, micro_steps)
    print(f"sgemm {sgemm:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    result = {"sgemm_gflops": sgemm}
    for name in seconds:
        rate = B * T * micro_steps / seconds[name]
        flops = rate * flops_per_token(124_475_904, train_gpt2.GPTConfig(), T)
        share = flops / 1e9 / sgemm
        ratio = seconds["plain"] / seconds[name]
        result[name] = {"tokens_per_sec": rate, "times_plain": ratio, "share_of_sgemm": share,
                        "peak_mb": peaks[name]}
        print(f"{name:15} {rate:6.1f} tokens/s {ratio:5.2f} x plain {share:6.1%} of sgemm "
              f"{peaks[name]:6.0f} MB")
    name = "ours, bfloat16"
    for other in ("ours", "plain", "plain, bfloat16") if name in seconds else ():
        result[f"{name} / {other}"] = ratio = seconds[other] / seconds[name]
        print(f"{name} is {ratio:.2f} x as fast as {other}, and needs "
              f"{peaks[name] / peaks[other]:.2f} x its peak memory")
    return result


def bench_memory(B=8, T=1024):
    """Seconds and peak memory of an update of 8 x 1024 tokens at once."""
    result = {}
    for name in ("plain", "ours"):
        with RemoteObject(TRAINERS[name]) as trainer:
            trainer.call("run_micro_step", 1, 16)
            trainer.call("run_update")  # now the optimizer has its state
            start = time.perf_counter()
            trainer.call("run_micro_step", B, T)
            trainer.call("run_update")
            seconds = time.perf_counter() - start
            result[name] = {"seconds": seconds, "peak_mb": trainer.call("peak_mb")}
        share = result[name]["peak_mb"] / result["plain"]["peak_mb"]
        print(f"{name:6} {seconds:6.1f} s {result[name]['peak_mb']:6.0f} MB, {share:.2f} x plain",
              flush=True)
    return result


# -----------------------------------------------------------------------------
# the command line

# name on the command line: function that prints a table and returns plain values
BENCHES = {"data": bench_data, "loader": bench_loader, "hellaswag": bench_hellaswag,
           "evaluate": bench_evaluate, "sample": bench_sample, "step": bench_step,
           "memory": bench_memory, "loop": bench_loop, "save": bench_save, "gpu": bench_gpu}


def main():
    """Run one benchmark or all of them."""
    parser = make_parser(__doc__, prog="python -m dev.bench")
    parser.add_argument("name", nargs="?", choices=tuple(BENCHES),
                        help="the benchmark to run (default: all; gpu only where there is one)")
    args = parser.parse_args()
    names = [args.name] if args.name else list(BENCHES)
    if not args.name and not torch.cuda.is_available():
        names.remove("gpu")
    results = {}
    for name in names:
        print(f"-- {name}", flush=True)
        results[name] = BENCHES[name]()
    print(json.dumps(results))


if __name__ == "__main__":
    run_main(main)
