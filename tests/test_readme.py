"""README.md and README.zh-CN.md say the same, and what they name is there."""

import importlib
import re
import shlex
from collections import Counter
from itertools import zip_longest
from typing import NamedTuple

import bench
import pytest
from conftest import ROOT

README, CHINESE = "README.md", "README.zh-CN.md"
CODE_SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# digits with what makes a number of them; units only where a translation keeps them
FIGURE = re.compile(r"\.?\d+(?:[.,^]\d+)*(?:e-?\d+)?(?: ?(?:%|ms|[MG]B|[MB])(?![A-Za-z]))?")


class Section(NamedTuple):
    """A heading and what stands below it, up to the next heading of any level."""

    level: int
    title: str
    code: list  # texts of fenced blocks
    text: list  # all other lines, tables included, the heading's first


def read_sections(name):
    """The Sections of a file, in order."""
    sections, fence = [], None
    for line in (ROOT / name).read_text(encoding="utf-8").split("\n"):
        if line.startswith("```"):
            if fence is not None:
                sections[-1].code.append("\n".join(fence))
            fence = [line] if fence is None else None
        elif fence is not None:
            fence.append(line)
        elif heading := re.fullmatch(r"(#+) (.+)", line):
            sections.append(Section(len(heading[1]), heading[2], [], [heading[2]]))
        else:
            sections[-1].text.append(line)
    assert fence is None, f"{name} ends inside a code block"
    return sections


def tables(lines):
    """The tables among some lines, each a list of rows, each a list of cells."""
    found = []
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|[-:|]+\|", line):
            end = lines.index("", i)  # a table goes on to the next empty line
            rows = [lines[i - 1], *lines[i + 1:end]]
            found.append([row.removeprefix("|").removesuffix("|").split("|") for row in rows])
    return found


def code_spans(text):
    """Contents of the code spans in a text; a line break in one is a space."""
    return [" ".join(span.split()) for span in CODE_SPAN.findall(text)]


def figures(text):
    """The numbers in a text, outside of code spans and addresses."""
    return FIGURE.findall(LINK.sub("]", CODE_SPAN.sub("`", text)))


def slugs(sections):
    """{anchor: number of the section} as GitHub makes them of headings."""
    found = {}
    for number, section in enumerate(sections):
        base = re.sub(r"[^\w\- ]", "", section.title.lower()).replace(" ", "-")
        names = (base if n == 0 else f"{base}-{n}" for n in range(len(sections)))
        found[next(name for name in names if name not in found)] = number
    return found


def links(sections):
    """Targets of all links and images."""
    return [target for section in sections for target in
            LINK.findall(CODE_SPAN.sub("`", "\n".join(section.text)))]


def difference(ours, theirs):
    """What is in one multiset and not in the other, as a message."""
    ours, theirs = Counter(ours), Counter(theirs)
    return f"only in {README}: {list((ours - theirs).elements())}, " \
           f"only in {CHINESE}: {list((theirs - ours).elements())}"


@pytest.fixture(scope="module")
def pairs():
    """The sections of both files side by side; None where one has fewer."""
    return list(zip_longest(read_sections(README), read_sections(CHINESE)))


# -----------------------------------------------------------------------------
# the translation


def test_both_have_the_same_headings(pairs):
    """Guards against a section that was added, dropped or moved in one language only."""
    for ours, theirs in pairs:
        assert ours and theirs, f"without a counterpart: {(ours or theirs).title}"
        assert ours.level == theirs.level, f"{ours.title} / {theirs.title}: another level"


def test_both_have_the_same_code_blocks(pairs):
    """Guards against a command that was changed in one language only."""
    for ours, theirs in pairs:
        assert ours.code == theirs.code, f"{ours.title} / {theirs.title}"


def test_both_have_the_same_code_spans_and_figures(pairs):
    """Guards against a flag, a file name or a measurement that only one language tells."""
    for ours, theirs in pairs:
        for find in (code_spans, figures):
            a, b = (find("\n".join(section.text)) for section in (ours, theirs))
            assert Counter(a) == Counter(b), f"{ours.title}: {difference(a, b)}"


def test_both_have_the_same_tables(pairs):
    """Guards against a row or column in one language only, and a figure in the wrong cell."""
    for ours, theirs in pairs:
        mine, others = tables(ours.text), tables(theirs.text)
        shapes, other_shapes = ([[len(row) for row in table] for table in found]
                                for found in (mine, others))
        assert shapes == other_shapes, f"{ours.title}: cells of each row differ"
        cells, other_cells = ([cell for table in found for row in table for cell in row]
                              for found in (mine, others))
        for a, b in zip(cells, other_cells, strict=True):
            for find in (code_spans, figures):
                assert Counter(find(a)) == Counter(find(b)), f"{ours.title}: {a} / {b}"


def test_both_have_the_same_links(pairs):
    """Guards against a link that is lost or altered, or that leads to another section."""
    ours, theirs = ([s for s in side if s] for side in zip(*pairs, strict=True))
    found = []
    for sections, language in ((ours, CHINESE), (theirs, README)):
        anchors, targets = slugs(sections), links(sections)
        assert targets.count(language) == 1, f"one link to {language}"
        targets.remove(language)
        found.append([("section", anchors.get(t[1:])) if t.startswith("#") else t
                      for t in targets])
    assert Counter(found[0]) == Counter(found[1]), difference(*found)


def test_chinese_lines_break_where_no_space_shows():
    """Guards against a line break between two Chinese characters, which is shown as a space."""
    for section in read_sections(CHINESE):
        broken = re.search("[\u4e00-\u9fff]\n *[\u4e00-\u9fff]", "\n".join(section.text))
        assert not broken, f"{section.title}: {broken and broken[0]!r}"


# -----------------------------------------------------------------------------
# what is named is there


@pytest.mark.parametrize("name", [README, CHINESE])
def test_links_lead_somewhere(name):
    """Guards against a renamed file, picture or heading that is still linked to."""
    sections = read_sections(name)
    anchors = slugs(sections)
    broken = [t for t in links(sections) if "://" not in t and not (
        t[1:] in anchors if t.startswith("#") else (ROOT / t).exists())]
    assert not broken, f"{name} links to what is not there: {broken}"


def shown_commands():
    """[(line, script, its arguments)] for each python X.py and torchrun X.py in README.md."""
    found = []
    for section in read_sections(README):
        shown = [line for block in section.code for line in block.split("\n")]
        for line in shown + code_spans("\n".join(section.text)):
            for command in line.split("&&"):
                if not re.match(r"(python|torchrun) ", command := command.strip()):
                    continue
                words = shlex.split(command, comments=True)
                script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
                if script is not None and "-m" not in words[:script]:
                    found.append((command, words[script], words[script + 1:]))
    return found


OPTIONS = {}  # of each script that was asked


def options(script, call):
    """The --flags that a script's --help lists."""
    if script not in OPTIONS:
        code, out, _ = call(importlib.import_module(script.removesuffix(".py")), "--help")
        assert code == 0, f"{script} --help"
        lists = re.findall(r"^  (-.*?)(?:  |$)", out, re.MULTILINE)
        OPTIONS[script] = {flag for line in lists for flag in re.findall(r"--\w+", line)}
        if script == "train_gpt2.py":  # its switches have opposites that --help does not list
            OPTIONS[script] |= {line.replace("--", "--no_") for line in lists if " " not in line}
    return OPTIONS[script]


def flags_of(words):
    """The --flags among the words of a command line, without their values."""
    return {word.split("=")[0] for word in words if word.startswith("--")}


def test_commands_have_their_scripts_and_flags(call):
    """Guards against a command whose script or flag was renamed or never existed."""
    commands = shown_commands()
    assert len(commands) > 30, "the commands of README.md are not found any more"
    for line, script, words in commands:
        assert (ROOT / script).is_file(), f"no {script}: {line}"
        unknown = flags_of(words) - options(script, call)
        assert not unknown, f"{script} has no {unknown}: {line}"


def test_flags_in_prose_are_some_script_s(call):
    """Guards against a flag that is told of after it was renamed."""
    scripts = {script for _, script, _ in shown_commands()}
    spans = [span for section in read_sections(README)
             for span in code_spans("\n".join(section.text)) if span.startswith("--")]
    assert len(spans) > 30, "the flags of README.md are not found any more"
    for span in spans:
        flags = flags_of(span.split()) - {"--max_restarts"}  # torchrun's
        assert any(flags <= options(script, call) for script in scripts), f"no script has {span}"


def test_benchmarks_exist():
    """Guards against a figure whose benchmark was renamed or dropped."""
    named = {words[0] for _, script, words in shown_commands() if script == "bench.py" and words}
    assert named
    assert named <= set(bench.BENCHES), named


def test_files_table_is_whole():
    """Guards against a module that the table of files leaves out, or that is gone."""
    table, = tables(next(s for s in read_sections(README) if s.title == "Files").text)
    named = {span for row in table for span in code_spans(row[0])}
    for name in named:
        assert (ROOT / name).exists(), f"no {name}"
    assert {path.name for path in ROOT.glob("*.py")} == {n for n in named if n.endswith(".py")}
