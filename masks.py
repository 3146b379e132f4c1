"""Which weights are prunable, alive or dead; exact global selection; exact counts.

    masks = Masks(net)    # of all weights of convolutions and linear layers
    masks.prune(1000, masks.magnitudes(), generator)    # the 1,000 largest |w| stay
    masks.apply(optimizer)    # dead weights and their momentum become 0

A mask is a bool tensor shaped like its weight, True = alive. A dead weight is 0, but a
weight of 0 may be alive: a regenerated one starts at 0. So masks are stored, and never
derived from the weights. Autograd still gives the gradient of dead weights.

A network that was loaded with masks, by models.load or --init, starts with these, and
net.masks stays what the masks are now.

All masks are views into one flat vector over the M prunable weights of the network. So
a global ranking is one selection over one vector. Counts are exact also with ties:
further keys break them, and then a seeded permutation.
"""
from contextlib import contextmanager
from math import ceil, prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models import check_masks, scored_by


class TooFew(RuntimeError):
    """An update leaves fewer weights alive than there are layers; the flags ask for it.
    """


class Masks:
    """The masks of a network, and which of its alive weights are regenerated ones. They
    start as net.masks, where it has some; else all weights are alive. From then on
    net.masks are `alive`, in a network that has this attribute. Raises ValueError if
    net.masks do not fit.

    weights: {name: parameter}, the prunable weights. sizes: their lengths. total: M.
    alive: {name: bool tensor shaped like the weight}, True = alive; views into `flat`.
    flat: [M] bool, over all prunable weights.
    returned: [M] bool, True for regenerated weights: alive ones whose latest entry into
    the mask was a regeneration.
    scored: {name: models.Scored}, the LIF whose channels score each weight.
    keep_momentum, published code: apply() leaves the momentum of dead weights, which
    goes on collecting their gradient.
    """

    def __init__(self, net, keep_momentum=False):
        self.net, self.keep_momentum = net, keep_momentum
        self.scored = scored_by(net)
        self.weights = {name: net.get_parameter(name) for name in self.scored}
        self.sizes = [weight.numel() for weight in self.weights.values()]
        self.total = sum(self.sizes)
        self.device = next(iter(self.weights.values())).device
        given = getattr(net, "masks", None) or {}  # a network of one's own has none
        check_masks(net, given)
        self._hold(torch.ones(self.total, dtype=torch.bool, device=self.device))
        for name, mask in given.items():
            self.alive[name].copy_(mask)
        self.returned = torch.zeros_like(self.flat)

    def _hold(self, flat):
        self.flat, self._factors, self._factors_of = flat, [], None
        parts = zip(self.weights.items(), flat.split(self.sizes))
        self.alive = {name: part.view(weight.shape) for (name, weight), part in parts}
        if hasattr(self.net, "masks"):
            self.net.masks = self.alive  # views, and so always those of now

    # ---- counts ----------------------------------------------------------------------

    def keep_at(self, sparsity):
        """Return how many weights are alive at a sparsity: M - round(sparsity * M)."""
        return self.total - round(sparsity * self.total)

    def check_sparsity(self, sparsity):
        """Raise ValueError if a sparsity leaves fewer weights than there are layers."""
        keep = self.keep_at(sparsity)
        if keep < len(self.sizes):
            raise ValueError(
                f"--sparsity is {sparsity}, which leaves {keep} of {self.total} "
                f"weights alive, expected at least one for each of the "
                f"{len(self.sizes)} layers. Lower --sparsity or raise --width")

    @property
    def n_alive(self):
        """The number of alive weights."""
        return count(self.flat)

    @property
    def sparsity(self):
        """Dead / prunable weights, 0..1, counted from the masks."""
        return 1 - self.n_alive / self.total

    @property
    def share_regenerated(self):
        """The share of the alive weights that are regenerated ones, 0..1 (Fig. 2a)."""
        return count(self.returned & self.flat) / self.n_alive

    def per_layer(self, flat):
        """Return how many values of [M] bool are True in each layer, a list of ints."""
        # one tensor: on a GPU the host waits for each that it reads
        counts = [part.count_nonzero() for part in flat.split(self.sizes)]
        return torch.stack(counts).tolist()

    # ---- weights, gradients and scores as one vector ---------------------------------

    def magnitudes(self):
        """Return |w| of all prunable weights, [M]: their importance (Eq. 8)."""
        return self._absolute(self.weights.values())  # Eq. 8

    def gradients(self):
        """Return |dL/dw| of all prunable weights, dead ones included, [M]."""
        return self._absolute(weight.grad for weight in self.weights.values())

    @torch.no_grad()
    def _absolute(self, tensors):
        dtype = next(iter(self.weights.values())).dtype
        flat = torch.empty(self.total, dtype=dtype, device=self.device)
        for part, tensor in zip(flat.split(self.sizes), tensors):
            torch.abs(tensor, out=part.view(tensor.shape))
        return flat

    def spread(self, scores):
        """Return the score of each weight, [M] float32: that of its LIF channel.

        scores: {LIF name: [C]}. models.Scored says which channel that is.
        """
        flat = torch.empty(self.total, dtype=torch.float32, device=self.device)
        rows = zip(flat.split(self.sizes), self.weights.values(), self.scored.values())
        for part, weight, (lif, dim, repeat) in rows:
            shape = [1] * weight.dim()
            shape[dim] = -1
            score = scores[lif].repeat_interleave(repeat).view(shape)
            part.view(weight.shape).copy_(score)
        return flat

    # ---- the steps of an update ------------------------------------------------------

    def prune(self, keep, magnitudes, generator):
        """Keep the `keep` alive weights with the largest magnitudes, over all layers.
        Return what was pruned, [M] bool.

        magnitudes: [M]. Dead weights are not ranked: a weight that was regenerated at 0
        and is still 0 would tie with them.
        """
        self.require_finite(magnitudes, "the weights")
        before = self.flat.clone()
        self.flat.copy_(select(before, keep, [magnitudes], generator))
        return before & ~self.flat

    def regenerate(self, count, candidates, keys, generator):
        """Bring back the `count` best candidates (Eq. 5). Return what came back, [M]
        bool.

        candidates: [M] bool; alive ones are ignored. keys: list of [M], which rank
        them: the first key, then the next one where it ties. A weight that was pruned
        in this update still has its value, and keeps it. A weight that was dead before
        comes back at 0, and its next gradient changes it.
        """
        for key in keys:
            self.require_finite(key, "the scores")
        back = select(candidates & ~self.flat, count, keys, generator)  # Eq. 5
        self.flat |= back
        return back

    def rescue_empty_layers(self, importance=None):
        """Bring back the largest weight of each layer that has none alive. Return the
        names of such layers.

        For each, the smallest alive weight of the other layers dies, so that the count
        stays. A layer with one alive weight keeps it.
        importance: [M], what large and small refer to; None: |w|.
        Raises TooFew if fewer weights are alive than there are layers.
        """
        if all(self.per_layer(self.flat)):
            return []
        if self.n_alive < len(self.sizes):
            raise TooFew(f"an update leaves {self.n_alive} weights alive, expected at "
                         f"least one for each of the {len(self.sizes)} layers. Lower "
                         f"--sparsity or raise --width")
        values = self.magnitudes() if importance is None else importance
        values, parts = values.split(self.sizes), self.flat.split(self.sizes)
        rescued = []
        for name, part, value in zip(self.weights, parts, values):
            if part.any():
                continue
            rescued.append(name)
            spare = [torch.where(other & (count(other) > 1), size, torch.inf)
                     for other, size in zip(parts, values)]
            self.flat[torch.cat(spare).argmin()] = False
            part[value.argmax()] = True
        return rescued

    @torch.no_grad()
    def apply(self, optimizer):
        """Set dead weights and their momentum to 0. Call it after each step: the step
        changes dead weights too, by their gradient and momentum."""
        tensors, factors = [], []
        for weight, factor in zip(self.weights.values(), self.factors()):
            rows = [weight, *self._masked_momenta(optimizer, weight)]
            tensors += rows
            factors += [factor] * len(rows)
        torch._foreach_mul_(tensors, factors)

    @torch.no_grad()
    def factors(self):
        """Return the masks as numbers, 1 = alive, 0 = dead: for each weight a tensor of
        its shape, dtype and memory format.

        They are made again when a mask has changed. torch counts the changes of a
        tensor and of its views together, so that no change is missed, whoever makes it.
        Only what is written through `.data` or numpy is not counted: do not.
        """
        all_masks = (self.flat, *self.alive.values())
        now = None  # inference tensors count no changes
        if not any(mask.is_inference() for mask in all_masks):
            now = [(id(mask), mask._version) for mask in all_masks]
        if now is None or self._factors_of != now:
            pairs = zip(self.weights.values(), self.alive.values())
            self._factors = [torch.empty_like(weight).copy_(mask)
                             for weight, mask in pairs]
            self._factors_of = now
        return self._factors

    def _masked_momenta(self, optimizer, weight):
        return [] if self.keep_momentum else momenta(optimizer, weight)

    def cut_at(self, keep, magnitudes):
        """Return the alive weights that a plain cut to `keep` weights would prune, [M]
        bool; nothing is changed. magnitudes: [M]. Of equal ones at the edge none goes.
        """
        values = magnitudes[self.flat]
        spare = len(values) - keep
        if spare <= 0:
            return torch.zeros_like(self.flat)
        edge = values.kthvalue(spare + 1).values if keep else torch.inf
        return self.flat & (magnitudes < edge)

    def record_update(self, pruned, regenerated, plain=None):
        """Update `returned`. Return the counts of an update, a dict with totals and a
        row for each layer.

        pruned: [M] bool, alive before the update and cut in it. regenerated: [M] bool.
        plain: [M] bool, alive before and what a plain cut to the target would take.
        In the result, survived is the share of the pruned that were regenerated;
        survived_plain is the share of `plain` that is alive now. They are None where
        there is nothing to take a share of.
        """
        regenerated = regenerated & self.flat  # a rescue may have cut one again
        self.returned |= regenerated
        self.returned &= self.flat
        rows = zip(self.weights, self.per_layer(self.flat), self.per_layer(pruned),
                   self.per_layer(regenerated))
        layers = [dict(name=name, alive=n_alive, pruned=n_pruned, regenerated=n_back)
                  for name, n_alive, n_pruned, n_back in rows]
        n_pruned = sum(layer["pruned"] for layer in layers)
        n_back = sum(layer["regenerated"] for layer in layers)
        survived = None
        if n_pruned > 0:
            survived = count(pruned & regenerated) / n_pruned
        survived_plain = None
        if plain is not None and plain.any():
            survived_plain = count(plain & self.flat) / count(plain)
        return dict(sparsity=self.sparsity, pruned=n_pruned, regenerated=n_back,
                    survived=survived, survived_plain=survived_plain, layers=layers)

    # ---- what must hold --------------------------------------------------------------

    def require_finite(self, values, what):
        """Raise FloatingPointError, with the layer's name, if a value of [M] is NaN or
        infinite. what: the values in words, for the message."""
        if values.isfinite().all():
            return
        for name, part in zip(self.weights, values.split(self.sizes)):
            require_finite(part, f"{what} of {name}")

    def violation(self, optimizer, keep=None, may_be_empty=False):
        """Return in words what is wrong with masks and weights; None if nothing is.

        `keep` weights must be alive (None: any number), no layer may be empty (unless
        may_be_empty), and dead weights and their momentum must be 0.
        """
        # all counts are copied from the device at once, since each copy waits for it
        alive = [mask.count_nonzero() for mask in self.alive.values()]
        wrong = []  # two a layer: dead weights that are not 0, and momenta of such
        for name, weight in self.weights.items():
            rows = [weight.detach(), *self._masked_momenta(optimizer, weight)]
            wrong += [((tensor != 0) & ~self.alive[name]).count_nonzero()
                      for tensor in rows]
            wrong += [torch.zeros_like(alive[0])] * (2 - len(rows))
        counts = torch.stack(alive + wrong).tolist()
        alive, wrong = counts[:len(alive)], counts[len(alive):]
        if keep is not None and sum(alive) != keep:
            return f"{sum(alive):,} weights are alive, expected {keep:,}"
        rows = zip(self.weights, alive, wrong[::2], wrong[1::2])
        for name, n_alive, weights, past in rows:
            if n_alive == 0 and not may_be_empty:
                return f"{name} has no weight alive, expected at least 1"
            if weights or past:
                return (f"{weights:,} dead weights and {past:,} momenta of dead "
                        f"weights of {name} are not 0, expected none")
        return None

    # ---- state -----------------------------------------------------------------------

    def state_dict(self):
        return {"alive": self.flat.cpu(), "returned": self.returned.cpu()}

    def load_state_dict(self, state):
        self._hold(state["alive"].to(self.device, copy=True))
        self.returned = state["returned"].to(self.device, copy=True)


class Update(NamedTuple):
    """What an update did to the masks."""

    pruned: Tensor       # [M] bool, alive before the update and cut in it
    between: float       # the sparsity between the cut and the regeneration, 0..1
    regenerated: Tensor  # [M] bool, brought back
    rescued: list        # names of the layers that would have lost all their weights
    plain: Tensor = None  # [M] bool, what a plain cut to the target would have taken


# ---- functions -----------------------------------------------------------------------


def change_since(before, masks, rescued=()):
    """Return the Update from the masks `before`, [M] bool, to those of now.

    rescued: the names of layers that would be empty.
    """
    n_between = count(before & masks.flat)
    return Update(pruned=before & ~masks.flat, between=1 - n_between / masks.total,
                  regenerated=masks.flat & ~before, rescued=rescued)


@contextmanager
def computing_with(parameters, values):
    """Let parameters hold other values inside, for a forward and a backward pass:

        with computing_with([weight], [weight * mask]):
            loss(net(x)).backward()
        optimizer.step()    # of the weight, by the gradient at weight * mask

    After it, and after an error inside, they hold again what they held, bit for bit.
    Their gradient is that by the values, dense (straight-through): no step of autograd
    lies between the two. So any optimizer can follow.
    parameters: an iterable of them. values: as many tensors, of the same shapes.
    """
    parameters = list(parameters)
    held = [parameter.detach().clone() for parameter in parameters]
    try:
        write(parameters, values)
        yield
    finally:
        write(parameters, held)


@torch.no_grad()
def write(tensors, values):
    """Copy values into tensors, in place, one by one."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def prune_further(sparsity, regen):
    """Return the sparsity s' to prune to, before a regeneration that ends at the
    sparsity s (Eq. 7).

    sparsity: s. regen: the regeneration rate r. All are 0..1.
    INTERPRETATION: s' = s + r (1 - s). Then the last regeneration brings back a share r
    of the weights that are alive at the end; some of earlier updates come on top. The
    paper reports 48 % for r = 0.5 at s = 0.9, which is near; as published the
    classifier stays out, which makes it less. s / (1 - r) would exceed 1. Confirmed by
    the published code.
    """
    return sparsity + regen * (1 - sparsity)  # Eq. 7


def select(eligible, k, keys, generator):
    """Choose exactly k of the eligible places. Return them, [M] bool with k True.

    The largest by the first key are chosen. The next key breaks ties, and a seeded
    permutation breaks those of the last key.

    eligible: [M] bool. keys: list of [M] tensors; an empty one gives a random choice.
    generator: a CPU generator. Raises ValueError if fewer than k places are eligible,
    and FloatingPointError if a key is not finite.
    """
    places = eligible.nonzero().squeeze(1)
    if not 0 <= k <= len(places):
        raise ValueError(f"cannot choose {k} of {len(places)} weights")
    chosen = torch.zeros_like(eligible)
    for key in keys:
        if k in (0, len(places)):
            break
        values = key[places]
        require_finite(values, "weights or scores")
        last = values.topk(k, sorted=False).values.min()  # the k-th largest
        chosen[places[values > last]] = True
        k -= int((values > last).count_nonzero())
        places = places[values == last]
    if 0 < k < len(places):
        order = torch.randperm(len(places), generator=generator)
        places = places[order.to(places.device)]
    chosen[places[:k]] = True
    return chosen


def seeded(*numbers):
    """Return a CPU generator that depends on all of the whole numbers, such as a seed
    and an iteration.

    numpy mixes them: torch's own seeding keeps 32 bits of a number, and starts alike
    for neighbouring ones.
    """
    mixed = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def require_finite(values, what):
    """Raise FloatingPointError if a value is NaN or infinite. what: the values in
    words, for the message."""
    if not values.isfinite().all():
        raise FloatingPointError(
            f"{what} are not finite (NaN or infinite) and cannot be ranked. A "
            f"checkpoint saved before is kept; try a lower --lr")


def count(mask):
    """Return how many values of a bool tensor are True, as an int."""
    return int(mask.count_nonzero())


def ceil_share(share, whole):
    """Return the share of a whole number, rounded up. What floating point has put just
    above a whole number is that number: 0.56 * 25 is 14.000000000000002, and gives 14.
    """
    return ceil(share * whole - 1e-12 * whole)


def momenta(optimizer, tensor):
    """Return what an optimizer has accumulated of a parameter's gradients, a list of
    one tensor or none: SGD's momentum buffer or Adam's first moment.

    Adam's second moment is not among them. It is a mean of squared gradients, moves no
    weight, and goes on for dead ones too: so a weight that comes back makes first steps
    of the usual size. From a second moment of 0 its first step would be
    0.1 / sqrt(0.001) = 3.2 times lr.
    """
    state = optimizer.state.get(tensor, {})
    return [state[key] for key in ("momentum_buffer", "exp_avg")
            if state.get(key) is not None]


# ---- a sparse start ------------------------------------------------------------------
# Each function returns the density of each layer, a list, so that density * M weights
# are alive in all. shapes: of the weights of the layers.


def equal_densities(shapes, density):
    """One density for all layers."""
    return [density] * len(shapes)


def erk_densities(shapes, density):
    """Erdős–Rényi-Kernel (arXiv 1911.11134): proportional to
    sum(shape) / prod(shape). A layer that would exceed 1 is dense, and the others share
    the rest (arXiv 2106.10404)."""
    if density >= 1:
        return [density] * len(shapes)
    sizes = [prod(shape) for shape in shapes]
    raw = [sum(shape) / prod(shape) for shape in shapes]
    dense = set()
    while True:
        sparse = [i for i in range(len(shapes)) if i not in dense]
        left = density * sum(sizes) - sum(sizes[i] for i in dense)
        scale = left / sum(raw[i] * sizes[i] for i in sparse)
        over = {i for i in sparse if scale * raw[i] > 1}
        if not over:
            break
        dense |= over
    return [1.0 if i in dense else scale * raw[i] for i in range(len(shapes))]


DENSITIES = {"er": equal_densities, "erk": erk_densities}


def start_sparse(masks, keeps, generator):
    """Draw masks at random places. keeps: how many weights of each layer are alive, a
    list."""
    for part, keep in zip(masks.flat.split(masks.sizes), keeps):
        part.copy_(select(torch.ones_like(part), keep, [], generator))


# ---- whole numbers in proportion -----------------------------------------------------


def apportion(total, weights, caps):
    """Share out `total` units in proportion to weights, to the largest remainders
    first, and to none beyond its cap. What the weights cannot place goes evenly to the
    others.

    weights, caps: [S] int64, caps with at least `total` in all. Returns [S] int64 with
    exactly `total` in all.
    """
    share = torch.zeros_like(caps)
    while (left := total - int(share.sum())) > 0:
        is_open = share < caps
        by = weights * is_open
        if not by.any():
            by = is_open.long()
        more = left * by // by.sum()
        remainder = left * by % by.sum()
        n_over = left - int(more.sum())
        more[remainder.argsort(descending=True, stable=True)[:n_over]] += 1
        share = torch.minimum(share + more, caps)
    return share
