"""torchrun --nproc-per-node 2 dies.py: one rank leaves; the other says so within the group's timeout."""

from __future__ import annotations

import datetime
import os
import time

import torch
import torch.distributed as dist

import subquad.distributed as sd


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    layout = sd.SequenceLayout.contiguous(16)
    x, taps = torch.ones(1, 8, 4), torch.ones(4, 3)
    sd.causal_conv1d(x, taps, layout=layout)
    if dist.get_rank() == 1:
        os._exit(0)
    begin = time.monotonic()
    try:
        for _ in range(2):
            sd.causal_conv1d(x, taps, layout=layout)
    except RuntimeError:
        print("raised", time.monotonic() - begin < 25, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
