"""--tensorboard: the numbers of metrics.jsonl and updates.jsonl, for TensorBoard.

    writer = board.open_anew(folder, rows, updates)
    board.add_epoch(writer, row)       # a row of metrics.jsonl
    board.add_update(writer, update)   # a row of updates.jsonl

    tensorboard --logdir runs          # shows all runs of a folder

The step of all curves is the iteration. The package tensorboard is optional.
"""
from importlib.util import find_spec

FILES = "events.out.tfevents.*"  # TensorBoard's own name for what it reads


def require():
    """Raise ValueError if the package is not installed."""
    if find_spec("tensorboard") is None:
        raise ValueError("--tensorboard is given, but the package tensorboard is not "
                         "installed, expected it. Install it by: python -m pip install "
                         "tensorboard")


def remove(folder):
    """Remove the files for TensorBoard from a folder."""
    for path in folder.glob(FILES):
        path.unlink()


def open_anew(folder, rows, updates):
    """Return a SummaryWriter into a folder, with the rows that a run already has. The
    files of before are removed: after a resume they hold steps that are done again."""
    from torch.utils.tensorboard import SummaryWriter  # slow, and not always installed

    remove(folder)
    writer = SummaryWriter(folder)
    for row in updates:
        add_update(writer, row)
    for row in rows:
        add_epoch(writer, row)
    return writer


def add_epoch(writer, row):
    """Write the numbers of a row of metrics.jsonl, as metrics/KEY."""
    _add(writer, "metrics", row, row["iteration"])
    writer.flush()


def add_update(writer, row):
    """Write the numbers of a row of updates.jsonl, as updates/KEY, and those of its
    layers, as layers/KEY/LAYER."""
    _add(writer, "updates", row, row["iteration"])
    for layer in row["layers"]:
        for key, value in layer.items():
            if key != "name" and value is not None:
                writer.add_scalar(f"layers/{key}/{layer['name']}", value,
                                  row["iteration"])
    writer.flush()


def _add(writer, group, row, iteration):
    """Write the values of a row that are numbers: not its words, lists and nulls."""
    for key, value in row.items():
        if key != "iteration" and isinstance(value, (int, float)):
            writer.add_scalar(f"{group}/{key}", value, iteration)
