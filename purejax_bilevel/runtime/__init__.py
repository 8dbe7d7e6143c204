"""How programs run: devices, processes, the compiled loop, checkpoints, progress, loggers."""
