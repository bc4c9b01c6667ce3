"""Who may import whom, read from the source: layers point downwards, libraries have places."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # a module imports its own layer and those before it
    ["errors", "machine", "storage", "types"],
    ["selection.policies"],
    [
        "artifacts.records",
        "artifacts.schema",
        "config",
        "config_file",
        "progress",
        "pipeline.run_folder",
        "training.schedule",
        "training.memory",
        "training.checkpoints",
    ],
    ["ops", "importance.scores", "selection", "report", "artifacts"],
    ["decoder_blocks", "adapters.linear", "adapters.shared_input"],
    ["adapters", "data"],
    [
        "adapters.files",
        "adapters.conversion",
        "importance",
        "selection.masks.tuning",
    ],
    ["training", "evaluation"],
    ["rank_search"],
    ["doctor", "selfcheck", "pipeline"],
    ["cli", "__main__"],
]
LAZY = {  # loaded inside a function, by a caller that asked for it
    ("selection.select", "selection.masks.tuning"),
}
PLACES = {  # library -> the only modules (and packages) that may import it
    "torch": [
        "ops",
        "decoder_blocks",
        "adapters",
        "importance",
        "selection.masks.tuning",
        "data",
        "training",
        "evaluation",
        "rank_search",
        "doctor",
        "selfcheck",
        "pipeline.inputs",
        "pipeline.eval",
        "pipeline.score",  # torchrun's workers
    ],
    "floe_triton": ["ops", "selfcheck"],  # the self-test compares each op with its definition
    "transformers": ["training", "evaluation", "pipeline.inputs"],
    "peft": ["adapters"],
    "safetensors": ["adapters"],
    "datasets": ["data"],
    "optuna": ["rank_search"],
    "pydantic": ["artifacts", "config", "config_file"],
    "yaml": ["config_file"],
    "typer": ["cli"],
    "rich": ["cli", "progress"],
    "matplotlib": ["report"],
    "jinja2": ["report"],
    "tests": [],
    "benchmarks": [],
}


def name_of(path):
    """``floe/adapters/files.py`` -> ``adapters.files``; a package's __init__ is the package."""
    parts = path.relative_to(ROOT / "floe").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted((ROOT / "floe").rglob("*.py"))}
TRITON = sorted((ROOT / "triton_kernels").rglob("*.py"))


def is_typing_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def imports(path, inside_functions=True):
    """Full names imported, what only type checkers see left out."""
    waiting, found = [ast.parse(path.read_text(encoding="utf-8"))], set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        if is_typing_only(node):
            continue
        if inside_functions or not isinstance(node, ast.FunctionDef):
            waiting += ast.iter_child_nodes(node)
    return found


def innermost(name, table):
    """The longest entry of ``table`` that is ``name`` or a package of it, or None."""
    parts = name.split(".")
    options = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((option for option in options if option in table), None)


def layer(name):
    table = {entry: depth for depth, entries in enumerate(LAYERS) for entry in entries}
    found = innermost(name, table)
    assert found is not None, f"floe.{name} has no layer: give it one in {Path(__file__).name}"
    return table[found]


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_imports_point_downwards(name):
    wrong = []
    for full in imports(FILES[name]):
        target = innermost(full.removeprefix("floe."), FILES) if full.startswith("floe.") else None
        if target and layer(target) > layer(name) and (name, target) not in LAZY:
            wrong.append(target)
    assert not wrong, f"floe.{name} (layer {layer(name)}) imports {sorted(wrong)} from above"


@pytest.mark.parametrize("library", PLACES)
def test_each_library_is_imported_in_its_place_only(library):
    importers = {
        name
        for name, path in FILES.items()
        if any(full.split(".")[0] == library for full in imports(path))
    }
    stray = {name for name in importers if innermost(name, PLACES[library]) is None}
    assert not stray


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in FILES
        if re.match(
            "artifacts|selection|report|config|pipeline.run_folder|errors|importance.s.*s$", name
        )
    ],
)
def test_what_runs_on_a_laptop_without_torch(name):
    """At import time; the mask tuning and the functions that hand over to it need torch."""
    if name != "selection.masks.tuning":
        heavy = {full.split(".")[0] for full in imports(FILES[name], inside_functions=False)}
        assert not heavy & {"torch", "transformers", "peft", "floe_triton"}


def test_the_report_reads_artifacts_only():
    used = {
        full
        for name, path in FILES.items()
        if name.split(".")[0] == "report"
        for full in imports(path)
    }
    used = {full for full in used if full.startswith("floe") and not full.startswith("floe.report")}
    allowed = {"types", "storage", "errors", "importance.scores", "artifacts"}
    assert all(innermost(full.removeprefix("floe."), allowed) for full in used), used


def test_the_registered_ops_are_called_in_one_place():
    users = {
        name
        for name, path in FILES.items()
        if "torch.ops.floe" in path.read_text() and name != "ops"
    }
    assert not users


def test_the_kernels_need_torch_and_triton_alone():
    allowed = {"torch", "triton", "floe_triton", *sys.stdlib_module_names}
    for path in TRITON:
        assert {full.split(".")[0] for full in imports(path)} <= allowed, path


@pytest.mark.parametrize("folder", ["masks", "fisher", "moe_lora", "."])
def test_cpp_outside_the_bindings_knows_no_torch_and_no_python(folder):
    pattern = "*" if folder == "." else "**/*"
    for path in (ROOT / "csrc" / folder).glob(pattern):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            included = re.findall(r'#include\s+[<"]([^>"]+)', path.read_text())
            bad = [i for i in included if re.match(r"(torch|ATen|c10|pybind11|Python|bindings)", i)]
            assert not bad, path


@pytest.mark.parametrize("path", [*FILES.values(), *TRITON], ids=lambda p: p.stem)
def test_nothing_but_the_command_line_prints(path):
    if path.name == "cli.py":
        return
    calls = (n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
    assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls)


def public(node, prefix=""):
    """(dotted name, node) of the public classes, functions and methods below ``node``."""
    for child in ast.iter_child_nodes(node):
        if (
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and child.name[0] != "_"
        ):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}{child.name}.")


@pytest.mark.parametrize("path", [*FILES.values(), *TRITON], ids=lambda p: p.stem)
def test_everything_public_says_what_it_does(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    silent = [name for name, node in public(tree) if not ast.get_docstring(node)]
    assert not silent


def test_every_loader_is_told_to_run_no_code_of_a_model():
    """Left to its default, transformers asks on the terminal, and ``yes |`` answers."""
    loaders = {"from_pretrained", "from_config", "load_dataset"}
    count = 0
    for path in [p for f in ("floe", "examples", "benchmarks") for p in (ROOT / f).rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        told = {
            id(call.func)
            for call in nodes
            if isinstance(call, ast.Call)
            and any(ast.unparse(k) == "trust_remote_code=False" for k in call.keywords)
        }
        for node in nodes:
            if isinstance(node, ast.Attribute) and node.attr in loaders:
                assert id(node) in told, f"{path}, line {node.lineno}: trust_remote_code=False"
                count += 1
    assert count >= 9
