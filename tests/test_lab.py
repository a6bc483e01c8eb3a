"""JupyterLab as `make lab` starts it: chapters there, bars seen, trainings resumed, git clean."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import requests
from conftest import until
from websocket import create_connection

import notebooks as nbs
from lab import copy as copy_chapters
from new_chapter import chapter

ROOT = Path(__file__).resolve().parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
TOKEN = "of-the-test"
CHAPTER = "my-notebooks/01_loading.ipynb"


class Lab:
    """A running server, spoken to as its own page does."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.address = root, f"http://127.0.0.1:{port}"
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"token {TOKEN}"

    def call(self, method: str, address: str, **body: Any) -> requests.Response:
        answer = self.session.request(method, self.address + address, json=body or None, timeout=60)
        answer.raise_for_status()
        return answer


class Kernel:
    """A fresh kernel for a notebook of the lab, in the notebook's folder."""

    def __init__(self, lab: Lab, notebook: str) -> None:
        name = nbs.read(lab.root / notebook)["metadata"]["kernelspec"]["name"]
        body = {"path": notebook, "name": notebook, "type": "notebook", "kernel": {"name": name}}
        self.path = (
            f"/api/kernels/{lab.call('POST', '/api/sessions', **body).json()['kernel']['id']}"
        )
        socket = lab.address.replace("http", "ws") + f"{self.path}/channels?token={TOKEN}"
        self.socket = create_connection(socket, timeout=120)

    def send(self, code: str) -> str:
        """Ask to run a cell; return the number of the message."""
        number = uuid.uuid4().hex
        header = {"msg_id": number, "msg_type": "execute_request", "version": "5.3"}
        header |= {"username": "test", "session": "test", "date": ""}
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
        message = {"header": header, "channel": "shell", "content": content}
        self.socket.send(json.dumps(message | {"parent_header": {}, "metadata": {}}))
        return number

    def answer(self, number: str) -> tuple[dict[str, Any], list[Any]]:
        """Wait for the answer to a message; return it, and the outputs of the cell."""
        reply, idle, outputs = None, False, []
        while reply is None or not idle:
            message = json.loads(self.socket.recv())
            if message["parent_header"].get("msg_id") != number:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "execute_reply":
                reply = content
            elif kind == "status":
                idle = content["execution_state"] == "idle"
            elif kind in ("stream", "display_data", "execute_result", "error"):
                outputs.append(nbformat.v4.output_from_msg(message))
        return reply, outputs

    def run(self, code: str) -> tuple[dict[str, Any], list[Any]]:
        """Run a cell; return the kernel's answer and the outputs."""
        return self.answer(self.send(code))


@pytest.fixture(scope="module")
def lab(checkout: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Run `make lab` in a checkout of its own, with this Python, and without a browser."""
    root, home = checkout(), tmp_path_factory.mktemp("jupyter")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = f"--no-browser --allow-root --port={port} --ServerApp.port_retries=0"
    options += f" --IdentityProvider.token={TOKEN}"
    command = ["make", "lab", f"RUN={sys.executable}", "-o", ".venv/installed", f"ARGS={options}"]
    places = {f"JUPYTER_{name}_DIR": str(home / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    env = os.environ | places | {"IPYTHONDIR": str(home / "ipython")}
    env |= {"STIMAGE_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    env |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    env.pop("TQDM_DISABLE", None)
    log = (home / "log").open("w")
    server = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log)
    try:
        made = Lab(root, port)

        def answers() -> bool:
            assert server.poll() is None, (home / "log").read_text()
            with contextlib.suppress(requests.RequestException):
                return made.call("GET", "/api").ok
            return False

        until(answers, "JupyterLab")
        yield made
        made.call("POST", "/api/shutdown")
        server.wait(30)
    finally:
        server.kill()
        log.close()


@pytest.fixture
def kernel(lab: Lab) -> Iterator[Kernel]:
    made = Kernel(lab, CHAPTER)
    yield made
    made.socket.close()
    lab.call("DELETE", made.path)


def changed(root: Path) -> str:
    """Return what git sees as changed or new."""
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def test_it_opens_on_the_chapters(lab: Lab) -> None:
    assert "JupyterLab" in lab.call("GET", "/lab/tree/my-notebooks").text
    assert lab.call("GET", "/").url == f"{lab.address}/lab/tree/my-notebooks"
    listed = lab.call("GET", "/api/contents/my-notebooks").json()["content"]
    there = {entry["name"] for entry in listed if entry["type"] == "notebook"}
    assert there == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    kernels = set(lab.call("GET", "/api/kernelspecs").json()["kernelspecs"])
    named = {nbs.read(path)["metadata"]["kernelspec"]["name"] for path in ROOT.glob("notebooks/*")}
    assert named <= kernels


@pytest.mark.slow
def test_a_chapter_that_runs_and_is_saved_is_no_change_to_git(lab: Lab, kernel: Kernel) -> None:
    content = lab.call("GET", f"/api/contents/{CHAPTER}").json()["content"]
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    first = next(i for i, cell in enumerate(code) if "figure" in cell["metadata"].get("tags", []))
    for cell in code[: first + 1]:
        answer, cell["outputs"] = kernel.run(cell["source"])
        assert answer["status"] == "ok", "\n".join(answer.get("traceback", []))
        cell["execution_count"] = answer["execution_count"]
    assert [o for o in code[first]["outputs"] if "image/png" in o["data"]]
    body = {"type": "notebook", "format": "json", "content": content}
    lab.call("PUT", f"/api/contents/{CHAPTER}", **body)
    lab.call("POST", f"/api/contents/{CHAPTER}/checkpoints")
    assert "image/png" in (lab.root / CHAPTER).read_text(encoding="utf-8")
    assert changed(lab.root) == ""


def write(path: Path, text: str, outputs: bool = False) -> None:
    notebook = chapter()
    notebook["cells"][7]["source"] = [text]
    if outputs:
        notebook["cells"][7]["outputs"] = [nbformat.v4.new_output("stream", text="ran")]
    nbs.write(notebook, path)


def test_a_copy_follows_its_chapter_until_it_is_written_into(tmp_path: Path) -> None:
    sources, copies = tmp_path / "notebooks", tmp_path / "my-notebooks"
    sources.mkdir()
    path, mine = sources / "01_small.ipynb", copies / "01_small.ipynb"
    write(path, "x = 1")
    assert list(copy_chapters(sources, copies)) == []
    assert mine.read_bytes() == path.read_bytes()

    write(mine, "x = 1", outputs=True)  # it ran: outputs stay as long as the chapter does
    assert list(copy_chapters(sources, copies)) == []
    assert "ran" in mine.read_text(encoding="utf-8")
    write(path, "x = 2")
    assert list(copy_chapters(sources, copies)) == []
    assert mine.read_bytes() == path.read_bytes()

    write(mine, "x = 'my answer'")
    assert list(copy_chapters(sources, copies)) == []
    write(path, "x = 3")
    (line,) = copy_chapters(sources, copies)
    assert line.startswith("01_small.ipynb has changed")
    assert "my answer" in mine.read_text(encoding="utf-8")
    mine.rename(copies / "old.ipynb")
    assert list(copy_chapters(sources, copies)) == []
    assert mine.read_bytes() == path.read_bytes()


SETUP = """
import logging
import threading
from dataclasses import replace

from test_training import QUICK, model_of, study

from helpers import training

logging.basicConfig(format="%(message)s")
training.logger.setLevel(logging.INFO)
training.SAVE_SECONDS = 0.0
train, validation = study()
settings = replace(QUICK, epochs=60)
"""
TRAIN = """
fitted = training.fit(model_of(), train, validation, settings, device="cpu", on_epoch=on_epoch)
print(*sorted(fitted.history["epoch"].unique()))
"""


@pytest.mark.slow
def test_an_interrupted_training_shows_its_bar_and_goes_on(lab: Lab, kernel: Kernel) -> None:
    answer, outputs = kernel.run(SETUP)
    assert answer["status"] == "ok", outputs
    kernel.run("on_epoch = lambda history: history.epoch.max() < 3 or threading.Event().wait()")
    message, models = kernel.send(TRAIN), Path(os.environ["STIMAGE_CACHE"]) / "models"
    until(lambda: list(models.glob("*/checkpoint.pt")), "a checkpoint")
    lab.call("POST", f"{kernel.path}/interrupt")
    answer, _ = kernel.answer(message)
    assert answer["ename"] == "KeyboardInterrupt"

    kernel.run("on_epoch = None")
    answer, outputs = kernel.run(TRAIN)
    assert answer["status"] == "ok", answer
    text = "".join(output.get("text", "") for output in outputs)
    assert 0 < int(re.search(r"training resumes after epoch (\d+)", text)[1]) < 60
    assert text.endswith(" ".join(map(str, range(61))) + "\n")
    shown = [output["data"] for output in outputs if WIDGET in output.get("data", {})]
    assert any("training" in data["text/plain"] for data in shown)


@pytest.mark.parametrize(("disable", "bars"), [("0", 1), ("1", 0)])
def test_bars_are_widgets_until_they_are_turned_off(
    kernel: Kernel, disable: str, bars: int
) -> None:
    code = f"""
import os
os.environ["TQDM_DISABLE"] = "{disable}"
from helpers.files import progress
for _ in progress(range(3)): pass
"""
    answer, outputs = kernel.run(code)
    assert answer["status"] == "ok"
    assert sum(WIDGET in output.get("data", {}) for output in outputs) == len(outputs) == bars
