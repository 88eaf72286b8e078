"""The run folder and what lies in it: checkpoints, saved state, export."""
