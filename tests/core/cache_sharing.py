"""What two processes do with one cache at the same time: `python cache_sharing.py ROOT READY`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from lunar_tune.engine.cache import ActivationCache


def share(root: Path, ready: Path) -> bool:
    """Begin when both are ready; return whether it was this one that captured."""
    cache = ActivationCache(1.0, root)
    once, busy, gone = (cache.entry(32 * letter, {"model": letter}) for letter in "abc")
    (ready / str(os.getpid())).touch()
    while len(list(ready.iterdir())) < 2:
        time.sleep(0.01)
    with once.locked():  # of two that want the same, one captures it
        tensor = once.load("x")
        captured = tensor is None
        if tensor is None:
            time.sleep(0.2)  # long enough for the other to come
            tensor = torch.arange(1000)
            once.save("x", tensor)
        assert int(tensor.sum()) == 499500
    for turn in range(40):  # without a lock, the same names over and over: never half a file
        tensor = torch.full((20_000,), turn % 4)
        assert busy.save(f"point-{turn % 4}", tensor)
        read = busy.load(f"point-{turn % 4}")
        assert read is not None
        assert torch.equal(read, tensor)
    for _ in range(40):  # what is read while the other removes it is right or not there
        with gone.locked():
            gone.save("x", tensor)
        read = gone.load("x")
        assert read is None or torch.equal(read, tensor)
        cache.remove(gone.key)
    return captured


if __name__ == "__main__":
    sys.stdout.write(f"{share(*map(Path, sys.argv[1:]))}\n")
