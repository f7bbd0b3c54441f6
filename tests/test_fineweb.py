"""From text to shards: no text is lost or added, and no shard is overwritten."""

import csv
import errno
import gzip
import io
import json
import os
import random
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from conftest import ROOT, run_script, small_text

import fineweb
from fineweb import prepare
from gpt2lab import cli, files, shards, sources
from gpt2lab.cli import UserError
from gpt2lab.tokenizer import (
    END_OF_TEXT,
    GPT2_EOT,
    GPT2_VOCAB_SIZE,
    PROBES,
    Tokenizer,
    read_tokenizer,
    train_bpe,
)

STRANGE_TEXTS = [
    "", "a", " ", "\r\n \n\n\t x", "héllo wörld", "你好，世界。红楼梦", "😀👩‍👩‍👧", "\u0000\x7f",
    "<|endoftext|> is text <|endoftext|>", "  def f(x):\n    return x\n", "\ufeffbom", "ﷺ\u202e"]


@pytest.fixture(scope="module")
def small_bpe():
    """A byte-level BPE of 400 tokens."""
    return train_bpe([small_text()], 400)


def stored_tokens(folder, split):
    """All token ids of a split, 1-D, in the order of the shards."""
    return np.concatenate([np.load(p) for p in shards.find_shards(folder, split)] or [[]])


def stored_documents(folder, split):
    """The texts of a split's documents."""
    tokenizer = shards.load_data_tokenizer(folder)
    tokens = stored_tokens(folder, split)
    starts = np.flatnonzero(tokens == tokenizer.eot)
    return [tokenizer.decode_bytes(part[1:]).decode() for part in np.split(tokens, starts)[1:]]


def stored_text(folder):
    """The text of train and then of val, which is the text of a small corpus."""
    return "".join(stored_documents(folder, "train") + stored_documents(folder, "val"))


def read_sources(*names, separator=None):
    """[(text, starts_document)] of all chunks in some local sources."""
    inputs = sources.list_inputs(map(str, names), None, "train")
    chunks = sources.read_inputs(inputs, range(len(inputs)), "text", sources.RowCounter(),
                                 download_dir=None, delete_downloads=False, prefetch=True,
                                 separator=separator)
    return [(text, starts_document) for _, _, text, starts_document in chunks]


def zstd(data):
    """Bytes compressed with zstd."""
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def jsonl(texts):
    """The bytes of a .jsonl file with one text a row."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(texts, kind=None):
    """The bytes of a parquet file with one text a row."""
    column = pyarrow.array(texts, kind)
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    return file.getvalue()


def csv_table(texts):
    """The bytes of a .csv file with a number and a text in each row."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("n", "text"), *enumerate(texts)])
    return file.getvalue().encode()


def modification_times(folder):
    """{path: time of its last change} of the files in a folder."""
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


# -----------------------------------------------------------------------------
# tokenizers


@pytest.mark.parametrize("text", STRANGE_TEXTS)
def test_bpe_decodes_every_text_that_it_encoded(small_bpe, text):
    ids = small_bpe.encode(text)
    assert small_bpe.decode_bytes(ids).decode() == text == small_bpe.decode(ids)
    assert small_bpe.eot not in ids and max(ids, default=0) < small_bpe.vocab_size


@pytest.mark.parametrize("text", STRANGE_TEXTS)
def test_gpt2_decodes_every_text_that_it_encoded(gpt2_tokenizer, text):
    ids = gpt2_tokenizer.encode(text)
    assert gpt2_tokenizer.decode_bytes(ids).decode() == text
    assert GPT2_EOT not in ids


def test_gpt2_token_ids_are_those_of_openai(gpt2_tokenizer):
    assert gpt2_tokenizer.encode("Hello, I'm a language model,") == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2_tokenizer.vocab_size, gpt2_tokenizer.eot) == (50257, 50256)
    assert (GPT2_VOCAB_SIZE, GPT2_EOT) == (50257, 50256)


def test_gpt2_token_ids_of_any_text_are_those_of_tiktoken(gpt2_tokenizer, real_data):
    """All characters, and where rules meet, against tiktoken's own pattern with one text a call."""
    gpt2 = tiktoken.get_encoding("gpt2")
    rng = random.Random(0)
    all_chars = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = ["a".join(all_chars), " ".join(all_chars), " " * 1000 + "a", "\n" * 1000, "'" * 9]
    parts = ["'s", "'ll", "'Re", "'", " ", "  ", "\n", "\r\n", "\u00a0", "\u3000", "\x1c", "a",
             " the", "é", "e\u0301", "梦", "12", "½", "٣", "!?", "_", "😀", END_OF_TEXT]
    texts += ["".join(rng.choices(parts, k=rng.randrange(30))) for _ in range(3000)]
    texts += ["".join(rng.choices(all_chars, k=20)) for _ in range(3000)]
    texts += (real_data / "fineweb_edu_sample.jsonl").read_text(encoding="utf-8").splitlines()
    rng.shuffle(texts)
    for first in range(0, len(texts), 8):  # groups with and without the characters <|endoftext|>
        group = texts[first:first + 8]
        for text, ids in zip(group, gpt2_tokenizer.encode_batch(group), strict=True):
            assert ids.tolist() == gpt2.encode_ordinary(text), repr(text[:60])
    assert gpt2_tokenizer.encode_batch([]) == []


def test_trained_bpe_has_the_requested_size_and_compresses_text(small_bpe):
    assert (small_bpe.vocab_size, small_bpe.eot, small_bpe.spec) == (400, 399, "bpe:400")
    assert len(small_bpe.encode(small_text())) < 0.7 * len(small_text())


def test_tokenizer_rebuilt_from_its_state_encodes_the_same(small_bpe):
    rebuilt = Tokenizer(**json.loads(json.dumps(small_bpe.state())))
    assert rebuilt.encode(small_text()) == small_bpe.encode(small_text())


def test_decode_leaves_out_an_unfinished_character_at_the_end(small_bpe):
    ids = small_bpe.encode("梦")  # three bytes, none of them merged
    assert len(ids) == 3
    assert [small_bpe.decode(ids[:n]) for n in range(4)] == ["", "", "", "梦"]
    assert small_bpe.decode([ids[0], *small_bpe.encode("a")]) == "\ufffda"


def changed_model(tokenizer, **changes):
    """The tokenizer.json of a tokenizer with other settings. "model__x" is a setting of model."""
    settings = json.loads(tokenizer.model)
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (settings[part] if part else settings)[key] = value
    return json.dumps(settings)


def byte_level(add_prefix_space):
    """The settings of a pre-tokenizer."""
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True,
            "use_regex": True}


def added_token(content, index, **changes):
    """An entry of added_tokens in a tokenizer.json."""
    return {"id": index, "content": content, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": False} | changes


TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
           "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
NFC = {"type": "NFC"}


@pytest.mark.parametrize("changes", [
    {"truncation": TRUNCATION}, {"padding": PADDING}, {"model__dropout": 0.5},
    {"truncation": TRUNCATION, "padding": PADDING, "model__dropout": 1.0},
    {"normalizer": NFC}, {"normalizer": {"type": "Sequence", "normalizers": [NFC]}},
    {"pre_tokenizer": byte_level(add_prefix_space=True)},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level(add_prefix_space=True)]}},
    {"added_tokens": [added_token(END_OF_TEXT, 399)]},  # end-of-text that is not marked special
    {"added_tokens": [added_token(END_OF_TEXT, 399, special=True),
                      added_token("<mask>", 400, lstrip=True, rstrip=True)]}])
def test_lossy_and_random_settings_of_a_tokenizer_file_are_switched_off(small_bpe, changes):
    changed = Tokenizer("mine.json", changed_model(small_bpe, **changes))
    for text in (small_text(2000), "e\u0301 x", "a <mask> b", END_OF_TEXT):
        assert {tuple(changed.encode(text)) for _ in range(3)} == {tuple(small_bpe.encode(text))}
        assert changed.decode(changed.encode(text)) == text
    assert changed.eot == 399


@pytest.mark.parametrize("changes", [
    {"normalizer": {"type": "Lowercase"}}, {"normalizer": {"type": "NFKC"}},
    {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "WhitespaceSplit"}, byte_level(add_prefix_space=False)]}},
    {"model__end_of_word_suffix": "</w>"}])
def test_tokenizer_that_changes_text_is_refused(small_bpe, changes):
    with pytest.raises(UserError, match=r"mine\.json changes text: .* becomes .*normalizer"):
        Tokenizer("mine.json", changed_model(small_bpe, **changes))


def test_tokenizer_without_a_token_for_every_byte_is_refused(small_bpe):
    settings = json.loads(small_bpe.model)
    del settings["model"]["vocab"]["Ń"]  # the spelling of a byte that only strange texts have
    settings["model"]["merges"] = []
    with pytest.raises(UserError, match="changes text"):
        Tokenizer("mine.json", json.dumps(settings))


def test_probes_of_a_tokenizer_hold_every_byte_of_utf8():
    possible = set(range(0xF5)) - {0xC0, 0xC1}
    assert set("".join(PROBES).encode()) == possible


def test_vocabulary_with_unused_ids_reaches_to_the_last_id(small_bpe):
    settings = json.loads(small_bpe.model)
    settings["model"]["vocab"]["Ń"] = 500
    gaps = Tokenizer("mine.json", json.dumps(settings))
    assert gaps.vocab_size == 501 and gaps.decode([450, *gaps.encode("a")]) == "a"


@pytest.mark.parametrize("content", [b"garbage", b"", b"{\xff", b"{}", b"[1]"])
def test_file_that_is_not_a_tokenizer_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer .*x\.json"):
        read_tokenizer(tmp_path / "x.json")


def test_tokenizer_file_with_windows_line_ends_is_used(small_bpe, text_file, tmp_path):
    indented = json.dumps(json.loads(small_bpe.model), indent=1).replace("\n", "\r\n")
    (tmp_path / "mine.json").write_bytes(b"\xef\xbb\xbf" + indented.encode())
    prepare([text_file], tmp_path / "out", tmp_path / "mine.json")
    assert stored_text(tmp_path / "out") == small_text()


@pytest.mark.parametrize("spec", ["gpt3", "bpe:", "bpe:100", "bpe:x", ""])
def test_bad_tokenizer_spec_is_refused_and_nothing_is_written(spec, text_file, tmp_path):
    with pytest.raises(UserError, match=r"bpe:\d+"):
        prepare([text_file], tmp_path / "out", spec)
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# small corpora


def test_small_corpus_is_split_by_text(text_file, data_dir):
    train, val = stored_documents(data_dir, "train"), stored_documents(data_dir, "val")
    assert len(train) == len(val) == 1
    text = small_text()
    assert train[0] + val[0] == text
    assert 0.9 * len(text) - 200 < len(train[0]) <= 0.9 * len(text)
    assert train[0].endswith("\n")
    meta = shards.read_meta(data_dir)
    for split, documents in (("train", train), ("val", val)):
        tokens = stored_tokens(data_dir, split)
        assert tokens.dtype == np.uint16 and tokens[0] == meta["eot"]
        assert meta["splits"][split] == {
            "tokens": len(tokens), "documents": 1, "bytes": len(documents[0].encode())}
    # the tokenizer was trained on the train part only
    tokenizer = shards.load_data_tokenizer(data_dir)
    assert tokenizer.model == train_bpe(train, 300).model


def test_small_corpus_of_several_train_shards_keeps_all_of_val(text_file, tmp_path):
    """The cut lies in a chunk whose first tokens are in a finished shard already."""
    meta = prepare([text_file], tmp_path, "bpe:300", shard_size=8000)
    assert len(shards.find_shards(tmp_path, "train")) > 1
    assert stored_text(tmp_path) == small_text()
    assert [meta["splits"][split]["documents"] for split in shards.SPLITS] == [1, 1]


def test_text_without_line_breaks_is_cut_between_characters(tmp_path):
    (tmp_path / "a.txt").write_text("梦" * 1000, encoding="utf-8")
    prepare([tmp_path / "a.txt"], tmp_path / "out", "bpe:257")
    assert [len(stored_documents(tmp_path / "out", split)[0])
            for split in ("train", "val")] == [900, 100]


def test_text_files_are_stored_unchanged_but_for_a_byte_order_mark(tmp_path):
    text = "one\r\ntwo\r\n" * 50 + "<|endoftext|>\r\nno line end"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    prepare([tmp_path / "a.txt"], tmp_path / "out", "bpe:270")
    assert stored_text(tmp_path / "out") == text
    # no token of the text is end-of-text
    assert shards.read_meta(tmp_path / "out")["splits"]["train"]["documents"] == 1


def test_all_file_formats_in_any_case_give_the_same_documents(tmp_path):
    texts = [text for text in STRANGE_TEXTS if text] * 20
    folder = tmp_path / "in"
    folder.mkdir()
    array = json.dumps([{"text": text} for text in texts], indent=1).encode()
    contents = [jsonl(texts) + b'\n{"text": ""}', gzip.compress(jsonl(texts)), parquet(texts),
                array, gzip.compress(jsonl(texts)), csv_table(texts),
                gzip.compress(csv_table(texts)),
                zstd(jsonl(texts)), gzip.compress(parquet(texts)), b"\xef\xbb\xbf" + array]
    names = ["a.jsonl", "b.jsonl.gz", "c.parquet", "d.json", "e.00000.JSON.gz", "f.CSV", "g.csv.gz",
             "h.jsonl.zst", "i.Parquet.GZ", "j.json"]
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_bytes(content)
    documents = [text for text, starts_document in read_sources(folder) if starts_document]
    assert documents == texts * len(names)
    prepare([folder], tmp_path / "out", "bpe:300", val_fraction=0.3)
    assert stored_text(tmp_path / "out") == "".join(texts * len(names))


def test_text_files_are_read_in_any_case_and_compression(tmp_path):
    for name, content in (("README.txt", b"a"), ("BOOK.TXT", b"b"),
                          ("c.txt.gz", gzip.compress(b"c")), ("d.TXT.zst", zstd(b"d"))):
        (tmp_path / name).write_bytes(content)
    assert sorted(read_sources(tmp_path)) == [(letter, True) for letter in "abcd"]


def test_linked_folders_are_read_without_loops_and_what_is_left_out_is_named(tmp_path, capsys):
    folder, other = tmp_path / "in", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (folder / "a.txt").write_text("a")
    (other / "b.txt").write_text("b")
    (folder / "linked").symlink_to(other)
    (other / "back").symlink_to(folder)
    (folder / "again.txt").symlink_to(other / "b.txt")
    (folder / "broken.txt").symlink_to("nowhere")
    (folder / "x.pdf").write_bytes(b"%PDF")
    (folder / "meta.json").write_text('{"not": "text"}')
    assert read_sources(folder) == [("a", True), ("b", True)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"left out of {folder}: broken.txt, meta.json, x.pdf (read are .txt")
    assert lines[1].startswith("left out what is named twice: ") and "b.txt" in lines[1]


def test_sources_that_are_named_twice_are_read_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "t.txt").write_text("t")
    (tmp_path / "l.txt").symlink_to("in/t.txt")
    for names in (["in/t.txt", "in/t.txt"], ["in", "in/t.txt"], ["./in/../in/t.txt", "l.txt"]):
        assert read_sources(*names) == [("t", True)]
        assert capsys.readouterr().err == f"left out what is named twice: {names[1]}\n".replace(
            " in\n", " in/t.txt\n")
    monkeypatch.setattr(sources, "builtin_documents", lambda: ["a"])
    assert read_sources("builtin", "builtin") == [("a", True)]


def test_json_object_that_holds_no_text_is_left_out_and_named(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps({"name": "settings"}, indent=1))
    (tmp_path / "b.json").write_text('{"text": "one row"}')
    (tmp_path / "c.json").write_text("[]")
    assert read_sources(tmp_path) == [("one row", True)]
    assert f"left out {tmp_path / 'a.json'}" in capsys.readouterr().err


@pytest.mark.parametrize("chunk_chars, line_end", [
    (1 << 18, "\n"), (1 << 18, "\r\n"), (40, "\r\n"), (7, "\n")])
def test_document_separator_parts_a_text_file(tmp_path, monkeypatch, chunk_chars, line_end):
    monkeypatch.setattr(sources, "CHUNK_CHARS", chunk_chars)
    stories = [f"Story {n}.{line_end}It ends.{line_end}" for n in range(20)]
    mark = END_OF_TEXT + line_end
    (tmp_path / "a.txt").write_bytes((mark + mark.join(stories) + mark + mark).encode())
    (tmp_path / "b.txt").write_text(f"one{END_OF_TEXT}two {END_OF_TEXT}three<|endof", newline="")
    documents = []
    for text, starts_document in read_sources(tmp_path, separator=END_OF_TEXT):
        documents += [text] if starts_document else [documents.pop() + text]
    assert documents == [*stories, "one", "two ", "three<|endof"]


def test_document_separator_is_stored_and_hinted_at(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(f"A story.\n{END_OF_TEXT}\n" * 100)
    prepare([tmp_path / "a.txt"], tmp_path / "one", "bpe:300")
    assert capsys.readouterr().err.count(f"--document_separator '{END_OF_TEXT}'") == 1
    assert shards.read_meta(tmp_path / "one")["splits"]["train"]["documents"] == 1
    prepare([tmp_path / "a.txt"], tmp_path / "many", "bpe:300", document_separator=END_OF_TEXT)
    assert stored_documents(tmp_path / "many", "train")[:2] == ["A story.\n"] * 2
    assert "--document_separator" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"document_separator <.endoftext.>, not ###"):
        prepare([tmp_path / "a.txt"], tmp_path / "many", "bpe:300", document_separator="###")
    prepare([tmp_path / "a.txt"], tmp_path / "none", "bpe:300", document_separator="###")
    assert "is one document, because no '###' parts it" in capsys.readouterr().err
    with pytest.raises(UserError, match="must not be empty"):
        prepare([tmp_path / "a.txt"], tmp_path / "empty", "bpe:300", document_separator="")


EMPTY_FILES = {"a.txt": b"", "a.jsonl": b"", "a.json": b"", "a.csv": b"", "a.txt.gz": b"",
               "a.jsonl.gz": gzip.compress(b""), "a.jsonl.zst": b"", "a.csv.zst": zstd(b""),
               "b.txt": b"\xef\xbb\xbf", "b.jsonl": b"\n \n", "b.json": b"[]", "b.csv": b"n,text\n",
               "b.parquet": parquet([], pyarrow.string())}


@pytest.mark.parametrize("name", EMPTY_FILES)
@pytest.mark.parametrize("shard_size", [10**8, 1000])  # a small and a large corpus
def test_empty_file_before_others_does_no_harm(tmp_path, name, shard_size):
    (tmp_path / name).write_bytes(EMPTY_FILES[name])
    (tmp_path / "z.txt").write_text("some text\n" * 500)
    meta = prepare([tmp_path / name, tmp_path / "z.txt"], tmp_path / "out", "bpe:300",
                   shard_size=shard_size)
    assert sum(totals["bytes"] for totals in meta["splits"].values()) == 5000


def test_folder_of_empty_files_is_refused(tmp_path):
    for name, content in EMPTY_FILES.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="holds no text"):
        prepare([tmp_path], tmp_path / "out", "bpe:300")
    assert not (tmp_path / "out").exists()


def test_damage_of_any_kind_ends_in_rows_or_in_one_line_with_the_file(tmp_path):
    """Many damaged files of every format: bytes changed, the end cut off, or other contents."""
    texts = [f"row {n} 早安 {n * n}" for n in range(200)]
    array = json.dumps([{"text": text} for text in texts]).encode()
    contents = {"a.txt": jsonl(texts), "a.txt.gz": gzip.compress(jsonl(texts)),
                "a.jsonl": jsonl(texts), "a.jsonl.gz": gzip.compress(jsonl(texts)),
                "a.jsonl.zst": zstd(jsonl(texts)), "a.json": array, "a.json.zst": zstd(array),
                "a.csv": csv_table(texts), "a.csv.gz": gzip.compress(csv_table(texts)),
                "a.parquet": parquet(texts), "a.parquet.gz": gzip.compress(parquet(texts))}
    rng = random.Random(0)
    num_errors = 0
    for name in sorted(contents) * 60:
        data, path = bytearray(contents[name]), tmp_path / name
        start = rng.randrange(len(data))
        damage = rng.choice(["change", "cut", "insert", "replace"])
        if damage == "change":
            data[start] = rng.randrange(256)
        elif damage == "cut":
            del data[start:]
        else:
            data[start if damage == "insert" else 0:start + 100] = rng.randbytes(100)
        path.write_bytes(data)
        counter = sources.RowCounter(report=lambda line: None)
        try:
            for _ in sources.read_file(path, "text", counter):
                pass
            counter.end_input(0)
        except UserError as error:
            num_errors += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert num_errors > 200


def test_rows_of_parquet_that_are_not_utf8_are_skipped_and_binary_text_is_read(tmp_path, capsys):
    rows = [b"good"] * 300
    rows[7] = b"\xff\xfe"
    binary = pyarrow.array(rows, pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), len(rows), binary.buffers())
    for name, column in (("a.parquet", text), ("b.parquet", binary)):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / name)
    assert read_sources(tmp_path) == [("good", True)] * 598
    err = capsys.readouterr().err
    for name in ("a.parquet", "b.parquet"):
        assert f"skipped {tmp_path / name}, row 8: 'utf-8' codec" in err


def test_bad_rows_say_what_is_wrong_with_them(tmp_path, capsys):
    lines = [b'{"text": "good"}'] * 400
    lines[1], lines[2], lines[3] = b"[" * 100_000, b'{"text": "cut', b'{"text": "\xff"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.csv").write_bytes(b"text\n" + b"good\n" * 300 + b"\xff\n")
    assert len(read_sources(tmp_path)) == 397 + 300
    err = capsys.readouterr().err
    for message in ("a.jsonl, line 2: this is not JSON (maximum recursion",
                    "a.jsonl, line 3: this is not JSON (",
                    "a.jsonl, line 4: this is not JSON ('utf-8' codec",
                    "b.csv, line 302: the text is not UTF-8"):
        assert message in err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
@pytest.mark.parametrize("suffix", [b"txt", b"jsonl.zst", b"parquet"])
def test_file_name_that_is_not_utf8_is_read_and_stored(tmp_path, suffix):
    content = {b"txt": b"some text\n" * 200, b"jsonl.zst": zstd(jsonl(["some text\n"] * 200)),
               b"parquet": parquet(["some text\n"] * 200)}[suffix]
    path = os.fsdecode(os.fsencode(tmp_path) + b"/b\xff." + suffix)
    with open(path, "wb") as file:
        file.write(content)
    for expected in ("next: python train_gpt2.py", "out is complete"):
        done = run_script(ROOT / "fineweb.py", "--source", path, "--tokenizer", "bpe:300",
                          "--out", "out", cwd=tmp_path)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
    meta = shards.read_meta(tmp_path / "out")
    assert meta["recipe"]["source"] == [path] and meta["inputs"] == [[path, len(content)]]
    assert stored_text(tmp_path / "out") == "some text\n" * 200


def test_empty_files_before_others_do_no_harm(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(small_text(), encoding="utf-8")
    prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", "bpe:300")
    assert stored_text(tmp_path / "out") == small_text()


def test_lone_surrogate_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b"}\n', encoding="utf-8")
    assert read_sources(tmp_path / "a.jsonl") == [("a? b", True)]


def test_chunks_of_a_long_document_join_to_the_document(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "CHUNK_CHARS", 100)
    text = small_text(5000).replace("\n\n", "\r\n")
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * 1234}), encoding="utf-8")
    chunks = read_sources(tmp_path / "a.txt", tmp_path / "b.jsonl")
    assert [starts_document for _, starts_document in chunks].count(True) == 2
    assert len(chunks) > 30
    assert "".join(chunk for chunk, _ in chunks) == text + "x" * 1234


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "no text"),
    ("a.txt", "a\n词".encode("gbk"), r"a\.txt, line 2: byte 1 .*0xb4, is not UTF-8.*iconv"),
    ("a.txt", b"ok\n" + "词".encode()[:2], r"line 2: the file ends in the middle of a character"),
    ("a.txt.gz", gzip.compress("词".encode()[:2], mtime=0), "ends in the middle of a character"),
    ("a.csv", b"n,txt\n1,a\n", "no column 'text'.*can be one of n, txt"),
    ("a.csv", b'text\n"a"\n"not closed\n', "after line 2: this is not CSV"),
    ("a.json", b'[{"text": "a"}, {"te', "its only value: this is not JSON"),
    ("a.jsonl.zst", b"not zstd", "damaged zstd"),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2.*text_column"),
    ("a.jsonl", b"not json\n", "1 of 1 rows.*line 1"),
    ("a.jsonl.gz", b"not gzip", "damaged gzip"),
    ("a.parquet", b"not parquet", "parquet"), ("a.parquet", b"", "parquet"),
    ("a.pdf", b"%PDF", "cannot read")])
def test_bad_source_is_named_and_nothing_is_written(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){message}"):
        prepare([tmp_path / name], tmp_path / "out", "bpe:300")
    assert not (tmp_path / "out").exists()


def test_unknown_source_is_refused():
    with pytest.raises(UserError, match="neither 'builtin'"):
        read_sources("no such thing")


# -----------------------------------------------------------------------------
# large corpora


def test_large_corpus_fills_shards_of_equal_size(text_file, tmp_path):
    prepare([text_file], tmp_path, "bpe:300", shard_size=1000)  # 60 kB are large for such shards
    meta = shards.read_meta(tmp_path)
    paths = shards.find_shards(tmp_path, "val") + shards.find_shards(tmp_path, "train")
    assert [p.name for p in paths] == ["edufineweb_val_000000.npy"] + [
        f"edufineweb_train_{i:06d}.npy" for i in range(1, len(paths))]
    lengths = [len(np.load(p)) for p in paths]
    assert set(lengths[:-1]) == {1000} and 0 < lengths[-1] <= 1000
    tokenizer = shards.load_data_tokenizer(tmp_path)
    tokens = np.concatenate([np.load(p) for p in paths])
    assert tokens[0] == tokenizer.eot and list(tokens).count(tokenizer.eot) == 1
    assert tokenizer.decode_bytes(tokens[1:]).decode() == small_text()
    # the one document is in both splits, and so are its bytes
    assert meta["splits"]["val"] == {
        "tokens": 1000, "documents": 1, "bytes": len(tokenizer.decode_bytes(tokens[1:1000]))}
    assert sum(meta["splits"][s]["bytes"] for s in ("val", "train")) == len(small_text().encode())


def test_large_vocabulary_is_stored_as_uint32(text_file, monkeypatch, tmp_path, small_bpe):
    monkeypatch.setattr(fineweb, "make_tokenizer", lambda spec, training_texts: small_bpe)
    for vocab_size, dtype in ((65_535, "uint16"), (65_536, "uint32")):
        monkeypatch.setattr(small_bpe, "vocab_size", vocab_size)
        meta = prepare([text_file], tmp_path / str(vocab_size), "bpe:400")
        assert stored_tokens(tmp_path / str(vocab_size), "train").dtype == dtype
        assert meta["dtype"] == dtype


# -----------------------------------------------------------------------------
# folders that exist already


def test_complete_folder_is_not_touched(text_file, tmp_path, capsys):
    out = tmp_path / "out"
    meta = prepare([text_file], out, "bpe:300")
    before = modification_times(out)
    assert prepare([text_file], out, "bpe:300") == meta
    assert modification_times(out) == before
    with pytest.raises(UserError, match=r"tokenizer bpe:300, not bpe:301.*another --out"):
        prepare([text_file], out, "bpe:301")
    assert modification_times(out) == before


def test_half_done_folder_is_finished(text_file, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    complete = tmp_path / "complete"
    prepare([text_file], complete, "bpe:300")
    with monkeypatch.context() as patch:
        patch.setattr(fineweb.ShardWriter, "flush", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([text_file], tmp_path / "out", "bpe:300")
    assert not (tmp_path / "out" / "meta.json").exists()
    with pytest.raises(UserError, match="another --out"):
        prepare([text_file], tmp_path / "out", "bpe:301")
    prepare([text_file], tmp_path / "out", "bpe:300")
    for path in complete.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in complete.iterdir()) == sorted(
        p.name for p in (tmp_path / "out").iterdir())


def test_shards_from_elsewhere_are_not_overwritten(text_file, tmp_path):
    np.save(tmp_path / "edufineweb_train_000001.npy", np.zeros(10, np.uint16))
    with pytest.raises(UserError, match="not made here"):
        prepare([text_file], tmp_path, "bpe:300")


def test_replaced_tokenizer_file_is_refused(text_file, tmp_path):
    prepare([text_file], tmp_path, "bpe:300")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not the tokenizer"):
        shards.load_data_tokenizer(tmp_path)


# -----------------------------------------------------------------------------
# files and processors


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_file_is_in_place_where_a_folder_cannot_be_synced(tmp_path, monkeypatch, code):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    files.write_json(tmp_path / "a.json", {"x": 1})
    assert files.read_json(tmp_path / "a.json") == {"x": 1}
    code = errno.EIO  # a disk that fails is another matter
    with pytest.raises(OSError, match="Input/output error"):
        files.write_json(tmp_path / "a.json", {"x": 2})


def test_json_files_hold_every_string_that_python_can(tmp_path):
    value = {"a\udcff": ["词\udc80", "\\udcff"]}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert "词" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("contents, cpus", [
    ({}, 8), ({"cpu.max": "max 100000"}, 8), ({"cpu.max": "250000 100000"}, 3),
    ({"cpu.max": "50000 100000"}, 1), ({"cpu.max": "garbage"}, 8),
    ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 8),
    ({"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}, 2)])
def test_cpus_are_those_that_the_control_group_grants(tmp_path, monkeypatch, contents, cpus):
    for name, content in contents.items():
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(cli, "cgroup_folders", lambda controller: [tmp_path / "none", tmp_path])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert cli.available_cpus() == cpus


# -----------------------------------------------------------------------------
# real text


def test_builtin_text_is_english_documentation():
    documents = sources.builtin_documents()
    assert 1_000_000 < sum(map(len, documents)) < 10_000_000
    for words in ("Boolean operations", "Deserialize"):  # language reference, docstrings
        assert any(words in text for text in documents)


def test_real_documents_are_stored_unchanged_with_gpt2(real_data, gpt2_tokenizer, tmp_path):
    meta = prepare([real_data / "fineweb_edu_sample.jsonl"], tmp_path, "gpt2")
    with open(real_data / "fineweb_edu_sample.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert stored_text(tmp_path) == "".join(texts)
    assert len(gpt2_tokenizer.encode(texts[0])) == 845
    assert meta["splits"]["train"]["documents"] + meta["splits"]["val"]["documents"] in (133, 134)
