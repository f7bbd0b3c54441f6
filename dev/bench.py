"""
The speeds this project claims, beside a peer where there is one, measured in one run.

    python bench.py                 # all of them, twenty minutes
    python bench.py data            # text to shards, beside build-nanogpt's way and bare tiktoken
    python bench.py loader          # reading batches, beside a training step
    python bench.py hellaswag       # examples a second, beside scoring them one by one
    python bench.py sample          # tokens a second, beside Hugging Face and CTranslate2
    python bench.py step            # training GPT-2 124M, beside plain PyTorch and Hugging Face
    python bench.py loop            # what an update spends outside of forward and backward
    python bench.py memory          # a long step: seconds and peak memory, beside plain PyTorch

Machines drift, so contenders take turns and medians are compared: the ratios count, not the times.
The last line of the output is JSON.
"""

import copy
import functools
import importlib.util
import json
import math
import mmap
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import fineweb
import train_gpt2
from gpt2lab import kernels, scoring, shards, sources, tasks
from gpt2lab.cli import make_parser, run_main
from gpt2lab.device import flops_per_token, tune_malloc
from gpt2lab.generate import generate
from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

ROOT = Path(__file__).resolve().parent.parent


def take_turns(contenders, rounds=3):
    """Median seconds of each contender, a dict of functions, called in turn `rounds` times."""
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def one_process(start, *args):
    """An executor with one process, in which `start(*args)` is called first."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start, args)


# -----------------------------------------------------------------------------
# data


def real_texts():
    """English documents: FineWeb-EDU's where GPT2_TEST_DATA has some, else the builtin ones."""
    path = Path(os.environ.get("GPT2_TEST_DATA", ".")) / "fineweb_edu_sample.jsonl"
    if path.is_file():
        with open(path, encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]
    return sources.builtin_documents()


def start_worker():
    """Give a worker of the pool its tokenizer."""
    import tiktoken
    start_worker.gpt2 = tiktoken.get_encoding("gpt2")


def tokenize_document(text):
    """One document the way build-nanogpt's workers do it."""
    gpt2 = start_worker.gpt2
    tokens = np.array([gpt2.eot_token, *gpt2.encode_ordinary(text)])
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def pool_pass(path, out):
    """Read jsonl, tokenize in a pool of cpu // 2 processes a document a task, write one shard."""
    with open(path, encoding="utf-8") as file, multiprocessing.Pool(
            max(1, os.cpu_count() // 2), start_worker) as pool:
        texts = (json.loads(line)["text"] for line in file)
        tokens = np.concatenate(list(pool.imap(tokenize_document, texts, chunksize=16)))
    np.save(out / "pool.npy", tokens)


def bench_data():
    """Tokens a second from jsonl to shards, beside build-nanogpt's way and bare tiktoken."""
    import tiktoken
    texts = real_texts()
    texts *= 1 + 52_000_000 // sum(map(len, texts))
    gpt2 = tiktoken.get_encoding("gpt2")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = folder / "texts.jsonl"
        with open(source, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        parquet = folder / "texts.parquet"
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), parquet)
        runs = iter(range(1000))
        corpus = fineweb.Corpus(sources.list_inputs([str(source)], None, "train"), "text", None,
                                prefetch=False)
        pieces, tokenizer = list(corpus.pieces()), Tokenizer("gpt2")
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        medians = take_turns({
            "build-nanogpt's way": lambda: pool_pass(source, folder),
            "bare tiktoken": lambda: gpt2.encode_ordinary_batch(texts, num_threads=os.cpu_count()),
            "fineweb.py, jsonl": lambda: fineweb.prepare([source], folder / str(next(runs))),
            "fineweb.py, parquet": lambda: fineweb.prepare([parquet], folder / str(next(runs))),
            "fineweb.py, bpe:8192": lambda: fineweb.prepare(
                [source], folder / str(next(runs)), "bpe:8192"),
            "reading jsonl alone": lambda: deque(corpus.pieces(), 0),
            "tokenizing alone": lambda: deque(
                fineweb.tokenize(pieces, tokenizer, os.cpu_count()), 0)})
        splits = shards.read_meta(folder / "0")["splits"]
    num_tokens = sum(split["tokens"] for split in splits.values())
    print(f"{megabytes:.0f} MB, {num_tokens / 1e6:.1f} M tokens, {os.cpu_count()} cores")
    pool, bare = medians["build-nanogpt's way"], medians["bare tiktoken"]
    for name, seconds in medians.items():
        print(f"{name:20} {seconds:6.2f} s {megabytes / seconds:6.1f} MB/s "
              f"{pool / seconds:5.2f} x build-nanogpt {bare / seconds:5.2f} x tiktoken")
    return {"mb": megabytes, "tokens": num_tokens, "seconds": medians}


# -----------------------------------------------------------------------------
# loader


def resident_mb():
    """Resident memory of this process now, in MB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 2**20


def bench_loader():
    """Opening a shard of 100M tokens, and a batch beside a training step of GPT-2 124M."""
    B, T = 4, 128
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for split, index, size in (("val", 0, 10_000), ("train", 1, 100_000_000)):
            tokens = np.random.default_rng(0).integers(0, 50_256, size, dtype=np.uint16)
            np.save(folder / shards.shard_name(split, index), tokens)
        del tokens
        before = resident_mb()
        loader = None

        def open_and_read():
            nonlocal loader
            loader = train_gpt2.DataLoaderLite(folder, "train", B, T)
            loader.batch(0)

        opening = take_turns({"open": open_and_read})["open"]
        grown = resident_mb() - before
        steps = iter(range(1, 1000))
        torch.manual_seed(0)
        model = train_gpt2.GPT(train_gpt2.GPTConfig())
        optimizer = model.configure_optimizers(0.1, 6e-4)

        def step():
            _, loss = model(*loader.batch(0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = take_turns({"batch": lambda: loader.batch(next(steps)), "step": step}, 5)
    share = seconds["batch"] / seconds["step"]
    print(f"open 100M tokens and read a batch: {1000 * opening:.1f} ms, +{grown:.1f} MB resident")
    print(f"a batch of {B} x {T}: {1000 * seconds['batch']:.2f} ms, {share:.3%} of a 124M step")
    return {"open_seconds": opening, "resident_mb": grown, "batch_share_of_step": share}


# -----------------------------------------------------------------------------
# sampling: random GPT-2 124M weights, 64 new tokens, top_k 50, on the CPU

NEW_TOKENS = 64
PROMPT = list(range(100, 108))  # of 8 tokens


def save_random_gpt2(folder):
    """Random GPT-2 124M weights and a small tokenizer, as a Hugging Face folder; -> the model."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    model.save_pretrained(folder)
    # a small tokenizer, padded with tokens that no text becomes to the size of GPT-2's
    bpe = json.loads(train_bpe([fineweb.__doc__], 300).model)
    bpe["model"]["vocab"] |= {f"unused{i}": i for i in range(299, 50256)}
    bpe["added_tokens"][0]["id"] = 50256
    path = Path(folder) / "tokenizer.json"
    path.write_text(json.dumps(bpe), encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    PreTrainedTokenizerFast(tokenizer_file=str(path), **special).save_pretrained(folder)
    return model


def our_sampler(folder, dtype):
    """A function of the number of rows that samples with sample.py, as its command line would."""
    model = train_gpt2.load_model(folder).to(dtype)
    packed = copy.deepcopy(model)
    kernels.prepack(packed)

    def run(rows):
        texts = generate(packed if rows > 1 else model, PROMPT, 50256, 50257, rows,
                                NEW_TOKENS, top_k=50, ignore_eot=True)
        assert [len(text) for text in texts] == [NEW_TOKENS] * rows
    return run


def hf_sampler(model):
    """The same with Hugging Face's generate."""
    def run(rows):
        with torch.inference_mode():
            texts = model.generate(torch.tensor([PROMPT] * rows), do_sample=True, top_k=50,
                                   min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
                                   attention_mask=torch.ones(rows, len(PROMPT)), pad_token_id=50256)
        assert texts.shape == (rows, len(PROMPT) + NEW_TOKENS)
    return run


def load_ctranslate2(folder, threads):
    """In the process of its own that CTranslate2 has: its threads slow down torch's in one."""
    global generator, vocabulary
    import ctranslate2
    out = Path(folder) / "ctranslate2"
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(out))
    generator = ctranslate2.Generator(str(out), intra_threads=threads)
    vocabulary = json.loads((out / "vocabulary.json").read_text(encoding="utf-8"))


def run_ctranslate2(rows):
    """Sample in that process."""
    texts = generator.generate_batch(
        [[vocabulary[i] for i in PROMPT]] * rows, sampling_topk=50, min_length=NEW_TOKENS,
        max_length=NEW_TOKENS, include_prompt_in_result=False)
    assert [len(text.sequences_ids[0]) for text in texts] == [NEW_TOKENS] * rows


def ctranslate2_sampler(folder):
    """The same with CTranslate2; None where it is not installed."""
    if importlib.util.find_spec("ctranslate2") is None:
        return None
    pool = one_process(load_ctranslate2, folder, torch.get_num_threads())
    return lambda rows: pool.submit(run_ctranslate2, rows).result()


def first_token_command(folder):
    """{name: command line} that prints one token and leaves: ours and Hugging Face's pipeline."""
    theirs = ("from transformers import pipeline; "
              f"print(pipeline('text-generation', {str(folder)!r})('def', max_new_tokens=1))")
    return {"sample.py": [sys.executable, "sample.py", "--model", str(folder), "--prompt", "def",
                          "--max_new_tokens", "1", "--num_samples", "1", "--device", "cpu"],
            "Hugging Face pipeline": [sys.executable, "-c", theirs]}


def bench_sample():
    """Tokens a second at 1, 4 and 16 rows, and seconds from the command to its first token."""
    with tempfile.TemporaryDirectory() as folder:
        hf = hf_sampler(save_random_gpt2(folder))
        ours = our_sampler(folder, torch.float32)
        samplers = {"Hugging Face": hf, "sample.py": ours,
                    "sample.py bfloat16": our_sampler(folder, torch.bfloat16),
                    "CTranslate2": ctranslate2_sampler(folder)}
        samplers = {name: run for name, run in samplers.items() if run}
        for run in samplers.values():
            run(1)  # warms up
        result = {}
        for rows in (1, 4, 16):
            contenders = {name: functools.partial(run, rows) for name, run in samplers.items()
                          if rows == 1 or "bfloat16" not in name}
            for name, seconds in take_turns(contenders).items():
                result[f"{name}, {rows} rows"] = rows * NEW_TOKENS / seconds
                against = result[f"{name}, {rows} rows"] / result[f"Hugging Face, {rows} rows"]
                print(f"{rows:3d} rows  {name:20s} {result[f'{name}, {rows} rows']:7.1f} tokens/s"
                      f"  {against:5.2f} x Hugging Face", flush=True)
        commands = {name: functools.partial(subprocess.run, command, check=True, cwd=ROOT,
                                            capture_output=True)
                    for name, command in first_token_command(folder).items()}
        for name, seconds in take_turns(commands).items():
            result[f"first token, {name}, seconds"] = seconds
            print(f"first token  {name:22s} {seconds:6.2f} s", flush=True)
    return result


# -----------------------------------------------------------------------------
# HellaSwag


def be_plain():
    """Undo in this process what the model does for speed and memory: it is the lecture's then."""
    kernels.ONEDNN_MIN_NUMEL = math.inf
    train_gpt2.gelu_linear = lambda x, *args: F.linear(F.gelu(x, approximate="tanh"), *args)


def start_scorer(name):
    """The model, in a process of its own, as hellaswag.py has it or as build-nanogpt has it."""
    global model, tokenizer
    if name == "now":
        tune_malloc()
    else:
        be_plain()
    tokenizer = Tokenizer("gpt2")
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig())


def score_singly(examples):
    """Summed losses of each example's endings, by the plain definition."""
    from tests.one_by_one import score_one_by_one
    return [score_one_by_one(model, tokenizer, example)[0] for example in examples]


def score_now(examples):
    """The same, by hellaswag.py."""
    rows = {}
    scoring.evaluate(model, tokenizer, examples, "cpu", on_result=rows.__setitem__)
    return [rows[i]["loss_sums"] for i in range(len(examples))]


def hellaswag_gflop(rendered):
    """Billions of operations that the matrices of GPT-2 124M cost to score a list of Rendered."""
    trees = [scoring.build_prefix_tree(r) for r in rendered]
    nodes = sum(len(tree.tokens) for tree in trees)
    sources = sum(len({node for node, _, _ in tree.scored}) for tree in trees)
    return 2 * (nodes * 12 * 12 * 768**2 + sources * 50_257 * 768) / 1e9


def bench_hellaswag(groups=4, size=12):
    """HellaSwag with an untrained GPT-2 124M on the CPU, beside scoring one example at a time."""
    folder = os.environ.get("GPT2_TEST_DATA")
    path = Path(folder) / "hellaswag_val_402.jsonl" if folder else tasks.download()
    examples = list(tasks.iterate_examples(path))
    rendered = tasks.render_examples(examples, Tokenizer("gpt2"), 1024)
    order = sorted(
        range(len(examples)), key=lambda i: len(scoring.build_prefix_tree(rendered[i]).tokens))
    # several lengths, neighbours of each: as in the whole set, a batch holds equals in length
    middles = [round((i + 0.5) / groups * len(examples)) for i in range(groups)]
    scorers = {"one by one": score_singly, "now": score_now}
    pools = {name: one_process(start_scorer, name) for name in scorers}
    seconds, differences, rates, gflop = dict.fromkeys(scorers, 0.0), [], [], 0.0
    for middle in middles:
        numbers, sums = order[middle - size // 2:][:size], {}
        group = [examples[i] for i in numbers]

        def score(name, group=group, sums=sums):
            sums[name] = pools[name].submit(scorers[name], group).result()

        score("one by one")  # warms up
        score("now")
        medians = take_turns({"sgemm": lambda: rates.append(sgemm_gflops()), **{
            name: functools.partial(score, name) for name in scorers}})
        seconds = {name: seconds[name] + medians[name] for name in scorers}
        differences.append(np.abs(np.subtract(*sums.values())).max())
        gflop += hellaswag_gflop([rendered[i] for i in numbers])
    for pool in pools.values():
        pool.shutdown()
    n, ratio = size * groups, seconds["one by one"] / seconds["now"]
    for name, value in seconds.items():
        print(f"{name:10}  {n / value:5.2f} examples/s, {value / n * 10_042 / 3600:.2f} hours for "
              f"10,042")
    share = gflop / seconds["now"] / statistics.median(rates)
    print(f"{ratio:.2f} times as fast, {share:.1%} of sgemm ({statistics.median(rates):.0f} "
          f"GFLOP/s); summed losses differ by at most {max(differences):.1e}")
    return {"examples": n, "ratio": ratio, "share_of_sgemm": share,
            "largest_difference": float(max(differences)),
            **{f"examples_per_sec, {name}": n / value for name, value in seconds.items()}}


# -----------------------------------------------------------------------------
# the training step: GPT-2 124M in float32, random tokens, clipping and optimizer included


def plain_contender():
    """(model, loss function, optimizer) as build-nanogpt has them without a GPU."""
    be_plain()
    model = train_gpt2.GPT(train_gpt2.GPTConfig())
    groups = [{key: group[key] for key in ("params", "weight_decay")}
              for group in model.configure_optimizers(0.1, 6e-4).param_groups]

    def loss(x, y):
        logits = model.lm_head(model.hidden(x))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    return model, loss, torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=False)


def hf_contender():
    """The same with Hugging Face's model."""
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    return model, lambda x, y: model(x, labels=x).loss, torch.optim.AdamW(model.parameters(), 6e-4)


def our_contender():
    """The same with train_gpt2.py."""
    tune_malloc()
    model = train_gpt2.GPT(train_gpt2.GPTConfig())
    return model, lambda x, y: model(x, y)[1], model.configure_optimizers(0.1, 6e-4)


CONTENDERS = {"plain": plain_contender, "Hugging Face": hf_contender, "ours": our_contender}


def start_contender(name):
    """In its own process, since how the C library keeps memory is a matter of a whole process."""
    global model, loss_function, optimizer
    torch.manual_seed(0)
    model, loss_function, optimizer = CONTENDERS[name]()


def run_micro_step(B, T):
    """Forward and backward in that process."""
    rows = torch.randint(50257, (B, T + 1), generator=torch.Generator().manual_seed(0))
    (loss_function(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) / 4).backward()


def run_update():
    """Clipping and the optimizer's step in that process."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def peak_mb():
    """The most memory that was ever resident in that process, in MB (Linux)."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sgemm_gflops(size=2048):
    """Billions of float32 operations a second in a product of two square matrices."""
    a, b = torch.randn(2, size, size)
    a @ b
    return 2 * size**3 / take_turns({"a @ b": lambda: a @ b}, 9)["a @ b"] / 1e9


def bench_step(B=4, T=128, micro_steps=4):
    """Tokens a second of an update of 4 micro-steps of 4 x 128 tokens, and the share of sgemm."""
    shape = train_gpt2.GPTConfig()
    pools = {name: one_process(start_contender, name) for name in CONTENDERS}
    rates = []

    def wait_for(pool, function, *args):
        pool.submit(function, *args).result()

    # turns of a micro-step: the shorter they are, the less it matters what else the machine does
    contenders = {("sgemm", 0): lambda: rates.append(sgemm_gflops())}
    for i in range(micro_steps):
        contenders |= {(name, i): functools.partial(wait_for, pool, run_micro_step, B, T)
                       for name, pool in pools.items()}
    contenders |= {(name, "update"): functools.partial(wait_for, pool, run_update)
                   for name, pool in pools.items()}
    take_turns(contenders, 1)  # warms up: after a whole update, memory has come to its size
    rates.clear()
    turns = take_turns(contenders)
    seconds = {name: sum(turns[name, i] for i in (*range(micro_steps), "update"))
               for name in CONTENDERS}
    peaks = {name: pool.submit(peak_mb).result() for name, pool in pools.items()}
    for pool in pools.values():
        pool.shutdown()
    sgemm, tokens = statistics.median(rates), B * T * micro_steps
    print(f"sgemm {sgemm:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    result = {"sgemm_gflops": sgemm}
    for name in CONTENDERS:
        rate = tokens / seconds[name]
        share = rate * flops_per_token(124_475_904, shape, T) / 1e9 / sgemm
        ratio = seconds["plain"] / seconds[name]
        result[name] = {"tokens_per_sec": rate, "times_plain": ratio, "share_of_sgemm": share,
                        "peak_mb": peaks[name]}
        print(f"{name:12} {rate:6.1f} tokens/s {ratio:5.2f} x plain {share:6.1%} of sgemm "
              f"{peaks[name]:6.0f} MB")
    return result


def bench_memory(B=8, T=1024):
    """Seconds and peak memory of an update of 8 x 1024 tokens at once."""
    result = {}
    for name in ("plain", "ours"):
        with one_process(start_contender, name) as pool:
            pool.submit(run_micro_step, 1, 16).result()
            pool.submit(run_update).result()  # the optimizer's state is there
            start = time.perf_counter()
            pool.submit(run_micro_step, B, T).result()
            pool.submit(run_update).result()
            seconds = time.perf_counter() - start
            result[name] = {"seconds": seconds, "peak_mb": pool.submit(peak_mb).result()}
        share = result[name]["peak_mb"] / result["plain"]["peak_mb"]
        print(f"{name:6} {seconds:6.1f} s {result[name]['peak_mb']:6.0f} MB, {share:.2f} x plain",
              flush=True)
    return result


# -----------------------------------------------------------------------------
# the rest of the loop


def bench_loop(updates=4):
    """What a 124M update spends beside forward and backward: loader, optimizer, log, agreement."""
    tokens = Tokenizer("gpt2").encode("\n".join(real_texts())[:4_000_000])
    inside, shares = [0.0], []

    def timed(function):
        def wrapper(*args):
            start = time.perf_counter()
            result = function(*args)
            inside[0] += time.perf_counter() - start
            return result
        return wrapper

    with tempfile.TemporaryDirectory() as folder:
        for index, split in enumerate(shards.SPLITS):
            np.save(Path(folder) / f"edufineweb_{split}_{index:06d}.npy", np.uint16(tokens))
        run = train_gpt2.set_up(train_gpt2.TrainConfig(
            data_dir=folder, log_dir=folder, B=4, T=128, total_batch_size=2048, hellaswag_every=0,
            device="cpu", dtype="float32"))
        backward, run.model = torch.Tensor.backward, timed(run.model)
        torch.Tensor.backward = timed(backward)
        try:
            batches = run.train_loader.batches(0, run.ranks.device)
            for step in range(updates + 1):
                inside[0], start = 0.0, time.perf_counter()
                loss, norm, *_ = train_gpt2.update(run, step, batches, train_gpt2.Signals())
                run.log(step, train=loss, lr=train_gpt2.get_lr(step, run.config), norm=norm)
                seconds = time.perf_counter() - start
                shares.append(1 - inside[0] / seconds)
        finally:
            torch.Tensor.backward = backward
        batches.close()
    share = statistics.median(shares[1:])  # the first one allocates
    print(f"an update of 2,048 tokens takes {seconds:.1f} s, {share:.1%} of it outside of forward "
          f"and backward")
    return {"share": share, "all": shares[1:]}


# name on the command line: function that prints a table and returns plain values
BENCHES = {"data": bench_data, "loader": bench_loader, "hellaswag": bench_hellaswag,
           "sample": bench_sample, "step": bench_step, "memory": bench_memory,
           "loop": bench_loop}


def main():
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("which", nargs="?", choices=tuple(BENCHES), help="all, if left out")
    args = parser.parse_args()
    results = {}
    for name in [args.which] if args.which else BENCHES:
        print(f"-- {name}", flush=True)
        results[name] = BENCHES[name]()
    print(json.dumps(results))


if __name__ == "__main__":
    run_main(main)
