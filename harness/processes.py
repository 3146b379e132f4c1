"""More than one process on one run: what torchrun starts, one process ("rank") for each device.

    torchrun --nproc-per-node=2 prune_unstructured.py --dataset cifar100

    processes.start(device)                        # joins the others; gloo on CPUs, nccl on GPUs
    forward = processes.average_gradients(net)     # DistributedDataParallel (DDP)
    (loss * processes.weight(len(batch))).backward()     # DDP's mean is then that of the batch
    scores = processes.total(scores * share)       # the same numbers, bit by bit, on all ranks
    processes.agree("the masks", masks.flat)       # or all of them stop

What the ranks share: each holds the whole data set, and takes every size-th image of each batch
(see data.batches); gradients, scores, losses and counts are averaged or summed, weighted by images;
masks follow from the same numbers on each rank and are compared; rank 0 writes and prints. A batch
with fewer images than ranks leaves a rank without one: it repeats the first image at weight 0, so
that all take part in each sum. Statistics of batch normalisation (BN) are those of a rank's images;
the running ones are averaged over ranks before each evaluation.

In one process, with or without torchrun, nothing here does anything: no group, no DDP.
"""
import atexit
import hashlib
import inspect
import os
import signal
import sys
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# One rank may download, decode or write for long while the others wait. A rank that dies closes its
# connections, and torchrun ends the others: nobody waits for a dead one until this is over
LONGEST_WAIT = timedelta(days=1)
LEAVING = timedelta(seconds=5)


class Mismatch(RuntimeError):
    """What must be the same on all ranks is not."""


def size():
    """Return the number of ranks, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """Return the number of this rank, from 0; rank 0 writes and prints."""
    return int(os.environ.get("RANK", 0))


def local():
    """Return the number of this rank on its machine, and how many run there."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def start(device):
    """Join the other ranks, if there are any. Tensors on the CPU go by gloo also where the network
    is on a GPU: that waits for no GPU."""
    if size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=LONGEST_WAIT)


def together():
    """Return whether this rank is in a group with others, since start() and until end()."""
    return dist.is_available() and dist.is_initialized()


def end():
    """Leave the group and return the rank: what is left to do is one's work, the others may go."""
    if size() > 1:
        dist.destroy_process_group()
        if rank() > 0:  # at once: threads of the group may still wind down, and abort a normal exit
            atexit.register(_go)
    return rank()


def _go():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ---- sums and checks -----------------------------------------------------------------------------


def weight(images):
    """Return what this rank's mean loss over its share of a batch of so many images is multiplied
    by: DDP's mean over ranks, which counts each rank alike, is then the mean over the images. 0
    where the batch has no image for this rank; 1 in one process."""
    return size() * len(range(rank(), images, size())) / images


def share(batches):
    """Return this rank's share of the batches of a pass over data without gradients: whole ones, so
    that sums over all of them are those of one process."""
    return list(batches)[rank()::size()]


def total(tensor):
    """Return the sum of a tensor over the ranks, in place: the same bits on each of them."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def average_scores(lifs, share):
    """Replace the score that each LIF has of this rank's images by that of the whole batch.

    share: this rank's part of the batch's images, times the number of ranks (see weight).
    """
    if size() > 1:
        scores = total(torch.cat([lif.score for lif in lifs]) * share / size())
        for lif, part in zip(lifs, scores.split([len(lif.score) for lif in lifs])):
            lif.score = part


def gather(tensor):
    """Return the tensors of all ranks as rows of one: [...] -> [ranks, ...]."""
    if size() == 1:
        return tensor[None]
    rows = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(rows, tensor)
    return torch.stack(rows)


def largest(number):
    """Return the largest of the ranks' whole numbers; no GPU is waited for."""
    return int(gather(torch.tensor(number)).max())


def agree(what, *tensors):
    """Compare a hash of the tensors over the ranks; if they differ raise Mismatch on all of them,
    naming the ranks whose hash is not that of rank 0."""
    if size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy())
    rows = gather(torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64))
    others = [str(number) for number, row in enumerate(rows) if not torch.equal(row, rows[0])]
    if others:
        raise Mismatch(f"{what} of rank {', '.join(others)} differ from those of rank 0, expected "
                       f"the same on all {size()}. A checkpoint saved before is kept: go on with "
                       f"--resume, on other devices if it happens again")


def first(work):
    """Return what work() does, on rank 0 before the others, since it may download or write files;
    what it raises there, ValueError or OSError, is raised on all ranks."""
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


# ---- the network ---------------------------------------------------------------------------------


def average_gradients(forward, image):
    """Return the network, or its compiled form, in DDP: backward() averages over the ranks.

    image: any batch that it takes. Running statistics stay with their rank (average_statistics).
    """
    if size() == 1:
        return forward
    agree("the weights to start from", *forward.parameters())
    known = inspect.signature(DistributedDataParallel).parameters  # newer versions of torch rename
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    ddp = DistributedDataParallel(forward, init_sync=False, **{sync: False})
    if size() > 2:
        # DDP sorts gradients into other buckets after its first backward pass, and sums of three
        # and more depend on their place: it does so now, or a resumed run would differ by a bit
        forward.eval()
        ddp(image).sum().backward()
        forward.train().zero_grad()
    return ddp


def _running(net):
    return [buffer for name, buffer in net.named_buffers()
            if name.endswith(("running_mean", "running_var"))]


def _row(net):
    return torch.cat([net.mean.new_empty(0), *_running(net)])  # a network may have no BN


def _set_running(net, row):
    buffers = _running(net)
    for buffer, part in zip(buffers, row.split([buffer.numel() for buffer in buffers])):
        buffer.copy_(part)


def statistics(net):
    """Return the running statistics of BN of all ranks, [ranks, numbers], on the CPU."""
    return gather(_row(net).cpu())


def restore_statistics(net, rows):
    """Take this rank's row of statistics(), or the mean of all where there were more or fewer."""
    _set_running(net, rows[rank()] if len(rows) == size() else rows.mean(0))


def average_statistics(net):
    """Give all ranks the mean of their running statistics.

    Running means are linear in the batches: with equal shares this is what one process would have
    found, where rank 0's alone would leave out most images. The mean of the variances lacks that
    of the ranks' means, a term of the order 1 / images. Once an evaluation, not once a step.
    """
    if size() > 1:
        _set_running(net, total(_row(net)) / size())


# ---- going away ----------------------------------------------------------------------------------


def speaks(code):
    """Return whether this rank says why it leaves: the first that comes here does, for all.

    torchrun ends the other ranks as soon as one is gone. With a wrong flag or file (code 2) all of
    them come here: they wait for each other, for a moment, so that each leaves with its own code.
    """
    if size() == 1:
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              is_master=False, timeout=LEAVING)
        key = f"leaving/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        is_first = store.add(key, 1) == 1
    except (KeyError, RuntimeError):  # without torchrun's store every rank speaks
        return True
    if code == 2:
        store.set(f"{key}/{rank()}", "")
        with suppress(RuntimeError):  # one does not come: all is well there, or it is dead
            store.wait([f"{key}/{other}" for other in range(size())], LEAVING)
    return is_first


def is_loss(error):
    """Return whether an error says that another rank is gone."""
    return size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
