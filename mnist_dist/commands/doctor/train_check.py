"""Train for a moment on the bundled digits, and compare every loss with a reference curve.

First each rank trains alone, which shows whether its arithmetic is right, whatever its peers do.
Then all train together, and each compares its part of every loss with the same part of its own
training: the first rank to deviate has computed something wrong since.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DistributedSampler

from mnist_dist.commands.doctor.findings import (
    FactsByRank,
    Finding,
    Payloads,
    find_errors,
    name_ranks,
)
from mnist_dist.data import bundled
from mnist_dist.distributed.ddp import Bfloat16, register_comm_hook, settle_buckets
from mnist_dist.distributed.devices import Precision, set_precision, set_threads
from mnist_dist.distributed.failures import brief
from mnist_dist.distributed.launcher import Launch
from mnist_dist.distributed.world import World
from mnist_dist.errors import UserError, counted
from mnist_dist.evaluation import evaluate
from mnist_dist.model import build_model
from mnist_dist.optimizer import build_optimizer
from mnist_dist.sampling import Sharding, global_batches
from mnist_dist.torch_internals import keep_compiler_out_of_ddp
from train_ddp import train_step

# Relative differences of a loss from the reference curve, which is float32's.
TOLERANCES: Mapping[Precision, float] = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 1e-2}
# The learning rate is large enough to learn something, and too small to amplify rounding.
_SEED, _EPOCHS, _GLOBAL_BATCH_SIZE, _LR = 0, 2, 64, 0.05
REFERENCE = files("mnist_dist.commands.doctor") / "reference.json"

_EXCLUDE = "check the memory and the device there, and exclude that node until it is repaired"


@dataclass(frozen=True)
class _Trained:
    """The result of one training."""

    losses: Tensor
    """This rank's summed loss of each step: (steps,) float64 on the CPU."""
    loss_by_rank: Tensor
    """The same of a single process, shared out as over `ranks`: (steps, ranks) float64."""
    samples: Tensor
    """Of each step's global batch: (steps,)."""
    validation_loss: float
    weights: Tensor
    samples_per_second: float
    """Of the last epoch."""
    description: str
    """What gradients travelled over."""


class TrainCheck:
    """One rank's part."""

    def __init__(self, launch: Launch, device: torch.device, precision: Precision) -> None:
        """Prepare to train on `device`."""
        self._launch, self._device, self._precision = launch, device, precision
        self._alone: _Trained | None = None

    def alone(self) -> dict[str, Any]:
        """Train alone.

        Returns:
            `difference`, the largest from the reference curve, and `step`, the first beyond the
            tolerance or None; `samples_per_second`. Or `error`.
        """
        try:
            set_precision(self._precision, self._device)
            set_threads(self._launch, -(-_GLOBAL_BATCH_SIZE // self._launch.world_size))
            world = World(Launch("none"), self._device, "none")
            self._alone = trained = self._train(world, ranks=self._launch.world_size)
        except (OSError, RuntimeError, UserError) as error:
            return {"error": brief(error)}
        return self._against_reference(trained.losses, trained)

    def together(self, world: World, seconds: float) -> dict[str, Any]:
        """Train with all ranks of `world`, after `alone`.

        Returns:
            As `alone`; also `own_step`, the first with a local loss that deviates from that of
            `alone`, or None; `digest` of the weights; `drift`, their largest difference from those
            of `alone`; and `description`. Or `error`.
        """
        assert self._alone is not None
        try:
            trained = self._train(world, seconds=seconds)
            losses = world.all_reduce_sum(trained.losses.clone())
        except (OSError, RuntimeError) as error:
            return {"error": brief(error)}
        own = self._alone.loss_by_rank[:, world.rank]
        differences = (trained.losses - own).abs() / self._alone.losses
        return self._against_reference(losses, trained) | {
            "own_step": self._first_beyond(differences.tolist()),
            "digest": hashlib.sha256(trained.weights.numpy().tobytes()).hexdigest(),
            "drift": float((trained.weights - self._alone.weights).abs().max()),
            "description": trained.description,
        }

    def _against_reference(self, losses: Tensor, trained: _Trained) -> dict[str, Any]:
        """Compare the summed losses of whole global batches, and the validation loss."""
        reference = json.loads(REFERENCE.read_text())
        curve = [*(losses / trained.samples).tolist(), trained.validation_loss]
        expected = [*reference["losses"], reference["validation_loss"]]
        differences = [abs(a - b) / b for a, b in zip(curve, expected, strict=True)]
        return {
            "difference": max(differences),
            "step": self._first_beyond(differences),
            "samples_per_second": trained.samples_per_second,
        }

    def _first_beyond(self, differences: Sequence[float]) -> int | None:
        """Return the first step, counted from 1, that is beyond the tolerance or not a number."""
        tolerance = TOLERANCES[self._precision]
        beyond = (step for step, value in enumerate(differences, 1) if not value <= tolerance)
        return next(beyond, None)

    def _train(self, world: World, ranks: int = 1, seconds: float = 0.0) -> _Trained:
        """Train as train_ddp.py does.

        Args:
            world: the ranks that train.
            ranks: number of ranks to share out the losses of a single process to.
            seconds: until a rank that does not respond is given up.
        """
        data, device = bundled.load().to(self._device), self._device
        torch.manual_seed(_SEED)
        model = build_model().to(device)
        optimizer, _ = build_optimizer(model, _LR, 0.0, 0.0, "constant", 0)
        network, description = self._wrap(model, world, seconds)
        sampler = DistributedSampler[int](data.train, world.world_size, world.rank, seed=_SEED)
        sharding = Sharding(len(data.train), _GLOBAL_BATCH_SIZE, world.rank, world.world_size)
        losses, shared_out, samples = [], [], []
        for epoch in range(_EPOCHS):
            sampler.set_epoch(epoch)
            start, first = time.perf_counter(), 0
            for images, labels, global_size in global_batches(data.train, sampler, sharding):
                if ranks > 1:
                    shared_out.append(_by_rank(network, images, labels, first, ranks))
                first += global_size
                samples.append(global_size)
                scale = torch.full((), world.world_size / global_size, device=device)
                losses.append(train_step(network, optimizer, images, labels, scale))
            local = torch.hstack(losses).double().cpu()  # waits for the device
        return _Trained(
            local,
            torch.stack(shared_out).double().cpu() if shared_out else torch.empty(0),
            torch.tensor(samples),
            evaluate(model, data.validation, world).loss,
            parameters_to_vector(model.parameters()).detach().cpu(),
            len(data.train) / (time.perf_counter() - start),
            description,
        )

    def _wrap(self, model: nn.Module, world: World, seconds: float) -> tuple[nn.Module, str]:
        network = Bfloat16(model) if self._precision == "bf16" else model
        if world.world_size == 1:
            return network, "single process"
        keep_compiler_out_of_ddp()
        ddp = DistributedDataParallel(network, gradient_as_bucket_view=True)
        description, _ = register_comm_hook(ddp, world, True, seconds)
        settle_buckets(ddp)
        return ddp, description


def record_reference() -> dict[str, Any]:
    """Return a new reference curve, trained in this process in float32 on the CPU."""
    world = World(Launch("none"), torch.device("cpu"), "none")
    trained = TrainCheck(world.launch, world.device, "fp32")._train(world)
    return {
        "losses": [float(f"{loss:.8g}") for loss in (trained.losses / trained.samples).tolist()],
        "validation_loss": float(f"{trained.validation_loss:.8g}"),
    }


@torch.no_grad()
def _by_rank(network: nn.Module, images: Tensor, labels: Tensor, first: int, ranks: int) -> Tensor:
    """Return what each of `ranks` would contribute to the summed loss of a global batch: (ranks,).

    Args:
        network: before the step.
        images: the global batch, as `train_step` takes it.
        labels: of the images.
        first: position of its first sample in the epoch.
        ranks: DistributedSampler gives position p to rank p mod `ranks`.
    """
    losses = F.cross_entropy(network(images), labels, reduction="none")
    owners = torch.arange(first, first + len(losses), device=losses.device) % ranks
    return losses.new_zeros(ranks).index_add_(0, owners, losses)


def check_alone(
    payloads: Payloads, facts_by_rank: FactsByRank, precision: Precision
) -> list[Finding]:
    """Require that each rank alone follows the reference curve, from `TrainCheck.alone`."""
    if errors := find_errors("arithmetic", "training fails", payloads, facts_by_rank):
        return errors
    wrong = [rank for rank, payload in enumerate(payloads) if payload["step"] is not None]
    if not wrong:
        close = _closeness(payloads, precision)
        speed = f", {payloads[0]['samples_per_second']:,.0f} samples/s" * (len(payloads) == 1)
        each = "each rank alone" if len(payloads) > 1 else "training"
        text = f"{each} follows the reference curve{close}{speed}"
        return [Finding("arithmetic", "ok", text, figures=list(payloads))]
    step = min(payloads[rank]["step"] for rank in wrong)
    text = (
        f"{name_ranks(wrong, facts_by_rank)}: the losses leave the reference curve at step {step}"
        f"{_closeness([payloads[rank] for rank in wrong], precision)}"
    )
    remedy = (
        _EXCLUDE
        if len(wrong) < len(payloads)
        else "if model, optimizer or step were changed, python -m benchmarks.reference records a "
        "new curve; otherwise reinstall torch, or check the memory and the device"
    )
    return [Finding("arithmetic", "problem", text, remedy)]


def check_together(
    payloads: Payloads, facts_by_rank: FactsByRank, precision: Precision
) -> list[Finding]:
    """Require that all ranks together follow the curve, from `TrainCheck.together`."""
    if errors := find_errors("training", "training fails", payloads, facts_by_rank):
        return errors
    steps = {r: p["own_step"] for r, p in enumerate(payloads) if p["own_step"] is not None}
    first = [rank for rank, step in steps.items() if step == min(steps.values())]
    how, close = payloads[0]["description"], _closeness(payloads, precision)
    if first and len(first) < len(payloads):
        text = (
            f"the losses of {name_ranks(first, facts_by_rank)} differ from those of the same "
            f"samples alone, from step {steps[first[0]]} on"
        )
        return [Finding("training", "problem", text, _EXCLUDE)]
    if apart := _diverged(payloads):
        text = f"the weights of {name_ranks(apart, facts_by_rank)} differ from the other ranks'"
        return [Finding("training", "problem", text, _EXCLUDE)]
    if first or any(payload["step"] is not None for payload in payloads):
        text = f"each rank alone is right, but not all together ({how}){close}"
        remedy = "train with --shared-memory off, or suspect the network; report this"
        return [Finding("training", "problem", text, remedy)]
    speed = f"{payloads[0]['samples_per_second']:,.0f} samples/s"
    text = f"{counted(len(payloads), 'rank')} together follow it{close}, {speed}, {how}"
    return [Finding("training", "ok", text, figures=list(payloads))]


def _diverged(payloads: Payloads) -> list[int]:
    """Return the ranks with weights other than those of the rank that drifted least."""
    drifts = [p["drift"] if p["drift"] == p["drift"] else float("inf") for p in payloads]
    sound = payloads[drifts.index(min(drifts))]["digest"]
    return [rank for rank, payload in enumerate(payloads) if payload["digest"] != sound]


def _closeness(payloads: Payloads, precision: Precision) -> str:
    worst = max(payload["difference"] for payload in payloads)
    return f" (largest difference {worst:.1e}, allowed {TOLERANCES[precision]:g} for {precision})"
