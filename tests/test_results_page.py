"""The page of results: every row of the files, a table that works, a figure with its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bs4 import BeautifulSoup

import results_page

if TYPE_CHECKING:
    from browser import Browser, Tab

ROOT = Path(__file__).resolve().parent.parent
STAMP = {"measured": "2030-01-02", "commit": "0123456789ab"}
WHOLE = {
    "what": "features on every rung of the ladder of splits; benchmarks/ladder.py",
    "measured": "2030-01-02",
    "commit": "0123456789abcdef-changed",
    "machine": {"processor": "Abacus", "cores": 2},
}


def score(features: str, value: float, **more: object) -> dict:
    made = {"study": "mob", "data": "local copy", "what": "score", "features": features}
    made |= {"tower": "", "seed": 0, "variant": "", "split": "left-out donor"}
    made |= {"measure": "macro_f1", "value": value, "low": value - 0.05, "high": value + 0.04}
    return made | STAMP | more


LADDER = [
    score("genes", 0.76, split="random spots"),
    score("genes", 0.7, donors={"A": 0.7, "D": 0.81}, n_train=472),
    score("genes", 0.71, measure="balanced_accuracy"),
    score("mini before", 0.4, tower="mini"),
    score("mini before", 0.42, tower="mini", seed=1),
    score("mini before", 0.45, tower="mini", variant="scaled by slide"),
    score("mini before minus hand-made", -0.11, tower="mini", what="difference", high=-0.02),
    score("<b>", 0.31, study="demo", data="simulated"),
    {k: v for k, v in score("genes", 0.2, study="her2st", note="8 blocks: too few").items()
     if k not in ("low", "high")},
    {"study": "mob", "what": "score", "features": "clip before", "tower": "clip", "seed": 0,
     "variant": "", "split": "every", "note": "not measured here: no weights"} | STAMP,
]  # fmt: skip
TRAINED = {
    "study": "demo", "data": "simulated", "question": "main", "tower": "mini", "seed": 2,
    "held_out": "A", "panel": "shared-hvg-256", "epochs": 20, "variant": "",
    "probe hand-made": 0.6, "probe after": 0.7, "recall@10": 0.12, "recall@10 times chance": 7.4,
    "after minus before value": 0.05, "after minus before low": -0.01,
    "after minus before high": 0.11,
} | STAMP  # fmt: skip
TUNED = {
    "study": "mob", "data": "local copy", "question": "how to tune", "tower": "imagenet",
    "held_out": "A", "judged_on": "D, E", "variant": "rate .02", "value": 0.66, "low": 0.6,
    "high": 0.71, "donors": {"D": 0.67, "E": 0.65}, "recall@10 times chance": 6.5, "seed": 0,
    "chosen": True,
} | STAMP  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of results, and one without rows."""
    made = tmp_path / "results"
    made.mkdir()
    for name, rows in (("ladder", LADDER), ("finetune", [TRAINED, TUNED])):
        text = json.dumps(WHOLE | {"rows": rows})
        (made / f"{name}.json").write_text(text, encoding="utf-8")
    (made / "catalogue.json").write_text('{"facts": {}}', encoding="utf-8")
    return made


def shown(folder: Path) -> list[list[str]]:
    """The texts of the table on the page."""
    page = BeautifulSoup(results_page.table(results_page.all_rows(folder)), "html.parser")
    return [[cell.get_text() for cell in row.select("td")] for row in page.select("tbody tr")]


def test_every_row_of_the_ladder_is_on_the_page(folder):
    rows = shown(folder)
    assert len(rows) == len(LADDER) + 5
    assert rows[1] == [
        *("mob", "score", "genes", "left-out donor", "0", "macro-F1", "0.700", "[0.650, 0.740]"),
        "by donor: A 0.70, D 0.81; probe trained on 472 spots per fold",
        "2030-01-02, 0123456",
    ]
    assert rows[5][8] == "scaled by slide"
    assert rows[6][6:8] == ["-0.110", "[-0.160, -0.020]"]
    assert rows[7][0] == "demo (simulated)"


def test_what_was_not_measured_and_what_has_no_interval_says_so(folder):
    rows = shown(folder)
    assert rows[8][6:9] == ["0.200", "", "8 blocks: too few"]
    assert rows[9][6:9] == ["not measured", "", "not measured here: no weights"]


def test_a_training_has_a_row_for_each_measurement(folder):
    main = [row for row in shown(folder) if row[1] == "main"]
    assert [(row[2], row[5], row[6]) for row in main] == [
        ("hand-made", "macro-F1", "0.600"),
        ("mini after", "macro-F1", "0.700"),
        ("mini after minus mini before", "macro-F1", "0.050"),
        ("mini after", "recall@10, times chance", "7.400"),
    ]
    assert {row[3] for row in main} == {"test donor A"}
    assert main[2][7] == "[-0.010, 0.110]"


def test_a_choice_says_who_judged_and_that_the_test_donor_was_unseen(folder):
    (row,) = [row for row in shown(folder) if row[1] == "how to tune"]
    assert row[2:4] == ["imagenet, rate .02", "validation donor D, E, A unseen"]
    assert row[8].startswith("chosen; by donor: D 0.67, E 0.65")


def test_a_name_cannot_break_the_page(folder):
    assert "<b>" not in results_page.table(results_page.all_rows(folder))


def test_rows_of_an_older_file_are_shown(folder):
    old = {k: v for k, v in score("a minus b", 0.1).items() if k not in ("what", "variant")}
    (folder / "ladder.json").write_text(json.dumps(WHOLE | {"rows": [old]}), encoding="utf-8")
    assert shown(folder)[0][1] == "difference"


def test_the_figure_has_what_its_words_say(folder):
    found = results_page.scores(results_page.report("ladder.json", folder))
    assert list(found) == ["mob", "demo (simulated)", "her2st"]
    assert list(found["mob"]) == ["genes", "mini before"]
    assert [r["seed"] for r in found["mob"]["mini before"]["left-out donor"]] == [0, 1]
    words = results_page.alt_text(found)
    assert "On left-out donor of mob, from 0.70 (genes) down to 0.40 (mini before)." in words
    assert f":alt: {words}\n" in results_page.figure_block(found)


def test_the_page_is_staged_and_the_same_twice(folder, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        values = results_page.stage(tmp_path / name, folder)
    names = ["results-table.html", "results.svg"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert values["results_count"] == str(len(LADDER) + 5)
    assert (values["results_compared"], values["results_by_chance"]) == ("2", "0")


def test_without_results_there_is_no_figure(tmp_path):
    values = results_page.stage(tmp_path, tmp_path / "nowhere")
    assert "no score to draw" in values["results_figure"]
    assert [path.name for path in tmp_path.iterdir()] == ["results-table.html"]


def test_every_file_has_its_provenance(folder):
    body = results_page.files_table(folder)
    assert [line[0] for line in body] == ["`finetune.json`", "`ladder.json`"]
    assert body[1][1:] == [
        *("features on every rung of the ladder of splits", "10", "local copy; simulated"),
        *("Abacus, 2 cores", "2030-01-02, 0123456 with changes"),
    ]


def test_the_files_of_the_repository_make_a_page(tmp_path):
    values = results_page.stage(tmp_path)
    assert int(values["results_count"].replace(",", "")) > 100
    assert len(results_page.files_table()) == 5


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture
def opened(chromium: Browser, folder: Path, tmp_path: Path) -> Tab:
    """The table alone, with its script and the book's style, in a tab as narrow as a phone."""
    from browser import tab

    (tmp_path / "_static").mkdir()
    (tmp_path / "book").mkdir()
    for name in ("results.js", "custom.css"):
        (tmp_path / "_static" / name).write_bytes((ROOT / "book/_static" / name).read_bytes())
    page = tmp_path / "book/results.html"
    page.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Results</title>'
        '<meta name="viewport" content="width=device-width">'
        '<link rel="stylesheet" href="../_static/custom.css"></head>'
        '<body><main class="bd-article"><h1>Results</h1>'
        f"{results_page.table(results_page.all_rows(folder))}</main></body></html>",
        encoding="utf-8",
    )
    one = tab(chromium, width=390)
    one.open(page)
    assert (one.errors, one.failed, one.outside) == ([], [], [])
    return one


def seen(one: Tab, column: int) -> list[str]:
    """The texts of one column, of the rows that are shown, from top to bottom."""
    return one.page.locator("tbody tr:visible").evaluate_all(
        f"rows => rows.map(row => row.cells[{column}].textContent)"
    )


@pytest.mark.slow
def test_the_table_opens_with_the_scores_of_seed_0(opened):
    assert set(seen(opened, 1)) == {"score"}
    assert set(seen(opened, 4)) == {"0"}
    count = len(seen(opened, 0))
    assert opened.page.locator(".results-count").inner_text() == f"{count} of 15 rows"


@pytest.mark.slow
def test_the_table_is_filtered(opened):
    page = opened.page
    page.get_by_role("button", name="Show all rows").click()
    assert len(seen(opened, 0)) == 15
    page.get_by_label("Study").select_option("mob")
    assert set(seen(opened, 0)) == {"mob"}
    page.get_by_label("Search").fill("MINI scaled")
    assert seen(opened, 6) == ["0.450"]
    page.get_by_role("button", name="Show all rows").click()
    assert len(seen(opened, 0)) == 15


@pytest.mark.slow
def test_the_table_is_sorted_by_key_and_numbers_are_numbers(opened):
    page = opened.page
    page.get_by_role("button", name="Show all rows").click()
    page.get_by_role("button", name="Value").focus()
    page.keyboard.press("Enter")
    values = seen(opened, 6)
    assert values[0] == "-0.110"
    assert values[-2:] == ["7.400", "not measured"]
    assert page.locator("th[aria-sort]").evaluate_all("h => h.map(e => e.ariaSort)") == [
        "ascending"
    ]
    page.keyboard.press("Enter")
    assert seen(opened, 6)[:2] == ["7.400", "0.760"]
    assert seen(opened, 6)[-1] == "not measured"


@pytest.mark.slow
def test_the_table_scrolls_in_its_own_box_and_everybody_can_use_it(opened):
    from browser import LANDMARKS, WCAG

    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator(".results-box")
    assert box.evaluate("e => e.scrollWidth > e.clientWidth && e.tabIndex === 0")
    assert opened.axe(WCAG, also=LANDMARKS, without=["color-contrast"]) == []
