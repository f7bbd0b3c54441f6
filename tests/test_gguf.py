"""
GGUF files: what they hold, that llama.cpp computes and tokenizes as we do, and what is refused.
Tests that need the optional packages gguf or llama_cpp are skipped where they are missing.
"""

import json
import math
import os
import signal
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import small_text, tiny_config
from test_export import expect_one_line, save_run

import export_hf
import sample
from gpt2lab import gguf_file
from gpt2lab.cli import UserError
from gpt2lab.generate import generate
from gpt2lab.gguf_file import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_vocabulary
from gpt2lab.tokenizer import PROBES, Tokenizer, train_bpe, train_spm
from train_gpt2 import GPT, load, train

GELU = torch.nn.functional.gelu
# what tokenizers treat differently: scripts, runs of spaces, contractions, digits, line ends
TEXTS = (export_hf.PROBE, *PROBES, small_text(20_000), "", " ", "  ", "\n", "a\n", "\n\n\n\n",
         " " * 70 + "x" + " " * 33, "\t\t\tdef f(x):\r\n\r\n        return x\n", "'s 'S 'll'LL''t'",
         "0123456789 1 12 123 1234 12345,6.78e9 ½²Ⅷ٣٤५", "".join(map(chr, range(0xA0, 0x180))),
         "А у нас в квартире газ. Ґ ґ ѣ", "床前明月光，疑是地上霜。", "ひらがなカタカナ漢字ー々",
         "다람쥐 헌 쳇바퀴에", "اَلْعَرَبِيَّةُ ١٢٣", "देवनागरी लिपि क्ष त्र ज्ञ", "🙂🏽👨‍👩‍👧‍👦🇧🇷❤️‍🔥",
         "\x00\x01\x07\x0b\x0c\x1b\x1c\x1d\x1e\x1f\x7f\x85",
         "\u00a0\u1680\u180e\u2028\u2029\u202f\u205f", "<|endoftext|> <|endoftext|", "x" * 3000)


@pytest.fixture(scope="module")
def bpe_run(tmp_path_factory):
    """A log folder with a random model of 64 positions, whose byte-level BPE has 300 tokens."""
    return save_run(tmp_path_factory.mktemp("gguf") / "log", train_bpe([small_text()], 300),
                    scale=5.0, block_size=64)


@pytest.fixture
def gguf():
    """The package gguf. Skips the test where it is not installed."""
    return pytest.importorskip("gguf", reason="pip install gguf")


@pytest.fixture(scope="module")
def llama_cpp():
    """llama.cpp in Python. Skips the test where it is not installed."""
    pytest.importorskip("gguf", reason="pip install gguf")
    return pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")


def export(source, tmp_path, **options):
    """Export a source to tmp_path; returns the path of its GGUF file."""
    path = tmp_path / "model.gguf"
    export_hf.export(source, tmp_path / "out", gguf=path, **options)
    return path


def read_gguf(path):
    """({key: value}, {name: gguf.ReaderTensor}) of a GGUF file."""
    from gguf import GGUFReader
    reader = GGUFReader(path)
    return ({key: field.contents() for key, field in reader.fields.items()},
            {tensor.name: tensor for tensor in reader.tensors})


# the tokenizer


def change_bpe(change):
    """A Tokenizer of 300 tokens whose tokenizer.json has been changed by `change(content)`."""
    content = json.loads(train_bpe([small_text()], 300).model)
    change(content)
    return Tokenizer("changed", json.dumps(content))


def add_token(tokenizer_json, **options):
    """Add a token to the content of a tokenizer.json."""
    tokenizer_json["added_tokens"].append({
        "id": 299 + len(tokenizer_json["added_tokens"]), "content": "<tool>", "special": False,
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, **options})


@pytest.mark.parametrize("change, reason", [
    (lambda c: c["pre_tokenizer"].update(use_regex=False), "does not split text as GPT-2 does"),
    (lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, c["pre_tokenizer"]]}),
     "does not split text as GPT-2 does"),
    (lambda c: c["model"].update(ignore_merges=True), "does not merge bytes as GPT-2 does"),
    (lambda c: add_token(c, single_word=True), "is found between words only")])
def test_a_tokenizer_that_is_not_gpt2s_kind_is_refused(change, reason):
    """Guards against a file that llama.cpp would load, and would tokenize in another way."""
    tokenizer = change_bpe(change)
    with pytest.raises(UserError, match=f"{reason}: leave out --gguf"):
        read_vocabulary(tokenizer, tokenizer.model, export_hf.PROBE)


def test_sentencepiece_and_a_bpe_without_merges_are_refused():
    tokenizer = train_bpe([small_text()], 257)
    with pytest.raises(UserError, match="has no merges, without which"):
        read_vocabulary(tokenizer, tokenizer.model, export_hf.PROBE)
    pytest.importorskip("sentencepiece")
    tokenizer = train_spm([small_text()], 500)
    with pytest.raises(UserError, match=r"spm:500 cannot .*, which SentencePiece's model is not"):
        read_vocabulary(tokenizer, export_hf.tokenizer_json(tokenizer), export_hf.PROBE)


def test_a_vocabulary_that_gives_other_tokens_is_refused(monkeypatch):
    tokenizer = train_bpe([small_text()], 300)
    monkeypatch.setattr(tokenizer, "encode", lambda text: [0])
    with pytest.raises(UserError, match="give other tokens than it does"):
        read_vocabulary(tokenizer, tokenizer.model, export_hf.PROBE)


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_the_vocabulary_encodes_as_the_tokenizer_does(kind, request):
    tokenizer = (request.getfixturevalue("gpt2_tokenizer") if kind == "gpt2"
                 else train_bpe([small_text()], 400))
    vocabulary = read_vocabulary(
        tokenizer, export_hf.tokenizer_json(tokenizer), export_hf.PROBE)
    assert len(vocabulary.tokens) == tokenizer.vocab_size == 257 + len(vocabulary.merges)
    assert vocabulary.tokens[tokenizer.eot] == "<|endoftext|>"
    assert [i for i, kind in enumerate(vocabulary.kinds) if kind != NORMAL] == [tokenizer.eot]
    assert vocabulary.kinds[tokenizer.eot] == CONTROL and vocabulary.eot == tokenizer.eot
    bpe = gguf_file.make_gpt2_bpe(vocabulary)
    for text in TEXTS:
        assert bpe.encode(text).ids == tokenizer.encode(text)


def test_gaps_and_added_tokens_of_a_vocabulary():
    def change(content):
        content["model"]["vocab"]["zebra"] = 303
        add_token(content)
        add_token(content, content="<strip>", lstrip=True)

    tokenizer = change_bpe(change)
    vocabulary = read_vocabulary(tokenizer, tokenizer.model, export_hf.PROBE)
    added = {token: (i, vocabulary.kinds[i]) for i, token in enumerate(vocabulary.tokens)
             if i >= 299}
    assert added == {
        "[PAD299]": (299, UNUSED), "<|endoftext|>": (300, CONTROL), "<tool>": (301, USER_DEFINED),
        "<strip>": (302, CONTROL), "zebra": (303, NORMAL)}
    assert vocabulary.eot == tokenizer.eot == 300 and tokenizer.vocab_size == 304


# the command line


def test_flags_that_lack_their_partner(call_main, bpe_run, tmp_path):
    out = tmp_path / "out"
    expect_one_line(call_main, "--modelfile is about the file of --gguf", bpe_run, out,
                    "--modelfile")
    expect_one_line(call_main, "--gguf_type is about", bpe_run, out, "--gguf_type", "f32")
    expect_one_line(call_main, "--gguf q8_0 must end in .gguf", bpe_run, out, "--gguf", "q8_0")
    assert not list(tmp_path.iterdir())


def test_without_the_package_one_line_says_how_to_get_it(call_main, bpe_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(export_hf, "load_checkpoint", lambda path: pytest.fail("begins to work"))
    expect_one_line(call_main, "pip install gguf", bpe_run, tmp_path / "out",
                    "--gguf", tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_no_file_is_overwritten(call_main, bpe_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_hf, "load_checkpoint", lambda path: pytest.fail("begins to work"))
    monkeypatch.setattr(export_hf, "import_gguf", lambda: None)  # as if the package were there
    mine = [tmp_path / "a.gguf", tmp_path / "Modelfile"]
    for path in mine:
        path.write_text("mine")
    out, free = tmp_path / "out", tmp_path / "b.gguf"
    expect_one_line(call_main, "a.gguf is there already", bpe_run, out, "--gguf", mine[0])
    expect_one_line(call_main, "Modelfile is there already", bpe_run, out, "--gguf", free,
                    "--modelfile")
    expect_one_line(call_main, "make its folder", bpe_run, out, "--gguf", tmp_path / "no/a.gguf")
    assert sorted(tmp_path.iterdir()) == sorted(mine)
    assert all(path.read_text() == "mine" for path in mine)


def test_links_that_lead_to_themselves_are_errors_of_one_line(call_main, bpe_run, tmp_path, gguf):
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop.name)
    expect_one_line(call_main, "loop.gguf is there already", bpe_run, tmp_path / "out", "--gguf",
                    loop)
    expect_one_line(call_main, "cannot make", bpe_run, loop)
    assert list(tmp_path.iterdir()) == [loop]


def test_the_modelfile_samples_as_sample_py_does():
    lines = gguf_file.modelfile_text("my gpt2.gguf", 1024).splitlines()
    assert lines[0] == "FROM ./my gpt2.gguf" and 'TEMPLATE """{{ .Prompt }}"""' in lines
    assert "PARAMETER num_ctx 1024" in lines and 'PARAMETER stop "<|endoftext|>"' in lines
    for name, value in sample.STYLES["creative"].items():
        assert f"PARAMETER {name} {value}" in lines


# the file


@pytest.mark.parametrize("gguf_type", gguf_file.GGUF_TYPES)
def test_the_file_holds_the_weights_without_padding(bpe_run, tmp_path, gguf, gguf_type):
    keys, tensors = read_gguf(export(bpe_run, tmp_path, gguf_type=gguf_type))
    model = GPT.from_pretrained(bpe_run)
    assert len(tensors) == len(list(model.parameters())) and "output.weight" not in tensors
    matrix_kind, file_kind = gguf_file.GGUF_TYPES[gguf_type]
    assert keys["general.file_type"] == gguf.LlamaFileType[file_kind]
    relative_error = {"f32": 0, "f16": 1e-3, "bf16": 5e-3, "q8_0": 1e-2}[gguf_type]
    for ours, stored, rows in (
            (model.transformer.wte.weight, "token_embd.weight", 300),
            (model.transformer.wpe.weight, "position_embd.weight", 64),
            (model.transformer.h[1].attn.c_attn.weight, "blk.1.attn_qkv.weight", 96),
            (model.transformer.h[0].mlp.c_proj.weight, "blk.0.ffn_down.weight", 32),
            (model.transformer.h[0].mlp.c_fc.bias, "blk.0.ffn_up.bias", 128)):
        tensor, expected = tensors[stored], ours.detach()[:rows].numpy()
        always_f32 = stored.endswith(".bias") or stored == "position_embd.weight"
        assert tensor.tensor_type.name == ("F32" if always_f32 else matrix_kind)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == expected.shape
        assert np.abs(values - expected).max() <= relative_error * np.abs(expected).max()


def test_the_file_describes_the_model_and_its_tokenizer(bpe_run, tmp_path, gguf):
    keys, _ = read_gguf(export(bpe_run, tmp_path, name="me/tiny"))
    tokenizer = load(bpe_run)[1]
    assert {key: value for key, value in keys.items() if not key.startswith("GGUF.")} == {
        "general.architecture": "gpt2", "general.type": "model", "general.name": "me/tiny",
        "general.size_label": "37K", "general.file_type": 1, "general.quantization_version": 2,
        "gpt2.block_count": 2, "gpt2.context_length": 64, "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 128, "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        **{f"tokenizer.ggml.{key}": value for key, value in zip(
            ("tokens", "token_type", "merges"), read_vocabulary(
                tokenizer, tokenizer.model, ""), strict=False)},
        "tokenizer.ggml.bos_token_id": 299, "tokenizer.ggml.eos_token_id": 299,
        "tokenizer.ggml.add_bos_token": False}


def test_rows_that_are_not_whole_blocks_stay_in_float16(tmp_path, gguf):
    log_dir = save_run(tmp_path / "log", train_bpe([small_text()], 300), n_embd=48)
    _, tensors = read_gguf(export(log_dir, tmp_path, gguf_type="q8_0"))
    kinds = {name: tensors[f"{name}.weight"].tensor_type.name
             for name in ("token_embd", "blk.0.ffn_up", "blk.0.ffn_down")}
    assert kinds == {"token_embd": "F16", "blk.0.ffn_up": "F16", "blk.0.ffn_down": "Q8_0"}


def test_a_hugging_face_folder_gives_the_same_file_and_keeps_its_licence(bpe_run, tmp_path, gguf):
    (tmp_path / "a").mkdir()
    first = export(bpe_run, tmp_path / "a", name="tiny")
    second = export(tmp_path / "a" / "out", tmp_path, name="tiny")
    assert first.read_bytes() == second.read_bytes()
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text("utf-8").replace("---\n", "---\nlicense: mit\n", 1), "utf-8")
    (tmp_path / "b").mkdir()
    keys, _ = read_gguf(export(tmp_path / "out", tmp_path / "b", name="tiny"))
    assert keys["general.license"] == "mit"
    assert "\nlicense: mit\n" in (tmp_path / "b" / "out" / "README.md").read_text("utf-8")


def test_one_matrix_at_a_time_is_in_memory(bpe_run, tmp_path, gguf, monkeypatch):
    """Guards against a second copy of a large model."""
    convert, written = gguf_file.convert, []

    def convert_and_watch(*args):
        assert not [array for array in written if array() is not None]
        array = convert(*args)
        written.append(weakref.ref(array))
        return array

    monkeypatch.setattr(gguf_file, "convert", convert_and_watch)
    export(bpe_run, tmp_path, gguf_type="q8_0")
    assert len(written) == 28


def test_files_in_the_folder_are_moved_with_it(call_main, bpe_run, tmp_path, gguf):
    out = tmp_path / "out"
    code, text, err = call_main(export_hf, bpe_run, out, "--gguf", out / "a.gguf", "--modelfile")
    assert code == 0 and "8 files" in text and "a.gguf: f16, 0.1 MB" in text, err
    assert "note: llama.cpp rounds a context up" in err and "this model has 64 positions" in err
    assert gguf_file.context_note(1024) is None
    assert (out / "Modelfile").read_text().startswith("FROM ./a.gguf\n")
    assert read_gguf(out / "a.gguf")[0]["general.name"] == "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_exports_do_not_take_the_same_names(bpe_run, tmp_path, gguf, monkeypatch):
    """Guards against an export that removes or overwrites files of another one."""
    read_model, path, out = export_hf.read_model, tmp_path / "a.gguf", tmp_path / "out"

    def read_while_another_exports(source):
        monkeypatch.undo()
        with pytest.raises(UserError, match=r"a\.gguf is there already"):
            export_hf.export(source, tmp_path / "second", gguf=path)
        out.mkdir()
        (out / "README.md").write_text("mine")
        return read_model(source)

    monkeypatch.setattr(export_hf, "read_model", read_while_another_exports)
    with pytest.raises(UserError, match=r"cannot make .*name another folder"):
        export_hf.export(bpe_run, out, gguf=path)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "README.md"]
    assert (out / "README.md").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
def test_sigterm_leaves_nothing(call_main, bpe_run, tmp_path, gguf, monkeypatch):
    """Guards against an empty GGUF file, which looks like an export, after a time limit."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(export_hf, "write_gguf", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        code, _, err = call_main(export_hf, bpe_run, tmp_path / "out", "--gguf",
                                 tmp_path / "a.gguf", "--modelfile")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 143 and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gguf_type, number", [("f16", 1e5), ("bf16", 3.4e38), ("q8_0", 1e7)])
def test_a_number_too_large_for_its_format_is_refused(gguf, gguf_type, number):
    """Guards against infinite numbers in a file, and against an infinite scale of a block."""
    kind, tensor = gguf.GGMLQuantizationType[gguf_type.upper()], torch.full((2, 32), number)
    with pytest.raises(UserError, match=f"w is not finite in {kind.name}: use --gguf_type f32"):
        gguf_file.convert("w", tensor, kind)
    stored = gguf.dequantize(gguf_file.convert("w", tensor / 2, kind), kind)
    assert np.allclose(stored, number / 2, rtol=0.01)


def test_weights_too_large_for_float16_leave_nothing(call_main, bpe_run, tmp_path, gguf):
    log_dir = save_run(tmp_path / "log", load(bpe_run)[1], scale=1e6)
    flags = ("--gguf", tmp_path / "a.gguf", "--modelfile")
    expect_one_line(call_main, "is not finite in F16: use --gguf_type f32", log_dir,
                    tmp_path / "out", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file-size limit")
@pytest.mark.parametrize("limit", [3000, 110_000])  # in the metadata, in the weights
def test_a_full_disk_leaves_nothing(call_main, bpe_run, tmp_path, gguf, monkeypatch, limit):
    import resource
    monkeypatch.setattr(export_hf, "write_folder", lambda *args: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        expect_one_line(call_main, "make room on the disk", bpe_run, tmp_path / "out", "--gguf",
                        tmp_path / "a.gguf", "--modelfile", "--gguf_type", "f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_modelfile_that_cannot_be_written_leaves_nothing(
        call_main, bpe_run, tmp_path, gguf, monkeypatch):
    def fail(path, write):
        raise OSError("No space left on device")

    monkeypatch.setattr(export_hf, "write_atomically", fail)
    expect_one_line(call_main, "No space left", bpe_run, tmp_path / "out", "--gguf",
                    tmp_path / "a.gguf", "--modelfile")
    assert not list(tmp_path.iterdir())


# llama.cpp


def open_llama(llama_cpp, path, n_ctx):
    """A llama_cpp.Llama that keeps the logits of all positions, and computes in float32."""
    return llama_cpp.Llama(str(path), n_ctx=n_ctx, n_batch=n_ctx, logits_all=True, verbose=False,
                           type_k=0, type_v=0, flash_attn=False, n_threads=1)


def gelu_of_llama_cpp(x, approximate):
    """On a CPU, llama.cpp looks GELU up in a table of float16, except for large numbers."""
    rounded = GELU(x.half().float(), approximate=approximate).half().float()
    return torch.where(x.abs() < 10, rounded, GELU(x, approximate=approximate))


def llama_logits(llama, tokens):
    """llama.cpp's logits (T, vocab_size) for a list of T token ids."""
    llama.reset()
    llama.eval(tokens)
    return torch.from_numpy(np.array(llama.scores[:len(tokens)]))


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_llama_cpp_gives_the_same_tokens_logits_and_greedy_text(
        llama_cpp, kind, bpe_run, tmp_path, request, monkeypatch):
    log_dir = bpe_run if kind == "bpe" else save_run(
        tmp_path / "log", request.getfixturevalue("gpt2_tokenizer"), scale=5.0,
        block_size=64)
    model, tokenizer = load(log_dir)
    llama = open_llama(llama_cpp, export(log_dir, tmp_path, gguf_type="f32"), 64)
    for text in TEXTS:
        theirs = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert theirs == tokenizer.encode(text), text[:80]
    assert llama.token_eos() == tokenizer.eot and llama._model.n_ctx_train() == 64
    assert llama.detokenize(tokenizer.encode(TEXTS[0])).decode() == TEXTS[0]
    ids = tokenizer.encode(export_hf.PROBE)[-64:]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0][0, :, :tokenizer.vocab_size]
    logits = llama_logits(llama, ids)
    assert logits.shape == expected.shape and expected.std() > 0.5
    assert (logits - expected).abs().mean() < 1e-3
    monkeypatch.setattr("torch.nn.functional.gelu", gelu_of_llama_cpp)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0][0, :, :tokenizer.vocab_size]
    assert (logits - expected).abs().max() < 1e-3
    monkeypatch.undo()
    [expected] = generate(model, ids[:1], tokenizer.eot, tokenizer.vocab_size,
                          max_new_tokens=50, temperature=0)
    theirs = ids[:1]
    while len(theirs) < 51:
        theirs.append(int(llama_logits(llama, theirs)[-1].argmax()))
    assert theirs[1:] == expected and len(set(expected)) > 3


def test_q8_0_loses_less_than_one_percent(llama_cpp, data_dir, tmp_path):
    train(tiny_config(data_dir, tmp_path / "log", max_steps=60))
    tokenizer = load(tmp_path / "log")[1]
    ids = tokenizer.encode(small_text()[-20_000:])
    losses = {}
    for gguf_type in ("f32", "q8_0"):
        (tmp_path / gguf_type).mkdir()
        path = export(tmp_path / "log", tmp_path / gguf_type, gguf_type=gguf_type)
        llama = open_llama(llama_cpp, path, 32)
        windows = [ids[i:i + 33] for i in range(0, 32 * 30, 32)]
        logits = torch.cat([llama_logits(llama, window[:-1]) for window in windows])
        targets = torch.tensor([i for window in windows for i in window[1:]])
        losses[gguf_type] = torch.nn.functional.cross_entropy(logits, targets).item()
    assert losses["f32"] < math.log(300) - 0.5  # it has learned something
    assert losses["q8_0"] == pytest.approx(losses["f32"], rel=0.01)
