"""Sampling: the cache changes nothing, every row is its own, no token comes from nowhere."""

import numpy as np
import pytest
import torch

import sample
from fineweb import UserError
from sample import KVCache, generate, pick_token
from train_gpt2 import GPT, GPTConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=100, n_layer=3, n_head=4, n_embd=64))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)  # sharper than at initialisation: choices differ
    return model


def rng():
    return np.random.default_rng(0)


# the cache


@torch.inference_mode()
def test_cached_greedy_text_equals_uncached(model):
    prompt = [5, 17, 3]
    tokens = list(prompt)
    while len(tokens) < 32:
        logits, _ = model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1, :100].argmax()))
    assert len(set(tokens[3:])) > 3  # not the same token over and over
    row, = generate(model, prompt, 99, 100, max_new_tokens=29, temperature=0)
    expected = tokens[3:]
    assert row == (expected[:expected.index(99)] if 99 in expected else expected)


@torch.inference_mode()
@pytest.mark.parametrize("chunks", [[32], [31, 1], [1] * 32, [5, 20, 7], [16, 16]])
def test_prefill_in_chunks_equals_one_piece(model, chunks):
    idx = torch.randint(100, (2, 32))
    whole, _ = model(idx)
    cache = KVCache(model, 2)
    parts = [model(part, kv_cache=cache)[0] for part in idx.split(chunks, dim=1)]
    assert cache.length == 32
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=2e-4)


def test_text_goes_on_past_the_context(model):
    prompt = [1, 2, 3]
    rows = generate(model, prompt, 100, 100, num_samples=2, max_new_tokens=100)
    assert [len(row) for row in rows] == [100, 100]
    # the full window of 32 decides on token 32, and its younger half on the next
    tokens = prompt + rows[1]
    for window, chosen in ((tokens[:32], tokens[32]), (tokens[17:33], tokens[33])):
        logits, _ = model(torch.tensor([window]))
        generator = np.random.default_rng([42, 1])
        generator.random(tokens.index(chosen, 32) - 3)
        assert pick_token(logits[0, -1, :100].detach().numpy(), generator) == chosen
    # a prompt longer than the context keeps its end
    long = list(range(50))
    assert generate(model, long, 100, 100, max_new_tokens=5) == generate(
        model, long[-32:], 100, 100, max_new_tokens=5)


# the rows


def test_rows_differ_from_the_first_token_on_and_do_not_depend_on_each_other(model):
    rows = generate(model, [7], 100, 100, num_samples=16, max_new_tokens=8, temperature=1.5)
    assert len({row[0] for row in rows}) > 3
    for n in (1, 3):
        assert generate(model, [7], 100, 100, num_samples=n, max_new_tokens=8,
                        temperature=1.5) == rows[:n]
    assert rows != generate(model, [7], 100, 100, num_samples=16, max_new_tokens=8,
                            temperature=1.5, seed=1)


def test_a_row_ends_at_end_of_text_and_the_others_go_on(model):
    free = generate(model, [7], 100, 100, num_samples=4, max_new_tokens=20)
    eot = free[0][5]
    rows = generate(model, [7], eot, 100, num_samples=4, max_new_tokens=20)
    assert rows == [row[:row.index(eot)] if eot in row else row for row in free]


def test_ids_past_the_vocabulary_never_come_out(model):
    biased = GPT(model.config)
    with torch.no_grad():
        biased.lm_head.weight[100:] = 100 * torch.randn(28, 64)  # the padding would win
    logits, _ = biased(torch.tensor([[1]]))
    assert logits[0, 0].argmax() >= 100
    for temperature in (0, 1, 50):
        rows = generate(biased, [1], 99, 100, 8, max_new_tokens=10, temperature=temperature)
        assert max(max(row, default=0) for row in rows) < 100


def test_an_empty_prompt_starts_from_end_of_text(model):
    assert generate(model, [], 99, 100) == generate(model, [99], 99, 100)


# one token


def test_pick_token_follows_the_distribution():
    probs = np.array([0.5, 0.2, 0.2, 0.1])
    generator = rng()
    draws = [pick_token(np.log(probs), generator) for _ in range(4000)]
    assert np.bincount(draws, minlength=4) / 4000 == pytest.approx(probs, abs=0.03)


@pytest.mark.parametrize("options, allowed", [
    ({"temperature": 0}, {1}), ({"top_k": 1}, {1}), ({"top_k": 2}, {1, 3}), ({"top_p": 0}, {1}),
    ({"top_p": 0.5}, {1}), ({"top_p": 0.6}, {1, 3}), ({"top_p": 1.0}, {0, 1, 2, 3}),
    ({"top_k": 0}, {0, 1, 2, 3}), ({"top_k": 99}, {0, 1, 2, 3}), ({"temperature": 1e-4}, {1}),
    ({"top_k": 3, "top_p": 0.99}, {0, 1, 3})])
def test_pick_token_keeps_what_it_should(options, allowed):
    logits = np.log(np.array([0.15, 0.55, 0.05, 0.25]))
    generator = rng()
    assert {pick_token(logits, generator, **options) for _ in range(300)} == allowed


def test_equal_logits_at_the_edge_of_top_k_keep_k_tokens():
    generator = rng()
    draws = {pick_token(np.zeros(50), generator, top_k=3) for _ in range(200)}
    assert len(draws) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    with pytest.raises(UserError, match="not finite"):
        pick_token(np.array([0.0, bad]), rng())


# the script


def test_script_prints_samples(call, log_dir):
    code, out, err = call(sample, "--model", log_dir, "--prompt", "The ", "--max_new_tokens", 20,
                          "--num_samples", 2, "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.startswith("[Sample 1] The ") and "\n[Sample 2] The " in out
    checkpoint = next(log_dir.glob("model_*.pt"))
    again = call(sample, "--model", checkpoint, "--prompt", "The ", "--max_new_tokens", 20,
                 "--num_samples", 1, "--device", "cpu")[1]
    assert out.startswith(again)


def test_style_and_what_overrides_it(call, log_dir):
    common = ("--model", log_dir, "--max_new_tokens", 30, "--device", "cpu")
    texts = {style: call(sample, *common, "--style", style)[1] for style in sample.STYLES}
    assert len(set(texts.values())) == 3
    wild = sample.STYLES["wild"]
    flags = [x for name, value in wild.items() for x in (f"--{name}", value)]
    assert call(sample, *common, "--style", "focused", *flags)[1] == texts["wild"]


def test_default_model_is_the_newest_run(call, log_dir, monkeypatch, tmp_path):
    monkeypatch.chdir(log_dir.parent)
    assert sample.default_model() == "log"
    monkeypatch.chdir(tmp_path)
    assert sample.default_model() == "gpt2"


@pytest.mark.parametrize("flags", [
    ("--temperature", "-1"), ("--top_k", "-1"), ("--top_p", "1.5"), ("--top_p", "nan"),
    ("--max_new_tokens", "0"), ("--num_samples", "0"), ("--style", "loud"), ("--device", "tpu")])
def test_bad_flags_cost_one_line(call, log_dir, flags):
    code, out, err = call(sample, "--model", log_dir, *flags)
    assert (code, out) == (2, "") and err.count("\n") == 1 and flags[0].strip("-") in err
