"""LAMBADA, WikiText and texts of one's own equal the slow way, lm-eval and Hugging Face; files."""

import hashlib
import http.server
import io
import json
import math
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_text
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2lab import benchmarks, core, downloads, tasks
from gpt2lab.benchmarks import (
    Document,
    Lambada,
    Perplexity,
    Strided,
    detokenize_wikitext,
    gather_results,
    load_benchmark,
    load_text,
    make_document,
    make_wikitext,
    official_files,
    score_benchmark,
    split_wikitext,
)
from gpt2lab.cli import UserError
from gpt2lab.distributed import Ranks
from gpt2lab.downloads import OfficialFile, download
from gpt2lab.tokenizer import train_bpe
from train_gpt2 import GPT

CPU = torch.device("cpu")
ALONE = Ranks(CPU)
BLOCK_SIZE = 24


@pytest.fixture(scope="module")
def bpe300():
    """A tokenizer of 300 tokens."""
    return train_bpe([small_text()], 300)


@pytest.fixture(scope="module")
def models(bpe300, tmp_path_factory):
    """
    (GPT, Hugging Face's model) with the same weights. Their losses are far from uniform, and they
    like the token " the" best.
    """
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=BLOCK_SIZE, n_embd=32, n_layer=2,
                                    n_head=2, initializer_range=0.2)).eval()
    the, = bpe300.encode(" the")
    with torch.no_grad():
        hf.transformer.ln_f.bias += 4 * hf.transformer.wte.weight[the]
    path = tmp_path_factory.mktemp("model")
    hf.save_pretrained(path)
    return GPT.from_pretrained(path), hf


def score(model, tokenizer, benchmark, ranks=ALONE, **options):
    """{number: result} of this rank."""
    benchmark.prepare(tokenizer, model.config.block_size)
    return score_benchmark(model, tokenizer, benchmark, ranks, **options)


def measure(benchmark, results):
    """{name: Metric} of {number: result}."""
    return {metric.name: metric for metric in
            benchmark.metrics([results[number] for number in sorted(results)])}


def compute_logits(model, tokens):
    """The logits (T, V) of a list of tokens, of either model."""
    with torch.inference_mode():
        output = model(torch.tensor([tokens]))
    return (output.logits if hasattr(output, "logits") else output[0])[0]


# LAMBADA

PASSAGES = ("He saw the the", "He saw the", "He saw the bitter end", "the", "end",
            "He said it.\n the", "He said it. She heard\nhim say the", " Spaces   the",
            "a much longer passage, which the model cannot read whole, because it knows the the",
            "anextraordinarilylongsinglewordthatexceedstheblocksizeofthemodelbysometokensandmore")


def score_passage(model, tokenizer, passage):
    """(losses, whether each token is the likeliest) of the last word, from whole logits."""
    words = passage.split(" ")
    context = tokenizer.encode(" ".join(words[:-1]).rstrip())
    tokens = tokenizer.encode(passage)
    num_scored = len(tokens) - len(context)
    if not context:
        tokens = [tokenizer.eot, *tokens]
    tokens = tokens[-BLOCK_SIZE - 1:]
    num_scored = min(num_scored, len(tokens) - 1)
    logits = compute_logits(model, tokens[:-1])[-num_scored:]  # (num_scored, V)
    targets = torch.tensor(tokens[-num_scored:])
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses.tolist(), (logits.argmax(1) == targets).tolist()


@pytest.mark.parametrize("peer", [0, 1])
def test_lambada_equals_the_slow_way_and_hugging_face(models, bpe300, peer):
    benchmark = Lambada(PASSAGES, None)
    results = score(models[0], bpe300, benchmark)
    all_losses, acc, last = [], 0, 0
    for number, passage in enumerate(PASSAGES):
        losses, greedy = score_passage(models[peer], bpe300, passage)
        assert results[number]["loss"] == pytest.approx(sum(losses), abs=1e-3)
        assert results[number]["correct"] is all(greedy)
        assert results[number]["last_token_correct"] is greedy[-1]
        all_losses.append(sum(losses))
        acc, last = acc + all(greedy), last + greedy[-1]
    n = len(PASSAGES)
    assert 0 < acc < last < n  # the passage with "\n the" has only its last token right
    metrics = measure(benchmark, results)
    assert metrics["acc"].value == acc / n and metrics["last token acc"].value == last / n
    assert metrics["acc"].standard_error == pytest.approx(math.sqrt(acc * (n - acc) / n**3))
    perplexity = math.exp(np.mean(all_losses))
    assert metrics["perplexity"].value == pytest.approx(perplexity, rel=1e-4)
    assert metrics["perplexity"].standard_error == pytest.approx(
        perplexity * np.std(all_losses, ddof=1) / math.sqrt(n), rel=1e-3)


def test_a_passage_of_one_word_follows_end_of_text(models, bpe300):
    benchmark = Lambada(["the"], None)
    rows = benchmark.rows(0, [bpe300.encode(text) for text in benchmark.texts(0)], 299, 24)
    assert rows == ([[299, *bpe300.encode("the")]], [len(bpe300.encode("the"))])


def test_both_formats_of_lambada_are_read(tmp_path):
    lines = [{"text": "He saw the end"}, {"text": "He said.\n\nYes"}]
    (tmp_path / "lambada_test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_benchmark("lambada", tmp_path, ALONE, None, None)[0].passages == [
        "He saw the end", "He said.\n\nYes"]
    (tmp_path / "lambada_test.jsonl").unlink()
    lines = [{"context": "He saw the ", "continuation": "end"}]
    (tmp_path / "lambada_openai.jsonl").write_text("\n".join(map(json.dumps, lines)))
    benchmark, = load_benchmark("lambada", tmp_path, ALONE, None, None)
    assert benchmark.passages == ["He saw the end"]
    assert benchmark.texts(0) == ["He saw the", "He saw the end"]


@pytest.mark.parametrize("line", [
    {}, {"text": ""}, {"text": " "}, {"text": 5}, {"text": None, "context": "a"},
    {"context": "a"}, {"context": 5, "continuation": "b"}, {"context": "a", "continuation": 5},
    {"context": "a", "continuation": ""}, {"text": "", "context": "a", "continuation": "b"}])
def test_a_line_that_is_not_a_passage_is_named(tmp_path, line):
    """Guards against a traceback: a context that is a number was accepted, and had no rstrip."""
    path = tmp_path / "lambada_test.jsonl"
    path.write_text('{"text": "a b"}\n' + json.dumps(line))
    with pytest.raises(UserError, match=r"lambada_test\.jsonl, line 2 lacks text"):
        load_benchmark("lambada", tmp_path, ALONE, None, None)


# WikiText

# (text, what lm-eval 0.4.13 makes of it, how many words and bytes it counts)
WIKITEXT = [
    (" The dogs ' bowl and the girls ' /' 3/ sign \n",
     " The dogs'bowl and the girls' /'[0-9]/ sign\n", 13, 45),
    (" A well @-@ made pot of 1 @,@ 250 litres and 2 @.@ 5 kilos \n",
     " A well-made pot of 1,250 litres and 2.5 kilos\n", 17, 60),
    (" One : two ; three . Four ! Five ? Six , seven \n",
     " One: two; three. Four! Five? Six, seven\n", 15, 48),
    (" It ( as they say ) is [ or was ] a { kind of } \" quiet \" or ' silent ' place \n",
     " It (as they say) is [or was] a {kind of} \"quiet\" or'silent' place\n", 26, 79),
    (" = = = = Deep = = = = \n = = = Less = = = \n = = Two = = \n",
     " ==== Deep ====\n=== Less ===\n== Two ==\n", 23, 56),
    (" At 20 ° C the N birds left the man 's house \n \n  It was cold \n",
     " At 20°C the 1 birds left the man's house\n\n It was cold\n", 17, 64),
    (' ( \n spaces ) and " lines \n broken " and [ \t tabs ]',
     ' (spaces) and "lines\nbroken" and [tabs]', 13, 51),
    (" s ' s 's . , . x . . y ( ) [ ] { } \" \" ' '",
     " s's's. ,. x. . y () [] {} \"\" ''", 22, 43)]


@pytest.mark.parametrize("original, text, num_words, num_bytes", WIKITEXT)
def test_wikitext_is_worded_and_counted_as_in_lm_eval(original, text, num_words, num_bytes):
    assert detokenize_wikitext(original) == text
    assert make_document(original, text) == (text, num_words, num_bytes)


def test_wikitext_is_divided_before_each_title():
    pages = [" = First = \n \n Some text . \n = = Part = = \n = = = Deep = = = \n more = text \n",
             " = Second = \n = = Part = = ", " = Third one = \n = x \n x = \n"]
    assert split_wikitext(" \n" + "\n".join(pages)) == pages
    assert split_wikitext("no title \n") == ["no title \n"]
    benchmark, = make_wikitext("\n".join(pages), None, None)
    assert [document.text for document in benchmark.documents] == [
        detokenize_wikitext(page) for page in pages]
    assert benchmark.documents[1].num_bytes == len(pages[1])


def test_the_windows_of_a_document():
    """The last window is full, as in lm-eval, and only its new tokens are scored."""
    cut = Perplexity("a", [], None).cut
    assert list(cut(list(range(1, 11)), 0, 4)) == [
        ([[0, 1, 2, 3, 4]], [4]), ([[4, 5, 6, 7, 8]], [4]), ([[6, 7, 8, 9, 10]], [2])]
    assert list(cut([1, 2, 3, 4], 0, 4)) == [([[0, 1, 2, 3, 4]], [4])]
    assert list(cut([1], 0, 4)) == [([[0, 1]], [1])] and list(cut([], 0, 4)) == []


def test_the_windows_of_a_stride():
    cut = Strided("a", "text", 3).cut
    assert list(cut(list(range(10)), 99, 4)) == [
        ([[0, 1, 2, 3]], [3]), ([[3, 4, 5, 6]], [3]), ([[6, 7, 8, 9]], [3])]
    assert list(Strided("a", "text", 4).cut(list(range(9)), 99, 4)) == [
        ([[0, 1, 2, 3]], [3]), ([[4, 5, 6, 7]], [3])]  # nothing predicts the first of a window
    with pytest.raises(UserError, match="--stride 5 must be at most 4"):
        list(Strided("a", "text", 5).cut([1, 2], 99, 4))
    # without a token before it, nothing is predicted, and the mean of nothing is not a number
    with pytest.raises(UserError, match="two or more tokens"):
        list(cut([1], 99, 4))


def test_every_token_is_predicted_once():
    for length in range(2, 30):
        tokens = list(range(1, length + 1))
        for block_size in range(1, 12):
            windows = list(Perplexity("a", [], None).cut(tokens, 0, block_size))
            assert [t for (row,), (n,) in windows for t in row[-n:]] == tokens
            assert all(len(row) <= block_size + 1 for (row,), _ in windows)
            for stride in range(1, block_size):
                windows = list(Strided("a", "text", stride).cut(tokens, 0, block_size))
                assert [t for (row,), (n,) in windows for t in row[-n:]] == tokens[1:]
                assert all(n < len(row) <= block_size for (row,), (n,) in windows)


DOCUMENTS = [Document(text, num_words, num_bytes) for _, text, num_words, num_bytes in WIKITEXT]


def document_loss(model, tokenizer, text):
    """The summed loss of a document. Each token is predicted by a forward of its own."""
    tokens, total = [tokenizer.eot, *tokenizer.encode(text)], 0.0
    for i in range(1, len(tokens)):
        # the window ends after the next multiple of the block size, or with the document
        end = min((i - 1) // BLOCK_SIZE * BLOCK_SIZE + BLOCK_SIZE + 1, len(tokens))
        logits = compute_logits(model, tokens[max(end - BLOCK_SIZE - 1, 0):i])[-1]
        total += F.cross_entropy(logits, torch.tensor(tokens[i])).item()
    return total


def jackknife_error(totals, lengths):
    """The standard error of sum(totals) / sum(lengths), leaving out one document at a time."""
    n = len(totals)
    values = [(sum(totals) - total) / (sum(lengths) - length)
              for total, length in zip(totals, lengths, strict=True)]
    return math.sqrt((n - 1) * np.var(values))


def test_the_perplexity_of_documents_equals_the_slow_way(models, bpe300):
    model, _ = models
    benchmark = Perplexity("a", DOCUMENTS, None)
    results = score(model, bpe300, benchmark)
    losses = [document_loss(model, bpe300, document.text) for document in DOCUMENTS]
    for i, loss in enumerate(losses):
        mine = [result for result in results.values() if result["document"] == i]
        assert sum(result["loss"] for result in mine) == pytest.approx(loss, abs=2e-3)
        assert sum(result["tokens"] for result in mine) == len(bpe300.encode(DOCUMENTS[i].text))
    metrics = measure(benchmark, results)
    words, sizes = ([document[i] for document in DOCUMENTS] for i in (1, 2))
    perplexity = math.exp(sum(losses) / sum(words))
    bits = sum(losses) / math.log(2) / sum(sizes)
    assert metrics["word perplexity"].value == pytest.approx(perplexity, rel=1e-3)
    assert metrics["bits per byte"].value == pytest.approx(bits, rel=1e-5)
    assert metrics["word perplexity"].standard_error == pytest.approx(
        perplexity * jackknife_error(losses, words), rel=0.25)
    assert metrics["bits per byte"].standard_error == pytest.approx(
        jackknife_error(losses, sizes) / math.log(2), rel=0.25)


def test_a_single_document_has_no_standard_error(models, bpe300, tmp_path):
    text = "\ufeffA text of one's own,\nwith  spaces and é.\n"
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    whole, strided = load_text(tmp_path / "own.txt", None, 8)
    metrics = measure(whole, score(models[0], bpe300, whole))
    loss = document_loss(models[0], bpe300, text[1:])
    assert metrics["bits per byte"].value == pytest.approx(
        loss / math.log(2) / len(text[1:].encode()), rel=1e-5)
    assert metrics["word perplexity"].value == pytest.approx(math.exp(loss / 9), rel=1e-3)
    assert [metric.standard_error for metric in metrics.values()] == [None, None]
    assert (whole.name, strided.name) == ("text own.txt", "text own.txt, stride 8")


@pytest.mark.parametrize("stride", [BLOCK_SIZE, BLOCK_SIZE // 2])
def test_the_perplexity_of_tokens_equals_hugging_faces_procedure(models, bpe300, stride):
    """Windows every `stride` tokens, in which the labels of tokens that have counted are -100."""
    text = small_text(400)
    tokens = torch.tensor([bpe300.encode(text)])
    total, count, done = 0.0, 0, 0
    for start in range(0, tokens.size(1), stride):
        end = min(start + BLOCK_SIZE, tokens.size(1))
        labels = tokens[:, start:end].clone()
        labels[:, :done - start] = -100
        scored = (labels[:, 1:] != -100).sum().item()  # the model shifts the labels
        with torch.inference_mode():
            total += models[1](tokens[:, start:end], labels=labels).loss.item() * scored
        count, done = count + scored, end
        if end == tokens.size(1):
            break
    benchmark = Strided("a", text, stride)
    results = score(models[0], bpe300, benchmark)
    assert sum(result["tokens"] for result in results.values()) == count
    metric = measure(benchmark, results)["token perplexity"]
    assert metric.value == pytest.approx(math.exp(total / count), rel=1e-3)


def test_a_stride_adds_the_text_of_hugging_faces_copy():
    """The copy has a row for each line, empty ones without a space, and joins them."""
    _, strided = make_wikitext(" \n = A = \n \n b . \n", None, 8)
    assert strided.documents[0].text == "\n\n = A = \n\n\n\n\n b . \n"
    assert strided.name == "wikitext, stride 8"


# examples


def test_a_limit_is_evenly_spaced():
    assert Lambada(["a b"] * 10, 4).numbers == [0, 2, 5, 7]
    assert Lambada(["a b"] * 10, 10).numbers == Lambada(["a b"] * 10, 99).numbers == list(range(10))
    items = [{"context": "a", "continuation": "b"}] * 100
    task = core.CORE_TASKS["lambada_openai"]
    assert benchmarks.Core(task, items, 3).numbers == [0, 33, 66]


@pytest.mark.parametrize("limit, documents", [
    (None, range(10)), (8, [0, 2, 5, 7]), (9, [0, 2, 5, 7]), (1, [0]), (99, range(10))])
def test_a_limit_of_windows_leaves_documents_whole(bpe300, limit, documents):
    """Guards against the perplexity per word of a document of which only a part is scored."""
    benchmark = Perplexity("a", [Document("x" * 30, 1, 30)] * 10, limit)
    benchmark.prepare(bpe300, BLOCK_SIZE)
    assert [document for document, _ in benchmark.windows] == [i for i in documents for _ in "ab"]
    assert benchmark.numbers == list(range(2 * len(documents)))


@pytest.mark.parametrize("make", [
    lambda: Lambada(PASSAGES, 9), lambda: Perplexity("a", DOCUMENTS, None),
    lambda: Strided("a", small_text(500), 20)])
def test_ranks_share_the_examples(models, bpe300, make, monkeypatch):
    """Guards against examples that two ranks score or none, also in several rounds."""
    whole = score(models[0], bpe300, make())
    monkeypatch.setattr(benchmarks, "EXAMPLES_AT_ONCE", 2)
    for world_size in (1, 2, 3):
        parts = [score(models[0], bpe300, make(), Ranks(CPU, rank, world_size))
                 for rank in range(world_size)]
        assert sorted(number for part in parts for number in part) == sorted(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        gathered = dict(gather_results({n: r for part in parts for n, r in part.items()}))
        assert list(gathered) == sorted(whole)
        for number, result in gathered.items():
            assert result.pop("loss") == pytest.approx(whole[number]["loss"], abs=1e-3)
            assert result == {key: value for key, value in whole[number].items() if key != "loss"}


def test_scoring_stops_when_it_is_told_to(models, bpe300):
    results = {}
    returned = score(models[0], bpe300, Lambada(PASSAGES, None), on_result=results.__setitem__,
                     stop=lambda: len(results) == 3)
    assert len(results) == 3 and returned == results


# files


def make_zip(members):
    """The bytes of a zip file with some members, {name: content}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


ITEM = {"query": "a", "choices": ["b", "c"], "gold": 1}


def test_files_are_found_below_a_folder_and_in_its_zip_files(tmp_path):
    (tmp_path / "empty.zip").write_bytes(make_zip({}))
    (tmp_path / "bundle.zip").write_bytes(make_zip({
        "bundle/data/deep/copa.jsonl": json.dumps(ITEM), "bundle/copa.jsonl.txt": "x"}))
    benchmark, = load_benchmark("copa", tmp_path, ALONE, None, None)
    assert benchmark.items == [ITEM]
    (tmp_path / "deep" / "er").mkdir(parents=True)  # a file comes before one in a zip file
    (tmp_path / "deep" / "er" / "copa.jsonl").write_text(json.dumps(ITEM | {"query": "other"}))
    benchmark, = load_benchmark("copa", tmp_path, ALONE, None, None)
    assert benchmark.items[0]["query"] == "other"
    (tmp_path / "wiki_test_mine.txt").write_bytes(b" = A = \r\n b \r\n")
    wikitext, = load_benchmark("wikitext", tmp_path, ALONE, None, None)
    assert [document.text for document in wikitext.documents] == [" = A =\nb\n"]
    with pytest.raises(UserError, match=r"piqa needs the file piqa\.jsonl, which is not in"):
        load_benchmark("piqa", tmp_path, ALONE, None, None)


@pytest.mark.parametrize("change", [
    lambda content: content[:len(content) // 2], lambda content: b"",
    lambda content: content[:80] + bytes(40) + content[120:],  # zlib.error, or a wrong CRC
    lambda content: content[:len(content) // 2] + b"!" + content[len(content) // 2 + 1:]])
def test_a_damaged_zip_file_is_an_error_in_one_line(tmp_path, change):
    words = "".join(f" line {i} of the text \n" for i in range(3000))
    (tmp_path / "wiki.zip").write_bytes(change(make_zip({"wiki.test.raw": words})))
    with pytest.raises(UserError, match=r"wiki\.zip cannot be read"):
        load_benchmark("wikitext", tmp_path, ALONE, None, None)


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b" \n", "is empty"), (b"ab\xff", r"is not UTF-8 \(byte 2\)")])
def test_a_text_that_cannot_be_read_is_an_error(tmp_path, content, message):
    (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"own\.txt {message}"):
        load_text(tmp_path / "own.txt", None, None)


HELLASWAG = {"ind": 4, "activity_label": "Home", "ctx_a": "How to sit [title] Sit down.",
             "ctx_b": "then you", "ctx": "unused", "label": "2",
             "endings": ["rest.", "[step] stand.", "eat  it.", "go."]}


def test_hellaswags_official_file_serves_for_cores(tmp_path):
    """The texts are those of lm-eval, which CORE's file has, too."""
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(HELLASWAG) + "\n")
    benchmark, = load_benchmark("hellaswag_zeroshot", tmp_path, ALONE, None, None)
    assert benchmark.items == [{"query": "Home: How to sit. Sit down. Then you", "gold": 2,
                                "choices": ["rest.", " stand.", "eat it.", "go."]}]
    assert benchmark.texts(0)[3] == "Home: How to sit. Sit down. Then you go."
    (tmp_path / "hellaswag.jsonl").write_text(json.dumps(ITEM))  # CORE's file comes first
    assert load_benchmark("hellaswag_zeroshot", tmp_path, ALONE, None, None)[0].items == [ITEM]
    (tmp_path / "hellaswag.jsonl").unlink()
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(HELLASWAG | {"label": 4}))
    with pytest.raises(UserError, match=r"line 1 must have a label from 0 to 3"):
        load_benchmark("hellaswag_zeroshot", tmp_path, ALONE, None, None)


def test_hellaswags_downloaded_file_serves_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks.DATA_FILE.parent.mkdir()
    tasks.DATA_FILE.write_text(json.dumps(HELLASWAG))
    benchmark, = load_benchmark("hellaswag_zeroshot", None, ALONE, None, None)
    assert benchmark.items[0]["gold"] == 2


# downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """
    A server of files, a dict; yields its settings. The first answer breaks off after "break_after"
    bytes, if that is set. "ranges" tells whether the server heeds Range. "requests" records the
    path and the Range of each request.
    """
    settings = {"files": {}, "break_after": None, "ranges": True, "requests": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            settings["requests"].append((self.path, asked))
            content = settings["files"].get(self.path)
            if content is None:
                self.send_error(404)
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            partial = bool(asked) and settings["ranges"]
            content = content[start:] if partial else content
            self.send_response(206 if partial else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:settings["break_after"]])
            settings["break_after"] = None

        def log_message(self, *args):
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    settings["url"] = f"http://127.0.0.1:{http_server.server_port}"
    threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    yield settings
    http_server.shutdown()


@pytest.mark.parametrize("ranges, size_known", [(True, True), (True, False), (False, True)])
def test_a_download_continues_where_the_connection_broke(server, ranges, size_known):
    """Guards against a file that has its beginning twice, or starts anew after each failure."""
    content = np.random.default_rng(0).bytes(2_500_000)
    server["files"]["/file"], server["break_after"] = content, 2_000_000
    server["ranges"] = ranges
    file = OfficialFile(Path("file"), server["url"] + "/file", "NO_SUCH_VARIABLE",
                        len(content) if size_known else None, hashlib.sha256(content).hexdigest())
    assert download(file).read_bytes() == content
    (_, first), (_, second) = server["requests"]
    assert first is None and 0 < int(second.removeprefix("bytes=").rstrip("-")) < 2_000_000


def test_a_mirror_may_serve_only_the_official_zip(server, monkeypatch):
    server["files"]["/core.zip"] = make_zip({"copa.jsonl": json.dumps(ITEM)})
    monkeypatch.setenv("CORE_URL", server["url"] + "/core.zip")
    with pytest.raises(OSError, match=r"is not the official eval_bundle\.zip, .* set CORE_URL"):
        load_benchmark("copa", None, ALONE, None, None)
    assert not list(Path("eval_data").iterdir()) and len(server["requests"]) == 1


def test_files_are_downloaded_once_from_the_mirror_of_the_hub(server, monkeypatch):
    content = make_zip({"wikitext-2-raw/wiki.test.raw": " = A = \n b \n"})
    path = "/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip"
    server["files"][path] = content
    monkeypatch.setenv("HF_ENDPOINT", server["url"] + "/")
    file = official_files()["wikitext"]._replace(size=len(content),
                                                 sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(benchmarks, "official_files", lambda: {"wikitext": file})
    for _ in range(2):
        benchmark, = load_benchmark("wikitext", None, ALONE, None, None)
        assert [document.text for document in benchmark.documents] == [" = A =\nb\n"]
    assert server["requests"] == [(path, None)]
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert official_files()["wikitext"].url == f"https://huggingface.co{path}"
