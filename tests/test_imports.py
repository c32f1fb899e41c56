"""Which way imports go, and that importing does nothing else."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What a room may not import: passes touch no process group and no device.
FORBIDDEN = {
    "passes": (
        "colocc.runtime",
        "colocc.compile",
        "colocc.program",
        "colocc.testing",
        "torch.distributed",
        "torch.cuda",
        "megatron.core.parallel_state",
    ),
    "runtime": ("colocc.testing",),
}
# What of Megatron is imported outside of runtime/megatron, which alone knows its internals: groups
# and their collections, a layer for its models, the random states that a CPU rank lacks.
MEGATRON = {
    "colocc/layout.py": {"parallel_state"},
    "runtime/attention.py": {
        "process_groups_config.ProcessGroupCollection",
        "tensor_parallel.get_cuda_rng_tracker",
        "transformer.enums.AttnMaskType",
        "transformer.module.MegatronModule",
    },
    "runtime/cpu.py": {"tensor_parallel.random"},
    "runtime/groups.py": {"parallel_state", "process_groups_config.ProcessGroupCollection"},
}
# Attributes of MimoModel, GPTModel and DDP.
INTERNALS = {
    "bucket_groups",
    "ddp_config",
    "language_model",
    "partition_adapter",
    "special_token_ids",
}
FILES = {room: sorted((ROOT / room).rglob("*.py")) for room in ("passes", "runtime", "colocc")}
# glob does not follow the links inside colocc/, so colocc holds its own files only.
FILES["colocc"] = [p for p in FILES["colocc"] if p.resolve() == p]


class WithoutTypes(ast.NodeTransformer):
    """Takes out what only a type checker reads."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        checked = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if checked else self.generic_visit(node)


def imported(source: str | ast.AST) -> Iterator[str]:
    """Every module and name that the source imports, dotted."""
    for node in ast.walk(ast.parse(source) if isinstance(source, str) else source):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are banned"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def run(code: str) -> str:
    """What a fresh interpreter in the project's root prints."""
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


def forbidden(source: str, room: str) -> list[str]:
    """The imports in ``source`` that a file of ``room`` may not have."""
    found = []
    for name in imported(source):
        parts = name.split(".")
        if parts[0] in ("passes", "runtime", "tests", "examples"):
            found.append(name)
        if name.startswith(FORBIDDEN.get(room, ())):
            found.append(name)
    return found


def test_a_wrong_import_is_seen() -> None:
    bad = "from colocc.runtime import cpu\nimport torch.distributed as dist\nimport passes.verify"
    expected = ["colocc.runtime.cpu", "torch.distributed", "passes.verify"]
    assert forbidden(bad, "passes") == expected
    assert forbidden("def f():\n    from colocc import runtime", "passes") == ["colocc.runtime"]
    assert forbidden("from colocc import layout\nimport torch", "passes") == []


@pytest.mark.parametrize("room", FILES)
def test_imports_go_one_way(room: str) -> None:
    assert FILES[room], f"{room} has files"
    wrong = {str(p.relative_to(ROOT)): forbidden(p.read_text(), room) for p in FILES[room]}
    assert {path: names for path, names in wrong.items() if names} == {}


def outside() -> Iterator[tuple[str, ast.AST]]:
    """The files of the package that may not know Megatron's internals, parsed."""
    for path in (path for room in FILES.values() for path in room):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(("runtime/megatron/", "colocc/testing/")):
            yield name, ast.parse(path.read_text())


def test_one_room_knows_megatrons_internals() -> None:
    found: dict[str, set[str]] = {}
    for name, tree in outside():
        for module in imported(WithoutTypes().visit(tree)):
            if module.split(".")[0] == "megatron":
                found.setdefault(name, set()).add(module.removeprefix("megatron.core."))
    assert found == MEGATRON


def test_one_room_reads_megatrons_attributes() -> None:
    def read(tree: ast.AST) -> set[str]:
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        return names & INTERNALS

    assert {name: read(tree) for name, tree in outside() if read(tree)} == {}
    room = (ROOT / "runtime" / "megatron").glob("*.py")
    assert set().union(*(read(ast.parse(path.read_text())) for path in room)) == INTERNALS


def test_passes_load_no_runtime() -> None:
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in FILES["passes"]]
    modules = [f"colocc.{n.removesuffix('.__init__')}" for n in names]
    code = (
        "import sys, types, pathlib\n"
        "package = types.ModuleType('colocc')\n"
        "package.__path__ = [str(pathlib.Path('colocc').resolve())]\n"
        "sys.modules['colocc'] = package\n"
        f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted(m for m in sys.modules if m.startswith(('colocc.runtime', 'megatron'))))"
    )
    assert run(code).strip() == "[]"


def test_importing_colocc_loads_no_megatron_and_patches_nothing() -> None:
    code = (
        "import torch, sys\n"
        "before = dict(vars(torch.cuda)), dict(vars(torch.distributed))\n"
        "import colocc, colocc.runtime.cpu\n"
        "after = dict(vars(torch.cuda)), dict(vars(torch.distributed))\n"
        "print([n for b, a in zip(before, after) for n in b if a[n] is not b[n]])\n"
        "print(torch.overrides._get_current_function_mode())\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'megatron'])"
    )
    assert run(code).split("\n")[:3] == ["[]", "None", "[]"]


@pytest.mark.parametrize("room", ["passes", "runtime"])
def test_the_second_spelling_is_refused(room: str) -> None:
    said = run(f"try:\n    import {room}\nexcept ImportError as error:\n    print(error)")
    assert said.strip() == f"import colocc.{room}, not {room}"


@pytest.mark.parametrize("room", ["passes", "runtime"])
def test_the_rooms_are_real_and_linked(room: str) -> None:
    link = ROOT / "colocc" / room
    assert (ROOT / room).is_dir()
    assert not (ROOT / room).is_symlink()
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room


def test_python_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = (ROOT / ".python-version").read_text().strip()
    assert project["project"]["requires-python"] == f">={version}"
    assert project["tool"]["mypy"]["python_version"] == version
