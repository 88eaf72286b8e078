"""Recall tasks: what is asked (`question`, `all_tasks`), with which tokens (`vocabulary`), and where (`layout`)."""

from data.tasks.all_tasks import TASKS, need_keys

__all__ = ["TASKS", "need_keys"]
