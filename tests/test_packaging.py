"""What a user installs: the links inside colocc/ must arrive as real files."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("colocc", "passes", "runtime")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a copy of the tree, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("packaging")
    tree, out = folder / "tree", folder / "out"
    tree.mkdir()
    out.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ROOMS:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build(tree, "build_sdist", out)
    with tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
        sdist.extractall(folder / "unpacked", filter="data")
    build(next((folder / "unpacked").iterdir()), "build_wheel", out)
    return out


def build(tree: Path, kind: str, out: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.{kind}({str(out)!r})"
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr


def modules() -> set[str]:
    """Every module of the tree under its import name, from git's real folders."""
    own = {p for p in (ROOT / "colocc").rglob("*.py") if p.resolve() == p}
    linked = {p for room in ("passes", "runtime") for p in (ROOT / room).rglob("*.py")}
    names = {p.relative_to(ROOT).as_posix() for p in own}
    return names | {f"colocc/{p.relative_to(ROOT).as_posix()}" for p in linked}


def test_the_wheel_holds_every_module_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
        assert "colocc/passes/__init__.py" in names
        assert names == modules()
        text = wheel.read("colocc/runtime/__init__.py").decode()
    assert text == (ROOT / "runtime/__init__.py").read_text()


def test_the_sdist_holds_every_module(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        files = {m.name.split("/", 1)[1] for m in sdist.getmembers() if m.isfile()}
    assert modules() <= files


def test_constraints_are_names_and_versions_alone() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 20
    assert [x for x in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!]+", x)] == []
