"""From text to shards: no text is lost or added, and no shard is overwritten."""

import gzip
import json
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from conftest import small_text

import fineweb
from fineweb import prepare
from gpt2lab import shards, sources
from gpt2lab.cli import UserError
from gpt2lab.tokenizer import END_OF_TEXT, GPT2_EOT, GPT2_VOCAB_SIZE, Tokenizer, train_bpe

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


def read_sources(*names):
    """[(text, starts_document)] of all chunks in some local sources."""
    inputs = sources.list_inputs(map(str, names), None, "train")
    chunks = sources.read_inputs(inputs, range(len(inputs)), "text", sources.RowCounter(),
                                 download_dir=None, delete_downloads=False, prefetch=True)
    return [(text, starts_document) for _, _, text, starts_document in chunks]


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


def test_all_file_formats_give_the_same_documents(tmp_path):
    texts = [text for text in STRANGE_TEXTS if text] * 20
    folder = tmp_path / "in"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "a.jsonl").write_text(lines + "\n" + '{"text": ""}', encoding="utf-8")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": [1] * len(texts)}),
                                folder / "c.parquet")
    (folder / "ignored.md").write_text("x")
    assert [text for text, starts_document in read_sources(folder) if starts_document] == texts * 3
    prepare([folder], tmp_path / "out", "bpe:300", val_fraction=0.3)
    assert stored_text(tmp_path / "out") == "".join(texts * 3)


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
    ("a.txt", b"", "no text"), ("a.txt", "词".encode("gbk"), "not UTF-8.*iconv"),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2.*text_column"),
    ("a.jsonl", b"not json\n", "1 of 1 rows.*line 1"),
    ("a.jsonl.gz", b"not gzip", "damaged gzip"),
    ("a.parquet", b"not parquet", "parquet"), ("a.pdf", b"%PDF", "cannot read")])
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
