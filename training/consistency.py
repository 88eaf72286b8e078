"""Settings that are right one by one and wrong together: each check yields the problems it finds."""

from collections.abc import Iterator

from training.problems import Problem
from training.settings import Settings


def inconsistencies(settings: Settings) -> list[Problem]:
    return []
