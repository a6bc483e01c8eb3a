"""Figures of other runs are shown with where they come from, or not at all."""

import json

import pytest

from helpers import plots
from helpers.files import DataError

REPORT = {
    "measured": "2026-01-02",
    "commit": "0123456789",
    "machine": {"processor": "a processor"},
    "rows": [
        {"study": "mob", "value": 1.0, "data": "local copy"},
        {"study": "demo", "value": 2.0, "data": "simulated"},
    ],
}


def test_rows_come_with_commit_machine_day_and_data(tmp_path):
    (tmp_path / "some.json").write_text(json.dumps(REPORT))
    rows, line = plots.measured("some.json", folder=tmp_path, study="mob")
    assert rows["value"].tolist() == [1.0]
    for said in ("NOT this run", "local copy", "a processor", "0123456", "2026-01-02"):
        assert said in line


def test_rows_may_be_of_other_commits_than_the_file(tmp_path):
    rows = [row | {"commit": "fedcba9876-changed"} for row in REPORT["rows"]]
    (tmp_path / "some.json").write_text(json.dumps(REPORT | {"rows": rows}))
    _, line = plots.measured("some.json", folder=tmp_path)
    assert "commit fedcba9 with changes" in line
    assert "0123456" not in line


@pytest.mark.parametrize("wanted", [{"study": "none"}, {"column": 1}])
def test_what_was_not_measured_is_said(tmp_path, wanted):
    (tmp_path / "some.json").write_text(json.dumps(REPORT))
    rows, line = plots.measured("some.json", folder=tmp_path, **wanted)
    assert rows.empty
    assert "not measured" in line


def test_a_missing_file_is_said(tmp_path):
    rows, line = plots.measured("some.json", folder=tmp_path)
    assert rows.empty
    assert "is not here" in line


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(DataError, match=r"some\.json"):
        plots.measured("some.json", folder=tmp_path)


@pytest.mark.parametrize("name", ["data.json", "finetune.json", "train.json"])
def test_the_reports_of_the_repository_can_be_read(name):
    rows, line = plots.measured(name)
    assert len(rows), line
