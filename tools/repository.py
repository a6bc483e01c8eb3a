"""Where the book's repository is; as a script: move the book to another one.

The address stands in ``_config.yml``.  The install for Colab, the Colab links, README and the
citation repeat it, because each of them is read alone; ``make repo URL=...`` changes them all.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^repository:\n(?:  .*\n)*?  url: (\S+)$", re.M)
URL = re.compile(r"https://github\.com/([A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+)")


def url(root: Path = ROOT) -> str:
    """Return the address of the repository, as https://github.com/OWNER/NAME."""
    return LINE.search((root / "_config.yml").read_text(encoding="utf-8"))[1]


def owner_and_name(address: str) -> str:
    """Return OWNER/NAME of an address.

    Raises
    ------
    ValueError
        It is none that Colab and ``git clone`` both take.
    """
    match = URL.fullmatch(address)
    if match is None or address.endswith((".git", ".")):
        raise ValueError(
            f"'{address}' is not the address of a repository on GitHub, from where Colab opens "
            "notebooks. Fix: make repo URL=https://github.com/OWNER/NAME, with nothing after NAME."
        )
    return match[1]


def move(address: str, root: Path = ROOT) -> list[str]:
    """Put ``address`` wherever a tracked file names the repository; return those files."""
    old, new = owner_and_name(url(root)), owner_and_name(address)
    named = re.compile(rf"(github(?:\.com)?/){re.escape(old)}(?![\w-])")  # a URL, or a Colab link
    listed = subprocess.run(
        ["git", "grep", "--name-only", "-I", "--fixed-strings", old],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode > 1:
        raise ValueError(f"This is no git checkout: {listed.stderr.strip()}")
    changed = []
    for name in listed.stdout.splitlines():
        file = root / name
        before = file.read_bytes().decode("utf-8")
        after = named.sub(rf"\g<1>{new}", before)
        if after != before:
            file.write_bytes(after.encode("utf-8"))
            changed.append(name)
    return changed


def main(arguments: list[str]) -> int:
    """Move the book to the given address; return the exit status."""
    try:
        changed = move("".join(arguments))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The book is at {url()}; files changed: {', '.join(changed) or 'none'}.")
    print("Look at `git diff`, then run `make test`.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
