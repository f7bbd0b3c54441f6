"""The optimizers: what they update, how, and what a checkpoint keeps of them."""

import io
import math
import sys

import pytest
import torch
from conftest import read_log, tiny_config
from torch.nn import functional as F

from gpt2lab import optim
from train_gpt2 import GPT, GPTConfig, train


def small_model(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=32))


def test_newton_schulz_makes_matrices_orthogonal():
    torch.manual_seed(0)
    for shape in ((3, 64, 64), (2, 32, 128), (2, 128, 32)):
        matrices = torch.randn(shape)
        U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
        result = optim.orthogonalize(matrices)
        assert result.shape == shape
        # five steps bring all but the smallest singular values near 1, on the same axes
        assert torch.linalg.svdvals(result)[:, :-8].sub(1).abs().max() < 0.4
        cosine = F.cosine_similarity(result.flatten(1), (U @ Vh).flatten(1))
        assert cosine.min() > 0.95


def test_muon_takes_query_key_and_value_one_by_one():
    model = small_model()
    optimizer = model.configure_optimizers(0.0, 1.0, name="muon")
    c_attn, wte = model.transformer.h[0].attn.c_attn.weight, model.transformer.wte.weight
    torch.manual_seed(1)
    gradient = torch.randn_like(c_attn)
    gradient[:32] *= 100  # the query's gradients must not drown the others
    c_attn.grad, wte.grad = gradient.clone(), torch.ones_like(wte)
    before, embeddings = c_attn.detach().clone(), wte.detach().clone()
    optimizer.step()
    # momentum of the first step: (1 - m) g, and one gradient ahead (1 - m) g + m (1 - m) g
    for part, expected in zip((before - c_attn.detach()).chunk(3), gradient.chunk(3), strict=True):
        expected = optim.orthogonalize(expected[None])[0]
        expected *= optim.UPDATE_RMS * math.sqrt(32)
        assert torch.allclose(part, expected, atol=1e-3)
    assert torch.allclose(embeddings - wte, torch.ones(()), atol=1e-3)  # AdamW's first step is lr


def test_muon_decays_weights():
    model = small_model()
    optimizer = model.configure_optimizers(0.5, 0.1, name="muon")
    weight = model.transformer.h[1].mlp.c_fc.weight
    weight.grad = torch.zeros_like(weight)
    before = weight.detach().clone()
    optimizer.step()
    assert torch.allclose(weight, before * (1 - 0.1 * 0.5))


def test_every_parameter_is_in_one_group():
    model = small_model()
    for name in optim.OPTIMIZERS:
        optimizer = model.configure_optimizers(0.1, 1e-3, name=name)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(params) == len(set(params)) == len(list(model.parameters()))
        assert all((group["weight_decay"] > 0) == (p.dim() >= 2)
                   for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_saved_optimizers_go_on_bit_for_bit(name):
    def update(model, optimizer, step):
        rows = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(step))
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()

    straight = small_model()
    optimizer = straight.configure_optimizers(0.1, 1e-3, name=name)
    for step in range(3):
        update(straight, optimizer, step)
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = small_model(seed=1)
    resumed.load_state_dict(saved["model"])
    again = resumed.configure_optimizers(0.1, 1e-3, name=name)
    again.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        update(straight, optimizer, step)
        update(resumed, again, step)
    for (key, p), q in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), key


def test_adamw8bit_without_bitsandbytes_is_adamw(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # import fails
    optimizer = small_model().configure_optimizers(0.1, 1e-3, name="adamw8bit", verbose=True)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "adamw8bit" in line]
    assert len(lines) == 1 and "pip install bitsandbytes" in lines[0]


def test_a_run_with_muon_learns(data_dir, tmp_path, capsys):
    result = train(tiny_config(data_dir, tmp_path, optimizer="muon", max_steps=30, max_lr=6e-3))
    val = read_log(tmp_path, "val")
    assert val[0] - result["val_loss"] > 1
    assert "using Muon for 8 of them, with 24,576 parameters" in capsys.readouterr().out
