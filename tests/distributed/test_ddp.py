"""What the owner asked for happens: DistributedDataParallel on every rank, for every gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import command, run_main, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FLAGS = ["--data=bundled", "--train-samples=300", "--global-batch-size=50", "--epochs=2"]
STEPS = 12


def train_and_watch(directory: str, flags: list[str]) -> dict[str, Any]:
    """Run the job in this rank, and note what is wrapped, averaged and used for the updates."""
    import train_ddp
    from mnist_dist.distributed import ddp

    seen: dict[str, Any] = {"wrapped": 0, "steps": 0, "averaged": [], "used": []}
    init, train_step = DistributedDataParallel.__init__, train_ddp.train_step
    hook = ddp.shared_memory_hook

    def noted_init(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        seen["wrapped"] += 1
        init(self, *args, **kwargs)

    def noted_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        future = hook(state, bucket)
        seen["averaged"].append(sorted(future.value().tolist()))
        return future

    def noted_step(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        scale: Tensor,
    ) -> Tensor:
        assert isinstance(model, DistributedDataParallel)
        seen["steps"] += 1
        loss = train_step(model, optimizer, images, labels, scale)
        gradients = [p.grad for p in model.module.parameters() if p.grad is not None]
        seen["used"].append(sorted(torch.cat([g.flatten() for g in gradients]).tolist()))
        return loss

    DistributedDataParallel.__init__ = noted_init  # type: ignore[method-assign]
    ddp.shared_memory_hook = noted_hook
    train_ddp.train_step = noted_step
    ended = run_main(directory, flags)
    assert ended.code == 0, ended
    return seen


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_builds_one_ddp_and_every_gradient_goes_through_it(
    world_size: int, tmp_path: Any
) -> None:
    """DDP's buckets have an order of their own, so what they hold is compared sorted."""
    flags = [*FLAGS, "--run-dir=run"]
    for seen in run_ranks(train_and_watch, world_size, str(tmp_path), flags):
        assert (seen["wrapped"], seen["steps"], len(seen["used"])) == (1, STEPS, STEPS)
        assert seen["averaged"][1:] == seen["used"]  # the first settles the order of the buckets
        assert all(any(gradients) for gradients in seen["used"])


IMPORTS = """
import sys
import torch, train_ddp
assert train_ddp.main(sys.argv[1:]) == 0
print("imported:", [name for name in ("torch._dynamo", "sympy") if name in sys.modules])
assert torch._dynamo.config.optimize_ddp  # it is there as soon as something asks for it
"""


def test_no_rank_imports_the_compiler_unless_something_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(IMPORTS)
    ended = command(tmp_path, "torchrun", "--nproc_per_node=2", "job.py", *FLAGS, "--run-dir=run")
    assert ended.code == 0, ended.err
    assert ended.out.count("imported: []") == 2, ended.out
