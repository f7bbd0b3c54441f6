"""
Sampling: the KV cache changes nothing, samples do not depend on each other, and tokens are drawn
from the distribution that the options describe.
"""

import copy
import io
import json
import os
import re
import select
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_flags, run_script
from transformers import GPT2Config, GPT2LMHeadModel

import sample
from gpt2lab import kernels
from gpt2lab.checkpoints import default_source
from gpt2lab.cli import UserError
from gpt2lab.generate import KVCache, generate, sample_token, topk_lower_bound
from sample import TextStream
from train_gpt2 import GPT, GPTConfig, load


@pytest.fixture(scope="module")
def model():
    """A GPT with random weights, 100 tokens (none is end-of-text) and a context of 32."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=100, n_layer=3, n_head=4, n_embd=64))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)  # so that some tokens are much likelier than others
    return model


def new_rng():
    """A generator with the same seed every time."""
    return np.random.default_rng(0)


# the KV cache


@torch.inference_mode()
def test_cached_greedy_text_equals_uncached(model):
    prompt = [5, 17, 3]
    tokens = list(prompt)
    while len(tokens) < 32:
        logits, _ = model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1, :100].argmax()))
    assert len(set(tokens[3:])) > 3  # repeating a single token would prove nothing
    row, = generate(model, prompt, 99, 100, max_new_tokens=29, temperature=0)
    expected = tokens[3:]
    assert row == (expected[:expected.index(99)] if 99 in expected else expected)


@torch.inference_mode()
@pytest.mark.parametrize("chunks", [[32], [31, 1], [1] * 32, [5, 20, 7], [16, 16]])
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole_prompt(model, chunks):
    idx = torch.randint(100, (2, 32))
    whole, _ = model(idx)
    cache = KVCache(model, 2, 32)
    parts = [model(part, kv_cache=cache)[0] for part in idx.split(chunks, dim=1)]
    assert cache.length == 32
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=2e-4)


@torch.inference_mode()
def test_packed_matmuls_equal_plain_ones(model, onednn_at_any_size):
    packed = copy.deepcopy(model)
    kernels.prepack(packed)
    if not kernels.have_onednn():
        pytest.skip("packing is for x86 CPUs with oneDNN")
    assert isinstance(packed.lm_head, kernels.PackedLinear)
    for shape in ((1, 1), (1, 32), (4, 1), (16, 20)):
        idx = torch.randint(100, shape)
        assert torch.allclose(packed(idx)[0], model(idx)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not kernels.have_onednn(), reason="packing is for x86 CPUs with oneDNN")
@pytest.mark.parametrize("flags, packed", [
    (["--num_samples", "1"], False), (["--num_samples", "2"], True), (["--interactive"], False)])
def test_a_model_is_packed_only_for_several_rows(
        log_dir, onednn_at_any_size, monkeypatch, flags, packed):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(log_dir), "--device", "cpu",
                                      *flags])
    model, _ = sample.load_for_sampling(sample.parse_args())
    assert isinstance(model.lm_head, kernels.PackedLinear) == packed


def test_half_precision_is_not_packed(model, onednn_at_any_size):
    half = copy.deepcopy(model).to(torch.bfloat16)
    kernels.prepack(half)
    assert isinstance(half.lm_head, torch.nn.Linear)
    # the KV cache has the dtype of the weights, or this would raise
    row, = generate(half, [3], 100, 100, max_new_tokens=40)
    assert len(row) == 40


def test_the_model_compiles_to_whole_graphs_for_any_length(model):
    torch._dynamo.reset()  # so that the graphs of other tests do not count as recompiles
    plain = generate(model, [1, 2, 3], 100, 100, num_samples=2, max_new_tokens=50)
    compiled = copy.deepcopy(model)
    # the backend "eager" needs no C++ compiler. The fault was in tracing, which broke the graph or
    # started again for every token
    compiled.forward = torch.compile(compiled.forward, dynamic=True, fullgraph=True,
                                     backend="eager")
    # three graphs: for the prompt, for one token, and for the window past the context
    with torch._dynamo.config.patch(recompile_limit=3):
        assert generate(compiled, [1, 2, 3], 100, 100, num_samples=2, max_new_tokens=50) == plain


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """(folder, model): a random GPT-2 of Hugging Face, saved in that folder."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("hf")
    hf = GPT2LMHeadModel(GPT2Config(n_positions=64, vocab_size=101, n_layer=3, n_head=4, n_embd=64,
                                    eos_token_id=100, initializer_range=0.2)).eval()
    hf.save_pretrained(folder)
    return folder, hf


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("packed", [False, True])
def test_greedy_text_equals_hugging_face(hf_folder, packed, penalty, onednn_at_any_size):
    folder, hf = hf_folder
    model = GPT.from_pretrained(folder)
    if packed:
        kernels.prepack(model)
    expected = hf.generate(torch.tensor([[5, 17, 3]]), do_sample=False, max_new_tokens=50,
                           min_new_tokens=50, repetition_penalty=penalty, pad_token_id=100,
                           attention_mask=torch.ones(1, 3))[0, 3:].tolist()
    row, = generate(model, [5, 17, 3], 100, 100, max_new_tokens=50, temperature=0,
                    repetition_penalty=penalty)
    assert len(set(row)) > 5
    assert row == expected


def test_a_sample_can_be_longer_than_the_context(model):
    prompt = [1, 2, 3]
    rows = generate(model, prompt, 100, 100, num_samples=2, max_new_tokens=100)
    assert [len(row) for row in rows] == [100, 100]
    # token 32 is drawn after the full window of 32 tokens, the next one after its newer half
    tokens = prompt + rows[1]
    for window, chosen in ((tokens[:32], tokens[32]), (tokens[17:33], tokens[33])):
        logits, _ = model(torch.tensor([window]))
        rng = np.random.default_rng([42, 1])
        rng.random(tokens.index(chosen, 32) - 3)  # skips the numbers that earlier tokens took
        assert sample_token(logits[0, -1, :100].detach().numpy(), rng) == chosen
    # a prompt longer than the context loses its beginning
    long = list(range(50))
    assert generate(model, long, 100, 100, max_new_tokens=5) == generate(
        model, long[-32:], 100, 100, max_new_tokens=5)


# several samples


def test_samples_differ_from_the_first_token_and_do_not_depend_on_each_other(model):
    rows = generate(model, [7], 100, 100, num_samples=16, max_new_tokens=8, temperature=1.5)
    assert len({row[0] for row in rows}) > 3
    for n in (1, 3):
        assert generate(model, [7], 100, 100, num_samples=n, max_new_tokens=8,
                        temperature=1.5) == rows[:n]
    assert rows != generate(model, [7], 100, 100, num_samples=16, max_new_tokens=8,
                            temperature=1.5, seed=1)


def test_a_sample_ends_at_end_of_text_and_the_others_continue(model):
    free = generate(model, [7], 100, 100, num_samples=4, max_new_tokens=20)
    eot = free[0][5]
    rows = generate(model, [7], eot, 100, num_samples=4, max_new_tokens=20)
    assert rows == [row[:row.index(eot)] if eot in row else row for row in free]


def test_samples_that_end_do_not_change_the_others_past_the_context(model):
    free = generate(model, [7], 100, 100, num_samples=3, max_new_tokens=90)
    lengths = {1: 10, 0: 50}  # sample: after how many tokens to end it
    calls = []

    def on_token(i, token):
        calls.append((i, token))
        return sum(row == i for row, _ in calls) == lengths.get(i)

    rows = generate(model, [7], 100, 100, num_samples=3, max_new_tokens=90, on_token=on_token)
    assert rows == [free[0][:50], free[1][:10], free[2]]
    assert [[token for row, token in calls if row == i] for i in range(3)] == rows


def test_end_of_text_can_be_ignored(model):
    free = generate(model, [7], 100, 100, max_new_tokens=20)
    eot = free[0][5]
    assert generate(model, [7], eot, 100, max_new_tokens=20, ignore_eot=True) == free
    tokens = []
    generate(model, [7], eot, 100, max_new_tokens=20,
             on_token=lambda i, token: tokens.append(token))
    assert tokens == [*free[0][:free[0].index(eot)], None]


def test_ids_past_the_vocabulary_are_never_drawn(model):
    biased = GPT(model.config)
    with torch.no_grad():
        biased.lm_head.weight[100:] = 100 * torch.randn(28, 64)  # makes the padding likeliest
    logits, _ = biased(torch.tensor([[1]]))
    assert logits[0, 0].argmax() >= 100
    for temperature in (0, 1, 50):
        rows = generate(biased, [1], 99, 100, 8, max_new_tokens=10, temperature=temperature)
        assert max(max(row, default=0) for row in rows) < 100


def test_an_empty_prompt_starts_from_end_of_text(model):
    assert generate(model, [], 99, 100) == generate(model, [99], 99, 100)


# one token


def test_sample_token_follows_the_distribution():
    probs = np.array([0.5, 0.2, 0.2, 0.1])
    rng = new_rng()
    draws = [sample_token(np.log(probs), rng) for _ in range(4000)]
    assert np.bincount(draws, minlength=4) / 4000 == pytest.approx(probs, abs=0.03)


@pytest.mark.parametrize("options, allowed", [
    ({"temperature": 0}, {1}), ({"top_k": 1}, {1}), ({"top_k": 2}, {1, 3}), ({"top_p": 0}, {1}),
    ({"top_p": 0.5}, {1}), ({"top_p": 0.6}, {1, 3}), ({"top_p": 1.0}, {0, 1, 2, 3}),
    ({"top_k": 0}, {0, 1, 2, 3}), ({"top_k": 99}, {0, 1, 2, 3}), ({"temperature": 1e-4}, {1}),
    ({"top_k": 3, "top_p": 0.99}, {0, 1, 3})])
def test_sample_token_draws_only_tokens_that_the_options_allow(options, allowed):
    logits = np.log(np.array([0.15, 0.55, 0.05, 0.25]))
    rng = new_rng()
    assert {sample_token(logits, rng, **options) for _ in range(300)} == allowed


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.98, 1.0])
@pytest.mark.parametrize("scale", [0.1, 1, 5])
def test_top_p_equals_sorting_the_whole_vocabulary(top_p, scale):
    logits = scale * new_rng().standard_normal(5000)
    order = np.argsort(-logits, kind="stable")
    cumulative = np.cumsum(np.exp(logits[order]) / np.exp(logits).sum())
    count = int((cumulative < top_p).sum()) + 1
    rng, same_rng = new_rng(), new_rng()
    for _ in range(50):
        draw = same_rng.random() * cumulative[:count][-1]
        index = np.searchsorted(cumulative, draw, side="right")
        assert sample_token(logits, rng, top_p=top_p) == order[index]


def test_repetition_penalty_makes_seen_tokens_less_likely():
    logits = np.array([2.0, 1.5, -1.0, -1.1])
    assert sample_token(logits, new_rng(), 0, repetition_penalty=2, seen=[0, 0]) == 1
    assert sample_token(logits, new_rng(), 0, repetition_penalty=20, seen=[0, 1, 2]) == 0
    assert sample_token(logits - 2.5, new_rng(), 0, repetition_penalty=5, seen=[0, 1, 2]) == 0
    assert sample_token(logits - 2.5, new_rng(), 0, repetition_penalty=9, seen=[0, 1, 2]) == 3
    assert logits.tolist() == [2.0, 1.5, -1.0, -1.1]  # unchanged, because other samples read them


@pytest.mark.parametrize("k", [1, 7, 50, 700, 5000])
def test_topk_lower_bound_is_reached_by_k_logits_and_few_others(k):
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(size=5003).round(seed % 3 + 1)  # with ties
        bound = topk_lower_bound(k, logits)
        assert bound <= np.sort(logits)[-k]
        assert (logits >= bound).sum() < 2 * k + 400


def test_top_k_keeps_k_tokens_even_if_all_logits_are_equal():
    rng = new_rng()
    draws = {sample_token(np.zeros(50), rng, top_k=3) for _ in range(200)}
    assert len(draws) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    with pytest.raises(UserError, match="not finite"):
        sample_token(np.array([0.0, bad]), new_rng())


# text


@pytest.fixture(scope="module")
def tokenizer(log_dir):
    """The tokenizer of the tiny run, with 300 tokens."""
    return load(log_dir)[1]


def test_a_stream_shows_whole_characters_only(tokenizer):
    text = "né 红楼梦 🙂."
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text)  # some characters consist of several tokens
    stream = TextStream(tokenizer)
    shown = [stream.feed(token) for token in tokens]
    assert "".join(shown) == text and "\ufffd" not in text
    incomplete = TextStream(tokenizer)
    assert "".join(map(incomplete.feed, tokenizer.encode("红")[:-1])) == ""
    assert incomplete.end("length") == ""


@pytest.mark.parametrize("text, stop, expected", [
    ("one two three", "two", "one "), ("aab", "ab", "a"), ("one two", "x", "one two"),
    ("a\n\nb", "\n\n", "a"), ("end en", "end.", "end en"), ("红楼梦", "楼梦", "红"),
    ("stop", "stop", "")])
def test_stop_text_ends_a_stream_and_is_never_shown(tokenizer, text, stop, expected):
    stream, shown = TextStream(tokenizer, stop), ""
    for token in tokenizer.encode(text):
        shown += stream.feed(token)
        assert expected.startswith(shown)  # a terminal cannot take printed text back
        if stream.ended_by:
            break
    assert stream.ended_by == ("stop" if stop in text else None)
    assert shown + ("" if stream.ended_by else stream.end("length")) == expected == stream.text


# the script


def test_the_script_prints_samples(call_main, log_dir):
    code, out, err = call_main(sample, "--model", log_dir, "--prompt", "The ", "--max_new_tokens",
                               20, "--num_samples", 2, "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.startswith("[Sample 1] The ") and "\n[Sample 2] The " in out
    checkpoint = next(log_dir.glob("model_*.pt"))
    again = call_main(sample, "--model", checkpoint, "--prompt", "The ", "--max_new_tokens", 20,
                      "--num_samples", 1, "--device", "cpu")[1]
    assert out.startswith(again)


def test_flags_override_the_style(call_main, log_dir):
    common = ("--model", log_dir, "--max_new_tokens", 30, "--device", "cpu")
    texts = {style: call_main(sample, *common, "--style", style)[1] for style in sample.STYLES}
    assert len(set(texts.values())) == 3
    wild = sample.STYLES["wild"]
    flags = make_flags(**wild)
    assert call_main(sample, *common, "--style", "focused", *flags)[1] == texts["wild"]


def test_many_samples_are_drawn_a_few_at_a_time(call_main, log_dir, monkeypatch, tmp_path):
    common = ("--model", log_dir, "--max_new_tokens", 9, "--num_samples", 5, "--device", "cpu",
              "--stop", "e", "--out", tmp_path / "out.jsonl")
    out = call_main(sample, *common)[1]
    monkeypatch.setattr(sample, "ROWS_AT_ONCE", 2)
    assert call_main(sample, *common) == (0, out, "")
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").split("\n")
               if line]
    assert out == "".join(f"[Sample {r['sample']}] {r['prompt']}{r['text']}\n" for r in results)
    assert [r["sample"] for r in results] == [1, 2, 3, 4, 5]
    assert {r["ended_by"] for r in results} == {"stop", "length"}
    assert not any("e" in r["text"] for r in results)


def test_prompt_from_file_and_from_standard_input(call_main, log_dir, monkeypatch, tmp_path):
    common = ("--model", log_dir, "--max_new_tokens", 5, "--num_samples", 1, "--device", "cpu")
    prompt = "«Été» 红楼梦\nзима"
    expected = call_main(sample, *common, "--prompt", prompt)
    assert expected[0] == 0 and expected[1].startswith(f"[Sample 1] {prompt}")
    for stored in (prompt.encode(), prompt.encode("utf-8-sig") + b"\r\n"):
        (tmp_path / "prompt.txt").write_bytes(stored)
        assert call_main(sample, *common, "--prompt_file", tmp_path / "prompt.txt") == expected
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stored), encoding="ascii"))
        assert call_main(sample, *common, "--prompt", "-") == expected
    (tmp_path / "prompt.txt").write_bytes("é".encode("latin-1"))
    code, out, err = call_main(sample, *common, "--prompt_file", tmp_path / "prompt.txt")
    assert (code, out) == (2, "") and "not UTF-8" in err and err.count("\n") == 1


def test_a_prompt_that_is_too_long_or_a_folder(call_main, log_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "MAX_PROMPT_BYTES", 10)
    (tmp_path / "prompt.txt").write_bytes(b"x" * 11)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 11)))
    endless = [(("--prompt_file", "/dev/zero"), "more than 10 bytes")]
    for flags, message in (
            (("--prompt_file", tmp_path / "prompt.txt"), "more than 10 bytes"),
            (("--prompt", "-"), "more than 10 bytes"),
            *(endless if os.path.exists("/dev/zero") else []),  # not on Windows
            (("--prompt_file", tmp_path), "check the path")):
        code, out, err = call_main(sample, "--model", log_dir, "--device", "cpu", *flags)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_arguments_are_utf8_in_every_locale():
    as_python_passes_it_in_the_c_locale = "é红".encode().decode("ascii", "surrogateescape")
    assert sample.decode_argument("--stop", as_python_passes_it_in_the_c_locale) == "é红"
    with pytest.raises(UserError, match="--stop is not UTF-8"):
        sample.decode_argument("--stop", "\udce9")


def test_numbers_of_any_size(call_main, log_dir):
    huge = "9" * 30
    code, out, err = call_main(
        sample, "--model", log_dir, "--device", "cpu", "--num_samples", 1, "--stop", " ",
        "--max_new_tokens", huge, "--top_k", huge, "--seed", huge, "--temperature", "1e-300")
    assert (code, err) == (0, "") and out.startswith("[Sample 1]")


def test_greedy_equals_temperature_0(call_main, log_dir):
    common = ("--model", log_dir, "--max_new_tokens", 30, "--num_samples", 1, "--device", "cpu")
    greedy = call_main(sample, *common, "--greedy")
    assert greedy == call_main(sample, *common, "--temperature", 0, "--seed", 7)
    assert greedy != call_main(sample, *common)


def test_default_model_is_the_newest_run(call_main, log_dir, monkeypatch, tmp_path):
    monkeypatch.delenv("GPT2_MODEL", raising=False)
    monkeypatch.chdir(log_dir.parent)
    assert default_source() == "log"
    monkeypatch.chdir(tmp_path)
    assert default_source() == "gpt2"
    monkeypatch.setenv("GPT2_MODEL", "distilgpt2")
    assert default_source() == "distilgpt2"


@pytest.mark.parametrize("flags", [
    ("--temperature", "-1"), ("--top_k", "-1"), ("--top_p", "1.5"), ("--top_p", "nan"),
    ("--max_new_tokens", "0"), ("--num_samples", "0"), ("--style", "loud"), ("--device", "tpu"),
    ("--top_k", "1.5"), ("--repetition_penalty", "0"), ("--seed", "-1"), ("--dtype", "int3"),
    ("--compile", "--device=cpu"), ("--interactive", "--prompt=x"), ("--stop", ""),
    ("--temperature", "inf"), ("--repetition_penalty", "inf"), ("--max_new_tokens", "9" * 5000),
    ("--prompt_file", "none.txt", "--prompt", "x")])
def test_bad_flags_are_reported_in_one_line(call_main, log_dir, flags):
    code, out, err = call_main(sample, "--model", log_dir, *flags)
    assert (code, out) == (2, "") and err.count("\n") == 1 and flags[0].strip("-") in err


def test_a_tokenizer_larger_than_the_model_is_refused(call_main, hf_folder, tokenizer, tmp_path):
    _, hf = hf_folder
    hf.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.model, encoding="utf-8")
    code, out, err = call_main(sample, "--model", tmp_path, "--device", "cpu")
    assert (code, out) == (2, "") and "knows 101 tokens, but its tokenizer has 300" in err


def test_safe_mode_restarts_with_one_thread(log_dir):
    script = ("import os, sample, torch; sample.main(); "
              "print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'], "
              "torch.get_num_threads(), torch.backends.mkldnn.enabled, os.environ['PYTORCH_JIT'])")
    result = run_script("-c", script, "--safe", "--model", log_dir, "--max_new_tokens", 5,
                        "--num_samples", 1, cwd=ROOT, env={"OMP_NUM_THREADS": "2"})
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("[Sample 1] Hello")
    assert result.stdout.endswith("\n1 1 1 False 0\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=512, n_layer=8, n_head=8)).save_pretrained(tmp_path)
    script = f"""
import re, safetensors.torch, train_gpt2
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
before = peak()
model = train_gpt2.GPT.from_pretrained({str(tmp_path)!r})
print((peak() - before) / sum(p.numel() * p.itemsize for p in model.parameters()))"""
    result = run_script("-c", script, cwd=ROOT)
    assert result.stderr == ""
    assert 0.9 < float(result.stdout) < 1.3


# the interactive session


def test_commands_and_answers_of_a_session(model, tokenizer, log_dir, monkeypatch, capsys):
    lines = ["/help", "/set temperature 0", "/style wild", "/set top_p 3", "/dance", "/seed x",
             "/set max_new_tokens 7", "The king", "", "/reset", "The king"]

    def next_line(prompt):
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", next_line)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--interactive", "--model", str(log_dir),
                                      "--device", "cpu"])
    sample.main()
    out = capsys.readouterr().out
    assert sample.HELP in out and "temperature 1.2, top_k 0, top_p 0.98" in out
    assert "temperature 0.0, top_k 100, top_p 0.95" in out
    assert "top_p 3: it must be a number from 0 to 1" in out
    assert "seed x: it must be a whole number" in out and "/dance" in out
    first, second, third, _ = re.split(r"\n\(7 tokens, [\d.]+ tokens/s\)\n", out)
    # /reset starts the seed over, too, so the same line gets the same answer
    answer = third.removeprefix("the text so far is forgotten\n")
    assert answer and first.endswith("max_new_tokens 7\n" + answer) and second != answer


@pytest.mark.parametrize("typed", [b"one\n\xe4\xbd\ntwo\n", b"one\n\xff\ntwo\n\xe4\xbd"])
def test_only_lines_that_are_not_utf8_are_ignored(log_dir, monkeypatch, call_main, typed):
    """Guards against an endless loop at input that ends in the middle of a character."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    code, out, _ = call_main(sample, "--interactive", "--model", log_dir, "--device", "cpu",
                             "--max_new_tokens", 3)
    assert code == 0 and out.count("tokens/s)") == 2
    assert out.count("not UTF-8") == typed.count(b"\xff") + typed.count(b"\xe4")


class Terminal:
    """A program in a pseudo-terminal, so that a test can type and read as a person would."""

    def __init__(self, *args):
        import pty
        self.fd, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *map(str, args)], cwd=ROOT, stdin=child, stdout=child, stderr=child,
            start_new_session=True, env={**os.environ, "TERM": "xterm", "PYTHONUTF8": "1"},
            preexec_fn=self._make_controlling_terminal)
        os.close(child)

    @staticmethod
    def _make_controlling_terminal():
        import fcntl
        import termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes a signal

    def type(self, text):
        """Send keys to the program."""
        os.write(self.fd, text.encode())

    def read_until(self, pattern):
        """The output up to a match of a regular expression. Fails after 30 seconds."""
        seen, deadline = b"", time.monotonic() + 30
        while not re.search(pattern, seen.decode(errors="ignore"), re.DOTALL):
            assert time.monotonic() < deadline, f"no {pattern!r} in {seen!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                seen += os.read(self.fd, 4096)
        return seen.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals in Python")
def test_interactive_session_in_a_terminal(log_dir):
    terminal = Terminal("sample.py", "--interactive", "--model", log_dir, "--device", "cpu",
                        "--max_new_tokens", 8, "--ignore_eot")
    terminal.read_until("/help.*> ")
    terminal.type("Thx\x7fe 红\r")  # a typing error, corrected with backspace
    answer = terminal.read_until(r"\(8 tokens, [\d.]+ tokens/s\).*> ")
    assert "红" in answer
    terminal.type("/set max_new_tokens 1000000\r")
    terminal.read_until("max_new_tokens 1000000.*> ")
    terminal.type("on and on\r")
    terminal.read_until("on and on\r\n.+")
    time.sleep(0.3)
    terminal.type("\x03")  # Ctrl-C stops the answer
    count = re.search(r"\((\d+) tokens", terminal.read_until(r"tokens/s\).*> ")).group(1)
    assert 0 < int(count) < 1_000_000
    terminal.type("not sent")
    terminal.read_until("not sent")
    time.sleep(0.3)  # readline ignores signals while it handles a key
    terminal.type("\x03")  # at the prompt, Ctrl-C discards the line
    terminal.read_until("> ")
    terminal.type("/seed 7\r")
    terminal.read_until("seed 7\r\n.*> ")
    terminal.type("\x1b[A\r")  # arrow up brings the last line back
    assert "seed 7" in terminal.read_until("seed 7\r\n.*seed 7\r\n.*> ")
    terminal.type("\x04")  # Ctrl-D leaves
    assert terminal.process.wait(timeout=600) == 0
    os.close(terminal.fd)
