"""Real TensorBoard over finished runs, in a real browser: what is recorded is to be seen.

Pictures of the pages are kept in the directory that SCREENSHOTS names, else in the test's own.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import completed_run

from benchmarks import browser

FLAGS = ["--data=bundled", "--train-samples=800", "--lr=0.05", "--epochs=3"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard over a run of one process and one of two."""
    if reason := browser.missing():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        completed_run(directory, processes, *FLAGS)
    with browser.tensorboard(directory) as served:
        yield served


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[browser.Page]:
    with browser.page(1600, 2400) as opened:
        yield opened


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def shows(*texts: str, curves: int = 0, pictures: int = 0) -> Any:
    """A page is there when nothing is loading and it has all this."""

    def good(seen: dict[str, Any]) -> bool:
        everything = "\n".join(seen["texts"]).replace("\n/", "/")
        return (
            seen["busy"] == 0
            and all(text in everything for text in texts)
            and seen["curves"] >= curves
            and seen["pictures"] >= pictures
        )

    return good


@pytest.mark.parametrize(
    ("group", "cards"),
    [
        ("train", ["train/loss", "train/gradient_norm"]),
        ("val", ["val/loss", "val/accuracy"]),
        ("test", ["test/loss", "test/accuracy"]),
        ("perf", ["perf/samples_per_second", "perf/step_ms", "perf/communication_share"]),
    ],
)
def test_time_series_has_a_drawn_card_for_every_figure(
    group: str, cards: list[str], address: str, page: browser.Page, shots: Path
) -> None:
    page.open(f"{address}?tagFilter=^{group}%2F&smoothing=0#timeseries")
    page.until(shows(*cards, "run-1", "run-2", curves=len(cards)))
    page.save(shots / f"time-series-{group}.png")


def test_images_has_confusions_errors_and_weights(
    address: str, page: browser.Page, shots: Path
) -> None:
    page.open(f"{address}#images")
    page.until(shows("test/confusion", "val/confusion", "val/most_confident_errors", pictures=6))
    page.save(shots / "images.png")
    page.open(f"{address}?tagFilter=first_layer#timeseries")  # the other page has it folded up
    page.until(shows("weights/first_layer", pictures=2))
    page.save(shots / "time-series-weights.png")


def test_histograms_has_every_parameter(address: str, page: browser.Page, shots: Path) -> None:
    page.open(f"{address}#histograms")
    names = [
        f"weights/{layer}.{kind}" for layer in ("hidden1", "out") for kind in ("weight", "bias")
    ]
    page.until(shows(*names, curves=8))
    page.save(shots / "histograms.png")


def test_hparams_compares_the_runs(address: str, page: browser.Page, shots: Path) -> None:
    page.open(f"{address}#hparams")
    settings = ("global_batch_size", "world_size", "lr", "momentum", "recipe")
    results = ("test/accuracy", "test/loss", "val/accuracy", "val/loss", "train/loss")
    seen = page.until(shows(*settings, *results, "run-1", "run-2", "0.050000"))
    assert seen["texts"].count("0.050000") == 2, "a row for each run"
    page.save(shots / "hparams.png")


def test_text_has_config_environment_commit_and_results(
    address: str, page: browser.Page, shots: Path
) -> None:
    page.open(f"{address}#text")
    page.until(shows("config", "global_batch_size", "environment", "git_commit", "results"))
    page.save(shots / "text.png")


def test_custom_scalars_puts_train_and_validation_side_by_side(
    address: str, page: browser.Page, shots: Path
) -> None:
    page.open(f"{address}#custom_scalars")
    page.until(shows("train and validation", "loss", "accuracy", "Matches (6)", curves=5))
    page.save(shots / "custom-scalars.png")
