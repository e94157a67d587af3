"""Many optimizer steps in one launch: train_ddp.py's `train_step`, captured as CUDA graphs.

Python takes longer to launch the twenty small kernels of a step than a GPU takes to run them. A
graph holds the kernels of several steps, with DDP's all-reduce in between and the optimizer's
update, and is launched as one. What differs between steps, rows, labels, scale, learning rate and
shift, lies in tables on the device, which a counter on the device indexes; so every step has the
same kernels on the same addresses.

See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs, also for what
DistributedDataParallel needs. On a CPU the same steps are taken, one by one, without graphs: tests
do that.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from mnist_dist.data import Split
from mnist_dist.dimensions import IMAGE_SIDE
from mnist_dist.errors import JobError
from mnist_dist.model import pixels
from mnist_dist.optimizer import LeanSGD, TrainStep
from mnist_dist.sampling import Sharding, local_indices, random_shifts
from mnist_dist.torch_internals import foreach_copy_

# Steps in the large graph; the small one has one step.
STEPS_PER_LAUNCH = 32
# DDP rebuilds its buckets in the second step, and reads timers, which a graph cannot hold, until
# the tenth and then in every hundredth.
_WARM_UP_STEPS = 11
_IGNORE_INDEX = -100  # F.cross_entropy's default: neither loss nor gradient
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class GraphSteps:
    """The steps of an epoch, taken from tables on the device.

    All steps have the shape of the largest local batch. A row too many holds some image and the
    label that F.cross_entropy ignores, so it has neither loss nor gradient.
    """

    def __init__(
        self,
        train_step: TrainStep,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        split: Split,
        sharding: Sharding,
        max_shift: int = 0,
        steps_per_launch: int = STEPS_PER_LAUNCH,
        launched: Callable[[], None] = lambda: None,
    ) -> None:
        """Lay out the tables.

        Args:
            train_step: takes one step.
            model: DistributedDataParallel if there are several ranks. Its forward pass must not
                read from the device, and must treat every sample on its own.
            optimizer: must take its learning rate, a float in `param_groups`, also as a tensor.
            split: training samples, on the model's device.
            sharding: this rank's local batches.
            max_shift: the largest random shift of a global batch's images, in pixels.
            steps_per_launch: at most.
            launched: called after each launch.
        """
        self._train_step, self._model, self._optimizer = train_step, model, optimizer
        self._split, self._sharding, self._max_shift = split, sharding, max_shift
        self._launched = launched
        steps = sharding.steps_per_epoch
        self.steps_per_launch = min(steps_per_launch, steps)
        """Steps in one launch, where as many are to be taken."""
        device = split.images.device
        slices = [sharding.local_slice(batch) for batch in range(steps)]
        starts = torch.tensor([s.start for s in slices])
        columns = torch.arange(-(-sharding.global_batch_size // sharding.world_size))
        is_row = columns < torch.tensor([s.stop - s.start for s in slices])[:, None]
        places = (starts[:, None] + columns).where(is_row, 0)
        self._places, self._is_no_row = places.to(device), ~is_row.to(device)
        scales = [sharding.world_size / sharding.batch_samples(batch) for batch in range(steps)]
        self._scales = torch.tensor(scales, device=device)
        self._rows = torch.zeros_like(self._places)
        self._labels = torch.full_like(self._places, _IGNORE_INDEX)
        self._rates, self._losses = (torch.zeros(steps, device=device) for _ in range(2))
        self._windows = torch.zeros(steps, dtype=torch.int64, device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._ahead = torch.arange(self.steps_per_launch, device=device)
        self._window = self._shift_window().to(device)
        self._taken = 0
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def start_epoch(self, sampler: "DistributedSampler[Any]", batch: int) -> None:
        """Fill the tables for the sampler's epoch; global batch `batch` is the next."""
        device = self._rows.device
        indices = local_indices(sampler, self._sharding)
        indices = F.pad(indices, (0, 1)).to(device)  # a rank without samples needs a row, too
        torch.index_select(indices, 0, self._places.flatten(), out=self._rows.view(-1))
        torch.index_select(self._split.labels, 0, self._rows.flatten(), out=self._labels.view(-1))
        self._labels.masked_fill_(self._is_no_row, _IGNORE_INDEX)
        if self._max_shift:
            shifts = random_shifts(self._max_shift, sampler.seed, sampler.epoch, len(self._rows))
            side = IMAGE_SIDE + 2 * self._max_shift
            corners = torch.tensor(shifts).mul(-1).add(self._max_shift)
            self._windows.copy_(corners @ torch.tensor([side, 1]))
        self._next.fill_(batch)
        self._taken = batch

    def take(self, rates: Sequence[float]) -> Tensor:
        """Take as many steps as there are `rates`, their learning rates; all within the epoch.

        Returns before the device has taken them. Ranks must take the same steps by the same calls.

        Returns:
            This rank's summed loss of each step, (n,) float32, valid until the next epoch starts.
        """
        first, last = self._taken, self._taken + len(rates)
        self._rates[first:last].copy_(torch.tensor(rates), non_blocking=True)
        while self._taken < last:
            steps = self.steps_per_launch if last - self._taken >= self.steps_per_launch else 1
            if steps in self._graphs:
                self._graphs[steps].replay()
            else:
                self._run(steps)
            self._launched()
            self._taken += steps
        return self._losses[first:last]

    def _run(self, steps: int) -> None:
        """Take `steps` steps; no shape, address or branch depends on which."""
        at = self._next + self._ahead[:steps]
        rows = self._rows.index_select(0, at)
        chosen = self._split.images.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        images = pixels(self._shift(chosen, at))
        labels, scales = self._labels.index_select(0, at), self._scales.index_select(0, at)
        rates, losses = self._rates.index_select(0, at), []
        with self._tensor_rate() as group:
            for n in range(steps):
                group["lr"] = rates[n]
                loss = self._train_step(
                    self._model, self._optimizer, images[n], labels[n], scales[n]
                )
                losses.append(loss)
        self._losses.index_copy_(0, at, torch.stack(losses))
        self._next.add_(steps)

    @contextlib.contextmanager
    def _tensor_rate(self) -> Iterator[dict[str, Any]]:
        """Let the block set the learning rate to tensors, and put the scheduler's number back."""
        (group,) = self._optimizer.param_groups
        rate = group["lr"]
        try:
            yield group
        finally:
            group["lr"] = rate

    def _shift_window(self) -> Tensor:
        """Return where an image's pixels lie in one with a margin: (784,) int64."""
        side = torch.arange(IMAGE_SIDE)
        return (side[:, None] * (IMAGE_SIDE + 2 * self._max_shift) + side).flatten()

    def _shift(self, images: Tensor, at: Tensor) -> Tensor:
        """Shift (steps, rows, 784) images as sampling.shift_images does, each step by its own."""
        if not self._max_shift:
            return images
        squares = images.unflatten(2, (IMAGE_SIDE, IMAGE_SIDE))
        wide = F.pad(squares, (self._max_shift,) * 4).flatten(2)
        window = self._window + self._windows.index_select(0, at)[:, None, None]
        return wide.gather(2, window.expand(images.shape))

    def capture(self) -> str | None:
        """Capture the graphs, with every tensor and random state as it was; collective.

        The current stream must not be the default stream, on which nothing can be captured.

        Returns:
            None; or, if the step reads from the device and can be taken without graphs, why.

        Raises:
            JobError: a capture failed for another reason.
        """
        with self._unchanged():
            for _ in range(_WARM_UP_STEPS - 1):
                self._next.zero_()
                self._run(1)
            self._next.zero_()
            if reason := self._run_without_reading():
                return reason
            parameters = [p for p in self._model.parameters() if p.grad is not None]
            # Where gradient_norm finds the last step's gradients, whichever graph that was in.
            gradients = [torch.zeros_like(p) for p in parameters]
            for steps in sorted({1, self.steps_per_launch}):
                self._graphs[steps] = self._capture_steps(steps, parameters, gradients)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        return None

    def _capture_steps(
        self, steps: int, parameters: list[nn.Parameter], gradients: list[Tensor]
    ) -> torch.cuda.CUDAGraph:
        """Return the graph of `steps` steps, which leaves the last one's gradients in a copy."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Another thread's calls, such as those of NCCL's watchdog, do not end the capture.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._run(steps)
                foreach_copy_(gradients, [p.grad for p in parameters])
        except RuntimeError as error:
            # A failed capture leaves the allocator in an undefined state: the job must end.
            raise JobError(
                f"--cuda-graphs auto: the training step could not be captured "
                f"({str(error).splitlines()[0]}); use --cuda-graphs off"
            ) from error
        return graph

    def _run_without_reading(self) -> str | None:
        """Take one step in which reading from the device is an error; return that error."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "a prototype feature"
            torch.cuda.set_sync_debug_mode("error")
        try:
            self._run(1)
            return None
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if "synchronizing CUDA operation" not in reason:
                raise
            if isinstance(self._model, DistributedDataParallel):
                # Its reducer does not recover from a step that ended in the middle.
                raise JobError(
                    f"--cuda-graphs auto: the training step reads from the GPU ({reason}); use "
                    "--cuda-graphs off"
                ) from error
            return reason
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Put weights, buffers, optimizer and random states back at the end of the block.

        Tensors that the optimizer has made by then are set to zeros, as LeanSGD makes them. After
        a failed capture nothing is put back: the device may not be usable, and the job ends.
        """
        state = self._optimizer.state
        tensors = [*self._model.parameters(), *self._model.buffers()]
        kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
        before = {id(t): t.clone() for s in state.values() for t in s.values()}
        device = self._rows.device
        random_state = torch.get_rng_state()
        cuda_random_state = torch.cuda.get_rng_state(device) if self._rows.is_cuda else None
        yield
        torch.set_rng_state(random_state)
        if cuda_random_state is not None:
            torch.cuda.set_rng_state(cuda_random_state, device)
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
            for tensor in (t for s in state.values() for t in s.values()):
                if id(tensor) in before:
                    tensor.copy_(before[id(tensor)])
                else:
                    tensor.zero_()

    def close(self) -> None:
        """Free the graphs; must be called before the process group is destroyed."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()


def obstacle(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Return why the steps of `model` cannot be taken by GraphSteps, None if they can."""
    if not isinstance(optimizer, LeanSGD):
        return f"{type(optimizer).__name__} may start from another state than zeros"
    if any(isinstance(module, _BATCH_NORMS) for module in model.modules()):
        return "batch normalization would count the rows that fill up a short batch"
    return None
