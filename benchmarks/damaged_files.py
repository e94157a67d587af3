"""Damage the files of a run and of the cache, and run every command on them.

python -m benchmarks.damaged_files --combinations 1000 --seed 1

Each combination is one file, one kind of damage and one command, on a fresh copy of a small
completed run, in a process forked from one that has imported torch. The command must work, with the
results of the undamaged run, or end with one line that names the file; without a traceback, without
a hang, without running anything that a file contains, and without changing any other file.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.damages import ALL_DAMAGES, damages_of, files_of_run

_FORKSERVER = multiprocessing.get_context("forkserver")
_PRELOAD = ["train_ddp", "mnist_dist.run.tensorboard", "torch._dynamo", "torch.export"]
_PRELOAD += [f"mnist_dist.commands.{name}" for name in ("evaluate", "predict", "export", "runs")]
_PRELOAD += ["mnist_dist.commands.compare", "mnist_dist.commands.doctor.command"]
_TIMEOUT_S = 120.0
_MEMORY = 8 << 30  # bytes that a command may allocate

COMMANDS = {
    "train": ["train", "--data=data.npz", "--cache-dir=cache", "--run-dir=run", "--epochs=3"],
    "evaluate": ["evaluate", "run", "--cache-dir=cache", "--json"],
    "predict": ["predict", "run", "digit.png", "--json"],
    "export": ["export", "run", "--format=torch", "--output=model.pt2"],
    "runs": ["runs", "run", "--json"],
    "compare": ["compare", "run", "twin", "--json"],
    "doctor": ["doctor", "--run-dir=run", "--json"],
    "doctor --train": ["doctor", "--train", "--run-dir=run", "--json", "--timeout=60"],
}
# What a command may change of the run and the cache. No command may change anything else.
_WRITERS = {"train": ("run", "cache"), "evaluate": ("cache",), "export": ("model.pt2",)}


@dataclass(frozen=True)
class Combination:
    """One trial; plain and picklable."""

    file: str
    damage: str
    command: str
    seed: int

    def __str__(self) -> str:
        """Describe it in a line of the report."""
        return f"{self.command} with {self.file}: {self.damage} (seed {self.seed})"


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int | None
    """Exit code, None if it had to be killed."""
    out: str
    err: str
    changed: tuple[str, ...]
    """Files other than those it may change that are no longer as they were."""

    def fault(self, combination: Combination, expected: "Outcome") -> str | None:
        """Describe what is wrong with it, None if nothing."""
        errors = [line for line in self.err.splitlines() if "mnist-dist: error" in line]
        if combination.command.startswith("doctor") and self.code == 1:  # a report, no error
            errors = [json.loads(self.out)["verdict"]]
        if self.code is None:
            return "hangs"
        if "Traceback" in self.err + self.out:
            return "traceback"
        if any(not (c.isprintable() or c == "\n") for c in self.out + self.err):
            return "prints control characters"
        if "executed" in self.changed:
            return "executed"
        if self.changed:
            return f"changed {', '.join(self.changed)}"
        if combination.command == "compare" and self.code == 1:  # other losses, which it reports
            return None if json.loads(self.out)["within"] is False else "other results"
        if self.code == 0:
            same = _figures(self.out, combination) == _figures(expected.out, combination)
            return None if same else "other results"
        if self.code not in (1, 2) or len(errors) != 1:
            return f"exit code {self.code} with {len(errors)} lines of error"
        stem = Path(combination.file).name.removesuffix(".json").removesuffix(".pt")
        return None if stem in errors[0] else "names another file"


def _figures(output: str, combination: Combination) -> Any:
    """Return what a command must still print if it works on damaged files."""
    if combination.command == "evaluate":
        return [json.loads(output)[name] for name in ("loss", "correct_by_digit", "count")]
    if combination.command == "train":
        # A lost best.pt is replaced by the best epoch from here on, with a warning.
        kinds = ("epoch 3", "test ", "digits ")[: 1 if "best" in combination.file else 3]
        lines = [line for line in output.splitlines() if line.startswith(kinds)]
        return [re.sub(r"[\d,]+ samples/s.*", "", line) for line in lines]
    return json.loads(output)[0]["probabilities"] if combination.command == "predict" else None


class Trials:
    """Runs combinations, each on a copy of one small run."""

    def __init__(self, directory: Path, commands: Sequence[str] = tuple(COMMANDS)) -> None:
        """Train the run, and note what the commands print on it undamaged."""
        self._commands = commands
        self._template, self._work = directory / "template", directory / "work"
        self._result = directory / "result"
        _FORKSERVER.set_forkserver_preload(_PRELOAD)
        self._template.mkdir()
        (self._template / "other").mkdir()
        (self._template / "other" / "file").write_text("precious")
        random_numbers = np.random.default_rng(0)
        images = random_numbers.integers(0, 256, (700, 28, 28), dtype=np.uint8)
        labels = np.arange(700, dtype=np.uint8) % 10
        train, test = slice(600), slice(600, 700)
        parts = {"x_train": images[train], "y_train": labels[train]}
        parts |= {"x_test": images[test], "y_test": labels[test]}
        np.savez(self._template / "data.npz", allow_pickle=False, **parts)
        digit = np.full((28, 28), 255, np.uint8)
        digit[4:24, 12:16] = 0
        Image.fromarray(digit).resize((140, 140)).save(self._template / "digit.png")
        words = [*COMMANDS["train"][:-1], "--epochs=2"]
        prepared = self._start(None, words)
        if prepared.code != 0:
            raise RuntimeError(prepared.err)
        shutil.rmtree(self._template)
        self._work.rename(self._template)
        shutil.copytree(self._template / "run", self._template / "twin")  # for compare
        self.files = sorted(map(str, files_of_run(self._template)))
        self._expected = {name: self._start(None, COMMANDS[name]) for name in commands}
        for name, outcome in self._expected.items():
            if outcome.code != 0:
                raise RuntimeError(f"{name} fails without damage: {outcome}")

    def combinations(self, seed: int, count: int) -> Iterator[Combination]:
        """Choose combinations so that all files, damages and commands have their turn."""
        chance = random.Random(seed)
        possible = [
            (file, damage, command)
            for file in self.files
            for damage in damages_of(self._template / file)
            for command in self._commands
        ]
        chance.shuffle(possible)
        for file, damage, command in itertools.islice(itertools.cycle(possible), count):
            yield Combination(file, damage, command, chance.randrange(1 << 32))

    def run(self, combination: Combination) -> tuple[Outcome, str | None]:
        """Run a command on damaged files; return what it did, and what is wrong with that."""
        outcome = self._start(combination, COMMANDS[combination.command])
        return outcome, outcome.fault(combination, self._expected[combination.command])

    def _start(self, combination: Combination | None, words: list[str]) -> Outcome:
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.rmtree(self._result, ignore_errors=True)
        shutil.copytree(self._template, self._work)
        self._result.mkdir()
        arguments = (self._work, self._result, combination, words)
        child = _FORKSERVER.Process(target=_child, args=arguments)
        child.start()
        child.join(_TIMEOUT_S)
        if child.exitcode is None:
            child.kill()
            child.join()
            code = None
        else:
            code = child.exitcode
        before = pickle.loads((self._result / "before").read_bytes())
        after = _snapshot(self._work)
        may_change = _WRITERS.get(words[0], ())
        changed = [
            name
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name) and not name.startswith(may_change)
        ]
        texts = [(self._result / name).read_text(errors="replace") for name in ("out", "err")]
        return Outcome(code, texts[0], texts[1], tuple(changed))


def _child(work: Path, result: Path, combination: Combination | None, words: list[str]) -> None:
    """Damage the files in `work`, and run the command there in this process."""
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(result / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ |= {"MNIST_DIST_URL": "http://127.0.0.1:9/mnist.pkl.gz", "OMP_NUM_THREADS": "1"}
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    torch.set_num_threads(1)
    os.chdir(work)
    if combination is not None:
        chance = random.Random(combination.seed)
        ALL_DAMAGES[combination.damage](Path(combination.file), chance)
    (result / "before").write_bytes(pickle.dumps(_snapshot(work)))
    from mnist_dist.__main__ import main

    sys.argv = ["mnist-dist", *words]
    code = main(words)
    sys.stdout.flush()
    os._exit(code)


def _snapshot(root: Path) -> dict[str, Any]:
    """Describe every file below `root`: its kind, and its content or size."""
    found: dict[str, Any] = {}
    for path in root.rglob("*"):
        status = path.lstat()
        content: Any = status.st_size
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file() and status.st_size < 1 << 30:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir():
            content = None
        found[str(path.relative_to(root))] = (stat.S_IFMT(status.st_mode), content)
    return found


def main() -> int:
    """Run the combinations and print a table; returns 1 if any command did wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--combinations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, counts, faults = time.monotonic(), Counter[tuple[str, str]](), []
    with tempfile.TemporaryDirectory(prefix="mnist-dist-damaged-") as directory:
        trials = Trials(Path(directory))
        for combination in trials.combinations(options.seed, options.combinations):
            outcome, fault = trials.run(combination)
            works = outcome.code == 0 or (combination.command == "compare" and outcome.code == 1)
            kind = fault.split()[0] if fault else "works" if works else "one line"
            counts[combination.command, kind] += 1
            if fault:
                faults.append(fault)
                lines = (outcome.err.strip() or outcome.out.strip()).splitlines()[-3:]
                print(f"{combination}: {fault}", *lines, sep="\n    ", flush=True)
    kinds = sorted({kind for _, kind in counts}, key=lambda kind: kind not in ("works", "one line"))
    print("| command | " + " | ".join(kinds) + " |")
    print("|---" * (len(kinds) + 1) + "|")
    for command in COMMANDS:
        cells = (str(counts[command, kind]) for kind in kinds)
        print(f"| `{command}` | " + " | ".join(cells) + " |")
    seconds = time.monotonic() - start
    print(f"{options.combinations} combinations, {len(faults)} faults, {seconds:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
