"""The PQ index and its bound by hand, the sparse start, the two stages against brute force, and
prune_pq.py from its command line, on tiny budgets."""
import json
import math
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import data
import modelfile
import models
import prune_pq
from harness import runfolder
from helpers import TIMES, assert_same_run, lines, refused, stop_after
from masks import Masks, apportion, erk_densities, seeded, start_sparse
from prune_pq import (Scopes, accumulate, counts_at_ratio, counts_at_start, counts_at_target,
                      in_scopes, largest_in_rows, measure_scopes, pq_index, retention_bound, rewire,
                      rewiring_count)
from training import sparsity_at

SHORT = ["--dataset", "tiny.npz", "--epochs-prune", "2", "--epochs-finetune", "1", "--interval",
         "6", "--width", "0.25", "--batch-size", "25"]  # 16 steps an epoch, 5 updates


@pytest.fixture(scope="module")
def images():
    return data.load("fashion-mini", train_limit=400)


@pytest.fixture(autouse=True)
def script_and_data(monkeypatch, images):
    monkeypatch.setattr(sys, "argv", ["prune_pq.py"])
    np.savez("tiny.npz", x_train=images.x_train[:, 0], y_train=images.y_train,
             x_test=images.x_test[:60, 0], y_test=images.y_test[:60])


def run(*given, short=True):
    return prune_pq.main([*(SHORT if short else []), *map(str, given)])


def wrong(capsys, *given, code=2, short=True):
    return refused(capsys, partial(run, short=short), *given, code=code)


def row(*values):
    return torch.tensor([values], dtype=torch.float32).abs()


def alive_of(magnitudes):
    return torch.ones_like(magnitudes, dtype=torch.bool)


def of_one(w, p=0.5, q=1.0):
    return pq_index(w, alive_of(w), p, q)


def draw_start(masks, start="er", density=0.5, seed=0):
    start_sparse(masks, counts_at_start(masks, start, density), seeded(seed, 0))


def turnover(c, d, dead, keep, rho=0.9):
    """How many are pruned, how many grow in each scope; keep None: in adaptive mode."""
    scopes = Scopes(d, dead, c)
    return counts_at_ratio(scopes, rho) if keep is None else counts_at_target(scopes, keep)


def both_stages(masks, keep, scores, generator, scope="layer", eta=0.0, rho=0.9):
    """An update as main makes it: what was pruned, what has grown, the sparsity between, the index
    of each layer."""
    scopes, index = measure_scopes(masks, scope, eta)
    cut, grow = turnover(scopes.n_rewire, scopes.n_alive, scopes.n_dead, keep, rho)
    pruned, before, grown, rescued, _ = rewire(masks, scope, cut, grow, scores, generator)
    assert rescued == []
    return pruned, grown, before, index


def net_of(*layers):
    """Masks over linear layers with given weights, and SGD with momentum of ones."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for i, values in enumerate(layers):
                linear = nn.Linear(len(values[0]), len(values), bias=False)
                linear.weight.data = torch.tensor(values)
                self.add_module(f"l{i}", linear)

        def scored_by(self):
            return {f"l{i}.weight": models.Scored("", 0) for i in range(len(layers))}

    net = Net()
    sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    for weight in net.parameters():
        sgd.state[weight]["momentum_buffer"] = torch.ones_like(weight)
    return Masks(net), sgd


def random_masks(scope="layer", seed=0, density=0.5):
    generator = torch.Generator().manual_seed(seed)
    masks, sgd = net_of(*(torch.randn(size, generator=generator).tolist()
                          for size in ((6, 9), (4, 30), (3, 4))))
    draw_start(masks, density=density, seed=seed)
    masks.apply(sgd)
    return masks, sgd, torch.rand(masks.total, generator=generator)


# ---- Stage I: the index and the bound, by hand ---------------------------------------------------


@pytest.mark.parametrize("w, index, m, c", [
    ((1, 1, 1, 1), 0, (4, 4, 4), 0), ((4, 1, 1, 1), 0.1071429, (4, 4, 3), 0),
    ((4, 1, 1, 0), 0.3333333, (3, 3, 3), 1), ((9, 1, .01, .01), 0.5598802, (2, 2, 2), 2),
    ((1, 0, 0, 0), 0.75, (1, 1, 1), 3)])
def test_the_index_and_the_bound_by_hand(w, index, m, c):
    d = torch.tensor([4])
    found = of_one(row(*w))
    assert found.dtype == torch.float64 and found.item() == pytest.approx(index, abs=5e-8)
    for eta, wanted in zip((0, 0.001, 0.1), m):
        assert retention_bound(found, d, eta).item() == wanted
    assert rewiring_count(retention_bound(found, d, 0), d).item() == c


@pytest.mark.parametrize("w, index", [((9, 1, .01, .01), 0.4467387), ((4, 1, 1, 0), 0.2928932)])
def test_other_norms_by_hand(w, index):
    found = of_one(row(*w), 1.0, 2.0)
    assert found.item() == pytest.approx(index, abs=5e-8)
    assert retention_bound(found, torch.tensor([4]), 0, 1.0, 2.0).item() == 2


@pytest.mark.parametrize("p, q", [(0.5, 1.0), (1.0, 2.0), (0.3, 0.8)])
def test_the_index_is_the_formula(p, q):
    """Written as in the paper, on the alive weights alone."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(5, 40, generator=generator)
    alive = torch.rand(5, 40, generator=generator) < 0.6
    found = pq_index(w.abs(), alive, p, q)
    for values, mask, index in zip(w.tolist(), alive.tolist(), found.tolist()):
        kept = [abs(v) for v, m in zip(values, mask) if m]
        of_p = sum(v ** p for v in kept) ** (1 / p)
        of_q = sum(v ** q for v in kept) ** (1 / q)
        assert index == pytest.approx(1 - len(kept) ** (1 / q - 1 / p) * of_p / of_q, abs=1e-12)


def test_the_bound_is_the_effective_number_of_weights():
    w = torch.rand(1, 50, generator=torch.Generator().manual_seed(2))
    effective = w.double().sqrt().sum() ** 2 / w.double().sum()
    assert 50 * (1 - of_one(w).item()) == pytest.approx(effective.item())
    assert retention_bound(of_one(w), torch.tensor([50]), 0).item() == math.ceil(effective)


def test_scale_copies_and_order_do_not_matter():
    w = torch.randn(1, 200, generator=torch.Generator().manual_seed(3)).abs()
    places = torch.randperm(200, generator=torch.Generator().manual_seed(4))
    index = of_one(w).item()
    for same in (3 * w, 1e-30 * w, 1e30 * w, torch.cat([w, w], 1), w[:, places]):
        assert of_one(same).item() == pytest.approx(index, abs=1e-7)
    assert of_one(row(0, 0, 5, 0, 0)).item() == pytest.approx(1 - 1 / 5)
    # a dead zero is no part of it, an alive one is
    part = torch.tensor([[True, True, True, False]])
    assert pq_index(row(4, 1, 1, 0), part).item() == of_one(row(4, 1, 1)).item()


def test_distributions():
    generator, n = torch.Generator().manual_seed(5), 10**6
    gauss = torch.randn(1, n, generator=generator).abs()
    uniform = torch.rand(1, n, generator=generator)
    laplace = torch.empty(1, n).exponential_(generator=generator)
    for w, index in ((gauss, 0.1527869), (uniform, 1 / 9), (laplace, 0.2146018)):
        assert of_one(w).item() == pytest.approx(index, abs=1e-3)
    assert 1 - math.gamma(0.75) ** 2 / math.sqrt(math.pi) == pytest.approx(0.1527869, abs=5e-8)
    d = torch.tensor([n])  # a Gaussian layer loses 15.3 %, and .2 % more per eta = .001
    lost = [rewiring_count(retention_bound(of_one(gauss), d, eta), d).item() / n
            for eta in (0, 0.001)]
    assert lost[0] == pytest.approx(0.153, abs=1e-3)
    assert lost[1] - lost[0] == pytest.approx(2e-3 * 0.847, abs=5e-5)


def test_rounding_does_not_change_a_count():
    for index, d, m in ((-1e-12, 4, 4), (1 / 3 - 1e-14, 3000, 2000)):
        index = torch.tensor([index], dtype=torch.float64)
        assert retention_bound(index, torch.tensor([d]), 0).item() == m
    assert math.floor(5 * (1 - 4 / 5)) == 0  # the trap
    for d in range(1, 200):
        for m in range(1, d + 1):
            c = rewiring_count(torch.tensor([m]), torch.tensor([d]))
            assert c.item() == min(d - m, 9 * d // 10, d - 1), (d, m)
    for d in (2359296, 14714997, 33554433):  # float32 would be off by one and more
        for eta in (0, 0.001):
            bound = Fraction(d) * Fraction(0.8471231) / Fraction(1 + eta) ** 2
            index = torch.tensor([1 - 0.8471231], dtype=torch.float64)
            found = retention_bound(index, torch.tensor([d]), eta).item()
            assert found == math.ceil(bound - d * 1e-9)
    ten = torch.tensor([10])
    assert rewiring_count(torch.tensor([7]), ten, gamma=1.2).item() == 3  # 3.6
    assert rewiring_count(torch.tensor([2]), ten, beta=0.5).item() == 5
    assert rewiring_count(torch.tensor([0]), ten, gamma=2.0, beta=1.0).item() == 9  # c <= d - 1


def test_scopes_without_anything_to_measure():
    nothing = torch.tensor([[False] * 3, [True] * 3, [True] * 3])
    w = torch.tensor([[1., 2., 3.], [0., 0., 0.], [2., 2., 2.]])
    assert pq_index(w, nothing).tolist() == [0, 0, 0]
    index = of_one(row(*[1.] + [0.] * 9), 0.01, 1.0)  # 1 - 10^-99 rounds to 1
    assert index.item() < 1
    for d in (1, 2, 3):
        for values in ([1.] * d, [1.] + [0.] * (d - 1), list(range(1, d + 1))):
            n = torch.tensor([d])
            c = rewiring_count(retention_bound(of_one(row(*values)), n, 0.5), n)
            assert 0 <= c.item() <= d - 1


def test_a_layer_of_zeros_loses_nothing():
    """Whatever eta says: there is no index, and no magnitude to choose by."""
    masks, sgd = net_of([[0.] * 10], [[1.] * 10])
    masks.apply(sgd)
    pruned, grown, _, index = both_stages(masks, None, torch.rand(20), seeded(0, 1), eta=0.2)
    assert index == [0, 0] and masks.per_layer(pruned) == [0, 3]  # 10 - ceil(10 / 1.44)
    assert not grown.any()  # no place is dead


# ---- the sparse start ----------------------------------------------------------------------------


def test_erk_by_hand():
    shapes = [(8, 4), (8, 8), (2, 8)]
    found = erk_densities(shapes, 0.5)
    assert found == pytest.approx([0.552632, 0.368421, 0.921053], abs=5e-7)
    assert found[0] == pytest.approx(28 / 19 * 12 / 32)
    assert sum(f * math.prod(s) for f, s in zip(found, shapes)) == pytest.approx(56)
    found = erk_densities([(64, 3, 3, 3), (128, 64, 3, 3), (10, 128)], 0.5)
    assert found == pytest.approx([1, 0.479601, 1], abs=5e-7)


def test_erk_of_vgg16():
    net = models.build("vgg16", 10, 3, 32, 1)
    shapes = [net.get_parameter(name).shape for name in models.scored_by(net)]
    half, tenth = (erk_densities(shapes, density) for density in (0.5, 0.1))
    assert half == pytest.approx([1] * 5 + [.858, .858, .641] + [.426] * 5 + [1], abs=6e-4)
    assert tenth == pytest.approx(
        [1, .670, .495, .328, .244, .162, .162, .121] + [.080] * 5 + [1], abs=6e-4)
    for found, density in ((half, 0.5), (tenth, 0.1)):
        total = sum(f * s.numel() for f, s in zip(found, shapes))
        assert total == pytest.approx(density * sum(s.numel() for s in shapes))


@pytest.mark.parametrize("start", ["er", "erk"])
def test_the_start_has_exact_counts_at_random_places(start):
    seen = []
    for seed in range(40):
        masks, _ = net_of(*(torch.ones(shape).tolist() for shape in ((8, 4), (8, 8), (2, 8))))
        draw_start(masks, start, seed=seed)
        seen.append(masks.flat.double())
        assert masks.per_layer(masks.flat) == ([16, 32, 8] if start == "er" else [18, 24, 15])
    mean = torch.stack(seen).mean(0)
    assert 0 < mean[:96].min() and mean[:96].max() < 1  # every place may be alive, or dead


def test_edges_of_the_start():
    assert erk_densities([(2, 3), (4, 5)], 1.0) == [1, 1]
    masks, _ = net_of([[1.] * 3], [[1.] * 400])
    draw_start(masks, density=0.01)
    assert masks.per_layer(masks.flat) == [1, 4]  # no layer is empty


# ---- Stage II ------------------------------------------------------------------------------------


def test_shares_are_exact_and_in_proportion():
    def share(total, weights, caps):
        return apportion(total, torch.tensor(weights), torch.tensor(caps)).tolist()

    assert share(10, [6, 3, 1], [99, 99, 99]) == [6, 3, 1]
    assert share(5, [6, 3, 1], [99, 99, 99]) == [3, 2, 0]  # 3, 1.5, .5: the first of equals
    assert share(20, [6, 3, 1], [7, 99, 99]) == [7, 10, 3]  # 13 of 3 : 1 (9.75, 3.25)
    assert share(20, [6, 3, 0], [7, 4, 99]) == [7, 4, 9]
    assert share(3, [0, 0], [1, 5]) == [1, 2]
    assert share(0, [1, 2], [0, 0]) == [0, 0]
    generator = torch.Generator().manual_seed(6)
    for _ in range(200):
        weights = torch.randint(0, 4, (9,), generator=generator)
        caps = torch.randint(0, 9, (9,), generator=generator)
        total = int(torch.randint(0, int(caps.sum()) + 1, (), generator=generator))
        found = apportion(total, weights, caps)
        assert int(found.sum()) == total and (found <= caps).all() and (found >= 0).all()


def test_how_many_grow():
    c, d, dead = torch.tensor([10, 3, 0]), torch.tensor([50, 9, 4]), torch.tensor([50, 9, 4])

    def of(keep, rho=0.9, dead=dead):
        return [x.tolist() for x in turnover(c, d, dead, keep, rho)]

    assert of(None) == [[10, 3, 0], [9, 2, 0]]  # floor(rho c)
    assert of(None, dead=torch.tensor([4, 9, 4])) == [[10, 3, 0], [4, 2, 0]]
    hundred = torch.tensor([100])
    assert turnover(hundred, 2 * hundred, hundred, None, 0.29)[1].item() == 29
    for n in (10**6 + 7, 2359297, 16777217):
        n = torch.tensor([n])
        assert turnover(n, 2 * n, n, None, 0.9)[1].item() == 9 * n.item() // 10
    # matched, 63 alive: the index sets the turnover, what grows meets the target
    assert of(63) == [[10, 3, 0], [10, 3, 0]]
    assert of(59) == [[10, 3, 0], [7, 2, 0]]  # 13 - 4
    assert of(50) == [[10, 3, 0], [0, 0, 0]]
    assert of(37) == [[20, 6, 0], [0, 0, 0]]  # c raised to what the ramp needs
    assert of(65) == [[10, 3, 0], [12, 3, 0]]  # the start had one weight less than its share
    cut, grow = of(3)
    assert cut == [49, 8, 3] and grow == [0, 0, 0]  # a weight of each scope stays
    # fewer places are dead than should grow: fewer are pruned, the count is met
    assert of(62, dead=torch.tensor([4, 1, 0])) == [[5, 1, 0], [4, 1, 0]]


@pytest.mark.parametrize("rows", [1, 7])
def test_choice_against_a_loop(rows):
    generator = torch.Generator().manual_seed(8)
    keys = torch.randperm(rows * 20, generator=generator).view(rows, 20).float()
    eligible = torch.rand(rows, 20, generator=generator) < 0.6
    counts = (torch.rand(rows, generator=generator) * eligible.sum(1)).long()
    found = largest_in_rows(eligible, counts, keys, generator)
    for r in range(rows):
        places = sorted(eligible[r].nonzero().flatten().tolist(), key=lambda i: -keys[r, i])
        assert found[r].nonzero().flatten().tolist() == sorted(places[:counts[r]])


@pytest.mark.parametrize("rows", [1, 3])
def test_ties_are_broken_at_random(rows):
    eligible, counts = torch.ones(rows, 4, dtype=torch.bool), torch.full((rows,), 2)
    keys = torch.tensor([[5., 0., 0., 0.]]).expand(rows, 4)
    seen = torch.stack([largest_in_rows(eligible, counts, keys, seeded(seed))
                        for seed in range(100)]).double().mean(0)
    assert (seen[:, 0] == 1).all() and (seen[:, 1:] > 0.15).all() and (seen[:, 1:] < 0.55).all()


@pytest.mark.parametrize("scope", ["layer", "neuron"])
@pytest.mark.parametrize("keep", [None, 80, 60, 30])
def test_an_update_against_a_loop(scope, keep):
    masks, sgd, scores = random_masks()
    shapes = [(6, 9), (4, 30), (3, 4)]
    before = [part.view(shape) for part, shape in
              zip(masks.flat.clone().split(masks.sizes), shapes)]
    values = [weight.detach().clone() for weight in masks.weights.values()]
    score = [part.view(shape) for part, shape in zip(scores.split(masks.sizes), shapes)]
    if scope == "layer":
        before, values, score = ([x.reshape(1, -1) for x in kind]
                                 for kind in (before, values, score))
    # by hand, a scope at a time
    c, sizes, dead = [], [], []
    for rows_alive, rows_w in zip(before, values):
        for mask, w in zip(rows_alive.tolist(), rows_w.tolist()):
            kept = [abs(v) for v, m in zip(w, mask) if m]
            d, total = len(kept), sum(kept)
            effective = sum(math.sqrt(v) for v in kept) ** 2 / total if total else d
            bound = min(d, math.ceil(effective / 1.001 ** 2 - 1e-9 * d))
            c.append(max(0, min(d - bound, 9 * d // 10, d - 1)) if total else 0)
            sizes.append(d)
            dead.append(len(mask) - d)
    c, dead = torch.tensor(c), torch.tensor(dead)
    cut, grow = turnover(c, torch.tensor(sizes), dead, keep)
    if keep is None:
        assert grow.tolist() == [min(9 * n // 10, room)
                                 for n, room in zip(c.tolist(), dead.tolist())]
    wanted, at = [], 0
    for rows_alive, rows_w, rows_score in zip(before, values, score):
        for mask, w, s in zip(rows_alive, rows_w, rows_score):
            places = mask.nonzero().flatten().tolist()
            gone = sorted(places, key=lambda i: abs(w[i]))[:cut[at]]
            new = sorted((~mask).nonzero().flatten().tolist(), key=lambda i: -s[i])[:grow[at]]
            mask = mask.clone()
            mask[gone], mask[new] = False, True
            wanted.append(mask)
            at += 1
    n_before = masks.n_alive
    pruned, grown, between, index = both_stages(masks, keep, scores, seeded(0, 1), scope,
                                                eta=0.001)
    assert torch.equal(masks.flat, torch.cat(wanted))
    assert int(pruned.sum()) == int(cut.sum()) and int(grown.sum()) == int(grow.sum())
    assert between == pytest.approx(1 - (n_before - int(cut.sum())) / masks.total)
    assert masks.n_alive == (keep or n_before - int(c.sum()) + int(grow.sum())) and len(index) == 3
    assert 0 < int(cut.sum()) and all(0 <= value < 1 for value in index)
    if keep is None and scope == "layer":  # sum m = d - c + floor(rho c), in each layer
        for i, part in enumerate(masks.per_layer(masks.flat)):
            assert part == sizes[i] - c[i] + math.floor(0.9 * c[i] + 1e-9)


def test_the_scopes_differ():
    """A neuron of equal weights loses none, even if they are smaller than those of others."""
    lost = {}
    for scope in ("layer", "neuron"):
        masks, _ = net_of([[1., 1., 1., 1.], [9., 9., .01, .01]])
        pruned, *_ = both_stages(masks, None, torch.zeros(8), seeded(0, 1), scope)
        lost[scope] = in_scopes(masks, pruned, "neuron")[0].sum(1).tolist()
    # 10.2^2 / 22.02 = 4.7 of 8; 4 of 4 and 6.2^2 / 18.02 = 2.1 of 4
    assert lost == {"layer": [1, 2], "neuron": [0, 1]}


def test_what_was_just_pruned_does_not_come_back():
    """Its momentum is by far the largest. Were it a candidate, it would win: no turnover."""
    masks, _ = net_of([[4., 1., 1., 0.5, 0., 0.]])
    masks.flat[4:] = False
    scores = torch.tensor([9., 9., 9., 9., 1., 2.])
    pruned, grown, *_ = both_stages(masks, 4, scores, seeded(0, 1), eta=0.2)
    assert pruned.nonzero().flatten().tolist() == [3]  # 4 - ceil(4.71^2 / 6.5 / 1.44)
    assert grown.nonzero().flatten().tolist() == [5]
    assert masks.flat.int().tolist() == [1, 1, 1, 0, 0, 1]
    assert masks.record_update(pruned, grown)["survived"] == 0
    others = torch.tensor([[False, False, False, True, True, True]])
    undone = largest_in_rows(others, torch.tensor([1]), scores[None], seeded(0))
    assert undone.nonzero().tolist() == [[0, 3]]


def test_growth_inflates_an_index_that_is_measured_at_once():
    """Order: the index is of the weights as trained, measured before anything is pruned or grown.
    New weights are 0 and alive, so that right after growth it is larger, and they go again: a
    documented effect, which an interval of training mends."""
    w = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1))
    masks, sgd = net_of(w.tolist())
    draw_start(masks)
    masks.apply(sgd)
    before = pq_index(masks.magnitudes()[None], masks.flat[None]).item()
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(2))
    first, second = [], []
    for made, key in ((first, 1), (second, 2)):
        made.extend(both_stages(masks, None, scores, seeded(0, key)))
        masks.apply(sgd)
    assert first[3] == [before]
    assert second[3][0] > before + 0.05 and second[0].sum() > first[0].sum()
    assert second[0][first[1]].all()  # all that had grown


def test_grown_weights_are_0_with_momentum_0():
    masks, sgd, scores = random_masks()
    momentum = [sgd.state[weight]["momentum_buffer"] for weight in masks.weights.values()]
    pruned, grown, *_ = both_stages(masks, None, scores, seeded(0, 1), eta=0.001)
    masks.apply(sgd)
    flat = torch.cat([m.flatten() for m in momentum])
    assert grown.any() and masks.flat[grown].all()
    for gone in (grown, pruned, ~masks.flat):
        assert not masks.magnitudes()[gone].any() and not flat[gone].any()
    assert (flat[masks.flat & ~grown] == 1).all()


@pytest.mark.parametrize("scope", ["layer", "neuron"])
def test_no_scope_ends_empty(scope):
    masks, sgd, scores = random_masks(scope)
    n_scopes = sum(rows.any(1).sum().item() for rows in in_scopes(masks, masks.flat, scope))
    assert n_scopes == (3 if scope == "layer" else 13)
    for update, keep in enumerate((50, 20, n_scopes)):
        both_stages(masks, keep, scores, seeded(0, update), scope)
        masks.apply(sgd)
        assert masks.n_alive == keep
        assert all(rows.any(1).all() for rows in in_scopes(masks, masks.flat, scope))


@pytest.mark.parametrize("scope", ["layer", "neuron"])
@pytest.mark.parametrize("place", ["weight", "score"])
def test_what_is_not_finite_is_not_ranked(scope, place):
    masks, sgd, scores = random_masks(scope)
    if place == "score":
        scores[3] = math.inf
    else:
        next(iter(masks.weights.values())).data[0, 0] = math.nan
    before = masks.flat.clone()
    with pytest.raises(FloatingPointError, match="not finite"):
        both_stages(masks, None, scores, seeded(0, 1), scope)
    assert torch.equal(before, masks.flat)


def test_momentum_is_of_all_places_and_signed():
    masks, _, _ = random_masks()
    velocity, by_hand = torch.zeros(masks.total), torch.zeros(masks.total)
    generator = torch.Generator().manual_seed(9)
    for _ in range(4):
        g = torch.randn(masks.total, generator=generator)
        for weight, part in zip(masks.weights.values(), g.split(masks.sizes)):
            weight.grad = part.view(weight.shape).clone()
        accumulate(masks, velocity)
        by_hand = 0.9 * by_hand + g
    assert torch.allclose(velocity, by_hand) and (velocity[~masks.flat] != 0).all()


def test_the_ramp():
    assert [sparsity_at(k, 4, 0.9, first=0.5) for k in (1, 2, 3, 4)] == pytest.approx(
        [0.5 + 0.4 * (1 - (1 - k / 4) ** 3) for k in (1, 2, 3, 4)])
    assert sparsity_at(4, 4, 0.9, first=0.5) == 0.9  # the last step is run
    assert [sparsity_at(k, 4, 0.9, first=0) for k in (1, 2, 3)] == pytest.approx(
        [0.5203125, 0.7875, 0.8859375])


# ---- the script ----------------------------------------------------------------------------------


def spy(monkeypatch):
    """Keep what each update of a run was given, and what it made."""
    seen, keeps, real, real_counts = [], [], prune_pq.rewire, prune_pq.counts_at_target

    def watch_counts(scopes, keep):
        keeps.append(keep)
        return real_counts(scopes, keep)

    def watch(masks, scope, n_prune, n_grow, scores, generator):
        before = masks.flat.clone()
        made = real(masks, scope, n_prune, n_grow, scores, generator)
        keep = keeps.pop() if keeps else None
        seen.append(dict(before=before, scores=scores.clone(), pruned=made.pruned,
                         grown=made.regenerated, after=masks.flat.clone(), sizes=masks.sizes,
                         keep=keep))
        return made

    monkeypatch.setattr(prune_pq, "counts_at_target", watch_counts)
    monkeypatch.setattr(prune_pq, "rewire", watch)
    return seen


def test_a_matched_run(monkeypatch, capsys):
    seen = spy(monkeypatch)
    summary = run("--run-dir", "r", "--sparsity", 0.8)
    assert {path.name for path in Path("r").iterdir()} == {
        "config.json", "metrics.jsonl", "updates.jsonl", "checkpoint.pt", "model.pt",
        "summary.json", "curves.png"}
    assert list(summary) == runfolder.SUMMARY_KEYS
    assert json.loads(Path("r/summary.json").read_text()) == summary
    assert (summary["script"], summary["method"], summary["regen"], summary["epochs"]) == (
        "prune_pq", "pq", None, 3)
    total = sum(layer["weights"] for layer in summary["layers"])
    alive = sum(layer["alive"] for layer in summary["layers"])
    assert alive == total - round(0.8 * total) and summary["sparsity"] == 1 - alive / total
    rows, updates = lines("r", "metrics"), lines("r", "updates")
    assert summary["test_accuracy"] == rows[-1]["test_accuracy"]
    assert summary["pruned_accuracy"] == rows[1]["test_accuracy"]
    assert [row["stage"] for row in rows] == ["prune", "prune", "finetune"]

    first = sum(round(0.5 * layer["weights"]) for layer in summary["layers"])
    assert int(seen[0]["before"].sum()) == first
    densities = [first / total] + [1 - row["sparsity"] for row in rows[:2]]
    assert summary["training_cost"] == pytest.approx(sum(densities) / 3)
    assert [row["iteration"] for row in updates] == [6, 12, 18, 24, 30]
    for k, (update, made) in enumerate(zip(updates, seen, strict=True), 1):
        target = 0.5 + 0.3 * (1 - (1 - k / 5) ** 3)
        assert update["target"] == pytest.approx(target)
        keep = total - round(update["target"] * total)
        assert made["keep"] == keep == int(made["after"].sum())
        assert update["pruned"] - update["regenerated"] == int(made["before"].sum()) - keep
        assert sum(layer["alive"] for layer in update["layers"]) == keep
        assert update["before"] == pytest.approx(
            1 - (int(made["before"].sum()) - update["pruned"]) / total)
        assert all(0 < layer["index"] < 1 for layer in update["layers"])
        if k > 1:  # dead weights stay dead between updates
            assert torch.equal(made["before"], seen[k - 2]["after"])
    assert updates[-1]["target"] == 0.8
    assert sum(row["regenerated"] for row in updates) > 0  # turnover
    assert 0 < summary["survived_by_regeneration"] < 1
    final = torch.cat([m.flatten() for m in modelfile.read("r/model.pt")["masks"].values()])
    assert torch.equal(final, seen[-1]["after"])  # the mask is fixed from then on
    net, masks = models.load("r/model.pt"), modelfile.read("r/model.pt")["masks"]
    assert all(net.get_parameter(name)[~mask].count_nonzero() == 0 for name, mask in masks.items())
    state = torch.load("r/checkpoint.pt", weights_only=True)["parts"]["optimizer"]["state"]
    for i, (name, _) in enumerate(net.named_parameters()):
        if name in masks:
            assert not state[i]["momentum_buffer"][~masks[name]].any()
    assert "% test accuracy at 80.0 % sparsity -> r" in capsys.readouterr().out


def test_an_adaptive_run(monkeypatch):
    seen = spy(monkeypatch)
    summary = run("--run-dir", "r", "--mode", "adaptive")
    updates = lines("r", "updates")
    assert len(updates) == 5 and all(row["target"] is None for row in updates)
    for row in updates:
        for layer in row["layers"]:
            assert layer["regenerated"] == 9 * layer["pruned"] // 10
            assert layer["pruned"] > 0
    assert 0.5 < summary["sparsity"] < 0.7 and summary["sparsity"] == updates[-1]["sparsity"]
    assert all(made["keep"] is None for made in seen)
    config = json.loads(Path("r/config.json").read_text())
    assert config["sparsity"] is None and config["rho"] == 0.9


@pytest.mark.parametrize("growth, scope", [
    ("momentum", "layer"), ("gradient", "layer"), ("random", "layer"), ("momentum", "neuron")])
def test_what_grows_has_the_largest_score_of_the_dead(growth, scope, monkeypatch):
    seen = spy(monkeypatch)
    summary = run("--growth", growth, "--scope", scope, "--mode", "adaptive", "--start", "erk",
                  "--epochs-finetune", 0)
    total = sum(layer["weights"] for layer in summary["layers"])
    grown = 0
    for made in seen:
        grown += int(made["grown"].sum())
        assert not (made["grown"] & (made["before"] | made["pruned"])).any()
        for score, new, dead in zip(*(x.split(made["sizes"]) for x in (
                made["scores"], made["grown"], ~made["before"]))):
            if scope == "layer" and new.any() and (dead & ~new).any():
                assert score[new].min() >= score[dead & ~new].max()
        # the ranking sees all places: momentum and gradient are dense, not those of the optimizer
        assert (made["scores"][~made["before"]] > 0).double().mean() > 0.3
    assert grown > 0.05 * total
    different = torch.stack([made["scores"] for made in seen])
    assert (different[0] != different[1]).any()


def test_growth_follows_its_flag(monkeypatch):
    """One run, ranked by each rule: what was handed on is that rule's, and not another's."""
    handed = {}
    for growth in ("momentum", "gradient", "random"):
        seen, summed, gradients = spy(monkeypatch), [], []
        real, monkeypatch_at = prune_pq.accumulate, Masks.gradients

        def watch(masks, velocity):
            real(masks, velocity)
            summed.append(velocity.abs().clone())

        def look(masks):
            gradients.append(monkeypatch_at(masks))
            return gradients[-1]

        with monkeypatch.context() as patch:
            patch.setattr(prune_pq, "accumulate", watch)
            patch.setattr(Masks, "gradients", look)
            run("--growth", growth, "--run-dir", growth, "--epochs-finetune", 0)
        handed[growth] = [made["scores"] for made in seen]
        wanted = {"momentum": summed[5::6], "gradient": gradients, "random": None}[growth]
        if wanted is not None:
            assert all(map(torch.equal, handed[growth], wanted)) and len(wanted) >= 5
        assert len(summed) == (30 if growth == "momentum" else 0)  # none after the last update
    uniform = torch.stack(handed["random"])
    assert uniform.mean() == pytest.approx(0.5, abs=0.02) and (uniform[0] != uniform[1]).any()


def test_a_run_bit_by_bit(monkeypatch, images):
    """The layer-wise method, written separately: a sort, plain masks, no library of this project
    but for the start."""
    seen = spy(monkeypatch)
    run("--run-dir", "r", "--sparsity", 0.7)
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 4, [4, 8, 16, 16]).to(memory_format=torch.channels_last)
    net.set_normalisation(images.mean, images.std)
    weights = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    total = sum(w.numel() for w in weights.values())
    start = seen[0]["before"].split([w.numel() for w in weights.values()])
    alive = {n: part.view(w.shape).clone() for (n, w), part in zip(weights.items(), start)}
    velocity = {n: torch.zeros_like(w) for n, w in weights.items()}
    for name, w in weights.items():
        w.data *= alive[name]
    sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4)
    iteration = 0
    for epoch in range(3):
        for x, y in data.batches(images.x_train, images.y_train, 25, 0, epoch, flip=True):
            step, steps = (iteration, 32) if epoch < 2 else (iteration - 32, 16)
            sgd.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / steps)) / 2
            iteration += 1
            loss = nn.functional.cross_entropy(net(x).reshape(-1, 10), torch.cat([y] * 4))
            sgd.zero_grad()
            loss.backward()
            for name, w in weights.items():
                velocity[name] = 0.9 * velocity[name] + w.grad
            sgd.step()
            for name, w in weights.items():
                w.data *= alive[name]
                sgd.state[w]["momentum_buffer"] *= alive[name]
            if iteration % 6 or iteration > 30:
                continue
            c = {}
            for name, w in weights.items():
                kept = w.detach()[alive[name]].abs().double()
                d = len(kept)
                bound = (kept.sqrt().sum() ** 2 / kept.sum()).item() / 1.001 ** 2
                c[name] = min(d - min(d, math.ceil(bound - 1e-9 * d)), 9 * d // 10)
            n_alive = sum(int(m.sum()) for m in alive.values())
            s = 0.5 + 0.2 * (1 - (1 - iteration / 30) ** 3)
            need = n_alive - (total - round(s * total))
            n_cut = sum(c.values())
            if n_cut < need:
                shares = {n: need * v / n_cut for n, v in c.items()}
                c = {n: int(v) for n, v in shares.items()}
                rest = sorted(shares, key=lambda n: c[n] - shares[n])[:need - sum(c.values())]
                c |= {n: c[n] + 1 for n in rest}
            n_grow = max(n_cut, need) - need
            shares = {n: n_grow * v / sum(c.values()) for n, v in c.items()}
            grow = {n: int(v) for n, v in shares.items()}
            rest = sorted(shares, key=lambda n: grow[n] - shares[n])[:n_grow - sum(grow.values())]
            grow |= {n: grow[n] + 1 for n in rest}
            for name, w in weights.items():
                old, size = alive[name].flatten(), w.detach().abs().flatten()
                new = old.clone()
                places = old.nonzero().flatten()
                new[places[size[places].argsort()[:c[name]]]] = False
                places = (~old).nonzero().flatten()
                score = velocity[name].abs().flatten()[places]
                new[places[score.argsort(descending=True)[:grow[name]]]] = True
                alive[name] = new.view(w.shape)
                w.data *= alive[name]
                sgd.state[w]["momentum_buffer"] *= alive[name]
    assert any(made["grown"].any() for made in seen)
    packed = modelfile.read("r/model.pt")
    assert all(torch.equal(packed["masks"][name], alive[name]) for name in alive)
    for name, tensor in net.state_dict().items():
        assert torch.equal(packed["state_dict"][name], tensor), name


@pytest.mark.parametrize("step, given", [
    (3, []), (9, ["--sparsity", "0.55"]), (16, ["--scope", "neuron", "--sparsity", "0.6"]),
    (30, ["--mode", "adaptive"]),
    (40, ["--mode", "adaptive", "--growth", "random", "--start", "erk"])])
def test_resume_bit_by_bit(step, given, monkeypatch):
    """Stop before the first update, between two, at the end of an epoch, at the last update, and in
    fine-tuning."""
    summary = run("--run-dir", "unbroken", *given)
    stop_after(step, monkeypatch, run, "--run-dir", "r", *given)
    run("--run-dir", "r", "--resume", short=False)  # all other flags come from its config.json
    assert_same_run("unbroken", "r")
    assert summary["survived_by_regeneration"] > 0 or not given  # something did grow


@pytest.mark.parametrize("name", ["density", "first_density"])
def test_an_older_checkpoint_names_its_start_otherwise(name, monkeypatch):
    given = ("--density", 0.3)
    whole = run("--run-dir", "unbroken", *given)
    stop_after(20, monkeypatch, run, "--run-dir", "r", *given)
    state = modelfile.read_tensors("r/checkpoint.pt")
    state["notes"][name] = 1 - state["notes"].pop("first_sparsity")
    torch.save(state, "r/checkpoint.pt")
    found = run("--run-dir", "r", "--resume", short=False)
    assert found["training_cost"] == pytest.approx(whole["training_cost"])


def test_init_and_the_dense_accuracy(images):
    """It starts from a dense network, masked; the accuracy of before stands in the summary."""
    net = models.build("small", 10, 1, 28, 4, [4, 8, 16, 16])
    torch.save(modelfile.pack(net), "dense.pt")
    net.set_normalisation(images.mean, images.std)
    summary = run("--init", "dense.pt", "--epochs-finetune", 0)
    right = net.eval()(images.x_test[:60]).sum(0).argmax(1) == images.y_test[:60]
    assert summary["dense_accuracy"] == pytest.approx(right.double().mean().item())


@pytest.mark.parametrize("given", [[], ["--scope", "neuron"], ["--mode", "adaptive"]])
def test_smoke(given):
    summary = run("--smoke", *given, short=False)
    assert summary["epochs"] == 2 and summary["widths"] == [4, 8, 16, 16]
    assert list(summary) == runfolder.SUMMARY_KEYS
    folder = next(Path("runs").iterdir())
    assert folder.name.startswith("smoke-fashion-mini-small-pq-") and len(
        lines(folder, "updates")) == 4


def test_names_of_runs():
    names = {given: prune_pq.parse_args(given.split()).run_dir for given in (
        "", "--scope neuron", "--growth random", "--start erk", "--mode adaptive",
        "--mode adaptive --rho 0.8", "--sparsity 0.95", "--seed 1", "--dataset a/mine.npz")}
    assert len(set(names.values())) == len(names)
    assert names[""] == "runs/fashion-mini-small-pq-0.9-seed0"


def test_defaults():
    args = prune_pq.parse_args([])
    assert (args.density, args.eta, args.scope, args.growth, args.start, args.sparsity) == (
        0.5, 0.001, "layer", "momentum", "er", 0.9)
    assert args.rho is None and args.epochs_prune + args.epochs_finetune == 12
    assert (prune_pq.P, prune_pq.Q, prune_pq.GAMMA, prune_pq.BETA, prune_pq.DECAY) == (
        0.5, 1.0, 1.0, 0.9, 0.9)
    args = prune_pq.parse_args(["--mode", "adaptive", "--dataset", "cifar100"])
    assert args.sparsity is None and args.rho == 0.9
    assert (args.model, args.time_steps) == ("resnet19", 2)
    assert args.epochs_prune / (args.epochs_prune + args.epochs_finetune) == 0.75
    updates = 391 * args.epochs_prune // args.interval
    assert 0.28 < 0.5 * (1 - 0.1 * 0.1527869) ** updates < 0.31


@pytest.mark.parametrize("given, words", [
    ("--sparsity 90", "expected a fraction in [0, 1). For 90 % write 0.9"),
    ("--sparsity 0.4", "--sparsity is 0.4, expected at least the 0.5 of the start"),
    ("--sparsity 0.9999", "expected at least one for each of the 5 layers"),
    ("--sparsity 0.99 --scope neuron", "for each of the 54 neurons"),
    ("--rho 0.5", "--rho is 0.5, expected none: with --mode matched"),
    ("--mode adaptive --sparsity 0.9", "--sparsity is 0.9, expected none: with --mode adaptive"),
    ("--mode adaptive --rho 1", "--rho is 1, expected a fraction"),
    ("--density 0", "--density is 0, expected a number above 0 and below 1"),
    ("--density 1", "--density is 1,"), ("--eta -1", "--eta is -1"), ("--eta nan", "--eta is nan"),
    ("--scope global", "invalid choice"), ("--growth magic", "invalid choice"),
    ("--start dense", "invalid choice"), ("--mode fixed", "invalid choice"),
    ("--interval 33",
     "no update would ever run: --interval is 33, the pruning stage has 32 iterations"),
    ("--interval 0", "--interval is 0"), ("--epochs-prune 0", "--epochs-prune is 0"),
    ("--regen 0.5", "unrecognized arguments"), ("--init absent.pt", "absent.pt"),
])
def test_wrong_commands(given, words, capsys):
    assert words in wrong(capsys, *given.split())
    assert [path.name for path in Path().rglob("*")] == ["tiny.npz"]  # nothing was written


def test_a_momentum_that_is_not_finite_ends_the_run(monkeypatch, capsys):
    add = prune_pq.accumulate

    def spoil(masks, velocity):
        add(masks, velocity)
        velocity[0] = math.nan

    monkeypatch.setattr(prune_pq, "accumulate", spoil)
    assert "not finite" in wrong(capsys, "--run-dir", "r", code=1)
    assert not Path("r/summary.json").exists()


def test_a_finished_run_is_left_alone(capsys):
    summary = run("--run-dir", "r", "--epochs-finetune", 0)
    capsys.readouterr()
    assert run("--run-dir", "r", "--resume", short=False) == summary
    assert "r is finished" in capsys.readouterr().out
    assert "--resume, replace it by --overwrite" in wrong(capsys, "--run-dir", "r")
    again = run("--run-dir", "r", "--overwrite", "--epochs-finetune", 0)
    assert {k: v for k, v in again.items() if k not in TIMES} == {
        k: v for k, v in summary.items() if k not in TIMES}
