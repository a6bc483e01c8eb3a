"""Execute the chapters with papermill, one progress line each, into _build/<study>/notebooks.

Some chapters run at a time, each with its share of the cores: a small training on many threads
mostly waits for itself. ``--jobs 1`` (or JOBS=1) runs one after the other.

The folder also gets ``run.json``: what ran, from which sources, how long and with how much memory.
``tools/build_book.py`` builds pages only from such a record, and only while it still fits.

A chapter that ran is kept in _build/chapters and taken from there while nothing has changed that it
depends on, so that a book which stopped at chapter 7 goes on at chapter 7; ``--fresh`` runs all.

``--also FOLDER`` runs code of a folder after the last cell of a chapter, in its kernel; what is
written and kept is the chapter without it (tests/wrong_answers asks the chapters' checks this way).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import notebooks as nbs

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "notebooks"
KEPT = ROOT / "_build" / "chapters"
RECORD = "run.json"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
GB_PER_CHAPTER = 4
ALSO = "also"
"""The id of the cell that ``--also`` adds."""
FIRST = "01"
"""Chapter 1 runs alone: it has the data ready for all others."""
WAIT_FOR = {"08": "07", "09": "07", "10": "07", "11": "07"}
"""These use the tower that chapter 7 trains; at the same time, each would train its own."""
LONG = ("07", "08", "05", "11", "09")
"""Begun before others, from the longest on, so that no core is idle at the end."""
BEHIND = (
    "behind: what a chapter keeps belongs in the cache, by a helper, so that all run in any order"
)
UNTOUCHED = "The pages of the last good run, if there are any, are untouched."

Show = Callable[[list[str]], None]  # takes the names of the chapters that run now


class NotebookError(RuntimeError):
    """A cell of a chapter failed; the message holds the chapter, the cell and the traceback."""

    def __init__(self, chapter: str, message: str) -> None:
        super().__init__(message)
        self.chapter = chapter


@dataclass(frozen=True)
class Run:
    """One executed chapter: seconds, peak memory in MB, and the digest of its source."""

    seconds: float
    peak_mb: float
    source: str


class PeakMemory(threading.Thread):
    """Watch the kernels that this process starts; ``stop()`` returns their peak in MB."""

    def __init__(self, every: float = 0.2) -> None:
        super().__init__(daemon=True)
        self.every, self.peak, self.done = every, 0, threading.Event()

    def run(self) -> None:
        """Sample the resident memory of all child processes until stopped."""
        import psutil

        me = psutil.Process()
        while not self.done.wait(self.every):
            total = 0
            for child in me.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.NoSuchProcess:
                    continue  # it ended between being listed and being asked
            self.peak = max(self.peak, total)

    def stop(self) -> float:
        """Stop sampling."""
        self.done.set()
        self.join()
        return self.peak / 1e6


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def helpers_digest() -> str:
    """Return one SHA-256 over the helper package: its code is part of what made a page."""
    total = hashlib.sha256()
    code = (p for p in (ROOT / "src" / "helpers").rglob("*") if p.suffix in (".py", ".json"))
    for path in sorted(code):
        total.update(f"{path.name} {digest(path)}\n".encode())
    return total.hexdigest()


def surroundings(study: str) -> str:
    """Return one SHA-256 over all that chapters share: helpers, packages, results and data."""
    packages = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    total = hashlib.sha256(f"{sys.version} {study} {helpers_digest()} {packages}".encode())
    for path in sorted((ROOT / "results").glob("*.json")):
        total.update(f"{path.name} {digest(path)}\n".encode())
    root = os.environ.get("STIMAGE_ROOT")  # without one, data come from helpers or a pinned hub
    for path in sorted(Path(root).rglob("*")) if root and study != "demo" else ():
        stat = path.stat()
        total.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return total.hexdigest()


def chapters(folder: Path, names: list[str] | None = None) -> list[Path]:
    """Return the notebooks in order; ``names`` picks some by number, name or start of the name."""
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise SystemExit(f"There is no notebook in {folder}.")
    for name in names or []:
        if not any(p.stem.startswith(Path(name).stem) for p in found):
            raise SystemExit(
                f"No notebook is called {name}. There are: {', '.join(p.stem for p in found)}."
            )
    return [p for p in found if not names or any(p.stem.startswith(Path(n).stem) for n in names)]


def absolute_paths() -> None:
    """Make relative paths of the caller absolute: a chapter runs in a folder of its own."""
    for name in ("STIMAGE_ROOT", "STIMAGE_CACHE", "HF_HOME"):
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).expanduser().resolve())


def no_progress_bars() -> None:
    """Turn progress bars off: they are for readers at a keyboard, on a page they are noise."""
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def usual_jobs() -> int:
    """Return how many chapters this machine runs at a time: as cores and memory allow, up to 4."""
    import joblib
    import psutil

    room = int(psutil.virtual_memory().total / 1e9 / GB_PER_CHAPTER)
    return max(1, min(4, joblib.cpu_count(), room))


def kernel_environment(jobs: int = 1) -> None:
    """Set what every kernel inherits; with several jobs, each gets its share of the cores."""
    import joblib

    no_progress_bars()
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, joblib.cpu_count() // jobs)))
    os.environ.pop("MPLBACKEND", None)  # figures go to the page, whatever the shell prefers
    # Threads that spin for long while they wait slow training down 8 times on a busy machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if "OMP_NUM_THREADS" in os.environ:  # numba's number of threads becomes that of torch, too
        os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    os.environ |= {
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not one in the home folder
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONWARNINGS": "ignore::SyntaxWarning:docrep.decorators",  # whenever squidpy is imported
    }


def differing(notebook: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return those of the wanted parameters that the notebook does not already have."""
    (cell,) = [c for c in notebook["cells"] if "parameters" in nbs.tags(c)]
    have = {
        s.targets[0].id: ast.literal_eval(s.value)
        for s in ast.parse(nbs.source(cell)).body
        if isinstance(s, ast.Assign)
    }
    return {k: v for k, v in wanted.items() if have.get(k) != v}


def also_code(path: Path, also: Path | None) -> str:
    """Return what runs after a chapter: ``<chapter>.py``, then what ``judge.py`` does with it."""
    own = also / f"{path.stem}.py" if also else None
    if not (own and own.exists()):
        return ""
    return "\n".join(p.read_text(encoding="utf-8") for p in (own, also / "judge.py"))


def proof(path: Path, also: Path | None) -> str:
    """Return the name of the mark that a kept chapter has passed what runs after it, or ""."""
    code = also_code(path, also)
    return f"also-{hashlib.sha256(code.encode()).hexdigest()[:16]}" if code else ""


def clean(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return an executed notebook without times, local paths and papermill's own marks."""
    cells = []
    for cell in (c for c in notebook["cells"] if c.get("id") != ALSO):
        kept = {k: v for k, v in cell["metadata"].items() if k in nbs.CELL_METADATA}
        cell = {**cell, "metadata": kept}
        if "injected-parameters" in kept.get("tags", []):
            cell["id"] = "injected-parameters"
        cells.append(cell)
    return {**notebook, "cells": cells, "metadata": {"kernelspec": nbs.KERNEL}}


def failure(path: Path, executed: dict[str, Any], error: Exception) -> str:
    """Return the message for a failed cell: chapter, cell, its code, the traceback.

    Works for an exception in a cell, for a cell out of time, and for a kernel that died.
    """
    code = [c for c in executed["cells"] if c["cell_type"] == "code"]
    bad = next(c for c in reversed(code) if c["metadata"].get("papermill", {}).get("start_time"))
    ids = [c["id"] for c in nbs.read(path)["cells"]]
    number = ids.index(bad["id"]) + 1 if bad["id"] in ids else "added for this run"
    traceback = "\n".join(getattr(error, "traceback", [str(error)]))
    kind = getattr(error, "ename", type(error).__name__)
    what = f"{kind}: {getattr(error, 'evalue', error)}".splitlines()[0]
    head = f"chapter {path.stem}, cell {bad['id']} (number {number}): {what}"
    return f"{head}\n\n{nbs.source(bad).rstrip()}\n\n{ANSI.sub('', traceback).rstrip()}\n\n{head}"


def execute(path: Path, out: Path, study: str, timeout: int, also: Path | None = None) -> Run:
    """Execute one chapter in a fresh kernel and a folder of its own; write it to ``out``.

    Code of ``also`` runs after its last cell, and is not written.

    Raises
    ------
    NotebookError
        A cell failed.  Nothing is written to ``out``.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    notebook = nbs.read(path)
    wanted = differing(notebook, {"STUDY": study})
    if code := also_code(path, also):
        cell = {"cell_type": "code", "id": ALSO, "source": code, "metadata": {}, "outputs": []}
        notebook["cells"].append(cell | {"execution_count": None})
    start, memory = time.perf_counter(), PeakMemory()
    memory.start()
    with tempfile.TemporaryDirectory(prefix="chapter-") as folder:
        source, scratch = Path(folder) / f"source-{path.name}", Path(folder) / path.name
        nbs.write(notebook, source)
        try:
            papermill.execute_notebook(
                source, scratch, wanted, cwd=folder, kernel_name="python3", progress_bar=False,
                execution_timeout=timeout, **kernel_settings(),
            )  # fmt: skip
        except (PapermillExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise NotebookError(path.stem, failure(path, nbs.read(scratch), error)) from None
        finally:
            peak = memory.stop()
        if left := sorted(p.name for p in Path(folder).iterdir() if p not in (scratch, source)):
            raise NotebookError(path.stem, f"chapter {path.stem} leaves {', '.join(left)} {BEHIND}")
        done, seconds = nbs.read(scratch), time.perf_counter() - start
        nbs.write(clean(done), out / path.name)
    for cell in (c for c in done["cells"] if c.get("id") == ALSO):  # no part of the chapter
        seconds -= cell["metadata"]["papermill"]["duration"]
    return Run(round(seconds, 1), round(peak), digest(path))


def place_to_keep(path: Path, keep: Path, shared: str) -> Path:
    """Return where a chapter is kept that ran with this source in these surroundings."""
    key = hashlib.sha256(f"{digest(path)} {shared}".encode()).hexdigest()[:16]
    return keep / f"{path.stem}-{key}"


def take(path: Path, out: Path, folder: Path) -> Run:
    """Copy an executed chapter from a folder that holds its record, too."""
    shutil.copyfile(folder / path.name, out / path.name)
    return Run(**json.loads((folder / RECORD).read_text(encoding="utf-8")))


def store(path: Path, out: Path, done: Run, folder: Path, mark: str = "") -> None:
    """Keep an executed chapter with its record, marked; another run may be doing the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent))  # renamed when complete
    shutil.copyfile(out / path.name, fresh / path.name)
    (fresh / RECORD).write_text(json.dumps(asdict(done)), encoding="utf-8")
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(fresh)  # another run was quicker, or what it kept was not marked
    if mark:
        (folder / mark).touch()


def kernel_settings() -> dict[str, Any]:
    """Return how kernels start: talking over files instead of open ports, where that works.

    Their own log is silenced, because it would land between the progress lines; what a cell prints
    or raises does not go through it.
    """
    from traitlets.config import Config

    files = Config() if sys.platform == "win32" else Config(KernelManager={"transport": "ipc"})
    return {"config": files, "extra_arguments": ["--log-level=CRITICAL"]}


def next_ones(waiting: list[Path], running: list[Path]) -> list[Path]:
    """Return the chapters that may start now, those first that take longest."""
    unfinished = {p.stem[:2] for p in [*waiting, *running]}
    if FIRST in unfinished:
        return [p for p in waiting if p.stem.startswith(FIRST)]
    ready = [p for p in waiting if WAIT_FOR.get(p.stem[:2]) not in unfinished]
    rank = {number: i for i, number in enumerate(LONG)}
    return sorted(ready, key=lambda p: (rank.get(p.stem[:2], len(LONG)), p.stem))


def side_by_side(
    todo: list[Path], out: Path, study: str, timeout: int, also: Path | None, jobs: int, show: Show
) -> Iterator[tuple[Path, Run]]:
    """Run each chapter by this script in a process of its own; yield them as they end.

    Raises
    ------
    NotebookError
        A cell of one failed; the others are stopped.
    """
    waiting, running = list(todo), {}
    options = ["--study", study, "--timeout", str(timeout), "--jobs", "1", "--fresh", "--ready"]
    options += ["--also", str(also)] if also else []
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as scratch:
        try:
            while waiting or running:
                for path in next_ones(waiting, list(running))[: jobs - len(running)]:
                    command = [sys.executable, __file__, path.stem, *options]
                    command += ["--notebooks", path.parent, "--out", Path(scratch) / path.stem]
                    with (Path(scratch) / f"{path.stem}.log").open("w") as log:
                        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
                    running[path] = child
                    waiting.remove(path)
                    show([p.stem for p in running])
                for path in [p for p, child in running.items() if child.poll() is not None]:
                    folder = Path(scratch) / path.stem
                    if running.pop(path).returncode:
                        said = folder.with_suffix(".log").read_text(encoding="utf-8")
                        raise NotebookError(path.stem, said.replace(UNTOUCHED, "").strip())
                    shutil.copyfile(folder / path.name, out / path.name)
                    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
                    yield path, Run(**record["chapters"][path.stem])
                time.sleep(0.1)
        finally:
            for child in running.values():
                child.terminate()
            for child in running.values():
                child.wait()


def one_by_one(
    todo: list[Path], out: Path, study: str, timeout: int, also: Path | None, show: Show
) -> Iterator[tuple[Path, Run]]:
    """Execute the chapters here, in order; yield them as they end."""
    for path in todo:
        show([path.stem])
        yield path, execute(path, out, study, timeout, also)


def run(
    folder: Path,
    out: Path,
    study: str,
    names: list[str] | None,
    timeout: int,
    keep: Path | None = None,
    jobs: int = 1,
    also: Path | None = None,
) -> dict[str, Any]:
    """Execute the chapters, replace ``out`` by the result, and return the record.

    The old folder stays as it is until every chapter has run.
    """
    todo, runs = chapters(folder, names), {}
    width = max(len(p.stem) for p in todo)
    shared = surroundings(study) if keep else ""
    record = {"study": study, "helpers": helpers_digest(), "complete": todo == chapters(folder)}
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))

    places = {p: place_to_keep(p, keep, shared) for p in todo} if keep else {}
    marks = {p: proof(p, also) for p in todo}
    left = [p for p in todo if not (p in places and (places[p] / marks[p]).exists())]
    bar = tqdm(total=len(left), desc="chapters", disable=not sys.stderr.isatty(), leave=False)

    def note(path: Path, done: Run, more: str = "") -> None:
        runs[path.stem] = done
        memory = f"peak {done.peak_mb / 1e3:.2f} GB"
        bar.write(f"  {path.stem:{width}}  ok  {done.seconds:6.1f} s  {memory}{more}")
        sys.stdout.flush()

    def show(names: list[str]) -> None:
        bar.set_postfix_str(f"now {', '.join(names)}")

    try:
        for path in [p for p in todo if p not in left]:
            note(path, take(path, fresh, places[path]), "  (ran before, nothing has changed)")
        ended = one_by_one(left, fresh, study, timeout, also, show)
        if jobs > 1 and len(left) > 1:
            ended = side_by_side(left, fresh, study, timeout, also, jobs, show)
        for path, done in ended:
            if keep:
                store(path, fresh, done, places[path], marks[path])
            note(path, done)
            bar.update()
        record["chapters"] = {p.stem: asdict(runs[p.stem]) for p in todo}
        (fresh / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        fresh.chmod(0o755)
        fresh.rename(out)
    except NotebookError as error:
        bar.write(f"  {error.chapter:{width}}  FAILED")
        raise
    finally:
        bar.close()
        shutil.rmtree(fresh, ignore_errors=True)
    return record


def prepare(name: str) -> None:
    """Say which study runs and from where, and have its files here before any chapter starts.

    A download or a simulation inside a chapter would show no progress, and would fail late.
    """
    from helpers import catalog, simulate

    root = os.environ.get("STIMAGE_ROOT") or "none (STIMAGE_ROOT is not set), so files are fetched"
    place = "none needed, it is simulated" if name == "demo" else root
    print(f"Study {name} · dataset root: {place}", flush=True)
    try:
        study = catalog.study(name)
        if name == "demo":
            simulate.demo_root()
            return
        for section in study.sections:
            for kind in ("coord", "gene_exp", "image"):
                catalog.find(section.slide, kind, tech=section.tech)
    except catalog.DataError as error:
        raise SystemExit(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Run the chapters; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the chapters of the book.")
    parser.add_argument(
        "names",
        nargs="*",
        help="only these chapters, as 02 or 02_tiles (no pages can be built then)",
    )
    parser.add_argument("--study", default=os.environ.get("STUDY", "demo"))
    parser.add_argument("--notebooks", type=Path, default=SOURCES, help="where the chapters are")
    parser.add_argument("--out", type=Path, help="default: _build/<study>/notebooks")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds that one cell may take")
    parser.add_argument("--fresh", action="store_true", help="run even what has not changed")
    parser.add_argument("--also", type=Path, help="a folder with code to run after each chapter")
    parser.add_argument("--ready", action="store_true", help="the files of the study are here")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.environ.get("JOBS"),
        help="chapters at a time; default: as cores and memory allow",
    )
    options = parser.parse_args(argv)
    keep = KEPT if options.notebooks == SOURCES and not options.fresh else None
    out = options.out or ROOT / "_build" / options.study / "notebooks"
    absolute_paths()
    if not sys.stderr.isatty():
        no_progress_bars()
    if not options.ready:
        prepare(options.study)
    jobs = options.jobs or usual_jobs()
    kernel_environment(jobs if len(chapters(options.notebooks, options.names)) > 1 else 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as with Ctrl-C, nothing is left
    start = time.perf_counter()
    try:
        folder, names = options.notebooks, options.names
        record = run(folder, out, options.study, names, options.timeout, keep, jobs, options.also)
    except NotebookError as error:
        print(f"\n{error}\n\n{UNTOUCHED}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    print(f"Chapters run: {len(record['chapters'])}, in {seconds:.0f} s, into {out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
