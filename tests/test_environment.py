"""The three doors (pyproject.toml, requirements.txt, environment.yml) and what CI does agree."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import stat
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SKIP = {".venv", ".cache", "_build", ".git", ".pytest_cache", ".ruff_cache", ".hypothesis"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FIXED = (
    "jupyter-book", "jupyterlab", "scanpy", "squidpy", "torch", "open-clip-torch", "matplotlib",
    "seaborn", "umap-learn", "papermill",
)  # fmt: skip
# Whatever is imported under another name than it is installed under.
INSTALLED_AS = {
    "PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "umap": "umap-learn",
    "open_clip": "open-clip-torch", "yaml": "pyyaml", "bs4": "beautifulsoup4",
    "websocket": "websocket-client",
}  # fmt: skip


def bounds(*extras: str) -> dict[str, Requirement]:
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.partition("#")[0].strip() for line in lines]
    return {canonicalize_name(r.name): r for r in map(Requirement, filter(None, wanted))}


def version(pin: Requirement) -> str:
    (only,) = pin.specifier
    assert only.operator == "=="
    return only.version


@cache
def text_files() -> tuple[tuple[str, str], ...]:
    """Return (path, text) of every tracked text file; of all there are, where git knows none."""
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    paths = [ROOT / line for line in listed.stdout.splitlines()] if listed.returncode == 0 else []
    found = []
    for path in paths or ROOT.rglob("*"):
        relative = path.relative_to(ROOT)
        if path.is_file() and path.suffix != ".log" and not SKIP & set(relative.parts):
            try:
                found.append((relative.as_posix(), path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue  # not text
    return tuple(found)


def test_every_bound_is_kept_by_its_pin() -> None:
    pinned = pins()
    wrong = [
        f"{name}: {pinned.get(name)} does not fit {bound}"
        for name, bound in bounds("book", "test").items()
        if name not in pinned or not bound.specifier.contains(version(pinned[name]))
    ]
    assert not wrong


def test_the_fixed_packages_are_there() -> None:
    assert set(FIXED) <= set(bounds("book"))


def test_bounds_are_lower_bounds() -> None:
    capped = {
        name
        for name, bound in bounds("book", "test").items()
        if any(s.operator not in (">=", "<") for s in bound.specifier)
        or not any(s.operator == ">=" for s in bound.specifier)
    }
    assert not capped
    limited = {n for n, b in bounds().items() if any(s.operator == "<" for s in b.specifier)}
    assert limited == {"pandas", "pynndescent"}, "Colab gets no other upper bound"


def test_colab_does_not_install_the_build_tools() -> None:
    assert not {"jupyter-book", "jupyterlab", "papermill", "pytest", "ruff"} & set(bounds())


@pytest.mark.parametrize(
    "platform",
    [
        {"sys_platform": "linux", "os_name": "posix", "platform_machine": "x86_64"},
        {"sys_platform": "linux", "os_name": "posix", "platform_machine": "aarch64"},
        {"sys_platform": "darwin", "os_name": "posix", "platform_machine": "arm64"},
        {"sys_platform": "win32", "os_name": "nt", "platform_machine": "AMD64"},
    ],
    ids=["linux", "linux-arm", "macos", "windows"],
)
@pytest.mark.parametrize("python", ["3.11.0", "3.12.0"])
def test_the_set_is_resolved_for(platform: dict[str, str], python: str) -> None:
    machine = {**platform, "python_version": python[:4], "python_full_version": python}
    here = {n for n, r in pins().items() if r.marker is None or r.marker.evaluate(machine)}
    assert set(bounds("book", "test")) <= here
    assert ("nvidia-cublas" in here) == (platform["sys_platform"] == "linux")
    assert ("colorama" in here) == (platform["sys_platform"] == "win32")
    assert ("appnope" in here) == (platform["sys_platform"] == "darwin")


def test_requirements_hold_pins_and_nothing_else() -> None:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert not re.search(r"^\s*-|://|\+cpu|\+cu\d|@ ", text, re.M)
    assert all(version(pin) for pin in pins().values())


def test_conda_installs_the_same_set() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert conda["name"] == "stimage-book"
    names = [d for d in conda["dependencies"] if isinstance(d, str)]
    assert [re.split("[><=]", n)[0] for n in names] == ["python", "pip", "make"]
    (python,) = [Requirement(n) for n in names if n.startswith("python")]
    assert [python.specifier.contains(v) for v in ("3.10", "3.11.9", "3.12.4")] == [
        False,
        True,
        True,
    ]
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    assert pip[0] == "-r requirements.txt"
    assert all("==" not in line for line in pip), "pins live in requirements.txt alone"


def test_python_floor() -> None:
    assert PROJECT["requires-python"] == ">=3.11"


def imported(folder: str) -> set[str]:
    """Return the packages that the modules of a folder import, anywhere in them."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    folders = ("tools", "tests", "src", "book", "benchmarks")
    own = {p.stem for f in folders for p in (ROOT / f).rglob("*.py")} | {"helpers"}
    return {
        canonicalize_name(INSTALLED_AS.get(n, n)) for n in found - own - sys.stdlib_module_names
    }


@pytest.mark.parametrize(
    ("folder", "extras", "brought"),
    [
        ("src", (), {"zarr", "httpx"}),  # zarr comes with anndata, httpx with huggingface-hub
        # these come with papermill, ipykernel, scikit-learn and sphinx-book-theme
        ("tools", ("book",), {"nbclient", "traitlets", "joblib", "beautifulsoup4"}),
        ("book", ("book",), {"docutils"}),  # comes with jupyter-book
        ("tests", ("book", "test"), {"zarr", "httpx", "requests", "nbclient", "docutils"}),
    ],
)
def test_what_is_imported_is_installed(
    folder: str, extras: tuple[str, ...], brought: set[str]
) -> None:
    assert imported(folder) <= set(bounds(*extras)) | brought


def test_what_runs_here_is_the_tested_set() -> None:
    if not (ROOT / ".venv" / "installed").exists():
        pytest.skip("not the environment that `make` fills")
    wrong = {
        name: importlib.metadata.version(name)
        for name in bounds("book", "test")
        if importlib.metadata.version(name).partition("+")[0] != version(pins()[name])
    }
    assert not wrong


def test_no_registry_or_index_is_named() -> None:
    words = ("py" + "pi.org", "python" + "hosted", "conda." + "anaconda", "index" + "-url")
    words += ("find" + "-links", "download.py" + "torch", "registry." + "npmjs")
    found = [(path, word) for path, text in text_files() for word in words if word in text]
    assert not found


def test_no_path_of_a_machine_is_named() -> None:
    pattern = re.compile(r"(?<![\w.~:/\\-])/(?:home|Users|root|work|tmp)/\w")
    own = {"tests/test_environment.py", "tests/test_notebooks.py"}
    found = [
        (path, match[0])
        for path, text in text_files()
        if path not in own and (match := pattern.search(text))
    ]
    assert not found


def test_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, helpers; print(*({'numpy', 'torch', 'scanpy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src"
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("custom.github-workflows-require-timeout", ".github/workflows/*.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_files_for_others_keep_their_public_schema(schema: str, pattern: str) -> None:
    files = sorted(ROOT.glob(pattern))
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_are_pinned_and_may_do_little(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert "concurrency" in workflow
    uses = re.findall(r"uses: (.+)", text)
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", line) for line in uses), uses
    granted = [job.get("permissions", {}) for job in workflow["jobs"].values()]
    allowed = [{}, {"pages": "write", "id-token": "write"}] if path.stem == "publish" else [{}]
    assert all(grant in allowed for grant in granted)


def test_only_main_is_published_and_only_whole() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text(encoding="utf-8"))
    assert workflow[True]["push"] == {"branches": ["main"]}  # YAML reads the key `on` as true
    steps = [step.get("run") for step in workflow["jobs"]["build"]["steps"]]
    assert [s for s in steps if s] == ["make book", "make test"]
    assert workflow["jobs"]["deploy"]["needs"] == "build"


@pytest.mark.parametrize("path", [".ci/run"])
def test_scripts_can_be_run(path: str) -> None:
    script = ROOT / path
    assert script.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]], ids=["format", "lint"])
def test_the_code_is_formatted_and_linted(command: list[str]) -> None:
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.search(r"^\.PHONY: (.+)$", text, re.M)[1].split())
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  make (\w+): ", done.stdout, re.M)) == phony
