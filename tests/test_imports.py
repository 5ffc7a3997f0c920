"""Importing is free of effects, and packages stand alone."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ["modgrok", "isvd", "robust_depth"]
RUNTIME = ["__init__", "flags", "rundir", "hoststate", "checkpoints", "parallel", "loop"]
MODULES = sorted(p for name in [*PACKAGES, "launch"] for p in (ROOT / name).rglob("*.py"))

# Run in an empty folder, with a platform that does not exist: touching a device would raise.
# What modgrok depends on is there already, so that only what the module itself does shows.
LOOK = """
import importlib, os, sys
import flax.linen, jax, numpy, optax
from absl import flags

HEAVY = {"matplotlib", "torch", "tensorflow", "orbax", "safetensors", "tensorboardX", "tqdm"}
OURS = {"modgrok", "isvd", "robust_depth", "launch"}
for name in sys.argv[1:]:
    modules, known = set(sys.modules), set(flags.FLAGS)
    importlib.import_module(name)
    new = {module.split(".")[0] for module in set(sys.modules) - modules}
    assert not new & (HEAVY | OURS - {name.split(".")[0]}), f"{name} imports {new}"
    assert set(flags.FLAGS) == known, f"{name} defines {set(flags.FLAGS) - known}"
assert not os.listdir(), f"wrote {os.listdir()}"
try:
    jax.devices()
except RuntimeError:
    print("no device was touched")
"""


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path):
    """Names of all modules that a file imports, inside functions too, as absolute names."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def importing(tmp_path, *names):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {"JAX_PLATFORMS": "nonexistent", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOK, *names],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_importing_packages_has_no_effect(tmp_path):
    names = [name_of(path) for path in MODULES if path.parent.name in PACKAGES]
    assert {"modgrok", "modgrok.figures", "modgrok.interop", "isvd", "robust_depth"} <= set(names)
    result = importing(tmp_path, *names)
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("no device was touched\n", "")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import jax.numpy as jnp\nx = jnp.zeros(1)", "nonexistent"),
        ("from absl import flags\nflags.DEFINE_bool('mine', True, '')", "defines {'mine'}"),
        ("open('left.txt', 'w').close()", "wrote ['left.txt']"),
        ("import tqdm", "imports"),
        ("import isvd", "imports"),
    ],
    ids=["device", "flag", "file", "dependency", "package"],
)
def test_that_test_can_fail(source, message, tmp_path):
    module, empty = tmp_path / "bad_module.py", tmp_path / "empty"
    module.write_text(source)
    empty.mkdir()
    look = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + LOOK
    result = subprocess.run(
        [sys.executable, "-c", look, "bad_module"],
        cwd=empty, env=os.environ | {"JAX_PLATFORMS": "nonexistent", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert message in result.stderr


def test_packages_know_neither_the_programs_nor_each_other():
    for path in MODULES:
        package = path.relative_to(ROOT).parts[0]
        forbidden = {*PACKAGES, "launch"} - {package}
        if package != "launch":
            known = {name.split(".")[0] for name in imported(path)}
            assert not known & forbidden, name_of(path)
            assert not known & {"absl", "orbax", "tqdm", "tensorboardX", "tensorflow"}, name_of(
                path
            )


@pytest.mark.parametrize("name", RUNTIME)
def test_runtime_knows_no_package(name):
    known = {module.split(".")[0] for module in imported(ROOT / "launch" / f"{name}.py")}
    assert not known & set(PACKAGES)


def test_imports_are_seen_wherever_they_stand(tmp_path, monkeypatch):
    """Guards the two tests above."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "launch").mkdir()
    path = tmp_path / "launch" / "made_up.py"
    path.write_text(
        "import a.b\ndef f():\n    from c import d\n    from . import e\n    from .g import h"
    )
    assert set(imported(path)) == {"a.b", "c.d", "launch.e", "launch.g.h"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("package", [*PACKAGES, "launch"])
def test_packages_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()
