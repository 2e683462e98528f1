"""`import paddle_reparam` registers the layers, and the core needs nothing but Paddle and numpy."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

import paddle_reparam

# These import PaddleClas, PaddleSeg, PaddleDetection, VisualDL or the packages of the figures by nature.
NOT_CORE = {"ppcls", "ppdet", "ppseg", "monitor", "analysis"}
FOREIGN = {
    "ppcls", "paddleclas", "ppdet", "paddleseg", "visualdl", "torch", "matplotlib", "onnxruntime", "cv2", "safetensors",
}  # fmt: skip

ROOT = Path(paddle_reparam.__file__).parent
FILES = [path.relative_to(ROOT).with_suffix("").parts for path in ROOT.rglob("*.py")]
CORE = sorted(
    ".".join(("paddle_reparam", *(p for p in parts if p != "__init__"))) for parts in FILES if parts[0] not in NOT_CORE
)


@pytest.fixture(scope="module")
def fresh():
    """What a process of its own holds after `import paddle_reparam`, and after every core module."""
    code = f"""
import importlib, json, sys
import paddle
packages = lambda: {{name.split(".")[0] for name in sys.modules}}
of_paddle = packages()
import paddle_reparam
first = packages() - of_paddle
from paddle_reparam.registry import list_layers
layers = list_layers()
for name in {CORE!r}:
    importlib.import_module(name)
print(json.dumps([sorted(of_paddle), sorted(first), sorted(packages() - of_paddle), layers, list_layers()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_core_is_found():
    assert {"paddle_reparam", "paddle_reparam.arithmetic.kernels", "paddle_reparam.layers.base"} <= set(CORE)


def test_the_core_imports_no_foreign_package(fresh):
    of_paddle, first, core, _, _ = fresh
    assert "paddle_reparam" in first
    assert not FOREIGN & set(core), f"imported by the core: {sorted(FOREIGN & set(core))}"
    # Paddle alone must not have hidden one of them from the line above.
    assert not {"ppcls", "paddleclas", "ppdet", "paddleseg", "visualdl", "torch"} & set(of_paddle)


def test_import_registers_every_layer(fresh):
    *_, after_import, after_all = fresh
    assert after_import, "import paddle_reparam registers no layer"
    assert after_import == after_all, "a layer is registered only once its own module is imported"


def test_errors_of_the_library_name_no_option_of_a_command():
    """Who calls a function has no command line; what both have to do is said for both, as `BY_FORCE` does."""
    paths = [path for path in ROOT.rglob("*.py") if not {"ppcls", "ppseg", "ppdet"} & set(path.parts)]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    texts = [
        (path.name, part.value)
        for path, tree in trees.items()
        for statement in ast.walk(tree)
        if isinstance(statement, ast.Raise)
        for part in ast.walk(statement)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    assert len(texts) > 100
    assert [each for each in texts if re.search(r"(^|\s)--[a-z]", each[1])] == []


def test_every_module_is_installed():
    """A folder without an `__init__.py` runs in a checkout and is missing in what `pip install` copies."""
    installed = set(find_packages(str(ROOT.parent), include=["paddle_reparam*"]))
    folders = {path.parent.relative_to(ROOT.parent).parts for path in ROOT.rglob("*.py")}
    assert {".".join(folder) for folder in folders} == installed


SCRIPTS = [path for folder in ("tools", "docs/make") for path in (ROOT.parent / folder).glob("*.py")]


def test_commands_run_where_the_library_is_not_installed():
    """They look for it where they are before they import it."""
    assert len(SCRIPTS) > 10
    for path in SCRIPTS:
        before, place, _ = path.read_text(encoding="utf-8").partition("\nsys.path.insert(0, str(")
        assert place, path.name
        assert not re.search(r"^(from|import) paddle_reparam", before, re.M), path.name


def test_commands_import_this_library_before_paddle():
    """It quiets a warning that Paddle shows when it is imported."""
    for path in SCRIPTS:
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        modules = [
            name.split(".")[0]
            for each in statements
            if isinstance(each, (ast.Import, ast.ImportFrom))
            for name in ([each.module or ""] if isinstance(each, ast.ImportFrom) else [a.name for a in each.names])
        ]
        assert [name for name in modules if name in ("paddle", "paddle_reparam")][:1] != ["paddle"], path.name


def test_every_room_is_on_the_page_and_no_module_is_long():
    package = Path(paddle_reparam.__file__).parent
    page = (package.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert [name for name in rooms if name != "__init__.py" and f"`{name}" not in page] == []
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py")}
    assert {path: count for path, count in lines.items() if count > 450} == {}


def test_no_function_is_written_twice():
    """Functions of modules with the same body; `analyze`, which each paper has under this name, aside."""
    places = {}
    for path in ROOT.rglob("*.py"):
        for part in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(part, ast.FunctionDef) and part.name != "analyze":
                body = part.body[1:] if ast.get_docstring(part) else part.body
                same = "".join(map(ast.dump, [part.args, *body]))
                places.setdefault(same, []).append(f"{path.relative_to(ROOT)}: {part.name}")
    assert len(places) > 500
    assert [each for each in places.values() if len(each) > 1] == []
