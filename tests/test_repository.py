"""The address of the repository stands in one place, and moves from there to all others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import anatomy
import repository

ROOT = Path(__file__).resolve().parent.parent
NEW = "https://github.com/another-owner/My.Book_2"


def test_the_address_is_that_of_the_config() -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["repository"]["url"] == anatomy.REPOSITORY == repository.url()


def texts(root: Path) -> dict[str, bytes]:
    files = (p for p in root.rglob("*") if p.is_file() and ".git" not in p.parts)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def move(root: Path, address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "tools/repository.py", address]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_book_moves_to_another_repository(checkout: Callable[[], Path]) -> None:
    copied = checkout()
    before, old = texts(copied), repository.owner_and_name(repository.url())
    done = move(copied, NEW)
    assert done.returncode == 0, done.stderr
    after, new = texts(copied), repository.owner_and_name(NEW)
    changed = {name for name in before if before[name] != after[name]}
    chapters = {name for name in before if name.startswith("notebooks/")}
    assert changed >= chapters | {"_config.yml", "README.md", "CITATION.cff", "book/setup.md"}
    for name in before:  # the address, and nothing else
        assert old.encode() not in after[name], name
        if name != "tests/test_repository.py":  # it knows the new one, too
            assert after[name].replace(new.encode(), old.encode()) == before[name], name
    check = [sys.executable, copied / "tools/anatomy.py", "check"]
    checked = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")
    assert repository.url(copied) == NEW
    first = json.loads((copied / "notebooks/01_loading.ipynb").read_text(encoding="utf-8"))
    assert f"git+{NEW}" in str(first["cells"][2]["source"])
    assert f"/github/{new}/blob/" in str(first["cells"][0]["source"])


@pytest.mark.parametrize(
    "address",
    [
        "",
        "another-owner/book",
        "http://github.com/another-owner/book",
        "https://gitlab.com/another-owner/book",
        "https://github.com/another-owner",
        "https://github.com/another-owner/book/",
        "https://github.com/another-owner/book.git",
        "https://github.com/another-owner/book/tree/main",
        "https://github.com/another-owner/my book",
    ],
)
def test_a_wrong_address_is_refused(address: str, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    for name in ("_config.yml", "tools/repository.py"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    done = move(tmp_path, address)
    assert done.returncode == 1
    assert f"'{address}'" in done.stderr
    assert "make repo URL=https://github.com/OWNER/NAME" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "_config.yml").read_bytes() == (ROOT / "_config.yml").read_bytes()
