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
    once, gone = (cache.entry(32 * letter, {"model": letter}) for letter in "ab")
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
    for turn in range(40):  # without a lock: never half a file, and right or not there
        gone.save(f"point-{turn % 4}", tensor + turn % 4)
        read = gone.load(f"point-{turn % 4}")
        assert read is None or torch.equal(read, tensor + turn % 4)
        cache.remove(gone.key)
    return captured


if __name__ == "__main__":
    sys.stdout.write(f"{share(*map(Path, sys.argv[1:]))}\n")
