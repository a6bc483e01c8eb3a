"""The scripts that run, check and build the book."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import until

import anatomy
import build_book
import check_environment
import notebooks as nbs
import run_notebooks
from helpers import catalog
from helpers.files import sha256
from new_chapter import chapter

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two small chapters."""
    made = tmp_path / "notebooks"
    made.mkdir()
    for name in ("01_small", "02_other"):
        nbs.write(chapter(name), made / f"{name}.ipynb")
    return made


@pytest.fixture
def mob(tmp_path: Path) -> Path:
    """A dataset root with the names of the files of `mob`, but nothing in them."""
    for section in catalog.study("mob").sections:
        for kind in ("coord", "gene_exp", "image"):
            path = tmp_path / "root" / catalog.relative_path(section.slide, kind, section.tech)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return tmp_path / "root"


def change(path: Path, cell: str, source: str) -> None:
    notebook = nbs.read(path)
    next(c for c in notebook["cells"] if c["id"] == cell)["source"] = source
    nbs.write(notebook, path)


def script(name: str, *options: Any, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / f"{name}.py", *map(str, options)]
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    inherited = {k: v for k, v in os.environ.items() if k != "STUDY"} | {"PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=inherited | env)


# --- stripping ----------------------------------------------------------------------------------


def test_strip_removes_what_an_editor_leaves(tmp_path: Path) -> None:
    notebook = chapter()
    notebook["metadata"]["language_info"] = {"name": "python", "version": "3.11.7"}
    for cell in notebook["cells"]:
        cell["metadata"]["collapsed"] = True
        if cell["cell_type"] == "code":
            cell["execution_count"] = 7
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x"}]
    nbs.write(notebook, tmp_path / "01_small.ipynb")
    assert anatomy.main(["check", str(tmp_path / "01_small.ipynb")]) == 1
    assert anatomy.main(["strip", str(tmp_path / "01_small.ipynb")]) == 0
    assert nbs.read(tmp_path / "01_small.ipynb") == chapter()
    assert anatomy.main(["check", str(tmp_path / "01_small.ipynb")]) == 0


# --- running ------------------------------------------------------------------------------------


def test_a_run_shows_progress_and_leaves_clean_copies(
    folder: Path, tmp_path: Path, mob: Path
) -> None:
    change(folder / "02_other.ipynb", "code-1", "import os\nprint(os.getcwd())\nx = bytes(10**8)")
    out = tmp_path / "out"
    options = ("--notebooks", folder, "--out", out, "--study", "mob")
    done = script("run_notebooks", *options, STIMAGE_ROOT=str(mob), MPLBACKEND="TkAgg")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"Study mob · dataset root: {mob}"
    for name, line in zip(("01_small", "02_other"), lines[1:3], strict=True):
        assert re.fullmatch(rf"  {name}  ok +[\d.]+ s  peak [\d.]+ GB", line)
    text = (out / "01_small.ipynb").read_text(encoding="utf-8")
    assert "papermill" not in text
    assert str(tmp_path) not in text
    second = nbs.read(out / "02_other.ipynb")
    assert set(second["metadata"]) == {"kernelspec"}
    injected = next(c for c in second["cells"] if c["id"] == "injected-parameters")
    assert 'STUDY = "mob"' in nbs.source(injected)
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert (record["study"], record["complete"]) == ("mob", True)
    assert record["chapters"]["02_other"]["peak_mb"] > 100
    assert record["chapters"]["01_small"]["source"] == sha256(folder / "01_small.ipynb")


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ('x = {}\nx["spot"]', "KeyError: 'spot'"),
        ("import os\nos._exit(3)", "DeadKernelError"),
        ("while True: pass", "CellTimeoutError"),
    ],
    ids=["exception", "dead kernel", "timeout"],
)
def test_a_failing_cell_stops_the_run_and_is_shown(
    folder: Path, tmp_path: Path, source: str, seen: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "good").write_text("the last good run")
    change(folder / "01_small.ipynb", "code-2", source)
    number = [c["id"] for c in nbs.read(folder / "01_small.ipynb")["cells"]].index("code-2") + 1
    done = script("run_notebooks", "--notebooks", folder, "--out", out, "--timeout", 10)
    assert done.returncode == 1
    assert done.stdout.rstrip().endswith("01_small  FAILED")  # and 02_other did not run
    head = f"chapter 01_small, cell code-2 (number {number}): {seen}"
    assert head in done.stderr
    assert source in done.stderr
    assert [p.name for p in out.iterdir()] == ["good"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out.")] == []


def test_a_chapter_leaves_nothing_for_another_to_find(folder: Path, tmp_path: Path) -> None:
    change(folder / "01_small.ipynb", "code-2", 'open("table.csv", "w").close()')
    done = script("run_notebooks", "01", "--notebooks", folder, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "chapter 01_small left behind table.csv" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_traceback_is_in_sight(folder: Path, tmp_path: Path) -> None:
    change(folder / "01_small.ipynb", "code-2", "def f():\n    return 1 / 0\n\n\nf()")
    done = script("run_notebooks", "--notebooks", folder, "--out", tmp_path / "out")
    assert "----> 5 f()" in done.stderr
    assert "----> 2     return 1 / 0" in done.stderr.replace("      2 ", "")
    assert "\x1b[" not in done.stderr


def test_some_chapters_alone(folder: Path, tmp_path: Path) -> None:
    done = script("run_notebooks", "02", "--notebooks", folder, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert list(record["chapters"]) == ["02_other"]
    assert not record["complete"]


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write the chapters without running them; return the list of those that would have run."""
    names = []

    async def run_one(path: Path, out: Path, _: list[str]) -> None:
        names.append(path.stem)
        out.mkdir(parents=True)
        shutil.copyfile(path, out / path.name)
        record = {"seconds": 1.0, "peak_mb": 1, "source": sha256(path)}
        (out / "run.json").write_text(json.dumps(record))

    monkeypatch.setattr(run_notebooks, "run_one", run_one)
    return names


@pytest.mark.parametrize("changed", ["nothing", "chapter", "helpers", "data", "study"])
def test_a_chapter_runs_again_when_something_has_changed(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    executed: list[str],
    changed: str,
) -> None:
    def book(study: str) -> dict[str, Any]:
        return run_notebooks.run(
            folder, tmp_path / "out", study, ["01"], 60, keep=tmp_path / "kept"
        )

    root = tmp_path / "root"
    root.mkdir()
    (root / "slide.csv").write_text("1")
    monkeypatch.setenv("STIMAGE_ROOT", str(root))
    first = book("mob")
    if changed == "chapter":
        change(folder / "01_small.ipynb", "setup", "a = 2")
    if changed == "helpers":
        monkeypatch.setattr(run_notebooks, "helpers_digest", lambda: "other")
    if changed == "data":
        (root / "slide.csv").write_text("12")
    second = book("her2st" if changed == "study" else "mob")
    assert len(executed) == (1 if changed == "nothing" else 2)
    assert changed != "nothing" or second == first
    assert (tmp_path / "out" / "01_small.ipynb").exists()


def test_compiled_code_is_no_part_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba compiles while the chapters run; the pages still belong to the same helpers."""
    package = tmp_path / "src" / "helpers"
    (package / "__pycache__").mkdir(parents=True)
    (package / "tiles.py").write_text("A = 1\n")
    monkeypatch.setattr(run_notebooks, "ROOT", tmp_path)
    before = run_notebooks.helpers_digest()
    (package / "__pycache__" / "tiles.cut-1.py311.nbi").write_bytes(b"compiled")
    assert run_notebooks.helpers_digest() == before
    (package / "page.html").write_text("<p>")
    assert run_notebooks.helpers_digest() != before


def test_a_chapter_that_failed_is_not_kept_and_those_before_it_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executed: list[str]
) -> None:
    works = run_notebooks.run_one

    async def fails(path: Path, out: Path, options: list[str]) -> None:
        if path.stem == "02_other":
            raise run_notebooks.NotebookError(path.stem, "cell 3")
        await works(path, out, options)

    monkeypatch.setattr(run_notebooks, "run_one", fails)
    with pytest.raises(run_notebooks.NotebookError, match="cell 3"):
        run_notebooks.run(folder, tmp_path / "out", "demo", None, 60, tmp_path / "kept")
    assert [p.name.partition("-")[0] for p in tmp_path.glob("kept/*")] == ["01_small"]
    monkeypatch.setattr(run_notebooks, "run_one", works)
    run_notebooks.run(folder, tmp_path / "out", "demo", None, 60, tmp_path / "kept")
    assert executed == ["01_small", "02_other"]  # the second run goes on where the first stopped


@pytest.fixture
def also(tmp_path: Path) -> Path:
    """Code to run after chapter 1, which sees a variable of the chapter."""
    made = tmp_path / "also"
    made.mkdir()
    (made / "01_small.py").write_text("asked = [check_1(1 + 1)]\n")
    (made / "judge.py").write_text('print("judged")\nassert asked == ["Correct: the sum"]\n')
    return made


def test_what_runs_after_a_chapter_is_not_written(folder: Path, tmp_path: Path, also: Path) -> None:
    with (also / "judge.py").open("a") as judge:
        judge.write(f"open({str(also / 'ran')!r}, 'w')")
    options = ("--notebooks", folder, "--jobs", "2", "--out", tmp_path / "out", "--also", also)
    done = script("run_notebooks", *options)
    assert done.returncode == 0, done.stderr
    assert (also / "ran").exists()
    for path in folder.glob("*.ipynb"):
        cells = nbs.read(tmp_path / "out" / path.name)["cells"]
        assert [c["id"] for c in cells] == [c["id"] for c in nbs.read(path)["cells"]]
        assert "judged" not in printed(cells) != ""


def test_what_fails_after_a_chapter_stops_the_run(folder: Path, tmp_path: Path, also: Path) -> None:
    (also / "01_small.py").write_text("asked = []\n")
    options = ("01", "--notebooks", folder, "--out", tmp_path / "out", "--also", also)
    done = script("run_notebooks", *options)
    assert done.returncode == 1
    assert "chapter 01_small, cell also (added for this run)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_chapter_runs_again_when_what_runs_after_it_has_changed(
    folder: Path, tmp_path: Path, executed: list[str], also: Path
) -> None:
    def book() -> list[str]:
        executed.clear()
        keep = tmp_path / "kept"
        run_notebooks.run(folder, tmp_path / "out", "demo", None, 60, keep, also=also)
        return executed

    assert book() == ["01_small", "02_other"]
    assert book() == []
    (also / "judge.py").write_text("")
    assert book() == ["01_small"]  # nothing runs after chapter 2


def printed(cells: list[dict]) -> str:
    """Everything the cells print, whole: a kernel cuts it into pieces as time has it."""
    outputs = (output for cell in cells for output in cell.get("outputs", []))
    return "".join("".join(output["text"]) for output in outputs if "text" in output)


def test_chapters_side_by_side_give_what_one_by_one_gives(folder: Path, tmp_path: Path) -> None:
    nbs.write(chapter("08_last"), folder / "08_last.ipynb")
    for jobs in ("1", "2"):
        options = ("--notebooks", folder, "--out", tmp_path / jobs, "--jobs", jobs)
        done = script("run_notebooks", *options)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / jobs / "run.json").read_text()) for jobs in ("1", "2"))
    assert list(one["chapters"]) == list(two["chapters"])
    for name in one["chapters"]:
        cells = [nbs.read(tmp_path / jobs / f"{name}.ipynb")["cells"] for jobs in ("1", "2")]
        one_by_one, side_by_side = (printed(chapter_cells) for chapter_cells in cells)
        assert one_by_one == side_by_side != ""


def test_a_failure_stops_the_chapters_beside_it(folder: Path, tmp_path: Path) -> None:
    change(folder / "02_other.ipynb", "code-1", "import threading\nthreading.Event().wait()")
    nbs.write(chapter("03_more"), folder / "03_more.ipynb")
    change(folder / "03_more.ipynb", "code-2", 'x = {}\nx["spot"]')
    options = ("--notebooks", folder, "--out", tmp_path / "out", "--jobs", "2")
    done = script("run_notebooks", *options)
    assert done.returncode == 1
    assert done.stdout.rstrip().endswith("03_more   FAILED")
    assert "chapter 03_more, cell code-2" in done.stderr
    assert done.stderr.count("are unchanged") == 1
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == []


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_order_of_chapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    begun, ended, together = [], [], []

    async def run_one(path: Path, *_: object) -> None:
        together.append(len(begun) - len(ended))
        await asyncio.sleep(0)  # others may begin

    def start(path: Path) -> None:
        assert path.stem == "01" or "01" in ended
        assert path.stem not in ("08", "11") or "07" in ended
        begun.append(path.stem)

    monkeypatch.setattr(run_notebooks, "run_one", run_one)
    folders = {Path(name): tmp_path for name in ("01", "02", "03", "05", "07", "08", "11")}
    asyncio.run(run_notebooks.run_all(folders, jobs, [], start, lambda p: ended.append(p.stem)))
    assert begun[:3] == ["01", "07", "05"]  # the longest ones early
    assert set(begun) == {path.stem for path in folders}
    assert max(together) == jobs


def test_chapters_of_which_the_first_is_here_do_not_wait(
    tmp_path: Path, executed: list[str]
) -> None:
    folders = {Path(tmp_path / f"{name}.ipynb"): tmp_path / name for name in ("09_b", "02_a")}
    for path in folders:
        path.write_text("{}")
    asyncio.run(run_notebooks.run_all(folders, 1, [], lambda _: None, lambda _: None))
    assert executed == ["09_b", "02_a"]


def test_an_ended_run_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """No processes, no folders: as for the stop button of a CI server."""
    ready = tmp_path / "ready"
    code = (
        f"import os, pathlib, threading\npathlib.Path({str(ready)!r}).write_text(str(os.getpid()))"
    )
    change(folder / "01_small.ipynb", "code-1", f"{code}\nthreading.Event().wait()")
    command = [sys.executable, ROOT / "tools" / "run_notebooks.py", "--notebooks", folder]
    command += ["--out", tmp_path / "out"]
    (tmp_path / "temporary").mkdir()
    env = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env) as running:
        kernel = int(until(lambda: ready.exists() and ready.read_text(), "the chapter"))
        running.terminate()
        assert running.wait(120) == 143
    until(lambda: not psutil.pid_exists(kernel), "the end of the kernel")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == []
    assert list((tmp_path / "temporary").glob("chapter-*")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [(["09"], "There is no chapter 09"), (["--study", "nope"], "nope")],
)
def test_a_typing_error_is_explained(
    folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = script("run_notebooks", *options, "--notebooks", folder, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_relative_dataset_root_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STIMAGE_ROOT", "../slides")
    run_notebooks.absolute_paths()
    assert os.environ["STIMAGE_ROOT"] == str(tmp_path.parent / "slides")


def test_a_missing_slide_is_said_before_any_chapter_runs(
    folder: Path, tmp_path: Path, mob: Path
) -> None:
    next(mob.rglob("*_count.csv")).unlink()
    env = {"STIMAGE_ROOT": str(mob), "HF_HUB_OFFLINE": "1"}
    options = ("--notebooks", folder, "--out", tmp_path / "out", "--study", "mob")
    done = script("run_notebooks", *options, **env)
    assert done.returncode == 1
    assert "_count.csv" in done.stderr
    assert "Traceback" not in done.stderr
    assert "01_small" not in done.stdout


# --- building -----------------------------------------------------------------------------------


@pytest.fixture
def record(folder: Path) -> dict[str, Any]:
    """A record of a full run of the only chapter in the table of contents."""
    (folder.parent / "_toc.yml").write_text("root: book/welcome\n- file: notebooks/01_small\n")
    ran = {"seconds": 1.0, "peak_mb": 100, "source": sha256(folder / "01_small.ipynb")}
    helpers, chapters = run_notebooks.helpers_digest(), {"01_small": ran}
    return {"study": "demo", "helpers": helpers, "complete": True, "chapters": chapters}


def refusals(record: dict[str, Any], folder: Path) -> list[str]:
    (folder / "run.json").write_text(json.dumps(record))
    return build_book.refusals(folder, folder.parent, "demo")


def test_a_full_run_may_be_built(record: dict[str, Any], folder: Path) -> None:
    assert refusals(record, folder) == []


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("study", "mob", "ran on mob"),
        ("complete", False, "only some"),
        ("helpers", "0", "src/helpers has changed"),
        ("chapters", {}, "has not run"),
        ("chapters", {"01_small": {"source": "0"}}, "has changed since it ran"),
    ],
)
def test_pages_of_another_run_are_refused(
    record: dict[str, Any], folder: Path, key: str, value: Any, reason: str
) -> None:
    (found,) = refusals(record | {key: value}, folder)
    assert reason in found


def test_pages_are_not_built_from_nothing(tmp_path: Path) -> None:
    done = script("build_book", "--out", tmp_path)
    assert done.returncode == 1
    assert "no chapter has run on demo" in done.stderr
    assert "make book" in done.stderr


def small_book(tmp_path: Path, page: str) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "_config.yml").write_text("title: Small\nexecute:\n  execute_notebooks: 'off'\n")
    (source / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    (source / "index.md").write_text(page)
    return source


def test_new_pages_replace_the_old_ones(tmp_path: Path) -> None:
    html = tmp_path / "html"
    html.mkdir()
    (html / "old.html").write_text("old")
    assert build_book.build(small_book(tmp_path, "# New\n"), html)
    assert (html / "index.html").exists()
    assert not (html / "old.html").exists()
    assert not list(tmp_path.glob("html.*"))


def test_a_warning_is_an_error_and_leaves_the_old_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html = tmp_path / "html"
    html.mkdir()
    (html / "old.html").write_text("old")
    assert not build_book.build(small_book(tmp_path, "# New\n\n{ref}`nowhere`\n"), html)
    assert [p.name for p in html.iterdir()] == ["old.html"]
    assert "nowhere" in capsys.readouterr().err


# --- the environment check ----------------------------------------------------------------------


def test_the_check_has_a_line_for_everything() -> None:
    done = script("check_environment")
    lines = done.stdout.splitlines()[:-1]
    assert all(re.match(r"(OK|NOTE|FAIL) +\S", line) for line in lines)
    looked = {line[6:24].strip() for line in lines}
    assert looked >= {"Python", "torch", "GPU", "Memory", "Disk", "Dataset", "Hub", "papermill"}
    assert done.returncode == any(line.startswith("FAIL") for line in lines)


def test_the_check_works_before_anything_is_installed() -> None:
    command = [sys.executable, "-S", "-I", ROOT / "tools" / "check_environment.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"^FAIL +torch .*not installed", done.stdout, re.M)
    assert "Traceback" not in done.stderr


def test_a_dataset_root_without_slides_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STIMAGE_ROOT", str(tmp_path))
    ((status, _, found),) = check_environment.dataset()
    assert status == "FAIL"
    assert str(tmp_path) in found


def test_a_dataset_root_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ST" / "coord").mkdir(parents=True)
    for name in "AB":
        (tmp_path / "ST" / "coord" / f"{name}_coord.csv").touch()
    monkeypatch.setenv("STIMAGE_ROOT", str(tmp_path))
    ((status, _, found),) = check_environment.dataset()
    assert (status, found.split()[0]) == ("OK", "2")


def test_a_cache_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    ((status, _, found),) = check_environment.disk()
    assert status == "FAIL"
    assert "STIMAGE_CACHE" in found


def test_a_hub_that_answers_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        ((status, _, _),) = check_environment.hub(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert status == "OK"


def test_a_silent_hub_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    start = time.monotonic()
    ((status, _, _),) = check_environment.hub("http://192.0.2.1")  # reserved: nobody answers there
    assert status == "NOTE"
    assert time.monotonic() - start < 10


# --- installing ---------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile and its scripts, with an interpreter that only pretends to install."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tools").mkdir()
    for name in ("python.sh", "install.sh"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools" / name)
    fake = tmp_path / "fake-python"
    fake.write_text(
        "#!/bin/sh\n"
        'echo "$@" >> calls\n'
        'case "$1 $2" in\n'
        '"-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/uv;;\n'
        '"pip install") if [ -e broken ]; then exit 1; fi;;\n'
        "esac\n"
    )
    fake.chmod(0o755)
    return tmp_path


def make(checkout: Path, target: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": "./fake-python"}
    return subprocess.run(
        ["make", target], cwd=checkout, capture_output=True, text=True, check=False, env=env
    )


def installs(checkout: Path) -> int:
    return (checkout / "calls").read_text().count("-m venv")


def test_the_second_run_installs_nothing(checkout: Path) -> None:
    assert make(checkout, ".venv/installed").returncode == 0
    assert make(checkout, ".venv/installed").returncode == 0
    assert installs(checkout) == 1
    later = time.time() + 5
    os.utime(checkout / "requirements.txt", (later, later))
    assert make(checkout, ".venv/installed").returncode == 0
    assert installs(checkout) == 2


def test_an_interrupted_installation_is_started_again(checkout: Path) -> None:
    (checkout / "broken").touch()
    assert make(checkout, ".venv/installed").returncode != 0
    assert not (checkout / ".venv" / "installed").exists()
    (checkout / ".venv" / "leftover").touch()
    (checkout / "broken").unlink()
    assert make(checkout, ".venv/installed").returncode == 0
    assert not (checkout / ".venv" / "leftover").exists()
    assert installs(checkout) == 2


def test_no_suitable_python_is_said_clearly(checkout: Path) -> None:
    (checkout / "fake-python").write_text("#!/bin/sh\nexit 1\n")
    done = make(checkout, ".venv/installed")
    assert done.returncode != 0
    assert "No Python 3.11 or newer was found" in done.stderr
    assert not (checkout / ".venv").exists()
