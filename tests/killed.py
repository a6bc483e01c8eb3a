"""Started from test_training.py: a training that is killed in the middle of an epoch."""

import os
import signal

import torch
from test_training import QUICK, model_of, study

from helpers import training

torch.set_num_threads(1)
training.SAVE_SECONDS = 0.0
steps, step = 0, training.Run._step


def dies(*args: object) -> torch.Tensor:
    """Step; in the second step of the third epoch, die as the power cord dies."""
    global steps
    steps += 1
    if steps == 2 * 2 + 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)


training.Run._step = dies
train, validation = study()
training.fit(model_of(), train, validation, QUICK, device="cpu")
