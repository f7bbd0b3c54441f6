"""The training step: its chunked loss against F.cross_entropy over all logits."""

import gc
import math
import platform
import weakref
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, run_script
from torch.nn import functional as F

import train_gpt2
from gpt2lab import kernels, loss
from gpt2lab.device import flops_per_token, model_flops_utilization, paused_garbage_collection
from train_gpt2 import GPT, GPTConfig


def small_model(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=32))


def plain_gelu_linear(x, weight, bias):
    return F.linear(F.gelu(x, approximate="tanh"), weight, bias)


def plain_loss(model, x, y):
    """The loss as the ancestor computes it: nn.Linear, all logits, then F.cross_entropy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "ONEDNN_MIN_NUMEL", math.inf)
        patch.setattr(train_gpt2, "gelu_linear", plain_gelu_linear)
        return F.cross_entropy(model.lm_head(model.hidden(x)).flatten(0, 1), y.flatten())


def our_loss(model, x, y):
    return model(x, y)[1]


def loss_and_gradients(compute, model, x, y, dtype=None):
    model.zero_grad()
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        value = compute(model, x, y)
    (value / 4).backward()  # as in a loop that accumulates
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def chunks(monkeypatch):
    """Chunks small enough for a small batch to take several, the last one short."""
    monkeypatch.setattr(loss, "CHUNK_ROWS", 24)


def batch(seed=0, B=4):
    rows = torch.randint(300, (B, 33), generator=torch.Generator().manual_seed(seed))
    return rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-6), (torch.bfloat16, 0.02)])
def test_chunked_loss_and_gradients_are_those_of_cross_entropy(any_size, chunks, dtype, tolerance):
    model = small_model()
    expected, plain = loss_and_gradients(plain_loss, model, *batch(), dtype)
    value, ours = loss_and_gradients(our_loss, model, *batch(), dtype)
    assert value == pytest.approx(expected, rel=1e-6 if dtype is None else 1e-3)
    for name, grad in plain.items():
        # keys' biases move all scores of a query alike: their gradients are rounding errors
        scale = max(grad.abs().max().item(), 1e-3)
        assert (ours[name] - grad).abs().max() < tolerance * scale, name
        assert ours[name].dtype == torch.float32


def test_bfloat16_gradients_add_up_in_float32(monkeypatch):
    # the weight's gradient is a sum over chunks: summed in bfloat16 it would lose the small ones
    torch.manual_seed(0)
    x, y = torch.randn(4096, 16), torch.randint(10, (4096,))
    errors = []
    for rows in (4096, 16):
        monkeypatch.setattr(loss, "CHUNK_ROWS", rows)
        weight = torch.zeros(10, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss.cross_entropy(x, weight, y).backward()
        exact = torch.zeros(10, 16, requires_grad=True)
        F.cross_entropy(x @ exact.T, y).backward()
        errors.append((weight.grad - exact.grad).abs().max() / exact.grad.abs().max())
    assert max(errors) < 0.01, errors


@pytest.fixture
def products(monkeypatch):
    """The names of oneDNN's product and of the one that keeps less, whenever they are called."""
    made = []

    def watch(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: made.append(name) or real(*args))

    watch(kernels, "multiply")
    watch(train_gpt2, "gelu_linear")
    return made


def test_loss_in_a_compiled_model(any_size, chunks, products):
    model = small_model()
    compiled = torch.compile(model, backend="aot_eager")  # traced as for a GPU, run without gcc
    value, ours = loss_and_gradients(our_loss, compiled, *batch())
    assert not products  # compilers choose by themselves
    expected, plain = loss_and_gradients(plain_loss, model, *batch())
    assert value == pytest.approx(expected, rel=1e-6)
    for name, grad in plain.items():
        assert torch.allclose(ours[f"_orig_mod.{name}"], grad, rtol=1e-4, atol=1e-6), name


def test_loss_without_gradients_computes_none(chunks, monkeypatch):
    model = small_model()
    expected = our_loss(model, *batch()).item()
    products = []
    real = torch.Tensor.scatter_add_
    monkeypatch.setattr(torch.Tensor, "scatter_add_",
                        lambda *args: products.append(1) or real(*args))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert our_loss(model, *batch()).item() == expected
    assert not products
    our_loss(model, *batch())
    assert len(products) == math.ceil(4 * 32 / 24)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("width", [8, 96])
def test_onednn_products_and_gradients_are_those_of_nn_linear(any_size, with_bias, width):
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, width, bias=with_bias)
    ours = kernels.Linear(24, width, bias=with_bias)
    ours.load_state_dict(plain.state_dict())
    results = []
    for layer in (plain, ours):
        x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        y.sin().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
        with torch.no_grad():
            assert torch.allclose(layer(x), y, rtol=1e-5, atol=1e-6)
    for expected, value in zip(*results, strict=True):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6)
    ours.weight.requires_grad_(False)  # frozen, and x still learns
    x.grad = None
    ours(x).sin().sum().backward()
    assert torch.allclose(x.grad, results[0][1], rtol=1e-5, atol=1e-6)


def test_onednn_is_for_float32_on_the_cpu(any_size, monkeypatch):
    if not kernels.have_onednn():
        pytest.skip("oneDNN's products are for x86 CPUs")
    weight = torch.zeros(4, 4)
    assert kernels.use_onednn(weight)
    assert not kernels.use_onednn(weight.bfloat16())
    assert not kernels.use_onednn(weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.use_onednn(weight)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # as sample.py --safe does
    assert not kernels.use_onednn(weight)


def test_large_products_are_onednn_s_in_training_and_without(any_size, products):
    if not kernels.have_onednn():
        pytest.skip("oneDNN's products are for x86 CPUs")
    model = small_model()
    our_loss(model, *batch())
    # products that widen: two in each layer, and the logits. The others are MKL's
    assert products == ["multiply", "multiply", "gelu_linear"] * 2 + ["multiply"]
    with torch.no_grad():
        products.clear()
        model(batch()[0])
    assert products == ["multiply"] * 9


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_gelu_leaves_nothing_behind_for_backward(any_size, monkeypatch, grad_checkpoint):
    model, outputs, real = small_model(), [], F.gelu
    model.grad_checkpoint = grad_checkpoint

    def watched(*args, **kwargs):
        out = real(*args, **kwargs)
        outputs.append(weakref.ref(out))
        return out

    monkeypatch.setattr(F, "gelu", watched)
    value = our_loss(model, *batch())
    assert [output() for output in outputs] == [None, None]  # of two layers
    value.backward()
    assert len(outputs) > 2  # made again


def test_a_step_leaves_no_cycles_for_the_garbage_collector():
    model = small_model()  # training switches it off
    our_loss(model, *batch()).backward()
    gc.collect()
    with paused_garbage_collection():
        for _ in range(3):
            our_loss(model, *batch()).backward()
        assert gc.collect() == 0


def test_logits_never_exist_whole(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ROWS", 16)
    model, rows = small_model(), []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                rows.append(out.numel() // 384 if out.shape[-1:] == (384,) else 0)
            return out

    with Watch():
        our_loss(model, *batch(B=16))
    assert 16 <= max(rows) <= 32  # of 384 logits; the batch has 512 rows


def test_twenty_steps_as_the_plain_step_makes_them(any_size, chunks):
    """Clipped updates of AdamW over accumulated gradients, fused and chunked or not."""
    trajectories = []
    for compute, fused in ((plain_loss, False), (our_loss, True)):
        model = small_model()
        optimizer = model.configure_optimizers(0.1, 1e-3)
        for group in optimizer.param_groups:
            group["fused"] = fused
        trajectories.append([])
        for step in range(20):
            for micro_step in range(2):
                value = compute(model, *batch(seed=2 * (step % 3) + micro_step)) / 2
                value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            trajectories[-1].append(value.item())
    plain, ours = trajectories
    assert plain[0] - plain[-1] > 0.1  # it learns
    assert ours == pytest.approx(plain, abs=2e-5)


KEEP_MEMORY = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from gpt2lab.device import tune_malloc
if sys.argv[2] == "kept":
    tune_malloc()
for i in range(20):  # the first few find their places
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10, 2**20).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc")
def test_freed_memory_is_used_again():
    faults = {}
    for how in ("kept", "plain"):
        done = run_script("-c", KEEP_MEMORY, ROOT, how)
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    assert faults["kept"] < faults["plain"] / 4, faults


@pytest.mark.parametrize("card, peak", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA RTX A1000", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("Tesla T4", None)])
def test_mfu_knows_the_card_or_says_nothing(card, peak):
    share = model_flops_utilization(2 * 4e14, card, world_size=2)
    assert share == (peak and pytest.approx(400 / peak))


def test_flops_per_token_at_124m():
    # 6 N, and 12 layers x 12 heads x 64 wide x 1024 tokens x 12
    assert flops_per_token(124_475_904, GPTConfig(), 1024) == 746_855_424 + 113_246_208
