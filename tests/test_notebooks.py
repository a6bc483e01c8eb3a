"""The chapters: their anatomy in the repository, and what a reader sees once they ran."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import anatomy
import notebooks as nbs
from new_chapter import chapter

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [p.stem for p in PATHS]
LOCAL = (f"{ROOT}/", f"{Path.home()}/", *filter(None, [os.environ.get("STIMAGE_CACHE")]))
Notebook = dict[str, Any]


# --- the rules notice what they are there for ---------------------------------------------------


def test_the_small_chapter_keeps_every_rule() -> None:
    assert anatomy.problems(chapter(), "01_small") == []


def cell(notebook: Notebook, name: str) -> dict[str, Any]:
    return next(c for c in notebook["cells"] if c["id"] == name)


def replace(name: str, old: str, new: str) -> Callable[[Notebook], None]:
    def change(notebook: Notebook) -> None:
        text = nbs.source(cell(notebook, name))
        assert old in text
        cell(notebook, name)["source"] = text.replace(old, new)

    return change


def append(name: str, text: str) -> Callable[[Notebook], None]:
    def change(notebook: Notebook) -> None:
        cell(notebook, name)["source"] = nbs.source(cell(notebook, name)) + text

    return change


def drop(name: str) -> Callable[[Notebook], None]:
    return lambda notebook: notebook["cells"].remove(cell(notebook, name))


def put(name: str, key: str, value: Any) -> Callable[[Notebook], None]:
    return lambda notebook: cell(notebook, name).update({key: value})


def markdown(name: str, text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def code(name: str, text: str, *tags: str) -> dict[str, Any]:
    new = {"outputs": [], "execution_count": None, "metadata": {"tags": list(tags)}}
    return {"cell_type": "code", "id": name, "source": text} | new


def one_round(k: int) -> list[dict[str, Any]]:
    return [markdown(f"round-{k}", f"## Round {k}\n\n**Predict.** What?"), code(f"code-{k}", "1")]


def insert(position: int, *new: dict[str, Any]) -> Callable[[Notebook], None]:
    def change(notebook: Notebook) -> None:
        notebook["cells"][position:position] = copy.deepcopy(list(new))

    return change


def figure(part: str, **values: str) -> Callable[[Notebook], None]:
    return lambda notebook: cell(notebook, "fig-line")["metadata"]["mystnb"][part].update(values)


BROKEN: list[tuple[str, str, Callable[[Notebook], None]]] = [
    ("valid", "used twice", put("seen-1", "id", "seen-2")),
    ("valid", "notebook is not valid", put("seen-1", "id", "no spaces allowed")),
    ("stripped", "version", lambda nb: nb.update(nbformat_minor=4)),
    ("stripped", "metadata", lambda nb: nb["metadata"].update(language_info={"name": "python"})),
    ("stripped", "cell code-1", put("code-1", "execution_count", 3)),
    (
        "stripped",
        "cell code-1",
        put("code-1", "outputs", [{"output_type": "stream", "name": "stdout", "text": "1"}]),
    ),
    ("stripped", "cell code-1", put("code-1", "metadata", {"collapsed": True})),
    ("title", "first line", replace("title", "# 1. ", "# ")),
    ("title", "first line", replace("title", "# 1. ", "# 2. ")),
    ("title", "no **Question.**", replace("title", "**Question.**", "Question:")),
    ("title", "In one sentence", replace("title", "**In one sentence.**", "")),
    ("title", "no [Open in Colab]", replace("title", "01_small", "02_other")),
    ("objectives", "does not start", replace("objectives", "## Objectives", "## Aims")),
    ("objectives", "three to five", replace("objectives", "- Stop after five lines.\n", "")),
    ("objectives", "**Data.**", replace("objectives", "**Data.**", "Data")),
    ("opening", "not the code cell", insert(2, markdown("stray", "A stray cell."))),
    ("opening", "not exactly one", insert(8, code("again", "SIZE = 3  # px", "parameters"))),
    ("colab", "guarded install", replace("colab", "if ", "if True or ")),
    ("colab", "remove-cell", put("colab", "metadata", {"tags": ["colab"]})),
    ("imports", "move it", append("code-1", "\nimport json")),
    ("imports", "longer than", append("imports", "\n# why" * 14)),
    ("parameters", "# comment", replace("parameters", "SEED = 0  # of every draw", "SEED = 0")),
    ("parameters", "scalar", append("parameters", "\nSIZES = [1, 2]  # px")),
    ("parameters", "STUDY", replace("parameters", '"demo"', '"mob"')),
    ("parameters", "SEED", replace("parameters", "SEED", "DRAW")),
    ("length", "more than 20", append("code-1", "\nprint()" * 20)),
    ("length", "is empty", put("code-1", "source", [])),
    ("rounds", "3 rounds", replace("round-3", "## Round 3\n", "")),
    ("rounds", "8 rounds", insert(9, *(c for k in range(5, 9) for c in one_round(k)))),
    ("rounds", "no **Predict.**", replace("round-3", "**Predict.**", "Guess.")),
    ("rounds", "no code", drop("code-3")),
    ("figures", "no tag", lambda nb: cell(nb, "fig-line")["metadata"].update(tags=[])),
    ("figures", "no caption", figure("figure", caption="")),
    ("figures", "figure name", figure("figure", name="line")),
    ("figures", "figure name", figure("figure", name="fig-02-line")),
    ("figures", "alt text", figure("image", alt="A line.")),
    ("figures", "repr", replace("fig-line", "\nplt.show()", "")),
    ("figures", "no figure", drop("fig-line")),
    ("exercises", "numbered", replace("exercise-2", "Exercise 2", "Exercise 3")),
    ("exercises", "(N minutes)", replace("exercise-1", " (3 minutes)", "")),
    ("exercises", "no collapsed hint", replace("exercise-1", "<summary>Hint", "<summary>Help")),
    ("exercises", "not by stub", drop("check-1")),
    ("exercises", "does not assign", replace("stub-1", "answer_1", "answer")),
    ("exercises", "check does not", replace("check-1", "check_1(answer_1)", "check_1(None)")),
    ("exercises", "last line", append("solution-1", "\nprint(1)")),
    ("exercises", "not hidden", put("solution-1", "metadata", {"tags": ["solution"]})),
    ("quick_checks", "not two", drop("quick-1")),
    ("quick_checks", "collapsed answer", replace("quick-1", "<summary>Answer", "<summary>So")),
    ("claims", "asserts", replace("claims", "assert ", "")),
    ("closing", "ends with", replace("end", "## Limits", "## Bounds")),
    ("closing", "DOI", replace("end", "https://doi.org/10.1000/182", "")),
    ("plain_markdown", "role", append("seen-1", "\nSee {term}`spot`.")),
    ("plain_markdown", "role", append("seen-1", "\n```{note}\nLook.\n```")),
    ("plain_markdown", "HTML", append("seen-1", "\n<img src='x.png'>")),
    ("plain_markdown", "without alt text", append("seen-1", "\n![](x.png)")),
    ("plain_markdown", "open", append("seen-1", "\n<details>")),
    ("plain_markdown", "blank line", replace("quick-1", "</summary>\n\n", "</summary>\n")),
    ("one_sentence_per_line", "two sentences", append("seen-1", " Then another one came.")),
    ("no_local_path", "local path", append("code-1", '\nopen("/home/someone/x.csv")')),
]


@pytest.mark.parametrize(("rule", "message", "change"), BROKEN)
def test_a_broken_chapter_is_noticed(
    rule: str, message: str, change: Callable[[Notebook], None]
) -> None:
    notebook = chapter()
    change(notebook)
    found = [p for p in anatomy.problems(notebook, "01_small") if p.startswith(f"{rule}: ")]
    assert any(message in p for p in found), anatomy.problems(notebook, "01_small")


def test_every_rule_is_broken_once() -> None:
    assert {rule.__name__ for rule in anatomy.RULES} == {rule for rule, _, _ in BROKEN}


@pytest.mark.parametrize(
    "line",
    [
        "Spots are 100 um across, i.e. larger than a cell.",
        "Chen et al. (2024) cut squares.",
        "**Time.** About 40 minutes.",
        "1. First open the file.",
        "The mean is $x. Y$ and `a. B` is code.",
        "See Fig. A and the vs. B comparison.",
    ],
)
def test_one_sentence_is_not_taken_for_two(line: str) -> None:
    notebook = chapter()
    append("seen-1", "\n" + line)(notebook)
    assert list(anatomy.one_sentence_per_line(notebook, "01_small")) == []


def executed(**outputs: list[dict[str, Any]]) -> Notebook:
    """Return the small chapter as it is after a good run, but for the given outputs."""
    text = lambda t: {"output_type": "execute_result", "metadata": {}, "data": {"text/plain": t}}  # noqa: E731
    image = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "iVBO"}}
    notebook = chapter()
    for c in notebook["cells"]:
        if {"check"} & nbs.tags(c):
            c["outputs"] = [text("'Not answered yet: add them'")]
        if {"solution"} & nbs.tags(c):
            c["outputs"] = [text("'Correct: the sum'")]
        if {"figure"} & nbs.tags(c):
            c["outputs"] = [image]
    for name, value in outputs.items():
        cell(notebook, name.replace("_", "-"))["outputs"] = value
    return notebook


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text}


def test_a_good_run_is_accepted() -> None:
    log = [stream("slide A_1: 3 spots\nslide A_2: 4 spots\n", "stderr")]
    assert anatomy.output_problems(executed(code_1=log), ("/somewhere",)) == []


IMAGE = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "iVBO"}}


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"code_1": [stream("careful", "stderr")]}, "stderr"),
        ({"code_1": [stream("in /somewhere/else")]}, "path of this machine"),
        ({"check_1": [stream("Correct: already")]}, "untouched stub"),
        ({"solution_2": [stream("Not answered yet")]}, "does not say 'Correct'"),
        ({"solution_2": []}, "does not say 'Correct'"),
        ({"fig_line": []}, "0 images"),
        ({"fig_line": [IMAGE, IMAGE]}, "2 images"),
        ({"fig_line": [IMAGE, stream("[<Line2D>]")]}, "text beside"),
        (
            {"code_1": [{"output_type": "error", "ename": "E", "evalue": "v", "traceback": []}]},
            "failed",
        ),
    ],
)
def test_a_bad_run_is_noticed(outputs: dict[str, Any], message: str) -> None:
    (found,) = anatomy.output_problems(executed(**outputs), ("/somewhere",))
    assert message in found


# --- the chapters of the book -------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_anatomy(path: Path) -> None:
    found = anatomy.problems(nbs.read(path), path.stem)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_strip_changes_nothing(path: Path, tmp_path: Path) -> None:
    nbs.write(nbs.strip(nbs.read(path)), tmp_path / path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_chapters_are_the_ones_of_the_table_of_contents() -> None:
    from build_book import chapters_of

    assert chapters_of(ROOT / "_toc.yml") == NAMES


def test_figure_names_are_unique_over_the_book() -> None:
    names = [
        c["metadata"]["mystnb"]["figure"]["name"]
        for path in PATHS
        for c in nbs.read(path)["cells"]
        if "figure" in nbs.tags(c)
    ]
    assert len(names) == len(set(names))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_execution(path: Path, run_of_demo: Path) -> None:
    found = anatomy.output_problems(nbs.read(run_of_demo / path.name), LOCAL)
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_the_run_is_recorded(run_of_demo: Path) -> None:
    record = json.loads((run_of_demo / "run.json").read_text(encoding="utf-8"))
    assert record["study"] == "demo"
    assert record["complete"]
    assert list(record["chapters"]) == NAMES
