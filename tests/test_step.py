"""The training step: what kernels.optimize swaps in, against the plain model."""

import gc
import math
import platform
import weakref
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, plain_model, run_script
from torch.nn import functional as F

from gpt2lab import kernels, presets
from gpt2lab.device import (
    find_peak_tflops,
    flops_per_token,
    model_flops_utilization,
    paused_gc,
)
from train_gpt2 import GPTConfig


def optimized_model(seed=0):
    """The same GPT with the layers of gpt2lab.kernels."""
    model = plain_model(seed)
    kernels.optimize(model)
    return model


def loss_and_gradients(model, x, y, dtype=None):
    """The loss of a batch, and {parameter name: gradient} of a quarter of it."""
    model.zero_grad()
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        _, loss = model(x, y)
    (loss / 4).backward()  # as in a loop that accumulates
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks so small that a small batch takes several, the last one short."""
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 24)


def random_batch(seed=0, B=4):
    """(x, y), (B, 32) int64 each."""
    rows = torch.randint(300, (B, 33), generator=torch.Generator().manual_seed(seed))
    return rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-6), (torch.bfloat16, 0.02)])
def test_optimized_loss_and_gradients_are_those_of_the_plain_model(
        onednn_at_any_size, small_chunks, dtype, tolerance):
    expected_loss, expected = loss_and_gradients(plain_model(), *random_batch(), dtype)
    loss, gradients = loss_and_gradients(optimized_model(), *random_batch(), dtype)
    assert loss == pytest.approx(expected_loss, rel=1e-6 if dtype is None else 1e-3)
    assert list(gradients) == list(expected)
    for name, gradient in expected.items():
        # a bias of the keys changes all scores of a query alike, so its gradient is rounding error
        scale = max(gradient.abs().max().item(), 1e-3)
        assert (gradients[name] - gradient).abs().max() < tolerance * scale, name
        assert gradients[name].dtype == torch.float32


def bfloat16_losses_and_gradients(context):
    """Of two batches, after a forward without gradients, which has cast the weights before."""
    model, losses = optimized_model(), []
    with context():
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            model(random_batch()[0])
        for seed in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(model(*random_batch(seed))[1])
            losses[-1].backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


def test_kept_casts_change_no_bit_of_gradients(onednn_at_any_size, small_chunks):
    """Guards against copies that are stale, or that pass no gradient on to their weights."""
    expected_losses, expected = bfloat16_losses_and_gradients(nullcontext)
    losses, gradients = bfloat16_losses_and_gradients(kernels.kept_casts)
    assert losses == expected_losses
    for name, gradient in expected.items():
        assert gradient.any() and torch.equal(gradients[name], gradient), name
    assert kernels.casts is None  # nothing outlives the context


def test_optimize_shares_parameters_and_keeps_their_names():
    """Guards against optimizers and checkpoints that lose hold of the weights."""
    model = plain_model()
    before = dict(model.named_parameters())
    kernels.optimize(model)
    layers = [type(module) for module in model.modules()]
    kernels.optimize(model)  # a second call changes nothing
    assert [type(module) for module in model.modules()] == layers
    assert torch.nn.Linear not in layers
    assert list(before) == [name for name, _ in model.named_parameters()]
    assert all(p is before[name] for name, p in model.named_parameters())
    assert model.transformer.wte.weight is model.lm_head.weight
    assert model.state_dict().keys() == plain_model().state_dict().keys()


@pytest.mark.parametrize("dtype, scale, tolerance", [
    (torch.float32, 1, 1e-5), (torch.bfloat16, 1, 0.02), (torch.float16, 1024, 0.005)])
def test_the_chunked_loss_is_the_cross_entropy(small_chunks, dtype, scale, tolerance):
    """Loss and gradients, accumulated over two calls, of a loss that is scaled up as for float16"""
    generator = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(100, 48, generator=generator), torch.randint(90, (100,)))
              for _ in range(2)]
    weight = 0.3 * torch.randn(90, 48, generator=generator)
    results = []
    for loss_of in (kernels.chunked_cross_entropy, F.linear_cross_entropy):
        W, losses, gradients = weight.clone().requires_grad_(), [], []
        for x, y in inputs:
            x = x.clone().requires_grad_()
            # the exact result is computed in float32
            exact = loss_of is F.linear_cross_entropy or dtype == torch.float32
            with nullcontext() if exact else torch.autocast("cpu", dtype):
                loss = loss_of(x, W, y)
            (scale * loss / 2).backward()
            losses.append(loss.item())
            gradients.append(x.grad)
        results.append((losses, [*gradients, W.grad]))
    (losses, gradients), (expected_losses, expected) = results
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    for gradient, exact in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_cuda_compiles_computes_what_a_cpu_computes(dtype, monkeypatch):
    """The three forms of the gradient of a chunk's logits."""
    logits = 3 * torch.randn(20, 90, generator=torch.Generator().manual_seed(0))
    logits, targets = logits.to(dtype), torch.arange(20)
    expected_loss, expected = kernels.softmax_gradient_uncompiled(logits.clone(), targets)
    monkeypatch.setattr(kernels, "SLICE_ROWS", 8)  # three slices, the last one short
    sliced = logits.clone()
    assert kernels.softmax_gradient_in_slices(sliced, targets) == pytest.approx(expected_loss)
    assert torch.equal(sliced, expected)
    loss = kernels.softmax_gradient(logits, targets)  # overwrites the logits
    assert loss == expected_loss
    assert logits.dtype == dtype
    assert torch.allclose(logits, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3)


def test_torch_approves_of_the_operator_of_the_loss():
    """Its schema, its autograd formula and its fake, as torch.compile relies on them."""
    x, weight = torch.randn(30, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    # not its check of compiling, which returns the gradients that backward overwrites. The compiled
    # models of this suite show that the operator compiles
    torch.library.opcheck(kernels.cross_entropy_op, (x, weight, torch.arange(30) % 20),
                          test_utils=("test_schema", "test_autograd_registration",
                                      "test_faketensor"))


def test_bfloat16_gradients_are_summed_in_float32(monkeypatch):
    """The weight's gradient is a sum over chunks. In bfloat16 the sum would lose small ones."""
    torch.manual_seed(0)
    x, y = torch.randn(4096, 16), torch.randint(10, (4096,))
    errors = []
    for rows in (4096, 16):
        monkeypatch.setattr(kernels, "CHUNK_ROWS", rows)
        weight = torch.zeros(10, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            kernels.chunked_cross_entropy(x, weight, y).backward()
        exact = torch.zeros(10, 16, requires_grad=True)
        F.cross_entropy(x @ exact.T, y).backward()
        errors.append((weight.grad - exact.grad).abs().max() / exact.grad.abs().max())
    assert max(errors) < 0.01, errors


@pytest.fixture
def kernel_calls(monkeypatch):
    """A list that receives the name of onednn_linear or gelu_linear whenever one is called."""
    calls = []

    def record(name):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args: calls.append(name) or original(*args))

    record("onednn_linear")
    record("gelu_linear")
    return calls


def test_a_compiled_model_has_the_same_loss_and_chooses_its_own_kernels_but_for_the_loss(
        onednn_at_any_size, small_chunks, kernel_calls):
    model = optimized_model()
    compiled = torch.compile(model, backend="aot_eager")  # traced as for a GPU, run without gcc
    loss, gradients = loss_and_gradients(compiled, *random_batch())
    assert kernel_calls == 6 * ["onednn_linear"]  # the chunks of 24 of the batch's 128 rows
    expected_loss, expected = loss_and_gradients(plain_model(), *random_batch())
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        assert torch.allclose(gradients[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-6), name


def test_loss_without_gradients_computes_no_gradients(small_chunks, monkeypatch):
    model = optimized_model()
    expected = model(*random_batch())[1].item()
    calls = []
    original = torch.Tensor.scatter_add_  # the first operation of a chunk's gradient
    monkeypatch.setattr(torch.Tensor, "scatter_add_",
                        lambda *args: calls.append(1) or original(*args))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert model(*random_batch())[1].item() == expected
    assert not calls
    model(*random_batch())
    assert len(calls) == math.ceil(4 * 32 / 24)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("width", [8, 96])
def test_onednn_outputs_and_gradients_are_those_of_nn_linear(onednn_at_any_size, with_bias, width):
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, width, bias=with_bias)
    fast = kernels.FastLinear(torch.nn.Linear(24, width, bias=with_bias))
    fast.load_state_dict(plain.state_dict())
    results = []
    for layer in (plain, fast):
        x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        y.sin().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
        with torch.no_grad():
            assert torch.allclose(layer(x), y, rtol=1e-5, atol=1e-6)
    for expected, value in zip(*results, strict=True):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6)
    fast.weight.requires_grad_(False)  # a frozen weight still passes the gradient on to x
    x.grad = None
    fast(x).sin().sum().backward()
    assert torch.allclose(x.grad, results[0][1], rtol=1e-5, atol=1e-6)


def test_onednn_is_for_float32_on_the_cpu(onednn_at_any_size, monkeypatch):
    if not kernels.have_onednn():
        pytest.skip("oneDNN's matmuls are for x86 CPUs")
    weight = torch.zeros(4, 4)
    assert kernels.use_onednn(weight)
    assert not kernels.use_onednn(weight.bfloat16())
    assert not kernels.use_onednn(weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.use_onednn(weight)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # as sample.py --safe does
    assert not kernels.use_onednn(weight)


def test_large_matmuls_go_to_onednn_in_training_and_inference(onednn_at_any_size, kernel_calls):
    if not kernels.have_onednn():
        pytest.skip("oneDNN's matmuls are for x86 CPUs")
    model = optimized_model()
    model(*random_batch())
    # in training, oneDNN does the matmuls that widen: two in each layer, and the logits
    layer = ["onednn_linear", "onednn_linear", "gelu_linear"]
    assert kernel_calls == layer * 2 + ["onednn_linear"]
    with torch.no_grad():
        kernel_calls.clear()
        model(random_batch()[0])
    assert kernel_calls == ["onednn_linear"] * 9


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_gelu_output_is_not_kept_for_backward(onednn_at_any_size, monkeypatch, grad_checkpoint):
    model, outputs, original = optimized_model(), [], F.gelu
    model.grad_checkpoint = grad_checkpoint

    def watched_gelu(*args, **kwargs):
        out = original(*args, **kwargs)
        outputs.append(weakref.ref(out))
        return out

    monkeypatch.setattr(F, "gelu", watched_gelu)
    _, loss = model(*random_batch())
    assert [output() for output in outputs] == [None, None]  # of two layers
    loss.backward()
    assert len(outputs) > 2  # recomputed


def test_a_step_leaves_no_cycles_for_the_garbage_collector():
    """Guards against memory that grows, because training switches the collector off."""
    model = optimized_model()
    model(*random_batch())[1].backward()
    gc.collect()
    with paused_gc():
        for _ in range(3):
            model(*random_batch())[1].backward()
        assert gc.collect() == 0


def test_logits_never_exist_whole(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 16)
    model, rows = optimized_model(), []

    class RecordRows(torch.overrides.TorchFunctionMode):
        """Notes how many rows of 384 logits each tensor has that torch returns."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                rows.append(out.numel() // 384 if out.shape[-1:] == (384,) else 0)
            return out

    x, y = random_batch(B=16)  # 512 rows
    with RecordRows():
        model(x, y)
        with torch.no_grad():
            model(x, y)
            # torch shows this mode the operator of the loss from outside only
            kernels.loss_and_gradients(model.hidden(x).flatten(0, 1), model.lm_head.weight,
                                       y.flatten())
    assert max(rows) == 16


def test_twenty_updates_give_the_losses_of_the_plain_model(onednn_at_any_size, small_chunks):
    """Clipped AdamW updates over accumulated gradients, fused and with our kernels, or not."""
    trajectories = []
    for model, fused in ((plain_model(), False), (optimized_model(), True)):
        optimizer = model.configure_optimizers(0.1, 1e-3)
        for group in optimizer.param_groups:
            group["fused"] = fused
        losses = []
        for step in range(20):
            for micro_step in range(2):
                _, loss = model(*random_batch(seed=2 * (step % 3) + micro_step))
                (loss / 2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item() / 2)
        trajectories.append(losses)
    expected, losses = trajectories
    assert expected[0] - expected[-1] > 0.1  # it learns
    assert losses == pytest.approx(expected, abs=2e-5)


COUNT_PAGE_FAULTS = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from gpt2lab.kernels import tune_malloc
if sys.argv[2] == "tuned":
    tune_malloc()
for i in range(20):  # the first few grow the heap
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10, 2**20).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc")
def test_tune_malloc_reuses_freed_memory():
    faults = {}
    for how in ("tuned", "plain"):
        done = run_script("-c", COUNT_PAGE_FAULTS, ROOT, how)
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    assert faults["tuned"] < faults["plain"] / 4, faults


@pytest.mark.parametrize("card, peak", [
    ("NVIDIA B200", 2250), ("NVIDIA GH200 480GB", 989), ("NVIDIA H200", 989),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA H800", 989), ("NVIDIA H800 PCIe", 756), ("NVIDIA H20", 148),
    ("NVIDIA A100-SXM4-80GB", 312), ("A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A800-SXM4-80GB", 312), ("NVIDIA A40", 150),
    ("NVIDIA A10", 125), ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L4", 121),
    ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112),
    ("Tesla V100S-PCIE-32GB", 130), ("NVIDIA RTX A6000", 155),
    ("NVIDIA RTX 6000 Ada Generation", 364), ("NVIDIA GeForce RTX 5090", 209.5),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 3090", 71),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 504)])
def test_mfu_knows_the_card(card, peak):
    assert model_flops_utilization(2 * 4e14, card, world_size=2) == pytest.approx(400 / peak)


@pytest.mark.parametrize("card", [
    "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 5090 D", "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3090 Ti", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A100-SXM-64GB",
    "NVIDIA H100 80GB HBM2e", "NVIDIA A10G", "Tesla V100-FHHL-16GB", "NVIDIA RTX A1000",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "GRID A100-40C",
    "AMD Instinct MI300X", "NVIDIA Graphics Device"])
def test_mfu_of_an_unknown_variant_is_not_that_of_another(card):
    """Guards against too low an MFU, because a slower card has a fast card's name in its own."""
    assert model_flops_utilization(4e14, card) is None


def test_mfu_knows_the_cards_of_the_presets():
    """Guards against a machine preset without an MFU."""
    cards = {"NVIDIA A100-SXM4-40GB": 40, "NVIDIA A100 80GB PCIe": 80, "NVIDIA H100 80GB HBM3": 80,
             "NVIDIA GeForce RTX 5090": 32, "NVIDIA GeForce RTX 4090": 24, "Tesla T4": 15}
    found = {presets.name_gpu(card, gib * presets.GIB) for card, gib in cards.items()
             if find_peak_tflops(card)}
    assert found == set(presets.MACHINE_PRESETS) - {"mps", "cpu"}


def test_flops_per_token_at_124m():
    # 6 N, and 12 layers x 12 heads x 64 wide x 1024 tokens x 12
    assert flops_per_token(124_475_904, GPTConfig(), 1024) == 746_855_424 + 113_246_208
