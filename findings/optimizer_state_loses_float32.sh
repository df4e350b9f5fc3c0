#!/usr/bin/env bash
# Optimizer.load_state_dict casts a float32 state to bfloat16 if the parameter is bfloat16.
#
# Version: torch 2.13.0.
# Guess: a state is loaded in the type in which it was saved; the checkpoint holds float32.
# Seen: every floating state but "step" takes the type of its parameter. Float32 copies of the
#   weights, which an optimiser keeps so that small updates are not lost, come back with 8 bits.
# Why it matters: training bfloat16 weights with such copies is right until the first resume, which
#   rounds them, and wrong after it, because all later updates are rounded too. Nothing is reported.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0
"$folder/bin/python" -W ignore - <<'END'
import io
import torch

class SGDWithCopies(torch.optim.Optimizer):
    """Plain gradient descent on float32 copies of the parameters."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "copy" not in state:
                    state["copy"] = p.detach().float()
                state["copy"] -= group["lr"] * p.grad.float()
                p.data.copy_(state["copy"])

def train(resume):
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = SGDWithCopies([p], lr=1e-4)
    for step in range(200):
        if step == 10 and resume:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            assert saved["state"][0]["copy"].dtype == torch.float32    # the file has them
            optimizer = SGDWithCopies([p], lr=1e-4)
            optimizer.load_state_dict(saved)
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p.item(), optimizer.state[p]["copy"].dtype

print("in one go:", train(False), "resumed:", train(True))
assert abs(train(False)[0] - 0.98) < 0.004
assert train(False)[1] == torch.float32
assert train(True) == (1.0, torch.bfloat16)    # after the resume it does not move any more
END
