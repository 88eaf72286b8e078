"""Is the window that was asked for the window that runs?

* `modes`: the ways to feed a model: train, eval, packed, left-padded, cached, chunked, generate.
* `influence`: which outputs of each layer, and of the stack, change when one position of its input changes.
* `verdict`: what was asked for, what was measured, and the likely cause where they differ.
* `check`: all modes under all attention implementations.
* `build`: a model with random weights from a config, made small.
* `served`: the same from outside, for a model behind a server.
* `pytest_plugin`: the fixture `assert_windows`.
"""
