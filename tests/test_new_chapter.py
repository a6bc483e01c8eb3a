"""`make chapter`: what it writes passes all checks and runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import teaching_page
from docutils import nodes
from docutils.utils import new_document

import anatomy
import chapter_pages
import new_chapter
import notebooks as nbs
import run_chapter
from build_book import chapters_of

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))
NEXT = f"{len(NAMES) + 1:02}"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository as far as a new chapter goes."""
    for name in ("tools", "notebooks", "tests/wrong_answers"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "book").mkdir()
    for name in ("Makefile", "pyproject.toml", "_config.yml", "_toc.yml", "book/teaching.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_a_new_chapter_passes_all_checks_and_runs(copy: Path) -> None:
    name = f"{NEXT}_from_spots_to_cells"
    command = ["make", "-o", ".venv/installed", f"RUN={sys.executable}", "chapter", f"NAME={name}"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"run_notebooks.py {NEXT}" in done.stdout
    path = copy / "notebooks" / f"{name}.ipynb"
    assert anatomy.problems(nbs.read(path), name) == []
    assert nbs.source(nbs.read(path)["cells"][0]).startswith(f"# {NEXT}. From spots to cells\n")
    for lint in (["format", "--check"], ["check"]):
        ruff = [sys.executable, "-m", "ruff", *lint, path]
        subprocess.run(ruff, cwd=copy, check=True, capture_output=True)
    assert chapters_of(copy / "_toc.yml") == [*NAMES, name]
    also = copy / "tests" / "wrong_answers"
    assert run_chapter.also_code(path, also)  # there are wrong answers, and they run, too
    run_chapter.execute(path, copy / "out", "demo", timeout=300, also=also)
    assert anatomy.output_problems(nbs.read(copy / "out" / path.name), (f"{copy}/",)) == []


def test_the_page_for_teachers_knows_a_new_chapter(copy: Path) -> None:
    assert new_chapter.main([f"{NEXT}_from_spots_to_cells"], copy) == 0
    teaching_page.tracks_agree(copy)
    teaching_page.has_a_word_on_every_chapter(copy)


def test_a_new_chapter_names_words_of_the_glossary() -> None:
    glossary = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\{glossary\}\n(.+?)^```", glossary, re.M | re.S)
    terms = {name: name for block in blocks for name in re.findall(r"^\S.*", block, re.M)}
    page = new_document("page")
    for cell in new_chapter.chapter()["cells"]:
        if cell["cell_type"] == "markdown":
            page += [nodes.paragraph("", line) for line in nbs.source(cell).splitlines()]
    chapter_pages.link_terms(page, terms, "glossary.html")
    assert len(list(page.findall(nodes.reference))) > 3  # as test_pages.py asks of every chapter


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (NAMES[0], f"exists: notebooks/{NAMES[0]}.ipynb"),
        (f"{NAMES[-1][:2]}_another", f"exists: notebooks/{NAMES[-1]}.ipynb"),
        ("98_far_away", "without gaps"),
        ("expression", "two digits"),
        (f"{NEXT}_Expression", "lower-case"),
        (f"{NEXT}-expression", "two digits"),
        (f"../{NEXT}_expression", "two digits"),
        ("", "two digits"),
    ],
)
def test_a_name_that_cannot_be_is_refused_and_the_next_one_is_said(
    name: str, reason: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(copy.rglob("*")), (copy / "_toc.yml").read_bytes()
    assert new_chapter.main([name], copy) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert f"NAME={NEXT}_" in said
    assert (sorted(copy.rglob("*")), (copy / "_toc.yml").read_bytes()) == before
