"""README and docs/ say the same in both languages, and everything that they name exists."""

import functools
import importlib
import posixpath
import re
import shlex
from collections import Counter
from dataclasses import fields
from itertools import zip_longest
from typing import NamedTuple

import pytest
from conftest import ROOT

import train_gpt2
from dev import bench

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
MOST_WORDS = 1_800  # in README.md, as wc -w counts them
CODE_SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMENT = re.compile(r" +# .*$", re.MULTILINE)  # in a code block: may be translated
# digits with what makes a number of them; units only where a translation keeps them
FIGURE = re.compile(r"\.?\d+(?:[.,^]\d+)*(?:e-?\d+)?(?: ?(?:%|ms|[MG]B|[MB])(?![A-Za-z]))?")
TORCHRUN_FLAGS = {"--max_restarts", "--nnodes", "--node_rank", "--nproc_per_node"}
PLACEHOLDERS = {"--NAME", "--no_NAME"}


# -----------------------------------------------------------------------------
# reading a page


class Section(NamedTuple):
    """A heading and what stands below it, up to the next heading of any level."""

    level: int
    title: str
    code: list  # texts of the fenced blocks
    lines: list  # all other lines, the heading and the tables included

    @property
    def text(self):
        return "\n".join(self.lines)


def translation(page):
    """Path of the Chinese page that belongs to an English one."""
    return "README.zh-CN.md" if page == "README.md" else page.replace("docs/", "docs/zh-CN/")


ENGLISH = {translation(page): page for page in PAGES}  # of each Chinese page
ALL_PAGES = [*PAGES, *ENGLISH]


@functools.cache
def read_sections(page):
    """The Sections of a page, in order."""
    sections, fence = [], None
    for line in (ROOT / page).read_text(encoding="utf-8").split("\n"):
        if line.startswith("```"):
            if fence is not None:
                sections[-1].code.append("\n".join(fence))
            fence = [line] if fence is None else None
        elif fence is not None:
            fence.append(line)
        elif heading := re.fullmatch(r"(#+) (.+)", line):
            sections.append(Section(len(heading[1]), heading[2], [], [heading[2]]))
        else:
            sections[-1].lines.append(line)
    assert fence is None, f"{page} ends inside a code block"
    return sections


def find_section(page, title):
    """The one Section of a page with this title."""
    section, = (section for section in read_sections(page) if section.title == title)
    return section


def section_pairs(page):
    """The Sections of a page and of its translation, side by side; both have as many."""
    return zip(read_sections(page), read_sections(translation(page)), strict=True)


def tables(section):
    """The tables of a Section, each a list of rows, each a list of cells."""
    found, lines = [], section.lines
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|[-:|]+\|", line):
            end = lines.index("", i)  # a table ends at the next empty line
            rows = [lines[i - 1], *lines[i + 1:end]]
            found.append([row.removeprefix("|").removesuffix("|").split("|") for row in rows])
    return found


def code_spans(text):
    """Contents of the code spans in a text; a line break in one is a space."""
    return [" ".join(span.split()) for span in CODE_SPAN.findall(text)]


def figures(text):
    """The numbers in a text, outside of code spans and addresses."""
    return FIGURE.findall(LINK.sub("]", CODE_SPAN.sub("`", text)))


def anchors(page):
    """{anchor: number of the section} as GitHub makes them of the headings of a page."""
    found = {}
    for number, section in enumerate(read_sections(page)):
        base = re.sub(r"[^\w\- ]", "", section.title.lower()).replace(" ", "-")
        names = [base, *(f"{base}-{n}" for n in range(1, number + 1))]  # a title may come again
        found[next(name for name in names if name not in found)] = number
    return found


class Link(NamedTuple):
    """Where a link leads: a path from the root or an address, and an anchor or ""."""

    path: str
    anchor: str


def links(page):
    """The Links and images of a page."""
    text = "\n".join(section.text for section in read_sections(page))
    found = []
    for target in LINK.findall(CODE_SPAN.sub("`", text)):
        if "://" in target:
            found.append(Link(target, ""))
            continue
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        found.append(Link(path, anchor))
    return found


def difference(english, chinese):
    """What is in one multiset and not in the other, as a message."""
    english, chinese = Counter(english), Counter(chinese)
    return (f"only in English: {list((english - chinese).elements())}, "
            f"only in Chinese: {list((chinese - english).elements())}")


# -----------------------------------------------------------------------------
# the translation


def test_every_page_has_a_translation():
    """Guards against a page that exists in one language only."""
    chinese = {f"docs/zh-CN/{path.name}" for path in (ROOT / "docs" / "zh-CN").glob("*.md")}
    assert chinese | {"README.zh-CN.md"} == set(ENGLISH)


@pytest.mark.parametrize("page", PAGES)
def test_headings_are_the_same(page):
    """Guards against a section that was added, dropped or moved in one language only."""
    for ours, theirs in zip_longest(read_sections(page), read_sections(translation(page))):
        assert ours and theirs, f"without a counterpart: {(ours or theirs).title}"
        assert ours.level == theirs.level, f"{ours.title} / {theirs.title}: another level"


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_are_the_same(page):
    """Guards against a command that was changed in one language only."""
    for ours, theirs in section_pairs(page):
        for a, b in zip_longest(ours.code, theirs.code, fillvalue=""):
            assert COMMENT.sub("  #", a) == COMMENT.sub("  #", b), f"{ours.title} / {theirs.title}"
            comments = [figures("\n".join(COMMENT.findall(code))) for code in (a, b)]
            assert comments[0] == comments[1], f"{ours.title}: figures in comments differ"


@pytest.mark.parametrize("page", PAGES)
def test_code_spans_and_figures_are_the_same(page):
    """Guards against a flag, a file name or a measurement that only one language mentions."""
    for ours, theirs in section_pairs(page):
        for find in (code_spans, figures):
            a, b = find(ours.text), find(theirs.text)
            assert Counter(a) == Counter(b), f"{ours.title}: {difference(a, b)}"


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_the_same(page):
    """Guards against a row or column in one language only, and a figure in the wrong cell."""
    for ours, theirs in section_pairs(page):
        shapes = [[[len(row) for row in table] for table in tables(section)]
                  for section in (ours, theirs)]
        assert shapes[0] == shapes[1], f"{ours.title}: the numbers of rows or cells differ"
        cells = [[cell for table in tables(section) for row in table for cell in row]
                 for section in (ours, theirs)]
        for a, b in zip(*cells, strict=True):
            for find in (code_spans, figures):
                assert Counter(find(a)) == Counter(find(b)), f"{ours.title}: {a} / {b}"


@pytest.mark.parametrize("page", PAGES)
def test_links_are_the_same(page):
    """Guards against a link that one language lacks, or that leaves its language."""
    def comparable(link, chinese):
        """The Link in a form that is equal for both languages."""
        if link.path not in ALL_PAGES:
            return link
        assert (link.path in ENGLISH) == chinese, f"a link to the other language: {link}"
        number = anchors(link.path)[link.anchor] if link.anchor else ""
        return Link(ENGLISH.get(link.path, link.path), number)

    found = []
    for name, other in ((page, translation(page)), (translation(page), page)):
        targets = links(name)
        assert targets.count(Link(other, "")) == 1, f"{name} has one link to {other}"
        targets.remove(Link(other, ""))
        found.append([comparable(link, name in ENGLISH) for link in targets])
    assert Counter(found[0]) == Counter(found[1]), difference(*found)


@pytest.mark.parametrize("page", ENGLISH)
def test_chinese_lines_break_where_no_space_shows(page):
    """Guards against a line break between two Chinese characters, which is shown as a space."""
    for section in read_sections(page):
        broken = re.search("[\u4e00-\u9fff]\n *[\u4e00-\u9fff]", section.text)
        assert not broken, f"{section.title}: {broken and broken[0]!r}"


# -----------------------------------------------------------------------------
# what is named exists


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_somewhere(page):
    """Guards against a renamed file, picture or heading that is still linked to."""
    for link in links(page):
        if "://" in link.path:
            continue
        assert (ROOT / link.path).exists(), f"{page} links to {link.path}, which is missing"
        if link.anchor:
            assert link.anchor in anchors(link.path), f"{page}: no heading for {link}"


def shown_lines():
    """Lines of the code blocks and code spans of all English pages, continued lines joined."""
    found = []
    for page in PAGES:
        for section in read_sections(page):
            for block in section.code:
                found += re.sub(r"\\\n *", "", block).split("\n")
            found += code_spans(section.text)
    return found


def shown_commands():
    """[(line, script, its arguments)] for each python, torchrun or uv run of a script."""
    found = []
    for line in shown_lines():
        for command in map(str.strip, line.split("&&")):
            if not re.match(r"(python|torchrun|uv run) ", command):
                continue
            words = shlex.split(command, comments=True)
            script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if script is not None and "-m" not in words[:script]:
                found.append((command, words[script], words[script + 1:]))
    return found


OPTIONS = {}  # {script: its flags}, of each script that was asked


def options(script, call_main):
    """The --flags that a script's --help lists."""
    if script not in OPTIONS:
        code, out, _ = call_main(importlib.import_module(script.removesuffix(".py")), "--help")
        assert code == 0, f"{script} --help"
        lists = re.findall(r"^  (-.*?)(?:  |$)", out, re.MULTILINE)
        OPTIONS[script] = {flag for line in lists for flag in re.findall(r"--\w+", line)}
        if script == "train_gpt2.py":  # its switches have opposites that --help does not list
            OPTIONS[script] |= {line.replace("--", "--no_") for line in lists if " " not in line}
    return OPTIONS[script]


def flags_of(words):
    """The --flags among the words of a command line, without their values."""
    return {word.split("=")[0] for word in words if word.startswith("--")}


def test_commands_have_their_scripts_and_flags(call_main):
    """Guards against a command whose script or flag was renamed or never existed."""
    commands = shown_commands()
    assert len(commands) > 40, "the commands are not found any more"
    for line, script, words in commands:
        assert (ROOT / script).is_file(), f"no {script}: {line}"
        unknown = flags_of(words) - options(script, call_main)
        assert not unknown, f"{script} has no {unknown}: {line}"


def test_flags_in_prose_belong_to_a_script(call_main):
    """Guards against a flag that is still explained after it was renamed."""
    scripts = {script for _, script, _ in shown_commands()}
    spans = [span for page in PAGES for section in read_sections(page)
             for span in code_spans(section.text) if span.startswith("--")]
    assert len(spans) > 80, "the flags are not found any more"
    for span in spans:
        flags = flags_of(span.split()) - TORCHRUN_FLAGS - PLACEHOLDERS
        known = any(flags <= options(script, call_main) for script in scripts)
        assert known, f"no script has {span}"


def test_table_of_flags_agrees_with_train_config():
    """Guards against a flag of training that docs/training.md lacks, or another default there."""
    table, = tables(find_section("docs/training.md", "All flags"))
    defaults = {code_spans(flag)[0]: code_spans(default) for flag, default, _ in table[1:]}
    assert list(defaults) == [f"--{f.name}" for f in fields(train_gpt2.TrainConfig)]
    for f in fields(train_gpt2.TrainConfig):
        shown = defaults[f"--{f.name}"]
        if f.default is None or isinstance(f.default, bool):
            assert shown == [], f.name  # the table says it in words
        elif isinstance(f.default, str):
            assert shown == [f.default], f.name
        else:
            assert [float(text) for text in shown] == [f.default], f.name


def test_benchmarks_exist():
    """Guards against a figure whose benchmark was renamed or dropped."""
    words = [line.split()[2:] for line in shown_lines() if line.startswith("python -m dev.")]
    assert {module for module, *_ in words} == {"dev.bench"}
    named = {names[0] for _, *names in words if names}
    assert named
    assert named <= set(bench.BENCHES), named


def test_file_tree_is_complete():
    """Guards against a module that README's tree of files leaves out, or that is gone."""
    tree, = find_section("README.md", "Files").code
    named, folder = [], ""
    for line in tree.split("\n")[1:]:  # the first line is the fence
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ""
        named.append(folder + name)
        assert (ROOT / folder / name).exists(), f"no {folder}{name}"
        folder = name if name.endswith("/") else folder
    scripts = {path.name for path in ROOT.glob("*.py")}
    modules = {f"gpt2lab/{path.name}" for path in (ROOT / "gpt2lab").glob("*.py")}
    assert {name for name in named if re.fullmatch(r"\w+\.py", name)} == scripts
    assert {name for name in named if name.startswith("gpt2lab/") and name.endswith(".py")} == (
        modules - {"gpt2lab/__init__.py"})


def test_readme_is_short():
    """Guards against a README that grows until nobody reads it: details belong into docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MOST_WORDS
