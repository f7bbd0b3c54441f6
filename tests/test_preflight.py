"""--check: the memory that it expects, the presets that follow from it, and kernels for a GPU."""

from types import SimpleNamespace

import pytest
import torch
from conftest import parse_train_flags

import train_gpt2
from gpt2lab import device, preflight, presets
from gpt2lab.cli import UserError
from train_gpt2 import GPTConfig

CUDA = torch.device("cuda")

# -----------------------------------------------------------------------------
# memory

# (flags, dtype, processes, peak in GB) of whole updates of two micro-steps, with 1,024 tokens in a
# sequence: torch.cuda.max_memory_allocated() of torch 2.13.0 for CUDA 13.0 on GPUs that compute
# nothing. float16 is for compute capability 7.5, and bfloat16 for 9.0
MEASURED_PEAKS = [
    ("--B 8 --no_compile", torch.bfloat16, 1, 5.09),
    ("--B 8 --no_compile --grad_checkpoint", torch.bfloat16, 1, 3.22),
    ("--B 16 --no_compile", torch.bfloat16, 1, 7.28),
    ("--B 16 --no_compile --grad_checkpoint", torch.bfloat16, 1, 3.59),
    ("--B 32 --no_compile", torch.bfloat16, 1, 11.68),
    ("--B 32 --no_compile --grad_checkpoint", torch.bfloat16, 1, 4.74),
    ("--B 64 --no_compile", torch.bfloat16, 1, 20.61),
    ("--B 64 --no_compile --grad_checkpoint", torch.bfloat16, 1, 7.11),
    ("--model gpt2-medium --B 8 --no_compile", torch.bfloat16, 1, 12.83),
    ("--model gpt2-medium --B 8 --no_compile --grad_checkpoint", torch.bfloat16, 1, 7.78),
    ("--B 8 --no_compile", torch.float16, 1, 5.04),
    ("--B 64 --no_compile --grad_checkpoint", torch.float16, 1, 7.06),
    ("--B 64 --compile", torch.bfloat16, 1, 25.08),
    ("--B 64 --compile --grad_checkpoint", torch.bfloat16, 1, 7.19),
    ("--B 8 --compile", torch.bfloat16, 1, 5.68),
    ("--B 16 --compile", torch.bfloat16, 1, 8.44),
    ("--B 8 --compile", torch.float16, 1, 5.63),
    ("--B 32 --compile", torch.bfloat16, 1, 14.00),
    ("--B 8 --compile --grad_checkpoint", torch.bfloat16, 1, 3.05),
    ("--B 32 --compile --grad_checkpoint", torch.bfloat16, 1, 4.74),
    ("--model gpt2-medium --B 8 --compile", torch.bfloat16, 1, 14.41),
    ("--B 8 --fsdp", torch.bfloat16, 2, 4.35),
    ("--B 32 --compile", torch.float16, 1, 13.96),
    ("--B 64 --compile", torch.float16, 1, 25.03),
    ("--B 8 --compile --grad_checkpoint", torch.float16, 1, 3.00),
    ("--B 64 --no_compile", torch.float16, 1, 20.55),
    ("--B 8 --no_compile --dtype float32", torch.float32, 1, 6.75),
    ("--B 16 --no_compile --optimizer muon", torch.bfloat16, 1, 6.94),
    ("--n_layer 4 --n_embd 256 --n_head 4 --B 32 --no_compile", torch.bfloat16, 1, 1.87),
    ("--B 8 --fsdp --grad_checkpoint", torch.bfloat16, 2, 2.28),
    ("--B 32 --fsdp", torch.bfloat16, 2, 10.93),
    ("--B 32 --fsdp --grad_checkpoint", torch.bfloat16, 2, 3.93),
    ("--B 8 --no_compile", torch.bfloat16, 2, 5.59),
]


def estimate(flags, dtype, world_size=1, device=CUDA):
    """Bytes that --check expects a process to need, for flags of train_gpt2.py in one string."""
    _, config = parse_train_flags(*flags.split())
    model_config = GPTConfig(**presets.model_sizes(config))
    return preflight.estimate_memory(model_config, config, device, dtype, world_size)[0]


@pytest.mark.parametrize("flags, dtype, world_size, peak", MEASURED_PEAKS)
def test_the_memory_estimate_is_near_the_measured_peak(flags, dtype, world_size, peak):
    """Guards against a --check that starts runs that do not fit, or refuses those that do."""
    assert estimate(flags, dtype, world_size) / 1e9 == pytest.approx(peak, rel=0.08)


def test_attention_on_a_mac_keeps_a_matrix_for_each_head():
    """Guards against an estimate without what attention's backward needs where it is not fused."""
    mps, cpu = (estimate("--B 4 --no_compile", torch.float32, device=torch.device(name))
                for name in ("mps", "cpu"))
    assert mps - cpu == 4 * 12 * (12 * 1024 * 1024 * 4)


def test_a_cpu_in_16_bits_needs_room_for_copies_of_the_weights():
    """Guards against an estimate without them: with few tokens, activations save less than that."""
    def gain(flags):
        exact, rounded = (estimate(flags, dtype, device=torch.device("cpu"))
                          for dtype in (torch.float32, torch.bfloat16))
        return (exact - rounded) / 2**20

    # measured: -86 to -180 MB, with matmuls that return zeros, so that oneDNN needs no memory
    assert -200 < gain("--B 4 --T 128") < -50
    assert gain("--B 8 --T 1024") > 1000


# -----------------------------------------------------------------------------
# dtypes of a CPU

X86 = dict(machine="x86_64", capability="AVX512", flags=["avx512_bf16"])


@pytest.mark.parametrize("changes, fast, reason", [
    ({}, True, "instructions for it (AVX512-BF16)"),
    (dict(flags=["avx512_bf16", "amx_bf16"]), True, "(AVX512-BF16, AMX)"),
    (dict(flags=["avx512_f"]), False, "has no instructions for it"),
    (dict(capability="AVX2"), False, "ATEN_CPU_CAPABILITY rules out"),
    (dict(env={"ONEDNN_MAX_CPU_ISA": "AVX2"}), False, "ONEDNN_MAX_CPU_ISA=AVX2 rules out"),
    (dict(env={"DNNL_MAX_CPU_ISA": "avx512_core_vnni"}), False, "DNNL_MAX_CPU_ISA="),
    (dict(env={"ONEDNN_MAX_CPU_ISA": "avx512_core_bf16", "DNNL_MAX_CPU_ISA": "AVX2"}), True, ""),
    (dict(env={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}), True, ""),
    (dict(env={"ONEDNN_MAX_CPU_ISA": "ALL"}), True, ""),
    (dict(onednn=False), False, "has no instructions for it that torch uses"),
    (dict(machine="aarch64", flags=[], arm=True), True, "Arm's BF16"),
    (dict(machine="aarch64", flags=[], arm=False), False, "has no instructions"),
    (dict(machine="arm64", flags=[], arm=True, system="darwin"), False, "has no instructions")])
def test_a_cpu_computes_in_bfloat16_if_it_need_not_emulate_it(monkeypatch, changes, fast, reason):
    """Guards against emulation, a hundred times as slow, and against a fast CPU left unused."""
    values = {"env": {}, "onednn": True, "arm": False, "system": "linux"} | X86 | changes
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values["env"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device.platform, "machine", lambda: values["machine"])
    monkeypatch.setattr(device.sys, "platform", values["system"])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: values["onednn"])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: values["capability"])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(values["flags"], True))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: values["arm"])
    cpu, dtype = torch.device("cpu"), torch.bfloat16 if fast else torch.float32
    assert device.cpu_bfloat16()[0] == fast and reason in device.cpu_bfloat16()[1]
    assert device.pick_dtype("auto", cpu) == dtype
    assert device.explain_dtype("auto", cpu).startswith(f"computing in {str(dtype)[6:]}")
    warning = device.explain_dtype("bfloat16", cpu)
    assert warning is None if fast else "warning: " in warning
    assert device.explain_dtype("float32", cpu) is None
    assert device.pick_dtype("auto", torch.device("mps")) == torch.float32


def test_check_says_in_which_dtype_a_cpu_computes(call_main, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "cpu_bfloat16", lambda: (True, "it has units"))
    monkeypatch.setattr(preflight, "free_memory", lambda device: None)
    flags = ["--data_dir", tmp_path, "--log_dir", tmp_path, "--preset", "cpu", "--check"]
    out = call_main(train_gpt2, *flags, "--device", "cpu")[1]
    assert "\ncomputing in bfloat16, because it has units\n" in out
    assert "dtype" not in call_main(train_gpt2, *flags, "--dtype", "float32")[1].split("auto: ")[0]


# -----------------------------------------------------------------------------
# presets

# GiB that CUDA sees, of cards that people rent or own, and B of --preset auto
CARDS = {"Tesla T4": (14.6, 32), "NVIDIA L4": (22.0, 32), "NVIDIA A10G": (22.1, 32),
         "NVIDIA GeForce RTX 3090": (23.6, 32), "NVIDIA GeForce RTX 4090": (23.5, 32),
         "NVIDIA GeForce RTX 5090": (31.3, 64), "NVIDIA A100-SXM4-40GB": (39.4, 64),
         "NVIDIA L40S": (44.4, 64), "NVIDIA RTX A6000": (47.5, 64),
         "NVIDIA A100-SXM4-80GB": (79.1, 128), "NVIDIA H100 80GB HBM3": (79.1, 128),
         "NVIDIA H200": (139.8, 256)}


@pytest.fixture
def set_card(monkeypatch):
    """set_card(name, GiB, capability): torch.cuda describes one such card."""
    def set_card(name, memory_gib, capability=(9, 0), architectures=("sm_90",)):
        properties = SimpleNamespace(
            name=name, total_memory=int(memory_gib * presets.GIB), major=capability[0],
            minor=capability[1])
        answers = dict(
            is_available=True, device_count=1, get_device_properties=properties,
            get_device_name=name, get_device_capability=capability,
            get_arch_list=list(architectures), mem_get_info=(properties.total_memory,) * 2)
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, lambda *_, answer=answer: answer)
        monkeypatch.setattr(preflight, "attention_in_training", lambda *_: "flash attention")
    return set_card


@pytest.mark.parametrize("card", CARDS)
def test_the_preset_of_a_card_leaves_a_tenth_of_it_free_and_wastes_less_than_half(set_card, card):
    """Guards against a preset that runs out of memory, and against one that is too careful."""
    memory_gib, B = CARDS[card]
    set_card(card, memory_gib)
    _, config = parse_train_flags("--preset", "auto")
    dtype = torch.float16 if config.dtype == "float16" else torch.bfloat16
    assert config.B == B and config.compile is not False
    assert estimate(f"--B {B}", dtype) < 0.9 * memory_gib * presets.GIB
    assert estimate(f"--B {2 * B}", dtype) > 0.9 * memory_gib * presets.GIB


def test_a_gpu_without_free_memory_is_described(monkeypatch):
    """Other processes may hold all of it, which --check should say in a line of its own."""
    def refuse(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    answer = preflight.attention_in_training(torch.device("cuda"), torch.bfloat16)
    assert "no memory of the GPU is free" in answer


def test_a_gpu_with_little_memory_gets_one_sequence():
    assert presets.fit_B_to_gpu(2 * presets.GIB) == 1


# -----------------------------------------------------------------------------
# kernels for a GPU

CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize("capability, architectures, runs", [
    ((7, 5), CUDA_13, True), ((8, 9), CUDA_13, True), ((9, 0), CUDA_13, True),
    ((12, 0), CUDA_13, True), ((7, 0), CUDA_13, False), ((6, 1), CUDA_13, False),
    ((11, 0), CUDA_13, False), ((8, 0), ("sm_86",), False), ((9, 0), ("sm_90a",), True),
    ((12, 1), ("sm_120a",), False), ((13, 0), ("sm_90", "compute_120"), True),
    ((9, 0), ("compute_120",), False), ((7, 0), (), True),
    ((9, 4), ("gfx942",), True)])
def test_a_gpu_without_kernels_is_refused(set_card, capability, architectures, runs):
    """Guards against "no kernel image is available" in the middle of a run's start."""
    set_card("NVIDIA Card", 16, capability, architectures)
    if runs:
        assert device.pick_device("cuda") == CUDA
        return
    with pytest.raises(UserError, match=f"no kernels for sm_{capability[0]}{capability[1]}"):
        device.pick_device("auto")
    assert device.pick_device("cpu") == torch.device("cpu")


def test_check_lists_missing_kernels_among_the_problems(call_main, set_card, tmp_path):
    """Guards against a --check that says that a run can start on a GPU that torch cannot use."""
    set_card("Tesla V100-SXM2-16GB", 15.8, (7, 0), CUDA_13)
    flags = ["--data_dir", tmp_path, "--log_dir", tmp_path / "log", "--preset", "auto",
             "--dtype", "float16", "--device", "cuda"]
    code, out, err = call_main(train_gpt2, *flags, "--check")
    assert code == 2 and "the run could not start" in out and "sm_70" in out
    assert "rank 0: this torch has no kernels for sm_70" in err and "no val shard" in err
    code, out, err = call_main(train_gpt2, *flags)
    assert code == 2 and err.count("\n") == 1 and "no kernels for sm_70" in err
