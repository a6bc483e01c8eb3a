#!/bin/sh
# Fill .venv with the tested set. The stamp .venv/installed comes last, and a .venv without it is
# removed and made again: after an interruption, some of its files may be incomplete.
# Downloads are cached by uv, so that starting again costs seconds.
set -eu
export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}" # torch is large, some networks are slow

rm -rf .venv
sh tools/python.sh -c 'import sys; print("Creating .venv with Python", sys.version.split()[0])'
sh tools/python.sh -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
.venv/bin/uv pip install --python .venv/bin/python -r requirements.txt
.venv/bin/uv pip install --python .venv/bin/python --no-deps --no-build-isolation --editable .
touch .venv/installed
