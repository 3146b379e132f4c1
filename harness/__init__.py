"""What makes a run reliable and belongs to no algorithm: flags and presets, the run's
folder and its files, the processes that share a run, finished runs, plots."""
