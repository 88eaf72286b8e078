"""Claims about what the commands share: a quick start, and progress where the output is no terminal."""

import subprocess
import sys

from eval import command


def test_the_commands_import_nothing_heavy_before_the_arguments_are_checked():
    code = (
        "import sys, eval.recall.__main__, eval.relay, eval.heat, eval.loss; "
        "print(*{'torch', 'transformers', 'matplotlib', 'scipy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_progress_prints_a_line_with_the_remaining_time_where_there_is_no_terminal(monkeypatch, capsys):
    seconds = iter([0.0, 10.0, 60.0, 61.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(command, "Progress", SilentBar)
    with command.progress("needle", total=4) as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr().out == "needle: 50% done, about 1.0 minutes left\n"


class SilentBar:
    """Stands in for rich's bar, which asks for the time too."""

    def __init__(self, *columns, **options):
        assert options["disable"]

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        pass

    def add_task(self, title, total):
        return 0

    def advance(self, task, steps):
        pass
