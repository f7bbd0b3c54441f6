"""HellaSwag: scores equal those of the reference, and each example counts exactly once."""

import hashlib
import http.server
import json
import os
import re
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, plain_model, read_log, run_script, tiny_config
from reference import score_one_by_one
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
from gpt2lab import device, downloads, generate, kernels, scoring, tasks
from gpt2lab.cli import UserError
from gpt2lab.distributed import Ranks
from gpt2lab.tokenizer import train_bpe
from train_gpt2 import GPT, load, train

CPU = torch.device("cpu")
EXAMPLES = [
    {"ind": i, "ctx": f"A man {verb} a {thing}. He", "label": i % 4,
     "endings": [f"{verb} it again and again.", f"drops the {thing}.", "sleeps.",
                 f"sells the old {thing} to a friend who wants it."]}
    for i, (verb, thing) in enumerate(
        (verb, thing) for verb in ("paints", "washes", "repairs") for thing in ("car", "door"))]


def write_jsonl(path, rows):
    """Write a line of JSON for each row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def examples_file(tmp_path):
    """The six EXAMPLES in a file."""
    path = tmp_path / "examples.jsonl"
    write_jsonl(path, EXAMPLES)
    return path


def score_examples(model, tokenizer, examples, ranks=None, **options):
    """(Score, results in the order of the examples)."""
    results, ranks = {}, ranks or Ranks(CPU)
    prepared = scoring.prepare(model, tokenizer, examples, ranks, **options)
    score = scoring.score_hellaswag(model, prepared, ranks, on_result=results.__setitem__)
    return score, [results[number] for number in sorted(results)]


def check_against_reference(model, tokenizer, examples, score, results):
    """Compare with the reference: losses within 1e-3, predictions and counts equal."""
    correct = correct_norm = 0
    for example, result in zip(examples, results, strict=True):
        sums, counts = score_one_by_one(model, tokenizer, example)
        assert result["num_tokens"] == counts.tolist()
        assert result["loss_sums"] == pytest.approx(sums, abs=1e-3)
        assert result["pred"] == np.argmin(sums)
        assert result["pred_norm"] == np.argmin(sums / counts)
        correct += result["pred"] == int(example["label"])
        correct_norm += result["pred_norm"] == int(example["label"])
    assert score[:3] == (len(examples), correct, correct_norm)


def sharpen(model):
    """Enlarge the weights, so that losses are far from uniform and mistakes are visible."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)


# scores


@pytest.mark.parametrize("batch_tokens", [1, 100, None])
def test_scores_equal_those_of_the_reference(log_dir, batch_tokens):
    model, tokenizer = load(log_dir)
    sharpen(model)
    examples = [*EXAMPLES, EXAMPLES[0] | {"ctx": "", "endings": ["same", "same", "sa", "other"]}]
    score, results = score_examples(model, tokenizer, examples, batch_tokens=batch_tokens)
    check_against_reference(model, tokenizer, examples, score, results)
    assert 0 < score.truncated < 7  # some of the contexts do not fit


def test_logits_are_computed_a_few_rows_at_a_time(log_dir, monkeypatch):
    model, tokenizer = load(log_dir)
    _, expected = score_examples(model, tokenizer, EXAMPLES)
    monkeypatch.setattr(scoring, "LOGIT_ROWS_AT_ONCE", 5)
    num_rows = []
    model.lm_head.register_forward_pre_hook(lambda module, args: num_rows.append(len(args[0])))
    _, results = score_examples(model, tokenizer, EXAMPLES)
    assert max(num_rows) == 5 < sum(num_rows)
    for result, other in zip(results, expected, strict=True):
        assert result["loss_sums"] == pytest.approx(other["loss_sums"], abs=1e-4)


@pytest.mark.parametrize("optimized", [False, True])
def test_hidden_states_at_some_positions_are_those_of_the_model(optimized):
    """Guards against a model whose definition scoring does not follow."""
    model = plain_model()
    sharpen(model)
    if optimized:
        kernels.optimize(model)
    idx, pos = torch.randint(300, (2, 9)), torch.randint(32, (2, 9))
    mask = torch.rand(2, 1, 9, 9) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    positions = torch.tensor([0, 3, 17, 9])
    with torch.no_grad():
        for each in (mask, None):
            expected = model.hidden(idx, pos=pos, mask=each).flatten(0, 1)[positions]
            found = scoring.hidden_at(model, idx, pos, each, positions)
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_hugging_face_model_gets_the_same_scores(log_dir, tmp_path):
    torch.manual_seed(0)
    _, tokenizer = load(log_dir)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=2,
                                    initializer_range=0.2)).eval()
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)  # a GPT with the same weights
    score, results = score_examples(hf, tokenizer, EXAMPLES, batch_tokens=500)
    check_against_reference(model, tokenizer, EXAMPLES, score, results)
    assert score == score_examples(model, tokenizer, EXAMPLES)[0]


def test_a_prefix_tree_holds_shared_beginnings_once():
    rows = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 7], [1, 2, 7]]
    tree = scoring.build_prefix_tree(rows, [2, 3, 1, 1])
    assert tree.tokens == [1, 2, 3, 5] and tree.parents == [-1, 0, 1, 2]
    assert tree.depths == [0, 1, 2, 3]
    assert tree.scored.tolist() == [[1, 3, 0], [2, 4, 0], [1, 3, 1], [2, 5, 1], [3, 6, 1],
                                    [1, 7, 2], [1, 7, 3]]


def test_branches_of_a_prefix_tree_do_not_attend_to_each_other():
    tree = scoring.build_prefix_tree([[1, 2, 4], [1, 3, 4]], [1, 1])
    batch = scoring.collate_trees([tree], [2])
    assert batch.idx[0].tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
    assert batch.pos[0, :3].tolist() == [0, 1, 1]
    assert batch.mask()[0, 0, :4, :4].tolist() == [
        [True, False, False, False], [True, True, False, False],
        [True, False, True, False], [False, False, False, True]]


def test_a_batch_has_no_more_tokens_than_allowed_padding_included(real_data, gpt2_tokenizer):
    """Guards against many shapes: with B from the sizes before padding, there are more of them."""
    examples = list(tasks.iterate_examples(real_data / "hellaswag_val_402.jsonl"))
    prepared = scoring.prepare(plain_model(), gpt2_tokenizer, examples, Ranks(CPU),
                               batch_tokens=1024)
    shapes = [batch.idx.shape for _, batch in prepared.batches]
    assert max(B * N for B, N in shapes) <= 1024
    # two batches of the same N have the same B, except for the last one of all
    assert len(set(shapes)) <= len({N for _, N in shapes}) + 1


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_every_example_is_scored_by_exactly_one_rank(log_dir, world_size):
    model, tokenizer = load(log_dir)
    by_rank = [score_examples(model, tokenizer, EXAMPLES, Ranks(CPU, rank, world_size))
               for rank in range(world_size)]
    whole, _ = score_examples(model, tokenizer, EXAMPLES)
    assert tuple(map(sum, zip(*(score for score, _ in by_rank), strict=True))) == whole
    inds = [result["ind"] for _, results in by_rank for result in results]
    assert sorted(inds) == list(range(6))


def test_sampling_and_scoring_on_cuda_leave_cudnn_attention_out(log_dir, monkeypatch):
    """Guards against cuDNN, which makes a plan for every new shape: one for each sampled token."""
    model, tokenizer = load(log_dir)
    allowed, original = [], torch.nn.functional.scaled_dot_product_attention

    def record_backends(*args, **kwargs):
        allowed.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(),
                        cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()))
        return original(*args, **kwargs)

    def sample():
        generate.generate(model, [1, 2, 3], tokenizer.eot, tokenizer.vocab_size, max_new_tokens=4)

    def choices(function):
        allowed.clear()
        function()
        return set(allowed)

    cuda = torch.backends.cuda
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record_backends)
    functions = (sample, lambda: score_examples(model, tokenizer, EXAMPLES))
    for function in functions:  # on a CPU nothing changes
        assert choices(function) == {(True, True, True, True)}
    # as on CUDA: the model computes on the CPU, but its device is said to be another
    original_context = device.attention_of_any_shape
    for module in (generate, scoring):
        monkeypatch.setattr(module, "attention_of_any_shape",
                            lambda device: original_context(torch.device("cuda")))
    for function in functions:
        assert choices(function) == {(False, True, True, True)}
    assert cuda.cudnn_sdp_enabled()  # for training


def test_standard_error_of_all_10042_examples():
    assert scoring.standard_error(2967, 10_042) == pytest.approx(0.00455, abs=1e-5)


# the script


def test_two_processes_give_the_results_of_one(log_dir, examples_file, tmp_path):
    flags = ("--model", log_dir, "--data", examples_file, "--device=cpu", "--limit", 5, "--out")
    one = run_script(ROOT / "hellaswag.py", *flags, tmp_path / "one.jsonl")
    two = run_script("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                     ROOT / "hellaswag.py", *flags, tmp_path / "two.jsonl")
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    assert two.stdout == one.stdout and "/5=" in one.stdout
    a, b = (read_jsonl(tmp_path / name) for name in ("one.jsonl", "two.jsonl"))
    assert [row["ind"] for row in b] == [0, 1, 2, 3, 4]
    for row, other in zip(a, b, strict=True):
        assert row.pop("loss_sums") == pytest.approx(other.pop("loss_sums"), abs=1e-4)
        assert row == other


def test_the_script_prints_accuracies_and_writes_results(
        call_main, log_dir, examples_file, tmp_path):
    code, out, err = call_main(hellaswag, "--model", log_dir, "--data", examples_file,
                               "--device=cpu", "--out", tmp_path / "out.jsonl", "--limit", 5)
    assert code == 0
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["ind"] for row in rows] == [0, 1, 2, 3, 4]
    n = sum(row["pred"] == row["label"] for row in rows)
    n_norm = sum(row["pred_norm"] == row["label"] for row in rows)
    assert out.splitlines()[-1] == f"acc: {n}/5={n / 5:.4f} | acc_norm: {n_norm}/5={n_norm / 5:.4f}"
    se, se_norm = scoring.standard_error(n, 5), scoring.standard_error(n_norm, 5)
    assert f"standard error: acc {se:.4f}, acc_norm {se_norm:.4f}" in out
    assert "acc_norm" in err  # the progress bar


def test_the_dtype_of_the_matmuls_is_float32_unless_the_flag_says_otherwise(
        call_main, log_dir, examples_file, tmp_path):
    """Guards against published accuracies that depend on the machine."""
    loss_sums = {}
    for dtype in ("", "float32", "bfloat16", "float16"):
        flags = ["--dtype", dtype] if dtype else []
        code, out, _ = call_main(hellaswag, "--model", log_dir, "--data", examples_file,
                                 "--device=cpu", "--out", tmp_path / "out.jsonl", *flags)
        assert code == 0 and ("warning: bfloat16" in out) <= (dtype == "bfloat16")
        loss_sums[dtype] = [row["loss_sums"] for row in read_jsonl(tmp_path / "out.jsonl")]
    exact = np.array(loss_sums[""])
    assert (exact == loss_sums["float32"]).all()
    for dtype, tolerance in (("bfloat16", 5e-3), ("float16", 1e-3)):
        assert 0 < abs(exact / loss_sums[dtype] - 1).max() < tolerance


def test_a_hugging_face_folder_is_scored_with_its_own_tokenizer(call_main, tmp_path):
    tokenizer = train_bpe(["滿紙荒唐言，一把辛酸淚！都云作者痴，誰解其中味？"], 270)
    GPT2LMHeadModel(GPT2Config(vocab_size=270, n_positions=64, n_embd=32, n_layer=1,
                               n_head=2)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.model, encoding="utf-8")
    example = {"ctx": "滿紙荒唐言", "endings": ["一把辛酸淚", "作者痴", "味", "紙"], "label": 2}
    write_jsonl(tmp_path / "examples.jsonl", [example])
    flags = ("--model", tmp_path, "--data", tmp_path / "examples.jsonl", "--device=cpu",
             "--out", tmp_path / "out.jsonl")
    code, out, _ = call_main(hellaswag, *flags)
    assert code == 0 and "/1=" in out
    assert read_jsonl(tmp_path / "out.jsonl")[0]["num_tokens"] == [
        len(tokenizer.encode(" " + ending)) for ending in example["endings"]]
    tokenizer = train_bpe(["滿紙荒唐言，一把辛酸淚！"], 280)  # more tokens than the model knows
    (tmp_path / "tokenizer.json").write_text(tokenizer.model, encoding="utf-8")
    code, _, err = call_main(hellaswag, *flags)
    assert code == 2 and "knows 270 tokens, but its tokenizer has 280" in err


def test_control_c_prints_the_score_so_far(call_main, log_dir, examples_file, monkeypatch):
    score_trees, batches = scoring.score_trees, []

    def interrupt_third_batch(*args):
        batches.append(args)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return score_trees(*args)

    monkeypatch.setattr(scoring, "score_trees", interrupt_third_batch)
    code, out, err = call_main(hellaswag, "--model", log_dir, "--data", examples_file,
                               "--device=cpu", "--batch_tokens", 1)
    assert code == 130 and "interrupted" in err
    assert re.match(r"acc: \d/2=", out.splitlines()[-1])


def test_only_the_test_split_may_lack_labels(call_main, log_dir, tmp_path):
    path = tmp_path / "test.jsonl"
    write_jsonl(path, [{key: value for key, value in example.items() if key != "label"}
                       for example in EXAMPLES])
    flags = ("--model", log_dir, "--data", path, "--device=cpu", "--out", tmp_path / "out.jsonl")
    code, _, err = call_main(hellaswag, *flags)
    assert code == 2 and "line 1 lacks label" in err
    code, out, _ = call_main(hellaswag, *flags, "--split", "test")
    assert code == 0 and out == "6 examples scored, none with a label\n"
    assert [row["label"] for row in read_jsonl(tmp_path / "out.jsonl")] == [None] * 6


# comparing two files of results


def write_predictions(path, preds):
    """A file of results with the predictions `preds` for acc; every label is 0."""
    write_jsonl(path, [{"ind": i, "label": 0, "pred": pred, "pred_norm": 0}
                       for i, pred in enumerate(preds)])


def test_compare_prints_agreement_and_p_value(call_main, tmp_path):
    write_predictions(tmp_path / "a", [0] * 8 + [1, 1])
    write_predictions(tmp_path / "b", [1, 0, 0, 0, 0, 0, 0, 1, 0, 2, 0])
    code, out, _ = call_main(hellaswag, "--compare", tmp_path / "a", tmp_path / "b")
    assert code == 0 and out.splitlines() == [
        "10 examples in common, of 10 and 11",
        "acc: 0.8000 and 0.7000 | same prediction: 0.6000 | only the first right: 2, "
        "only the second: 1 | McNemar's exact p = 1",
        "acc_norm: 1.0000 and 1.0000 | same prediction: 1.0000 | only the first right: 0, "
        "only the second: 0 | McNemar's exact p = 1"]
    code, _, err = call_main(hellaswag, "--compare", tmp_path / "a", tmp_path / "b", "--out", "c")
    assert code == 2 and "leave out --out" in err and err.count("\n") == 1


RESULT = '{"ind": 3, "label": 0, "pred": 1, "pred_norm": 0}\n'


@pytest.mark.parametrize("content, message", [
    ('{"ind": 3}\n', "was not written by hellaswag.py --out"), ("", "is empty"),
    ("\n", "was not written"), ("[3]\n", "was not written"), ("\xff", "was not written"),
    (2 * RESULT, "has two results for an example"), (RESULT.replace("3", "99"), "in common"),
    (RESULT.replace('"label": 0', '"label": 2'), "different files or splits")])
def test_only_results_of_the_same_examples_are_compared(call_main, tmp_path, content, message):
    """Guards against a p-value over those examples of another split whose labels happen to fit."""
    write_predictions(tmp_path / "a", [0] * 8)
    (tmp_path / "c").write_text(content, encoding="latin-1")
    for pair in (("a", "c"), ("c", "a")):
        code, out, err = call_main(hellaswag, "--compare", *(tmp_path / name for name in pair))
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("only_a, only_b, p", [
    (0, 0, 1), (5, 5, 1), (0, 10, 2 / 1024), (9, 1, 22 / 1024), (3000, 2800, 0.00894)])
def test_mcnemar_equals_known_p_values(only_a, only_b, p):
    assert scoring.mcnemar(only_a, only_b) == pytest.approx(p, rel=1e-2)


# the style of lm-eval

# (example, context, endings): examples made up in the two forms of the official file (ActivityNet
# and WikiHow), and the texts that lm-eval 0.4.13 makes of them (process_docs of its task hellaswag)
LM_EVAL_EXAMPLES = [
    ({"ind": 1, "activity_label": "Painting a door", "ctx_a": "A woman stands at a door.",
      "ctx_b": "she", "ctx": "A woman stands at a door. she", "label": 2,
      "endings": ["eats it.", "swims away from it.", "paints it blue.", "is a door."]},
     "Painting a door: A woman stands at a door. She",
     ["eats it.", "swims away from it.", "paints it blue.", "is a door."]),
    ({"ind": 2, "activity_label": "Home", "ctx_b": "", "label": 0,
      "ctx_a": "[header] How to bake [title] Heat it. [step] Wait a while.",
      "endings": ["Look. [substeps] Then eat.", "Go out. [title] Come in.", "Café.", "No."]},
     "Home: How to bake. Heat it. Wait a while.",
     ["Look. Then eat.", "Go out.. Come in.", "Café.", "No."]),
]


@pytest.mark.parametrize("example, context, endings", LM_EVAL_EXAMPLES)
def test_texts_equal_those_of_lm_eval(example, context, endings):
    assert tasks.lm_eval_texts(example) == (context, endings)


def test_lm_eval_style_encodes_together_and_divides_by_characters(log_dir):
    model, tokenizer = load(log_dir)
    sharpen(model)
    model.transformer.wpe = torch.nn.Embedding(512, 32)  # so that whole examples fit
    model.config.block_size = 512
    examples = [example for example, _, _ in LM_EVAL_EXAMPLES]
    score, results = score_examples(model, tokenizer, examples, lm_eval_style=True)
    num_correct_norm = 0
    for (example, context, endings), result in zip(LM_EVAL_EXAMPLES, results, strict=True):
        means = []
        for ending, loss_sum, n in zip(
                endings, result["loss_sums"], result["num_tokens"], strict=True):
            whole = tokenizer.encode(f"{context} {ending}")
            start = len(tokenizer.encode(context))
            log_probs = model(torch.tensor([whole]))[0][0, :, :tokenizer.vocab_size].log_softmax(-1)
            picked = log_probs[range(start - 1, len(whole) - 1), whole[start:]]
            assert loss_sum == pytest.approx(-picked.sum().item(), abs=1e-3)
            assert n == len(whole) - start
            means.append(loss_sum / len(ending))
        assert result["pred_norm"] == np.argmin(means)
        num_correct_norm += int(np.argmin(means)) == example["label"]
    assert score.num_correct_norm == num_correct_norm


def test_lm_eval_style_needs_its_fields(call_main, log_dir, examples_file):
    code, _, err = call_main(hellaswag, "--model", log_dir, "--data", examples_file,
                             "--lm_eval_style")
    assert code == 2 and "line 1 lacks activity_label" in err


# examples from files


def test_real_examples_score_as_the_reference(log_dir, real_data):
    examples = list(tasks.iterate_examples(real_data / "hellaswag_val_402.jsonl"))
    assert len(examples) == 402 and examples[0]["ind"] == 24
    model, tokenizer = load(log_dir)
    sharpen(model)
    score, results = score_examples(model, tokenizer, examples[::20])
    check_against_reference(model, tokenizer, examples[::20], score, results)


@pytest.mark.parametrize("line, message", [
    ("nonsense", "line 7 is not JSON"), ('{"ctx": "a", "label": 0}', "line 7 lacks endings"),
    ('{"ctx": "a", "endings": ["a", "b", "c", "d"]}', "line 7 lacks label"),
    ('{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}', "line 7 .* label from 0 to 3"),
    ('{"ctx": "a", "label": "x", "endings": ["a", "b", "c", "d"]}', "line 7 .* label from 0 to 3"),
    ('{"ctx": "a", "label": 0, "endings": ["a"]}', "line 7 .* four endings"),
    ('{"ctx": "a", "label": 0, "endings": 3}', "line 7 .* four endings"),
    ('{"ctx": 1, "label": 0, "endings": ["a", "b", "c", "d"]}', "line 7 .* not text"),
    ('{"ctx": "a", "label": 0, "endings": ["a", "b", "c", 4]}', "line 7 .* not text"),
    ("[1]", "line 7 is not a JSON object"), ("5", "line 7 is not a JSON object"),
    ("\udcff", "line 7 is not JSON in UTF-8"), ("[" * 100_000, "line 7 is not JSON"),
    (json.dumps(EXAMPLES[0] | {"ctx": "\ud800"}), "line 7 has a lone surrogate")])
def test_a_bad_line_is_reported_with_its_number(examples_file, line, message):
    with open(examples_file, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        list(tasks.iterate_examples(examples_file))


def test_blank_lines_and_a_byte_order_mark_are_not_examples(tmp_path):
    lines = "\n\r\n".join(json.dumps(example) for example in EXAMPLES)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\n\n \n")
    assert list(tasks.iterate_examples(tmp_path / "a.jsonl")) == EXAMPLES


# HellaSwag during training


def test_hellaswag_during_training_leaves_the_training_unchanged(
        data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tasks.DATA_FILE.parent.mkdir()
    write_jsonl(tasks.DATA_FILE, EXAMPLES)
    renderings, render = [], scoring.render_examples
    monkeypatch.setattr(scoring, "render_examples",
                        lambda *args: renderings.append(args) or render(*args))
    train(tiny_config(data_dir, tmp_path / "a"))
    train(tiny_config(data_dir, tmp_path / "b", hellaswag_every=1))
    for stream in ("train", "norm"):
        assert read_log(tmp_path / "a", stream) == read_log(tmp_path / "b", stream)
    assert len(renderings) == 1  # for seven evaluations
    score, _ = score_examples(*load(tmp_path / "b"), EXAMPLES)
    accuracy = read_log(tmp_path / "b", "hella")[6]
    assert accuracy == pytest.approx(score.num_correct_norm / 6, rel=1e-5)
    lines = [line for line in capsys.readouterr().out.splitlines() if "HellaSwag" in line]
    assert len(lines) == 7
    assert re.fullmatch(r"HellaSwag accuracy: \d/6=0\.\d{4} \| standard error 0\.\d{4} "
                        r"\| \d+\.\ds", lines[-1])


# the download


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """
    A mirror of the val split that fails twice and then serves a small file; yields its settings.
    Requests for a path in "redirects" are sent to another path.
    """
    settings = {"failures": 2, "failure": 503, "content": b'{"some": "examples"}\n', "requests": 0,
                "redirects": {}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            settings["requests"] += 1
            ok = settings["requests"] > settings["failures"]
            target = settings["redirects"].get(self.path)
            self.send_response(302 if target else 200 if ok else settings["failure"])
            if target:
                self.send_header("Location", target)
            self.send_header("Content-Length", str(len(settings["content"])))
            self.end_headers()
            self.wfile.write(settings["content"])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HELLASWAG_URL", f"http://127.0.0.1:{server.server_port}/val.jsonl")
    content = settings["content"]
    monkeypatch.setitem(tasks.OFFICIAL_FILES, "val",
                        (len(content), hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    yield settings
    server.shutdown()


def download():
    """Download the val split in one process."""
    return downloads.download(tasks.official_file("val"))


def download_together():
    """Download the val split as one of several processes."""
    return downloads.download_on_each_node(tasks.official_file("val"), Ranks(CPU))


def test_download_retries_and_does_not_repeat_itself(mirror):
    download()
    download()
    assert tasks.DATA_FILE.read_bytes() == mirror["content"] and mirror["requests"] == 3


def test_download_follows_redirects(mirror):
    mirror.update(failures=0, redirects={"/val.jsonl": "/elsewhere"})
    assert download().read_bytes() == mirror["content"] and mirror["requests"] == 2


@pytest.mark.parametrize("changes, url, requests", [
    ({"failure": 404}, None, 1), ({"failure": 403}, None, 1), ({"failure": 429}, None, 3),
    ({"redirects": {"/val.jsonl": "/val.jsonl"}}, None, 31), ({}, "no address", 0)])
def test_download_is_not_repeated_where_that_is_in_vain(
        mirror, monkeypatch, changes, url, requests):
    mirror.update(changes)
    if url:
        monkeypatch.setenv("HELLASWAG_URL", url)
    if requests == 3:  # a server that is too busy for a moment
        download()
    else:
        with pytest.raises(OSError, match="set HELLASWAG_URL to a mirror"):
            download()
    assert mirror["requests"] == requests


def test_an_empty_HELLASWAG_URL_counts_as_unset(mirror, monkeypatch):
    monkeypatch.setattr(tasks, "DATA_URL", os.environ["HELLASWAG_URL"])
    monkeypatch.setenv("HELLASWAG_URL", "")
    assert download().read_bytes() == mirror["content"]


def test_only_the_first_process_of_a_node_downloads(mirror, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(OSError, match="another process could not download"):
        download_together()
    assert mirror["requests"] == 0
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert download_together() == tasks.DATA_FILE
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert download_together() == tasks.DATA_FILE
    assert mirror["requests"] == 3


def test_a_mirror_that_fails_or_serves_another_file_is_an_error(mirror, monkeypatch, call_main):
    mirror["failures"] = 99
    code, _, err = call_main(hellaswag)
    assert code == 2 and err.count("\n") == 1 and "HELLASWAG_URL" in err
    mirror["failures"] = 0
    monkeypatch.setitem(tasks.OFFICIAL_FILES, "val", (1000, "0" * 64))
    with pytest.raises(OSError, match="received only 21 of 1000 bytes"):
        download()
    monkeypatch.setitem(tasks.OFFICIAL_FILES, "val", (10, "0" * 64))
    with pytest.raises(OSError, match="not the official"):
        download()
    assert not tasks.DATA_FILE.exists()
