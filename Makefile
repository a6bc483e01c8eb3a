# Everything runs in .venv, which `make` fills first; `make` alone lists the targets.
STUDY ?= demo
STIMAGE_CACHE ?= $(CURDIR)/.cache
# Threads that spin for long while they wait make training 8 times slower on a busy machine.
GOMP_SPINCOUNT ?= 20000
export STUDY STIMAGE_CACHE GOMP_SPINCOUNT
RUN = .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help book test lab workshop check lint benchmarks results pins chapter links repo clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1: /p' Makefile

book: .venv/installed  ## run every notebook, build the pages (STUDY=mob make book: on real slides)
	@$(RUN) tools/run_notebooks.py && $(RUN) tools/build_book.py

test: .venv/installed  ## test the helpers, the notebooks and the pages
	@$(RUN) -m pytest

lab: .venv/installed  ## open your copies of the notebooks in JupyterLab
	@$(RUN) tools/lab.py $(ARGS)

workshop: .venv/installed  ## a folder and a zip for a workshop: exercises, solutions, data, the book
	@$(RUN) tools/workshop.py

check:  ## look at this machine: Python, packages, GPU, memory, disk, data (installs nothing)
	@sh tools/python.sh tools/check_environment.py

lint: .venv/installed  ## format and lint
	@$(RUN) -m ruff format --check . && $(RUN) -m ruff check .

benchmarks: .venv/installed  ## measure the data layer again, into results/
	@$(RUN) benchmarks/data.py

results: .venv/installed  ## measure the ladder of splits, into results/ (make results STUDY=mob; TOWER=name: that tower alone)
	@$(RUN) benchmarks/ladder.py $(STUDY) $(if $(TOWER),--towers '$(TOWER)') $(ARGS)

pins: .venv/installed  ## resolve requirements.txt again from pyproject.toml, keeping what still fits
	@sh tools/pins.sh

chapter: .venv/installed  ## begin a chapter that passes all checks: make chapter NAME=12_expression
	@$(RUN) tools/new_chapter.py '$(NAME)'

links: .venv/installed  ## check that all pinned data and external links are still there
	@$(RUN) tools/check_links.py

repo:  ## move the book to another repository: make repo URL=https://github.com/OWNER/NAME
	@sh tools/python.sh tools/repository.py "$(URL)"

clean:  ## remove what was built and installed; downloads and simulated data in .cache stay
	@rm -rf _build .venv

.venv/installed: requirements.txt pyproject.toml
	@sh tools/install.sh
