"""The house: no import circles, no file or function that is too long, no heavy imports."""

import ast
import dataclasses
import subprocess
import sys
import typing

import pytest
from conftest import ROOT

from flaxqa import answers, config
from flaxqa.eval import config as eval_config

FILES = sorted(
    path for folder in ("flaxqa", "eval", "tests") for path in ROOT.joinpath(folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "flaxqa" / "eval")
)  # fmt: skip
OURS = [path for path in FILES if not path.is_relative_to(ROOT / "tests")]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("flaxqa", *parts) if parts[0] == "eval" else parts
    return ".".join(parts).removesuffix(".__init__")


def imports_of(path, modules):
    """The modules of ours that a file imports, anywhere in it, but for type checkers alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only or not isinstance(node, ast.ImportFrom):
            continue
        base = "flaxqa.eval" if node.level else ""
        module = ".".join(filter(None, (base, node.module)))
        for alias in node.names:
            found = f"{module}.{alias.name}"
            if found in modules or module in modules:
                yield found if found in modules else module


def test_no_import_goes_in_a_circle():
    modules = {module_of(path): path for path in OURS}
    graph = {name: set(imports_of(path, modules)) - {name} for name, path in modules.items()}
    graph["flaxqa"] = set()  # whose names are loaded when they are used
    for name in graph:
        graph[name] -= {"flaxqa"}
    assert sum(map(len, graph.values())) > 100  # or this finds nothing
    left = dict(graph)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, {name: needs & left.keys() for name, needs in left.items()}


def test_what_is_measured_never_imports_what_measures():
    modules = {module_of(path): path for path in OURS}
    allowed = {"flaxqa", "flaxqa.arguments", "flaxqa.cli", "flaxqa.commands", "flaxqa.__main__"}
    for name, path in modules.items():
        if not name.startswith("flaxqa.eval") and name not in allowed:
            assert not [one for one in imports_of(path, modules) if "flaxqa.eval" in one], name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = node.end_lineno - node.lineno + 1
            assert size <= 60, f"{node.name} has {size} lines"


def loaded_by(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_a_worker_of_another_framework_imports_no_jax():
    code = (
        "from flaxqa.eval import backends, runner; from flaxqa import answers, features, tokens; "
        "backends.backend_of('torch')"
    )
    assert not loaded_by(code) & {"jax", "flax", "torch"}


def test_the_command_line_imports_nothing_heavy():
    heavy = {"jax", "flax", "transformers", "datasets", "pyarrow", "matplotlib", "pandas"}
    assert not loaded_by("import flaxqa.cli") & heavy


def test_every_option_is_used():
    """One that is declared and never read would be taken and ignored, silently."""
    nodes = [node for path in OURS for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    # Those that a class takes under the same name are passed on by `Options.of`.
    named = {node.value for node in nodes if isinstance(node, ast.Constant)}
    kinds = [config.ReaderOptions, config.PredictConfig, eval_config.EvalConfig,
             eval_config.CompareConfig, eval_config.ProbeConfig]  # fmt: skip
    for kind in kinds:
        for field in dataclasses.fields(kind):
            assert field.name in read | named, f"{kind.__name__}.{field.name}"


def test_eval_takes_every_decoding_rule():
    decoder = typing.get_type_hints(eval_config.EvalConfig)["decoder"]
    assert set(typing.get_args(decoder)) == set(answers.DECODERS)
