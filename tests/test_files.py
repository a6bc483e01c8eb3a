"""Files arrive whole or not at all: the cache, and the hub's real client against a local server."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from local_web import hub_file, web

from helpers import catalog, files
from helpers.files import DataError, atomic

# --------------------------------------------------------------------------- the cache


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def interrupted():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_killed_process_leaves_nothing_to_read_back(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from helpers.files import atomic\n"
        "with atomic(Path(sys.argv[1])) as t:\n    t.write_text('half'); os._exit(9)\n"
    )
    path = tmp_path / "x"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert not path.exists()


def test_folder_written_by_two_at_once_is_one_of_them(tmp_path):
    path = tmp_path / "folder"
    with atomic(path) as mine:
        mine.mkdir()
        (mine / "a").write_text("mine")
        with atomic(path) as theirs:
            theirs.mkdir()
            (theirs / "a").write_text("theirs")
    assert (path / "a").read_text() == "theirs"


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file where a folder should be")
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path / "file"))

    def write():
        with atomic(files.cache_dir() / "x") as temporary:
            temporary.write_text("never")

    with pytest.raises(DataError, match=r"file .*cannot be written.*STIMAGE_CACHE"):
        write()


def test_full_disk_is_said_with_the_folder(tmp_path):
    def write():
        with atomic(tmp_path / "x"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=f"file {tmp_path}: .*No space left.*has room"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_another_error_while_writing_stays_itself(tmp_path):
    def write():
        with atomic(tmp_path / "x"):
            raise FileNotFoundError("the source is missing")

    with pytest.raises(FileNotFoundError, match="source"):
        write()


def test_what_a_killed_process_left_is_swept_away_a_day_later(tmp_path):
    old, new = tmp_path / ".writing-old", tmp_path / ".writing-new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (1, 1))
    with atomic(tmp_path / "x") as temporary:
        temporary.write_text("done")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".writing-new", "x"]


@pytest.mark.parametrize("place", [0, 500_000, 999_999])
def test_fingerprint_changes_with_the_bytes(tmp_path, place):
    path, data = tmp_path / "x", bytearray(1_000_000)
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    before = files.fingerprint(path)
    data[place] = 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert files.fingerprint(path) != before


def test_digest_does_not_depend_on_the_order_of_settings():
    assert files.digest(a=1, b=2) == files.digest(b=2, a=1) != files.digest(a=2, b=1)


def test_error_names_slide_file_and_fix():
    message = str(DataError("is bad", slide="S", file=Path("f.csv"), fix="mend it"))
    assert message == "slide S, file f.csv: is bad. Fix: mend it."


# --------------------------------------------------------------------------- the hub

BODY = b"yaxis,xaxis,r\n" * 1000
PATH = f"/datasets/{catalog.DATASET}/resolve/{catalog.REVISION}/ST/coord/S_coord.csv"


@pytest.fixture
def hub(tmp_path):
    """A local server, and a function that asks for a slide's coordinates in a fresh process."""
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }

    def ask(slide="S"):
        code = (
            "import sys; from helpers import catalog\n"
            "try:\n    print(catalog.find(sys.argv[1], 'coord', tech='ST'))\n"
            "except catalog.DataError as error:\n    sys.exit(str(error))\n"
        )
        return subprocess.run(
            [sys.executable, "-c", code, slide], env=environment, capture_output=True, text=True
        )

    with web({PATH: hub_file(BODY, catalog.REVISION)}) as server:
        environment["HF_ENDPOINT"] = server.address
        yield server, ask


def test_hub_file_arrives_and_is_found_again_without_the_hub(hub):
    server, ask = hub
    first = ask()
    assert Path(first.stdout.strip()).read_bytes() == BODY
    server.shutdown()
    assert ask().stdout == first.stdout


def test_hub_file_of_wrong_bytes_is_refused_and_not_kept(hub):
    server, ask = hub
    server.answers[PATH].body = BODY.replace(b"y", b"z")
    result = ask()
    assert "slide S" in result.stderr
    assert "do not match their hash" in result.stderr
    server.answers[PATH].body = BODY
    assert Path(ask().stdout.strip()).read_bytes() == BODY


def test_hub_without_the_file(hub):
    _, ask = hub
    assert re.search(r"slide T: ST/coord/T_coord.csv of .* is not on the hub", ask("T").stderr)


def test_hub_out_of_reach_is_said_within_seconds(tmp_path):
    code = "from helpers import catalog; catalog.find('S', 'image', tech='ST')"
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "the hub cannot be reached" in result.stderr
