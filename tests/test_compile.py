"""
What compiling does to a training step, as far as a machine without a GPU can tell: the order of the
generated code, DDP's buckets, the fallback, and the update that does not wait for the host.
"""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_config
from torch.nn.parallel import DistributedDataParallel as DDP

import train_gpt2
from gpt2lab import kernels, optim, parallel
from gpt2lab.distributed import Ranks
from train_gpt2 import GPT, GPTConfig

CPU = Ranks(torch.device("cpu"))


def make_model(**sizes):
    """An optimized GPT with the same weights every time."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=64)
                          | sizes))
    kernels.optimize(model)
    return model


def random_batch(B=8, T=32):
    """(x, y), (B, T) int64 each."""
    rows = torch.randint(300, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# -----------------------------------------------------------------------------
# the generated code

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@pytest.fixture
def fresh_compiler_cache():
    """Everything is compiled anew, because code from a cache could not be looked at."""
    import torch._inductor.config
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def buffer_shapes(code):
    """[(dtype, shape)] of the tensors that code of Inductor for the CPU allocates."""
    return [(match[2], tuple(map(int, re.findall(r"\d+", match[1]))))
            for match in re.finditer(r"empty_strided_cpu\((\([^)]*\)), \([^)]*\), torch\.(\w+)\)",
                                     code)]


@needs_compiler
def test_compiled_code_never_holds_more_than_a_chunk_of_logits(monkeypatch, fresh_compiler_cache):
    """torch.compile once made the logits of all chunks first, and kept all of them."""
    from torch._inductor.utils import run_and_get_code
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 16)
    model, (x, y) = make_model(n_layer=1), random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        (_, loss), (code, *_) = run_and_get_code(torch.compile(model), x, y)
    shapes = buffer_shapes(code)
    assert ("bfloat16", (256, 64)) in shapes or ("float32", (256, 64)) in shapes  # 256 rows
    assert not [shape for _, shape in shapes if 384 in shape]  # of the padded vocabulary
    with torch.autocast("cpu", torch.bfloat16):
        assert loss.item() == pytest.approx(model(x, y)[1].item(), rel=1e-2)


@needs_compiler
def test_the_compiled_gradient_of_logits_takes_no_float32_buffer(fresh_compiler_cache):
    """A scatter was not fused, and float32 values of the size of the logits were written."""
    from torch._inductor.utils import run_and_get_code
    logits, targets = torch.randn(16, 384).bfloat16(), torch.arange(16)
    expected_loss, expected = kernels.softmax_gradient_uncompiled(logits.clone(), targets)
    loss, (code, *_) = run_and_get_code(torch.compile(kernels.softmax_gradient), logits, targets)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-4)
    assert torch.allclose(logits, expected, rtol=1e-2)
    assert buffer_shapes(code)  # the sums of the rows
    assert not [shape for _, shape in buffer_shapes(code) if 384 in shape]


# -----------------------------------------------------------------------------
# falling back


class Config:
    """The fields of a TrainConfig that compiling looks at, for CUDA graphs."""

    compile, compile_mode, fsdp = True, "reduce-overhead", False


class FailsAt:
    """A compiled model whose call of this number fails."""

    def __init__(self, raw_model, number):
        self.raw_model, self.number, self.calls = raw_model, number, 0

    def __call__(self, x, y):
        self.calls += 1
        if self.calls == self.number:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self.raw_model(x, y)


@pytest.fixture
def cuda_graphs(monkeypatch):
    """Training behaves as if it replayed CUDA graphs, on the CPU."""
    monkeypatch.setattr(parallel, "uses_cuda_graphs", lambda config, device: True)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failure_to_record_cuda_graphs_falls_back(cuda_graphs, capsys, number):
    """Graphs are recorded in the second pass. That failure ended the run in its first update."""
    raw_model = make_model()
    compiled = FailsAt(raw_model, number)
    model = parallel.compile_or_fall_back(
        compiled, raw_model, random_batch(), Config, CPU, torch.float32)
    assert model is raw_model
    assert compiled.calls == number
    assert "training goes on uncompiled" in capsys.readouterr().out
    assert all(not p.grad.any() for p in raw_model.parameters())


def test_graphs_that_can_be_recorded_leave_zero_gradients_in_the_same_memory(cuda_graphs, capsys):
    raw_model = make_model()
    compiled, addresses = FailsAt(raw_model, None), []
    raw_call = compiled.__call__

    def record_addresses(x, y):
        addresses.append([p.grad.data_ptr() for p in raw_model.parameters()])
        return raw_call(x, y)

    model = parallel.compile_or_fall_back(
        record_addresses, raw_model, random_batch(), Config, CPU, torch.float32)
    assert model is record_addresses
    assert "compiled in" in capsys.readouterr().out
    addresses.append([p.grad.data_ptr() for p in raw_model.parameters()])
    assert len(addresses) == 4  # three passes, and afterwards
    assert addresses.count(addresses[0]) == 4
    assert all(not p.grad.any() for p in raw_model.parameters())


def test_the_loss_falls_back_when_its_kernel_cannot_be_compiled(monkeypatch, capsys):
    """A GPU on a machine without a C compiler, or Windows, which has no Triton."""
    def refuse(function, **options):
        raise RuntimeError("Failed to find C compiler")

    logits, targets = torch.randn(6, 30), torch.arange(6)
    expected_loss, expected = kernels.softmax_gradient_uncompiled(logits.clone(), targets)
    kernels.compiled_softmax_gradient.cache_clear()
    monkeypatch.setattr(kernels, "compile_failures", [])
    monkeypatch.setattr(kernels, "compiles_loss", lambda device: True)
    monkeypatch.setattr(torch, "compile", refuse)
    for _ in range(2):
        loss, gradient = kernels.differentiate(logits.clone(), targets)
        assert loss == expected_loss
        assert torch.equal(gradient, expected)
    assert capsys.readouterr().out.count("Failed to find C compiler") == 1


# -----------------------------------------------------------------------------
# DDP's buckets


@pytest.fixture
def process_group(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_ddp_cuts_a_compiled_graph_at_its_buckets(process_group, monkeypatch, grad_checkpoint):
    """Uncut, no gradient would be sent before all of them are computed. Checkpointing is cut too"""
    from torch._dynamo.backends.distributed import DDPOptimizer
    buckets = []
    original = DDPOptimizer.compile_fn

    def record_buckets(self, *args, **options):
        compiled = original(self, *args, **options)
        buckets.append(len(self.buckets))
        return compiled

    monkeypatch.setattr(DDPOptimizer, "compile_fn", record_buckets)
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 64)
    raw_model, (x, y) = make_model(n_layer=3, n_embd=256), random_batch()
    raw_model.grad_checkpoint = grad_checkpoint
    model = DDP(torch.compile(raw_model, backend="aot_eager"), bucket_cap_mb=1,
                gradient_as_bucket_view=True)
    for synchronise in (False, True):  # two micro-steps
        model.require_backward_grad_sync = synchronise
        _, loss = model(x, y)
        loss.backward()
    gradients = [p.grad.clone() for p in raw_model.parameters()]
    assert max(buckets) > 1
    raw_model.zero_grad()
    for _ in range(2):
        _, expected_loss = raw_model(x, y)
        expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    for gradient, p in zip(gradients, raw_model.parameters(), strict=True):
        assert torch.allclose(gradient, p.grad, rtol=1e-3, atol=1e-6)


# -----------------------------------------------------------------------------
# the update does not wait for the host


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("finite", [True, False])
def test_step_if_does_the_ordinary_update_or_none(name, finite):
    models, scaler = [make_model(), make_model()], torch.amp.GradScaler("cpu", enabled=False)
    optimizers = [model.configure_optimizers(0.1, 1e-2, name=name) for model in models]
    for step in range(3):
        for model in models:
            model(*random_batch())[1].backward()
        optimizers[0].step()
        optim.step_if(torch.tensor(True), optimizers[1], scaler)
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step == 1 and not finite:  # an update that must leave no trace
            for p in models[1].parameters():
                p.grad = torch.full_like(p, torch.nan)
            optim.step_if(torch.tensor(False), optimizers[1], scaler)
            optimizers[1].zero_grad()
    for expected, p in zip(*[model.parameters() for model in models], strict=True):
        assert torch.equal(expected, p)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for expected, state in zip(*[s.values() for s in states], strict=True):
        assert all(torch.equal(expected[key], state[key]) for key in expected)


def test_the_host_reads_one_tensor_after_the_optimizer_has_stepped(
        data_dir, tmp_path, monkeypatch):
    """Guards against a GPU that waits for the host between the loss and the update."""
    original_step, events = train_gpt2.training_step, []

    def record(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: events.append(name) or original(*args))

    def training_step(run, *args):
        record(run.optimizer, "step")
        record(torch.Tensor, "tolist")
        record(torch.Tensor, "item")
        result = original_step(run, *args)
        monkeypatch.undo()
        return result

    monkeypatch.setattr(train_gpt2, "training_step", training_step)
    train_gpt2.train(tiny_config(data_dir, tmp_path, max_steps=1, eval_every=0, sample_every=0))
    assert events == ["step", "tolist"]


def test_the_host_reads_no_number_before_the_update_is_launched():
    """With fused AdamW the kernel decides, so that a GPU is not idle while the host decides."""
    model = make_model()
    optimizer = model.configure_optimizers(0.1, 1e-2)
    model(*random_batch())[1].backward()
    events = []

    class Finite:
        """Stands in for a tensor on a device, which the host must not read."""

        device = torch.device("cpu")

        def __invert__(self):
            events.append("on the device")
            return torch.tensor(False)

        def item(self):
            events.append("read by the host")
            return True

    optim.step_if(Finite(), optimizer, SimpleNamespace(is_enabled=lambda: False))
    assert events == ["on the device"]
    assert not hasattr(optimizer, "found_inf")  # for whoever steps it next
