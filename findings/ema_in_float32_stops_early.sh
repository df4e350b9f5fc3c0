#!/usr/bin/env bash
# An EMA in float32 with a decay of .9999 never comes nearer than .06 % to weights that stand still.
#
# Version: torch 2.13.0, torch.optim.swa_utils.AveragedModel.
# Guess: given enough updates the average equals constant weights to rounding, 1e-7 or so; float32
#   is what everyone keeps the average in.
# Seen: the average goes from 1.002 towards 1 and stops at 1.000596, because the next step, 1e-4 of
#   the distance, is less than half a unit in the last place. With .999 it stops at 1.00006. In
#   float64 it goes on.
# Why it matters: weights near 1 (norms) and anything that has converged keep an error thousands of
#   times as large as rounding, always towards where they came from. A longer run does not help.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0
"$folder/bin/python" - <<'END'
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

def stops_at(decay, dtype, updates):
    model = torch.nn.Linear(1, 1, bias=False).to(dtype)
    torch.nn.init.constant_(model.weight, 1.002)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    ema.update_parameters(model)            # the first one copies
    torch.nn.init.constant_(model.weight, 1.0)
    for _ in range(updates):
        ema.update_parameters(model)
    return ema.module.weight.item()

found = stops_at(0.9999, torch.float32, 20_000)
longer = stops_at(0.9999, torch.float32, 40_000)
exact = stops_at(0.9999, torch.float64, 40_000)
faster = stops_at(0.999, torch.float32, 20_000)
print("float32:", found, longer, "float64:", exact, "float32, .999:", faster)
assert 1.0005 < found < 1.0007
assert longer == found                      # it has stopped
assert abs(exact - (1 + 0.002 * 0.9999**40_000)) < 1e-9
assert 1.00005 < faster < 1.00007
END
