"""Which weights are prunable, alive or dead; exact global selection by count; exact accounting.

    masks = Masks(net)                            # every weight of a convolution or linear layer
    masks.prune(keep=1000)                        # the 1,000 largest |w| over all layers stay
    masks.apply(optimizer)                        # dead weights and their momentum become 0

A mask is a bool beside its weight, True = alive; weights are zeroed, never found by "is it 0",
since a regenerated weight is 0 and alive. Autograd then still delivers the dense gradient.

All masks are views into one flat vector over the M prunable weights of the network, so that a
global ranking is one selection over one vector: the value of the k-th place by partition, never a
sort. Counts are exact, whatever the ties: those are broken by a further key, and at last by a
seeded permutation.
"""
import math
from contextlib import contextmanager

import numpy as np
import torch

import models
from models import scored_by


class Broken(RuntimeError):
    """What must always hold of masks and weights does not: the run cannot be trusted."""


def prune_further(sparsity, regen):
    """Return the sparsity s' to prune to, ahead of a regeneration that ends at `sparsity` (Eq. 7).

    INTERPRETATION: s' = s + r (1 - s), so that a share r of the survivors owes its place to the
    regeneration; the paper reports 48 % for r = 0.5 at s = 0.9, which fits. s / (1 - r) would
    exceed 1.
    """
    return sparsity + regen * (1 - sparsity)  # Eq. 7


def seeded(*numbers):
    """Return a CPU generator that depends on all of the numbers, such as a seed and an iteration.

    torch's own seeding keeps 32 bits, and neighbouring seeds start alike; numpy mixes them first.
    """
    mixed = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def kth_largest(values, k):
    """Return the k-th largest of a flat tensor (k from 1), as a tensor without dimensions."""
    if values.device.type == "cpu":  # numpy's partition is several times faster than topk, kthvalue
        array = values.numpy()
        return torch.as_tensor(np.partition(array, len(array) - k)[len(array) - k])
    return values.topk(k, sorted=False).values.min()


def select(eligible, k, keys, generator):
    """Choose exactly k of the eligible places: the largest by the first key, ties by the next, and
    so on, what then still ties by a seeded permutation.

    eligible: [M] bool. keys: list of [M] tensors, maybe empty (a random choice). generator: a CPU
    generator. Returns [M] bool with k True. Raises ValueError if k places are not eligible, and
    FloatingPointError if a key is not finite.
    """
    available = count(eligible)
    if not 0 <= k <= available:
        raise ValueError(f"cannot choose {k} of {available} weights")
    if k in (0, available):
        return eligible.clone() if k else torch.zeros_like(eligible)
    if not keys:
        places = eligible.nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=generator)[:k]
        chosen = torch.zeros_like(eligible)
        chosen[places[order.to(places.device)]] = True
        return chosen
    values = keys[0]
    if not torch.stack(values.aminmax()).isfinite().all():
        raise FloatingPointError("weights or scores are not finite (NaN or infinite) and cannot be "
                                 "ranked. A checkpoint saved before is kept; try a lower --lr")
    low, high = bracket(values, eligible, k / available)  # exact without it, and slower
    chosen = (values > high) & eligible
    near = positions((values >= low) & eligible ^ chosen)
    missing = k - count(chosen)
    if not 0 <= missing <= len(near):  # the sample misled: all places are near
        chosen, near, missing = torch.zeros_like(eligible), positions(eligible), k
    if missing:
        close = values[near]
        threshold = kth_largest(close, missing)
        above, ties = near[close > threshold], near[close == threshold]
        chosen[above] = True
        among = torch.ones(len(ties), dtype=torch.bool, device=ties.device)
        chosen[ties[select(among, missing - len(above), [key[ties] for key in keys[1:]],
                           generator)]] = True
    return chosen


def count(mask):
    """Return how many places of a bool tensor are True, as an int."""
    if mask.device.type == "cpu":  # three times as fast as count_nonzero
        return int(np.count_nonzero(mask.numpy()))
    return int(mask.count_nonzero())


def positions(mask):
    """Return where a flat bool tensor is True, in order."""
    if mask.device.type == "cpu":  # several times faster than nonzero
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def bracket(values, eligible, share, size=2**16):
    """Return (low, high), values between which the largest `share` of the eligible ends, as one of
    `size` places in every so many tells it: in nearly all cases, which the caller must check.

    A selection then needs two passes over all values, and ranks those few between.
    """
    step = len(values) // size
    if step < 2:
        return -math.inf, math.inf
    sample = values[::step][eligible[::step]]
    place, margin = share * len(sample), 2 * len(sample) ** 0.5
    low, high = math.ceil(place + margin), math.floor(place - margin)
    return (kth_largest(sample, low) if low <= len(sample) else -math.inf,
            kth_largest(sample, high) if 1 <= high <= len(sample) else math.inf)


def reactivate(pruned, count, keys, generator=None):
    """Return which pruned units come back, [M] bool: the `count` highest-scored ones (Eq. 5).

    pruned: [M] bool, the candidates: weights, or channels. keys: the score of each unit, then what
    breaks ties. See select().
    """
    return select(pruned, count, keys, generator)  # Eq. 5


def momenta(optimizer, tensor):
    """Return what an optimizer remembers of the past gradients of a parameter: SGD's momentum,
    Adam's first moment; a list of none or one."""
    state = optimizer.state.get(tensor, {})
    return [state[key] for key in ("momentum_buffer", "exp_avg") if state.get(key) is not None]


class Masks:
    """The masks of a network and what happened to them.

    alive: {name: bool tensor shaped like the weight}, True = alive; views into one flat vector.
    returned: flat bool, True where the latest entry of a weight into the mask was a regeneration.
    """

    def __init__(self, net):
        self.scored = scored_by(net)
        self.weights = {name: net.get_parameter(name) for name in self.scored}
        self.sizes = [weight.numel() for weight in self.weights.values()]
        self.total = sum(self.sizes)
        self.device = next(iter(self.weights.values())).device
        self._hold(torch.ones(self.total, dtype=torch.bool, device=self.device))
        self.returned = torch.zeros_like(self.flat)

    def _hold(self, flat):
        self.flat = flat
        self.alive = {name: part.view(weight.shape) for (name, weight), part
                      in zip(self.weights.items(), flat.split(self.sizes))}

    # ---- counts ----------------------------------------------------------------------------------

    def keep_at(self, sparsity):
        """Return how many weights are alive at a sparsity: exactly M - round(sparsity * M)."""
        return self.total - round(sparsity * self.total)

    def check(self, sparsity):
        """Raise ValueError if a sparsity leaves fewer weights than there are layers."""
        if self.keep_at(sparsity) < len(self.sizes):
            raise ValueError(f"--sparsity is {sparsity}, which leaves {self.keep_at(sparsity)} of "
                             f"{self.total} weights alive, expected at least one for each of the "
                             f"{len(self.sizes)} layers. Lower --sparsity or raise --width")

    @property
    def n_alive(self):
        return count(self.flat)

    @property
    def sparsity(self):
        """Dead / prunable weights, from the masks."""
        return 1 - self.n_alive / self.total

    @property
    def share_regenerated(self):
        """Share of the alive weights whose latest entry into the mask was a regeneration
        (Fig. 2a)."""
        return count(self.returned & self.flat) / self.n_alive

    def per_layer(self, flat):
        """Return how many places of a flat bool vector are True in each layer,
        as a list of ints."""
        return [count(part) for part in flat.split(self.sizes)]

    # ---- what must hold --------------------------------------------------------------------------

    def require_finite(self, values, what):
        """Raise FloatingPointError, with the name of the layer, unless all of [M] is finite."""
        if values.isfinite().all():
            return
        bad = dict(zip(self.weights, self.per_layer(~values.isfinite())))
        name = next(name for name, count in bad.items() if count)
        raise FloatingPointError(f"{what} of {name} are not finite (NaN or infinite) and cannot be "
                                 f"ranked. A checkpoint saved before is kept; try a lower --lr")

    def violation(self, optimizer, keep=None, may_be_empty=False):
        """Return what does not hold, in words, else None: `keep` weights are alive (None: any
        number), no layer is empty, dead weights and their momentum are 0. One wait for the device.
        """
        alive = [mask.count_nonzero() for mask in self.alive.values()]
        wrong = []  # of each layer: dead weights, and momenta, that are not 0
        for name, weight in self.weights.items():
            rows = [weight.detach(), *momenta(optimizer, weight)]
            wrong += [((tensor != 0) & ~self.alive[name]).count_nonzero() for tensor in rows]
            wrong += [torch.zeros_like(alive[0])] * (2 - len(rows))
        counts = torch.stack(alive + wrong).tolist()
        alive, wrong = counts[:len(alive)], counts[len(alive):]
        if keep is not None and sum(alive) != keep:
            return f"{sum(alive):,} weights are alive, expected {keep:,}"
        for name, n_alive, weights, past in zip(self.weights, alive, wrong[::2], wrong[1::2]):
            if n_alive == 0 and not may_be_empty:
                return f"{name} has no weight alive, expected at least 1"
            if weights or past:
                return (f"{weights:,} dead weights and {past:,} momenta of dead weights of "
                        f"{name} are not 0, expected none")
        return None

    # ---- flat views of the network ---------------------------------------------------------------

    @torch.no_grad()
    def _absolute(self, tensors):
        flat = torch.empty(self.total, dtype=next(iter(self.weights.values())).dtype,
                           device=self.device)
        for part, tensor in zip(flat.split(self.sizes), tensors):
            torch.abs(tensor, out=part.view(tensor.shape))
        return flat

    def magnitudes(self):
        """Return |w| of all prunable weights, [M] (Eq. 8: the importance of a weight)."""
        return self._absolute(self.weights.values())  # Eq. 8

    def gradients(self):
        """Return |dL/dw| of all prunable weights, dead ones included, [M]."""
        return self._absolute(weight.grad for weight in self.weights.values())

    def spread(self, scores):
        """Give each weight the score of its LIF channel: {LIF name: [C]} -> [M] in float32."""
        flat = torch.empty(self.total, dtype=torch.float32, device=self.device)
        for part, weight, (lif, dim, repeat) in zip(flat.split(self.sizes), self.weights.values(),
                                                    self.scored.values()):
            shape = [-1 if d == dim else 1 for d in range(weight.dim())]
            part.view(weight.shape).copy_(scores[lif].repeat_interleave(repeat).view(shape))
        return flat

    # ---- the steps of an update ------------------------------------------------------------------

    def prune(self, keep, magnitudes, generator):
        """Let only the `keep` largest |w| over all layers live on;
        return what was pruned, [M] bool.

        Only alive weights are ranked: one that came back at 0 and has not moved ties with no dead
        one.
        """
        self.require_finite(magnitudes, "the weights")
        before = self.flat.clone()
        self.flat.copy_(select(before, keep, [magnitudes], generator))
        return before & ~self.flat

    def regenerate(self, count, candidates, keys, generator):
        """Bring back the `count` best candidates; return what came back, [M] bool.

        candidates: [M] bool, none of them alive. keys: the score of each weight, then |w| from
        before the update. A weight that was pruned in this same update still has its value and
        keeps it; one that was dead before comes back at 0 and grows from its next gradient.
        """
        for key in keys:
            self.require_finite(key, "the scores")
        back = reactivate(candidates & ~self.flat, count, keys, generator)
        self.flat |= back
        return back

    def guard(self, importance=None):
        """Leave no layer empty: its largest weight stays, and the smallest alive weight of a layer
        with more than one goes in its place, so that the count holds. importance: [M], what large
        and small mean, |w| if not given. Returns the names of such layers."""
        if all(self.per_layer(self.flat)):
            return []
        values = (self.magnitudes() if importance is None else importance).split(self.sizes)
        parts = self.flat.split(self.sizes)
        rescued = []
        for name, part, value in zip(self.weights, parts, values):
            if part.any():
                continue
            rescued.append(name)
            spare = [torch.where(other, size, torch.inf) if other.count_nonzero() > 1
                     else torch.full_like(size, torch.inf) for other, size in zip(parts, values)]
            self.flat[torch.cat(spare).argmin()] = False
            part[value.argmax()] = True
        return rescued

    @torch.no_grad()
    def apply(self, optimizer):
        """Set dead weights and their momentum to 0, after every step: or momentum, weight decay and
        the dense gradient bring them back to life."""
        for name, weight in self.weights.items():
            weight.mul_(self.alive[name])
            for momentum in momenta(optimizer, weight):
                momentum.mul_(self.alive[name])

    def account(self, pruned, regenerated):
        """Remember who came back, and return one update in numbers: a dict with totals and layers.

        pruned: [M] bool, alive when the update began and cut by magnitude in it. regenerated:
        [M] bool. survived: the share of the pruned that the regeneration brought back.
        """
        regenerated = regenerated & self.flat  # without what the guard gave away
        self.returned |= regenerated
        self.returned &= self.flat
        rows = zip(self.weights, *map(self.per_layer, (self.flat, pruned, regenerated)))
        layers = [dict(name=name, alive=alive, pruned=cut, regenerated=back)
                  for name, alive, cut, back in rows]
        n_pruned = sum(layer["pruned"] for layer in layers)
        rescued = count(pruned & regenerated)
        return dict(sparsity=self.sparsity, pruned=n_pruned,
                    regenerated=sum(layer["regenerated"] for layer in layers),
                    survived=rescued / n_pruned if n_pruned else None, layers=layers)

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self):
        return {"alive": self.flat.cpu(), "returned": self.returned.cpu()}

    def load_state_dict(self, state):
        self._hold(state["alive"].to(self.device, copy=True))
        self.returned = state["returned"].to(self.device, copy=True)


def recount(path, layers):
    """Read a model.pt back from the disk, count, and return (alive, zeros) over all its weights.

    layers: the rows of summary.json, of name and alive. Raises Broken if the file disagrees with
    them, or its masks with its weights.
    """
    alive = zeros = 0
    try:
        packed = models.read(path)
        models.unpack(packed, path)  # this counts what is dead and not 0
    except ValueError as error:
        raise Broken(str(error)) from None
    for layer in layers:
        found = int(packed["masks"][layer["name"]].count_nonzero())
        if found != layer["alive"]:
            raise Broken(f"{path} has {found:,} weights of {layer['name']} alive, expected "
                         f"{layer['alive']:,}. Go on with --resume, which writes it again")
        alive += found
        zeros += int((packed["state_dict"][layer["name"]] == 0).count_nonzero())
    return alive, zeros


def trim(sparsity, masks, generator):
    """End the structure epochs at exactly this sparsity: the largest |w| of those alive stay, or
    (INTERPRETATION) where fewer are alive, the dead that drifted farthest in this epoch return."""
    keep, drift = masks.keep_at(sparsity), masks.magnitudes()
    regenerated = masks.regenerate(max(0, keep - masks.n_alive), ~masks.flat, [drift], generator)
    between, pruned = masks.sparsity, masks.prune(keep, drift, generator)
    return sparsity, between, pruned, regenerated, masks.guard()


@contextmanager
def computing_with(masks, names):
    """Let the weights be w * m inside, for a forward and a backward pass. INTERPRETATION: w takes
    the gradient by w * m (straight-through): masked synapses train on, and show if they grow."""
    latent = {name: masks.weights[name].detach().clone() for name in names}
    for name in names:
        masks.weights[name].data.mul_(masks.alive[name])
    yield
    for name in names:
        masks.weights[name].data.copy_(latent[name])
