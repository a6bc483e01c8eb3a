"""The check of links and data, against a small web server on this machine alone."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from local_web import Answer, hub_file, web

import check_links
from check_links import Finding
from helpers import catalog

# --------------------------------------------------------------------------- links

ANSWERS = {
    "/good": Answer(body=b"x"),
    "/gone": Answer(404),
    "/moved": Answer(301, headers={"Location": "/good"}),
    "/moved-to-nowhere": Answer(301, headers={"Location": "/gone"}),
    "/refused": Answer(403),
    "/slow": Answer(late=True),
    "/unsteady": Answer(500, then=Answer(500, then=Answer(body=b"x"))),
    "/out-of-service": Answer(503),
}
REFUSING_HOST = "localhost"


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Check a book of one page and one chapter once; a host in REFUSING is the same server."""
    source = tmp_path_factory.mktemp("linked")
    with web(dict(ANSWERS)) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.setattr(check_links, "REFUSING", (REFUSING_HOST,))
        refusing = server.address.replace("127.0.0.1", REFUSING_HOST)
        page = [f"- <{server.address}{path}>" for path in ANSWERS]
        page += [f"- <{refusing}{path}>" for path in ("/good", "/refused", "/gone")]
        page += ["- [a page of ours](other.md)", "- <mailto:someone@example.org>"]
        (source / "_config.yml").write_text("title: Small\nexecute: {execute_notebooks: 'off'}\n")
        (source / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters: [file: other]\n")
        (source / "index.md").write_text("# Links\n\n" + "\n".join(page) + "\n")
        (source / "other.md").write_text(f"# Another\n\n[again]({server.address}/good#part)\n")
        found = check_links.check_links(source, linkcheck_timeout=1, linkcheck_retries=2)
    return SimpleNamespace(
        found=found, asked=server.asked, address=server.address, refusing=refusing
    )


def finding(checked: SimpleNamespace, address: str) -> Finding:
    (one,) = [f for f in checked.found if f.what.split(" in ")[0] == address]
    return one


@pytest.mark.parametrize(
    ("path", "state", "why"),
    [
        ("/good", "ok", ""),
        ("/gone", "broken", "404"),
        ("/moved", "ok", ""),
        ("/moved-to-nowhere", "broken", "404"),
        ("/refused", "broken", "403"),
        ("/slow", "broken", "timed out"),
        ("/unsteady", "ok", ""),
        ("/out-of-service", "unknown", "unavailable"),
    ],
)
def test_a_link_is_judged_by_its_answer(
    checked: SimpleNamespace, path: str, state: str, why: str
) -> None:
    found = finding(checked, checked.address + path)
    assert (found.state, why in found.why) == (state, True), found


@pytest.mark.parametrize(
    ("path", "state"), [("/good", "ok"), ("/refused", "refused"), ("/gone", "broken")]
)
def test_a_host_that_refuses_programs_is_not_broken(
    checked: SimpleNamespace, path: str, state: str
) -> None:
    assert finding(checked, checked.refusing + path).state == state


def test_every_link_to_elsewhere_is_followed_and_no_other(checked: SimpleNamespace) -> None:
    assert len(checked.found) == len(ANSWERS) + 4
    assert finding(checked, checked.address + "/good#part").what.endswith("other.md")


def test_who_asks_is_said_and_the_body_is_fetched_only_where_it_must(
    checked: SimpleNamespace,
) -> None:
    assert {agent for _, _, agent in checked.asked} == {check_links.LINKCHECK["user_agent"]}
    assert {command for command, path, _ in checked.asked if path == "/good"} == {"HEAD"}
    assert {command for command, path, _ in checked.asked if path == "/gone"} == {"HEAD", "GET"}


def test_a_book_that_cannot_be_read_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        check_links, "JUPYTER_BOOK", (sys.executable, "-c", "raise SystemExit('no')")
    )
    (tmp_path / "_config.yml").write_text("title: Small\n")
    with pytest.raises(SystemExit, match=r"links were not checked.*:\n\nno"):
        check_links.check_links(tmp_path)


@pytest.mark.parametrize(
    ("states", "status"), [(["ok", "refused", "unknown"], 0), (["broken", "ok"], 1)]
)
def test_only_what_is_broken_fails_and_is_listed_last(
    states: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_links.report([Finding(s, f"https://{s}.example", "why") for s in states]) == status
    *listed, summary = capsys.readouterr().out.splitlines()
    shown = [line.split()[0] for line in listed[::2]]
    assert shown == sorted(set(states) - {"ok"}, key=["unknown", "refused", "broken"].index)
    assert re.fullmatch(r"\d ok, \d unknown, \d refused, \d broken", summary)


# --------------------------------------------------------------------------- data

TABLE = b"slide,tech\n"
PINS = check_links.pins()
PLIP = next(p for p in PINS if p.repo == "vinid/plip")
UNI = next(p for p in PINS if p.gated)
SLIDE = next(p for p in PINS if p.kind == "dataset")


def path_of(pin: check_links.Pin) -> str:
    return urlsplit(check_links.address(pin)).path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A hub that has every pinned file; for quicker tests, the helpers name but three."""
    answers = {path_of(p): hub_file(b"x", p.revision, p.sha256) for p in PINS}
    monkeypatch.setattr(check_links, "pins", lambda: [PLIP, UNI, SLIDE])
    answers["/table"] = Answer(body=TABLE)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(catalog, "METADATA_SHA256", hashlib.sha256(TABLE).hexdigest())
    with web(answers) as server:
        monkeypatch.setattr(catalog, "METADATA_URL", f"{server.address}/table")
        yield SimpleNamespace(answers=answers, server=server)


def not_ok(hub: SimpleNamespace) -> list[Finding]:
    return [f for f in check_links.check_data(hub.server.address) if f.state != "ok"]


def test_a_hub_that_serves_what_is_pinned_is_in_order(
    hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_links, "pins", lambda: PINS)
    assert not_ok(hub) == []
    assert {command for command, path, _ in hub.server.asked if path != "/table"} == {"HEAD"}
    assert len(hub.server.asked) == len(PINS) + 2  # the table, and whether the hub answers


def test_every_study_and_every_tower_with_weights_is_asked_for() -> None:
    asked = {(p.repo, p.revision) for p in PINS}
    assert (catalog.DATASET, catalog.REVISION) in asked
    assert len(asked) == 6
    files = {p.file for p in PINS}
    for study in ("mob", "her2st", "dlpfc"):
        for section in catalog.study(study).sections:
            assert str(catalog.relative_path(section.slide, "image", section.tech)) in files


@pytest.mark.parametrize("pin", [PLIP, SLIDE], ids=["weights", "slide"])
def test_a_file_that_is_gone_is_broken(hub: SimpleNamespace, pin: check_links.Pin) -> None:
    del hub.answers[path_of(pin)]
    (found,) = not_ok(hub)
    assert (found.state, found.what.endswith(pin.file)) == ("broken", True)
    assert "EntryNotFound" in found.why


def test_a_file_with_other_bytes_is_broken(hub: SimpleNamespace) -> None:
    hub.answers[path_of(PLIP)] = hub_file(b"other", PLIP.revision)
    (found,) = not_ok(hub)
    assert found.state == "broken"
    assert found.why.startswith(f"pinned hash {PLIP.sha256}, not ")


def test_a_file_of_another_commit_is_broken(hub: SimpleNamespace) -> None:
    hub.answers[path_of(SLIDE)] = hub_file(b"x", "f" * 40)
    (found,) = not_ok(hub)
    assert (found.state, "f" * 40 in found.why) == ("broken", True)


@pytest.mark.parametrize(("pin", "state"), [(UNI, "refused"), (PLIP, "broken")])
def test_a_gate_is_broken_only_where_the_card_knows_of_none(
    hub: SimpleNamespace, pin: check_links.Pin, state: str
) -> None:
    hub.answers[path_of(pin)] = Answer(401, headers={"X-Error-Code": "GatedRepo"})
    (found,) = not_ok(hub)
    assert (found.state, "Gated" in found.why) == (state, True)


def test_another_table_of_slides_is_broken(hub: SimpleNamespace) -> None:
    hub.answers["/table"] = Answer(body=TABLE + b"x")
    (found,) = not_ok(hub)
    assert (found.state, "do not match" in found.why) == ("broken", True)


def test_a_hub_out_of_reach_is_said_once(
    hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (found,) = [f for f in check_links.check_data() if f.state != "ok"]
    assert found == Finding(
        "broken", "http://127.0.0.1:9", "the hub does not answer: try again later"
    )
