import os
import sys
from pathlib import Path

import pytest

from model.errors import UserError, cli


def wrong() -> None:
    raise UserError("data.seq_len = 0: use more")


def full_disk() -> None:
    """A device that is always full; buffered text reaches it when it is flushed."""
    with open("/dev/full", "w") as file:
        file.write("x" * 10)


def test_a_user_s_mistake_is_a_sentence_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(wrong) == 2
    assert capsys.readouterr().err == "error: data.seq_len = 0: use more\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason=f"{sys.platform} has no /dev/full")
def test_a_full_disk_is_a_sentence_and_code_2_wherever_it_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(full_disk) == 2
    assert capsys.readouterr().err == ("error: No space left on device\n  make room and run the same command again\n")


def test_other_faults_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cli(lambda: (tmp_path / "nothing").unlink())


def test_the_code_of_what_was_run_is_handed_on() -> None:
    assert (cli(lambda: 75), cli(lambda: None)) == (75, 0)
