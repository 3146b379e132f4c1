"""NDSNN, SET and RigL: the counts of the sheet by hand, the update against a plain loop, a run
written separately, and prune_ndsnn.py from its command line, on tiny budgets."""
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import data
import modelfile
import models
import prune_ndsnn
from harness import runfolder
from helpers import TIMES, LinearNet, assert_same_run, lines, refused, stop_after
from masks import DENSITIES, Masks, count, seeded, start_sparse
from prune_ndsnn import (drop_and_grow, drop_rate, layer_counts, layer_sparsities, method_of,
                         turnover, without_growth)
from training import sparsity_at

SHORT = ["--dataset", "tiny.npz", "--epochs-prune", "2", "--epochs-finetune", "1", "--interval",
         "4", "--width", "0.25", "--batch-size", "20"]  # 10 steps an epoch, 5 updates
SET = ["--sparsity", 0.8, "--density", 0.2, "--growth", "random"]
RIGL = ["--sparsity", 0.8, "--density", 0.2]


@pytest.fixture(scope="module")
def images():
    return data.load("fashion-mini", train_limit=200)


@pytest.fixture(autouse=True)
def script_and_data(monkeypatch, images):
    monkeypatch.setattr(sys, "argv", ["prune_ndsnn.py"])
    np.savez("tiny.npz", x_train=images.x_train[:, 0], y_train=images.y_train,
             x_test=images.x_test[:40, 0], y_test=images.y_test[:40])


def run(*given, short=True):
    return prune_ndsnn.main([*(SHORT if short else []), *map(str, given)])


def net_of(*layers):
    """Masks over linear layers with given weights, and SGD with momentum of ones."""
    net = LinearNet(**{f"l{i}": rows for i, rows in enumerate(layers)})
    sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    for weight in net.parameters():
        sgd.state[weight]["momentum_buffer"] = torch.ones_like(weight)
    return Masks(net), sgd


def shapes_of(name, side=28):
    net = models.build(name, 10, 1 if name == "small" else 3, side, 1)
    return [net.get_parameter(weight).shape for weight in models.scored_by(net)]


def plan(shapes, sparsity, n, density=0.5, densities="erk", rate=0.5):
    """Return what main asks of each update: [[(alive before, dropped, grown, alive after), one a
    layer], one an update]."""
    sizes = [shape.numel() for shape in shapes]
    first, final = ([1 - share for share in DENSITIES[densities](shapes, d)]
                    for d in (density, 1 - sparsity))
    total = sum(sizes)
    alive = layer_counts(sizes, layer_sparsities(first, final, 0, n),
                         total - round((1 - density) * total))
    rows = []
    for q in range(1, n + 1):
        keep = total - round(sparsity_at(q, n, sparsity, 1 - density) * total)
        keeps = layer_counts(sizes, layer_sparsities(first, final, q, n), keep)
        assert sum(keeps) == keep
        rows.append([(a, *turnover(a, k, drop_rate(rate, q, n)), k)
                     for a, k in zip(alive, keeps)])
        alive = keeps
    return rows


# ---- the sheet's numbers -------------------------------------------------------------------------


def test_a_layer_of_1000_weights_by_hand():
    rows = [row for (row,) in plan([torch.Size([1000])], 0.9, 8)]
    assert rows == [(500, 241, 109, 368), (368, 158, 59, 269), (269, 94, 23, 198),
                    (198, 50, 2, 150), (150, 29, 0, 121), (121, 15, 0, 106), (106, 5, 0, 101),
                    (101, 1, 0, 100)]
    thetas = [layer_sparsities([0.5], [0.9], q, 8)[0] for q in range(9)]
    assert thetas == pytest.approx([0.5, .632031, .73125, .802344, .85, .878906, .89375, .899219,
                                    0.9], abs=5e-7)
    assert thetas[8] == 0.9  # the ramp ends where it should
    rates = [drop_rate(0.5, q, 8) for q in range(9)]
    assert rates == pytest.approx([0.5, .481160, .427509, .347214, .2525, .157786, .077491, .023840,
                                   .005], abs=5e-7)


def test_a_layer_by_hand():
    masks, sgd = net_of([[.9, -.5, .3, .2, .1, 0., 0., 0., 0., 0.]])
    masks.flat[5:] = False
    masks.apply(sgd)
    g = torch.tensor([.1, .1, .6, .05, .2, .3, -.8, .4, .02, 0]).abs()
    update = drop_and_grow(masks, [4], 0.4, g, seeded(0))
    assert update.pruned.nonzero().flatten().tolist() == [3, 4]
    assert update.regenerated.nonzero().flatten().tolist() == [6]
    assert update.between == pytest.approx(0.7) and update.rescued == []
    masks.apply(sgd)
    (weight,), (momentum,) = masks.weights.values(), [
        state["momentum_buffer"] for state in sgd.state.values()]
    assert weight.tolist() == [[pytest.approx(v) for v in (.9, -.5, .3, 0, 0, 0, 0, 0, 0, 0)]]
    assert masks.flat.int().tolist() == [1, 1, 1, 0, 0, 0, 1, 0, 0, 0]
    assert momentum.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 0, 0]]


def test_what_was_just_dropped_may_grow_and_keeps_what_it_had():
    """It does not come back at 0: the masks are applied after the growth, not between. Nor is
    anything grown before the drop: what grows is 0, and would be dropped at once."""
    masks, sgd = net_of([[.9, -.5, .3, .2, 0., 0.]])
    masks.flat[4:] = False
    masks.apply(sgd)
    update = drop_and_grow(masks, [4], 0.5, torch.tensor([.1, .1, .05, .7, .6, .8]), seeded(0))
    masks.apply(sgd)
    assert update.pruned.nonzero().flatten().tolist() == [2, 3]
    assert update.regenerated.nonzero().flatten().tolist() == [3, 5]
    ((weight, state),) = sgd.state.items()
    assert weight.tolist() == [[pytest.approx(v) for v in (.9, -.5, 0, .2, 0, 0)]]
    assert state["momentum_buffer"].tolist() == [[1, 1, 0, 1, 0, 0]]
    assert masks.record_update(update.pruned, update.regenerated)["survived"] == 0.5


def test_a_dense_layer_is_left_alone():
    masks, sgd = net_of([[.9, -.5, .3, .2]], [[.1, .2, .3, .4]])
    masks.flat[4:6] = False
    masks.apply(sgd)
    before = next(iter(masks.weights.values())).clone()
    drop_and_grow(masks, [4, 2], 0.5, torch.rand(8), seeded(0))
    masks.apply(sgd)
    assert masks.flat[:4].all() and torch.equal(before, next(iter(masks.weights.values())))
    assert (next(iter(sgd.state.values()))["momentum_buffer"] == 1).all()


def test_erk_of_small():
    shapes = shapes_of("small")
    sizes = [shape.numel() for shape in shapes]
    assert sizes == [144, 4608, 18432, 36864, 5760]
    for density, found, counts in (
            (0.5, [1, 1, .52506, .344892, 1], [144, 4608, 9678, 12714, 5760]),
            (0.1, [1, .086109, .040662, .026710, .747551], [144, 397, 749, 985, 4306])):
        densities = DENSITIES["erk"](shapes, density)
        assert densities == pytest.approx(found, abs=5e-7)
        keep = sum(sizes) - round((1 - density) * sum(sizes))
        assert keep == sum(counts) == {0.5: 32904, 0.1: 6581}[density]
        assert layer_counts(sizes, [1 - d for d in densities], keep) == counts


def test_where_nothing_grows():
    """small: never at 90 %, in 9 or 10 of 30 updates of the three middle layers at 95 %; VGG-16:
    never at 90 and 95 %, in 7 to 10 of 39 updates of nine layers at 98 %."""
    for name, sparsity, n, layers, times in (
            ("small", 0.9, 30, 0, set()), ("small", 0.95, 30, 3, {9, 10}),
            ("vgg16", 0.9, 39, 0, set()), ("vgg16", 0.95, 39, 0, set()),
            ("vgg16", 0.98, 39, 9, {7, 8, 9, 10})):
        rows = plan(shapes_of(name, 28 if name == "small" else 32), sparsity, n)
        never = [sum(row[layer][2] == 0 for row in rows) for layer in range(len(rows[0]))]
        found = [count for count in never if count]
        assert len(found) == layers and set(found) <= times, (name, sparsity, never)
        if (name, sparsity) == ("small", 0.95):
            assert [count > 0 for count in never] == [False, True, True, True, False]
        assert all(grown >= 0 and dropped - grown == before - after
                   for row in rows for before, dropped, grown, after in row)


def test_what_training_costs():
    """200 + 300 epochs, 39 updates at every 2,000th of 391 steps an epoch: 71.2, 48.9, 35.4."""
    for sparsity, cost in ((0.9, 71.2), (0.95, 48.9), (0.98, 35.4)):
        density = [1 - sparsity_at(391 * epoch // 2000, 39, sparsity, 0.5)
                   if 391 * epoch >= 2000 else 0.5 for epoch in range(200)]
        assert sum(density) + 300 * (1 - sparsity) == pytest.approx(cost, abs=0.05)


# ---- counts --------------------------------------------------------------------------------------


def test_counts_are_the_nearest_that_add_up():
    """Against all ways to round up or down: the sum is exact, what is changed is what rounding
    moved most, and no layer is empty or more than full."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        sizes = torch.randint(1, 60, (5,), generator=generator).tolist()
        thetas = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        shares = [(1 - theta) * size for theta, size in zip(thetas, sizes)]
        keep = max(5, round(sum(shares)))
        found = layer_counts(sizes, thetas, keep)
        assert sum(found) == keep and all(1 <= n <= size for n, size in zip(found, sizes))
        if min(shares) >= 1:  # by the largest remainders
            wanted = [math.floor(share) for share in shares]
            order = sorted(range(5), key=lambda i: wanted[i] - shares[i])
            for i in order[:keep - sum(wanted)]:
                wanted[i] += 1
            assert found == wanted
    assert layer_counts([10, 10, 10, 10], [0.98, 0.98, 0.98, 0.66], 4) == [1, 1, 1, 1]
    assert layer_counts([4, 1000], [0.0, 0.9004], 103) == [4, 99]  # the dense one stays so


def test_how_many_are_dropped():
    assert turnover(500, 368, 0.48116) == (241, 109)
    assert turnover(100, 60, 0.005) == (40, 0)  # the ramp asks for more: growth is never negative
    assert turnover(100, 100, 0.005) == (1, 1)
    assert turnover(100, 103, 0.3) == (30, 33)
    assert turnover(1400, 1400, 0.005) == (7, 7)
    for n in range(1, 2000):
        assert turnover(n, n, 0.07)[0] == -(-7 * n // 100)  # 0.07 n is 7.000000000000001 at 100


def test_the_start_has_exact_counts():
    sizes, thetas = [60, 300, 40], [0.0, 0.515, 0.1]
    keeps = layer_counts(sizes, thetas, 241)
    seen = []
    for seed in range(30):
        masks, _ = net_of(*([[1.] * size] for size in sizes))
        start_sparse(masks, keeps, seeded(seed, 0))
        assert masks.per_layer(masks.flat) == keeps and masks.n_alive == 241
        seen.append(masks.flat.double())
    mean = torch.stack(seen).mean(0)
    assert (mean[:60] == 1).all() and 0 < mean[60:360].min() and mean[60:360].max() < 1


# ---- an update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps, rate", [
    ([30, 70, 7], 0.5), ([10, 90, 1], 0.3), ([27, 60, 6], 0.005), ([54, 120, 12], 0.2)])
def test_an_update_against_a_loop(keeps, rate):
    generator = torch.Generator().manual_seed(4)
    masks, sgd = net_of(*(torch.randn(size, generator=generator).tolist()
                          for size in ((6, 9), (4, 30), (3, 4))))
    start_sparse(masks, [27, 60, 6], seeded(1))
    masks.apply(sgd)
    g = torch.rand(masks.total, generator=generator)
    before = [part.tolist() for part in masks.flat.clone().split(masks.sizes)]
    weights = [weight.detach().flatten().tolist() for weight in masks.weights.values()]
    wanted, pruned, grown = [], 0, 0
    for alive, w, score, keep in zip(before, weights, g.split(masks.sizes), keeps):
        places = [i for i, is_alive in enumerate(alive) if is_alive]
        n_drop = max(math.ceil(rate * len(places)), len(places) - keep)
        gone = sorted(places, key=lambda i: abs(w[i]))[:n_drop]
        stays = [i for i in places if i not in gone]
        others = [i for i in range(len(w)) if i not in stays]
        new = sorted(others, key=lambda i: -score[i])[:keep - len(stays)]
        wanted += [i in stays or i in new for i in range(len(w))]
        pruned, grown = pruned + len(gone), grown + len(new)
    update = drop_and_grow(masks, keeps, rate, g, seeded(2))
    assert masks.flat.tolist() == wanted and masks.per_layer(masks.flat) == keeps
    assert (count(update.pruned), count(update.regenerated)) == (pruned, grown)
    n_before = sum(map(sum, before))
    assert update.between == pytest.approx(1 - (n_before - pruned) / masks.total)


def test_ties():
    """Of equal gradients the larger |w| grows, that is what was dropped last; of equal |w| a draw
    decides."""
    seen = []
    for seed in range(60):
        masks, _ = net_of([[.9, -.5, .3, .2, 0., 0.]], [[1., 1., 1., 1.]])
        masks.flat[4:6] = False
        update = drop_and_grow(masks, [3, 2], 0.5, torch.zeros(10), seeded(seed))
        assert update.regenerated[:6].nonzero().flatten().tolist() == [2]
        seen.append(update.pruned[6:].double())
    assert (torch.stack(seen).mean(0) - 0.5).abs().max() < 0.25


def test_what_grows_at_random_is_a_draw_of_all_dead():
    masks, _ = net_of([[3., 2., 1., 0., 0., 0., 0., 0.]])
    seen = []
    for seed in range(200):
        masks.flat[:] = torch.arange(8) < 3
        generator = seeded(seed, 7)
        score = prune_ndsnn.random(masks, generator)
        update = drop_and_grow(masks, [3], 0.3, score, generator)
        assert update.pruned.nonzero().flatten().tolist() == [2]
        seen.append(update.regenerated.double())
    mean = torch.stack(seen).mean(0)
    assert (mean[:2] == 0).all() and (mean[2:] - 1 / 6).abs().max() < 0.09


@pytest.mark.parametrize("place", ["weight", "score"])
def test_what_is_not_finite_is_not_ranked(place):
    masks, _ = net_of([[1., 2., 3., 4.]])
    score = torch.rand(4)
    if place == "score":
        score[3] = math.inf
    else:
        next(iter(masks.weights.values())).data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="of l0.weight are not finite"):
        drop_and_grow(masks, [2], 0.5, score, seeded(0))
    assert masks.flat.all()


# ---- the script ----------------------------------------------------------------------------------


def spy(monkeypatch):
    """Keep what each update of a run was given, and what it made."""
    seen, real = [], prune_ndsnn.drop_and_grow

    def watch(masks, keeps, rate, score, generator):
        before = masks.flat.clone()
        made = real(masks, keeps, rate, score, generator)
        seen.append(dict(before=before, score=score.clone(), rate=rate, keeps=keeps,
                         dropped=made.pruned, grown=made.regenerated, after=masks.flat.clone(),
                         sizes=masks.sizes, gradients=masks.gradients()))
        return made

    monkeypatch.setattr(prune_ndsnn, "drop_and_grow", watch)
    return seen


def test_a_run(monkeypatch, capsys):
    seen = spy(monkeypatch)
    summary = run("--run-dir", "r", "--sparsity", 0.8)
    assert {path.name for path in Path("r").iterdir()} >= {
        "config.json", "metrics.jsonl", "updates.jsonl", "checkpoint.pt", "model.pt",
        "summary.json", "curves.png"}
    assert list(summary) == runfolder.SUMMARY_KEYS
    assert json.loads(Path("r/summary.json").read_text()) == summary
    assert (summary["script"], summary["method"], summary["regen"], summary["epochs"]) == (
        "prune_ndsnn", "ndsnn", None, 3)
    sizes = [layer["weights"] for layer in summary["layers"]]
    total = sum(sizes)
    alive = sum(layer["alive"] for layer in summary["layers"])
    assert alive == total - round(0.8 * total) and summary["sparsity"] == 1 - alive / total
    rows, updates = lines("r", "metrics"), lines("r", "updates")
    assert summary["test_accuracy"] == rows[-1]["test_accuracy"]
    assert summary["pruned_accuracy"] == rows[1]["test_accuracy"]
    assert [row["stage"] for row in rows] == ["prune", "prune", "finetune"]

    first = total - round(0.5 * total)
    assert int(seen[0]["before"].sum()) == first  # exactly half
    densities = [first / total] + [1 - row["sparsity"] for row in rows[:2]]
    assert summary["training_cost"] == pytest.approx(sum(densities) / 3)
    net = models.load("r/model.pt")
    shapes = [net.get_parameter(name).shape for name in models.scored_by(net)]
    wanted = plan(shapes, 0.8, 5)
    assert [row["iteration"] for row in updates] == [4, 8, 12, 16, 20]
    for k, (update, made) in enumerate(zip(updates, seen, strict=True), 1):
        assert update["target"] == pytest.approx(0.5 + 0.3 * (1 - (1 - k / 5) ** 3))
        keep = total - round(update["target"] * total)
        assert keep == int(made["after"].sum()) == sum(made["keeps"])
        assert made["rate"] == update["drop_rate"] == drop_rate(0.5, k, 5)
        assert [(layer["pruned"], layer["regenerated"], layer["alive"])
                for layer in update["layers"]] == [row[1:] for row in wanted[k - 1]]
        assert torch.equal(made["score"], made["gradients"])  # those of this batch, dead ones too
        assert (made["score"][~made["before"]] > 0).double().mean() > 0.3
        if k > 1:  # dead weights stay dead between updates
            assert torch.equal(made["before"], seen[k - 2]["after"])
    assert updates[-1]["target"] == 0.8
    assert sum(row["regenerated"] for row in updates) > 0 and (
        0 < summary["survived_by_regeneration"] < 1)
    masks = modelfile.read("r/model.pt")["masks"]
    final = torch.cat([mask.flatten() for mask in masks.values()])
    assert torch.equal(final, seen[-1]["after"])  # the mask is fixed from then on
    assert all(net.get_parameter(name)[~mask].count_nonzero() == 0 for name, mask in masks.items())
    state = torch.load("r/checkpoint.pt", weights_only=True)["parts"]["optimizer"]["state"]
    for i, (name, _) in enumerate(net.named_parameters()):
        if name in masks:
            assert not state[i]["momentum_buffer"][~masks[name]].any()
    out = capsys.readouterr().out
    assert "% test accuracy at 80.0 % sparsity -> r" in out
    never = {name: sum(not row[2] for row in column) for name, column in
             zip(masks, zip(*wanted))}
    assert without_growth(updates) == {name: n for name, n in never.items() if n}
    shown = ", ".join(f"{name} in {n}" for name, n in without_growth(updates).items())
    assert shown and f"grew nothing, of 5 updates: {shown}\n" in out


@pytest.mark.parametrize("given, method", [(SET, "set"), (RIGL, "rigl")])
def test_the_baselines_keep_their_density(given, method, monkeypatch, capsys):
    seen = spy(monkeypatch)
    summary = run("--run-dir", "r", "--densities", "er", *given)
    assert summary["method"] == method and summary["training_cost"] == pytest.approx(0.2, abs=1e-3)
    total = sum(layer["weights"] for layer in summary["layers"])
    for update, made in zip(lines("r", "updates"), seen, strict=True):
        assert update["pruned"] == update["regenerated"] > 0
        assert int(made["before"].sum()) == int(made["after"].sum()) == total - round(0.8 * total)
        assert made["keeps"] == seen[0]["keeps"]
        assert made["keeps"] == pytest.approx([0.2 * size for size in made["sizes"]], abs=1)
        is_gradient = torch.equal(made["score"], made["gradients"])
        assert is_gradient == (method == "rigl")
    scores = torch.stack([made["score"] for made in seen])
    assert (scores[0] != scores[1]).any()
    if method == "set":
        assert scores.mean() == pytest.approx(0.5, abs=0.02)
    assert "grew nothing, of 5 updates: no layer in any\n" in capsys.readouterr().out


def test_a_run_bit_by_bit(images):
    """The method, written separately: a sort, plain masks, no library of this project but for the
    start."""
    run("--run-dir", "r", "--sparsity", 0.75)
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 4, [4, 8, 16, 16]).to(memory_format=torch.channels_last)
    net.set_normalisation(images.mean, images.std)
    weights = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    sizes = [w.numel() for w in weights.values()]
    total = sum(sizes)
    first, final = ([1 - d for d in DENSITIES["erk"]([w.shape for w in weights.values()], mean)]
                    for mean in (0.5, 0.25))
    masks = Masks(net)
    keeps = layer_counts(sizes, first, total - round(0.5 * total))
    start_sparse(masks, keeps, seeded(0, 0))
    alive = {name: mask.clone() for name, mask in masks.alive.items()}
    for name, w in weights.items():
        w.data *= alive[name]
    sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4)
    iteration, n_grown = 0, 0
    for epoch in range(3):
        for x, y in data.batches(images.x_train, images.y_train, 20, 0, epoch, flip=True):
            step, steps = (iteration, 20) if epoch < 2 else (iteration - 20, 10)
            sgd.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / steps)) / 2
            iteration += 1
            loss = nn.functional.cross_entropy(net(x).reshape(-1, 10), torch.cat([y] * 4))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            for name, w in weights.items():
                w.data *= alive[name]
                sgd.state[w]["momentum_buffer"] *= alive[name]
            if iteration % 4 or iteration > 20:
                continue
            q = iteration // 4
            rate = 0.005 + 0.495 * (1 + math.cos(math.pi * q / 5)) / 2
            thetas = [b + (a - b) * (1 - q / 5) ** 3 for a, b in zip(first, final)]
            s = 0.75 - 0.25 * (1 - q / 5) ** 3
            keeps = layer_counts(sizes, thetas, total - round(s * total))
            for (name, w), keep in zip(weights.items(), keeps):
                old, size = alive[name].flatten(), w.detach().abs().flatten()
                g = w.grad.abs().flatten()
                places = old.nonzero().flatten()
                n_drop = max(math.ceil(rate * len(places)), len(places) - keep)
                new = old.clone()
                new[places[size[places].argsort()[:n_drop]]] = False
                dead = (~new).nonzero().flatten()
                n_grow = keep - int(new.sum())
                new[dead[g[dead].argsort(descending=True)[:n_grow]]] = True
                n_grown += int((new & ~old).sum())
                alive[name] = new.view(w.shape)
                w.data *= alive[name]
                sgd.state[w]["momentum_buffer"] *= alive[name]
    assert n_grown > 0
    packed = modelfile.read("r/model.pt")
    assert all(torch.equal(packed["masks"][name], alive[name]) for name in alive)
    for name, tensor in net.state_dict().items():
        assert torch.equal(packed["state_dict"][name], tensor), name


RAMP = ["--sparsity", 0.75]


@pytest.mark.parametrize("step, given", [
    (2, RAMP), (4, RAMP), (6, SET), (10, RAMP), (20, RAMP), (20, SET), (25, RAMP)])
def test_resume_bit_by_bit(step, given, monkeypatch, once):
    """Stop before the first update, at it, between two, at the end of an epoch, at the last update
    (the end of the stage), and in fine-tuning."""
    unbroken = once(run, *given)
    stop_after(step, monkeypatch, run, "--run-dir", "r", *given)
    run("--run-dir", "r", "--resume", short=False)  # all other flags come from its config.json
    assert_same_run(unbroken, "r")
    assert json.loads((unbroken / "summary.json").read_text())["survived_by_regeneration"] > 0


def test_smoke():
    summary = run("--smoke", short=False)
    assert summary["epochs"] == 2 and summary["widths"] == [4, 8, 16, 16]
    folder = next(Path("runs").iterdir())
    assert folder.name == "smoke-fashion-mini-small-ndsnn-0.9-seed0"
    assert len(lines(folder, "updates")) == 4


def test_names_of_runs_and_of_methods():
    names = {given: prune_ndsnn.parse_args(given.split()).run_dir for given in (
        "", "--growth random", "--density 0.3", "--drop-rate 0.3", "--densities er",
        "--sparsity 0.95", "--density 0.1", "--density 0.1 --growth random", "--seed 1",
        "--density 0.1 --drop-rate 0.3", "--dataset a/mine.npz")}
    assert len(set(names.values())) == len(names)
    assert names[""] == "runs/fashion-mini-small-ndsnn-0.9-seed0"
    assert names["--growth random"] == "runs/fashion-mini-small-ndsnn-0.9-random-seed0"
    assert names["--density 0.3"] == "runs/fashion-mini-small-ndsnn-0.9-from0.3-seed0"
    assert names["--density 0.1"] == "runs/fashion-mini-small-rigl-0.9-seed0"
    assert names["--density 0.1 --growth random"] == "runs/fashion-mini-small-set-0.9-seed0"
    for sparsity, density in ((0.93, 0.07), (0.95, 0.05), (0.98, 0.02), (0.7, 0.3)):
        given = ["--sparsity", str(sparsity), "--density", str(density)]
        assert method_of(prune_ndsnn.parse_args(given)) == "rigl"
        assert method_of(prune_ndsnn.parse_args([*given, "--growth", "random"])) == "set"


def test_defaults():
    args = prune_ndsnn.parse_args([])
    assert (args.sparsity, args.density, args.growth, args.drop_rate, args.densities) == (
        0.9, 0.5, "gradient", 0.5, "erk")
    assert (args.epochs_prune, args.epochs_finetune, args.interval) == (8, 4, 25)
    args = prune_ndsnn.parse_args(["--dataset", "cifar100"])
    assert (args.model, args.epochs_prune, args.interval) == ("vgg16", 200, 2000)
    assert prune_ndsnn.LOWEST_RATE == 0.005


@pytest.mark.parametrize("given, words", [
    ("--sparsity 90", "expected a number above 0 and below 1. For 90 % write 0.9"),
    ("--sparsity 0", "--sparsity is 0, expected a number above 0"),
    ("--sparsity 0.4", "--sparsity is 0.4, expected at least the 0.5 of the start. Raise it or"),
    ("--sparsity 0.9999", "expected at least one for each of the 5 layers"),
    ("--density 0", "--density is 0, expected a number above 0 and below 1"),
    ("--density 1", "--density is 1,"), ("--density nan", "--density is nan"),
    ("--drop-rate 0", "--drop-rate is 0,"), ("--drop-rate 1", "--drop-rate is 1,"),
    ("--drop-rate 0.001", "--drop-rate is 0.001, expected at least 0.005, to which it falls"),
    ("--growth momentum", "invalid choice"), ("--densities dense", "invalid choice"),
    ("--interval 21",
     "no update would ever run: --interval is 21, the pruning stage has 20 iterations"),
    ("--interval 0", "--interval is 0"), ("--epochs-prune 0", "--epochs-prune is 0"),
    ("--regen 0.5", "unrecognized arguments"), ("--init absent.pt", "absent.pt")])
def test_wrong_commands(given, words, capsys):
    assert words in refused(capsys, run, *given.split())
    assert [path.name for path in Path().rglob("*")] == ["tiny.npz"]  # nothing was written


def test_a_score_that_is_not_finite_ends_the_run(monkeypatch, capsys):
    monkeypatch.setitem(prune_ndsnn.GROWTH, "gradient",
                        lambda masks, generator: masks.gradients() * math.nan)
    assert "not finite" in refused(capsys, run, "--run-dir", "r", code=1)
    assert not Path("r/summary.json").exists()


def test_a_finished_run_is_left_alone(capsys):
    summary = run("--run-dir", "r", "--epochs-finetune", 0)
    capsys.readouterr()
    assert run("--run-dir", "r", "--resume", short=False) == summary
    assert "r is finished" in capsys.readouterr().out
    assert "--resume, replace it by --overwrite" in refused(capsys, run, "--run-dir", "r")
    again = run("--run-dir", "r", "--overwrite", "--epochs-finetune", 0)
    assert {k: v for k, v in again.items() if k not in TIMES} == {
        k: v for k, v in summary.items() if k not in TIMES}
