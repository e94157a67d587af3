"""The names of torch that are not part of its public interface, all in one place.

`NAMES` lists them; tests/unit/test_torch_internals.py resolves each, so that a release of torch
that drops one fails a test that names it.
"""

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

NAMES = (
    "torch._foreach_add",
    "torch._foreach_add_",
    "torch._foreach_copy_",
    "torch._foreach_mul_",
    "torch._fused_sgd_",
    "torch._log_softmax",
    "torch._log_softmax_backward_data",
    "torch.ops.aten.nll_loss_forward.default",
    "torch.ops.aten.nll_loss_backward.default",
    "torch.ops.aten.threshold_backward.default",
    "torch.utils.tensorboard.SummaryWriter._get_file_writer",  # overridden in run/tensorboard.py
    "torch.distributed.distributed_c10d._get_default_store",
    "torch._dynamo.utils.get_optimize_ddp_mode",
    "torch.nn.parallel.DistributedDataParallel._inside_ddp_forward",
    # Public from torch 2.14 on, where the private name is deprecated.
    "torch.distributed.set_timeout"
    if hasattr(torch.distributed, "set_timeout")
    else "torch.distributed.distributed_c10d._set_pg_timeout",
)

foreach_add: Callable[..., Any] = torch._foreach_add
foreach_add_: Callable[..., None] = torch._foreach_add_
foreach_copy_: Callable[..., None] = torch._foreach_copy_
foreach_mul_: Callable[..., None] = torch._foreach_mul_
fused_sgd_: Callable[..., None] = torch._fused_sgd_
log_softmax: Callable[..., Tensor] = torch._log_softmax
log_softmax_backward: Callable[..., Tensor] = torch._log_softmax_backward_data
nll_loss_forward: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten.nll_loss_forward.default
nll_loss_backward: Callable[..., Tensor] = torch.ops.aten.nll_loss_backward.default
threshold_backward: Callable[..., Tensor] = torch.ops.aten.threshold_backward.default
set_timeout: Callable[[timedelta], None] = (
    getattr(torch.distributed, "set_timeout", None)
    or torch.distributed.distributed_c10d._set_pg_timeout
)


def set_group_timeout(seconds: float) -> None:
    """Set the timeout of the default process group's collectives."""
    set_timeout(timedelta(seconds=seconds))


def default_store() -> torch.distributed.Store:
    """Return the store of the default process group."""
    return torch.distributed.distributed_c10d._get_default_store()


def without_compiler(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of torch.optim without the decorator that imports torch._dynamo.

    That import takes as long as torch itself, and nothing here compiles an optimizer.
    """
    return getattr(method, "__wrapped__", method)


class _Deferred:
    """Stands for a module of torch; imports it at the first use of anything but `known`."""

    def __init__(self, module: str, **known: Any) -> None:
        self._module = module
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


def keep_compiler_out_of_ddp() -> None:
    """Let DistributedDataParallel work without importing torch._dynamo.

    Its constructor asks the compiler how it would optimize DDP, and its forward pass hides a
    context manager from the compiler. The import takes longer than that of torch, in every rank.
    To be called only if nothing is compiled.
    """
    if "_dynamo" not in vars(torch):
        # What the compiler answers unless its configuration was changed, for which it is imported.
        utils = _Deferred("torch._dynamo.utils", get_optimize_ddp_mode=lambda: "ddp_optimizer")
        torch._dynamo = _Deferred("torch._dynamo", utils=utils)  # type: ignore[assignment]
    hidden = getattr(DistributedDataParallel._inside_ddp_forward, "__wrapped__", None)
    if (plain := getattr(hidden, "__wrapped__", None)) is not None:
        DistributedDataParallel._inside_ddp_forward = contextmanager(plain)  # type: ignore[method-assign]


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile wrapped `model` or a part of it."""
    return any(hasattr(module, "_orig_mod") for module in model.modules())


def without_profiler(step: T) -> T:
    """Mark an optimizer's `step` as already wrapped by torch's profiling hook.

    `Optimizer.__init__` wraps `step` once per class, at the cost of a profiler range per step.
    """
    step.hooked = True  # type: ignore[attr-defined]
    return step


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Mark `optimizer` as stepped for the learning-rate scheduler, without calling `step`."""
    optimizer._opt_called = True  # type: ignore[attr-defined]
