"""How far a model can see: theory, cliff test, gradients, masks. `python -m eval.reach MODEL`."""
