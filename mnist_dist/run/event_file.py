"""TensorBoard's event file, written with its own protocol buffers and nothing else of it.

`torch.utils.tensorboard` and `tensorboard.summary` import most of TensorBoard, which takes longer
than the rest of a warm start; a record is a length, two checksums and a serialized `Event` (the
TFRecord format, https://www.tensorflow.org/tutorials/load_data/tfrecord).
"""

import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

Value = Any  # Summary.Value: the generated classes have no types


class EventFile:
    """One file of events; TensorBoard shows all files of a directory as one run."""

    def __init__(self, directory: Path, purge_step: int) -> None:
        """Begin a file; earlier files' events from `purge_step` on count no more."""
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (directory / name).open("ab")
        self._write(Event(wall_time=now, step=purge_step, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=now, step=purge_step, session_log=start))
        self._file.flush()

    def add(self, step: int, values: Sequence[Value], now: float | None = None) -> None:
        """Write `values` at `step`, and hand them to the system."""
        event = Event(wall_time=time.time() if now is None else now, step=step)
        event.summary.value.extend(values)
        self._write(event)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + _checksum(length) + data + _checksum(data))


def _checksum(data: bytes) -> bytes:
    """The format's masked CRC-32C: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def scalar(tag: str, number: float) -> Value:
    """A point of a curve."""
    return Summary.Value(tag=tag, simple_value=number)


def table(tag: str, cells: Mapping[str, Any]) -> Value:
    """Names and values as a text in Markdown."""
    rows = "".join(f"| {name} | {_cell(value)} |\n" for name, value in cells.items())
    return _text(tag, "text", f"| name | value |\n|---|---|\n{rows}".encode())


def _cell(value: Any) -> str:
    words = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return words.replace("|", r"\|")


def _text(tag: str, plugin: str, content: bytes) -> Value:
    tensor = TensorProto(dtype=DT_STRING, string_val=[content])
    if plugin == "text":
        tensor.tensor_shape.CopyFrom(TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]))
    return Summary.Value(tag=tag, metadata=_metadata(plugin), tensor=tensor)


def _metadata(plugin: str, content: bytes = b"") -> Any:
    return SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name=plugin, content=content)
    )


def image(tag: str, png: bytes, height: int, width: int) -> Value:
    """A picture, encoded already."""
    encoded = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    return Summary.Value(tag=tag, image=encoded)


def histogram(tag: str, counts: np.ndarray[Any, Any], low: float, high: float) -> Value:
    """How often values fell into equal bins between `low` and `high`: (bins,) counts."""
    limits = np.linspace(low, high, len(counts) + 1)
    return Summary.Value(
        tag=tag,
        histo=HistogramProto(
            min=low,
            max=high,
            num=float(counts.sum()),
            bucket_limit=limits[1:].tolist(),
            bucket=counts.tolist(),
        ),
    )


def layout(charts: Mapping[str, Sequence[str]]) -> Value:
    """Charts of several curves each, by title, for the Custom Scalars page: one row."""
    multiline = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=list(tags)))
        for title, tags in charts.items()
    ]
    category = layout_pb2.Category(title="train and validation", chart=multiline)
    content = layout_pb2.Layout(category=[category]).SerializeToString()
    return _text("custom_scalars__config__", "custom_scalars", content)


def hparams(settings: Mapping[str, Any], metrics: Sequence[str]) -> list[Value]:
    """Settings for the HParams table, beside the last values of the curves `metrics`."""
    plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in settings.items()}
    infos = [api_pb2.HParamInfo(name=name, type=_type(value)) for name, value in plain.items()]
    shown = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics]
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in plain.items():
        field = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(start.hparams[name], field, value)
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=shown)
    return [
        _hparams("experiment", experiment=experiment),
        _hparams("session_start_info", session_start_info=start),
    ]


def hparams_end() -> Value:
    """What says that the run of an earlier `hparams` is complete."""
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return _hparams("session_end_info", session_end_info=end)


def _hparams(name: str, **part: Any) -> Value:
    content = plugin_data_pb2.HParamsPluginData(version=0, **part).SerializeToString()
    # The plugin reads the metadata, but a value without any tensor is dropped on the way.
    tensor = TensorProto(dtype=1, float_val=[0.0])
    return Summary.Value(
        tag=f"_hparams_/{name}", metadata=_metadata("hparams", content), tensor=tensor
    )


def _type(value: Any) -> int:
    kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    return int(kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64))
