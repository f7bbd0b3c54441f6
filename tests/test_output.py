"""
What scripts print, and the files that --out names: a stdout that goes away, encodings that lack
characters, streams that are closed, and outputs that cannot be written or would destroy something.
"""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, tiny_flags

import hellaswag
import sample
from gpt2lab.cli import UserError
from gpt2lab.files import check_output, write_output

posix_only = pytest.mark.skipif(os.name != "posix", reason="uses pipes and a shell")
FULL = "/dev/full"  # every write to it fails as on a full disk
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason=f"{FULL} is Linux's")


def run_shell(command, cwd, **env):
    """Run a command of the shell in which $PYTHON is this Python; returns the CompletedProcess."""
    variables = {"PYTHON": sys.executable, "ROOT": str(ROOT), "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, timeout=600,
                          env={**os.environ, **variables, **env}, check=False)


@pytest.fixture
def script(tmp_path):
    """A function that writes script.py, whose main has the given body and is run by run_main."""
    def write(body, options=""):
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "script.py").write_text(
            "import os, sys, warnings\nfrom gpt2lab.cli import UserError, run_main\n\n\n"
            f"def main():\n{lines}\n\nrun_main(main{options})\n", encoding="utf-8")
        return tmp_path
    return write


GOES_ON = ", output_may_be_lost=True"
# prints more than any pipe or buffer holds, and leaves a file if it comes to its end
MANY_LINES = """\
for i in range(30_000):
    print("line", i, flush=True)
open("finished", "w").close()"""


# a stdout or stderr that goes away


@posix_only
@pytest.mark.parametrize("lost", [
    pytest.param(f"> {FULL}", marks=needs_full), "| head -n 1 > /dev/null", ">&-"])
def test_work_goes_on_without_stdout_after_one_warning(script, lost):
    """Guards against a training run that a full disk, `| head` or a killed tee ends."""
    folder = script(MANY_LINES, GOES_ON)
    done = run_shell(f"$PYTHON script.py {lost}; exit ${{PIPESTATUS[0]}}", folder)
    assert done.returncode == 0 and (folder / "finished").exists()
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"script.py: warning: what is printed from here on is lost")


@posix_only
def test_a_script_whose_reader_has_gone_ends_quietly(script):
    folder = script(MANY_LINES)
    done = run_shell("$PYTHON script.py | head -n 1; exit ${PIPESTATUS[0]}", folder)
    assert done.stdout == b"line 0\n" and done.stderr == b""
    assert done.returncode == 141  # as a shell reports for other programs
    assert not (folder / "finished").exists()


@posix_only
@pytest.mark.parametrize("body", ["print('a result')", "import argparse\nargparse.ArgumentParser("
                                  "description='x').parse_args(['--help'])"])
@pytest.mark.parametrize("lost", [pytest.param(f"> {FULL}", marks=needs_full), ">&-"])
def test_a_result_that_cannot_be_printed_is_an_error(script, body, lost):
    done = run_shell(f"$PYTHON script.py {lost}", script(body))
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"error: the output cannot be written" in done.stderr and b"make room" in done.stderr


@posix_only
@pytest.mark.parametrize("lost", [
    pytest.param(f"2> {FULL}", marks=needs_full), "2>&-", "2>&1 >out.txt | head -c 0"])
def test_the_loss_of_stderr_changes_nothing(script, lost):
    """Guards against a progress bar that ends a script because nobody can see it."""
    folder = script("from tqdm import tqdm\nfor i in tqdm(range(3000), mininterval=0, miniters=1):"
                    "\n    pass\nwarnings.warn('x')\nopen('finished', 'w').close()")
    done = run_shell(f"$PYTHON script.py {lost}; exit ${{PIPESTATUS[0]}}", folder)
    assert done.returncode == 0 and (folder / "finished").exists()


@posix_only
@pytest.mark.parametrize("options", ["", GOES_ON])
def test_a_terminal_that_was_closed_is_a_lost_stdout(script, options):
    """Guards against EIO, which a run that ignores SIGHUP gets from a terminal that is gone."""
    import pty
    folder = script(f"sys.stdin.read()\n{MANY_LINES}", options)
    terminal, child = pty.openpty()
    process = subprocess.Popen([sys.executable, "script.py"], cwd=folder, stdin=subprocess.PIPE,
                               stdout=child, stderr=child, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    os.close(child)
    os.close(terminal)
    process.communicate(timeout=600)  # closes stdin, so that the script goes on
    assert process.returncode == (0 if options else 2)
    assert (folder / "finished").exists() == bool(options)


@posix_only
def test_a_closed_stdin_is_an_empty_one(script):
    done = run_shell("$PYTHON script.py <&-", script("print([sys.stdin.read()])"))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"['']\n", b"")


@posix_only
@pytest.mark.parametrize("number", [1, 2])
def test_no_file_gets_the_number_of_a_closed_stream(script, number):
    """Guards against a message of a library in C that ends up in a checkpoint."""
    folder = script(f"with open('data', 'wb') as file:\n    os.write({number}, b'a message')")
    run_shell(f"$PYTHON script.py {number}>&-", folder)
    assert (folder / "data").read_bytes() == b""


@posix_only
def test_a_pipe_that_its_reader_made_non_blocking_loses_nothing(script):
    folder = script(MANY_LINES)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen([sys.executable, "script.py"], cwd=folder, stdout=writer,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    os.close(writer)
    with open(reader, "rb") as file:
        lines = file.read().splitlines()
    assert process.wait(timeout=600) == 0 and len(lines) == 30_000


@needs_full
def test_other_errors_keep_their_line_when_stdout_is_lost(script):
    folder = script("print('x', flush=True)\nraise UserError('do this')", GOES_ON)
    done = run_shell(f"$PYTHON script.py > {FULL}", folder)
    assert done.returncode == 2 and done.stderr.endswith(b"script.py: error: do this\n")


def test_an_error_of_the_system_says_what_to_do(script):
    folder = script("open('no/such/file')")
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no/such/file (No such file or directory): check the path" in done.stderr


# encodings


TEXT = "é ’ 红 🙂 \udce9 \ud800"  # the last two are lone surrogates, as in a name that is not UTF-8


@posix_only
@pytest.mark.parametrize("env, expected", [
    ({"PYTHONIOENCODING": "ascii"}, rb"\xe9 \u2019 \u7ea2 \U0001f642 \udce9 \ud800"),
    ({"PYTHONIOENCODING": "cp1252:strict"}, b"\xe9 \x92 \\u7ea2 \\U0001f642 \\udce9 \\ud800"),
    ({"PYTHONIOENCODING": "utf-8"}, "é ’ 红 🙂".encode() + rb" \udce9 \ud800"),
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
     "é ’ 红 🙂".encode() + rb" \udce9 \ud800")])
@pytest.mark.parametrize("flags", ["", "-u"])
def test_any_text_is_printed_to_any_stdout_and_stderr(script, env, expected, flags):
    folder = script(f"print({TEXT!a})\nprint({TEXT!a}, file=sys.stderr)")
    done = run_shell(f"$PYTHON {flags} script.py", folder, **env)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + b"\n", expected + b"\n")


@pytest.fixture
def in_the_c_locale():
    """Environment variables with which Python takes the system for one that knows only ASCII."""
    return {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
            "PYTHONIOENCODING": "ascii"}


# the real scripts


@needs_full
def test_training_and_its_resume_survive_ascii_and_a_full_disk(data_dir, tmp_path, in_the_c_locale):
    flags = " ".join(tiny_flags(data_dir=data_dir, log_dir="log", sample_prompt="x", max_steps=3))
    train = f"$PYTHON $ROOT/train_gpt2.py {flags} --sample_every 1"
    done = run_shell(train, tmp_path, **in_the_c_locale)
    assert done.returncode == 0, done.stderr
    assert rb"\ufffd" in done.stdout  # a random model does not write UTF-8
    done = run_shell(f"{train} --resume --max_steps 6 --resume_anyway > {FULL}", tmp_path,
                     **in_the_c_locale)
    assert done.returncode == 0 and done.stderr.count(b"\n") == 1
    assert (tmp_path / "log" / "model_00006.pt").exists()


@posix_only
def test_sampling_into_head_ends_quietly(log_dir, tmp_path):
    flags = f"--model {log_dir} --device cpu --max_new_tokens 100000 --ignore_eot"
    done = run_shell(f"$PYTHON $ROOT/sample.py {flags} | head -c 40; exit ${{PIPESTATUS[0]}}",
                     tmp_path)
    assert (done.returncode, len(done.stdout), done.stderr) == (141, 40, b"")


@needs_full
def test_hellaswag_without_a_stdout_writes_its_file_and_claims_no_success(
        log_dir, tmp_path, hellaswag_examples):
    flags = f"--model {log_dir} --device cpu --out r.jsonl"
    done = run_shell(f"$PYTHON $ROOT/hellaswag.py {flags} > {FULL} 2> err.txt", tmp_path)
    assert done.returncode == 2
    assert "the output cannot be written" in (tmp_path / "err.txt").read_text()
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 11


@posix_only
def test_data_are_prepared_though_nobody_reads_the_lines(text_file, tmp_path):
    done = run_shell(f"$PYTHON $ROOT/fineweb.py --source {text_file} --tokenizer bpe:300 --out d "
                     "2>&1 | head -c 0; exit ${PIPESTATUS[0]}", tmp_path)
    assert done.returncode == 0 and (tmp_path / "d" / "meta.json").exists()


# --out


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
        call_main, log_dir, tmp_path, hellaswag_examples):
    (tmp_path / "folder").mkdir()
    for out, message in (("nowhere/r.jsonl", "make its folder"), ("folder", "is a folder"),
                         (log_dir / "log.txt" / "r", "make its folder")):
        for module, flags in ((hellaswag, ()), (sample, ("--num_samples", 1))):
            code, printed, err = call_main(
                module, "--model", log_dir, "--device", "cpu", "--out", out, *flags)
            assert code == 2 and printed == "" and message in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "hellaswag"]


@pytest.mark.parametrize("module, flags", [
    (hellaswag, ("--out", "")), (hellaswag, ("--data", "")), (hellaswag, ("--model", "")),
    (sample, ("--out", "")), (sample, ("--model", "")), (sample, ("--prompt_file", ""))])
def test_an_empty_argument_is_not_taken_for_a_missing_one(
        call_main, log_dir, monkeypatch, hellaswag_examples, module, flags):
    """Guards against `--out "$FILE"` with an unset variable, whose results nobody would find."""
    code, out, err = call_main(module, "--model", log_dir, "--device", "cpu", *flags)
    assert (code, out) == (2, "") and err.count("\n") == 1


@posix_only
def test_samples_are_written_to_a_file_though_nobody_reads_on(log_dir, tmp_path):
    flags = f"--model {log_dir} --device cpu --num_samples 2 --out s.jsonl"
    done = run_shell(f"$PYTHON $ROOT/sample.py {flags} | head -c 0; exit ${{PIPESTATUS[0]}}",
                     tmp_path)
    assert done.returncode == 0 and b"warning: what is printed" in done.stderr
    assert len((tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_an_output_never_replaces_what_the_run_reads(
        call_main, log_dir, tmp_path, hellaswag_examples):
    (tmp_path / "prompt.txt").write_text("A man")
    data = tmp_path / "hellaswag" / "hellaswag_val.jsonl"
    (tmp_path / "link").symlink_to(data)
    checkpoint = log_dir / "model_00006.pt"
    for module, flags, out in (
            (sample, ("--prompt_file", "prompt.txt"), "prompt.txt"), (sample, (), checkpoint),
            (hellaswag, ("--data", data), data), (hellaswag, ("--data", data), "link"),
            (hellaswag, (), checkpoint)):
        before = Path(out).read_bytes()
        code, _, err = call_main(
            module, "--model", log_dir, "--device", "cpu", "--out", out, *flags)
        assert code == 2 and "in use by this run" in err and err.count("\n") == 1
        assert Path(out).read_bytes() == before


def test_results_are_printed_though_their_file_cannot_be_written(
        call_main, log_dir, monkeypatch, hellaswag_examples):
    def fail(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(hellaswag, "write_output", fail)
    code, out, err = call_main(hellaswag, "--model", log_dir, "--device", "cpu", "--out", "r.jsonl")
    assert code == 2 and "acc_norm: " in out and "No space left" in err.splitlines()[-1]


def test_an_existing_output_is_replaced_and_a_link_to_it_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "r.jsonl").write_text("old")
    (tmp_path / "r.jsonl").symlink_to(tmp_path / "disk" / "r.jsonl")
    write_output(check_output(tmp_path / "r.jsonl"), b"new")
    assert (tmp_path / "r.jsonl").is_symlink()
    assert (tmp_path / "disk" / "r.jsonl").read_bytes() == b"new"


@posix_only
def test_an_output_can_be_a_pipe_or_a_device_which_stays_one(tmp_path):
    """Guards against a rename onto /dev/null, after which the device would be a file."""
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_output(check_output(tmp_path / "pipe"), b"data")
    reader.join(timeout=600)
    assert received == [b"data"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert check_output("/dev/null") == Path("/dev/null")


@posix_only
def test_an_output_is_not_the_file_that_stdout_goes_to(script):
    folder = script("from gpt2lab.files import check_output\ncheck_output('out.txt')")
    done = run_shell("$PYTHON script.py > out.txt", folder)
    assert done.returncode == 2 and b"in use by this run" in done.stderr


def test_a_write_protected_output_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    path.write_text("mine")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(UserError, match="write-protected"):
        check_output(path)


def test_an_output_that_is_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="leads to itself"):
        check_output(tmp_path / "a")
