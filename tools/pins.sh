#!/bin/sh
# Resolve requirements.txt for Linux, macOS and Windows and for Python 3.11 and later.
# Pins that still fit pyproject.toml are kept; pass --upgrade (or --upgrade-package NAME) to move them.
set -eu

.venv/bin/uv pip compile pyproject.toml --extra book --extra imagenet --extra test --universal --python-version 3.11 \
    --annotation-style line --custom-compile-command "make pins" --output-file requirements.txt --quiet "$@"
