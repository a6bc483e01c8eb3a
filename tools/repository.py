"""The address of the book's repository; as a script, change it everywhere.

The address is set in ``_config.yml``. The install cell for Colab, the Colab links, README and the
citation repeat it, because each of them is used on its own; ``make repo URL=...`` changes them all.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^repository:\n(?:  .*\n)*?  url: (\S+)$", re.M)
URL = re.compile(r"https://github\.com/([A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+)(?<!\.git)(?<!\.)")


def url(root: Path = ROOT) -> str:
    """Return the address of the repository, as https://github.com/OWNER/NAME."""
    return LINE.search((root / "_config.yml").read_text(encoding="utf-8"))[1]


def owner_and_name(address: str) -> str:
    """Return the OWNER/NAME part of an address that both Colab and ``git clone`` accept."""
    if match := URL.fullmatch(address):
        return match[1]
    raise SystemExit(
        f"'{address}' is not the address of a GitHub repository, which Colab needs."
        " Fix: make repo URL=https://github.com/OWNER/NAME, with nothing after NAME."
    )


def move(address: str, root: Path = ROOT) -> list[str]:
    """Change the address to ``address`` in every tracked file that has it; return those files."""
    old, new = owner_and_name(url(root)), owner_and_name(address)
    named = re.compile(rf"(github(?:\.com)?/){re.escape(old)}(?![\w-])")  # a URL, or a Colab link
    command = ["git", "grep", "--name-only", "-I", "--fixed-strings", old]
    listed = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=False)
    for name in listed.stdout.splitlines():
        text = (root / name).read_bytes().decode("utf-8")
        (root / name).write_bytes(named.sub(rf"\g<1>{new}", text).encode("utf-8"))
    return listed.stdout.splitlines()


if __name__ == "__main__":
    changed = move("".join(sys.argv[1:]))
    print(f"The book is now at {url()}. Files changed: {', '.join(changed) or 'none'}.")
    print("Review `git diff`, then run `make test`.")
