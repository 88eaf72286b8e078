"""A few faults of faults.py, and that its checks can fail."""

import errno

import pytest

from tests.integration.faults import CAN_COMPILE, KILL, SHORT, Fault, Trials

pytestmark = pytest.mark.skipif(not CAN_COMPILE, reason="faults are injected by a C library, on Linux")


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("fresh", Fault("mkdir", 1, errno.ENOSPC)),
        ("fresh", Fault("write", 9, errno.ENOSPC)),
        ("fresh", Fault("write", 5, SHORT)),
        ("fresh", Fault("fsync", 9, errno.EIO)),
        ("fresh", Fault("rename", 4, KILL)),
        ("resumed", Fault("read", 2, errno.EIO)),
        ("resumed", Fault("read", 12, errno.EIO)),
        ("resumed", Fault("read", 65, errno.EIO)),
        ("resumed", Fault("open", 6, errno.EACCES)),
        ("resumed", Fault("rename", 3, errno.EACCES)),
        ("loss", Fault("write", 1, errno.EIO)),
        ("report", Fault("rename", 1, KILL)),
        ("export", Fault("rename", 1, KILL)),
        ("prepare", Fault("write", 3, KILL)),
        ("rank-0", Fault("write", 9, errno.ENOSPC)),
        ("rank-0", Fault("read", 1, errno.EIO)),
    ],
    ids=str,
)
def test_after_a_fault_the_run_folder_is_valid_and_the_same_command_goes_on(
    trials: Trials, command: str, fault: Fault
) -> None:
    assert trials.meet(command, fault) == []


def test_a_call_that_never_comes_is_told_from_one_that_does_no_harm(trials: Trials) -> None:
    assert trials.meet("resumed", Fault("write", 10_000, errno.ENOSPC)) is None


def test_other_weights_are_noticed(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, _ = trials.undisturbed("resumed")
    monkeypatch.setitem(trials.expected, "resumed", (figures, {"weights": "other"}))
    assert trials.meet("resumed", Fault("fsync", 1, KILL)) == ["started again: other figures or weights"]
