"""The smallest chapter that keeps every rule, for tests of the tools."""

from __future__ import annotations

from typing import Any

import anatomy
import notebooks as nbs


def markdown(name: str, text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def code(name: str, text: str, *tags: str, **metadata: Any) -> dict[str, Any]:
    if tags:
        metadata["tags"] = list(tags)
    return {
        "cell_type": "code",
        "id": name,
        "metadata": metadata,
        "source": text,
        "outputs": [],
        "execution_count": None,
    }


def one_round(k: int) -> list[dict[str, Any]]:
    return [
        markdown(
            f"round-{k}", f"## Round {k}\n\nWhy this matters.\n\n**Predict.** What comes out?"
        ),
        code(f"code-{k}", f"print(rng.integers({k} + 1))"),
        markdown(f"seen-{k}", "A number came out."),
    ]


def exercise(k: int) -> list[dict[str, Any]]:
    hint = "<details><summary>Hint</summary>\n\nAdd them.\n\n</details>"
    check = f"""def check_{k}(answer):
    if answer is None:
        return "Not answered yet: add the two numbers"
    assert answer == {k} + 1, "that is not the sum"
    return "Correct: the sum"


check_{k}(answer_{k})"""
    return [
        markdown(f"exercise-{k}", f"### Exercise {k} (3 minutes)\n\nAdd {k} and 1.\n\n{hint}"),
        code(f"stub-{k}", f"answer_{k} = None  # your code here", "exercise"),
        code(f"check-{k}", check, "check"),
        code(
            f"solution-{k}",
            f"check_{k}({k} + 1)",
            "solution",
            "hide-cell",
            jupyter={"source_hidden": True},
        ),
    ]


def quick_check(k: int) -> dict[str, Any]:
    answer = "<details><summary>Answer</summary>\n\nBecause.\n\n</details>"
    return markdown(f"quick-{k}", f"**Quick check.** Why?\n\n{answer}")


def chapter(name: str = "01_small") -> dict[str, Any]:
    """Return a chapter that keeps every rule, as parsed JSON."""
    repository = anatomy.REPOSITORY.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb"
    cells = [
        markdown(
            "title",
            f"# {int(name[:2])}. Small\n\n**Question.** Does it run?\n\n"
            f"**In one sentence.** It does.\n\n[Open in Colab]({link})",
        ),
        markdown(
            "objectives",
            "## Objectives\n\n- Run a cell.\n- Read its output.\n- Change it.\n\n"
            "**Prerequisites.** None.\n\n**Time.** 1 minute.\n\n**Data.** None.",
        ),
        code("colab", anatomy.COLAB_GUARD, "colab", "remove-cell"),
        code("imports", "import matplotlib.pyplot as plt\nimport numpy as np", "imports"),
        code(
            "parameters",
            'STUDY = "demo"  # which study runs\nSEED = 0  # of every draw',
            "parameters",
        ),
        code("setup", "rng = np.random.default_rng(SEED)\nprint(STUDY)", "setup"),
        *one_round(1),
        *one_round(2),
        code(
            "fig-line",
            "plt.plot([0, 1], [0, 1])\nplt.show()",
            "figure",
            mystnb={
                "figure": {"caption": "A line from one corner.", "name": f"fig-{name[:2]}-line"},
                "image": {"alt": "A straight line from the lower left to the upper right."},
            },
        ),
        quick_check(1),
        *one_round(3),
        quick_check(2),
        *one_round(4),
        *exercise(1),
        *exercise(2),
        code("claims", "assert SEED == 0", "claims"),
        markdown(
            "end",
            "## Key points\n\n- It runs.\n\n## Limits\n\n- It is small.\n\n## What is next\n\n"
            "The next one.\n\n## References\n\n- A. Author. A title. https://doi.org/10.1000/182",
        ),
    ]
    return nbs.strip({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
