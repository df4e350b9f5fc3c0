#!/usr/bin/env bash
# A run that ended on CosineAnnealingLR and is resumed for twice as long gets the wrong rates.
#
# Version: torch 2.13.0.
# Guess: with T_max = 200 in the resumed script, step 100 has half the rate, as in a run of 200.
# Seen: load_state_dict brings back T_max = 100, and the rate *rises* again, to its maximum at step
#   200. Setting T_max = 200 after loading is worse: each rate is computed from the last one, which
#   was 0 at the end of the first run, and so it stays 0 for ever.
# Why it matters: "train it for longer" is what one does with a checkpoint. Nothing is reported; the
#   samples get worse, or the run does nothing. A LambdaLR of the step has neither fault.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0
"$folder/bin/python" - <<'END'
import torch

def begin(T_max):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max)

def rates(optimizer, scheduler, steps):
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found

optimizer, scheduler = begin(100)
assert abs(rates(optimizer, scheduler, 100)[-1]) < 1e-12
saved = optimizer.state_dict(), scheduler.state_dict()

wanted = rates(*begin(200), 200)[100:]
resumed, set_later = [], []
for T_max, found in ((None, resumed), (200, set_later)):
    optimizer, scheduler = begin(200)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    if T_max is not None:
        scheduler.T_max = T_max
    found.extend(rates(optimizer, scheduler, 100))
for name, found in (("wanted", wanted), ("resumed", resumed), ("T_max set later", set_later)):
    print(f"{name:16}", [round(rate, 3) for rate in found[::25] + found[-1:]])
assert abs(wanted[0] - 0.5) < 0.01 and abs(wanted[-1]) < 1e-12
assert resumed[0] < 0.001 and abs(resumed[-1] - 1) < 1e-9
assert max(set_later) < 1e-12
END
