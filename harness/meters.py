"""Measured while a run trains: running sums, whether all numbers are finite, how long a
step takes.

The first two stay on the device. A step does not wait for a GPU.
"""
import math
import time

import torch

import metrics
import models
from harness import processes
from neurons import widest


class Meter:
    """Running sums of an epoch: loss, right answers, images. Each process has its own.

    sums: [2] float64 (float32 on mps, which has no other), the loss (a sum over images)
    and the right answers. samples: the images. counts: False while a batch has no image
    for this process.
    """

    def __init__(self, device):
        self.sums = torch.zeros(2, dtype=widest(device), device=device)
        self.samples, self.counts = 0, True
        # the first iteration whose loss was not finite; 0: none
        self.bad = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, loss, logits, labels, iteration=0):
        """Add a batch: its mean loss, logits [T, N, K] and labels [N]."""
        if not self.counts:
            return
        # in float32, since the sum of bfloat16 logits rounds to ties
        sums_over_time = logits.sum(0, dtype=torch.float32)
        right = (sums_over_time.argmax(1) == labels).sum()
        loss_sum = loss.to(self.sums) * len(labels)
        self.sums += torch.stack([loss_sum, right.to(self.sums)])
        self.samples += len(labels)
        self.bad = torch.where((self.bad == 0) & ~loss.isfinite(), iteration, self.bad)

    def check(self):
        """Raise FloatingPointError if a loss was not finite."""
        if self.bad:
            raise FloatingPointError(
                f"the loss is not finite (NaN or infinite) at iteration "
                f"{int(self.bad)}. A checkpoint saved before is kept; try a lower --lr")

    def means(self):
        """Return (mean loss, accuracy in 0..1) over the images of all processes."""
        loss, correct, samples = processes.total(self._row()).tolist()
        return loss / samples, correct / samples

    def state(self):
        """Return the sums of all processes, [processes, 3], on the CPU."""
        return processes.gather(self._row()).cpu()

    def restore(self, rows):
        """Take this process's row of state(). If their number has changed, the first
        process takes the sum of all rows and the others start from 0."""
        if len(rows) != processes.size():
            rest = rows.new_zeros(processes.size() - 1, 3)
            rows = torch.cat([rows.sum(0, keepdim=True), rest])
        self.sums.copy_(rows[processes.rank(), :2])
        self.samples = int(rows[processes.rank(), 2])

    def _row(self):
        return torch.cat([self.sums, self.sums.new_tensor([self.samples])])


class Watch:
    """Finds weights and running statistics of a network that are not finite.

    Such a number may not reach the loss: a potential that is NaN never reaches the
    threshold, so that its neuron is silent.
    """

    def __init__(self, net, device):
        self.net = net
        self.numbers = {name: tensor for name, tensor in net.state_dict().items()
                        if tensor.is_floating_point()}
        # the first iteration after which one was not finite; 0: none
        self.bad = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def look(self, iteration):
        """Remember the iteration if a number is not finite. It waits for no GPU."""
        largest = torch.nn.utils.get_total_norm(self.numbers.values(), math.inf)
        is_first = (self.bad == 0) & ~largest.isfinite()
        self.bad = torch.where(is_first, iteration, self.bad)

    def check(self, meter):
        """Raise FloatingPointError, with iteration and layer, if a loss of the meter or
        a number was not finite."""
        if not self.bad:
            meter.check()
            return
        bad = [name for name, tensor in self.numbers.items()
               if not tensor.isfinite().all()]
        name = bad[0] if bad else "a number of the network"
        wrong = f"{name} is not finite after iteration {int(self.bad)}"
        if 0 < meter.bad <= self.bad:
            wrong = (f"the loss is not finite (NaN or infinite) at iteration "
                     f"{int(meter.bad)}, and then {name} is not")
        raise FloatingPointError(f"{wrong}. A checkpoint saved before is kept; try a "
                                 f"lower --lr")


class Pace:
    """Measures how long a step takes, on the first steps of an epoch.

    seconds: of a step; None: not known yet. The first steps are left out, since they
    are slower: WARM_UP of them, fewer where they take long. Then STEPS are measured,
    fewer where these take long: so it is known within a minute, unless a step takes
    more than 15 s.
    """

    WARM_UP, STEPS = 3, 20
    WARM_UP_SECONDS, SECONDS = 5.0, 15.0

    def __init__(self, device):
        self.device, self.seconds = device, None
        self.restart()

    def step(self):
        """Count a step, which has just ended. Return whether the pace is known now."""
        if self.seconds is not None:
            return True
        now = time.monotonic()
        self.steps += 1
        self.steps_of_epoch += 1
        if self.began is None:
            is_warm = self.steps >= self.WARM_UP
            if is_warm or now - self.epoch_began > self.WARM_UP_SECONDS:
                metrics.wait(self.device)
                self.began, self.steps = time.monotonic(), 0
        elif self.steps >= self.STEPS or now - self.began > self.SECONDS:
            self.stop()
        return self.seconds is not None

    def stop(self):
        """End the measuring at the step that has just ended. Where none was measured
        after the warm-up, all steps of the epoch count, if there was one."""
        began = self.began
        if began is None or self.steps == 0:
            began, self.steps = self.epoch_began, self.steps_of_epoch
        if self.seconds is None and began is not None and self.steps > 0:
            metrics.wait(self.device)
            self.seconds = (time.monotonic() - began) / self.steps

    def restart(self):
        """Measure from here, where an epoch begins or goes on."""
        self.steps, self.steps_of_epoch, self.began = 0, 0, None
        self.epoch_began = time.monotonic()


def seconds_of_evaluation(net, forward, images, batch_size, autocast):
    """Return about how long an evaluation takes, in seconds: a batch of the test set is
    measured. Nothing of the run changes: in eval mode a network draws no numbers from
    torch's generator.

    net: the network. forward: the form of it that is called. autocast: a context.
    """
    size = min(batch_size, len(images.x_test))
    x = next(images.inputs("test", size))
    with torch.inference_mode(), models.evaluating(net), autocast:
        metrics.wait(x.device)
        began = time.monotonic()
        forward(x)
        metrics.wait(x.device)
        seconds = time.monotonic() - began
    return seconds * len(images.x_test) / size
