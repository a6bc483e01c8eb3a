"""Execute one chapter with papermill, in a fresh kernel; run_notebooks.py starts this script.

``run_chapter.py CHAPTER FOLDER STUDY TIMEOUT ALSO`` writes to the folder the executed notebook and
``run.json``: run time, peak memory and the SHA-256 of the source. If a cell fails, it prints the
cell with its traceback and exits with status 1.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import notebooks as nbs
from helpers.files import sha256

RECORD = "run.json"
ALSO = "also"  # id of the cell that ALSO adds
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(RuntimeError):
    """A chapter failed; the message has the chapter, the cell and the traceback."""


def also_code(path: Path, also: Path | None) -> str:
    """Return the code to run after a chapter: ``<chapter>.py``, then ``judge.py``."""
    own = also / f"{path.stem}.py" if also else None
    if not (own and own.exists()):
        return ""
    return "\n".join(p.read_text(encoding="utf-8") for p in (own, also / "judge.py"))


def peak_memory(stop: threading.Event) -> float:
    """Return the peak memory of all child processes in MB, measured until ``stop`` is set."""
    import psutil

    me, peak = psutil.Process(), 0
    while not stop.wait(0.2):
        total = 0
        for child in me.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                total += child.memory_info().rss
        peak = max(peak, total)
    return peak / 1e6


def failure(path: Path, executed: nbs.Notebook, error: Exception) -> str:
    """Return the message for a failed cell: chapter, cell, its code, the traceback.

    The error may be an exception in the cell, its time limit, or the end of the kernel.
    """
    code = [c for c in executed["cells"] if c["cell_type"] == "code"]
    bad = next(c for c in reversed(code) if c["metadata"].get("papermill", {}).get("start_time"))
    ids = [c["id"] for c in nbs.read(path)["cells"]]
    place = f"number {ids.index(bad['id']) + 1}" if bad["id"] in ids else "added for this run"
    traceback = "\n".join(getattr(error, "traceback", [str(error)]))
    kind = getattr(error, "ename", type(error).__name__)
    what = f"{kind}: {getattr(error, 'evalue', error)}".splitlines()[0]
    head = f"chapter {path.stem}, cell {bad['id']} ({place}): {what}"
    return f"{head}\n\n{nbs.source(bad).rstrip()}\n\n{ANSI.sub('', traceback).rstrip()}\n\n{head}"


def execute(path: Path, out: Path, study: str, timeout: int, also: Path | None = None) -> None:
    """Execute a chapter in a temporary folder; write it and its record to ``out``.

    Raises
    ------
    NotebookError
        A cell failed, or the chapter left files behind. Nothing is written then.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    notebook, start, stop = nbs.read(path), time.perf_counter(), threading.Event()
    if code := also_code(path, also):
        cell = {"cell_type": "code", "id": ALSO, "source": code, "metadata": {}, "outputs": []}
        notebook["cells"].append(cell | {"execution_count": None})
    parameters = {} if study == "demo" else {"STUDY": study}  # the chapters default to demo
    # Talk to the kernel through files, not open ports; Windows has no such files.
    config = Config() if sys.platform == "win32" else Config(KernelManager={"transport": "ipc"})
    with tempfile.TemporaryDirectory(prefix="chapter-") as folder, ThreadPoolExecutor(1) as watcher:
        source, scratch = Path(folder) / f"source-{path.name}", Path(folder) / path.name
        nbs.write(notebook, source)
        memory = watcher.submit(peak_memory, stop)
        try:
            papermill.execute_notebook(
                source, scratch, parameters, cwd=folder, kernel_name="python3", config=config,
                progress_bar=False, execution_timeout=timeout,
                extra_arguments=["--log-level=CRITICAL"],
            )  # fmt: skip
        except (PapermillExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise NotebookError(failure(path, nbs.read(scratch), error)) from None
        finally:
            stop.set()
        if left := sorted(p.name for p in Path(folder).iterdir() if p not in (scratch, source)):
            fix = "save results through a helper, in the cache, so that chapters run in any order"
            raise NotebookError(f"chapter {path.stem} left behind {', '.join(left)}. Fix: {fix}.")
        done, seconds = nbs.read(scratch), time.perf_counter() - start
    for cell in done["cells"]:
        if cell["id"] == ALSO:  # not part of the chapter
            seconds -= cell["metadata"]["papermill"]["duration"]
        if "injected-parameters" in nbs.tags(cell):  # papermill draws a random id
            cell["id"] = "injected-parameters"
    done["cells"] = [cell for cell in done["cells"] if cell["id"] != ALSO]
    record = {"seconds": round(seconds, 1), "peak_mb": round(memory.result())}
    out.mkdir(parents=True, exist_ok=True)
    nbs.write(nbs.strip(done, keep_outputs=True), out / path.name)
    (out / RECORD).write_text(json.dumps(record | {"source": sha256(path)}), encoding="utf-8")


def main(path: str, out: str, study: str, timeout: str, also: str) -> int:
    """Execute the chapter named on the command line; return the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # end the kernel, as Ctrl-C does
    try:
        execute(Path(path), Path(out), study, int(timeout), Path(also) if also else None)
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
