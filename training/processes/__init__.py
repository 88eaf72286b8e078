"""The processes of a run and the machine under them: ranks, sharding, signals, threads, precision."""
