"""The fixture `assert_windows` for the tests of any repository. Load: pytest -p eval.conformance.pytest_plugin

def test_my_model_keeps_its_windows(assert_windows):
    assert_windows(model, modes=["train", "packed"])
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest


@pytest.fixture
def assert_windows() -> Callable[..., dict[str, Any]]:
    """A function that fails unless the windows that run are those that were asked for; returns the report.

    model: a causal language model, wrapped or not. windows: of each layer in tokens, None for full; default: those of
    the model's config. `attention`, `modes` and `seed` are those of `eval.conformance.check.check`.
    """
    from eval.conformance.__main__ import sentence
    from eval.conformance.check import check
    from model.windows import LayerSpec

    def assert_windows(model: Any, windows: Sequence[int | None] = (), **settings: Any) -> dict[str, Any]:
        __tracebackhide__ = True
        specs = [LayerSpec("sliding", window) if window else LayerSpec("full") for window in windows]
        report = check(model, windows=specs, **settings)
        faults = [f"{row['attention']}, {row['mode']}: {sentence(f)}" for row in report["rows"] for f in row["faults"]]
        if faults:
            pytest.fail("\n".join(["the windows that run are not those that were asked for", *faults]))
        return report

    return assert_windows
