"""The optimizers: what they update, how they do it, and how they continue from a checkpoint."""

import io
import math
import sys

import pytest
import torch
from conftest import plain_model, read_log, tiny_config
from torch.nn import functional as F

from gpt2lab import optim
from train_gpt2 import train


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_bounds_the_update_of_any_gradient(dtype):
    """Guards against polynomials that explode where rounding takes a singular value above 1."""
    torch.manual_seed(0)
    column, row = torch.randn(8, 64, 1), torch.randn(8, 1, 192)
    one_row = torch.zeros(8, 64, 192)
    one_row[:, :1] = row
    noise = torch.randn(8, 64, 192)
    for gradient in (column @ row, one_row, one_row.mT, column @ row + 0.05 * noise, noise):
        result = optim.orthogonalize(gradient.to(dtype)).float()
        largest = torch.linalg.svdvals(result)[:, 0]
        assert 0.6 < largest.min() and largest.max() < 1.3
    assert not optim.orthogonalize(torch.zeros(1, 8, 8, dtype=dtype)).any()


def test_muon_orthogonalizes_query_key_and_value_by_themselves():
    model = plain_model()
    optimizer = model.configure_optimizers(0.0, 1.0, name="muon")
    c_attn, wte = model.transformer.h[0].attn.c_attn.weight, model.transformer.wte.weight
    torch.manual_seed(1)
    gradient = torch.randn_like(c_attn)
    gradient[:32] *= 100  # the query's gradient must not make the others' updates small
    c_attn.grad, wte.grad = gradient.clone(), torch.ones_like(wte)
    before, embeddings = c_attn.detach().clone(), wte.detach().clone()
    optimizer.step()
    # in the first step, the momentum is a multiple of the gradient, so both are orthogonalized to
    # the same matrix
    for part, expected in zip((before - c_attn.detach()).chunk(3), gradient.chunk(3), strict=True):
        expected = optim.orthogonalize(expected[None])[0]
        expected *= optim.UPDATE_RMS * math.sqrt(32)
        assert torch.allclose(part, expected, atol=1e-3)
    assert torch.allclose(embeddings - wte, torch.ones(()), atol=1e-3)  # AdamW's first step is lr


def test_the_size_of_muons_update_follows_the_rows_of_a_matrix():
    """Guards against a longer update of the MLP's second matrix, because it has more columns."""
    model = plain_model()
    optimizer = model.configure_optimizers(0.0, 1.0, name="muon")
    torch.manual_seed(1)
    mlp = model.transformer.h[0].mlp
    for weight, rows in ((mlp.c_fc.weight, 128), (mlp.c_proj.weight, 32)):
        weight.grad, before = torch.randn_like(weight), weight.detach().clone()
        optimizer.step()
        sizes = torch.linalg.svdvals(weight.detach() - before) / math.sqrt(rows)
        assert 0.6 < sizes.median() / optim.UPDATE_RMS < 1.3


def test_muon_decays_weights():
    model = plain_model()
    optimizer = model.configure_optimizers(0.5, 0.1, name="muon")
    weight = model.transformer.h[1].mlp.c_fc.weight
    weight.grad = torch.zeros_like(weight)
    before = weight.detach().clone()
    optimizer.step()
    assert torch.allclose(weight, before * (1 - 0.1 * 0.5))


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = plain_model()
    for name in optim.OPTIMIZERS:
        optimizer = model.configure_optimizers(0.1, 1e-3, name=name)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(params) == len(set(params)) == len(list(model.parameters()))
        assert all((group["weight_decay"] > 0) == (p.dim() >= 2)
                   for group in optimizer.param_groups for p in group["params"])


def run_update(model, optimizer, step):
    """One update on random tokens that depend on the step only."""
    rows = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(step))
    model(rows[:, :-1], rows[:, 1:])[1].backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_saved_optimizer_continues_bit_for_bit(name):
    straight = plain_model()
    optimizer = straight.configure_optimizers(0.1, 1e-3, name=name)
    for step in range(3):
        run_update(straight, optimizer, step)
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = plain_model(seed=1)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer = resumed.configure_optimizers(0.1, 1e-3, name=name)
    resumed_optimizer.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        run_update(straight, optimizer, step)
        run_update(resumed, resumed_optimizer, step)
    for (key, p), q in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), key


def test_adamw8bit_without_bitsandbytes_is_adamw(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # its import fails
    optimizer = plain_model().configure_optimizers(0.1, 1e-3, name="adamw8bit", verbose=True)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "adamw8bit" in line]
    assert len(lines) == 1 and "pip install bitsandbytes" in lines[0]


def test_a_run_with_muon_learns(data_dir, tmp_path, capsys):
    result = train(tiny_config(data_dir, tmp_path, optimizer="muon", max_steps=30, max_lr=6e-3))
    val = read_log(tmp_path, "val")
    assert val[0] - result["val_loss"] > 1
    assert "using Muon for 8 of them, with 24,576 parameters" in capsys.readouterr().out
