"""Make README.md's pictures from real runs: docs/images/terminal.svg and tensorboard.png.

python -m benchmarks.pictures --pickle mnist.pkl.gz

Without a pickle the runs use what `--data auto` finds. Needs what tests/screen/ needs.
"""

import argparse
import html
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pyte

from benchmarks import browser, terminal
from benchmarks.jobs import ROOT

IMAGES = ROOT / "docs" / "images"
_FLAGS = ["--lr=0.02", "--epochs=12"]
_COLUMNS = 112
_COLOURS = {"green": "#3fb950", "brown": "#d29922"}  # pyte's names
_CHARACTER, _LINE = 8.4, 18  # pixels, at a font size of 14


def checkout(directory: Path, pickle: Path | None) -> Path:
    """Fill a directory as `git clone` does, with MNIST where the original script expects it."""
    shutil.copy(ROOT / "train_ddp.py", directory)
    if pickle is not None:
        (directory / "data" / "mnist").mkdir(parents=True)
        shutil.copy(pickle, directory / "data" / "mnist" / "mnist.pkl.gz")
    return directory


def train(place: Path, processes: int) -> bytes:
    """Run the job at a terminal and return its output.

    Raises:
        RuntimeError: it failed.
    """
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    run_dir = f"--run-dir=runs/{processes}-process{'es' if processes > 1 else ''}"
    here = {"PYTHONPATH": str(ROOT), "MNIST_DIST_CACHE": str(place / "cache")}
    code, output = terminal.record(
        [sys.executable, *launcher, "train_ddp.py", *_FLAGS, run_dir],
        _COLUMNS,
        60,
        {**os.environ, **here},
        place,
        timeout=1800,
    )
    if code != 0:
        raise RuntimeError(output.decode())
    return output


def draw_terminal(output: bytes, command: str, file: Path) -> None:
    """Draw the screen in the middle of the run, and below it the last lines at the end."""
    half = output.find(b"epoch  6/12")
    end = output.find(b"\n", half)
    middle = end + output[end:].find(b"samples/s", output[end:].find(b"\x1b[?25l") + 1)
    cut = output.find(b"\r", output.find(b"% ", middle))
    during, after = (terminal.screen(part, _COLUMNS, 60) for part in (output[:cut], output))
    rows = [[("$ " + command, "#e6edf3")], *_rows(during), [], [("...", "#7d8590")], []]
    rows += _rows(after)[-12:]
    height, width = (len(rows) + 2) * _LINE, (_COLUMNS + 4) * _CHARACTER
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        "font-family=\"ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', "
        'monospace" font-size="14">',
        f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#0d1117"/>',
    ]
    for number, row in enumerate(rows):
        spans = "".join(f'<tspan fill="{fill}">{html.escape(text)}</tspan>' for text, fill in row)
        y = (number + 2) * _LINE - 4
        lines.append(f'<text x="16" y="{y}" xml:space="preserve">{spans}</text>')
    file.write_text("\n".join([*lines, "</svg>", ""]))


def _rows(screen: "pyte.Screen") -> list[list[tuple[str, str]]]:
    """Return the job's lines as pieces of text with their colours."""
    rows = []
    for number in range(screen.lines):
        cells = [screen.buffer[number][column] for column in range(screen.columns)]
        pieces: list[tuple[str, str]] = []
        for cell in cells:
            colour = _COLOURS.get(cell.fg, "#7d8590" if getattr(cell, "dim", False) else "#e6edf3")
            if pieces and pieces[-1][1] == colour:
                pieces[-1] = (pieces[-1][0] + cell.data, colour)
            else:
                pieces.append((cell.data, colour))
        rows.append(pieces)
    text = ["".join(piece for piece, _ in row).rstrip() for row in rows]
    first = next(n for n, line in enumerate(text) if line.startswith("world "))
    last = max(n for n, line in enumerate(text) if line)
    return rows[first : last + 1]


_CLOSE_SETTINGS = """
const byText = (tag, text) => [...document.querySelectorAll(tag)].find(
  e => e.innerText.trim().startsWith(text));
document.querySelector('settings-view button[aria-label="Close"], .settings-pane button')?.click();
byText('button', 'Settings')?.click();
"""


def draw_tensorboard(runs: Path, file: Path) -> None:
    """Draw loss and accuracy of all runs on the Time Series page."""
    from PIL import Image

    tags = "%5E(train%7Cval)%2F(loss%7Caccuracy)%24"
    with browser.tensorboard(runs) as address, browser.page(1500, 900) as page:
        page.open(f"{address}?tagFilter={tags}&smoothing=0#timeseries")
        page.until(lambda seen: seen["busy"] == 0 and seen["curves"] >= 3)
        page.run(_CLOSE_SETTINGS)
        page.until(lambda seen: "General" not in seen["texts"] and seen["busy"] == 0)
        time.sleep(3)  # the cards have grown: their curves are redrawn
        page.save(file)
    with Image.open(file) as shot:
        shot.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    """Train on 1, 2 and 4 processes and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pickle", type=Path, help="mnist.pkl.gz to train on")
    parser.add_argument(
        "--place", type=Path, help="directory to keep the runs in; existing ones are drawn"
    )
    chosen = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = chosen.place or Path(temporary)
        if not (place / "runs").exists():
            place.mkdir(parents=True, exist_ok=True)
            checkout(place, chosen.pickle)
            for processes in (1, 2, 4):
                (place / "output").write_bytes(train(place, processes))
        flags = [*_FLAGS, "--run-dir=runs/4-processes"]
        command = " ".join(["torchrun --nproc_per_node=4 train_ddp.py", *flags])
        draw_terminal((place / "output").read_bytes(), command, IMAGES / "terminal.svg")
        draw_tensorboard(place / "runs", IMAGES / "tensorboard.png")


if __name__ == "__main__":
    main()
