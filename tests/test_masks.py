"""A property test of masks: any shapes, ties, weights, targets."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness.runfolder import Broken, recount
from masks import Masks, TooFew, ceil_share, prune_further, seeded, select
from models import Scored


class Layers(nn.Module):
    """Weights of any shapes, without a network around them."""

    def __init__(self, arrays):
        super().__init__()
        for i, array in enumerate(arrays):
            self.register_parameter(f"w{i}", nn.Parameter(torch.from_numpy(array)))

    def scored_by(self):
        return {name: Scored("lif", 0) for name, _ in self.named_parameters()}


shapes = st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=4), min_size=1, max_size=5)


def arrays_of(data, shapes, values):
    return [np.array(data.draw(st.lists(values, min_size=n, max_size=n)), np.float32).reshape(shape)
            for shape in shapes for n in [int(np.prod(shape))]]


few = st.sampled_from([-1.0, -0.5, 0.0, 0.0, 0.5, 1.0])  # so that most of them tie
any_number = st.floats(-2.0**90, 2.0**90, width=32)


def same(one, other):
    return torch.equal(one, other)


@settings(max_examples=120, deadline=None)
@given(st.data(), shapes, st.booleans(), st.floats(0, 0.999), st.floats(0, 0.999),
       st.floats(0, 0.95), st.integers(0, 2**31 - 1))
def test_masks_through_two_updates(data, shapes, ties, first, second, regen, seed):
    values = few if ties else any_number
    net = Layers(arrays_of(data, shapes, values))
    masks, optimizer = Masks(net), torch.optim.SGD(net.parameters(), 0.1, 0.9)
    for parameter in net.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    layers = len(masks.sizes)
    original = masks.magnitudes().clone()

    for target in sorted((first, second)):
        keep = max(layers, masks.keep_at(target))
        if keep > masks.n_alive + int((~masks.flat).count_nonzero()):
            continue
        further = min(masks.n_alive, max(1, masks.keep_at(prune_further(target, regen))), keep)
        before, magnitudes = masks.flat.clone(), masks.magnitudes()

        # prune: exact, only of the alive, the smallest of them
        pruned = masks.prune(further, magnitudes, seeded(seed, 1))
        assert masks.n_alive == further == masks.total - int((~masks.flat).count_nonzero())
        assert same(before & ~masks.flat, pruned) and not (masks.flat & ~before).any()
        if pruned.any():
            assert magnitudes[pruned].max() <= magnitudes[masks.flat].min()
        # ... and idempotent: as many again is nothing more, whatever the draw
        between = masks.flat.clone()
        assert not masks.prune(further, magnitudes, seeded(seed, 2)).any()
        assert same(masks.flat, between)

        # regenerate: exact, only of the dead, the best of them, and nothing else changes
        score = torch.tensor(data.draw(st.lists(few, min_size=masks.total, max_size=masks.total)))
        back = masks.regenerate(keep - further, ~masks.flat, [score, magnitudes], seeded(seed, 3))
        assert int(back.count_nonzero()) == keep - further and not (back & between).any()
        assert same(masks.flat, between | back) and masks.n_alive == keep
        if back.any() and not masks.flat.all():
            assert score[back].min() >= score[~masks.flat].max()
        assert same(masks.flat, (before & ~pruned) | back)
        assert not masks.regenerate(0, ~masks.flat, [], None).any() and masks.n_alive == keep

        # a rescue: no layer is empty, the count holds, twice is once
        masks.rescue_empty_layers()
        assert masks.n_alive == keep and all(masks.per_layer(masks.flat))
        rescued = masks.flat.clone()
        assert masks.rescue_empty_layers() == [] and same(masks.flat, rescued)

        # the record adds up, and what is applied holds
        row = masks.record_update(pruned, back)
        assert sum(layer["alive"] for layer in row["layers"]) == keep
        assert row["pruned"] == int(pruned.count_nonzero())
        assert row["regenerated"] == int((back & masks.flat).count_nonzero())
        assert row["sparsity"] == masks.sparsity == 1 - keep / masks.total
        masks.apply(optimizer)
        assert masks.violation(optimizer, keep) is None
        once = masks.magnitudes()
        masks.apply(optimizer)
        assert same(masks.magnitudes(), once)
        assert once[~masks.flat].count_nonzero() == 0
        always = before & masks.flat
        assert same(once[always], magnitudes[always]) and once.max() <= original.max()

    # a state that comes back is the same, and in memory of its own
    other = Masks(net)
    other.load_state_dict(masks.state_dict())
    assert same(other.flat, masks.flat) and same(other.returned, masks.returned)
    other.flat.fill_(True)
    assert masks.n_alive == keep


@settings(max_examples=60, deadline=None)
@given(st.data(), shapes, st.integers(0, 2**31 - 1))
def test_each_violation_is_found(data, shapes, seed):
    net = Layers(arrays_of(data, shapes, any_number))
    masks, optimizer = Masks(net), torch.optim.SGD(net.parameters(), 0.1, 0.9)
    for parameter in net.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    keep = data.draw(st.integers(len(masks.sizes), masks.total))
    masks.prune(keep, masks.magnitudes(), seeded(seed))
    masks.rescue_empty_layers()
    masks.apply(optimizer)
    assert masks.violation(optimizer, keep) is None
    assert "weights are alive, expected" in masks.violation(optimizer, keep + 1)
    if keep == masks.total:
        return
    place = data.draw(st.sampled_from((~masks.flat).nonzero().flatten().tolist()))
    for what in ("weight", "momentum"):
        for name, weight, size in zip(masks.weights, masks.weights.values(), masks.sizes):
            if place < size:
                break
            place -= size
        tensor = weight.data if what == "weight" else optimizer.state[weight]["momentum_buffer"]
        tensor.view(-1)[place] = -1e-38
        assert name in masks.violation(optimizer, keep)
        tensor.view(-1)[place] = 0
        place += sum(masks.sizes[:list(masks.weights).index(name)])
    masks.flat[:masks.sizes[0]] = False
    masks.apply(optimizer)
    assert "w0 has no weight alive" in masks.violation(optimizer)
    assert masks.violation(optimizer, may_be_empty=True) is None


def test_what_is_not_finite_is_named():
    net = Layers([np.ones((2, 2), np.float32), np.ones((3, 2), np.float32)])
    masks = Masks(net)
    for place, name in ((3, "w0"), (4, "w1"), (9, "w1")):
        for value in (np.nan, np.inf):
            values = torch.ones(10)
            values[place] = value
            with pytest.raises(FloatingPointError, match=f"of {name} are not finite"):
                masks.prune(5, values, None)
            with pytest.raises(FloatingPointError, match=f"scores of {name} are not finite"):
                masks.regenerate(0, ~masks.flat, [torch.ones(10), values], None)
    assert masks.flat.all()


def test_a_file_that_is_none_is_no_count(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"text")
    with pytest.raises(Broken, match="cannot be read"):
        recount(tmp_path / "model.pt", [])


@pytest.mark.parametrize("alive", [(0, 1, 1), (1, 0, 0), (0, 2, 0), (0, 0, 0)])
def test_fewer_alive_than_layers_is_an_error_and_no_other_layer_is_emptied(alive):
    net = Layers([np.arange(1, 5, dtype=np.float32)] * 3)
    masks = Masks(net)
    for part, count in zip(masks.flat.split(masks.sizes), alive):
        part[count:] = False
    before = masks.flat.clone()
    with pytest.raises(TooFew, match=f"{sum(alive)} weights alive, expected at least one for each "
                                     "of the 3 layers"):
        masks.rescue_empty_layers()
    assert same(masks.flat, before)


@pytest.mark.parametrize("alive", [(0, 1, 2), (0, 3, 0), (3, 0, 0), (0, 0, 4), (1, 0, 2)])
def test_as_many_alive_as_layers_are_enough(alive):
    net = Layers([np.arange(1, 5, dtype=np.float32)] * 3)
    masks = Masks(net)
    for part, count in zip(masks.flat.split(masks.sizes), alive):
        part[count:] = False
    assert masks.rescue_empty_layers()
    assert masks.n_alive == sum(alive) and all(masks.per_layer(masks.flat))


@pytest.mark.parametrize("n_eligible, k", [(5, 2), (5, 0), (5, 5), (0, 0), (1, 1), (2, 1)])
def test_few_eligible_places_among_many(n_eligible, k):
    """As in a layer of VGG-16 at 99.9 %: a sample of all places would hold no eligible one."""
    size = 512 * 512 * 9
    eligible = torch.zeros(size, dtype=torch.bool)
    places = torch.randperm(size, generator=seeded(1))[:n_eligible]
    eligible[places] = True
    for key in (torch.rand(size, generator=seeded(2)), torch.zeros(size)):
        chosen = select(eligible, k, [key], seeded(3))
        assert int(chosen.count_nonzero()) == k and not (chosen & ~eligible).any()
        if 0 < k < n_eligible:
            assert key[chosen].min() >= key[eligible & ~chosen].max()


def test_a_share_is_rounded_up_but_not_by_floating_point():
    assert [ceil_share(0.56, 25), ceil_share(0.5, 25), ceil_share(0.0, 9)] == [14, 13, 0]
    for n in (100, 10_000_000):
        assert ceil_share(0.07, n) == 7 * n // 100
        assert ceil_share(0.07 + 1e-10, n) == 7 * n // 100 + 1  # a true excess counts
