"""From text to shards: nothing lost, nothing invented, nothing overwritten."""

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
from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

STRANGE = ["", "a", " ", "\r\n \n\n\t x", "héllo wörld", "你好，世界。红楼梦", "😀👩‍👩‍👧",
           "\u0000\x7f", "<|endoftext|> is text <|endoftext|>", "  def f(x):\n    return x\n",
           "\ufeffbom", "ﷺ\u202e"]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([small_text()], 400)


def split_tokens(folder, split):
    """All tokens of a split, as stored."""
    return np.concatenate([np.load(p) for p in shards.find_shards(folder, split)] or [[]])


def split_text(folder, split):
    """The documents of a split, decoded."""
    tokenizer = shards.load_data_tokenizer(folder)
    tokens = split_tokens(folder, split)
    starts = np.flatnonzero(tokens == tokenizer.eot)
    return [tokenizer.decode_bytes(part[1:]).decode() for part in np.split(tokens, starts)[1:]]


def read_all(names):
    """(text, starts_document) over some local sources."""
    inputs = sources.list_inputs(map(str, names), None, "train")
    everything = range(len(inputs))
    read = sources.read_inputs(inputs, everything, "text", sources.RowCounter(), None, False, True)
    return [(text, starts) for _, _, text, starts in read]


# tokenizers


@pytest.mark.parametrize("text", STRANGE)
def test_bpe_gives_back_every_text(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode_bytes(ids).decode() == text == bpe.decode(ids)
    assert bpe.eot not in ids and max(ids, default=0) < bpe.vocab_size


@pytest.mark.parametrize("text", STRANGE)
def test_gpt2_gives_back_every_text(gpt2_tokenizer, text):
    ids = gpt2_tokenizer.encode(text)
    assert gpt2_tokenizer.decode_bytes(ids).decode() == text
    assert 50256 not in ids


def test_gpt2_ids_are_those_of_openai(gpt2_tokenizer):
    assert gpt2_tokenizer.encode("Hello, I'm a language model,") == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2_tokenizer.vocab_size, gpt2_tokenizer.eot) == (50257, 50256)


def test_gpt2_ids_of_any_text_are_those_of_tiktoken(gpt2_tokenizer, real_data):
    """Against tiktoken's own pattern, one text a call: every character, and rules that meet."""
    gpt2 = tiktoken.get_encoding("gpt2")
    rng = random.Random(0)
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = ["a".join(every), " ".join(every), " " * 1000 + "a", "\n" * 1000, "'" * 9]
    parts = ["'s", "'ll", "'Re", "'", " ", "  ", "\n", "\r\n", "\u00a0", "\u3000", "\x1c", "a",
             " the", "é", "e\u0301", "梦", "12", "½", "٣", "!?", "_", "😀", END_OF_TEXT]
    texts += ["".join(rng.choices(parts, k=rng.randrange(30))) for _ in range(3000)]
    texts += ["".join(rng.choices(every, k=20)) for _ in range(3000)]
    texts += (real_data / "fineweb_edu_sample.jsonl").read_text(encoding="utf-8").splitlines()
    rng.shuffle(texts)
    for first in range(0, len(texts), 8):  # groups with and without the literal <|endoftext|>
        group = texts[first:first + 8]
        for text, ids in zip(group, gpt2_tokenizer.encode_batch(group), strict=True):
            assert ids.tolist() == gpt2.encode_ordinary(text), repr(text[:60])
    assert gpt2_tokenizer.encode_batch([]) == []


def test_trained_tokenizer_has_the_size_asked_for_and_merges(bpe):
    assert (bpe.vocab_size, bpe.eot, bpe.spec) == (400, 399, "bpe:400")
    assert len(bpe.encode(small_text())) < 0.7 * len(small_text())


def test_tokenizer_is_rebuilt_from_its_state(bpe):
    again = Tokenizer(**json.loads(json.dumps(bpe.state())))
    assert again.encode(small_text()) == bpe.encode(small_text())


def test_decode_holds_back_half_a_character(bpe):
    ids = bpe.encode("梦")  # three bytes, none of them merged
    assert len(ids) == 3
    assert [bpe.decode(ids[:n]) for n in range(4)] == ["", "", "", "梦"]
    assert bpe.decode([ids[0], *bpe.encode("a")]) == "\ufffda"


@pytest.mark.parametrize("spec", ["gpt3", "bpe:", "bpe:100", "bpe:x", ""])
def test_bad_tokenizer_specs(spec, text_file, tmp_path):
    with pytest.raises(UserError, match=r"bpe:\d+"):
        prepare([text_file], tmp_path / "out", spec)
    assert not (tmp_path / "out").exists()


# small corpora


def test_small_corpus_is_split_by_text(text_file, data_dir):
    train, val = split_text(data_dir, "train"), split_text(data_dir, "val")
    assert len(train) == len(val) == 1
    text = small_text()
    assert train[0] + val[0] == text
    assert 0.9 * len(text) - 200 < len(train[0]) <= 0.9 * len(text)
    assert train[0].endswith("\n")
    meta = shards.read_meta(data_dir)
    for split, parts in (("train", train), ("val", val)):
        tokens = split_tokens(data_dir, split)
        assert tokens.dtype == np.uint16 and tokens[0] == meta["eot"]
        assert meta["splits"][split] == {
            "tokens": len(tokens), "documents": 1, "bytes": len(parts[0].encode())}
    # the tokenizer has seen the train part only
    tokenizer = shards.load_data_tokenizer(data_dir)
    assert tokenizer.model == train_bpe(train, 300).model


def test_no_line_end_to_cut_at(tmp_path):
    (tmp_path / "a.txt").write_text("梦" * 1000, encoding="utf-8")
    prepare([tmp_path / "a.txt"], tmp_path / "out", "bpe:257")
    assert [len(split_text(tmp_path / "out", s)[0]) for s in ("train", "val")] == [900, 100]


def test_text_files_are_taken_as_they_are(tmp_path):
    text = "one\r\ntwo\r\n" * 50 + "<|endoftext|>\r\nno line end"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    prepare([tmp_path / "a.txt"], tmp_path / "out", "bpe:270")
    documents = split_text(tmp_path / "out", "train") + split_text(tmp_path / "out", "val")
    assert "".join(documents) == text
    # no token of the text is end-of-text
    assert shards.read_meta(tmp_path / "out")["splits"]["train"]["documents"] == 1


def test_all_readers_give_the_same_documents(tmp_path):
    texts = [text for text in STRANGE if text] * 20
    folder = tmp_path / "in"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "a.jsonl").write_text(lines + "\n" + '{"text": ""}', encoding="utf-8")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": [1] * len(texts)}),
                                folder / "c.parquet")
    (folder / "ignored.md").write_text("x")
    read = [text for text, starts in read_all([folder]) if starts]
    assert read == texts * 3
    prepare([folder], tmp_path / "out", "bpe:300", val_fraction=0.3)
    documents = split_text(tmp_path / "out", "train") + split_text(tmp_path / "out", "val")
    assert "".join(documents) == "".join(texts * 3)


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b"}\n', encoding="utf-8")
    assert list(read_all([tmp_path / "a.jsonl"])) == [("a? b", True)]


def test_long_documents_come_in_pieces_that_join(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "CHUNK_CHARS", 100)
    text = small_text(5000).replace("\n\n", "\r\n")
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * 1234}), encoding="utf-8")
    pieces = list(read_all([tmp_path / "a.txt", tmp_path / "b.jsonl"]))
    assert [starts for _, starts in pieces].count(True) == 2 and len(pieces) > 30
    assert "".join(piece for piece, _ in pieces) == text + "x" * 1234


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "no text"), ("a.txt", "词".encode("gbk"), "not UTF-8.*iconv"),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2.*text_column"),
    ("a.jsonl", b"not json\n", "1 of 1 rows.*line 1"),
    ("a.jsonl.gz", b"not gzip", "damaged gzip"),
    ("a.parquet", b"not parquet", "parquet"), ("a.pdf", b"%PDF", "cannot read")])
def test_bad_sources_are_named_and_write_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){message}"):
        prepare([tmp_path / name], tmp_path / "out", "bpe:300")
    assert not (tmp_path / "out").exists()


def test_unknown_source():
    with pytest.raises(UserError, match="neither 'builtin'"):
        list(read_all(["no such thing"]))


# large corpora


def test_large_corpus_fills_shards_of_equal_size(text_file, tmp_path):
    fineweb.prepare([text_file], tmp_path, "bpe:300", shard_size=1000)  # 240 kB would be large
    meta = shards.read_meta(tmp_path)
    paths = shards.find_shards(tmp_path, "val") + shards.find_shards(tmp_path, "train")
    assert [p.name for p in paths] == ["edufineweb_val_000000.npy"] + [
        f"edufineweb_train_{i:06d}.npy" for i in range(1, len(paths))]
    tokens_of = [np.load(p) for p in paths]
    assert {len(s) for s in shards[:-1]} == {1000} and 0 < len(shards[-1]) <= 1000
    tokenizer = shards.load_data_tokenizer(tmp_path)
    tokens = np.concatenate(tokens_of)
    assert tokens[0] == tokenizer.eot and list(tokens).count(tokenizer.eot) == 1
    assert tokenizer.decode_bytes(tokens[1:]).decode() == small_text()
    # the one document straddles the splits, and its bytes are shared out
    assert meta["splits"]["val"] == {
        "tokens": 1000, "documents": 1, "bytes": len(tokenizer.decode_bytes(tokens[1:1000]))}
    assert sum(meta["splits"][s]["bytes"] for s in ("val", "train")) == len(small_text().encode())


def test_large_vocabulary_takes_uint32(text_file, monkeypatch, tmp_path, bpe):
    monkeypatch.setattr(fineweb, "make_tokenizer", lambda spec, sample: bpe)
    for vocab_size, dtype in ((65_535, np.uint16), (65_536, np.uint32)):
        monkeypatch.setattr(bpe, "vocab_size", vocab_size)
        prepare([text_file], tmp_path / str(vocab_size), "bpe:400")
        assert split_tokens(tmp_path / str(vocab_size), "train").dtype == dtype


# the folder


def test_a_complete_folder_is_left_alone(text_file, tmp_path, capsys):
    out = tmp_path / "out"
    meta = prepare([text_file], out, "bpe:300")
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert prepare([text_file], out, "bpe:300") == meta
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(UserError, match=r"bpe:300.*not 'bpe:301'.*another --out"):
        prepare([text_file], out, "bpe:301")
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_a_half_done_folder_is_finished(text_file, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    whole = tmp_path / "whole"
    prepare([text_file], whole, "bpe:300")
    with monkeypatch.context() as patch:
        patch.setattr(fineweb.ShardWriter, "flush", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare([text_file], tmp_path / "out", "bpe:300")
    assert not (tmp_path / "out" / "meta.json").exists()
    with pytest.raises(UserError, match="another --out"):
        prepare([text_file], tmp_path / "out", "bpe:301")
    prepare([text_file], tmp_path / "out", "bpe:300")
    for path in whole.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in whole.iterdir()) == sorted(
        p.name for p in (tmp_path / "out").iterdir())


def test_shards_of_others_are_not_overwritten(text_file, tmp_path):
    np.save(tmp_path / "edufineweb_train_000001.npy", np.zeros(10, np.uint16))
    with pytest.raises(UserError, match="not made here"):
        prepare([text_file], tmp_path, "bpe:300")


def test_tokenizer_of_another_folder_is_noticed(text_file, tmp_path):
    prepare([text_file], tmp_path, "bpe:300")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not the tokenizer"):
        shards.load_data_tokenizer(tmp_path)


# sources other than local files


def test_builtin_text_is_real():
    documents = sources.builtin_documents()
    assert 1_000_000 < sum(map(len, documents)) < 10_000_000
    for words in ("Boolean operations", "Deserialize"):  # language reference, docstrings
        assert any(words in text for text in documents)


def test_real_documents_with_gpt2(real_data, gpt2_tokenizer, tmp_path):
    meta = prepare([real_data / "fineweb_edu_sample.jsonl"], tmp_path, "gpt2")
    texts = [json.loads(line)["text"] for line in (real_data / "fineweb_edu_sample.jsonl").open(
        encoding="utf-8")]
    documents = split_text(tmp_path, "train") + split_text(tmp_path, "val")
    assert "".join(documents) == "".join(texts)
    assert len(gpt2_tokenizer.encode(texts[0])) == 845
    assert meta["splits"]["train"]["documents"] + meta["splits"]["val"]["documents"] in (133, 134)
