"""
Checkpoints of nanoGPT and llm.c, written here by the rules of their formats, against Hugging Face's
GPT2LMHeadModel with the same weights. tests/test_resume.py has those of build-nanogpt.
"""

import re
import sys

import numpy as np
import pytest
import torch
from conftest import MakesFolderWhenUnpickled
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2lab import checkpoints
from gpt2lab.checkpoints import load_checkpoint, read_model_config, resolve_checkpoint, resume
from gpt2lab.cli import UserError
from gpt2lab.distributed import Ranks
from gpt2lab.pretrained import TRANSPOSED
from train_gpt2 import GPT, GPTConfig, TrainConfig, build_model, load

SIZES = dict(block_size=16, n_layer=2, n_head=2, n_embd=8)
WTE = "transformer.wte.weight"
# the tensors of a layer in the order of llm.c
LAYER_TENSORS = [f"{part}.{kind}" for part in (
    "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")]


def make_oracle(biases=True):
    """Hugging Face's GPT-2 of these SIZES, whose logits are far from uniform."""
    torch.manual_seed(0)
    oracle = GPT2LMHeadModel(GPT2Config(n_positions=16, n_layer=2, n_head=2, n_embd=8)).eval()
    for name, p in oracle.named_parameters():
        p.data += torch.randn_like(p) * 0.3
        if name.endswith("bias") and not biases:
            p.data.zero_()
    return oracle


def plain_weights(oracle, rows=50257, biases=True):
    """
    {name: tensor} of the oracle in the layout of nn.Linear, with `rows` rows of the embedding and
    without lm_head. Without `biases`, there are none.
    """
    weights = {name: p.data.t() if name.endswith(TRANSPOSED) else p.data
               for name, p in oracle.named_parameters() if biases or not name.endswith("bias")}
    padding = torch.zeros(rows - 50257, 8)
    return weights | {"transformer.wte.weight": torch.cat(
        [weights["transformer.wte.weight"], padding])}


def save_nanogpt(path, weights, prefix="", args=(), **changes):
    """Save a checkpoint as nanoGPT's train.py does. `args` changes its model_args."""
    optimizer = torch.optim.AdamW(list(weights.values()))
    weights = weights | {"lm_head.weight": weights["transformer.wte.weight"]}
    args = SIZES | dict(vocab_size=len(weights["lm_head.weight"]), dropout=0.0,
                        bias="transformer.ln_f.bias" in weights) | dict(args)
    state = {prefix + name: tensor for name, tensor in weights.items()}
    torch.save({"model": state, "optimizer": optimizer.state_dict(), "model_args": args,
                "iter_num": 2000, "best_val_loss": torch.tensor(3.0),
                "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True}} | changes,
               path)
    return path


def save_llmc(path, weights, version=3, **changes):
    """Save a model file as llm.c does. `changes` are numbers of the header, by their names."""
    header = np.zeros(256, "<i4")
    numbers = {"magic": 20240326, "version": version, "block_size": 16, "vocab_size": 50257,
               "n_layer": 2, "n_head": 2, "n_embd": 8,
               "padded": len(weights["transformer.wte.weight"])} | changes
    header[:8] = list(numbers.values())
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    names += [f"transformer.h.{layer}.{name}" for name in LAYER_TENSORS for layer in range(2)]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for name in names:
            tensor = weights[name].contiguous()
            tensor = tensor if version == 3 else tensor.bfloat16().view(torch.int16)
            file.write(tensor.numpy().tobytes())
    return path


def expect_logits(model, oracle):
    """Assert that a GPT has the oracle's logits for gpt2's 50,257 tokens."""
    idx = torch.randint(50257, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = model(idx)[0][..., :50257], oracle(idx).logits
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() < 1e-4


# -----------------------------------------------------------------------------
# what loads


@pytest.mark.parametrize("prefix, rows, biases", [
    ("", 50304, True), ("_orig_mod.", 50304, False), ("module.", 50257, False)])
def test_checkpoints_of_nanogpt_give_hugging_face_logits(
        gpt2_tokenizer, tmp_path, capsys, prefix, rows, biases):
    """Guards against lost prefixes, biases that are not 0, and a padded vocabulary."""
    oracle = make_oracle(biases)
    save_nanogpt(tmp_path / "ckpt.pt", plain_weights(oracle, rows, biases), prefix)
    model, tokenizer = load(tmp_path)  # the log folder
    expect_logits(model, oracle)
    assert (model.config.vocab_size, model.config.padded_vocab_size) == (50257, rows)
    assert tokenizer.spec == "gpt2"
    assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == 2000
    out, err = capsys.readouterr()
    assert out == "" and err.count("GELU with erf") == err.count("\n") == 1  # only once


def test_only_the_master_notes_what_a_checkpoint_says(tmp_path, capsys, monkeypatch):
    """Guards against the same line from every rank."""
    path = save_nanogpt(tmp_path / "ckpt.pt", plain_weights(make_oracle()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    GPT.from_pretrained(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("version", [3, 5])
def test_model_files_of_llmc_give_hugging_face_logits(tmp_path, version):
    """Guards against another order of the tensors, another dtype, and a padded vocabulary."""
    oracle = make_oracle()
    path = save_llmc(tmp_path / "model_00019552.bin", plain_weights(oracle, 50304), version)
    before = path.read_bytes()
    model = GPT.from_pretrained(path)
    expect_logits(model, oracle if version == 3 else oracle.bfloat16().float())
    assert read_model_config(path) == vars(model.config) == SIZES | {
        "vocab_size": 50257, "padded_vocab_size": 50304}
    checkpoint = load_checkpoint(path)
    assert checkpoint["step"] == 19552
    for tensor in checkpoint["model"].values():
        tensor.zero_()
    assert path.read_bytes() == before  # the file itself is never written to


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_never_holds_a_second_copy_of_llmcs_weights(tmp_path):
    """Guards against memory maps that stay while the next tensors are copied."""
    path = save_llmc(tmp_path / "gpt2_124M.bin", plain_weights(make_oracle(), 50304))
    maps = []

    class CountsMaps(dict):
        def pop(self, name):
            with open("/proc/self/maps", encoding="utf-8") as file:
                maps.append(file.read().count(str(path)))
            return super().pop(name)

    checkpoint = load_checkpoint(path)
    arrays = [re.sub(r"\.\d+\.", ".", name).replace("lm_head", "transformer.wte")
              for name in checkpoint["model"]]
    checkpoint["model"] = CountsMaps(checkpoint["model"])
    checkpoints.copy_weights(GPT.empty(GPTConfig(**checkpoint["model_config"])), checkpoint)
    # the largest arrays come first, while most of the model's own memory has not been touched
    assert arrays[0] == "transformer.wte.weight" and all("mlp.c_" in name for name in arrays[2:6])
    # each array has a map of its own, which ends before the next array is copied
    assert maps == [17 - len(set(arrays[:i + 1])) for i in range(len(arrays))]


def test_the_checkpoint_in_a_log_folder_is_found(tmp_path):
    """Guards against a folder that must be searched by hand, and against an old checkpoint."""
    weights = plain_weights(make_oracle(), 50304)
    for name in ("model_00000250.bin", "model_00010000.bin", "state_00010000_00000.bin"):
        save_llmc(tmp_path / name, weights)
    (tmp_path / "DONE_00010000").touch()
    assert resolve_checkpoint(tmp_path).name == "model_00010000.bin"
    save_nanogpt(tmp_path / "ckpt.pt", weights)
    with pytest.raises(UserError, match=r"two kinds: name .*ckpt\.pt or .*model_00010000\.bin"):
        resolve_checkpoint(tmp_path)
    torch.save({}, tmp_path / "model_00001.pt")  # our own
    assert resolve_checkpoint(tmp_path).name == "model_00001.pt"


@pytest.mark.parametrize("save", [save_nanogpt, save_llmc])
def test_foreign_checkpoints_are_a_start_but_cannot_be_resumed(tmp_path, save):
    """Guards against a run that goes on from an optimizer state of another format."""
    path = save(tmp_path / "model", plain_weights(make_oracle(), 50304))
    model = build_model(TrainConfig(init_from=str(path), T=16), 50257)
    with pytest.raises(UserError, match=r"no run can be resumed from it: start .*--init_from"):
        config = TrainConfig(resume=str(path), log_dir=str(tmp_path))
        resume(config, Ranks(torch.device("cpu")), model, None, None, "")


# -----------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("place", ["config", "model_args", "model", "optimizer"])
def test_code_in_a_checkpoint_of_nanogpt_is_never_run(tmp_path, monkeypatch, place):
    """Guards against a file from a stranger that does what it likes."""
    monkeypatch.chdir(tmp_path)
    save_nanogpt("ckpt.pt", plain_weights(make_oracle()), **{place: MakesFolderWhenUnpickled()})
    with pytest.raises(UserError, match=r"not a checkpoint of .*\(it holds \w+\.mkdir, which"):
        load(tmp_path)
    assert not (tmp_path / "hacked").exists()


def save_as_nanogpt(folder, weights):
    return save_nanogpt(folder / "ckpt.pt", plain_weights(make_oracle()), model=weights)


def save_as_ours(folder, weights):
    config = SIZES | {"vocab_size": 50257, "padded_vocab_size": 50257}
    torch.save({"step": 1, "model": weights, "model_config": config,
                "tokenizer": {"spec": "gpt2", "model": None}}, folder / "model_00001.pt")
    return folder


def save_as_hugging_face(folder, weights):
    GPT2Config(n_positions=16, n_layer=2, n_head=2, n_embd=8).save_pretrained(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("save", [save_as_nanogpt, save_as_ours, save_as_hugging_face])
@pytest.mark.parametrize("change", [
    lambda tensor: tensor.to("meta"), lambda tensor: tensor.to_sparse(),
    lambda tensor: tensor.to(torch.int8), lambda tensor: torch.zeros(1).expand(tensor.shape)])
def test_weights_that_are_not_stored_are_refused(tmp_path, save, change):
    """Guards against a traceback, and against a small file that fills the memory."""
    weights = plain_weights(make_oracle())
    source = save(tmp_path, weights | {"lm_head.weight": weights[WTE], WTE: change(weights[WTE])})
    with pytest.raises(UserError, match=f"{WTE}.*(name|shape)"):
        GPT.from_pretrained(source)


@pytest.mark.parametrize("changes", [
    {"model": [1]}, {"model": None}, {"model_config": 3}, {"tokenizer": "gpt2"}, {"step": "1"}])
def test_a_checkpoint_whose_parts_are_of_other_kinds_is_refused(tmp_path, changes):
    save_as_ours(tmp_path, plain_weights(make_oracle()))
    checkpoint = torch.load(tmp_path / "model_00001.pt") | changes
    torch.save(checkpoint, tmp_path / "model_00001.pt")
    with pytest.raises(UserError, match=rf"\(it lacks {min(changes)}\): name another"):
        load(tmp_path)


def without(weights, name):
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize("change, args, message", [
    (lambda w: w | {WTE: w[WTE][:65]}, {}, "vocabulary of 65 tokens.*make shards from the text"),
    (lambda w: w, {"vocab_size": 50304}, "no transformer.wte.weight of shape"),
    (lambda w: without(w, "transformer.h.1.ln_2.weight"), {}, "no transformer.h.1.ln_2.weight"),
    (lambda w: without(w, "transformer.ln_f.bias"), {"bias": True}, "no transformer.ln_f.bias"),
    (lambda w: w | {"transformer.h.0.rotary": torch.zeros(4)}, {}, "has a tensor .*h.0.rotary"),
    (lambda w: {name: tensor.int() for name, tensor in w.items()}, {}, "no transformer.wte.weight"),
    (lambda w: w, {"n_layer": 10**6}, "no transformer.h.2.ln_1.weight"),
    (lambda w: w, {"n_head": 3}, "its sizes contradict each other"),
    (lambda w: w, {"n_embd": "8"}, "n_embd is '8'"), (lambda w: w, {"block_size": 0}, "is 0"),
    (lambda w: w, {"n_layer": 2**31}, "from 1 to 1,000,000")])
def test_other_models_of_nanogpt_are_refused(tmp_path, change, args, message):
    """Guards against a model that computes something else, and against a traceback."""
    path = save_nanogpt(tmp_path / "ckpt.pt", change(plain_weights(make_oracle())), args=args)
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(path)


def test_an_untied_lm_head_of_nanogpt_is_refused(tmp_path):
    """Guards against a model that predicts with its input embedding."""
    weights = plain_weights(make_oracle())
    state = weights | {"lm_head.weight": weights[WTE] + 1}
    path = save_nanogpt(tmp_path / "ckpt.pt", weights, model=state)
    with pytest.raises(UserError, match="its lm_head differs"):
        load_checkpoint(path)


@pytest.mark.parametrize("changes, message", [
    ({"version": 4}, "version 4, but only 3"), ({"version": 2}, "version 2, but only 3"),
    ({"n_layer": 0}, "n_layer is 0"), ({"n_embd": -8}, "n_embd is -8"),
    ({"padded": 2**31 - 1}, "padded_vocab_size is 2147483647"),
    ({"vocab_size": 32000}, "vocabulary of 32000 tokens"), ({"padded": 50256}, "sizes contradict"),
    ({"n_layer": 3}, "bytes, but its header asks for"), ({"n_head": 3}, "sizes contradict"),
    ({"block_size": 10**6}, "bytes, but its header asks for"),
    ({"magic": 20240327}, "is not a checkpoint of")])  # a state, for tests of llm.c
def test_other_model_files_of_llmc_are_refused(tmp_path, changes, message):
    """Guards against weights that are read at wrong places, and against a traceback."""
    path = save_llmc(tmp_path / "model_00000001.bin", plain_weights(make_oracle(), 50304),
                     **changes)
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(path)


@pytest.mark.parametrize("change, message", [
    (lambda data: data[:-1], "bytes, but its header asks for"),
    (lambda data: data + b"\0", "bytes, but its header asks for"),
    (lambda data: data[:1024], "bytes, but its header asks for"),
    (lambda data: data[:1000], "cut off in its header"), (lambda data: data[:4], "cut off"),
    (lambda data: b"", "neither a complete file of torch.save nor a model file of llm.c")])
def test_damaged_model_files_of_llmc_are_named(tmp_path, change, message):
    """Guards against a download that was cut off and loads as another model."""
    path = save_llmc(tmp_path / "model_00000001.bin", plain_weights(make_oracle(), 50304))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as info:
        load(tmp_path)
    assert str(path) in str(info.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors",
                                  "pytorch_model.bin", "pytorch_model-00002-of-00002.bin"])
def test_a_file_of_a_hugging_face_folder_is_refused_with_the_folder(tmp_path, name):
    """Guards against "is not a checkpoint" for a model that would load by another name."""
    weights = plain_weights(make_oracle())
    save = save_file if name.endswith("safetensors") else torch.save
    save({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / name)
    with pytest.raises(UserError, match="one file of a Hugging Face model: name its folder, "
                                        + re.escape(str(tmp_path))):
        load(tmp_path / name)
