"""Is the window that was asked for the window that runs?

* `modes`: the ways to feed a model: train, eval, packed, left-padded, cached, chunked, generate.
* `influence`: measures which outputs of each layer, and of the stack, change when one position of the input changes.
* `verdict`: compares what was measured with what was asked for, and names the likely cause of a difference.
* `check`: all modes under all attention implementations.
* `build`: a small model with random weights from a config.
* `architectures`: the check of all windowed architectures of transformers.
* `served`: the reach of a model behind a server, measured by requests.
* `wrapped`: the decoder layers of a model, also inside PEFT or `accelerate`.
* `pytest_plugin`: the fixture `assert_windows`.
"""
