#!/usr/bin/env bash
# all_reduce(MAX) over gloo: whether a NaN arrives depends on the rank and on the place.
#
# Version: torch 2.13.0, gloo, two processes.
# Guess: NaN wins, as in torch.maximum; or it loses, as in C's fmax; but one of the two.
# Seen: of 40 numbers, a NaN of rank 0 arrives in the first half and is lost in the second; one of
#   rank 1 is lost in the first half and arrives in the second. A single number is NaN if rank 0 has
#   it, and is lost if rank 1 has it. All ranks see the same. SUM keeps every NaN.
# Why it matters: "is the loss finite everywhere?" or "the largest gradient" is asked by MAX. With
#   gloo the answer hides a NaN in every process but the first. Reduce isfinite() by MIN instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0
cat > "$folder/both.py" <<'END'
import sys
import torch
import torch.distributed as dist

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)

def reduced(rank_of_nan, n, operation):
    x = torch.ones(n)
    if rank == rank_of_nan:
        x[:] = float("nan")
    dist.all_reduce(x, operation)
    return x.isnan().tolist()

first_half = [True] * 20 + [False] * 20
second_half = [False] * 20 + [True] * 20
for operation in (dist.ReduceOp.MAX, dist.ReduceOp.MIN):
    assert reduced(0, 40, operation) == first_half
    assert reduced(1, 40, operation) == second_half
    assert reduced(0, 1, operation) == [True]
    assert reduced(1, 1, operation) == [False]
assert reduced(1, 40, dist.ReduceOp.SUM) == [True] * 40
assert torch.maximum(torch.tensor(1.0), torch.tensor(float("nan"))).isnan()
dist.barrier()
dist.destroy_process_group()
print(f"rank {rank}: as found")
END
export GLOO_SOCKET_IFNAME=lo
"$folder/bin/python" "$folder/both.py" 1 "$folder/meeting" &
other=$!
"$folder/bin/python" "$folder/both.py" 0 "$folder/meeting"
wait $other
