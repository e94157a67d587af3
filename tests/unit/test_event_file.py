"""Our event files, read by TensorBoard's own readers."""

from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from mnist_dist.run import event_file
from mnist_dist.run import plots as pictures


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def test_every_kind_of_value_is_what_was_written(tmp_path: Path) -> None:
    picture = pictures.weights(np.ones((2, 3, 4)))
    file = event_file.EventFile(tmp_path, purge_step=1)
    values = [
        event_file.scalar("val/loss", 0.5),
        event_file.table("config", {"lr": 0.1, "command": ["a", "b|c"]}),
        event_file.image("weights/first", picture.png(), *picture.pixels.shape),
        event_file.histogram("weights/out", np.array([1.0, 0.0, 3.0]), -1.0, 2.0),
        event_file.layout({"loss": ["train/loss", "val/loss"]}),
    ]
    file.add(7, values, now=123.0)
    file.close()
    events = read(tmp_path)
    (point,) = events.Scalars("val/loss")
    assert (point.wall_time, point.step, point.value) == (123.0, 7, 0.5)
    (image,) = events.Images("weights/first")
    assert image.encoded_image_string == picture.png()
    assert (image.height, image.width) == picture.pixels.shape
    (histogram,) = events.Histograms("weights/out")
    assert histogram.histogram_value.bucket == [1.0, 0.0, 3.0]
    assert histogram.histogram_value.bucket_limit == [0.0, 1.0, 2.0]
    (text,) = events.Tensors("config")
    assert text.tensor_proto.string_val[0].decode().splitlines()[2:] == [
        "| lr | 0.1 |",
        r"| command | a b\|c |",
    ]
    (layout,) = events.Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category
    assert list(category.chart[0].multiline.tag) == ["train/loss", "val/loss"]


def test_settings_of_every_type_reach_the_table_of_runs(tmp_path: Path) -> None:
    file = event_file.EventFile(tmp_path, purge_step=1)
    settings = {"lr": 0.1, "epochs": 3, "on": True, "schedule": "constant", "samples": None}
    file.add(0, [*event_file.hparams(settings, ["test/accuracy"]), event_file.hparams_end()])
    file.close()
    metadata = read(tmp_path).summary_metadata
    content = metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["lr"].number_value == 0.1
    assert start.hparams["epochs"].number_value == 3
    assert start.hparams["on"].bool_value is True
    assert start.hparams["schedule"].string_value == "constant"
    assert start.hparams["samples"].string_value == "None"


def test_a_later_file_takes_the_place_of_an_earlier_ones_later_steps(tmp_path: Path) -> None:
    first = event_file.EventFile(tmp_path, purge_step=1)
    for step in (1, 2, 3):
        first.add(step, [event_file.scalar("val/loss", float(step))])
    first.close()
    second = event_file.EventFile(tmp_path, purge_step=2)
    for step in (2, 3, 4):
        second.add(step, [event_file.scalar("val/loss", 10.0 * step)])
    second.close()
    points = [(point.step, point.value) for point in read(tmp_path).Scalars("val/loss")]
    assert points == [(1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0)]


@pytest.mark.parametrize("position", [3, 9, 14, -2])
def test_readers_notice_a_flipped_bit(position: int, tmp_path: Path) -> None:
    event_file.EventFile(tmp_path, purge_step=1).close()
    (path,) = tmp_path.iterdir()
    assert events_in(path) == 2
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    assert events_in(path) < 2


def events_in(path: Path) -> int:
    """How many events TensorBoard's loader takes from a file: those before the first bad one."""
    return len(list(EventFileLoader(str(path)).Load()))
