"""`mnist-dist export`: a trained model for use without this package, verified after writing."""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mnist_dist.commands.loading import load_trained
from mnist_dist.data import find_data, load
from mnist_dist.dimensions import IMAGE_PIXELS
from mnist_dist.errors import JobError, UserError, print_result
from mnist_dist.files import write_atomically
from mnist_dist.flags import argument, flag, parse_flags
from mnist_dist.model import pixels

Format = Literal["torch", "onnx"]

# Tolerance of `Exported.difference`: another order of additions changes large logits more.
_TOLERANCE = 1e-5

_SUFFIX: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx"}
_PACKAGES: dict[Format, tuple[str, ...]] = {
    "torch": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
# Batch sizes that are compared: the batch dimension must be dynamic, and 1 is often special.
_BATCHES = (1, 2, 500)


@dataclass(frozen=True)
class ExportConfig:
    """Export a trained model as one file for other programs, and verify that file.

    Input: `images`, (N, 784) float32, bytes / 256, row by row, white on black.
    Output: `logits`, (N, 10) float32.
    """

    model: str = argument(
        metavar="RUN_OR_CHECKPOINT", help="run directory (its best.pt is used) or checkpoint"
    )
    format: Format = flag(
        help="torch: for torch.export.load in Python or C++; onnx: for ONNX runtimes, needs the "
        "packages of the extra `onnx`"
    )
    output: str | None = flag(
        None,
        metavar="FILE",
        unset="next to the checkpoint",
        help="file to write, ending in .pt2 (torch) or .onnx (onnx)",
    )


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how closely it matches the model."""

    file: Path
    difference: float
    """Maximum of |logit - m| / (1 + |m|) over the bundled test digits, with m the model's logit:
    the smallest tolerance that numpy.allclose accepts for both rtol and atol."""


def export(model: str | Path, format: Format, output: str | Path | None = None) -> Exported:
    """Export a trained model as a file that does not need this package, and verify that file.

    The file replaces `output` only if its logits on the bundled test digits, in batches of several
    sizes, match the model's.

    Args:
        model: a run directory (its best.pt is used) or a checkpoint.
        format: "torch" (`torch.export`) or "onnx".
        output: file to write. None: next to the checkpoint, with its name.

    Raises:
        UserError: the model or the output cannot be used, or a package is missing.
        JobError: the exported model does not match the original.
    """
    if format not in _SUFFIX:
        raise UserError(f"--format {format}: use one of {', '.join(_SUFFIX)}")
    for package in _PACKAGES[format]:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--format {format}: the package {package} is missing; "
                f"pip install {' '.join(_PACKAGES[format])}"
            )
    trained = load_trained(model)
    file = _output(output, trained.checkpoint, format)
    serialize, reader = (
        (_to_torch, _torch_reader) if format == "torch" else (_to_onnx, _onnx_reader)
    )
    differences: list[float] = []

    def verify(written: Path) -> None:
        differences.append(_compare(reader(written), trained.model, file))

    try:
        with _quiet():
            write_atomically(file, serialize(trained.model), verify)
    except OSError as error:
        raise UserError(
            f"--output {file}: {error.strerror}; use a file in a writable directory"
        ) from error
    return Exported(file, differences[0])


def run(flags: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    config = parse_flags(ExportConfig, flags, "mnist-dist export")
    exported = export(config.model, config.format, config.output)
    print_result(f"wrote  {exported.file} ({exported.file.stat().st_size:,} bytes)")
    print_result(
        f"check  logits differ from the model's by at most {exported.difference:.1e} * "
        "(1 + |logit|), over the bundled test digits"
    )
    print_result("input  images: (N, 784) float32, bytes / 256; output logits: (N, 10) float32")
    return 0


def _output(output: str | Path | None, checkpoint: Path, format: Format) -> Path:
    """Return the file to write. The required suffix protects checkpoints and other files."""
    if output is None:
        return checkpoint.with_suffix(_SUFFIX[format])
    file = Path(output)
    if file.suffix != _SUFFIX[format]:
        raise UserError(f"--output {file}: use a name that ends in {_SUFFIX[format]}")
    if file.is_dir():
        raise UserError(f"--output {file}: is a directory; use a file in it")
    return file


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the output of the exporters: the comparison afterwards is what counts."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _to_torch(model: nn.Module) -> bytes:
    batch = torch.export.Dim("N", min=1)
    example = (torch.zeros(2, IMAGE_PIXELS),)
    program = torch.export.export(model, example, dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _torch_reader(file: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(io.BytesIO(file.read_bytes())).module()


def _to_onnx(model: nn.Module) -> bytes:
    program = torch.onnx.export(
        model,
        (torch.zeros(2, IMAGE_PIXELS),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _onnx_reader(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime  # of the extra "onnx"

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def logits(images: Tensor) -> Tensor:
        (found,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(found)

    return logits


@torch.inference_mode()
def _compare(exported: Callable[[Tensor], Tensor], model: nn.Module, file: Path) -> float:
    """Return `Exported.difference`. Raises JobError if it exceeds the tolerance."""
    images = pixels(load(find_data("bundled", None)).test.images)
    differences = []
    for size in _BATCHES:
        expected = model(images[:size])
        differences.append((exported(images[:size]) - expected).abs() / (1 + expected.abs()))
    largest = float(torch.cat(differences).max())
    if not largest <= _TOLERANCE:  # NaN compares false with every number
        raise JobError(
            f"{file}: not written: the exported model's logits differ by {largest:.1e} (relative) "
            "from the original's; report a bug, or try another version of torch"
        )
    return largest
