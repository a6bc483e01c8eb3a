"""The door through Colab: its first cell installs the book and leaves what is there as it is.

``tests/colab.txt`` has what a Colab machine has. The whole proof fills a fresh Python 3.12 with it
and runs the chapters there by their own install cells, with git redirected to the last commit of
this checkout. It takes many minutes and 7 GB, so it has to be asked for:
``STIMAGE_COLAB=all python -m pytest tests/test_colab.py``, or ``STIMAGE_COLAB=01,06``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import anatomy
import notebooks as nbs
import repository

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "colab.txt"
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ASKED = os.environ.get("STIMAGE_COLAB", "")
CACHE = os.environ.get("STIMAGE_CACHE")  # read before tests get one of their own
OFFLINE = re.compile(r"error sending request|failed to fetch|timed out|could not connect", re.I)


def versions(text: str) -> dict[str, str]:
    """Return name and version of every line NAME==VERSION."""
    lines = (line.partition("#")[0].strip().partition("==") for line in text.splitlines())
    return {canonicalize_name(name): version for name, equal, version in lines if equal}


PREINSTALLED = versions(LIST.read_text(encoding="utf-8"))
PINS = versions(re.sub(r" *[;#].*", "", (ROOT / "requirements.txt").read_text(encoding="utf-8")))


def uv(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run uv, which `make` puts beside the Python of the book."""
    found = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
    if found is None:
        pytest.skip("uv is not installed")
    return subprocess.run([found, *map(str, arguments)], capture_output=True, text=True)


def test_colab_has_what_the_bounds_ask_for() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {canonicalize_name(r.name): r for r in map(Requirement, table["dependencies"])}
    there = set(bounds) & set(PREINSTALLED)
    assert there >= {"ipython", "matplotlib", "numpy", "pandas", "scipy", "torch", "torchvision"}
    wrong = [
        f"{bounds[name]}, but Colab has {PREINSTALLED[name]}"
        for name in sorted(there)
        if not bounds[name].specifier.contains(PREINSTALLED[name])
    ]
    assert not wrong


def test_the_book_can_be_installed_beside_what_colab_has() -> None:
    options = ("--python-version", "3.12", "--constraint", LIST, "--no-header", "--no-annotate")
    done = uv("pip", "compile", ROOT / "pyproject.toml", "--extra", "imagenet", *options)
    if done.returncode and OFFLINE.search(done.stderr):
        pytest.skip("the package registry cannot be reached")
    assert done.returncode == 0, done.stderr
    chosen = versions(done.stdout)
    assert {"squidpy", "open-clip-torch", "harmonypy"} <= set(chosen)
    moved = {n: v for n, v in chosen.items() if PREINSTALLED.get(n, v) != v}
    assert not moved


# --- the whole proof, when it is asked for ------------------------------------------------------


def python312() -> str:
    """Return a Python 3.12 that works."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob("3.12.*/bin/python"))
    code = "import sys; sys.exit(sys.version_info[:2] != (3, 12))"
    for found in (sys.executable, shutil.which("python3.12"), *map(str, pyenv)):
        if found and not subprocess.run([found, "-c", code], capture_output=True).returncode:
            return found
    pytest.skip("there is no Python 3.12, which is what Colab has")


@pytest.fixture(scope="module")
def machine() -> Iterator[Path]:
    """A fresh environment with what Colab has, in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="colab-") as folder:
        made = Path(folder) / "env"
        for command in (
            ("venv", "--python", python312(), made),
            ("pip", "install", "--python", made / "bin/python", "-r", LIST),
        ):
            done = uv(*command)
            assert done.returncode == 0, done.stderr
        yield made


def installed(machine: Path) -> dict[str, str]:
    command = [machine / "bin/python", "-m", "pip", "list", "--format=freeze"]
    return versions(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def write_kernel(machine: Path, folder: Path) -> None:
    """Write a kernel that starts as Colab's, with google.colab imported."""
    (folder / "stub/google").mkdir(parents=True)
    (folder / "stub/google/colab.py").touch()
    environment = {
        "PATH": f"{machine / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "stub"),  # and no helpers: they have to come with the cell
        "STIMAGE_CACHE": CACHE or str(folder / "cache"),
        "TQDM_DISABLE": "1",
        "GIT_CONFIG_COUNT": "1",  # the cell's own address leads to this checkout
        "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": repository.url(),
    }
    start = [str(machine / "bin/python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    start += ["--IPKernelApp.exec_lines=import google.colab"]
    spec = {"argv": start, "env": environment, "display_name": "Colab", "language": "python"}
    (folder / "kernels/colab").mkdir(parents=True)
    (folder / "kernels/colab/kernel.json").write_text(json.dumps(spec), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(
    not ASKED, reason="minutes and 7 GB: runs where STIMAGE_COLAB says all, or 01,06"
)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_chapter_runs_in_colab(
    path: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    if ASKED != "all" and path.stem[:2] not in ASKED.split(","):
        pytest.skip(f"STIMAGE_COLAB={ASKED}")
    machine = request.getfixturevalue("machine")
    before = installed(machine)
    others = ("torch", "torchvision", "numpy", "pandas", "scipy", "scikit-learn", "matplotlib")
    assert [name for name in others if before[name].partition("+")[0] == PINS[name]] == []
    write_kernel(machine, tmp_path)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)  # its cells as they are, the first one included
    options = {"kernel_name": "colab", "resources": {"metadata": {"path": tmp_path}}}
    NotebookClient(notebook, timeout=3600, **options).execute()

    after = installed(machine)
    assert {n: (v, after.get(n)) for n, v in before.items() if after.get(n) != v} == {}
    assert after["stimage-book"]
    for name in ("imports", "setup"):
        (cell,) = [c for c in notebook["cells"] if name in nbs.tags(c)]
        assert cell["execution_count"]
    problems = anatomy.output_problems(notebook)
    assert [p for p in problems if "stderr" not in p] == []
