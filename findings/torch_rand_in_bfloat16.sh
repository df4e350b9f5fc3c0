#!/usr/bin/env bash
# torch.rand in bfloat16 is exactly 0 once in 512 draws, on a CPU.
#
# Version: torch 2.13.0, on a CPU.
# Guess: torch.rand(n, dtype=bfloat16) is torch.rand(n), rounded to bfloat16; so 0 is as rare as in
#   float32, where four million draws hold none.
# Seen: what would round up to 1 becomes 0 instead, because 1 is outside of [0, 1). In bfloat16 that
#   is one draw in 512 (in float16 one in 4,096), and the mean is .498.
# Why it matters: times t, thresholds of a mask and Gumbel noise are drawn this way. log(u) or a
#   division by t is infinite for one element in 512, and a time near 1 turns into the time 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0
"$folder/bin/python" - <<'END'
import torch

def draws(dtype):
    return torch.rand(4_000_000, dtype=dtype, generator=torch.Generator().manual_seed(0)).double()

exact = draws(torch.float32)
assert (exact == 0).sum() == 0
for dtype, one_in in ((torch.bfloat16, 512), (torch.float16, 4096)):
    u = draws(dtype)
    zeros = u == 0
    print(dtype, "zeros:", zeros.sum().item(), "mean:", u.mean().item())
    assert 0.9 < zeros.double().mean() * one_in < 1.1
    assert exact[zeros].min() > 1 - 1 / one_in - 1e-6      # in float32 all of these are near 1
    rounded = exact.to(dtype).double()
    assert torch.equal(u[~zeros], rounded[~zeros])         # the others are rounded as one expects
    assert (rounded[zeros] == 1).all()
END
