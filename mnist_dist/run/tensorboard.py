"""TensorBoard's SummaryWriter for a run that may be killed and resumed; imported by rank 0 only."""
# ruff: noqa: E402

import contextlib
import io
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

# TensorBoard imports TensorFlow where it is installed (seconds, and messages on stderr) unless
# this module exists (tensorboard/compat/__init__.py); then it takes its own small substitute.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from torch.utils.tensorboard import FileWriter, RecordWriter, SummaryWriter
from torch.utils.tensorboard.summary import hparams, text

from mnist_dist.run.logfile import LogFile

_EVENT_FILES = "events.out.tfevents.*"


class RunSummaryWriter(SummaryWriter):
    """A SummaryWriter of one event file, with what a run needs besides points, in that same file.

    Methods raise OSError if the file cannot be written.
    """

    file_writer: Any
    all_writers: Any

    def _get_file_writer(self) -> Any:
        """Return the file; the first call creates it."""
        if self.file_writer is None:
            self.file_writer = _EventFile(Path(self.log_dir))
            self.all_writers = {self.log_dir: self.file_writer}
            version, start = "brain.Event:2", SessionLog(status=SessionLog.START)
            self.file_writer.add_event(Event(file_version=version), self.purge_step)
            self.file_writer.add_event(Event(session_log=start), self.purge_step)
        return self.file_writer

    def add_table(self, tag: str, cells: Mapping[str, Any], step: int) -> None:
        """Add a text: a table of names and values."""
        rows = "".join(f"| {name} | {_cell(value)} |\n" for name, value in cells.items())
        summary = text(tag, _encodable(f"| name | value |\n|---|---|\n{rows}"))
        summary.value[0].tag = tag  # without add_text's suffix
        self._get_file_writer().add_summary(summary, step)

    def add_drawing(self, tag: str, image: Image.Image, step: int) -> None:
        """Add an image with its palette, which add_image would expand to many times the bytes."""
        png = io.BytesIO()
        image.save(png, "PNG")
        content = Summary.Image(height=image.height, width=image.width, colorspace=3)
        content.encoded_image_string = png.getvalue()
        summary = Summary(value=[Summary.Value(tag=tag, image=content)])
        self._get_file_writer().add_summary(summary, step)

    def start_session(self, settings: Mapping[str, Any], metrics: Sequence[str], step: int) -> None:
        """Add a row to the HParams table: settings, and the latest values of `metrics`.

        SummaryWriter.add_hparams would put it into a subdirectory, as a run of its own.
        """
        plain = {
            k: v if isinstance(v, int | float) else _encodable(str(v)) for k, v in settings.items()
        }
        experiment, start, _ = hparams(plain, dict.fromkeys(metrics))
        self._get_file_writer().add_summary(experiment, step)
        self._get_file_writer().add_summary(start, step)

    def end_session(self, step: int) -> None:
        """Mark the row of `start_session` as finished."""
        *_, end = hparams({}, {})
        self._get_file_writer().add_summary(end, step)


class _EventFile(FileWriter):
    """An event file written by the caller's thread; its name sorts last in its directory.

    tensorboard's own writes from a thread, which dies of a full disk with a traceback and what it
    could not write. It is named by the clock; but TensorBoard reads files in the order of their
    names, so that after a clock was set back, the purge of an older run's file would hide the
    points of a newer one.
    """

    def __init__(self, directory: Path) -> None:
        stamps = [path.name.split(".")[3] for path in directory.glob(_EVENT_FILES)]
        later = [int(stamp) + 1 for stamp in stamps if stamp.isdecimal()]
        stamp = max([int(time.time()), *later])
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self._directory = directory
        self.file = LogFile(directory / name, exclusive=True)
        self._encoded = io.BytesIO()
        self._records = RecordWriter(self._encoded)

    def get_logdir(self) -> str:
        return str(self._directory)

    def add_event(self, event: Any, step: int | None = None, walltime: float | None = None) -> None:
        event.wall_time = time.time() if walltime is None else walltime
        event.step = step or 0
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        encoded = self._encoded.getvalue()
        self._encoded.seek(0)
        self._encoded.truncate()
        self.file.write(encoded)

    def close(self) -> None:
        self.file.close()


def tags_at(directory: Path, step: int) -> set[str]:
    """Return the tags that TensorBoard shows at optimizer step `step` of a run.

    Events that a later start of the run purged do not count.
    """
    tags: set[str] = set()
    for path in sorted(file for file in directory.glob(_EVENT_FILES) if file.is_file()):
        with contextlib.suppress(Exception):  # the end of the file, or of what is sound in it
            reader = PyRecordReader_New(str(path))
            while True:
                reader.GetNext()
                event = Event.FromString(reader.record())
                if event.session_log.status == SessionLog.START and event.step <= step:
                    tags.clear()
                if event.step == step:
                    tags |= {value.tag for value in event.summary.value}
    return tags


def _encodable(text: str) -> str:
    """Escape what UTF-8 lacks: bytes of a file name that are not text."""
    return text.encode("utf-8", "backslashreplace").decode()


def _cell(value: Any) -> str:
    words = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return words.replace("|", r"\|")
