"""Every format of the same data gives the same bytes, and the same fingerprint."""

import gzip
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import (
    WRITERS,
    Array,
    Digits,
    assert_holds,
    digits,
    floats,
    isolate,
    read,
    write_bytes,
    write_idx,
    write_kmnist_npz,
    write_named,
    write_npz,
    write_pickle,
    write_qmnist,
    write_zip,
)

from mnist_dist.data import DataError, Dataset, find_data
from mnist_dist.data.splits import MNIST_SHA256


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def full_sets(full_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """Full MNIST out of the pickle, and out of the IDX files."""
    cache = tmp_path_factory.mktemp("full-cache")
    return [read(full_mnist / "mnist.pkl.gz", cache), read(full_mnist, cache)]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_each_format_gives_the_same_bytes_and_fingerprint(
    write: Callable[[Path, Digits], Path], tmp_path: Path
) -> None:
    made = digits()
    dataset = read(write(tmp_path / "home", made))
    assert_holds(dataset, made)
    assert dataset.fingerprint == read(write_pickle(tmp_path / "plain.pkl", made)).fingerprint


def test_the_fingerprint_is_the_sha256_of_the_named_shaped_bytes(tmp_path: Path) -> None:
    made = digits()
    digest = hashlib.sha256()
    for name, (images, labels) in zip(("train", "validation", "test"), made.splits, strict=True):
        digest.update(f"{name} images ({len(labels)}, 784)\n".encode() + images.tobytes())
        digest.update(f"{name} labels ({len(labels)},)\n".encode() + labels.tobytes())
    assert read(write_npz(tmp_path / "made.npz", made)).fingerprint == digest.hexdigest()


def test_other_data_has_another_fingerprint(tmp_path: Path) -> None:
    one, other = (
        read(write_npz(tmp_path / f"{seed}.npz", digits(seed=seed))).fingerprint for seed in (0, 1)
    )
    assert one != other


def test_pickled_arrays_may_be_in_fortran_order_big_endian_or_doubles(tmp_path: Path) -> None:
    made = digits()
    variants: dict[str, Callable[[Array], Array]] = {
        "fortran": lambda x: np.asfortranarray(x),
        "big endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
        "doubles": lambda x: x.astype(np.float64) if x.dtype == np.float32 else x,
    }
    for name, change in variants.items():
        content = [[change(images), change(labels)] for images, labels in floats(made)]
        for protocol in (2, 5):
            file = tmp_path / f"{name} {protocol}.pkl"
            assert_holds(read(write_bytes(file, pickle.dumps(content, protocol))), made)


def test_npz_labels_may_be_any_integers_and_images_flat(tmp_path: Path) -> None:
    made = digits()
    file = write_npz(
        tmp_path / "made.npz",
        made,
        x_train=np.asfortranarray(made.train[0].reshape(-1, 784)),
        y_train=made.train[1].astype(">i8"),
    )
    assert_holds(read(file), made)


def test_the_last_sixth_of_60000_training_images_is_10000(full_sets: list[Dataset]) -> None:
    assert [len(split) for split in full_sets[1].splits] == [50_000, 10_000, 10_000]


def test_full_mnist_is_bitwise_the_same_from_pickle_and_idx(full_sets: list[Dataset]) -> None:
    from_pickle, from_idx = full_sets
    assert from_pickle.fingerprint == from_idx.fingerprint == MNIST_SHA256
    for one, other in zip(from_pickle.splits, from_idx.splits, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_full_mnist_is_what_the_original_script_saw(
    full_mnist: Path, full_sets: list[Dataset]
) -> None:
    with gzip.open(full_mnist / "mnist.pkl.gz") as stream:
        original = pickle.load(stream, encoding="latin-1")
    for split, (images, labels) in zip(full_sets[0].splits, original, strict=True):
        assert np.array_equal(split.images.numpy() / np.float32(256), images)
        assert np.array_equal(split.labels.numpy(), labels)


def test_full_mnist_is_called_mnist_and_says_where_it_is_from(
    full_mnist: Path, full_sets: list[Dataset]
) -> None:
    assert full_sets[1].description == f"MNIST, 50,000 / 10,000 / 10,000 from {full_mnist}"


def test_a_data_set_of_ones_own_is_not_called_mnist(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "mnist.npz", digits())
    assert read(file).description == f"Dataset, 50 / 10 / 10 from {file}"


def test_bundled_digits_are_balanced_in_every_split() -> None:
    dataset = read("bundled")
    for split, per_class in zip(dataset.splits, (400, 50, 50), strict=True):
        assert split.labels.bincount().tolist() == [per_class] * 10
    assert dataset.description == "bundled 5,000-digit subset of MNIST, 4,000 / 500 / 500"
    assert find_data("bundled", None).warnings == ()


def test_bundled_splits_take_400_50_50_of_each_class_in_order() -> None:
    file = Path(__file__).parents[2] / "mnist_dist/data/bundled/mnist_5k.npz"
    of_threes = np.load(file)["images"][1500:2000].reshape(500, 784)
    taken = [split.images[split.labels == 3].numpy() for split in read("bundled").splits]
    assert np.array_equal(np.concatenate(taken), of_threes)
    assert [len(part) for part in taken] == [400, 50, 50]


def test_bundled_digits_are_mnist_training_images(full_sets: list[Dataset]) -> None:
    whole = full_sets[1]
    known = {
        image.numpy().tobytes()
        for split in (whole.train, whole.validation)
        for image in split.images
    }
    assert all(
        i.numpy().tobytes() in known for split in read("bundled").splits for i in split.images
    )


def test_a_home_directory_in_the_path_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_npz(tmp_path / "made.npz", digits())
    assert_holds(read("~/made.npz"), digits())


def test_unpacked_idx_files_win_over_packed_ones_beside_them(tmp_path: Path) -> None:
    write_idx(tmp_path / "idx", digits(seed=1), ".gz")
    write_idx(tmp_path / "idx", digits(seed=2))
    assert_holds(read(tmp_path / "idx"), digits(seed=2))


def test_a_path_that_is_not_utf8_gives_a_description_that_can_be_printed(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.npz"))
    write_npz(file, digits())
    assert "50 / 10 / 10" in read(file).description.encode().decode()


def test_the_first_training_samples_leave_the_other_splits_alone(tmp_path: Path) -> None:
    whole = read(write_npz(tmp_path / "made.npz", digits()))
    few = whole.first_training_samples(7)
    assert torch.equal(few.train.images, whole.train.images[:7])
    assert torch.equal(few.train.labels, whole.train.labels[:7])
    assert (few.validation, few.test) == (whole.validation, whole.test)
    assert "first 7 training samples" in few.description


def test_fewer_training_samples_are_another_data_set_and_all_of_them_the_same() -> None:
    whole = read("bundled")
    counts = (1, 100, 3999, 4000)
    fingerprints = [whole.first_training_samples(count).fingerprint for count in counts]
    assert len(set(fingerprints)) == len(counts)
    assert fingerprints == [whole.first_training_samples(count).fingerprint for count in counts]
    assert fingerprints[-1] == whole.fingerprint


@pytest.mark.parametrize("count", [-1, 0, 4001])
def test_more_training_samples_than_there_are_is_an_error_that_says_so(count: int) -> None:
    with pytest.raises(DataError, match=f"--train-samples {count}: .*4,000 samples; pass"):
        read("bundled").first_training_samples(count)


def test_moving_to_a_device_keeps_everything_else() -> None:
    whole = read("bundled")
    moved = whole.to(torch.device("meta"))
    assert {split.images.device.type for split in moved.splits} == {"meta"}
    assert moved.test.labels.shape == whole.test.labels.shape
    assert (moved.fingerprint, moved.description) == (whole.fingerprint, whole.description)
    assert whole.to(torch.device("cpu")).train.images is whole.train.images


def test_two_sets_in_one_folder_are_told_apart_by_naming_the_training_images(
    tmp_path: Path,
) -> None:
    both = write_named(tmp_path, digits(seed=1), "emnist-digits-{part}-{kind}-ubyte", True)
    write_named(both, digits(seed=2), "emnist-mnist-{part}-{kind}-ubyte", True)
    write_idx(both, digits(seed=3))
    with pytest.raises(DataError, match="contains several data sets; pass the training images"):
        read(both)
    names = ("emnist-digits-train", "emnist-mnist-train", "train")
    for seed, name in enumerate(names, start=1):
        assert_holds(read(both / f"{name}-images-idx3-ubyte"), digits(seed=seed))


def test_two_test_sets_of_one_training_set_are_refused(tmp_path: Path) -> None:
    write_named(write_idx(tmp_path, digits()), digits(seed=1), "{part}-{kind}-ubyte")
    with pytest.raises(DataError, match=r"has two test sets .*; remove or rename"):
        read(tmp_path)


def test_letters_are_refused_by_name_and_by_label(tmp_path: Path) -> None:
    letters = write_named(tmp_path / "a", digits(), "emnist-letters-{part}-{kind}-ubyte")
    with pytest.raises(DataError, match=r"more than ten classes \(emnist-letters\); pass a dir"):
        read(letters)
    made = digits()
    renamed = Digits((made.train[0], np.arange(60, dtype=np.uint8) % 26 + 1), made.test)
    with pytest.raises(DataError, match="run from 1 to 26, not 0 to 9: they are letters; pass a"):
        read(write_idx(tmp_path / "b", renamed))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_kmnist_npz, "kmnist-test-labels.npz"),
        (write_qmnist, "qmnist-test-labels-idx2-int.gz"),
    ],
)
def test_a_missing_file_of_a_named_set_is_refused(
    write: Callable[[Path, Digits], Path], name: str, tmp_path: Path
) -> None:
    directory = write(tmp_path / "set", digits())
    (directory / name).unlink()
    with pytest.raises(DataError, match=f"{name.split('-idx')[0]}.* is missing"):
        read(directory)


def test_several_sets_in_a_zip_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    write_idx(folder / "a", digits())
    write_idx(folder / "b", digits())
    file = write_zip(tmp_path / "archive.zip", folder)
    with pytest.raises(DataError, match=r"several data sets: .*a, .*b; unpack it and pass one"):
        read(file)


def test_a_damaged_file_in_a_zip_is_named_with_the_zip(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "unpacked", digits())
    (folder / "train-labels-idx1-ubyte").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    file = write_zip(tmp_path / "archive.zip", folder)
    with pytest.raises(DataError, match=r"archive\.zip/train-labels-idx1-ubyte: is a Git LFS"):
        read(file)


def test_full_mnist_transposed_as_in_emnist_is_bitwise_the_same(
    full_mnist: Path, full_sets: list[Dataset], tmp_path: Path
) -> None:
    train, validation, test = full_sets[1].splits
    images = torch.cat([train.images, validation.images]).numpy().reshape(-1, 28, 28)
    labels = torch.cat([train.labels, validation.labels]).numpy()
    whole = Digits(
        (images, labels.astype(np.uint8)),
        (test.images.numpy().reshape(-1, 28, 28), test.labels.numpy().astype(np.uint8)),
    )
    emnist = write_named(tmp_path, whole, "emnist-mnist-{part}-{kind}-ubyte", transpose=True)
    assert read(emnist).fingerprint == MNIST_SHA256


def test_digits_that_lie_transposed_are_warned_of_at_every_start(tmp_path: Path) -> None:
    """EMNIST's files under MNIST's names, which train well and predict nothing."""
    train, _, test = (
        (split.images.numpy().reshape(-1, 28, 28), split.labels.numpy().astype(np.uint8))
        for split in read("bundled").splits
    )
    upright = write_idx(tmp_path / "upright", Digits(train, test))
    assert find_data(str(upright), None).warnings == ()
    renamed = write_named(
        tmp_path / "renamed", Digits(train, test), "{part}-{kind}-ubyte", transpose=True
    )
    for _ in range(2):
        (warning,) = find_data(str(renamed), None).warnings
        assert "look transposed, as in EMNIST" in warning
        assert str(renamed) in warning
