"""What makes a run reliable and is no algorithm: flags and presets, the run's folder, its files, the
processes that share it, finished runs, plots."""
