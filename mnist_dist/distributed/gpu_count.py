"""Count the GPUs that torch would use on this node, without torch, which takes seconds to import.

`python -m mnist_dist.distributed.gpu_count` prints the number, for launch scripts.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

# A driver that hangs must not hang the launch.
_TIMEOUT_S = 20.0


def count_gpus(listing: str, environment: Mapping[str, str] = os.environ) -> int:
    """Return how many GPUs CUDA, and so torch, shows to one process.

    Args:
        listing: the output of `nvidia-smi --list-gpus`; empty if that failed.
        environment: CUDA_VISIBLE_DEVICES counts as CUDA reads it.
    """
    uuids, split = [], set()
    for line in listing.splitlines():
        if re.match(r"GPU \d+:", line):
            uuids.append(line.rpartition("UUID: ")[2].rstrip(")"))
        elif uuids and re.match(r"\s+MIG ", line):
            split.add(len(uuids) - 1)
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    numbers = list(range(len(uuids))) if chosen is None else _visible(chosen, uuids)
    whole = [number for number in numbers if number not in split]
    # Of all MIG instances, CUDA shows one, and that only where it shows no whole GPU.
    return len(whole) or min(1, len(numbers))


def _visible(chosen: str, uuids: Sequence[str]) -> list[int]:
    """Return the GPUs that a value of CUDA_VISIBLE_DEVICES selects; the first bad entry ends it."""
    numbers: list[int] = []
    for entry in chosen.split(","):
        name = entry.strip()
        matches = [number for number, uuid in enumerate(uuids) if uuid.startswith(name)]
        if name.startswith("MIG-"):
            return numbers or [0] * bool(uuids)
        digits = re.match(r"\d+", name)
        if digits:
            number = int(digits[0])
        else:
            number = matches[0] if name.startswith("GPU-") and len(matches) == 1 else -1
        if not 0 <= number < len(uuids):
            break
        if number in numbers:
            return []
        numbers.append(number)
    return numbers


def _list_gpus() -> str:
    """Return what nvidia-smi lists; empty if it fails, whatever it prints then."""
    words = ["nvidia-smi", "--list-gpus"]
    try:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, errors="replace"
        )
        out, _ = process.communicate(timeout=_TIMEOUT_S)
    except OSError:
        return ""
    except subprocess.TimeoutExpired:
        process.kill()  # not waited for: what hangs in the driver cannot be killed
        return ""
    return out if process.returncode == 0 else ""


if __name__ == "__main__":
    print(count_gpus(_list_gpus()))
