"""
Who may import whom. gpt2lab imports only itself; train_gpt2 may import fineweb and plot; sample,
hellaswag, evaluate and export_hf may import train_gpt2; no other script imports a script. Importing
a module has no effect but definitions.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

import pytest
from conftest import ROOT, run_script

SCRIPTS_IMPORTED_BY = {"train_gpt2": {"fineweb", "plot"}, "sample": {"train_gpt2"},
                       "hellaswag": {"train_gpt2"}, "evaluate": {"train_gpt2"},
                       "export_hf": {"train_gpt2"}}
SLOW_PACKAGES = {"bitsandbytes", "datasets", "gguf", "huggingface_hub", "lm_eval", "matplotlib",
                 "pyarrow", "requests", "safetensors", "sentencepiece", "tiktoken", "tokenizers",
                 "torch", "trackio", "transformers", "wandb"}


# -----------------------------------------------------------------------------
# reading the modules


def module_name(path):
    """The name under which a file is imported: gpt2lab.cli, fineweb, conftest."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "tests":  # pytest puts this folder itself on sys.path
        parts = parts[1:]
    return ".".join(parts).removesuffix(".__init__")


def parse_modules(pattern):
    """{module: its ast.Module} of the files that match a pattern below the root."""
    return {module_name(path): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted(ROOT.glob(pattern))}


SCRIPTS = parse_modules("*.py")
PACKAGE = parse_modules("gpt2lab/**/*.py")
PRODUCT = SCRIPTS | PACKAGE
DEV = parse_modules("dev/*.py")
MODULES = PRODUCT | DEV | parse_modules("tests/*.py")


class Import(NamedTuple):
    """An import of a module of this project, or of one name of it, in another module."""

    importer: str
    line: int
    module: str
    name: str | None  # X of `from module import X`, None if the module itself is imported
    alias: str  # the name that the statement defines

    @property
    def fault(self):
        """What to print if the import breaks a rule."""
        what = self.module if self.name is None else f"{self.name} from {self.module}"
        return f"{self.importer}, line {self.line}: imports {what}"


def find_imports(importer, tree):
    """The Imports of this project's modules anywhere in an ast node of the module `importer`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(importer, node.lineno, item.name, None, item.asname or item.name)
                      for item in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}, line {node.lineno}: a relative import"
            found += [from_import(importer, node, item) for item in node.names]
    return [item for item in found if item.module in MODULES]


def from_import(importer, node, item):
    """The Import of one name in a `from` statement."""
    module, alias = node.module.removeprefix("tests."), item.asname or item.name
    submodule = f"{module}.{item.name}"
    if submodule in MODULES:  # from gpt2lab import cli
        return Import(importer, node.lineno, submodule, None, alias)
    return Import(importer, node.lineno, module, item.name, alias)


def imports_of(modules):
    """The Imports in a dict of modules."""
    return [item for module, tree in modules.items() for item in find_imports(module, tree)]


def nodes_of(modules, *kinds):
    """[(module, node)] for the ast nodes of these kinds in a dict of modules."""
    return [(module, node) for module, tree in modules.items() for node in ast.walk(tree)
            if isinstance(node, kinds)]


def defined_names(tree):
    """The names that the statements of a module define, imports excepted."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target)
                      if isinstance(part, ast.Name)}
    return names


def test_the_modules_and_their_imports_are_found():
    """Guards against tests that pass because they look at nothing."""
    assert {"train_gpt2", "fineweb", "plot", *SCRIPTS_IMPORTED_BY} <= set(SCRIPTS)
    assert {"gpt2lab", "gpt2lab.cli", "gpt2lab.kernels"} <= set(PACKAGE)
    assert {"dev.bench", "conftest"} <= set(MODULES)
    assert len(imports_of(PRODUCT)) > 100


# -----------------------------------------------------------------------------
# the rule


def test_gpt2lab_imports_only_itself():
    """Guards against a package that needs a script, dev/ or tests/ to work."""
    assert not [item.fault for item in imports_of(PACKAGE) if item.module not in PACKAGE]


def test_the_package_itself_imports_nothing():
    """Guards against a gpt2lab/__init__.py that loads torch for every module of the package."""
    assert not nodes_of({"gpt2lab": PACKAGE["gpt2lab"]}, ast.Import, ast.ImportFrom)


def test_scripts_import_only_the_scripts_that_they_may():
    """Guards against a script that is used as a library by any other script."""
    assert not [item.fault for item in imports_of(SCRIPTS)
                if item.module not in PACKAGE
                and item.module not in SCRIPTS_IMPORTED_BY.get(item.importer, ())]


def test_no_function_imports_a_script():
    """Guards against a circle that a lazy import hides, and a script that is loaded twice."""
    functions = nodes_of(PRODUCT, ast.FunctionDef, ast.AsyncFunctionDef)
    assert not [item.fault for module, function in functions
                for item in find_imports(module, function) if item.module not in PACKAGE]


def test_no_module_is_imported_in_a_way_that_these_tests_do_not_see():
    """Guards against an import of a module whose name is a string."""
    hidden = {"__import__", "import_module", "exec", "run_path", "run_module"}
    assert not [f"{module}, line {node.lineno}: {ast.unparse(node)}"
                for module, node in nodes_of(PRODUCT, ast.Name, ast.Attribute)
                if getattr(node, "id", None) in hidden or getattr(node, "attr", None) in hidden]


def test_no_modules_import_each_other_in_a_circle():
    """Guards against modules of which none can be understood, or imported, without the others."""
    imported_modules = {module: set() for module in MODULES}
    for item in imports_of(MODULES):
        imported_modules[item.importer].add(item.module)
    try:
        TopologicalSorter(imported_modules).prepare()
    except CycleError as error:
        circle = error.args[1]
        raise AssertionError(" is imported by ".join(circle)) from None


def test_names_are_imported_from_the_module_that_defines_them():
    """Guards against a re-export, which hides where a name comes from."""
    assert not [item.fault for item in imports_of(MODULES)
                if item.name is not None and item.name not in defined_names(MODULES[item.module])]


def test_attributes_of_a_module_are_defined_there():
    """Guards against a re-export by way of the module, such as train_gpt2.checkpoints."""
    aliases = {(item.importer, item.alias): item.module for item in imports_of(PRODUCT | DEV)
               if item.name is None}
    faults = []
    for module, node in nodes_of(PRODUCT | DEV, ast.Attribute):
        imported = aliases.get((module, getattr(node.value, "id", None)))
        known = imported is None or node.attr in defined_names(MODULES[imported])
        if not known and node.attr != "__doc__":
            faults.append(f"{module}, line {node.lineno}: {imported} does not define {node.attr}")
    assert not faults


# -----------------------------------------------------------------------------
# importing a module only defines


def only_defines(node):
    """Whether a module-level statement is a definition, import, assignment or __main__ guard."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "__name__ == '__main__'" and not node.orelse
    if isinstance(node, ast.Expr):  # the gradient of an operator of torch is part of its definition
        return isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith(
            ".register_autograd")
    return isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
                      | ast.Assign | ast.AnnAssign)


def test_statements_of_a_module_only_define():
    """Guards against a call, a loop or a try that runs when a module is imported."""
    faults = []
    for module, tree in (PRODUCT | DEV).items():
        assert ast.get_docstring(tree), f"{module} has no docstring"
        faults += [f"{module}, line {node.lineno}: {ast.unparse(node):.60}"
                   for node in tree.body[1:] if not only_defines(node)]
    assert not faults


# prints which of its arguments, names of packages, the modules have imported. pytest has imported
# the modules already, so what they would change in it is inherited here, and is reset first
IMPORT_AND_COMPARE = """
import os, random, signal, sys, threading
{first}
os.environ.clear()
signal.signal(signal.SIGTERM, signal.SIG_DFL)
def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return dict(os.environ), handlers, random.getstate(), threading.active_count()
before = state()
import {modules}
assert state() == before
print(*sorted(set(sys.modules) & set(sys.argv[1:])))
"""


@pytest.mark.parametrize("modules, slow_packages", [
    (["fineweb", "plot", "gpt2lab"], []), ([*SCRIPTS, *PACKAGE], ["torch"])],
    ids=["without torch", "all"])
def test_importing_a_module_only_defines(modules, slow_packages, tmp_path):
    """
    Guards against a slow --help, a fineweb.py or plot.py that loads torch, and an import that
    prints, writes a file, starts a thread, or changes signals, random numbers or the environment.
    """
    # torch may change the environment, so it is imported before the comparison begins
    first = "import torch" if slow_packages else ""
    code = IMPORT_AND_COMPARE.format(first=first, modules=", ".join(modules))
    done = run_script("-c", code, *SLOW_PACKAGES, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == slow_packages
    assert not list(tmp_path.iterdir())
