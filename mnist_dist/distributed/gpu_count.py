"""Count the GPUs that torch would use on this node, without torch, which takes seconds to import.

`python -m mnist_dist.distributed.gpu_count` prints the number, for launch scripts.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Mapping, Sequence

# A driver that hangs must not hang the launch.
_TIMEOUT_S = 20.0
NO_NVIDIA_SMI = "nvidia-smi is not on the PATH"


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


def query_nvidia_smi(*flags: str, timeout: float) -> tuple[str, str | None]:
    """Run nvidia-smi; return its output, and if it fails, nothing and the reason.

    Args:
        flags: of nvidia-smi.
        timeout: seconds after which it is given up.
    """
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            ["nvidia-smi", *flags],
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            errors="replace",
        )
    except FileNotFoundError:
        return "", NO_NVIDIA_SMI
    except OSError as error:
        return "", f"nvidia-smi cannot be started: {error.strerror or error}"
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        # `subprocess.run` would wait forever: a process that hangs in the driver cannot be killed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        return "", f"nvidia-smi does not respond within {timeout:g} s"
    if process.returncode != 0:
        lines = [line.strip() for line in (out + "\n" + err).splitlines() if line.strip()]
        reason = lines[0].rstrip(".") if lines else f"exit code {process.returncode}"
        return "", f"nvidia-smi fails: {reason}"
    return out, None


if __name__ == "__main__":
    print(count_gpus(query_nvidia_smi("--list-gpus", timeout=_TIMEOUT_S)[0]))
