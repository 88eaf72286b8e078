import errno
import os
import subprocess
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


@pytest.mark.parametrize("name", ["EIO", "EACCES", "EROFS"])
def test_a_failing_or_forbidden_disk_is_a_sentence_and_code_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    number = getattr(errno, name)

    def refused() -> None:
        raise OSError(number, os.strerror(number), "runs/a/run.json")

    assert cli(refused) == 2
    said = "see to that disk, or to who may write there, and run the same command again"
    assert capsys.readouterr().err == f"error: runs/a/run.json: {os.strerror(number)}\n  {said}\n"


def test_other_faults_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cli(lambda: (tmp_path / "nothing").unlink())


def outcome(program: str, reader_leaves: bool) -> tuple[int, bytes]:
    """Exit code and standard error of a program that hands `main` to `cli`."""
    code = f"import sys\nfrom model.errors import cli\n{program}\nsys.exit(cli(main))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if reader_leaves:
            process.stdout.close()
        return process.wait(60), process.stderr.read()


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_ends_the_program_without_a_word(lines: int) -> None:
    """One line is flushed at the end, many while they are written."""
    program = f"def main():\n    for _ in range({lines}):\n        print('a line')"
    assert outcome(program, reader_leaves=True) == (141, b"")


def test_a_broken_pipe_of_our_own_is_a_fault() -> None:
    program = "def main():\n    raise BrokenPipeError('to a process of ours')"
    code, said = outcome(program, reader_leaves=False)
    assert code == 1
    assert b"to a process of ours" in said


def test_the_code_of_what_was_run_is_handed_on() -> None:
    assert (cli(lambda: 75), cli(lambda: None)) == (75, 0)
