"""Exports: transformers loads them, train_gpt2.py loads them again, and they go to the hub."""

import json
import shutil
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, run_script, small_text, tiny_config
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import export_hf
import fineweb
import sample
from gpt2lab import pretrained, shards
from gpt2lab import tokenizer as tokenizer_module
from gpt2lab.checkpoints import gather_state, load_checkpoint
from gpt2lab.cli import UserError
from gpt2lab.generate import generate
from gpt2lab.pretrained import load_tokenizer
from gpt2lab.tokenizer import make_tokenizer, train_bpe
from train_gpt2 import GPT, GPTConfig, TrainConfig, load, train

# without asterisks: a row of them has several segmentations that spm finds equally good
TEXT = small_text(5000).replace("*", "") + " " + export_hf.PROBE


def save_run(log_dir, tokenizer, scale=8.0, n_embd=32, block_size=48, **config):
    """
    Save a checkpoint of a random model whose weights are enlarged by `scale`, so that its logits
    are far from uniform. `config` changes the TrainConfig. Returns log_dir.
    """
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=n_embd, block_size=block_size,
                          vocab_size=tokenizer.vocab_size))
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.02  # so that biases are not 0
        p.data *= scale if p.dim() > 1 else 1.0
    log_dir.mkdir(exist_ok=True)
    state = gather_state(model, model.configure_optimizers(0.1, 1e-3))
    torch.save({"step": 7, **state, "model_config": vars(model.config),
                "config": asdict(TrainConfig(log_dir=str(log_dir), **config)),
                "tokenizer": tokenizer.state()}, log_dir / "model_00007.pt")
    return log_dir


@pytest.fixture(scope="module")
def bpe_run(tmp_path_factory, data_dir):
    """A log folder with a log, whose tokenizer was trained on the small text."""
    log_dir = save_run(tmp_path_factory.mktemp("export") / "log",
                       shards.load_data_tokenizer(data_dir), data_dir=str(data_dir))
    (log_dir / "log.txt").write_text("0 val 9.5\n6 train 3.25\n7 val 3.125\n7 hella 0.25\n9 va")
    return log_dir


@pytest.fixture(scope="module")
def exported(bpe_run):
    """The folder exported from bpe_run."""
    return export_hf.export(bpe_run, bpe_run.parent / "out")


def test_transformers_computes_the_same_logits(bpe_run, exported):
    ours, theirs = GPT.from_pretrained(bpe_run), AutoModelForCausalLM.from_pretrained(exported)
    idx = torch.randint(300, (4, 48))
    with torch.no_grad():
        expected, logits = ours(idx)[0], theirs(idx).logits
    assert logits.shape == (4, 48, 300) and expected.shape[-1] == 384  # without padding rows
    assert logits.std() > 0.5 and logits.dtype == torch.float32
    assert (expected[..., :300] - logits).abs().max() < 1e-4
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()


def test_transformers_finds_all_tensors_and_no_others(exported):
    """Guards against names that other readers want and transformers warns about."""
    _, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info


def test_the_folder_has_what_mlx_lm_and_llama_cpps_converter_read(exported):
    """mlx-lm needs OpenAI's own names, without "transformer."; the converter needs n_ctx."""
    names = load_file(exported / "model.safetensors")
    assert {"wte.weight", "wpe.weight", "ln_f.bias", "h.0.attn.c_attn.weight"} < set(names)
    assert not [name for name in names if name.startswith(("transformer.", "lm_head"))]
    config = json.loads((exported / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 48


def test_transformers_generates_the_same_greedy_text(bpe_run, exported):
    ours, tokenizer = load(bpe_run)
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    their_tokenizer = AutoTokenizer.from_pretrained(exported)
    prompt = "The statement is"
    ids = tokenizer.encode(prompt)
    [expected] = generate(ours, ids, tokenizer.eot, tokenizer.vocab_size,
                          max_new_tokens=30, temperature=0)
    assert len(set(expected)) > 3  # it does not just repeat one token
    output = theirs.generate(**their_tokenizer(prompt, return_tensors="pt"), do_sample=False,
                             max_new_tokens=30)[0]
    assert their_tokenizer.decode(output, skip_special_tokens=True) == tokenizer.decode(
        ids + expected)


def build_tokenizer(kind, text_file, tmp_path):
    """A tokenizer trained on the small text, or gpt2's; "path" is one read from a file."""
    if kind.startswith("spm"):
        pytest.importorskip("sentencepiece")
    if kind == "path":
        path = tmp_path / "tokenizer.json"
        path.write_text(train_bpe([small_text()], 400).model, encoding="utf-8")
        kind = str(path)
    return make_tokenizer(kind, lambda: [text_file.read_text("utf-8")])


@pytest.mark.parametrize("kind", ["gpt2", "bpe:500", "spm:500", "path"])
def test_autotokenizer_gives_the_same_tokens_and_so_does_the_way_back(
        kind, text_file, tmp_path, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_tokenizer")
    tokenizer = build_tokenizer(kind, text_file, tmp_path)
    out = export_hf.export(save_run(tmp_path / "log", tokenizer), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.encode(TEXT)
    assert theirs(TEXT)["input_ids"] == ids and theirs.decode(ids) == TEXT
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot
    assert theirs("<|endoftext|>")["input_ids"] == [tokenizer.eot]
    assert theirs.model_max_length == 48
    back = load_tokenizer(out)
    assert back.encode(TEXT) == ids and back.eot == tokenizer.eot
    assert back.vocab_size == tokenizer.vocab_size and back.decode(ids) == TEXT


def test_a_tokenizer_that_hugging_face_cannot_express_is_exported_for_us_only(
        tmp_path, text_file, capsys):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(  # the export knows the model_type unigram only
        input=str(text_file), model_prefix=str(tmp_path / "m"), vocab_size=500, byte_fallback=True,
        bos_id=-1, eos_id=1, eos_piece="<|endoftext|>", unk_id=0, minloglevel=2, model_type="bpe",
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)
    tokenizer = make_tokenizer(str(tmp_path / "m.model"), None)
    out = export_hf.export(save_run(tmp_path / "log", tokenizer), tmp_path / "out")
    assert "AutoTokenizer will not load" in capsys.readouterr().out
    assert not (out / "tokenizer.json").exists()
    assert load_tokenizer(out).encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_exported_in_the_dtype_of_the_flag(bpe_run, tmp_path, dtype, call_main):
    checkpoint = bpe_run / "model_00007.pt"
    code, out, _ = call_main(export_hf, checkpoint, tmp_path / "out", "--dtype", dtype)
    assert code == 0 and "6 files" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    expected = GPT.from_pretrained(bpe_run).transformer.wte.weight[:300].to(model.dtype)
    assert torch.equal(model.transformer.wte.weight, expected)


def test_the_model_card_lists_losses_data_and_recipe(exported):
    card = (exported / "README.md").read_text("utf-8")
    assert "| validation loss (nats a token) | 3.1250 | 7 |" in card
    assert "| training loss (nats a token) | 3.2500 | 6 |" in card
    assert "| HellaSwag accuracy (length-normalised) | 0.2500 | 7 |" in card
    assert "`corpus.txt`" in card and "tokens held out" in card and "| max_lr | 0.0006 |" in card
    assert "7 updates, 3,670,016 tokens" in card
    assert str(exported.parent) not in card  # folders of this machine are private


def test_a_hugging_face_folder_is_exported_to_the_same_files(exported, tmp_path):
    card, *names = sorted(path.name for path in exported.iterdir())
    out = export_hf.export(exported, tmp_path / "again", "float32")
    assert [path.name for path in sorted(out.iterdir())] == [card, *names]
    for name in names:
        assert (out / name).read_bytes() == (exported / name).read_bytes()


def test_the_card_of_a_model_without_a_run_says_only_what_is_known(bpe_run, exported, tmp_path):
    """Guards against a model of someone else that our card calls trained from scratch here."""
    checkpoint = load_checkpoint(bpe_run / "model_00007.pt")
    del checkpoint["config"]  # as a checkpoint of build-nanogpt, nanoGPT or llm.c
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    for source, spec in ((tmp_path / "ckpt.pt", "bpe:300"), (exported, "tokenizer.json")):
        card = (export_hf.export(source, tmp_path / source.stem) / "README.md").read_text("utf-8")
        assert f"(tokenizer `{spec}`), written by gpt2-lab from `{source.name}`." in card
        assert "vocabulary of 300 " in card and 'pipeline("text-generation"' in card
        assert not [word for word in ("trained", "update", "##", "base_model", "license")
                    if word in card]


@pytest.mark.parametrize("text, license", [
    ("---\ntags:\n- gpt2\nlicense: apache-2.0\n---\n# Title\n", "apache-2.0"),
    ("---\nlicense: 'mit'\n---\n", "mit"), ("# Title\n\nlicense: mit\n", None),
    ("---\ntags: x\n---\nlicense: mit\n---\n", None), ("", None)])
def test_a_licence_is_named_only_if_the_front_matter_names_it(tmp_path, text, license):
    (tmp_path / "README.md").write_text(text)
    assert export_hf.read_license(tmp_path) == license


def test_all_exported_files_have_the_same_permissions(exported):
    modes = {path.stat().st_mode for path in exported.iterdir()}
    assert len(modes) == 1


# errors


def expect_one_line(call_main, message, *flags):
    """Run export_hf.py with flags that must fail with `message`."""
    code, _, err = call_main(export_hf, *flags)
    assert code == 2 and message in err and err.count("\n") == 1


def test_bad_command_lines(call_main, bpe_run, exported, tmp_path):
    before = sorted(exported.iterdir())
    expect_one_line(call_main, "is not empty", bpe_run, exported)
    assert sorted(exported.iterdir()) == before
    (tmp_path / "file").write_text("mine")
    expect_one_line(call_main, "is a file", bpe_run, tmp_path / "file")
    out = tmp_path / "out"
    expect_one_line(call_main, "no such file or folder", tmp_path / "no", out)
    expect_one_line(call_main, "holds neither", tmp_path, out)
    expect_one_line(call_main, "not the name of a repository",
                    bpe_run, out, "--push_to_hub", "mine")
    expect_one_line(call_main, "--private is about", bpe_run, out, "--private")
    assert not out.exists() and (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
        call_main, bpe_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_hf, "load_checkpoint", lambda path: pytest.fail("begins to work"))
    (tmp_path / "file").write_text("mine")
    expect_one_line(call_main, "name another folder", bpe_run, tmp_path / "file" / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").write_text("mine")
    expect_one_line(call_main, "is not empty", bpe_run, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == [".hidden"]


def test_an_empty_folder_is_filled_and_not_replaced(call_main, bpe_run, tmp_path, monkeypatch):
    """Guards against a shell that stands in the folder and finds itself in a deleted one."""
    monkeypatch.chdir(tmp_path)
    number = tmp_path.stat().st_ino
    code, _, err = call_main(export_hf, bpe_run, ".")
    assert code == 0, err
    assert tmp_path.stat().st_ino == number
    assert "config.json" in [p.name for p in tmp_path.iterdir()] and not list(tmp_path.glob("*tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file-size limit")
def test_a_full_disk_is_an_error_of_one_line(call_main, bpe_run, tmp_path):
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        expect_one_line(call_main, "make room", bpe_run, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_weights_too_large_for_float16(call_main, bpe_run, tmp_path):
    log_dir = save_run(tmp_path / "log", load(bpe_run)[1], scale=1e6)
    expect_one_line(call_main, "is not finite", log_dir, tmp_path / "out", "--dtype", "float16")
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_an_export_that_fails_leaves_no_files(call_main, bpe_run, tmp_path, monkeypatch):
    def write_half_and_fail(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", write_half_and_fail)
    expect_one_line(call_main, "No space left", bpe_run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# loading Hugging Face folders


def test_an_export_loads_as_the_same_model(bpe_run, exported, call_main):
    model = GPT.from_pretrained(str(exported))
    assert (model.config.vocab_size, model.config.padded_vocab_size) == (300, 300)
    idx = torch.randint(300, (2, 48))
    with torch.no_grad():
        expected = GPT.from_pretrained(bpe_run)(idx)[0][..., :300]
        assert (model(idx)[0] - expected).abs().max() < 1e-5
    flags = ("--greedy", "--device", "cpu", "--max_new_tokens", 10, "--prompt", "The")
    texts = [call_main(sample, "--model", source, *flags) for source in (bpe_run, exported)]
    assert texts[0] == texts[1] and texts[0][0] == 0


@pytest.fixture(scope="module")
def hf_model_and_folder(tmp_path_factory):
    """A random model of transformers, and the folder to which it is saved in several files."""
    torch.manual_seed(2)
    model = GPT2LMHeadModel(GPT2Config(n_positions=40, vocab_size=257, n_layer=3, n_head=2,
                                       n_embd=48, initializer_range=0.2)).eval()
    folder = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model, folder


def test_training_starts_from_a_hugging_face_folder(hf_model_and_folder, text_file, tmp_path):
    model, folder = hf_model_and_folder
    ours = GPT.from_pretrained(str(folder))
    idx = torch.randint(257, (2, 40))
    with torch.no_grad():
        assert (ours(idx)[0] - model(idx).logits).abs().max() < 1e-4
    fineweb.prepare([str(text_file)], tmp_path / "data", "bpe:257")
    for lr, atol in ((0.0, 1e-4), (1e-3, 10)):
        train(tiny_config(tmp_path / "data", tmp_path / str(lr), init_from=str(folder),
                          max_steps=2, max_lr=lr, min_lr=lr))
        out = export_hf.export(tmp_path / str(lr), tmp_path / f"out{lr}")
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(out)(idx).logits
            assert torch.allclose(logits, model(idx).logits, atol=atol)
    assert not torch.allclose(logits, model(idx).logits, atol=1e-2)  # the second run has learned


@pytest.fixture
def hf_folder(hf_model_and_folder, tmp_path):
    """A copy of the folder, which a test may change."""
    shutil.copytree(hf_model_and_folder[1], tmp_path / "copy")
    return tmp_path / "copy"


def test_vocab_json_and_merges_txt_load_as_a_tokenizer(hf_folder):
    ours = train_bpe([small_text()], 400)
    model = json.loads(ours.model)["model"]
    (hf_folder / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": 399}))
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    (hf_folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    tokenizer = load_tokenizer(hf_folder)
    assert tokenizer.encode(TEXT) == ours.encode(TEXT)
    assert (tokenizer.vocab_size, tokenizer.eot) == (400, 399)


def test_an_untied_lm_head_is_refused(hf_model_and_folder, tmp_path):
    model, folder = hf_model_and_folder
    shutil.copy(folder / "config.json", tmp_path)
    state = model.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    GPT.from_pretrained(str(tmp_path))  # lm_head may be stored, if it equals wte
    state["lm_head.weight"] = state["lm_head.weight"] + 0.01
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="lm_head is untied"):
        GPT.from_pretrained(str(tmp_path))


def test_missing_values_of_config_json_are_those_of_gpt2(hf_folder):
    path = hf_folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("n_positions", "n_inner", "activation_function"):
        config.pop(key, None)
    path.write_text(json.dumps(config))
    assert pretrained.read_config(hf_folder)["n_positions"] == 1024


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.",
                                    "module._orig_mod."])
@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_names_with_the_prefixes_of_compile_and_ddp_load(
        hf_model_and_folder, tmp_path, prefix, in_shards, ending):
    model, folder = hf_model_and_folder
    shutil.copy(folder / "config.json", tmp_path)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()
             if name != "lm_head.weight"}
    save = torch.save if ending == "bin" else save_file
    whole = "pytorch_model.bin" if ending == "bin" else "model.safetensors"
    if in_shards:
        names = list(state)
        weight_map = {name: f"part{i % 2}.{ending}" for i, name in enumerate(names)}
        for i in range(2):
            save({name: state[name] for name in names[i::2]}, tmp_path / f"part{i}.{ending}")
        (tmp_path / f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save(state, tmp_path / whole)
    ours, expected = GPT.from_pretrained(tmp_path), GPT.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(
        ours.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("change", [
    lambda tensor: tensor.to(torch.int8), lambda tensor: tensor.to_sparse(),
    lambda tensor: tensor.to("meta")])
def test_weights_that_are_not_plain_numbers_are_refused(hf_model_and_folder, tmp_path, change):
    """Guards against a quantized model, whose integers would be taken for weights."""
    model, folder = hf_model_and_folder
    shutil.copy(folder / "config.json", tmp_path)
    torch.save({name: change(tensor) for name, tensor in model.state_dict().items()},
               tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not quantized"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, -10, -1000])
@pytest.mark.parametrize("content", ["state", "list"])
def test_a_bin_that_is_cut_off_or_holds_no_weights(hf_model_and_folder, tmp_path, size, content):
    model, folder = hf_model_and_folder
    shutil.copy(folder / "config.json", tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict() if content == "state" else [1, 2, 3], path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="holds no weights, or is damaged"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("files, vocab_size, message", [
    ([], 257, "put its tokenizer.json into the folder"), ([], 60_000, "put its tokenizer.json"),
    (["vocab.json"], 50257, "only one of vocab.json and merges.txt"),
    (["vocab.json", "merges.txt"], 50257, "is damaged")])
def test_a_folder_without_its_tokenizer_is_refused_before_any_download(
        hf_folder, call_main, monkeypatch, files, vocab_size, message):
    monkeypatch.setattr(tokenizer_module, "load_gpt2", lambda: pytest.fail("downloads gpt2"))
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size}))
    for name in files:
        (hf_folder / name).write_text("{")
    code, _, err = call_main(sample, "--model", hf_folder, "--device", "cpu")
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_a_folder_without_a_tokenizer_but_with_gpt2s_vocabulary_uses_gpt2(
        hf_folder, gpt2_tokenizer, vocab_size):
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size}))
    assert load_tokenizer(hf_folder).spec == "gpt2"


@pytest.mark.parametrize("name, content, message", [
    ("config.json", "{}", "wte.weight has shape"), ("config.json", "[1]", "is damaged"),
    ("config.json", '{"n_embd": "48"}', "n_embd is '48'"), ("config.json", "\xe9", "is damaged"),
    ("config.json", '{"n_layer": 1000000000}', "n_layer is 1000000000"),
    ("config.json", "[" * 100_000, "is damaged"), ("config.json", "", "is damaged"),
    ("config.json", '{"activation_function": "gelu"}', "activation_function is 'gelu'"),
    ("config.json", '{"n_inner": 7}', "n_inner is 7"),
    ("model.safetensors.index.json", "{", "is damaged"),
    ("model.safetensors.index.json", "[]", "is damaged"),
    ("model.safetensors.index.json", "{}", "must name the files beside it"),
    ("model.safetensors.index.json", '{"weight_map": []}', "must name the files beside it"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "../model/x"}}', "must name the files"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/passwd"}}', "must name the files"),
    ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "must name the files beside it"),
    ("model.safetensors.index.json", '{"weight_map": {}}', "lacks the tensors"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "no.safetensors"}}', "lacks no.safe"),
    ("model.safetensors", "nonsense", "is damaged"),
    ("pytorch_model.bin", "nonsense", "holds no weights")])
def test_a_damaged_folder_is_an_error_of_one_line(hf_folder, call_main, name, content, message):
    if name == "pytorch_model.bin":
        (hf_folder / "model.safetensors.index.json").unlink()
    (hf_folder / "tokenizer.json").write_text(train_bpe([small_text()], 257).model)
    (hf_folder / name).write_text(content, encoding="latin-1")
    code, _, err = call_main(sample, "--model", hf_folder, "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and message in err


# the hub


@pytest.fixture
def hub():
    """A local HTTP server that behaves like the hub."""
    server = FakeHub({})
    yield server
    server.shutdown()
    server.server_close()


def push(hub_url, bpe_run, tmp_path, out, *flags, **env):
    """Run export_hf.py with --push_to_hub me/tiny as a process; returns the CompletedProcess."""
    return run_script(
        ROOT / "export_hf.py", bpe_run, out, "--push_to_hub", "me/tiny", *flags, cwd=tmp_path,
        env={"HF_ENDPOINT": hub_url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
             "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env})


def test_push_creates_the_repository_and_uploads_the_folder(hub, bpe_run, tmp_path):
    for out, flags in (("a", ["--private"]), ("b", [])):  # at b, the repository exists
        done = push(hub.url, bpe_run, tmp_path, out, *flags, HF_TOKEN="secret")
        assert done.returncode == 0, done.stderr
        assert f"uploaded to {hub.url}/me/tiny" in done.stdout
        assert hub.repositories["me/tiny"] == {
            path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
    assert hub.private == ["me/tiny"]
    assert 'pipeline("text-generation", "me/tiny")' in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize("reachable", [True, False])
def test_the_folder_stays_if_the_upload_fails(hub, bpe_run, tmp_path, reachable):
    """Without a token the hub refuses the upload; without a network there is no hub."""
    url, token = (hub.url, "") if reachable else ("http://127.0.0.1:9", "secret")
    done = push(url, bpe_run, tmp_path, "out", "--private", HF_TOKEN=token)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "is complete, but me/tiny could not be uploaded" in done.stderr
    assert "hf upload --private me/tiny" in done.stderr
    assert GPT.from_pretrained(str(tmp_path / "out")).config.vocab_size == 300
    assert load_checkpoint(bpe_run / "model_00007.pt")["step"] == 7
