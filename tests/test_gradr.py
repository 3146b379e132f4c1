"""Grad R and Deep R: worked examples, plain loops, exact counts, and the script end to end."""
import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import data
import modelfile
import models
import prune_gradr
from harness import runfolder
import training
from helpers import assert_same_run, lines, one_line, refused, stop_after
from masks import Masks, seeded
from prune_gradr import (REVIVED, Connections, centre, choose_at_random, deep_r_step, default_prior,
                         ending, enough_draws, fix_mask, fixed_mask_step, follow, grad_r_step,
                         reach)

ROOT = Path(prune_gradr.__file__).parent
SHORT = ["--dataset", "mine.npz", "--epochs-prune", "2", "--epochs-finetune", "1", "--interval",
         "6", "--width", "0.25", "--time-steps", "2", "--batch-size", "10"]  # 16 steps an epoch


@pytest.fixture(autouse=True)
def the_script_and_its_images(monkeypatch, in_a_folder_of_its_own):
    monkeypatch.setattr(sys, "argv", ["prune_gradr.py"])
    images = np.load(ROOT / "assets/fashion_mini.npz")  # at half of the resolution
    np.savez("mine.npz", **{
        f"{part}_{split}": images[f"{part}_{split}"][:size, ::2, ::2] if part == "x"
        else images[f"{part}_{split}"][:size]
        for part in "xy" for split, size in (("train", 160), ("test", 40))})


def run(*given, short=True):
    return prune_gradr.main([*(SHORT if short else []), *map(str, given)])


def wrong(capsys, *given):
    return refused(capsys, run, *given)


class Weights(Namespace):
    """Stands for Masks: the weights of one or more layers, given as lists."""

    def __init__(self, *layers):
        super().__init__(weights={str(i): nn.Parameter(torch.tensor(w, dtype=torch.float32))
                                  for i, w in enumerate(layers)}, sizes=[len(w) for w in layers])


def settings(**changed):
    return Namespace(**dict(optimizer="adam", schedule="cosine", sparsity=0.95, lr=1e-3) | changed)


def drive(w, gradients, lr=1e-3, prior=1e-3, sparsity=0.95, **optimizer):
    """Return theta after each step of Grad R, from weights w and a list of gradients."""
    wires, thetas = Connections(Weights(w), **dict(momentum=0.9) | optimizer), []
    for g in gradients:
        grad_r_step(wires, torch.tensor(g), lr, prior, sparsity)
        thetas.append(wires.theta.tolist())
    return wires, thetas


# ---- Grad R --------------------------------------------------------------------------------------


def test_centre_of_the_prior():
    assert centre(0.95, 1e-3) == pytest.approx(-2302.585, abs=1e-3)
    assert centre(0.5, 1e-3) == 0 and centre(0.95, 0) == -math.inf
    for p, a in ((0.6, 0.1), (0.9, 2.0), (0.99, 30.0)):
        c = centre(p, a)  # c < 0: P(theta < 0) of a Laplacian is 1 - exp(a c) / 2
        assert c < 0 and 1 - math.exp(a * c) / 2 == pytest.approx(p)


@pytest.mark.parametrize("sign", [1, -1])
def test_worked_example(sign):
    """theta .0005; gradient +2, then -2, along the sign: below 0, and part of the way back."""
    wires, thetas = drive([sign * 0.0005], [[sign * 2.0], [-sign * 2.0]])
    assert thetas[0][0] == pytest.approx(-0.00051, rel=1e-6)
    assert thetas[1][0] == pytest.approx(-0.00046263157, rel=1e-6)
    wires.write()
    assert wires.weights[0].item() == 0 and not wires.active.any()


def test_worked_example_without_gradient():
    """The prior alone: its first step is 10 a lr, by the bias correction."""
    _, thetas = drive([0.0005], [[0.0]] * 3)
    assert sum(thetas, []) == pytest.approx([0.00049, 0.000484736842, 0.000481046805], rel=1e-6)


def test_a_dormant_weight_returns():
    for sign in (1, -1):  # the gradient pushes w along its sign
        wires, thetas = drive([sign * 0.0005], [[sign * 2.0]] * 20 + [[-sign * 2.0]] * 150)
        assert thetas[19][0] < -0.01 and thetas[-1][0] > 0
        wires.write()
        assert wires.weights[0].item() * sign == pytest.approx(thetas[-1][0])
        assert wires.active.all()


def by_hand(w, gradients, lr, a, p, optimizer="adam", momentum=0.9):
    """Grad R weight by weight, in Python's floating point."""
    c, thetas = math.log(2 * (1 - p)) / a, []
    for i, start in enumerate(w):
        sign, theta, u, v = (1 if start > 0 else -1), abs(start), 0.0, 0.0
        for t, row in enumerate(gradients, 1):
            g = row[i]
            pull = a * ((theta > c) - (theta < c))
            if optimizer == "sgd":
                u = momentum * u + g
                z = sign * theta - lr * (u + pull * sign)
            else:
                u, v = 0.9 * u + 0.1 * g, 0.999 * v + 0.001 * g * g
                eta = lr / (1 - 0.9 ** t)
                den = math.sqrt(v) / math.sqrt(1 - 0.999 ** t) + 1e-8
                z = sign * theta - eta * u / den - eta * pull * sign
            theta = sign * z
        thetas.append(theta)
    return thetas


@pytest.mark.parametrize("given", [
    dict(a=1e-3, p=0.95, lr=0.01), dict(a=0.7, p=0.9, lr=0.01), dict(a=8.0, p=0.6, lr=0.01),
    dict(a=0.3, p=0.5, lr=0.01), dict(a=0.5, p=0.9, lr=0.05, optimizer="sgd"),
    dict(a=0.5, p=0.9, lr=0.05, optimizer="sgd", momentum=0.0)])
def test_grad_r_equals_a_plain_loop(given):
    rng = np.random.default_rng(0)
    w = rng.normal(0, 0.1, 40).tolist()
    gradients = rng.normal(rng.normal(0, 1, 40), 1, (60, 40)).tolist()
    expected = by_hand(w, gradients, **given)
    own = {"prior": given["a"], "sparsity": given["p"]} | {
        k: v for k, v in given.items() if k in ("lr", "optimizer", "momentum")}
    wires, thetas = drive(w, gradients, **own)
    # a strength that has arrived at its centre jumps from side to side of it: by one step at most
    assert np.allclose(thetas[-1], expected, atol=2e-5), np.abs(
        np.array(thetas[-1]) - expected).max()
    assert (np.array(expected) < 0).any() and (np.array(expected) > 0).any()


def test_without_prior_strengths_above_0_follow_torch_s_adam():
    rng = np.random.default_rng(1)
    w = torch.tensor(rng.uniform(1, 2, 30) * rng.choice([-1, 1], 30), dtype=torch.float32)
    parameter = nn.Parameter(w.clone())
    adam = torch.optim.Adam([parameter], 1e-3)
    wires = Connections(Weights(w.tolist()))
    for _ in range(50):
        parameter.grad = torch.tensor(rng.normal(0, 1, 30), dtype=torch.float32)
        adam.step()
        grad_r_step(wires, parameter.grad, 1e-3, prior=0.0, target=0.95)
    wires.write()
    assert torch.allclose(wires.weights[0], parameter, atol=1e-6)


def test_the_target_moves_nothing_where_the_centre_is_out_of_reach():
    rng = np.random.default_rng(2)
    w, gradients = rng.normal(0, 0.02, 50).tolist(), rng.normal(0, 1, (100, 50)).tolist()

    def end(p, a):
        return drive(w, gradients, prior=a, sparsity=p)[0].theta

    assert torch.equal(end(0.6, 1e-3), end(0.95, 1e-3))
    assert not torch.equal(end(0.5, 1e-3), end(0.95, 1e-3))  # c = 0: a pull to 0 from both sides
    assert not torch.equal(end(0.6, 5.0), end(0.95, 5.0))


def test_the_direction_is_less_than_90_degrees_off_the_true_gradient():
    torch.manual_seed(0)
    sign, theta = torch.randn(100).sign(), torch.randn(100, requires_grad=True)
    w = sign * theta.clamp(min=0)
    g, = torch.autograd.grad(((w @ torch.randn(100, 5)) ** 2).sum(), w, retain_graph=True)
    true, = torch.autograd.grad((w * g).sum(), theta)
    wires = Connections(Weights([1.0] * 100), "sgd")
    wires.sign, wires.theta = sign, theta.detach().clone()
    grad_r_step(wires, g, 1.0, prior=0.0, target=0.95)
    moved = theta.detach() - wires.theta
    assert torch.allclose(moved, g * sign, atol=1e-4) and (moved[theta <= 0] != 0).any()
    assert (moved @ true) / (moved.norm() * true.norm()) > 0


def test_a_weight_that_starts_at_0_can_wake_up():
    wires, _ = drive([0.0, 0.5], [[-1.0, 0.0]] * 3, prior=0.0)
    assert wires.theta[0] > 0 and wires.active.all()


def test_weight_decay_acts_on_the_weight_and_not_on_a_dormant_strength():
    wires = Connections(Weights([0.5, -0.25], [1.0]), decay=0.1)
    wires.theta[1] = -3.0
    wires.write()
    for weight in wires.weights:
        weight.grad = torch.zeros_like(weight)
    assert wires.gradients().tolist() == pytest.approx([0.05, 0.0, 0.1])


def test_writing_keeps_the_storage_and_the_memory_format():
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 4).to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    places = {name: (p.data_ptr(), p.stride()) for name, p in net.named_parameters()}
    wires = Connections(masks := Masks(net))
    wires.write()
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())
    wires.theta -= 0.05
    wires.active = wires.theta > 0
    wires.write()
    assert places == {name: (p.data_ptr(), p.stride()) for name, p in net.named_parameters()}
    for name, weight in masks.weights.items():
        w = before[name]
        assert torch.equal(weight, w.sign() * (w.abs() - 0.05).clamp(min=0))


# ---- Deep R --------------------------------------------------------------------------------------


def some_wires(n=200, keep=40, optimizer="adam", momentum=0.9):
    torch.manual_seed(0)
    wires = Connections(Weights(torch.randn(n).mul(0.02).tolist()), optimizer, momentum)
    alive = torch.zeros(n, dtype=torch.bool)
    alive[torch.randperm(n)[:keep]] = True
    wires.fix(alive)
    return wires


@pytest.mark.parametrize("optimizer, temperature", [("adam", 0.0), ("adam", 1e-4), ("sgd", 1e-3)])
def test_as_many_connections_after_every_step(optimizer, temperature):
    wires, changed = some_wires(optimizer=optimizer), 0
    for _ in range(200):
        before = wires.active.clone()
        deep_r_step(wires, torch.randn(200), 0.01, 0.1, temperature, 40)
        changed += int((before ^ wires.active).sum())
        assert wires.active.sum() == 40
        assert (wires.theta[~wires.active] == 0).all() and (wires.theta[wires.active] >= 0).all()
        assert (wires.first[~wires.active] == 0).all() and (wires.second[~wires.active] == 0).all()
    assert changed > 100


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_deep_r_equals_a_plain_loop(optimizer):
    wires, lr, l1, temperature = some_wires(60, 20, optimizer), 0.01, 0.2, 1e-3
    theta, active = wires.theta.tolist(), wires.active.tolist()
    u, v, reborn = [0.0] * 60, [0.0] * 60, 0
    for t in range(1, 31):
        g = torch.randn(60)
        state = torch.get_rng_state()
        noise, order = torch.randn(60).tolist(), torch.randperm(60).tolist()
        torch.set_rng_state(state)
        deep_r_step(wires, g, lr, l1, temperature, 20)
        died = []
        for i in range(60):
            if not active[i]:
                continue
            if optimizer == "sgd":
                u[i] = 0.9 * u[i] + g[i].item()
                move = lr * u[i]
            else:
                u[i] = 0.9 * u[i] + 0.1 * g[i].item()
                v[i] = 0.999 * v[i] + 0.001 * g[i].item() ** 2
                move = lr / (1 - 0.9 ** t) * u[i] / (math.sqrt(v[i] / (1 - 0.999 ** t)) + 1e-8)
            theta[i] -= wires.sign[i].item() * move
            theta[i] -= lr * l1
            theta[i] += math.sqrt(2 * lr * temperature) * noise[i]
            if theta[i] < 0:
                died.append(i)
        for i in died:
            active[i], theta[i], u[i], v[i] = False, 0.0, 0.0, 0.0
        free = [i for i in order if not active[i]]
        for i in free[:len(died)]:
            active[i], theta[i] = True, 1e-12
        reborn += len(set(died) & set(free[:len(died)]))
        assert wires.active.tolist() == active
        assert np.allclose(wires.theta.tolist(), theta, atol=1e-6)
    assert reborn  # what has just fallen asleep may be drawn as well


def test_a_new_connection_starts_after_l1_noise_and_pruning_and_then_grows():
    """With rewiring before any of them it would be pushed below 0, or pruned at once."""
    wires = some_wires(optimizer="sgd", momentum=0.0)
    loser = int(wires.active.nonzero()[0])
    wires.first.fill_(0.5)
    wires.theta[loser] = 1e-6  # the L1 takes it below 0
    before = wires.active.clone()
    zero = torch.zeros(200)
    deep_r_step(wires, zero, 0.01, 0.01, 0.0, 40)
    born = wires.theta == torch.tensor(REVIVED)
    assert born.sum() == 1 and wires.active[born].all()
    assert (wires.first[born] == 0).all()
    assert (wires.active & ~before & ~born).sum() == 0
    wires.write()
    w = wires.weights[0][born]
    assert w != 0 and w.sign() == wires.sign[born]  # the sign of the start, not +
    g = torch.where(born, -wires.sign, 0.0)  # along its sign
    wires.optimizer = "adam"
    deep_r_step(wires, g, 0.01, 0.01, 0.0, 40)
    wires.write()
    assert wires.active[born].all()
    assert wires.weights[0][born] * wires.sign[born] > 0.005


def test_without_noise_and_learning_rate_only_rewiring_moves():
    wires = some_wires()
    dead = wires.active.nonzero()[:3].flatten()
    wires.theta[dead] = -0.1
    theta, active = wires.theta.clone(), wires.active.clone()
    deep_r_step(wires, torch.randn(200), 0.0, 1e-3, 0.0, 40)
    stayed = active.clone()
    stayed[dead] = False
    assert torch.equal(wires.theta[stayed], theta[stayed]) and wires.active[stayed].all()
    born = wires.active & ~stayed
    assert born.sum() == 3 and (wires.theta[born] == REVIVED).all()
    assert (wires.theta[~wires.active] == 0).all()


def test_noise_has_the_size_that_temperature_gives():
    wires = Connections(Weights([5.0] * 40_000))
    deep_r_step(wires, torch.zeros(40_000), 0.1, 0.0, 0.02, 40_000)
    moved = wires.theta - 5
    assert moved.std().item() == pytest.approx(math.sqrt(2 * 0.1 * 0.02), rel=0.02)
    assert abs(moved.mean().item()) < 0.002


def test_draws_are_exact_and_uniform():
    torch.manual_seed(0)
    candidates = torch.zeros(12, dtype=torch.bool)
    candidates[[1, 3, 4, 8, 10]] = True
    hits = torch.zeros(12)
    for _ in range(3000):
        chosen = choose_at_random(candidates, torch.tensor(2), 2, 3)
        assert chosen.sum() == 2 and not (chosen & ~candidates).any()
        hits += chosen
    assert np.allclose(hits[candidates] / 3000, 2 / 5, atol=0.04)
    assert choose_at_random(candidates, torch.tensor(0), 0, 5).sum() == 0
    assert torch.equal(choose_at_random(candidates, torch.tensor(5), 5, 0), candidates)


SHAPES = [(400, 300, 2, 2), (400, 300, 0, 0), (400, 300, 40, 40), (400, 300, 40, 150),
          (5000, 4600, 100, 500), (5000, 2500, 1, 1), (5000, 4999, 500, 500), (90, 80, 9, 9),
          (5000, 40, 9, 20), (64, 64, 64, 64)]


@pytest.mark.parametrize("places,n_candidates,number,most", SHAPES)
def test_a_draw_takes_what_a_plain_loop_takes(places, n_candidates, number, most):
    """most: what the host knows of the number. The last rows take an order of all places."""
    torch.manual_seed(places + most)
    spare, drawn_again = n_candidates - most, 0
    for _ in range(30):
        candidates = torch.zeros(places, dtype=torch.bool)
        candidates[torch.randperm(places)[:n_candidates]] = True
        state = torch.get_rng_state()
        n_draws = enough_draws(places, most, spare)
        if n_draws < places:
            order = torch.randint(places, (n_draws,)).tolist()
        else:
            order = torch.randperm(places).tolist()
        torch.set_rng_state(state)
        chosen = choose_at_random(candidates, torch.tensor(number), most, spare)
        taken = []
        for place in order:
            if len(taken) < number and candidates[place]:
                drawn_again += place in taken
                if place not in taken:
                    taken.append(place)
        assert sorted(taken) == chosen.nonzero().flatten().tolist() and len(taken) == number
    assert drawn_again or number < 9 or n_draws >= places


def test_all_subsets_of_a_draw_are_as_likely():
    """Of 120 places, 110 of them candidates: pairs of the first three, and each place alone."""
    torch.manual_seed(1)
    candidates = torch.ones(120, dtype=torch.bool)
    candidates[50:60] = False
    rounds, number = 4000, torch.tensor(30)
    assert enough_draws(120, 0, 110) < 120  # by draws, not by an order of all places
    hits, pairs = torch.zeros(120), torch.zeros(3)
    for _ in range(rounds):
        chosen = choose_at_random(candidates, number, 0, 110)  # more than enough draws
        hits += chosen
        pairs += torch.stack([chosen[0] & chosen[1], chosen[0] & chosen[2], chosen[1] & chosen[2]])
    share = hits[candidates] / rounds
    expected = 30 / 110
    error = math.sqrt(expected * (1 - expected) / rounds)
    assert (share - expected).abs().max() < 4.5 * error and hits[~candidates].sum() == 0
    together = expected * 29 / 109
    assert np.allclose(pairs / rounds, together, atol=4.5 * math.sqrt(together / rounds))


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("all_lost", [True, False])
def test_draws_are_enough(sparsity, all_lost):
    """Deep R with all K active connections lost at once, and with none."""
    places, torch_seed = 20_000, 3
    torch.manual_seed(torch_seed)
    keep = round(places * (1 - sparsity))
    assert enough_draws(places, keep, places - keep) < places
    for _ in range(100):
        if all_lost:
            candidates, number = torch.ones(places, dtype=torch.bool), keep
        else:
            candidates, number = torch.arange(places) >= keep, 0
        chosen = choose_at_random(candidates, torch.tensor(number), keep, places - keep)
        assert chosen.sum() == number


# ---- the end of the structure epochs -------------------------------------------------------------


def small_net():
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 14, 2, [4, 8, 16, 16])
    return net, Masks(net)


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.5])  # too many, too many, none active
def test_exactly_k_largest_strengths_stay(shift):
    net, masks = small_net()
    wires = Connections(masks)
    wires.theta = torch.randn(masks.total) * 0.05 - shift
    wires.active = wires.theta > 0
    masks.flat.copy_(wires.active)
    expected = torch.zeros(masks.total, dtype=torch.bool)
    keep = masks.keep_at(0.9)
    expected[wires.theta.argsort(descending=True)[:keep]] = True
    theta = wires.theta.clone()
    before = wires.active.clone()
    assert "20 % off" in ending(masks.n_alive, keep)
    change = fix_mask(keep, masks, wires, seeded(0))
    assert torch.equal(masks.flat, expected) and torch.equal(wires.active, expected)
    assert torch.equal(wires.theta, torch.where(expected, theta.clamp(min=0), 0))
    assert masks.n_alive == keep and not change.rescued
    assert torch.equal(change.pruned, before & ~expected)
    assert torch.equal(change.regenerated, expected & ~before)
    assert change.between == pytest.approx(1 - int((before & expected).sum()) / masks.total)
    for name, weight in masks.weights.items():
        assert weight[~masks.alive[name]].count_nonzero() == 0


def test_a_layer_that_is_all_dormant_keeps_its_largest_strength():
    net, masks = small_net()
    wires = Connections(masks)
    wires.theta[-masks.sizes[-1]:] = -1.0
    best = masks.total - 5
    wires.theta[best] = -0.5  # its weight is 0, as all of the layer are
    wires.active = wires.theta > 0
    wires.write()
    masks.flat.copy_(wires.active)
    change = fix_mask(masks.keep_at(0.9), masks, wires, seeded(0))
    assert masks.flat[best] and masks.n_alive == masks.keep_at(0.9)
    assert masks.per_layer(masks.flat)[-1] == 1 and change.rescued == ["fc.weight"]


def test_deep_r_s_connections_stay_as_they_are():
    """Also one at exactly 0, which no dormant one replaces."""
    net, masks = small_net()
    wires, keep = Connections(masks), masks.keep_at(0.9)
    alive = torch.zeros(masks.total, dtype=torch.bool)
    alive[torch.randperm(masks.total)[:keep]] = True
    wires.theta[alive.nonzero()[:9]] = 0.0
    masks.flat.copy_(alive)
    wires.fix(alive)
    assert ending(masks.n_alive, keep).endswith(f"ended with {keep:,} connections")
    assert fix_mask(keep, masks, wires, seeded(0)) is None
    assert torch.equal(masks.flat, alive) and torch.equal(wires.active, alive)


def test_the_masks_follow_the_connections():
    net, masks = small_net()
    wires = Connections(masks)
    wires.active = torch.rand(masks.total) < 0.5
    first, before = follow(masks, wires), wires.active.clone()
    assert torch.equal(first.pruned, ~before) and not first.regenerated.any()
    wires.active = torch.rand(masks.total) < 0.5
    change = follow(masks, wires)
    assert torch.equal(masks.flat, wires.active)
    assert torch.equal(change.pruned, before & ~wires.active)
    assert torch.equal(change.regenerated, wires.active & ~before)
    assert change.between == pytest.approx(1 - int((before & wires.active).sum()) / masks.total)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_with_the_mask_fixed(optimizer):
    """theta >= 0, the dead stay dead and without momentum, and no prior pulls."""
    wires = some_wires(optimizer=optimizer)
    wires.first.fill_(0.3), wires.second.fill_(0.3)
    wires.fix(wires.active)
    alive = wires.active.clone()
    assert (wires.first[~alive] == 0).all() and (wires.second[~alive] == 0).all()
    for _ in range(60):
        fixed_mask_step(wires, torch.randn(200), 0.01)
        wires.write()
        assert torch.equal(wires.active, alive) and (wires.theta >= 0).all()
        assert wires.weights[0][~alive].count_nonzero() == 0
        assert (wires.first[~alive] == 0).all()
    assert (wires.theta[alive] == 0).any()
    wires.first.zero_()
    theta = wires.theta.clone()
    fixed_mask_step(wires, torch.zeros(200), 0.01)  # neither prior, nor L1, nor noise
    assert torch.equal(wires.theta, theta)


def test_the_sum_of_the_rates_is_what_the_prior_moves():
    steps = 400
    for optimizer in ("adam", "sgd"):
        wires, lr = Connections(Weights([1.0]), optimizer, 0.9), 1e-3
        for step in range(steps):
            grad_r_step(wires, torch.zeros(1), training.cosine(lr, step, steps), 0.5, 0.95)
        moved = 1 - wires.theta.item()
        assert moved == pytest.approx(0.5 * reach(optimizer, "cosine", lr, steps), rel=0.01)
    assert sum(0.9 ** t / (1 - 0.9 ** t) for t in range(1, 999)) == pytest.approx(27, abs=0.1)


def test_the_default_prior():
    for optimizer, lr in prune_gradr.TUNED_LR.items():
        def of(sparsity):
            return default_prior(settings(sparsity=sparsity, optimizer=optimizer, lr=lr), 752)

        for density, a in prune_gradr.PRIOR[optimizer].items():
            assert of(1 - density) == pytest.approx(a)
        scales = [of(s) for s in (0.5, 0.75, 0.8, 0.9, 0.95, 0.98, 0.995)]
        assert scales == sorted(set(scales))  # beyond the table too
    pulls = [default_prior(settings(sparsity=0.9, lr=lr), steps) * reach(
        "adam", "cosine", lr, steps) for lr, steps in ((1e-3, 752), (1e-4, 78_200))]
    assert pulls[0] == pytest.approx(pulls[1])


# ---- the script ----------------------------------------------------------------------------------


def test_a_run_of_grad_r_and_its_folder(capsys):
    summary = run("--run-dir", "r", "--sparsity", 0.8, "--prior", 0.3, "--lr", 0.01)
    assert {path.name for path in Path("r").iterdir()} == {
        "config.json", "metrics.jsonl", "updates.jsonl", "checkpoint.pt", "model.pt",
        "compact.pt", "summary.json", "curves.png"}
    assert list(summary) == runfolder.SUMMARY_KEYS and summary["method"] == "gradr"
    assert summary["script"] == "prune_gradr" and summary["regen"] is None
    total = sum(layer["weights"] for layer in summary["layers"])
    keep = total - round(0.8 * total)
    assert sum(layer["alive"] for layer in summary["layers"]) == keep
    rows, updates = lines("r", "metrics"), lines("r", "updates")
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("prune", 1), ("prune", 2), ("finetune", 3)]
    assert [row["iteration"] for row in updates] == [6, 12, 18, 24, 30, 32, 32]
    assert [row["target"] for row in updates] == [None] * 6 + [0.8]
    assert len({row["sparsity"] for row in updates}) > 4  # an outcome, and not a setting
    alive = total
    for row in updates:
        alive += row["regenerated"] - row["pruned"]
        assert alive == sum(layer["alive"] for layer in row["layers"])
        assert row["sparsity"] == pytest.approx(1 - alive / total)
        assert row["before"] == pytest.approx(
            1 - (alive - row["regenerated"]) / total)
    assert updates[-1]["sparsity"] == rows[1]["sparsity"] == rows[2]["sparsity"]
    assert sum(row["regenerated"] for row in updates[:-1]) > 0  # dormant weights came back
    assert summary["training_cost"] == pytest.approx(
        (1 + (1 - rows[0]["sparsity"]) + (1 - rows[1]["sparsity"])) / 3)
    assert summary["pruned_accuracy"] == rows[1]["test_accuracy"]
    config = json.loads(Path("r/config.json").read_text())
    assert config["prior"] > 0 and config["lr"] == 0.01 and config["weight_decay"] == 0
    net, masks = models.load("r/model.pt"), modelfile.read("r/model.pt")["masks"]
    assert all(net.get_parameter(name)[~mask].count_nonzero() == 0 for name, mask in masks.items())
    out = capsys.readouterr().out
    assert "out of reach" in out and f"{keep:,} are asked for" in out


def test_a_run_of_deep_r():
    summary = run("--run-dir", "r", "--sparsity", 0.85, "--method", "deepr", "--lr", 0.01)
    total = sum(layer["weights"] for layer in summary["layers"])
    keep = total - round(0.85 * total)
    assert summary["method"] == "deepr"
    assert all(row["sparsity"] == 1 - keep / total for row in lines("r", "metrics"))
    assert summary["training_cost"] == pytest.approx(keep / total)  # from the start
    updates = lines("r", "updates")
    assert [row["iteration"] for row in updates] == [6, 12, 18, 24, 30, 32]
    for row in updates:
        assert sum(layer["alive"] for layer in row["layers"]) == keep and row["target"] == 0.85
    # the first line also counts the draw at the start, from a mask of all weights
    assert all(row["pruned"] == row["regenerated"] for row in updates)
    assert all(row["pruned"] > 0 for row in updates[:-1])  # that one is of two steps
    assert 0 < summary["survived_by_regeneration"] < 1
    config = json.loads(Path("r/config.json").read_text())
    assert config["prior"] == 1e-5
    assert math.sqrt(2 * 0.01 * config["temperature"]) == pytest.approx(1e-5 * 0.01)


def test_grad_r_written_separately():
    """A plain version, layer by layer, with no library of this project around its updates."""
    run("--run-dir", "r", "--prior", 0.2, "--sparsity", 0.7, "--lr", 0.01)
    images = data.load("mine.npz")
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 14, 2, [4, 8, 16, 16]).to(memory_format=torch.channels_last)
    net.set_normalisation(images.mean, images.std)
    weights = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    theta = {n: w.detach().abs() for n, w in weights.items()}
    sign = {n: w.detach().sign() for n, w in weights.items()}
    u, v = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    adam = torch.optim.Adam([p for n, p in net.named_parameters() if n not in weights], 0.01)
    alive, t, c = None, 0, math.log(2 * (1 - 0.7)) / 0.2
    for epoch in range(3):
        for x, y in data.batches(images.x_train, images.y_train, 10, 0, epoch, flip=True):
            step, steps = (t, 32) if epoch < 2 else (t - 32, 16)
            lr = 0.01 * (1 + math.cos(math.pi * step / steps)) / 2
            adam.param_groups[0]["lr"] = lr
            t += 1
            loss = torch.nn.functional.cross_entropy(net(x).reshape(-1, 10), torch.cat([y] * 2))
            net.zero_grad()
            loss.backward()
            adam.step()
            for n, w in weights.items():
                g = w.grad if alive is None else w.grad * alive[n]
                u[n] = u[n].lerp(g, 1 - 0.9)  # in the roundings of the script
                v[n] = (0.999 * v[n]).addcmul(g, g, value=1 - 0.999)
                eta = lr / (1 - 0.9 ** t)
                z = sign[n] * theta[n] - eta * u[n] / (
                    v[n].sqrt() / math.sqrt(1 - 0.999 ** t) + 1e-8)
                if alive is None:
                    z = z - eta * (0.2 * (theta[n] - c).sign()) * sign[n]
                theta[n] = sign[n] * z
                if alive is not None:
                    theta[n] = theta[n].clamp(min=0) * alive[n]
                w.data.copy_(sign[n] * theta[n].clamp(min=0))
            if t == 32:
                row = torch.cat([part.reshape(-1) for part in theta.values()])
                keep = len(row) - round(0.7 * len(row))
                threshold = row.sort(descending=True).values[keep - 1]
                alive = {n: part >= threshold for n, part in theta.items()}
                for n, mask in alive.items():
                    if not mask.any():  # its largest stays, in the place of the smallest of all
                        mask |= theta[n] == theta[n].max()
                        for other, part in theta.items():
                            alive[other] &= part != threshold
                for n, w in weights.items():
                    theta[n] = theta[n].clamp(min=0) * alive[n]
                    u[n], v[n] = u[n] * alive[n], v[n] * alive[n]
                    w.data.copy_(sign[n] * theta[n])
    packed = modelfile.read("r/model.pt")
    assert all(torch.equal(packed["masks"][name], alive[name]) for name in alive)
    for name, tensor in net.state_dict().items():
        assert torch.equal(packed["state_dict"][name], tensor), name


def test_the_target_moves_nothing_in_a_run_until_the_trim():
    for s in (0.6, 0.95):
        run("--sparsity", s, "--prior", 1e-3, "--run-dir", f"r{s}", "--epochs-finetune", 0)
    one, other = lines("r0.6", "updates"), lines("r0.95", "updates")
    assert one[:-1] == other[:-1] and one[-1] != other[-1]
    rows = lines("r0.6", "metrics")[0], lines("r0.95", "metrics")[0]
    assert rows[0] | dict(seconds=0) == rows[1] | dict(seconds=0)


def test_dead_weights_stay_dead_while_fine_tuning():
    for method in ("gradr", "deepr"):
        run("--run-dir", method, "--method", method, "--epochs-finetune", 2)
        masks = modelfile.read(f"{method}/model.pt")["masks"]
        fixed = {layer["name"]: layer["alive"]
                 for layer in lines(method, "updates")[-1]["layers"]}
        assert {name: int(mask.sum()) for name, mask in masks.items()} == fixed
        wires = torch.load(f"{method}/checkpoint.pt", weights_only=True)["parts"]["wires"]
        flat = torch.cat([mask.flatten() for mask in masks.values()])
        assert torch.equal(wires["active"], flat) and (wires["theta"][~flat] == 0).all()
        assert (wires["first"][~flat] == 0).all() and (wires["second"][~flat] == 0).all()
        net = models.load(f"{method}/model.pt")
        w = torch.cat([net.get_parameter(name).flatten() for name in masks])
        assert (w * wires["sign"] >= 0).all()  # no sign ever changes


@pytest.mark.parametrize("given", [[], ["--method", "deepr"], ["--optimizer", "sgd"]])
@pytest.mark.parametrize("step", [9, 32, 40])  # between two updates, at the trim, in fine-tuning
def test_a_stopped_run_goes_on_bit_by_bit(given, step, monkeypatch, once):
    stop_after(step, monkeypatch, run, "--run-dir", "r", *given)
    run("--run-dir", "r", "--resume", short=False)  # all flags come from its config.json
    assert_same_run(once(run, *given), "r")


def test_deep_r_from_a_dense_network_goes_on_bit_by_bit(monkeypatch):
    net, _ = small_net()
    images = data.load("mine.npz")
    net.set_normalisation(images.mean, images.std)
    torch.save(modelfile.pack(net), "dense.pt")
    given = ["--method", "deepr", "--init", "dense.pt", "--temperature", "1e-6", "--prior", "0.01",
             "--precision", "bf16"]
    summary = run("--run-dir", "unbroken", *given)
    args = Namespace(batch_size=10, device="cpu", precision="bf16", loss="ce")
    assert summary["dense_accuracy"] == pytest.approx(
        training.evaluate(net, net, images.pairs("test", 40), args)["accuracy"])
    stop_after(5, monkeypatch, run, "--run-dir", "r", *given)
    run("--run-dir", "r", "--resume", short=False)
    assert_same_run("unbroken", "r")


def test_smoke_and_the_settings_of_cifar100():
    rng = np.random.default_rng(0)
    Path("data").mkdir()
    x, y = rng.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8), np.arange(300) % 100
    np.savez("data/cifar100.npz", x_train=x, y_train=y, x_test=x[:100], y_test=y[:100])
    summary = run("--dataset", "cifar100", "--smoke", "--width", 0.125, short=False)
    assert summary["model"] == "vgg16" and summary["epochs"] == 2
    folder = next(Path("runs").glob("smoke-cifar100-vgg16-gradr-0.9-*seed0"))
    config = json.loads((folder / "config.json").read_text())
    assert config["lr"] == 1e-4 and config["time_steps"] == 5
    assert all(layer["alive"] > 0 for layer in summary["layers"])
    assert run("--smoke", "--method", "deepr", short=False)["method"] == "deepr"


def test_defaults_and_names(capsys):
    parse = prune_gradr.parse_args
    adam, sgd = parse(["--dataset", "cifar100"]), parse(["--dataset", "cifar10", "--optimizer",
                                                         "sgd"])
    assert (adam.epochs_prune, adam.epochs_finetune, adam.lr, adam.weight_decay) == (
        200, 300, 1e-4, 0)
    assert (sgd.lr, sgd.weight_decay, sgd.momentum) == (0.3, 5e-4, 0.9)
    small = parse([])
    assert (small.epochs_prune, small.epochs_finetune, small.interval, small.lr,
            small.sparsity) == (8, 4, 25, 1e-3, 0.9)
    names = {parse(given.split()).run_dir for given in (
        "", "--method deepr", "--sparsity 0.95", "--prior 0.5", "--optimizer sgd", "--seed 1",
        "--method deepr --temperature 0", "--method deepr --prior 0")}
    assert len(names) == 8 and "runs/fashion-mini-small-gradr-0.9-seed0" in names
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0 and "None" not in capsys.readouterr().out


@pytest.mark.parametrize("given, words", [
    ("--sparsity 0.4", "--sparsity is 0.4, expected at least 0.5 with --method gradr"),
    ("--sparsity 0", "expected a number above 0"), ("--sparsity 90", "For 90 % write 0.9"),
    ("--sparsity 0.9999", "expected at least one for each of the 5 layers"),
    ("--temperature 1", "--temperature is 1.0, which --method gradr does not use"),
    ("--momentum 0.5", "--momentum is 0.5, which --optimizer adam does not use. Leave one of "
                       "them out"),
    ("--prior -1", "--prior is -1"), ("--prior nan", "--prior is nan"),
    ("--method deepr --temperature inf", "--temperature is inf"),
    ("--method granet", "invalid choice"), ("--optimizer lion", "invalid choice"),
    ("--interval 0", "--interval is 0"), ("--run-dir full", "holds no run")])
def test_wrong_commands(given, words, capsys):
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("text")
    before = sorted(Path().rglob("*"))
    assert words in wrong(capsys, *given.split())
    assert sorted(Path().rglob("*")) == before


def test_deep_r_may_be_less_than_half_sparse():
    summary = run("--method", "deepr", "--sparsity", 0.3, "--epochs-finetune", 0)
    assert summary["sparsity"] == pytest.approx(0.3, abs=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(capsys, monkeypatch):
    loss_over_time, seen = training.loss_over_time, []

    def explode(logits, labels, kind):
        seen.extend([None] * logits.requires_grad)
        return loss_over_time(logits, labels, kind) * (math.nan if len(seen) == 21 else 1)

    monkeypatch.setattr(training, "loss_over_time", explode)
    with pytest.raises(SystemExit) as stop:
        run("--run-dir", "r")
    assert stop.value.code == 1 and "iteration 21" in one_line(capsys)
    assert torch.load("r/checkpoint.pt", weights_only=True)["position"] == [1, 0, 16]


@pytest.mark.parametrize("method", ["gradr", "deepr"])
def test_so_does_one_at_a_mask_update(method, capsys, monkeypatch):
    """There the masks are checked first: NaN is a dead weight that is not 0."""
    loss_over_time, seen = training.loss_over_time, []

    def explode(logits, labels, kind):
        seen.extend([None] * logits.requires_grad)
        return loss_over_time(logits, labels, kind) * (math.nan if len(seen) == 6 else 1)

    monkeypatch.setattr(training, "loss_over_time", explode)
    with pytest.raises(SystemExit) as stop:
        run("--run-dir", "r", "--method", method)
    error = one_line(capsys)
    assert stop.value.code == 1 and "iteration 6" in error and "not finite" in error, error
    assert not Path("r/checkpoint.pt").exists()


@pytest.mark.parametrize("given", [(), ("--epochs-finetune", 0), ("--optimizer", "sgd")])
def test_a_prior_that_leaves_fewer_connections_than_layers(given, capsys):
    """Their number is the outcome of --mode paper: one line, which names the flag."""
    strong = ("--mode", "paper", "--prior", 5, "--lr", 0.01, *given)
    with pytest.raises(SystemExit) as stop:
        run(*strong)
    assert stop.value.code == 1
    error = one_line(capsys)
    assert "connections, expected at least one for each of the 5 layers. Start again" in error
    assert "mistake" not in error
