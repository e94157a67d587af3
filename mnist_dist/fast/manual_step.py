"""One optimizer step over flat vectors: manual backward, one all-reduce, one SGD update."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mnist_dist.distributed.shared_memory import connect_shared_memory
from mnist_dist.distributed.world import World
from mnist_dist.errors import UserError
from mnist_dist.fast.manual_backward import ManualBackward
from mnist_dist.fast.threads import ThreadTuner
from mnist_dist.model import MLP
from mnist_dist.torch_internals import mark_stepped


def check_manual_step(model: nn.Module, device: torch.device, conflicts: list[str]) -> None:
    """Check that the manual step can train `model`.

    Args:
        model: what `build_model` returned.
        device: where it is trained.
        conflicts: flags given that the manual step does not support.

    Raises:
        UserError: it cannot.
    """
    if type(model) is not MLP:
        name = type(model).__name__
        raise UserError(f"--step manual: supports only the MLP, not {name}; use --step ddp")
    if device.type != "cpu":
        raise UserError(f"--step manual: runs only on CPUs, not on {device.type}; use --step ddp")
    if conflicts:
        raise UserError(f"--step manual: does not support {conflicts[0]}; remove one of the two")


class ManualStep:
    """A `train_step` for the MLP on CPUs; replaces DDP, autograd and the optimizer's `step`.

    Each rank scales its gradients by 1 / n, with n the samples of the global batch, so that their
    sum over ranks is the mean over the batch. Parameters, gradients and momentum are views of flat
    vectors, so that each is summed and updated in one operation. The arithmetic is that of DDP and
    torch.optim.SGD, and so are the bits of a single process.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        share_memory: bool,
        timeout: float,
    ) -> None:
        """Move the parameters of `model` into one vector; every rank must call this.

        Args:
            model: an MLP on the CPU, with equal weights on all ranks.
            optimizer: SGD over its parameters; its rates, momentum and state are used.
            world: the ranks.
            share_memory: sum in memory that the ranks of a node share, where possible.
            timeout: seconds to wait for a rank that does not respond.
        """
        assert isinstance(model, MLP)  # check_manual_step has refused any other
        if not isinstance(optimizer, torch.optim.SGD):
            name = type(optimizer).__name__
            raise UserError(f"--step manual: supports only SGD, not {name}; use --step ddp")
        self.seconds = 0.0
        """Time this rank has spent in all-reduces, waiting for its peers included."""
        self._optimizer = optimizer
        self._world_size = world.world_size
        self._parameters = list(model.parameters())
        self._weights = nn.utils.parameters_to_vector(self._parameters).detach()
        for parameter, view in zip(self._parameters, self._views(self._weights), strict=True):
            parameter.data, parameter.grad = view, None
        self._backward = ManualBackward([model.hidden1, model.hidden2, model.out])
        self._momentum = self._flat_momentum()
        self._all_reduce, self._gradients, self.description = _connect(
            world, len(self._weights), share_memory, timeout
        )
        self._gradient_views = self._views(self._gradients)
        self._threads = ThreadTuner(torch.get_num_threads())

    def __call__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """Take one step; see `train_step` in train_ddp.py. `model` and `optimizer` are known."""
        threads = torch.get_num_threads()
        self._threads.start_step()
        loss_sum = self._backward(images, labels, scale / self._world_size, self._gradient_views)
        started = time.perf_counter()
        total = self._all_reduce(self._gradients)
        self.seconds += time.perf_counter() - started
        self._update(total)
        torch.set_num_threads(threads)
        return loss_sum

    def _update(self, gradients: Tensor) -> None:
        """Apply torch.optim.SGD's arithmetic to the flat vectors."""
        mark_stepped(self._optimizer)
        group = self._optimizer.param_groups[0]
        if self._parameters[0].grad is None:  # what gradient_norm reads
            for parameter, view in zip(self._parameters, self._views(gradients), strict=True):
                parameter.grad = view
        if group["weight_decay"]:
            gradients = gradients.add(self._weights, alpha=group["weight_decay"])
        if group["momentum"]:
            gradients = self._momentum.mul_(group["momentum"]).add_(gradients)
        self._weights.add_(gradients, alpha=-group["lr"])

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Split a vector of all parameters' elements into tensors of the parameters' shapes."""
        parts = flat.split([parameter.numel() for parameter in self._parameters])
        return [part.view_as(p) for part, p in zip(parts, self._parameters, strict=True)]

    def _flat_momentum(self) -> Tensor:
        """Return the optimizer's momentum as one vector, zeros at first; its state views it."""
        flat = torch.zeros_like(self._weights)
        if self._optimizer.param_groups[0]["momentum"]:
            for parameter, view in zip(self._parameters, self._views(flat), strict=True):
                state = self._optimizer.state[parameter]
                if (saved := state.get("momentum_buffer")) is not None:
                    view.copy_(saved)
                state["momentum_buffer"] = view
        return flat


def _connect(
    world: World, size: int, share_memory: bool, timeout: float
) -> tuple[Callable[[Tensor], Tensor], Tensor, str]:
    """Return an all-reduce, the vector to compute its input in, and a description."""
    if world.world_size == 1:
        return lambda values: values, torch.empty(size), "single process"
    description = f"gradients over {world.backend}"
    if share_memory:
        shared, description = connect_shared_memory(world, size, timeout)
        if shared is not None:
            return shared, shared.input_buffer, description
    return world.all_reduce_sum, torch.empty(size), description
