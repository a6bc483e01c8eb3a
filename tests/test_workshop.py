"""The workshop edition: what it holds, that it works alone, and exercises without solutions."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import symtable
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import teaching_page

import anatomy
import check_environment
import notebooks as nbs
import run_notebooks
import workshop
from helpers import catalog
from new_chapter import chapter

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [p.stem for p in PATHS]
CACHE = os.environ.get("STIMAGE_CACHE")  # read before tests change it
each_chapter = pytest.mark.parametrize("path", PATHS, ids=NAMES)


# --- exercises without solutions ----------------------------------------------------------------


def cells(notebook: nbs.Notebook, tag: str) -> list[nbs.Cell]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code" and tag in nbs.tags(c)]


def exercises(path: Path) -> nbs.Notebook:
    return workshop.edition(nbs.read(path), "demo", solutions=False)


@each_chapter
def test_an_exercise_notebook_is_the_chapter_without_its_solutions(path: Path) -> None:
    whole = nbs.read(path)
    solutions = cells(whole, "solution")
    assert len(solutions) == len(cells(whole, "exercise")) > 0
    assert exercises(path)["cells"] == [c for c in whole["cells"] if c not in solutions]


def test_outputs_stay_at_home() -> None:
    ran = chapter()
    for cell in (c for c in ran["cells"] if c["cell_type"] == "code"):
        cell |= {"outputs": [{"output_type": "stream", "name": "stdout", "text": "secret"}]}
    assert "secret" in json.dumps(ran)
    assert "secret" not in json.dumps(workshop.edition(ran, "demo", solutions=False))
    assert workshop.edition(ran, "demo", solutions=True) == chapter()


def test_the_study_is_the_chosen_one() -> None:
    (cell,) = cells(workshop.edition(chapter(), "mob", solutions=False), "parameters")
    assert nbs.source(cell).startswith('STUDY = "mob"  # which')


@each_chapter
def test_an_exercise_notebook_keeps_the_anatomy(path: Path) -> None:
    found, made = anatomy.problems(exercises(path), path.stem), exercises(path)
    for k, _ in enumerate(cells(made, "exercise"), start=1):
        assert found.pop(0).startswith(
            f"exercises: exercise {k} is followed by ['exercise', 'check'"
        )
    assert found == []


def names(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """Return the global names that a statement reads, and those that it binds."""
    read, bound = set(), set()

    def look(table: symtable.SymbolTable, outermost: bool) -> None:
        for symbol in table.get_symbols():
            if outermost and (symbol.is_assigned() or symbol.is_imported()):
                bound.add(symbol.get_name())
            if symbol.is_referenced() and (outermost or symbol.is_global()):
                read.add(symbol.get_name())
        for child in table.get_children():
            look(child, outermost=False)

    look(symtable.symtable(ast.unparse(statement), "cell", "exec"), outermost=True)
    whole = isinstance(statement, ast.Assign | ast.AugAssign)  # else it reads what it has bound
    return (read if whole else read - bound), bound


def needs_a_solution(notebook: nbs.Notebook) -> Iterator[str]:
    """Yield the names that another cell reads where a solution was the last to bind them."""
    by_solution: set[str] = set()
    for cell in (c for c in notebook["cells"] if c["cell_type"] == "code"):
        if "colab" in nbs.tags(cell):
            continue
        for statement in ast.parse(nbs.source(cell)).body:
            read, bound = names(statement)
            if "solution" in nbs.tags(cell):
                by_solution |= bound
                continue
            yield from (f"{nbs.name(cell)} reads {name}" for name in sorted(read & by_solution))
            by_solution -= bound


@each_chapter
def test_no_later_cell_needs_a_solution(path: Path) -> None:
    assert list(needs_a_solution(nbs.read(path))) == []


@pytest.mark.parametrize(
    ("solution", "later", "found"),
    [
        ("found = 1", "print(found)", ["cell later reads found"]),
        (
            "def found():\n    return 1",
            "table = [found() for _ in 'ab']",
            ["cell later reads found"],
        ),
        ("found = 1", "def show():\n    return found", ["cell later reads found"]),
        ("found = 1", "found = found + 1", ["cell later reads found"]),
        ("found = 1", "found = 2\nprint(found)", []),
        ("found = 1", "for found in 'ab':\n    print(found)", []),
        ("[found for found in 'ab']", "print(found)", []),
        ("table = 1", "def show(table):\n    return table", []),
    ],
)
def test_a_name_that_only_a_solution_binds_is_noticed(
    solution: str, later: str, found: list[str]
) -> None:
    both = [
        {"cell_type": "code", "id": "it", "metadata": {"tags": ["solution"]}, "source": solution},
        {"cell_type": "code", "id": "later", "metadata": {}, "source": later},
    ]
    assert list(needs_a_solution({"cells": both})) == found


@pytest.mark.slow
@each_chapter
def test_an_exercise_notebook_says_what_is_missing(path: Path, run_of_demo: Path) -> None:
    """Up to its first check it is the chapter; what the checks say there, they say here."""
    ran, made = nbs.read(run_of_demo / path.name), exercises(path)
    until = made["cells"].index(cells(made, "check")[0]) + 1
    same = [[(c["id"], nbs.source(c)) for c in one["cells"][:until]] for one in (ran, made)]
    assert same[0] == same[1]
    for k, check in enumerate(cells(ran, "check"), start=1):
        assert re.search(rf"Not answered yet: .+ answer_{k}\b", json.dumps(check["outputs"]))


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("EVERY_EXERCISE"),
    reason="runs every chapter once more: EVERY_EXERCISE=1 asks for it",
)
def test_every_exercise_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if CACHE:
        monkeypatch.setenv("STIMAGE_CACHE", CACHE)
    workshop.put_chapters(tmp_path, "demo")
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "tools/run_notebooks.py", "--study", "demo", "--out", out]
    command += ["--notebooks", tmp_path / "exercises"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in PATHS:
        assert anatomy.output_problems(nbs.read(out / path.name)) == []


# --- wrong answers ------------------------------------------------------------------------------


def test_every_chapter_has_wrong_answers() -> None:
    """They run in the chapters, see `run_of_demo`; their number is counted there, too."""
    folder = ROOT / "tests" / "wrong_answers"
    assert sorted(p.stem for p in folder.glob("[0-9]*.py")) == NAMES


JUDGED = """
def check_1(answer):
    if answer is None:
        return "Not answered yet: put a number into answer_1."
    {check}
    return "Correct"
"""


@pytest.mark.parametrize(
    ("check", "wrong", "complaint"),
    [
        ('assert answer == 2, "add one and one"', "(1, 'add one'), (3, 'add one')", None),
        ("assert answer == 2", "(1, 'add one'), (3, 'add one')", "says ''"),
        ("assert answer + 1 == 3, 'add'", "('1', 'add one'), (3, 'add')", "says 'TypeError"),
        ("pass", "(1, 'add one'), (3, 'add one')", "says 'Correct'"),
        ('assert answer == 2, "add one and one"', "(1, 'add one')", "1 wrong answers"),
        ('assert answer == 2, "add one and one"', "(1, ''), (3, 'add one')", "not ''"),
    ],
    ids=["helpful", "bare", "crash", "accepted", "few", "anything"],
)
def test_the_judge_notices_a_check_that_does_not_help(
    check: str, wrong: str, complaint: str | None
) -> None:
    judge = (ROOT / "tests" / "wrong_answers" / "judge.py").read_text(encoding="utf-8")
    code = JUDGED.format(check=check) + f"WRONG = {{1: [{wrong}]}}\n" + judge
    if complaint is None:
        exec(code, {})
        return
    with pytest.raises(AssertionError, match=complaint):
        exec(code, {})


def test_the_judge_misses_no_exercise() -> None:
    judge = (ROOT / "tests" / "wrong_answers" / "judge.py").read_text(encoding="utf-8")
    with pytest.raises(AssertionError, match=r"exercises \[1\], but wrong answers to \[\]"):
        exec(JUDGED.format(check="pass") + "WRONG = {}\n" + judge, {})


# --- the folder and the zip ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the edition on demo, as folder and zip, without any pages."""
    folder, unbuilt = tmp_path_factory.mktemp("workshop"), tmp_path_factory.mktemp("unbuilt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STIMAGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        workshop.make(folder, catalog.study("demo"), with_data=False, built=unbuilt)
    return folder


@pytest.fixture
def bundle(out: Path, tmp_path: Path) -> Path:
    """The unpacked zip."""
    with zipfile.ZipFile(out / "workshop.zip") as packed:
        packed.extractall(tmp_path)
    return tmp_path / "stimage-workshop-demo"


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def test_the_zip_holds_the_folder_and_its_checksums(out: Path, bundle: Path) -> None:
    held = files(bundle)
    assert held == files(out / "workshop")
    lines = held.pop("SHA256SUMS").decode().splitlines()
    assert {name: digest for digest, name in (line.split("  ") for line in lines)} == {
        name: hashlib.sha256(content).hexdigest() for name, content in held.items()
    }
    wanted = {f"{kind}/{path.name}" for kind in ("exercises", "solutions") for path in PATHS}
    wanted |= {"README.md", "start.py", "requirements.txt", "LICENSE", "src/helpers/slides.py"}
    wanted |= {"tools/check_environment.py", "results/ladder.json", "book/setup.md"}
    assert wanted <= set(held)
    assert not any(name.startswith("html/") or name.endswith(".pyc") for name in held)
    assert b"$" not in held["README.md"]
    assert b"MIT (simulated by this book)" in held["README.md"]


def prose(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "".join(nbs.source(c) for c in nbs.read(path)["cells"] if c["cell_type"] != "code")


def test_links_between_chapters_and_pages_lead_somewhere(bundle: Path) -> None:
    for path in [*bundle.glob("*s/*.ipynb"), *bundle.glob("book/*.md")]:
        for link in re.findall(r"(?:\]\(|href=\")(?!http)([^)\"#]+)", prose(path)):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_equal_content_is_an_equal_zip(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "workshop", tmp_path / "copy", copy_function=shutil.copyfile)  # new times
    workshop.write_zip(tmp_path / "copy.zip", tmp_path / "copy", "stimage-workshop-demo")
    assert (tmp_path / "copy.zip").read_bytes() == (out / "workshop.zip").read_bytes()


def test_a_failure_leaves_the_last_edition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "workshop").mkdir()
    (tmp_path / "workshop" / "old").touch()
    (tmp_path / "workshop.zip").write_text("old")
    monkeypatch.setattr(workshop, "put_data", lambda *_: "no slides")
    monkeypatch.setattr(workshop, "write_zip", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        workshop.make(tmp_path, catalog.study("demo"), False, tmp_path / "unbuilt")
    assert set(files(tmp_path)) == {"workshop/old", "workshop.zip"}
    assert len(list(tmp_path.iterdir())) == 2


ALONE = """
import socket, sys
socket.socket.connect = lambda *_: sys.exit("the network was asked")
import helpers
from helpers import simulate, slides
root = simulate.demo_root()
adata = slides.load("Demo_Layers_Simulated_ST_A1")
print(helpers.__file__, root, adata.n_obs > 100, sep="\\n")
"""


def test_the_folder_works_alone_and_unplugged(bundle: Path) -> None:
    (there,) = (bundle / "data").glob("demo-*")
    before = files(there)
    call = (
        f"start.subprocess.call([start.sys.executable, '-c', {ALONE!r}], env=start.environment())"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("STIMAGE", "PYTHONPATH"))}
    command = [sys.executable, "-c", f"import start; start.sys.exit({call})"]
    done = subprocess.run(
        command, cwd=bundle, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    helpers, root, loaded = done.stdout.split()
    assert Path(helpers) == bundle / "src" / "helpers" / "__init__.py"
    assert Path(root) == there
    assert loaded == "True"
    assert files(there) == before
    assert "simulating" not in done.stderr


def test_the_slides_of_a_real_study_are_where_start_looks(bundle: Path) -> None:
    (bundle / "data" / "STimage-1K4M").mkdir()
    code = "import start; print(start.environment()['STIMAGE_ROOT'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == bundle / "data" / "STimage-1K4M"


def test_jupyterlab_starts_on_the_exercises(bundle: Path) -> None:
    command = [sys.executable, "start.py", "--version"]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+", done.stdout.strip())


def test_the_environment_check_works_in_the_folder(bundle: Path) -> None:
    command = [sys.executable, "-S", "-I", bundle / "tools" / "check_environment.py"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert re.search(r"^OK +Workshop +\d+ files, all as they were packed", done.stdout, re.M)
    assert re.search(r"^FAIL +torch .*not installed", done.stdout, re.M)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "status"),
    [("exercises/01_loading.ipynb", "OK"), ("src/helpers/slides.py", "FAIL")],
    ids=["an exercise that was worked on", "a file that was not unpacked whole"],
)
def test_the_environment_check_notices_a_damaged_file(bundle: Path, name: str, status: str) -> None:
    (bundle / name).write_text("something else")
    ((found, _, said),) = check_environment.bundle(bundle)
    assert found == status
    assert (name in said) == (status == "FAIL")


def test_outside_of_the_workshop_edition_there_is_no_such_line() -> None:
    assert list(check_environment.bundle(ROOT)) == []


# --- data and book of a study -------------------------------------------------------------------


@pytest.fixture
def mob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> catalog.Study:
    """The study, with files of the right names in STIMAGE_ROOT, and nothing trained."""
    study = catalog.study("mob")
    paths = [
        catalog.relative_path(section.slide, kind, section.tech)
        for section in study.sections
        for kind in ("coord", "gene_exp", "image", "annotation")
    ]
    for path in [*paths, catalog.METADATA]:
        (tmp_path / "root" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / path).write_text(str(path))
    monkeypatch.setenv("STIMAGE_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "cache"))
    return study


def test_slides_without_an_open_licence_stay_at_home(tmp_path: Path, mob: catalog.Study) -> None:
    (tmp_path / "made").mkdir()
    said = workshop.put_data(tmp_path / "made", mob, with_data=False)
    assert said.startswith(f"no slides (licence: {mob.licence})")
    assert files(tmp_path / "made") == {}


def test_slides_come_along_in_the_official_layout(tmp_path: Path, mob: catalog.Study) -> None:
    (tmp_path / "made").mkdir()
    assert workshop.put_data(tmp_path / "made", mob, with_data=True).startswith("the slides")
    assert files(tmp_path / "made" / "data" / "STimage-1K4M") == files(tmp_path / "root")


def test_only_models_of_the_study_travel(tmp_path: Path, mob: catalog.Study) -> None:
    ours, other = mob.sections[0].slide, catalog.study("demo").sections[0].slide
    seen = {"ours": [ours], "other": [other], "both": [ours, other], "unknown": None}
    for name, slides in seen.items():
        folder = tmp_path / "cache" / "models" / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        (folder / "settings.json").write_text(json.dumps({"slides": slides} if slides else {}))
    (tmp_path / "made").mkdir()
    said = workshop.put_data(tmp_path / "made", mob, with_data=False)
    assert [p.name for p in (tmp_path / "made" / "data" / "models").iterdir()] == ["ours"]
    assert said.endswith("; models trained on them: 1")


def test_too_many_slides_stay_at_home(
    tmp_path: Path, mob: catalog.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    monkeypatch.setattr(workshop, "LIMIT_GB", 0)
    said = workshop.put_data(tmp_path / "made", mob, with_data=True)
    assert "too large" in said
    assert files(tmp_path / "made") == {}


def test_a_slide_that_cannot_be_had_is_named(
    tmp_path: Path, mob: catalog.Study, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    next((tmp_path / "root").rglob("*_count.csv")).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ["--study", "mob", "--with-data", "--out", str(tmp_path / "out")]
    assert workshop.main(options) == 1
    assert "_count.csv" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("built", "helpers", "said"),
    [
        (False, run_notebooks.helpers_digest(), "not here: the book was not built"),
        (True, "others", "not here: the book is out of date (src/helpers has changed"),
        (True, run_notebooks.helpers_digest(), "the book: open"),
    ],
    ids=["not built", "out of date", "built"],
)
def test_the_book_comes_along_if_it_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: bool, helpers: str, said: str
) -> None:
    monkeypatch.setattr(workshop, "ROOT", tmp_path)
    (tmp_path / "_toc.yml").write_text("root: book/welcome\n")
    record = {"study": "demo", "complete": True, "helpers": helpers, "chapters": {}}
    for name, text in (("html/index.html", "page"), ("notebooks/run.json", json.dumps(record))):
        path = tmp_path / "built" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if built:
            path.write_text(text)
    assert workshop.put_book(tmp_path / "made", "demo", tmp_path / "built").startswith(said)
    assert (tmp_path / "made" / "html" / "index.html").exists() == said.startswith("the book")


def test_the_book_comes_without_its_own_zip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workshop, "ROOT", tmp_path)
    monkeypatch.setattr(workshop, "refusals", lambda *_: [])
    (tmp_path / "_toc.yml").write_text("root: book/welcome\n")
    built = tmp_path / "built"
    for name in ("html/index.html", "html/stimage-book.zip.sha256", "notebooks/run.json"):
        (built / name).parent.mkdir(parents=True, exist_ok=True)
        (built / name).write_text("{}")
    (built / "html/setup.html").write_text('<a class="offline-copy" href="stimage-book.zip">it</a>')
    (built / "html" / "stimage-book.zip").touch()
    workshop.put_book(tmp_path / "made", "demo", built)
    assert files(tmp_path / "made" / "html") == {"index.html": b"{}", "setup.html": b"it"}


# --- the page for teachers ----------------------------------------------------------------------


def test_the_tracks_agree_with_the_chapters() -> None:
    teaching_page.tracks_agree(ROOT)


def test_the_page_for_teachers_has_a_word_on_every_chapter() -> None:
    teaching_page.has_a_word_on_every_chapter(ROOT)
