"""TrainState: everything a resume needs, in one object."""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mnist_dist.distributed.world import World
from mnist_dist.errors import JobError, UserError
from mnist_dist.model import state_dict_mismatch

FORMAT = 1
NOT_FINITE_REMEDY = (
    "nothing was saved after it: check the data, or lower --lr and start in another --run-dir"
)
_COUNTS = ("epoch", "batch", "step", "best_epoch")


class _LocalState(NamedTuple):
    """What differs between ranks after optimizer step `step`."""

    step: int
    loss_sum: float
    """Over the steps of the epoch."""
    rng: NDArray[np.uint8]
    """For torch.set_rng_state; an array, since a tensor takes 0.4 ms to pickle."""
    cuda_rng: NDArray[np.uint8] | None
    """For torch.cuda.set_rng_state; None on CPUs."""


@dataclass
class TrainState:
    """The position and contents of a run. A checkpoint saves it; a resume loads it."""

    model: nn.Module
    """The bare model, not its DistributedDataParallel wrapper."""
    optimizer: Optimizer
    scheduler: LRScheduler | None
    hyperparameters: dict[str, Any]
    """What the results depend on, by flag name, and the data: a resume must have the same."""
    epoch: int = 0
    """Epochs finished."""
    batch: int = 0
    """Global batches of the current epoch already trained on."""
    step: int = 0
    """Optimizer steps since the start of the run."""
    best_loss: float = float("inf")
    best_epoch: int = 0
    """Validation loss of the best epoch so far, and its number (1 = the first)."""
    loss_sum: float = 0.0
    """This rank's summed loss over the drained steps of the current epoch."""
    _losses: list[Tensor] = field(default_factory=list)
    """Losses of one or several steps, still on the device: reading one waits for the device."""
    _ranks: list[_LocalState] = field(default_factory=list)
    """The states last exchanged between all ranks, in rank order."""

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def count_steps(self, loss_sums: Tensor) -> None:
        """Count optimizer steps with this rank's summed losses: () float32 of one, or (steps,)."""
        self._losses.append(loss_sums)
        self.batch += loss_sums.numel()
        self.step += loss_sums.numel()

    def step_schedule(self) -> float:
        """Step the schedule; return the learning rate that the step before it has."""
        rate = self.lr
        if self.scheduler is not None:
            self.scheduler.step()
        return rate

    def drain_losses(self) -> int | None:
        """Read the losses of the steps since the last call from the device.

        They are added one by one in float64, so the sum does not depend on when this is called.

        Returns:
            The first step with a loss that is not finite, None if all are.
        """
        if not self._losses:
            return None
        losses = torch.hstack(self._losses).tolist()
        first = self.step - len(losses) + 1
        self._losses.clear()
        for loss in losses:
            self.loss_sum += loss
        bad = [first + n for n, loss in enumerate(losses) if not math.isfinite(loss)]
        return bad[0] if bad else None

    def finish_epoch(self, loss: float) -> bool:
        """End the epoch with its validation loss; return whether that is the best so far.

        Raises:
            JobError: the loss or a weight is not finite.
        """
        if not math.isfinite(loss):
            raise self._not_finite("the validation loss")
        self.check_weights()
        self.epoch += 1
        self.batch = 0
        self.loss_sum = 0.0
        if not loss < self.best_loss:
            return False
        self.best_loss, self.best_epoch = loss, self.epoch
        return True

    def check_weights(self) -> None:
        """Check the weights before they are saved: the losses so far are those of earlier ones.

        Raises:
            JobError: a weight is not finite.
        """
        tensors = {k: v for k, v in self.model.state_dict().items() if v.is_floating_point()}
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
        for name, is_finite in zip(tensors, finite, strict=True):
            if not is_finite:
                raise self._not_finite(f"a weight of {name}")

    def _not_finite(self, what: str) -> JobError:
        return JobError(
            f"{what} after step {self.step} (epoch {self.epoch + 1}) is not finite; "
            f"{NOT_FINITE_REMEDY}"
        )

    def weights_digest(self) -> str:
        """Return the SHA-256 (hex) of the model: equal on two ranks only if every bit is."""
        digest = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().reshape(-1).data)
        return digest.hexdigest()

    def local_payload(self, world: World) -> tuple[str, _LocalState]:
        """Return what the ranks exchange after an epoch's steps, for `merge_payloads`."""
        return self.weights_digest() if world.world_size > 1 else "", self._local_state()

    def merge_payloads(self, payloads: list[tuple[str, _LocalState]]) -> tuple[float, list[int]]:
        """Take in the `local_payload` of all ranks, in rank order.

        Returns:
            The epoch's summed loss over all ranks; and the diverged ranks: those with weights
            that differ in any bit from the majority's.
        """
        digests = [digest for digest, _ in payloads]
        common = max(digests, key=digests.count)
        diverged = [rank for rank, digest in enumerate(digests) if digest != common]
        self._ranks = [state for _, state in payloads]
        return sum(state.loss_sum for state in self._ranks), diverged

    def _local_state(self) -> _LocalState:
        cuda_rng = torch.cuda.get_rng_state().numpy() if self._is_on_gpu else None
        return _LocalState(self.step, self.loss_sum, torch.get_rng_state().numpy(), cuda_rng)

    @property
    def _is_on_gpu(self) -> bool:
        return next(self.model.parameters()).is_cuda

    def state_dict(self, world: World) -> dict[str, Any]:
        """Return the whole state as tensors and plain types; every rank must call this.

        Model and optimizer are equal on all ranks. What is not, the random state and the partial
        loss, is listed in rank order, so that a resume at the same world size is bitwise. After
        `merge_payloads` it is known; otherwise it is gathered here.
        """
        if not self._ranks or self._ranks[0].step != self.step:
            self._ranks = world.gather(self._local_state())
        on_gpus = [rank.cuda_rng for rank in self._ranks if rank.cuda_rng is not None]
        return {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "identity": dict(self.hyperparameters),  # the key is part of the file format
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "rng": [torch.from_numpy(rank.rng) for rank in self._ranks],
            "cuda_rng": [torch.from_numpy(state) for state in on_gpus],
            "loss_sums": [rank.loss_sum if self.batch else 0.0 for rank in self._ranks],
        }

    def find_fault(self, saved: Any) -> str | None:
        """Describe what makes `saved`, read from a file, no state of a run; None if it is one.

        A state of another version, run or model is left to `load_state_dict` to refuse.
        """
        if not isinstance(saved, dict) or type(saved.get("format")) is not int:
            return "it is not a training state"
        if saved["format"] != FORMAT:
            return None
        example: dict[str, Any] = {"model": {}, "identity": {}, "best_loss": 0.0}
        example |= {"rng": [Tensor()], "loss_sums": [0.0]} | dict.fromkeys(_COUNTS, 0)
        if fault := _kind_mismatch(
            {"cuda_rng": []} | saved, example | {"cuda_rng": [Tensor()]}, ""
        ):
            return fault
        if min(saved[name] for name in _COUNTS) < 0:
            return "it has a negative count"
        if not all(isinstance(weight, Tensor) for weight in saved["model"].values()):
            return "its model holds more than tensors"
        if not all(isinstance(v, str | int | float | None) for v in saved["identity"].values()):
            return "its identity holds more than plain values"
        if self._differences(saved) or state_dict_mismatch(saved["model"], self.model):
            return None
        return self._optimizer_fault(saved) or _ranks_fault(saved)

    def _optimizer_fault(self, saved: dict[str, Any]) -> str | None:
        """Describe what of the optimizer and schedule in `saved` cannot be loaded."""
        groups = self.optimizer.param_groups
        shapes = [parameter.shape for group in groups for parameter in group["params"]]
        group, own_groups = groups[0], self.optimizer.state_dict()["param_groups"]
        numbers = {name: value for name, value in group.items() if type(value) in (int, float)}
        example = {"optimizer": {"state": {}, "param_groups": [numbers | {"params": [0]}]}}
        if self.scheduler is not None:
            own, given = self.scheduler.state_dict(), saved["scheduler"]
            if isinstance(given, dict):  # versions of torch differ in what they save
                own = {name: own[name] for name in own if name in given or name == "last_epoch"}
            example["scheduler"] = own
        if fault := _kind_mismatch(saved, example, ""):
            return fault
        saved_groups, entries = saved["optimizer"]["param_groups"], saved["optimizer"]["state"]
        if [g["params"] for g in saved_groups] != [g["params"] for g in own_groups]:
            return "its optimizer belongs to another model"
        for index, entry in entries.items():
            if index not in range(len(shapes)) or not isinstance(entry, dict):
                return "its optimizer has a state for an unknown parameter"
            for buffer in entry.values():
                is_float = isinstance(buffer, Tensor) and buffer.is_floating_point()
                # Adam counts the steps of each parameter in a tensor without dimensions.
                is_sound = is_float and buffer.shape in (shapes[index], torch.Size())
                if buffer is not None and not is_sound:
                    return f"its optimizer has an invalid state for parameter {index}"
        return None

    def load_state_dict(self, saved: dict[str, Any], world: World) -> None:
        """Continue from `saved`, a `state_dict`.

        At another world size the partial loss goes to rank 0 as one sum, and the random state is
        seeded from the step: the model draws no random numbers during training.

        Raises:
            UserError: `saved` is from a run with other results.
        """
        self._check_same_run(saved)
        if fault := state_dict_mismatch(saved["model"], self.model):
            raise UserError(
                "--run-dir: its checkpoint is of a model other than "
                f"{type(self.model).__name__}: {fault}; use another --run-dir"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.epoch, self.batch, self.step = saved["epoch"], saved["batch"], saved["step"]
        self.best_loss, self.best_epoch = saved["best_loss"], saved["best_epoch"]
        if len(saved["rng"]) == world.world_size:
            torch.set_rng_state(saved["rng"][world.rank])
            if self._is_on_gpu and saved.get("cuda_rng"):
                torch.cuda.set_rng_state(saved["cuda_rng"][world.rank])
            self.loss_sum = saved["loss_sums"][world.rank]
        else:
            torch.manual_seed(self.hyperparameters["seed"] + self.step)
            self.loss_sum = sum(saved["loss_sums"]) if world.is_main_process else 0.0

    def _differences(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters that were others in `saved`."""
        own, before = self.hyperparameters, saved["identity"]
        return {name: before[name] for name in before if own.get(name) != before[name]}

    def _check_same_run(self, saved: dict[str, Any]) -> None:
        if saved.get("format") != FORMAT:
            raise UserError(
                f"--run-dir: its checkpoint has format {saved.get('format')}, but this version "
                f"reads {FORMAT}; continue it with the version that wrote it"
            )
        for name, before in self._differences(saved).items():
            now = self.hyperparameters.get(name)
            if name == "data":
                raise UserError(
                    "--data: the run in --run-dir was started with other data; use the same "
                    "data (--data bundled if it was that), or another --run-dir"
                )
            why = ", on which its schedule depends" if name == "epochs" else ""
            raise UserError(
                f"--{name.replace('_', '-')} {now}: the run in --run-dir was started with "
                f"{before}{why}; use that value (for all values of that run, --config with its "
                "config.json), or another --run-dir"
            )


def _ranks_fault(saved: dict[str, Any]) -> str | None:
    """Describe what in `saved` that differs between ranks cannot be loaded."""
    on_cpus, on_gpus, losses = saved["rng"], saved.get("cuda_rng", []), saved["loss_sums"]
    if not on_cpus or len(losses) != len(on_cpus) or len(on_gpus) not in (0, len(on_cpus)):
        return "its loss_sums, rng and cuda_rng are from different ranks"
    if any(state.dtype != torch.uint8 for state in on_gpus):
        return "its cuda_rng is not a random state"
    try:
        for state in on_cpus:
            torch.Generator().set_state(state)
    except (RuntimeError, TypeError):
        return "its rng is not a random state"
    return None


def _kind_mismatch(found: Any, example: Any, name: str) -> str | None:
    """Describe the first value in `found` that is not of the kind that it has in `example`.

    Lists may have any length and dicts further keys; all items of a list are like the first.
    """
    if isinstance(example, dict) and isinstance(found, dict):
        for key, value in example.items():
            if key not in found:
                return f"it has no{name} {key}"
            if fault := _kind_mismatch(found[key], value, f"{name} {key}"):
                return fault
        return None
    if isinstance(example, list) and isinstance(found, list):
        faults = (_kind_mismatch(item, example[0], name) for item in found if example)
        return next((fault for fault in faults if fault), None)
    kinds = (int, float) if type(example) is float else type(example)
    is_like = isinstance(found, kinds) and isinstance(found, bool) <= isinstance(example, bool)
    if is_like and not (isinstance(found, float) and math.isnan(found)):
        return None
    return f"its{name} is {type(found).__name__ if not is_like else found}"
