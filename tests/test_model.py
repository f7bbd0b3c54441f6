"""The model against its published figures and against Hugging Face's GPT-2."""

import json
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2lab.cli import UserError
from train_gpt2 import GPT, GPTConfig

SMALL = dict(block_size=32, vocab_size=100, n_layer=3, n_head=4, n_embd=64)


def small_model(seed=0, **changes):
    """A GPT with the sizes of SMALL, except for `changes`."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(**(SMALL | changes)))


@pytest.fixture(scope="module")
def hf_model():
    """Hugging Face's GPT-2 without dropout and with large weights, so that mistakes show."""
    torch.manual_seed(1)
    config = GPT2Config(n_positions=32, vocab_size=101, n_layer=3, n_head=4, n_embd=64,
                        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("rows, expected", [(50257, 124_439_808), (None, 124_475_904)])
def test_parameter_count_is_that_of_gpt2(rows, expected):
    with torch.device("meta"):
        model = GPT(GPTConfig(padded_vocab_size=rows))
    assert sum(p.numel() for p in model.parameters()) == expected


def test_124m_decays_50_tensors_and_spares_98(capsys):
    with torch.device("meta"):
        model = GPT(GPTConfig())
    decayed, others = model.configure_optimizers(0.1, 6e-4, verbose=True).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert capsys.readouterr().out.splitlines()[:2] == [
        "num decayed parameter tensors: 50, with 124,354,560 parameters",
        "num non-decayed parameter tensors: 98, with 121,344 parameters"]


def test_adamw_is_fused_on_this_device():
    assert small_model().configure_optimizers(0.1, 1e-3).defaults["fused"]


def test_initial_loss_is_that_of_a_uniform_guess():
    model = small_model(vocab_size=5000)
    idx = torch.randint(5000, (8, 32))
    rows = 5120  # of the embedding: 5000 rounded up
    assert model(idx, idx.roll(1))[1].item() == pytest.approx(math.log(rows), abs=0.2)


def test_logits_do_not_depend_on_later_tokens():
    model = small_model()
    idx = torch.randint(100, (2, 32))
    before, _ = model(idx)
    idx[:, 20] = (idx[:, 20] + 1) % 100
    after, _ = model(idx)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_embedding_and_lm_head_share_one_matrix():
    for model in (small_model(), GPT.empty(GPTConfig(**SMALL))):
        assert model.transformer.wte.weight is model.lm_head.weight
    assert model.lm_head.weight.shape == (128, 64)
    assert model.config.padded_vocab_size == 128  # 100 rounded up


def test_initial_weights_are_smaller_in_residual_projections():
    model = small_model(n_embd=256, n_layer=8)
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.05), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert torch.all(p == (1 if name.endswith("weight") else 0)), name


def test_forward_returns_either_logits_or_the_mean_loss():
    model = small_model()
    idx = torch.randint(100, (2, 16))
    logits, loss = model(idx)
    assert logits.shape == (2, 16, 128) and loss is None
    last, _ = model(idx, last_only=True)
    assert last.shape == (2, 1, 128)
    assert torch.allclose(last, logits[:, -1:], atol=1e-6)
    targets = torch.randint(100, (2, 16))
    no_logits, loss = model(idx, targets)
    assert no_logits is None
    expected = -logits.log_softmax(-1).gather(2, targets[..., None]).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded", "openai"])
def test_pretrained_weights_give_hugging_face_logits(hf_model, tmp_path, form):
    shard_size = "100KB" if form == "sharded" else "5GB"
    hf_model.save_pretrained(tmp_path, max_shard_size=shard_size)
    if form in ("bin", "openai"):
        (tmp_path / "model.safetensors").unlink()
        state = hf_model.state_dict()
        if form == "openai":  # no prefix, no lm_head, and the old buffers of the causal mask
            state.pop("lm_head.weight")
            state = {k.removeprefix("transformer."): v for k, v in state.items()}
            state["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (form == "sharded")
    model = GPT.from_pretrained(str(tmp_path))
    idx = torch.randint(101, (2, 32))
    with torch.no_grad():
        ours, theirs = model(idx)[0], hf_model(idx).logits
    assert theirs.std() > 0.5  # they are far from uniform
    assert (ours - theirs).abs().max() < 1e-4


def test_gradients_equal_those_of_hugging_face(hf_model, tmp_path):
    hf_model.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    idx = torch.randint(101, (2, 33))
    x, y = idx[:, :-1], idx[:, 1:]
    model(x, y)[1].backward()
    torch.nn.functional.cross_entropy(hf_model(x).logits.flatten(0, 1), y.flatten()).backward()
    for name, p in hf_model.named_parameters():
        ours = model.get_parameter(name).grad
        ours = ours.t() if ".c_" in name and p.dim() == 2 else ours  # Hugging Face stores (in, out)
        assert p.grad.abs().max() > 1e-3
        assert torch.allclose(ours, p.grad, atol=1e-5), name


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llama"}, "model_type"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"activation_function": "relu"}, "activation_function"),
    ({"n_embd": 32}, "has shape"), ({"n_layer": 4}, "lacks the tensors")])
def test_other_architectures_are_refused(hf_model, tmp_path, change, message):
    hf_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(str(tmp_path))


def test_training_overfits_one_batch():
    model = small_model()
    optimizer = model.configure_optimizers(0.1, 1e-3)
    idx = torch.randint(100, (4, 33))
    for _ in range(150):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
