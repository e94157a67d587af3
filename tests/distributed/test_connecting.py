"""Whatever keeps the ranks from forming a process group is one line, and ends all."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Ended, free_port, hosts_of, run_main, run_ranks, torchrun_environment
from torch.distributed import HashStore

from mnist_dist.distributed.launcher import Launch, read_launch
from mnist_dist.distributed.rendezvous import connect_ranks, rendezvous
from mnist_dist.errors import NodeError, RendezvousError, ReportedError, UserError

FLAGS = ["--data=bundled", "--train-samples=100", "--epochs=1"]


def job(directory: str, flags: list[str], flags_of_rank_1: list[str]) -> Ended:
    return run_main(directory, flags + flags_of_rank_1 * (os.environ["RANK"] == "1"))


INTERFACE = "GLOO_SOCKET_IFNAME=eth9: there is no interface eth9; set it to "


@pytest.mark.parametrize(
    ("nodes", "variables", "flags", "line"),
    [
        ((2,), {"GLOO_SOCKET_IFNAME": "eth9"}, [], INTERFACE),
        ((1, 1), {"GLOO_SOCKET_IFNAME": "eth9"}, [], INTERFACE),
        ((1, 1), {}, ["--device=cuda"], "--device cuda: torch finds no usable GPU here"),
        ((1, 1), {}, ["--backend=nccl"], "--backend nccl: no GPU is used here"),
    ],
    ids=["interface-one-node", "interface", "device", "backend"],
)
def test_what_is_wrong_with_one_rank_ends_all_at_once_with_one_line(
    nodes: tuple[int, ...], variables: dict[str, str], flags: list[str], line: str, tmp_path: Path
) -> None:
    environments = hosts_of(*nodes)
    environments[1] |= variables
    # No end may come by the set-up timeout: the test would time out before it.
    common = [*FLAGS, "--setup-timeout=1000", f"--run-dir={tmp_path / 'run'}"]
    ended = run_ranks(job, 2, str(tmp_path), common, flags, environments=environments, timeout=120)
    assert [rank.code for rank in ended] == [2, 2]
    lines = [rank.err.splitlines() for rank in ended]
    assert [len(each) for each in lines] == [1, 0]
    place = "" if nodes == (2,) else f"rank 1 on {os.uname().nodename}: "
    assert lines[0][0].startswith(f"mnist-dist: error: {place}{line}")
    assert list(tmp_path.iterdir()) == [], "nothing was created"


def connect_two(*connects: Callable[[], None], timeout: float) -> list[Exception]:
    """Let two ranks, which are threads here, connect; what each raised."""
    store, raised = HashStore(), dict[int, Exception]()

    def run(rank: int) -> None:
        try:
            connect_ranks(connects[rank], Launch("srun", rank, world_size=2), store, timeout)
        except ReportedError as error:
            raised[rank] = error

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(60)
    return [raised[rank] for rank in sorted(raised)]


def never() -> None:
    threading.Event().wait()


def fail() -> None:
    raise RuntimeError("[/pytorch/gloo/pair.cc:598] Connect timeout. This is what gloo prints\nx")


def test_a_backend_that_fails_on_one_rank_or_never_returns_ends_both_with_the_cause() -> None:
    for connects, timeout in [((never, fail), 50.0), ((fail, lambda: None), 50.0)]:
        errors = connect_two(*connects, timeout=timeout)
        assert [type(error) for error in errors] == [RendezvousError] * 2
        (text,) = {str(error) for error in errors}
        assert "rank" in text
        assert ": Connect timeout)" in text
        assert "mnist-dist doctor" in text
        assert "\n" not in text
    errors = connect_two(never, never, timeout=0.2)
    assert [type(error) for error in errors] == [RendezvousError] * 2
    assert "no connection within 0.2 s" in str(errors[0])


def test_a_users_error_on_one_rank_keeps_its_text_and_exit_code_on_both() -> None:
    def refuse() -> None:
        raise UserError("--flag x: is wrong; give y")

    errors = connect_two(never, refuse, timeout=50)
    assert [type(error) for error in errors] == [NodeError] * 2
    assert {str(error) for error in errors} == {
        f"rank 1 on {os.uname().nodename}: --flag x: is wrong; give y"
    }
    assert connect_two(lambda: None, lambda: None, timeout=50) == []


@pytest.mark.parametrize(
    ("by_hand", "advice"),
    [
        (False, "one `srun --ntasks=3 python` must start them all; in a shell of one task, train"),
        (True, "start a process for each rank, or train alone after `unset RANK WORLD_SIZE"),
    ],
)
def test_a_rank_that_waits_for_others_names_them_and_what_must_start_them(
    by_hand: bool, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_dist.distributed.rendezvous._NOTICE_S", 0.1)
    port, notices = free_port(), list[str]()
    if by_hand:
        left_over = torchrun_environment(0, 3, port, "x")
        del left_over["TORCHELASTIC_RUN_ID"]
        launch = read_launch(left_over)
    else:
        launch = Launch(
            "srun", 0, 0, 3, 3, 0, master_addr="127.0.0.1", master_port=port, is_store_host=True
        )
    with pytest.raises(RendezvousError, match=r"ranks 1-2 of 3 did not reach .*; see their output"):
        rendezvous(launch, 1, notices.append)
    (notice,) = notices
    here = os.uname().nodename
    assert notice.startswith(f"rank 0 on {here} is waiting for ranks 1-2 of 3: {advice}")
