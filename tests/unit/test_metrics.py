"""metrics.jsonl and TensorBoard hold the same run, read back by TensorBoard's own reader."""

import io
import math
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processes import ROOT, command, metrics, run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn

from mnist_dist.model import MLP
from mnist_dist.run.metrics import EpochPlots, MetricsWriter, should_log_plots


def opened(directory: Path, step: int = 0, **hparams: Any) -> MetricsWriter:
    """An open writer, in whose test no warning is expected."""
    writer = MetricsWriter(directory, warn=pytest.fail)
    writer.open(step // 10, step, {"config": {"lr": 0.1, "command": ["a", "b|c"]}}, hparams)
    return writer


def write_epochs(writer: MetricsWriter, *epochs: int, value: float = 1.0) -> None:
    """Commit one loss for each of these epochs of ten steps."""
    for epoch in epochs:
        writer.add_scalar("val/loss", value * epoch, 10 * epoch)
        writer.commit(epoch, 10 * epoch)


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def points(directory: Path, tag: str = "val/loss") -> list[tuple[int, float]]:
    """TensorBoard's (step, value) of one curve; none if the curve does not exist."""
    events = read(directory)
    found = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    return [(point.step, point.value) for point in found]


def lines(directory: Path, tag: str = "val/loss") -> list[tuple[int, float]]:
    """The same of metrics.jsonl."""
    return [(record["step"], record[tag]) for record in metrics(directory) if tag in record]


def test_a_commit_is_one_line_and_the_same_points(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    writer.add_scalar("train/loss", 0.5, 7)
    writer.add_scalar("lr", 0.25, 7)
    writer.commit(1, 7, {"train/by_digit": [0.5, math.nan]})
    writer.commit(1, 7)  # nothing was added: nothing is written
    (line,) = metrics(tmp_path)
    assert list(line) == ["epoch", "step", "time", "train/loss", "lr", "train/by_digit"]
    assert (line["epoch"], line["train/by_digit"]) == (1, [0.5, None])
    assert points(tmp_path, "train/loss") == lines(tmp_path, "train/loss") == [(7, 0.5)]
    assert points(tmp_path, "lr") == [(7, 0.25)]


def test_nothing_is_touched_or_written_before_open(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "none", warn=pytest.fail)
    write_epochs(writer, 1)
    writer.add_plots(EpochPlots("val", [[1]]), 10)
    writer.close(10, {"results": {"a": 1}})
    assert list(tmp_path.iterdir()) == []


def test_a_resume_replaces_later_points_in_both_files(tmp_path: Path) -> None:
    write_epochs(opened(tmp_path), 1, 2, 3)
    writer = opened(tmp_path, step=10)
    assert [record["step"] for record in writer.records] == [10]
    write_epochs(writer, 2, 3, 4, value=5.0)
    expected = [(10, 1.0), (20, 10.0), (30, 15.0), (40, 20.0)]
    assert points(tmp_path) == lines(tmp_path) == expected


def test_what_an_earlier_start_wrote_is_not_written_again(tmp_path: Path) -> None:
    """As the test's metrics are, which no checkpoint follows."""
    for start in (1, 2):
        writer = opened(tmp_path, step=30)
        if start == 1:
            write_epochs(writer, 3)
        writer.add_scalar("test/loss", 1.0 / start, 30)
        writer.add_plots(EpochPlots("test", [[1]]), 30)
        writer.commit(3, 30, {"test/accuracy_by_digit": [1.0]})
    assert points(tmp_path, "test/loss") == lines(tmp_path, "test/loss") == [(30, 1.0)]
    assert len(metrics(tmp_path)) == 2
    assert len(read(tmp_path).Images("test/confusion")) == 1


@pytest.mark.parametrize("torn", ['{"epoch": 2, "st', '{"epoch": 2, "step": 20}'])
def test_a_line_that_a_kill_left_unfinished_is_dropped(torn: str, tmp_path: Path) -> None:
    write_epochs(opened(tmp_path), 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write_epochs(opened(tmp_path, step=20), 3)
    assert lines(tmp_path) == [(10, 1.0), (30, 3.0)]


@pytest.mark.parametrize(
    "line",
    [
        b"null",
        b"\xff\xfe",
        b"\x00" * 300,
        b"[" * 100_000,
        b'{"epoch": 2, "step": 20, "val/loss": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"step": 20, "val/loss": 1.0}',
        b'{"epoch": "2", "step": 20, "val/loss": 1.0}',
        b'{"epoch": 2, "step": -1, "val/loss": 1.0}',
        b'{"epoch": 2, "step": 20, "val/loss": "low"}',
        b'{"epoch": 2, "step": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda line: line[:12] + line[-12:],
)
def test_a_damaged_line_is_dropped_with_one_warning_and_the_others_stay(
    line: bytes, tmp_path: Path
) -> None:
    write_epochs(opened(tmp_path), 1)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes() + line + b"\n")
    warnings: list[str] = []
    for start in (1, 2):
        writer = MetricsWriter(tmp_path, warnings.append)
        writer.open(start, 10 * start, {}, {})
        write_epochs(writer, start + 1)
    (warning,) = warnings
    assert "metrics.jsonl was damaged or edited: dropped 2 invalid lines" in warning
    assert lines(tmp_path) == points(tmp_path) == [(10, 1.0), (20, 2.0), (30, 3.0)]


def test_a_loss_that_was_not_a_number_is_still_a_record(tmp_path: Path) -> None:
    write_epochs(opened(tmp_path), 1, value=math.nan)
    assert math.isnan(opened(tmp_path, step=10).records[0]["val/loss"])
    assert metrics(tmp_path)[0]["val/loss"] is None


def test_an_epoch_whose_checkpoint_is_of_the_same_step_is_recorded_once(tmp_path: Path) -> None:
    """As after a kill between the record of epoch 2 and its checkpoint, at a step with another."""
    write_epochs(opened(tmp_path), 1, 2)
    writer = MetricsWriter(tmp_path, warn=pytest.fail)
    writer.open(1, 20, {}, {})
    write_epochs(writer, 2, 3)
    assert lines(tmp_path) == points(tmp_path) == [(10, 1.0), (20, 2.0), (30, 3.0)]


def test_a_record_that_came_twice_is_kept_once(tmp_path: Path) -> None:
    write_epochs(opened(tmp_path), 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() * 2)
    opened(tmp_path, step=20)
    assert lines(tmp_path) == [(10, 1.0), (20, 2.0)]


@pytest.mark.parametrize("lost", ["line", "points"])
def test_what_a_kill_lost_of_the_test_is_written_again_and_the_rest_is_not(
    lost: str, tmp_path: Path
) -> None:
    writer = opened(tmp_path)
    write_epochs(writer, 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    writer.add_scalar("test/loss", 0.5, 10)
    writer.commit(1, 10)
    (path,) = (p for p in before if (p.suffix == ".jsonl") == (lost == "line"))
    path.write_bytes(before[path])
    writer = opened(tmp_path, step=10)
    writer.add_scalar("test/loss", 0.5, 10)
    writer.commit(1, 10)
    assert lines(tmp_path, "test/loss") == points(tmp_path, "test/loss") == [(10, 0.5)]
    assert lines(tmp_path) == points(tmp_path) == [(10, 1.0)]


def test_a_newer_event_file_sorts_last_whatever_the_clock_says(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.9000000000.host.1").touch()
    (tmp_path / "events.out.tfevents.note").touch()
    for count in (1, 2):
        opened(tmp_path)
        names = sorted(path.name for path in tmp_path.glob("events.out.tfevents.9*"))
        assert [int(name.split(".")[3]) - 9_000_000_000 for name in names] == [*range(count + 1)]


def test_a_run_has_its_texts_charts_and_hparams_in_one_file(tmp_path: Path) -> None:
    writer = opened(tmp_path, lr=0.1, epochs=3, schedule="constant", train_samples=None)
    writer.close(30, {"results": {"test": "good"}})
    (_,) = (path for path in tmp_path.iterdir() if path.name != "metrics.jsonl")
    events = read(tmp_path)
    (config,) = events.Tensors("config")
    (results,) = events.Tensors("results")
    table = ["| name | value |", "|---|---|"]
    rows = ["| lr | 0.1 |", r"| command | a b\|c |"]
    assert config.tensor_proto.string_val[0].decode().splitlines() == table + rows
    assert (results.step, results.tensor_proto.string_val[0].decode().splitlines()) == (
        30,
        [*table, "| test | good |"],
    )
    (layout,) = events.Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts["accuracy"] == ["val/accuracy", "test/accuracy"]
    content = {
        name.removeprefix("_hparams_/"): plugin_data_pb2.HParamsPluginData.FromString(
            metadata.plugin_data.content
        )
        for name, metadata in events.summary_metadata.items()
        if name.startswith("_hparams_/")
    }
    hparams = content["session_start_info"].session_start_info.hparams
    assert hparams["lr"].number_value == 0.1
    assert hparams["epochs"].number_value == 3
    assert hparams["schedule"].string_value == "constant"
    assert hparams["train_samples"].string_value == "None"
    compared = [metric.name.tag for metric in content["experiment"].experiment.metric_infos]
    assert {"test/accuracy", "val/loss"} <= set(compared)
    assert content["session_end_info"].session_end_info.status == 1  # STATUS_SUCCESS


def test_a_run_that_is_not_closed_has_no_end_in_hparams(tmp_path: Path) -> None:
    write_epochs(opened(tmp_path, lr=0.1), 1)
    names = set(read(tmp_path).summary_metadata)
    assert "_hparams_/session_start_info" in names
    assert "_hparams_/session_end_info" not in names


def test_plots_are_images_of_errors_and_weights_and_histograms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    writer, model = opened(tmp_path), MLP()
    confusion = torch.eye(10).int().tolist()
    digit = torch.zeros(784, dtype=torch.uint8)
    plots = EpochPlots("val", confusion, [(digit, "4 predicted as 9\n99%")], model)
    writer.add_plots(plots, 10)
    write_epochs(writer, 1)
    events = read(tmp_path)
    tags = {"val/confusion", "val/most_confident_errors", "weights/first_layer"}
    assert set(events.Tags()["images"]) == tags
    for tag in tags:
        (image,) = events.Images(tag)
        with Image.open(io.BytesIO(image.encoded_image_string)) as decoded:
            assert (decoded.format, image.step) == ("PNG", 10)
            assert decoded.size == (image.width, image.height)
    for name, weight in model.named_parameters():
        (event,) = events.Histograms(f"weights/{name}")
        histogram = event.histogram_value
        assert histogram.num == sum(histogram.bucket) == weight.numel()
        assert histogram.min == weight.min()
        assert histogram.max == histogram.bucket_limit[-1] == weight.max()
        below = (weight <= histogram.bucket_limit[19]).sum()
        assert sum(histogram.bucket[:20]) == pytest.approx(below, abs=2)


def test_a_model_whose_first_layer_is_no_image_has_histograms_only(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    writer.add_plots(EpochPlots("val", [[1]], model=nn.Linear(3, 2)), 10)
    write_epochs(writer, 1)
    events = read(tmp_path)
    assert events.Tags()["images"] == ["val/confusion"]
    assert set(events.Tags()["histograms"]) == {"weights/weight", "weights/bias"}


def test_the_last_epoch_and_powers_of_two_get_plots() -> None:
    assert [e for e in range(1, 26) if should_log_plots(e, 25)] == [1, 2, 4, 8, 16, 25]
    assert [e for e in range(1, 2) if should_log_plots(e, 1)] == [1]


COMMIT_THEN_DIE = """
import os, signal, sys
from pathlib import Path
from mnist_dist.run.metrics import MetricsWriter
writer = MetricsWriter(Path(sys.argv[1]), warn=print)
writer.open(0, 0, {}, {})
for epoch in (1, 2, 3):
    writer.add_scalar("val/loss", epoch, 10 * epoch)
    writer.commit(epoch, 10 * epoch)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_right_after_a_commit_loses_nothing(tmp_path: Path) -> None:
    killed = command(ROOT, "python", "-c", COMMIT_THEN_DIE, str(tmp_path))
    assert killed.code == -signal.SIGKILL, killed.err
    expected = [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert points(tmp_path) == lines(tmp_path) == expected
    write_epochs(opened(tmp_path, step=30), 4)
    assert points(tmp_path) == lines(tmp_path) == [*expected, (40, 4.0)]


def write_to_a_full_disk(directory: Path) -> list[str]:
    """Let no file grow beyond 3 kB for a while, as a quota would; the warnings."""
    warnings: list[str] = []
    writer = MetricsWriter(directory, warnings.append)
    writer.open(0, 0, {}, {"lr": 0.1})
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, unlimited[1]))
    write_epochs(writer, *range(1, 101))
    writer.add_plots(EpochPlots("val", [[1]], model=MLP()), 1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    write_epochs(writer, 101)
    writer.close(1010, {"results": {}})
    return warnings


def test_after_a_full_disk_both_files_have_every_epoch(tmp_path: Path) -> None:
    """What was not written is written as soon as there is room, images included."""
    (warnings,) = run_ranks(write_to_a_full_disk, 1, tmp_path, timeout=60)
    assert all("File too large" in line and "training continues" in line for line in warnings)
    assert sorted("metrics.jsonl" in line for line in warnings) == [False, True]
    assert lines(tmp_path) == points(tmp_path) == [(10 * e, float(e)) for e in range(1, 102)]
    assert len(read(tmp_path).Images("val/confusion")) == 1


def test_files_that_are_deleted_while_the_job_runs_are_restored_whole(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    write_epochs(writer, 1, 2)
    writer.sync()
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / "metrics.jsonl").write_text("an editor's copy")
    write_epochs(writer, 3)
    writer.sync()
    write_epochs(writer, 4)
    assert lines(tmp_path) == points(tmp_path) == [(10 * e, float(e)) for e in range(1, 5)]


def complete_on_a_full_disk(directory: Path) -> str | None:
    """Close the writer on a disk without room; why that failed."""
    writer = opened(directory)
    write_epochs(writer, 1)
    writer.sync()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        writer.close(10, {"results": {"test": "good"}})
    except OSError as error:
        return error.strerror
    return None


def test_metrics_that_cannot_be_written_at_the_end_are_an_error(tmp_path: Path) -> None:
    assert run_ranks(complete_on_a_full_disk, 1, tmp_path, timeout=60) == ["File too large"]
    assert lines(tmp_path) == points(tmp_path) == [(10, 1.0)]


@pytest.mark.timeout(20)  # opening a FIFO would wait for a writer
def test_a_fifo_in_the_place_of_metrics_is_named_and_a_link_is_not_written_through(
    tmp_path: Path,
) -> None:
    file = tmp_path / "metrics.jsonl"
    os.mkfifo(file)
    with pytest.raises(OSError, match=r"FIFO.*metrics\.jsonl"):
        opened(tmp_path)
    file.unlink()
    (tmp_path / "mine").touch()
    file.symlink_to("mine")
    opened(tmp_path)
    assert not file.is_symlink()
    assert (tmp_path / "mine").read_bytes() == b""


def test_bytes_of_a_file_name_that_are_not_text_are_recorded_as_escapes(tmp_path: Path) -> None:
    names = {"data": os.fsdecode(b"d\xe9.pkl.gz")}
    writer = MetricsWriter(tmp_path, warn=print)
    writer.open(0, 0, {"config": names}, names)
    writer.close(0, {"results": names})
    (events,) = tmp_path.glob("events.*")
    assert events.read_bytes().count(rb"d\udce9.pkl.gz") == 3
