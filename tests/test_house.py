"""README, CONTRIBUTING, the figure and the package agree on its modules, and imports go one way."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import helpers

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src/helpers"
MODULES = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}


def arrows(text: str) -> list[str]:
    """Return the modules of the line with arrows, in its order."""
    (line,) = re.findall(r"`(files\s->[^`]+)`", text)
    return re.findall(r"\w+", line)


ORDER = arrows(helpers.__doc__)


def pipeline():
    """Load the script that draws the figure."""
    spec = importlib.util.spec_from_file_location("pipeline", ROOT / "book/figures/pipeline.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pipeline"] = module
    spec.loader.exec_module(module)
    return module


def test_there_are_at_most_fifteen_modules():
    assert len(MODULES) <= 15


def test_the_package_names_its_modules():
    assert sorted(ORDER) == sorted(MODULES)


def test_contributing_draws_the_same_arrows():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert arrows(text) == ORDER


def test_the_readme_names_the_same_modules():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith("| `src/helpers/`"))
    assert re.findall(r"`(\w+)`", row) == ORDER


@pytest.mark.parametrize("name", ["pipeline", "pipeline-tall"])
def test_the_figure_names_the_same_modules(name):
    drawn = (ROOT / f"book/figures/{name}.svg").read_text(encoding="utf-8")
    names = re.findall(r'class="pl-name"[^>]*>([^<]+)<', drawn)
    assert sorted(re.findall(r"\w+", " ".join(names))) == sorted(MODULES)
    of_stages = [module for stage in pipeline().STAGES for module in stage.modules]
    assert sorted(of_stages) == sorted(MODULES)


def imported(source: str) -> set[str]:
    """Return the modules of the package that a text imports, late and for type hints as well."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "helpers":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("helpers.")}
    return found


def test_imports_are_found_wherever_they_stand():
    late = (
        "def f():\n    from helpers import plots\nimport helpers.files\nfrom helpers.tiles import x"
    )
    assert imported(late) == {"plots", "files", "tiles"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_earlier_ones(module):
    later = set(ORDER[ORDER.index(module) :])
    assert imported((PACKAGE / f"{module}.py").read_text(encoding="utf-8")) & later == set()


def test_evaluation_does_not_load_torch():
    code = (
        "import sys, helpers\n"
        "assert not [m for m in sys.modules if m.startswith('helpers.')], 'not empty'\n"
        "from helpers import splits, probing, metrics\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
