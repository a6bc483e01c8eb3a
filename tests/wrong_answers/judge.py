"""Ask each check of a chapter about no answer, and about the wrong ones in ``WRONG``.

``tools/run_notebooks.py --also`` runs this after the chapter's last cell, with its variables.
``WRONG`` maps the number of an exercise to pairs: a wrong answer, and what the check says to it.
"""


def judge():
    """Raise an AssertionError with all complaints; names here must not hide the chapter's."""
    checks = {int(name[6:]): f for name, f in globals().items() if name.startswith("check_")}
    if set(checks) != set(WRONG):
        raise AssertionError(f"exercises {list(checks)}, but wrong answers to {list(WRONG)}")
    complaints = []
    for number, cases in WRONG.items():
        if not 2 <= len(cases) <= 5:
            complaints.append(f"check_{number}: {len(cases)} wrong answers, not 2 to 5")
        for given, helpful in [(None, "Not answered yet"), *cases]:
            try:
                said = checks[number](given)
            except AssertionError as error:
                said = str(error)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            if not helpful or helpful not in said:  # every text has an empty one in it
                shown = repr(given).replace("\n", " ")[:60]
                complaints.append(f"check_{number}({shown}) says {said!r}, not {helpful!r}")
    if complaints:
        raise AssertionError("\n".join(complaints))


judge()
