"""What a run would need: parameters, memory, FLOPs, time."""
