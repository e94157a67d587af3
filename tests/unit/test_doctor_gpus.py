"""The doctor on nodes with GPUs: hand-made facts, a fake nvidia-smi, and CUDA calls that fail."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mnist_dist.commands.doctor import gpus
from mnist_dist.commands.doctor.checks import (
    check_devices,
    check_facts,
    check_settings,
    check_versions,
)
from mnist_dist.commands.doctor.facts import Facts, gather_facts
from mnist_dist.commands.doctor.findings import Finding
from mnist_dist.commands.doctor.gpu_checks import check_gpus, check_self_test
from mnist_dist.commands.doctor.gpus import (
    Gpu,
    GpuFacts,
    parse_nvidia_smi,
    read_gpus,
    read_nvidia_smi,
    self_test,
    shorten,
    why_no_cuda,
)
from mnist_dist.distributed.gpu_count import NO_NVIDIA_SMI
from mnist_dist.distributed.launcher import Launch

pytestmark = pytest.mark.usefixtures("threads_as_before")

CPU = torch.device("cpu")
UUIDS = [f"GPU-5c0b1f0a-0000-0000-0000-00000000000{number}" for number in range(2)]
SMI = f"""\
0, {UUIDS[0]}, 580.82.07, Disabled, 0
1, {UUIDS[1]}, 580.82.07, [N/A], [N/A]
"""
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/"
)


@pytest.fixture(scope="module")
def node() -> dict[int, Facts]:
    """Two ranks of one node that each use one of its two GPUs."""
    own, _ = gather_facts(Launch("none"), "cpu", "auto")
    visible = [Gpu("NVIDIA H100", UUIDS[n], n, mig=False, ecc_errors=0) for n in range(2)]
    found = GpuFacts(visible=visible, nccl="2.28.9", driver="580.82.07", device_files=2)
    environment = own.environment | {"cuda": "13.0"}
    rank = dataclasses.replace(
        own, host="n1", environment=environment, backend="nccl", gpus=found, settings={}
    )
    return {n: dataclasses.replace(rank, rank=n, device=f"cuda:{n}") for n in range(2)}


def with_gpus(node: dict[int, Facts], rank: int, **found: Any) -> dict[int, Facts]:
    """The node, with other facts about GPUs on one rank."""
    changed = dataclasses.replace(node[rank].gpus, **found)
    return node | {rank: dataclasses.replace(node[rank], gpus=changed)}


def with_gpu(node: dict[int, Facts], rank: int, **gpu: Any) -> dict[int, Facts]:
    """The node, with other facts about the GPU that one rank uses."""
    visible = list(node[rank].gpus.visible)
    visible[rank] = dataclasses.replace(visible[rank], **gpu)
    return with_gpus(node, rank, visible=visible)


def only(findings: list[Finding], level: str) -> Finding:
    (finding,) = findings
    assert finding.level == level
    assert finding.remedy or level == "ok"
    return finding


def test_healthy_gpus_are_printed_with_model_and_versions(node: dict[int, Facts]) -> None:
    expected = "each rank uses one GPU (NVIDIA H100, driver 580.82.07, CUDA 13.0, NCCL 2.28.9)"
    assert only(check_devices(node), "ok").text == f"{expected}; backend nccl"
    assert only(check_gpus(node), "ok").text == "no uncorrected ECC errors, MIG disabled"
    assert {finding.level for finding in check_facts(node)} <= {"ok", "warning"}


def test_facts_survive_json(node: dict[int, Facts]) -> None:
    facts = with_gpus(node, 0, without_peer_access=[[0, 1]])[0]
    assert Facts.from_json(json.loads(json.dumps(dataclasses.asdict(facts)))) == facts


def test_unequal_nccl_is_a_problem_and_an_unequal_driver_a_warning(node: dict[int, Facts]) -> None:
    other = only(check_versions(with_gpus(node, 1, nccl="2.27.0")), "problem")
    assert other.text == "NCCL differs: rank 0 on n1 has 2.28.9; rank 1 on n1 has 2.27.0"
    other = only(check_versions(with_gpus(node, 1, driver="570.1")), "warning")
    assert other.text == "GPU driver differs: rank 0 on n1 has 580.82.07; rank 1 on n1 has 570.1"
    assert only(check_versions(with_gpus(node, 1, driver=None)), "ok"), "unknown is no difference"


def test_versions_of_unused_libraries_may_differ(node: dict[int, Facts]) -> None:
    different = with_gpus(with_gpus(node, 1, driver="570.1"), 1, nccl="2.27.0")
    on_cpus = {n: dataclasses.replace(f, device="cpu", backend="gloo") for n, f in node.items()}
    on_cpus[1] = dataclasses.replace(on_cpus[1], gpus=different[1].gpus)
    assert only(check_versions(on_cpus), "ok")


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "warning", "=1 has no effect: the job sets"),
        ("NVIDIA_TF32_OVERRIDE", "warning", "=1 overrides --precision"),
    ],
)
def test_a_tf32_override_is_a_warning(
    name: str, level: str, expected: str, node: dict[int, Facts]
) -> None:
    both = {n: dataclasses.replace(f, settings={name: "1"}) for n, f in node.items()}
    finding = only(check_settings(both), level)
    assert finding.text.startswith(f"{name}{expected}")
    assert finding.text.endswith("(ranks 0-1 on n1)")
    assert finding.remedy.startswith("unset it")
    on_cpus = {n: dataclasses.replace(f, device="cpu") for n, f in both.items()}
    assert only(check_settings(on_cpus), "ok"), "CPUs have no TF32"


@pytest.mark.parametrize("name", ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE"])
def test_tf32_overrides_are_among_the_facts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    facts, _ = gather_facts(Launch("none"), "cpu", "auto")
    assert facts.settings[name] == "1"


def test_mig_is_a_warning(node: dict[int, Facts]) -> None:
    finding = only(check_gpus(with_gpu(node, 1, mig=True)), "warning")
    assert finding.text.startswith("rank 1 on n1: MIG is enabled: NCCL does not work")
    assert "--backend gloo" in finding.remedy


def test_ecc_errors_are_a_problem_of_a_named_gpu(node: dict[int, Facts]) -> None:
    finding = only(check_gpus(with_gpu(node, 1, ecc_errors=3)), "problem")
    assert finding.text == f"GPU 1 ({UUIDS[1]}) of rank 1 on n1 has 3 uncorrected ECC errors"
    assert finding.remedy.startswith("drain the node and reset the GPU")
    unknown = with_gpu(node, 0, ecc_errors=None)
    assert only(check_gpus(unknown), "ok").text == "MIG disabled"
    assert check_gpus(with_gpu(unknown, 0, mig=None)) == [], "nothing is known to be good"


def test_a_gpu_that_no_rank_uses_is_not_reported(node: dict[int, Facts]) -> None:
    broken = dataclasses.replace(node[0].gpus.visible[1], ecc_errors=3, mig=True)
    visible = [node[0].gpus.visible[0], broken]
    assert only(check_gpus({0: with_gpus(node, 0, visible=visible)[0]}), "ok")


def test_two_ranks_on_one_gpu_are_a_problem_for_nccl_only(node: dict[int, Facts]) -> None:
    """As where srun binds the same GPU to each task, whose number is then 0 on every rank."""
    bound = {n: dataclasses.replace(facts, device="cuda:0") for n, facts in node.items()}
    finding = only(check_devices(bound), "problem")
    assert finding.text == f"ranks 0-1 on n1 use the same GPU 0 ({UUIDS[0]}), which NCCL refuses"
    assert "--backend gloo" in finding.remedy
    on_gloo = {n: dataclasses.replace(facts, backend="gloo") for n, facts in bound.items()}
    assert only(check_devices(on_gloo), "ok")
    visible = [dataclasses.replace(node[1].gpus.visible[0], uuid=None)]
    assert only(check_devices(with_gpus(bound, 1, visible=visible)), "ok"), "may be another one"


def test_missing_peer_access_between_used_gpus_is_a_warning(node: dict[int, Facts]) -> None:
    lacking = with_gpus(node, 0, without_peer_access=[[0, 1]])
    finding = only(check_gpus(lacking), "warning")
    assert finding.text.startswith("ranks 0-1 on n1: no peer access between their GPUs: NCCL")
    assert only(check_gpus({0: lacking[0]}), "ok"), "one rank has no peer"
    on_gloo = {n: dataclasses.replace(facts, backend="gloo") for n, facts in lacking.items()}
    assert only(check_gpus(on_gloo), "ok")


def test_pairs_without_peer_access_are_counted(node: dict[int, Facts]) -> None:
    visible = [Gpu("RTX", index=n, mig=False, ecc_errors=0) for n in range(3)]
    found = dataclasses.replace(
        node[0].gpus, visible=visible, without_peer_access=[[0, 1], [0, 2], [1, 2]]
    )
    ranks = {
        n: dataclasses.replace(node[0], rank=n, device=f"cuda:{n}", gpus=found) for n in range(3)
    }
    assert "(and 2 other pairs)" in only(check_gpus(ranks), "warning").text


def test_gpus_that_torch_cannot_use_are_a_problem(node: dict[int, Facts]) -> None:
    error = "GPU 0: the driver is too old"
    broken = with_gpus(node, 0, error=error, visible=[])
    finding = only(check_devices(broken), "problem")
    assert finding.text == f"rank 0 on n1: torch cannot use a GPU: {error}"
    assert check_gpus(broken)[0].level == "ok", "the GPU of rank 1"
    both = broken | {0: dataclasses.replace(broken[0], device_error="no device")}
    (finding,) = check_devices(both)
    assert finding.text == "rank 0 on n1: no device", "one cause, one finding"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (GpuFacts(device_files=1), "the node has a GPU that torch does not see"),
        (
            GpuFacts("the driver is too old", driver="470.1"),
            "the node has a GPU that torch does not see (the driver is too old)",
        ),
        (
            GpuFacts("CUDA finds none", nvidia_smi_error="nvidia-smi fails: no driver"),
            "the node seems to have a GPU that torch does not see (CUDA finds none, nvidia-smi "
            "fails: no driver)",
        ),
    ],
)
def test_gpus_that_torch_does_not_see_are_a_warning_with_the_reason(
    found: GpuFacts, expected: str, node: dict[int, Facts]
) -> None:
    blind = dataclasses.replace(node[0], device="cpu", backend="gloo", gpus=found)
    assert only(check_devices({0: blind}), "warning").text == f"rank 0 on n1: {expected}"


def test_a_node_without_gpus_and_nvidia_smi_is_healthy(node: dict[int, Facts]) -> None:
    none = GpuFacts("torch is built without CUDA", nvidia_smi_error=NO_NVIDIA_SMI)
    facts = {0: dataclasses.replace(node[0], device="cpu", backend="gloo", gpus=none)}
    assert only(check_devices(facts), "ok").text == "each rank uses the CPU"
    assert check_gpus(facts) == []


def test_what_nvidia_smi_would_show_is_reported_as_unknown(node: dict[int, Facts]) -> None:
    missing = {n: with_gpus(node, n, nvidia_smi_error=NO_NVIDIA_SMI)[n] for n in node}
    finding = only(check_gpus(missing), "skipped")
    assert finding.text == f"ranks 0-1 on n1: ECC errors and MIG not checked: {NO_NVIDIA_SMI}"
    hanging = "nvidia-smi does not respond within 5 s"
    finding = only(check_gpus(with_gpus(node, 1, nvidia_smi_error=hanging)), "warning")
    assert finding.text == f"rank 1 on n1: {hanging}"


def test_a_wrong_product_is_a_problem_of_its_rank(node: dict[int, Facts]) -> None:
    wrong = {"error": "1 of 4 elements of a matrix product are wrong"}
    finding = only(check_self_test([{"seconds": 0.1}, wrong], node), "problem")
    assert finding.text == f"rank 1 on n1: {wrong['error']}"
    finding = only(check_self_test([{"seconds": 0.1}, {"seconds": 0.2}], node), "ok")
    assert finding.figures == {"seconds": {0: 0.1, 1: 0.2}}
    assert "in 200 ms at most" in finding.text
    assert check_self_test([{}, {}], node) == [], "CPUs are not tested"


def test_the_table_of_nvidia_smi_is_parsed() -> None:
    first, second = parse_nvidia_smi(SMI)
    assert first == gpus.SmiRow(0, UUIDS[0], "580.82.07", mig=False, ecc_errors=0)
    assert second == gpus.SmiRow(1, UUIDS[1], "580.82.07", mig=None, ecc_errors=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("No devices were found\n", []),
        ("7, GPU-a, 535.54.03, Enabled, 12", [("535.54.03", True, 12)]),
        ("7, GPU-a, [N/A], [Not Supported], [Unknown Error]", [(None, None, None)]),
        ("7, GPU-a, 535.54.03, Enabled", []),
        ("warning: one, two, three, four\n7, GPU-a, 535.1, Disabled, 0", [("535.1", False, 0)]),
    ],
)
def test_unknown_values_and_lines_of_nvidia_smi_are_tolerated(
    text: str, expected: list[tuple[str | None, bool | None, int | None]]
) -> None:
    assert [(row.driver, row.mig, row.ecc_errors) for row in parse_nvidia_smi(text)] == expected


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a program of that name, with the given shell script, alone on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return install


def test_nvidia_smi_is_asked_once_for_all(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi(f'[ "$2 $#" = "--format=csv,noheader 2" ] || exit 9\necho "{SMI}"')
    rows, error = read_nvidia_smi()
    assert error is None
    assert [row.uuid for row in rows] == UUIDS


def test_a_missing_nvidia_smi_is_no_error(
    nvidia_smi: Callable[[str], None], tmp_path: Path
) -> None:
    assert read_nvidia_smi() == ([], NO_NVIDIA_SMI)


def test_an_nvidia_smi_that_cannot_be_started_is_named(
    nvidia_smi: Callable[[str], None], tmp_path: Path
) -> None:
    (tmp_path / "nvidia-smi").write_bytes(b"\x7fELF")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert read_nvidia_smi() == ([], "nvidia-smi cannot be started: Exec format error")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo; echo 'Failed to initialize NVML: Driver/library version mismatch.'; exit 18", None),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch' >&2; exit 18", None),
        ("exit 9", "exit code 9"),
    ],
)
def test_a_failing_driver_is_named_by_the_first_line(
    script: str, expected: str | None, nvidia_smi: Callable[[str], None]
) -> None:
    nvidia_smi(script)
    expected = expected or "Failed to initialize NVML: Driver/library version mismatch"
    assert read_nvidia_smi() == ([], f"nvidia-smi fails: {expected}")


def test_an_nvidia_smi_that_hangs_is_given_up(
    nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "_TIMEOUT_S", 0.5)
    nvidia_smi("exec /bin/sleep 60")
    assert read_nvidia_smi() == ([], "nvidia-smi does not respond within 0.5 s")


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError(TOO_OLD)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, nvidia_smi: Callable[[str], None]) -> Callable[..., None]:
    """Make torch see two GPUs, except for the functions given."""
    working: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda number=0: "NVIDIA H100",
        "get_device_properties": lambda number: SimpleNamespace(
            uuid=UUIDS[number].removeprefix("GPU-")
        ),
        "can_device_access_peer": lambda first, second: True,
        "init": lambda: None,
        "set_device": lambda device: None,
        "set_stream": lambda stream: None,
        "Stream": lambda device: None,
    }

    def patch(**functions: Any) -> None:
        for name, function in (working | functions).items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))

    return patch


def gather() -> Facts:
    return gather_facts(Launch("none"), "auto", "auto")[0]


def test_gpus_that_auto_leaves_unused_are_a_warning(cuda: Callable[..., None]) -> None:
    cuda()
    four = Launch("torchrun", world_size=4, local_world_size=4)
    facts = gather_facts(four, "auto", "auto")[0]
    warning = only([f for f in check_devices({0: facts}) if f.level == "warning"], "warning")
    assert "4 processes on a node with 2 GPUs: training on the CPU" in warning.text
    assert warning.remedy == "--nproc_per_node=2 uses the GPUs"


def test_torchs_gpus_are_matched_with_nvidia_smis(
    cuda: Callable[..., None], nvidia_smi: Callable[[str], None]
) -> None:
    """With CUDA_VISIBLE_DEVICES=1, torch's number 0 is nvidia-smi's 1."""
    nvidia_smi(f'echo "{SMI}"')
    properties = SimpleNamespace(uuid=UUIDS[1].removeprefix("GPU-"))
    cuda(device_count=lambda: 1, get_device_properties=lambda number: properties)
    facts = gather()
    assert (facts.device, facts.backend, facts.device_error) == ("cuda:0", "nccl", None)
    assert (facts.gpus.driver, facts.gpus.nccl) == ("580.82.07", "2.28.9")
    assert facts.gpus.visible == [Gpu("NVIDIA H100", UUIDS[1], 1)]
    assert facts.gpu == facts.gpus.visible[0]


def test_gpus_without_a_uuid_and_mig_instances_are_described_as_far_as_known(
    cuda: Callable[..., None], nvidia_smi: Callable[[str], None]
) -> None:
    cuda(get_device_properties=lambda number: SimpleNamespace())
    nvidia_smi(f'echo "{SMI}"')
    assert read_gpus(None).visible == [Gpu("NVIDIA H100")] * 2
    name = "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    cuda(device_count=lambda: 1, get_device_name=lambda number=0: name)
    nvidia_smi(f"echo '0, {UUIDS[1]}, 580.82.07, Enabled, [N/A]'")
    assert read_gpus(None).visible == [Gpu(name, UUIDS[0], 0, mig=True)]


def test_pairs_without_peer_access_are_among_the_facts(cuda: Callable[..., None]) -> None:
    cuda(can_device_access_peer=lambda first, second: first < second)
    assert read_gpus(None).without_peer_access == [[0, 1]], "one direction is not enough"
    cuda()
    assert read_gpus(None).without_peer_access == []


def test_gpus_are_not_counted_where_cuda_is_unavailable(
    cuda: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old driver lists its GPUs, but cannot run anything on them."""

    message = f"CUDA initialization: {TOO_OLD} (Triggered internally at x.cpp:1.)"
    reasons = [message]

    def is_available() -> bool:
        while reasons:  # torch gives it once
            warnings.warn(reasons.pop(), stacklevel=1)
        return False

    cuda(is_available=is_available, device_count=lambda: pytest.fail("counted"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = gather()
    reason = "The NVIDIA driver on your system is too old (found version 11040)"
    assert (facts.device, facts.device_error, facts.gpus.unavailable) == ("cpu", None, reason)
    reasons.append(message)
    facts, _ = gather_facts(Launch("none"), "cuda", "auto")
    assert facts.device_error == f"--device cuda: no GPU can be used ({reason}); use --device cpu"


@pytest.mark.parametrize(
    "function",
    ["device_count", "get_device_name", "get_device_properties", "can_device_access_peer"],
)
@pytest.mark.filterwarnings("error")
def test_a_call_that_fails_is_a_finding_and_no_traceback(
    function: str, cuda: Callable[..., None]
) -> None:
    cuda(**{function: fail})
    facts = gather()
    problem = next(f for f in check_devices({0: facts}) if f.level == "problem")
    assert "torch cannot use a GPU: " in problem.text
    assert problem.line.count("driver on your system is too old (found version 11040)") == 1
    assert "http" not in problem.line


@pytest.mark.parametrize("function", ["is_available", "set_device"])
def test_a_driver_that_fails_at_once_is_a_fact(function: str, cuda: Callable[..., None]) -> None:
    cuda(**{function: fail})
    facts = gather()
    assert facts.device == "cpu"
    error = facts.gpus.unavailable if function == "is_available" else facts.device_warning
    assert error is not None
    assert "The NVIDIA driver on your system is too old (found version 11040)" in error


def test_a_build_without_nccl_has_no_version(
    cuda: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda()
    monkeypatch.delattr(torch.cuda.nccl, "version")
    assert read_gpus(None).nccl is None


def test_gpus_are_not_asked_about_for_cpus(cuda: Callable[..., None]) -> None:
    cuda(is_available=fail, device_count=fail, get_device_name=fail)
    facts, device = gather_facts(Launch("none"), "cpu", "auto")
    assert (facts.gpus, facts.gpu, device) == (GpuFacts(), None, CPU)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_build_without_cuda_is_the_reason() -> None:
    assert why_no_cuda() == "torch is built without CUDA"


def test_hidden_gpus_are_the_reason(
    cuda: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda(is_available=lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert why_no_cuda() == "CUDA finds none"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert why_no_cuda() == 'CUDA_VISIBLE_DEVICES is ""'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TOO_OLD, "The NVIDIA driver on your system is too old (found version 11040)"),
        (
            "CUDA initialization: Unexpected error from cudaGetDeviceCount(). Did you run some "
            "cuda functions before calling NumCudaDevices() that might have already set an error? "
            "Error 802: system not yet initialized (Triggered internally at /x.cpp:119.)",
            "Error 802: system not yet initialized",
        ),
        ("CUDA error: out of memory\nCUDA kernel errors might", "CUDA error: out of memory"),
        ("", "torch gives no reason"),
    ],
)
def test_torchs_messages_are_cut_to_the_cause(text: str, expected: str) -> None:
    assert shorten(text) == expected


@pytest.mark.parametrize("before", ["highest", "high"])
def test_the_product_is_computed_in_full_precision(
    before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def multiply(device: torch.device, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        used.append(torch.get_float32_matmul_precision())
        return left @ right

    monkeypatch.setattr(gpus, "_multiply_on", multiply)
    torch.set_float32_matmul_precision(before)
    try:
        assert self_test(CPU)["seconds"] > 0
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert used == ["highest"]


def test_the_product_is_exact_in_any_order_and_in_tf32() -> None:
    """In float64 it is the same, and no number needs more than the ten bits of TF32."""
    exact: dict[str, torch.Tensor] = {}

    def keep(device: torch.device, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        exact.update(left=left, right=right)
        return (left.double() @ right.double()).float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpus, "_multiply_on", keep)
        assert "error" not in self_test(CPU)
    bound = exact["left"].abs() @ exact["right"].abs()
    assert float(bound.max()) < 2**24
    assert max(float(exact[side].abs().max()) for side in ("left", "right")) < 2**10
    assert len(exact["left"].unique()) > 8


def test_a_wrong_product_and_a_failed_one_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(device: torch.device, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = left @ right
        product[3, 5] += 1
        product[7, 9] = float("nan")
        return product

    monkeypatch.setattr(gpus, "_multiply_on", flip)
    assert self_test(CPU) == {"error": "2 of 262144 elements of a matrix product are wrong"}
    monkeypatch.setattr(gpus, "_multiply_on", fail)
    expected = "a matrix product fails: The NVIDIA driver on your system is too old"
    assert self_test(CPU)["error"].startswith(expected)
    assert self_test(CPU)["error"].count("\n") == 0
