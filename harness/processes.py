"""Several processes on one run, as torchrun starts them: one process ("rank") for each
device.

    torchrun --nproc-per-node=2 prune_unstructured.py --dataset cifar100

    processes.start(device)         # joins the others: by gloo on CPUs, by nccl on GPUs
    forward = processes.average_gradients(net, image)   # DistributedDataParallel (DDP)
    (loss * processes.weight(n)).backward()    # the gradient of the mean over n images
    scores = processes.total(scores * share)   # the same numbers, bit by bit, on all
    processes.agree("the masks", masks.flat)   # or all of them stop

Each rank holds the whole data set, and takes every size-th image of each batch (see
data.batches). Gradients, scores and losses are averaged over the ranks, weighted by
their images; counts are summed. Each rank computes the masks from the same numbers, and
the ranks compare them. Rank 0 writes and prints.

A batch with fewer images than ranks has none for some of them: such a rank repeats the
first image at weight 0, so that all ranks take part in each sum. Batch normalisation
(BN) takes its statistics over a rank's own images; the running statistics are averaged
over the ranks before each evaluation.

In one process, with or without torchrun, there is no group and no DDP, and each
function here returns at once what a single process needs.
"""
import atexit
import hashlib
import inspect
import os
import signal
import sys
import threading
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

# One rank may download, decode or write for long while the others wait. This limit is
# not for a rank that dies: its connections close, and torchrun ends the others
LONGEST_WAIT = timedelta(days=1)
LEAVING = timedelta(seconds=5)  # how long ranks that leave wait for each other
# How long ranks that torchrun did not start wait for each other at the start: one
# alone, by variables of another job, leaves within half a minute
JOINING = timedelta(seconds=25)
ONE_OR_ALL = ("Start it by torchrun, or, for one process, by python after: unset "
              "WORLD_SIZE")


class Mismatch(RuntimeError):
    """What must be the same on all ranks is not."""


def size():
    """Return the number of ranks, 1 without torchrun."""
    return max(1, _whole("WORLD_SIZE", 1))


def rank():
    """Return the number of this rank, from 0. Rank 0 writes and prints."""
    # a cluster may set RANK alone, for something else
    return _whole("RANK", 0) if size() > 1 else 0


def local():
    """Return the number of this rank on its machine, and how many ranks run there."""
    if size() == 1:
        return 0, 1
    return _whole("LOCAL_RANK", 0), _whole("LOCAL_WORLD_SIZE", 1)


def _given(name):
    """Return the text of an environment variable, "" where it is not set."""
    return os.environ.get(name, "").strip()


def _is_whole(text):
    return text.isascii() and text.isdigit() and len(text) < 10


def _whole(name, default):
    """Return an environment variable as a whole number; `default` where it is not set,
    or no such number (see check)."""
    text = _given(name)
    return int(text) if _is_whole(text) else default


def starter(ranks):
    """Return the words that start a script in so many processes."""
    return ["python"] if ranks == 1 else ["torchrun", f"--nproc-per-node={ranks}"]


def require_one():
    """Raise ValueError if torchrun started several processes."""
    if size() > 1:
        raise ValueError(f"the environment variable WORLD_SIZE is {size()}, as "
                         f"torchrun sets it, expected one process: this script runs in "
                         f"a single one. Start it by python, with WORLD_SIZE unset")


def check():
    """Raise ValueError unless the environment variables that torchrun sets are complete
    and fit together. Without WORLD_SIZE the others are not looked at."""
    numbers = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    is_shared = _given("WORLD_SIZE") != ""
    for name in numbers if is_shared else ():
        if _given(name) and not _is_whole(_given(name)):
            raise ValueError(f"the environment variable {name} is {_given(name)}, "
                             f"expected a whole number. {ONE_OR_ALL}")
    if is_shared and _whole("WORLD_SIZE", 1) == 0:
        raise ValueError(f"the environment variable WORLD_SIZE is 0, expected at least "
                         f"1. {ONE_OR_ALL}")
    if is_shared and _whole("RANK", 0) >= size():
        raise ValueError(f"the environment variable RANK is {_given('RANK')}, expected "
                         f"less than WORLD_SIZE, which is {size()}. {ONE_OR_ALL}")
    if size() == 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")
               if not _given(name)]
    if missing:
        raise ValueError(f"the environment variable WORLD_SIZE is {size()}, but "
                         f"these are not set: {', '.join(missing)}; expected all that "
                         f"torchrun sets. {ONE_OR_ALL}")
    number, here = local()
    if _given("LOCAL_WORLD_SIZE") and number >= here:
        raise ValueError(f"the environment variable LOCAL_RANK is {number}, expected "
                         f"less than LOCAL_WORLD_SIZE, which is {here}. {ONE_OR_ALL}")


def is_by_torchrun():
    """Return whether torchrun itself started this rank, and not another program that
    sets the same variables. torchrun ends all ranks when one is gone."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start(device):
    """Join the other ranks, if there are any.

    Tensors on the CPU are sent by gloo, even if the network is on a GPU: so no rank has
    to wait for its GPU. Raises ValueError if the environment variables do not fit, or
    if the others do not come.
    """
    check()
    if size() == 1 or dist.is_initialized():
        return
    if device.type == "cuda" and not _given("LOCAL_RANK"):
        raise ValueError(f"the environment variable WORLD_SIZE is {size()}, but "
                         f"LOCAL_RANK is not set, expected the number of this "
                         f"process's GPU. Start it by torchrun")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = LONGEST_WAIT if is_by_torchrun() else JOINING
    try:
        with nullcontext() if is_by_torchrun() else _quiet():
            store = _meet(patience)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"the environment variable WORLD_SIZE is {size()}, but the "
                         f"other processes did not come within "
                         f"{patience.total_seconds():.0f} s to "
                         f"{_given('MASTER_ADDR')} port {_given('MASTER_PORT')} "
                         f"({reason}), expected all of them. {ONE_OR_ALL}") from None
    store.set_timeout(LONGEST_WAIT)
    dist.init_process_group(backend, store=dist.PrefixStore("ranks", store),
                            rank=rank(), world_size=size(), timeout=LONGEST_WAIT)


@contextmanager
def _quiet():
    """Leave out what torch's own code, in C++, writes to stderr: its traces of a failed
    connection."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _meet(patience):
    """Return the store in which the ranks find each other, when all of them are there.

    Raises RuntimeError or OSError after `patience`, a timedelta. This is in a thread of
    its own, since torch waits without end for a port that belongs to another program.
    """
    found = []

    def join():
        try:
            found.append(next(rendezvous("env://", timeout=patience))[0])
        except Exception as error:  # it is raised below
            found.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(patience.total_seconds() + 2)
    if not found:
        raise TimeoutError("no answer")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def together():
    """Return whether this rank is in a group: after start(), and before end()."""
    return dist.is_available() and dist.is_initialized()


def end():
    """Leave the group and return the rank. What is left to do is work for rank 0 alone,
    and the others may exit."""
    if size() > 1:
        dist.destroy_process_group()
        if rank() > 0:
            # threads of the group may still be running, and would abort a normal exit
            atexit.register(_exit_at_once)
    return rank()


def _exit_at_once():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ---- sums and checks -----------------------------------------------------------------


def weight(images):
    """Return the factor on this rank's mean loss over its share of a batch.

    images: of the whole batch, N. DDP's mean counts each of the R ranks alike. With the
    factor R * (images of this rank) / N it is the mean over the images. The factor is 0
    if the batch has no image for this rank, and 1 in one process.
    """
    own = len(range(rank(), images, size()))
    return size() * own / images


def share(batches):
    """Return this rank's share of the batches of a pass over data without gradients.

    They are whole batches, so that the sums over all ranks are those of one process.
    """
    return list(batches)[rank()::size()]


def total(tensor):
    """Return the sum of a tensor over the ranks, the same bits on each. The tensor
    itself is changed."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(tensor):
    """Return the tensors of all ranks as the rows of one: [...] -> [ranks, ...]."""
    if size() == 1:
        return tensor[None]
    rows = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(rows, tensor)
    return torch.stack(rows)


def largest(number):
    """Return the largest of the ranks' whole numbers, without waiting for a GPU."""
    return int(gather(torch.tensor(number)).max())


def agree(what, *tensors):
    """Raise Mismatch, on all ranks, unless the tensors have the same bits on each.

    A hash of them is compared. what: the tensors in words. The message names the ranks
    whose hash is not that of rank 0.
    """
    if size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy())
    rows = gather(torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64))
    others = [str(number) for number, row in enumerate(rows)
              if not torch.equal(row, rows[0])]
    if others:
        raise Mismatch(
            f"{what} of rank {', '.join(others)} differ from those of rank 0, expected "
            f"the same on all {size()}. A checkpoint saved before is kept: go on with "
            f"--resume, on other devices if it happens again")


def rank_0_first(work):
    """Return what work() returns. Rank 0 does it before the others, since it may
    download or write files that they then find.

    A ValueError or an OSError on rank 0 is raised on all ranks.
    """
    result, error = None, [None]
    if rank() == 0:
        try:
            result = work()
        except (ValueError, OSError) as raised:
            error = [raised]
    if size() > 1:
        dist.broadcast_object_list(error)
    if error[0] is not None:
        raise error[0]
    return result if rank() == 0 else work()


# ---- the network ---------------------------------------------------------------------


def average_gradients(forward, image):
    """Return the network in DDP, so that backward() averages gradients over the ranks.

    forward: the network, or its compiled form; in one process it is returned as it is.
    image: any batch that it takes. Each rank keeps its own running statistics (see
    average_statistics).
    """
    if size() == 1:
        return forward
    agree("the weights to start from", *forward.parameters())
    # newer versions of torch have another name for this argument
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "broadcast_buffers"
    if "forward_sync_buffers" in known:
        sync = "forward_sync_buffers"
    ddp = DistributedDataParallel(forward, init_sync=False, **{sync: False})
    if size() > 2:
        # After its first backward pass DDP sorts the gradients into other buckets, and
        # a sum over three ranks or more rounds by its place in a bucket. With this pass
        # before the first step, a resumed run has the bits of an unbroken one
        forward.eval()
        ddp(image).sum().backward()
        forward.train().zero_grad()
    return ddp


def _running(net):
    return [buffer for name, buffer in net.named_buffers()
            if name.endswith(("running_mean", "running_var"))]


def _row(net):
    # the empty tensor: a network may have no BN
    return torch.cat([net.mean.new_empty(0), *_running(net)])


def _set_running(net, row):
    buffers = _running(net)
    sizes = [buffer.numel() for buffer in buffers]
    for buffer, part in zip(buffers, row.split(sizes)):
        buffer.copy_(part)


def statistics(net):
    """Return the running statistics of all ranks, [ranks, numbers], on the CPU."""
    return gather(_row(net).cpu())


def restore_statistics(net, rows):
    """Set the running statistics to this rank's row of statistics(), or to the mean of
    all rows where their number is not that of the ranks."""
    if len(rows) == size():
        _set_running(net, rows[rank()])
    else:
        _set_running(net, rows.mean(0))


def average_statistics(net):
    """Give all ranks the mean of their running statistics, before an evaluation.

    Running means are linear in the batches. So with equal shares their mean over the
    ranks is the running mean that one process would have. The mean of the variances
    lacks the variance of the ranks' means, a term of the order 1 / images.
    """
    if size() > 1:
        _set_running(net, total(_row(net)) / size())


# ---- leaving -------------------------------------------------------------------------


def speaks(code):
    """Return whether this rank says why it leaves. The first that asks does, for all.

    torchrun ends the other ranks as soon as one has left. A wrong flag or file, exit
    code 2, makes all ranks leave. They wait for each other, at most five seconds, so
    that each leaves with that code.
    """
    if size() == 1 or not is_by_torchrun():
        return True
    with suppress(ValueError):  # only the main thread of a program may do it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              is_master=False, timeout=LEAVING)
        key = f"leaving/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        is_first = store.add(key, 1) == 1
    except (KeyError, ValueError, RuntimeError):  # without its store every rank speaks
        return True
    if code == 2:
        store.set(f"{key}/{rank()}", "")
        with suppress(RuntimeError):  # a rank does not leave, or it is dead
            store.wait([f"{key}/{other}" for other in range(size())], LEAVING)
    return is_first


def is_loss(error):
    """Return whether an error says that another rank is gone."""
    return size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
