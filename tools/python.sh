#!/bin/sh
# Run a script with the book's Python: that of .venv when there is one, else the first on the PATH
# that is new enough. PYTHON=/some/python overrides the search.
set -eu

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

for python in .venv/bin/python ${PYTHON:-python3.12 python3.11 python3.13 python3 python}; do
    if new_enough "$python"; then
        exec "$python" "$@"
    fi
done
echo "No Python 3.11 or newer was found${PYTHON:+ at $PYTHON}: this book needs one." >&2
echo "Install Python 3.12 (python.org, your package manager, or conda), or name one: PYTHON=/path/to/python3.12 make book" >&2
exit 1
