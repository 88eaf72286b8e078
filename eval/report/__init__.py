"""One page that says what was measured: `python -m eval.report RUN [RUN ...]`."""
