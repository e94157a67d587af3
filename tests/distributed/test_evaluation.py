"""Every sample counts once, whatever the split, batch and world sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_ranks

from mnist_dist.data import Split
from mnist_dist.distributed.launcher import read_launch
from mnist_dist.distributed.process_group import init_distributed
from mnist_dist.evaluation import Evaluation, evaluate
from mnist_dist.model import MLP, pixels

SIZES = range(12, 18)


def made_split(size: int) -> Split:
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (size, 784), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (size,), generator=generator))


def made_model() -> MLP:
    torch.manual_seed(1)
    return MLP()


def evaluate_all_sizes() -> list[Evaluation]:
    with init_distributed(read_launch(), "cpu", "auto") as world:
        return [evaluate(made_model(), made_split(size), world) for size in SIZES]


def reference(size: int) -> tuple[float, float]:
    """Loss and accuracy in float64, by one process."""
    split, model = made_split(size), made_model().double()
    logits = model(pixels(split.images).double())
    loss = F.cross_entropy(logits, split.labels).item()
    return loss, (logits.argmax(1) == split.labels).double().mean().item()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_counts_and_losses_are_those_of_the_whole_split_on_every_rank(world_size: int) -> None:
    for results in run_ranks(evaluate_all_sizes, world_size):
        for size, result in zip(SIZES, results, strict=True):
            loss, accuracy = reference(size)
            assert result.count == size
            assert result.loss == pytest.approx(loss, rel=1e-6)
            assert result.accuracy == pytest.approx(accuracy)


def evaluate_one_sample() -> Evaluation:
    with init_distributed(read_launch(), "cpu", "auto") as world:
        return evaluate(made_model(), Split(*[t[:1] for t in split_tensors(12)]), world)


def split_tensors(size: int) -> tuple[Any, Any]:
    split = made_split(size)
    return split.images, split.labels


def test_fewer_samples_than_ranks_is_evaluated_too() -> None:
    results = run_ranks(evaluate_one_sample, 3)
    assert [result.count for result in results] == [1, 1, 1]
    assert len({result.loss for result in results}) == 1


def test_accuracy_by_class_is_each_digits_own_share() -> None:
    split, model = made_split(200), made_model()
    with init_distributed(read_launch({}), "cpu", "auto") as world:
        result = evaluate(model, split, world)
    right = model(pixels(split.images)).argmax(1) == split.labels
    for digit, share in enumerate(result.accuracy_by_class):
        of_digit = split.labels == digit
        assert share == pytest.approx(right[of_digit].double().mean().item())


def evaluate_with_errors() -> Evaluation:
    with init_distributed(read_launch(), "cpu", "auto") as world:
        return evaluate(made_model(), made_split(203), world, errors=9)


@pytest.mark.parametrize("world_size", [1, 3])
def test_confusions_and_most_confident_errors_are_those_of_the_whole_split(world_size: int) -> None:
    split, model = made_split(203), made_model()
    with torch.inference_mode():
        probabilities = model(pixels(split.images)).softmax(1)
    sure, predicted = probabilities.max(1)
    wrong = [n for n in sure.argsort(descending=True).tolist() if predicted[n] != split.labels[n]]
    pairs = list(zip(split.labels.tolist(), predicted.tolist(), strict=True))
    for result in run_ranks(evaluate_with_errors, world_size):
        for label in range(10):
            for predicted_as in range(10):
                assert result.confusion[label][predicted_as] == pairs.count((label, predicted_as))
        assert [e.index for e in result.most_confident_errors] == wrong[:9]
        for error in result.most_confident_errors:
            assert (error.label, error.predicted) == pairs[error.index]
            assert error.probability == pytest.approx(sure[error.index].item(), rel=1e-5)
        counts = [count for count, _, _ in result.confusions]
        assert counts == sorted(counts, reverse=True)
        assert sum(counts) == len(wrong)


def evaluate_a_few_with_errors() -> Evaluation:
    with init_distributed(read_launch(), "cpu", "auto") as world:
        return evaluate(made_model(), made_split(2), world, errors=9)


def test_ranks_without_a_sample_name_no_error() -> None:
    for result in run_ranks(evaluate_a_few_with_errors, 3):
        assert sum(count for count, _, _ in result.confusions) == len(result.most_confident_errors)
        assert {e.index for e in result.most_confident_errors} <= {0, 1}
