"""Started by torchrun from test_training.py: fit in every process, the first one writes weights."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from test_training import QUICK, model_of, study

from helpers import training

torch.set_num_threads(1)
train, validation = study()
for micro in (None, 5):
    settings = replace(QUICK, batch_size=16, augment=1.0, micro_batch=micro)
    model, cache = model_of(dropout=0.0), micro is None
    fitted = training.fit(model, train, validation, settings, device="cpu", cache=cache)
    if torch.distributed.get_rank() == 0:
        torch.save(fitted.model.state_dict(), Path(sys.argv[1]) / f"{micro}.pt")
        fitted.history.to_csv(Path(sys.argv[1]) / f"{micro}.csv", index=False)
again = training.fit(model_of(dropout=0.0), train, validation, settings, device="cpu")
assert again.history["value"].tolist() != fitted.history["value"].tolist()  # seconds: read back
torch.distributed.destroy_process_group()
