"""The run folder and its content: checkpoints, saved state, export."""
