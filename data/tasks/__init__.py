"""All recall tasks by name. The order is part of the seeds of evaluation: new ones go to the end."""

from collections.abc import Iterable

from data.tasks.induction import Induction
from data.tasks.instruction import Instruction
from data.tasks.keys import Keys
from data.tasks.needle import Needle, NeedleNoise
from data.tasks.question import Task
from data.tasks.variable_tracking import VariableTracking

_ALL: tuple[Task, ...] = (Needle(), NeedleNoise(), Keys(), Induction(), VariableTracking(), Instruction())
TASKS = {task.name: task for task in _ALL}


def need_keys(tasks: Iterable[str]) -> bool:
    """Do any of these tasks use the keys of the vocabulary?"""
    return any(TASKS[name].option is not None for name in tasks)
