"""Open JupyterLab on the exercises, with the data of this folder and without a network."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SLIDES = HERE / "data" / "STimage-1K4M"


def environment() -> dict[str, str]:
    """Return the environment of the notebooks: helpers and data of this folder, no downloads."""
    paths = [str(HERE / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    here = {"PYTHONPATH": os.pathsep.join(paths), "STIMAGE_CACHE": str(HERE / "data")}
    here |= {"HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "20000"}
    return os.environ | here | ({"STIMAGE_ROOT": str(SLIDES)} if SLIDES.is_dir() else {})


if __name__ == "__main__":  # arguments are passed on to JupyterLab
    command = [sys.executable, "-m", "jupyterlab", "--LabApp.default_url=/lab/tree/exercises"]
    sys.exit(subprocess.call([*command, *sys.argv[1:]], cwd=HERE, env=environment()))
