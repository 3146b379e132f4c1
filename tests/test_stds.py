"""STDS: worked examples, plain loops, exact counts, the script end to end; parameters that compute
with other values than they hold."""
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
import prune_stds
import prune_unstructured
import training
from harness import runfolder
from helpers import assert_same_run, lines, refused, save_half_images, stop_after
from masks import Masks, computing_with, seeded
from prune_stds import (DEAD_ZONE, dead_zone_after, decay_synapses, default_dead_zone, ending,
                        fix_mask, follow, share_alive, synapses)

SHORT = ["--dataset", "mine.npz", "--epochs-prune", "2", "--epochs-finetune", "1", "--interval",
         "6", "--width", "0.25", "--time-steps", "2", "--batch-size", "10",  # 16 steps an epoch
         "--threshold", "0.3"]  # so that all layers fire


@pytest.fixture(autouse=True)
def the_script_and_its_images(monkeypatch, in_a_folder_of_its_own):
    monkeypatch.setattr(sys, "argv", ["prune_stds.py"])
    save_half_images()


def run(*given, short=True):
    return prune_stds.main([*(SHORT if short else []), *map(str, given)])


def settings(**changed):
    return Namespace(**dict(optimizer="sgd", schedule="cosine", sparsity=0.9, lr=0.1,
                            mode="matched") | changed)


def small_net():
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 14, 2, [4, 8, 16, 16])
    return net, Masks(net)


# ---- parameters that compute with other values ---------------------------------------------------


def test_parameters_hold_other_values_for_a_pass_and_keep_the_dense_gradient():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    x, mask = torch.randn(4, 2, 5, 5), torch.rand(3, 2, 3, 3) < 0.5
    held, place = layer.weight.detach().clone(), (layer.weight.data_ptr(), layer.weight.stride())
    value = layer.weight.detach() * mask
    with computing_with([layer.weight], [value]):
        assert torch.equal(layer.weight, value)
        (layer(x) ** 2).sum().backward()
    assert torch.equal(layer.weight, held)  # bit for bit
    assert place == (layer.weight.data_ptr(), layer.weight.stride()) and layer.weight.is_leaf
    w = value.clone().requires_grad_()
    (nn.functional.conv2d(x, w, layer.bias) ** 2).sum().backward()
    assert torch.equal(layer.weight.grad, w.grad) and layer.weight.grad[~mask].count_nonzero() > 0
    torch.optim.AdamW([layer.weight], 0.1).step()  # any optimizer
    assert not torch.equal(layer.weight, held)


def test_they_are_restored_after_an_error():
    one, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((2,), 2.0))
    with pytest.raises(ZeroDivisionError), computing_with([one, other], [one * 0, other * 0]):
        assert one.sum() == 0 and other.sum() == 0
        1 / 0
    assert one.tolist() == [1, 1, 1] and other.tolist() == [2, 2]
    with pytest.raises(ValueError), computing_with([one, other], [one * 0]):
        pass
    assert one.tolist() == [1, 1, 1]


# ---- the rule ------------------------------------------------------------------------------------


def test_the_ramps():
    at = [0, 1, 2, 3, 4]
    assert [dead_zone_after(i, 4, 1.0, "sine") for i in at] == pytest.approx(
        [0, 0.1464466, 0.5, 0.8535534, 1], abs=1e-7)
    assert [dead_zone_after(i, 4, 1.0, "linear") for i in at] == [0, 0.25, 0.5, 0.75, 1]
    assert [dead_zone_after(i, 4, 0.2, "sine") for i in at[1:]] == pytest.approx(
        [0.0292893, 0.1, 0.1707107, 0.2], abs=1e-7)


def drive(sizes, gradient, steps, width, ramp="sine", lr=0.1):
    """Return w after each step, from sizes theta and gradient(i, w), by the functions of the script
    in the order of its loop."""
    theta, after = [nn.Parameter(torch.tensor(sizes))], []
    optimizer, zone = torch.optim.SGD(theta, lr), 0.0
    for i in range(1, steps + 1):
        with computing_with(theta, synapses(theta, zone)):
            w = theta[0].detach().clone()
            (theta[0] * torch.tensor(gradient(i, w.tolist()))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        zone = dead_zone_after(i, steps, width, ramp)
        after.append(synapses(theta, zone)[0].tolist())
    return after


def test_worked_example():
    """Dormant and back; through the dead zone to the other sign; the pull alone."""
    after = drive([0.05, 0.1, -0.3], lambda i, w: [0 if i < 3 else -2.0, 1.5, 0], 4, 0.2)
    expected = [(0.0207107, 0, 0.0792893, 0.25), (-0.0207107, -0.1, -0.1792893, -0.3),
                (-0.2707107, -0.2, -0.1292893, -0.1)]
    assert np.allclose(np.transpose(after), expected, atol=1e-7)


@pytest.mark.parametrize("ramp", ["sine", "linear"])
def test_the_rule_equals_a_plain_loop(ramp):
    """The gradient depends on w: so a D of another step, or a gradient at theta, shows. Its aim
    changes sign halfway."""
    rng = np.random.default_rng(0)
    start, goal = rng.normal(0, 0.2, 40), rng.normal(0, 0.4, 40)
    after = drive(start.astype(np.float32).tolist(),
                  lambda i, w: [a - (b if i < 15 else -b) for a, b in zip(w, goal)], 30, 0.3,
                  ramp, lr=0.1)
    expected = []
    for theta, aim in zip(start.tolist(), goal.tolist()):
        zone, row = 0.0, []
        for i in range(1, 31):
            sign = 1 if theta >= 0 else -1
            w = sign * max(abs(theta) - zone, 0)
            theta -= 0.1 * (w - (aim if i < 15 else -aim))
            x = i / 30
            zone = 0.3 * (math.sin(math.pi * x / 2) ** 2 if ramp == "sine" else x)
            row.append((1 if theta >= 0 else -1) * max(abs(theta) - zone, 0))
        expected.append(row)
    assert np.allclose(np.transpose(after), expected, atol=1e-5)
    ends = np.array(after)
    assert (ends == 0).any(0).sum() > 10  # some were dormant, and some of these came back
    assert ((ends == 0).any(0) & (ends[-1] != 0)).any()


def test_the_edge_and_zero():
    """|theta| = D is dead; a theta of 0 is in the dead zone too, and takes the gradient."""
    w, = synapses([torch.tensor([0.5, -0.5, 0.75, -0.75, 0.0])], 0.5)
    assert w.tolist() == [0, 0, 0.25, -0.25, 0]
    theta = torch.tensor([0.3, -0.2, 0.0])
    assert torch.equal(synapses([theta], 0.0)[0], theta)
    assert drive([0.0], lambda i, w: [-1.0], 1, 0.05)[0] == pytest.approx([0.05])


@pytest.mark.parametrize("ramp", ["sine", "linear"])
def test_without_a_gradient_a_weight_loses_exactly_d(ramp):
    after = drive([0.5, -0.7, 0.1], lambda i, w: [0.0] * 3, 50, 0.2, ramp)
    assert after[-1] == pytest.approx([0.3, -0.5, 0.0])
    assert after == [pytest.approx(row) for row in after]
    steps = -np.diff([0.5] + [row[0] for row in after])
    if ramp == "sine":  # most at half time, next to nothing at both ends
        assert steps.argmax() in (24, 25) and steps[0] < 0.05 * steps.max() > steps[-1]
    else:
        assert np.allclose(steps, 0.2 / 50, atol=1e-6)


def test_weight_decay_acts_on_the_weight_and_not_in_the_dead_zone():
    theta = [nn.Parameter(torch.tensor([0.5, -0.25, 0.1]))]
    theta[0].grad = torch.tensor([1.0, 1.0, 1.0])
    w = synapses(theta, 0.2)  # .3, -.05, 0
    decay_synapses(theta, w, 0.1, "sgd", 0.01)
    assert theta[0].grad.tolist() == pytest.approx([1.03, 0.995, 1.0])
    decay_synapses(theta, w, 0.1, "adamw", 0.5)  # by the moments
    assert theta[0].grad.tolist() == pytest.approx([1.03, 0.995, 1.0])
    assert theta[0].tolist() == pytest.approx([0.5 - 0.015, -0.25 + 0.0025, 0.1])


# ---- the end of the structure epochs -------------------------------------------------------------


def spread_out(masks, scale=0.1):
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in masks.weights.values():
            weight.copy_(torch.randn_like(weight) * scale)
    return torch.cat([weight.detach().flatten() for weight in masks.weights.values()])


def with_momentum(net):
    optimizer = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("zone", [0.0, 0.05, 0.4])  # too many are left, too many, next to none
def test_exactly_the_k_largest_sizes_stay(zone):
    net, masks = small_net()
    theta, optimizer, keep = spread_out(masks), with_momentum(net), masks.keep_at(0.9)
    follow(masks, zone)
    before, found = masks.flat.clone(), masks.n_alive
    assert torch.equal(before, theta.abs() > zone) and found == round(
        share_alive(masks, zone) * masks.total)
    said = ending(settings(), masks)
    assert f"leaves {found:,} weights, {keep:,} are asked for: more than 20 % off" in said
    expected = torch.zeros(masks.total, dtype=torch.bool)
    expected[theta.abs().argsort(descending=True)[:keep]] = True
    change = fix_mask(keep, zone, masks, optimizer, seeded(0))
    assert torch.equal(masks.flat, expected) and masks.n_alive == keep and not change.rescued
    w = torch.cat([weight.detach().flatten() for weight in masks.weights.values()])
    assert torch.equal(w, torch.where(expected, theta.sign() * (theta.abs() - zone).clamp(min=0),
                                      0))
    assert (zone == 0.4) == bool((w[expected] == 0).any())  # those that were called back start at 0
    assert torch.equal(change.pruned, before & ~expected)
    assert torch.equal(change.regenerated, expected & ~before)
    assert masks.violation(optimizer, keep) is None  # the dead have no momentum,
    momenta = torch.cat([optimizer.state[weight]["momentum_buffer"].flatten()
                         for weight in masks.weights.values()])
    assert torch.equal(momenta != 0, expected)  # the others keep theirs


def test_equal_sizes_are_drawn_and_a_layer_keeps_its_largest():
    net, masks = small_net()
    spread_out(masks)
    with torch.no_grad():
        for weight in masks.weights.values():
            weight.fill_(0.5)
        masks.weights["fc.weight"].fill_(0.01)
        masks.weights["fc.weight"].flatten()[7] = -0.02  # in the dead zone, as the whole layer
    optimizer, keep = with_momentum(net), masks.keep_at(0.8)
    follow(masks, 0.1)
    change = fix_mask(keep, 0.1, masks, optimizer, seeded(0))
    assert masks.n_alive == keep and change.rescued == ["fc.weight"]
    assert masks.alive["fc.weight"].flatten().nonzero().tolist() == [[7]]
    assert (masks.weights["fc.weight"] == 0).all()


def test_the_masks_follow_the_dead_zone():
    net, masks = small_net()
    theta = spread_out(masks)
    with torch.no_grad():  # the edge of the dead zone belongs to it
        masks.weights["fc.weight"][0] = 0.125
        masks.weights["fc.weight"][1] = -0.125
    follow(masks, 0.125)
    assert not masks.alive["fc.weight"][:2].any()
    assert share_alive(masks, 0.125) == pytest.approx(masks.n_alive / masks.total)
    theta = masks.magnitudes()
    follow(masks, 0.05)
    change = follow(masks, 0.1)
    assert torch.equal(masks.flat, theta.abs() > 0.1) and not change.regenerated.any()
    assert torch.equal(change.pruned, (theta.abs() > 0.05) & (theta.abs() <= 0.1))
    back = follow(masks, 0.07)
    assert torch.equal(back.regenerated, (theta.abs() > 0.07) & (theta.abs() <= 0.1))
    assert back.between == pytest.approx(change.between)


def test_the_default_dead_zone():
    for optimizer, lr in (("sgd", 0.1), ("adam", 1e-3), ("adamw", 1e-3)):
        for density, width in DEAD_ZONE[optimizer].items():
            given = settings(optimizer=optimizer, lr=lr, sparsity=1 - density)
            assert default_dead_zone(given, 752) == pytest.approx(width)
        widths = [default_dead_zone(settings(optimizer=optimizer, lr=lr, sparsity=s), 752)
                  for s in (0, 0.1, 0.5, 0.75, 0.8, 0.9, 0.95, 0.98, 0.995)]
        assert widths == sorted(set(widths)) and widths[0] == 0  # beyond the table too
    usual = default_dead_zone(settings(), 752)
    assert default_dead_zone(settings(lr=0.05), 1504) == pytest.approx(usual)
    assert default_dead_zone(settings(), 1504) == pytest.approx(2 * usual)
    assert default_dead_zone(settings(schedule="constant"), 376) == pytest.approx(usual, rel=2e-3)


# ---- the script ----------------------------------------------------------------------------------


def test_a_run_and_its_folder(capsys):
    summary = run("--run-dir", "r", "--sparsity", 0.8, "--dead-zone", 0.1)
    assert {path.name for path in Path("r").iterdir()} >= {
        "config.json", "metrics.jsonl", "updates.jsonl", "checkpoint.pt", "model.pt",
        "summary.json", "curves.png"}
    assert list(summary) == runfolder.SUMMARY_KEYS and summary["method"] == "stds"
    total = sum(layer["weights"] for layer in summary["layers"])
    keep = total - round(0.8 * total)
    assert sum(layer["alive"] for layer in summary["layers"]) == keep
    rows, updates = lines("r", "metrics"), lines("r", "updates")
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("prune", 1), ("prune", 2), ("finetune", 3)]
    assert [row["iteration"] for row in updates] == [6, 12, 18, 24, 30, 32, 32]
    assert [row["target"] for row in updates] == [None] * 6 + [0.8]
    assert [row["dead_zone"] for row in updates[:-1]] == [
        dead_zone_after(i, 32, 0.1, "sine") for i in (6, 12, 18, 24, 30, 32)]
    alive = total
    for row in updates:
        alive += row["regenerated"] - row["pruned"]
        assert alive == sum(layer["alive"] for layer in row["layers"])
    assert alive == keep and sum(row["regenerated"] for row in updates[:-1]) > 0
    assert rows[1]["sparsity"] == rows[2]["sparsity"] == updates[-1]["sparsity"]
    assert summary["training_cost"] == pytest.approx(
        (1 + (1 - rows[0]["sparsity"]) + (1 - rows[1]["sparsity"])) / 3)
    assert summary["pruned_accuracy"] == rows[1]["test_accuracy"]
    found = sum(layer["alive"] for layer in updates[-2]["layers"])
    out = capsys.readouterr().out
    assert f"the dead zone leaves {found:,} weights, {keep:,} are asked for" in out
    assert "STDS, dead zone 0 to 0.1, sine" in out
    masks = modelfile.read("r/model.pt")["masks"]
    fixed = {layer["name"]: layer["alive"] for layer in updates[-1]["layers"]}
    assert {name: int(mask.sum()) for name, mask in masks.items()} == fixed


@pytest.mark.parametrize("given", [
    dict(sparsity=0.9, dead_zone=0.1), dict(sparsity=0.5, dead_zone=0.2, ramp="linear")])
def test_the_method_written_separately(given):
    """A plain version, layer by layer, where the network always holds w and theta lies beside it.
    The linear one has a cut that calls weights back. It fails where two steps are swapped."""
    ramp, D = given.get("ramp", "sine"), given["dead_zone"]
    run("--run-dir", "r", "--weight-decay", 0.01, *(
        word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)))
    images = data.load("mine.npz")
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 14, 2, [4, 8, 16, 16], neuron=dict(v_threshold=0.3))
    net = net.to(memory_format=torch.channels_last)
    net.set_normalisation(images.mean, images.std)
    weights = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    theta = {name: w.detach().clone() for name, w in weights.items()}
    rest = torch.optim.SGD([p for n, p in net.named_parameters() if n not in weights], 0.1, 0.9,
                           weight_decay=0.01)
    past = {name: torch.zeros_like(w) for name, w in weights.items()}
    args = Namespace(batch_size=10, device="cpu", precision="fp32", loss="ce")
    alive, t = None, 0
    for epoch in range(3):
        for x, y in data.batches(images.x_train, images.y_train, 10, 0, epoch, flip=True):
            step, steps = (t, 32) if epoch < 2 else (t - 32, 16)
            lr = 0.1 * (1 + math.cos(math.pi * step / steps)) / 2
            rest.param_groups[0]["lr"] = lr
            t += 1
            loss = torch.nn.functional.cross_entropy(net(x).reshape(-1, 10), torch.cat([y] * 2))
            net.zero_grad()
            loss.backward()
            rest.step()
            for name, w in weights.items():
                g = w.grad.add(w.detach(), alpha=0.01)  # decay of w
                past[name] = past[name].mul(0.9).add(g)
                theta[name] = theta[name].add(past[name], alpha=-lr)
                if alive is None:
                    x_ = t / 32
                    zone = D * (math.sin(math.pi * x_ / 2) ** 2 if ramp == "sine" else x_)
                    w.data.copy_(nn.functional.softshrink(theta[name], zone))
                else:
                    past[name] *= alive[name]
                    theta[name] *= alive[name]
                    w.data.copy_(theta[name])
            if t == 32:
                row = torch.cat([part.reshape(-1) for part in theta.values()]).abs()
                keep = len(row) - round(given["sparsity"] * len(row))
                assert (int((row > D).sum()) < keep) == (ramp == "linear")
                edge = row.sort(descending=True).values[keep - 1]
                alive = {name: part.abs() >= edge for name, part in theta.items()}
                assert all(mask.any() for mask in alive.values())
                for name, w in weights.items():
                    theta[name] = w.detach() * alive[name]
                    past[name] = past[name] * alive[name]
                    w.data.copy_(theta[name])
        test = training.evaluate(net, net, images.pairs("test", 40), args)
        row = lines("r", "metrics")[epoch]
        assert (row["test_loss"], row["test_accuracy"]) == (test["loss"], test["accuracy"])
        assert test["rate"] > 0.1 and not test["silent"]
        if epoch == 0:  # of w, not of theta
            n = sum(w.count_nonzero() for w in weights.values())
            assert row["sparsity"] == pytest.approx(1 - int(n) / sum(
                w.numel() for w in weights.values())) and row["sparsity"] > 0.01
    packed = modelfile.read("r/model.pt")
    assert all(torch.equal(packed["masks"][name], alive[name]) for name in alive)
    for name, tensor in net.state_dict().items():
        assert torch.equal(packed["state_dict"][name], tensor), name


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_without_a_dead_zone_it_is_plain_training(optimizer, monkeypatch):
    given = ["--optimizer", optimizer]
    run("--run-dir", "r", "--mode", "paper", "--dead-zone", 0, *given)
    prune_unstructured.main([*SHORT, "--sparsity", "0", "--run-dir", "dense", *given])
    one, other = (modelfile.read(f"{folder}/model.pt")["state_dict"] for folder in ("r", "dense"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for row, same in zip(lines("r", "metrics"), lines("dense", "metrics")):
        assert row | dict(seconds=0) == same | dict(seconds=0)


@pytest.mark.parametrize("given", [[], ["--optimizer", "adam", "--ramp", "linear"]])
@pytest.mark.parametrize("step", [9, 32, 40])  # in the structure epochs, at the cut, fine-tuning
def test_a_stopped_run_goes_on_bit_by_bit(given, step, monkeypatch, once):
    stop_after(step, monkeypatch, run, "--run-dir", "r", *given)
    run("--run-dir", "r", "--resume", short=False)  # all flags come from its config.json
    assert_same_run(once(run, *given), "r")


def test_mode_paper_ends_with_what_the_dead_zone_leaves(capsys):
    summary = run("--run-dir", "r", "--mode", "paper", "--dead-zone", 0.12)
    updates, rows = lines("r", "updates"), lines("r", "metrics")
    assert [row["iteration"] for row in updates] == [6, 12, 18, 24, 30, 32, 32]
    assert updates[-1]["pruned"] == updates[-1]["regenerated"] == 0
    out = capsys.readouterr().out
    assert "the dead zone leaves" in out and "asked for" not in out and "note: D" not in out
    assert summary["sparsity"] == updates[-2]["sparsity"] == rows[-1]["sparsity"] > 0.1
    assert json.loads(Path("r/config.json").read_text())["sparsity"] is None
    given = ["--mode", "paper", "--run-dir", "s", "--dead-zone", 9]
    error = refused(capsys, run, *given, code=1)
    assert "leaves 0 weights, expected at least one for each of the 5 layers. Start again" in error


def test_a_loss_that_is_not_finite_stops_the_run(capsys, monkeypatch):
    loss_over_time, seen = training.loss_over_time, []

    def explode(logits, labels, kind):
        seen.extend([None] * logits.requires_grad)
        return loss_over_time(logits, labels, kind) * (math.nan if len(seen) == 6 else 1)

    monkeypatch.setattr(training, "loss_over_time", explode)
    error = refused(capsys, run, "--run-dir", "r", code=1)
    assert "iteration 6" in error and "not finite" in error


def test_smoke_and_the_paper_s_setting():
    rng = np.random.default_rng(0)
    Path("data").mkdir()
    x, y = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 10
    np.savez("data/cifar10.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    summary = run("--dataset", "cifar10", "--smoke", "--width", 0.05, "--dead-zone", 0.01,
                  short=False)
    assert summary["model"] == "gradr-conv" and summary["time_steps"] == 8
    assert 0 < summary["sparsity"] < 1
    args = prune_stds.parse_args(["--dataset", "cifar10"])
    assert (args.mode, args.dead_zone, args.optimizer, args.lr, args.weight_decay) == (
        "paper", None, "adam", 1e-4, 0.0)
    assert default_dead_zone(args, 2048 * 3125) == pytest.approx(1)
    assert default_dead_zone(args, 2048) == pytest.approx(1 / 3125)  # a shorter run
    assert (args.schedule, args.epochs_prune, args.epochs_finetune, args.batch_size) == (
        "constant", 2048, 0, 16)


def test_a_default_that_is_scaled_to_other_data_is_said_once(capsys, monkeypatch):
    words = "is scaled from short runs on the embedded data"
    stop_after(9, monkeypatch, run, "--run-dir", "r")
    out = capsys.readouterr().out
    width = json.loads(Path("r/config.json").read_text())["dead_zone"]
    assert out.count(words) == 1 and f"note: D = {width:.4g} {words}" in out
    run("--run-dir", "r", "--resume", short=False)
    run("--run-dir", "s", "--dead-zone", 0.1, "--epochs-finetune", 0)
    run("--smoke", short=False)  # on the embedded data
    run("--run-dir", "t", "--sparsity", 0, "--epochs-finetune", 0)
    assert words not in capsys.readouterr().out


def test_defaults_and_names(capsys):
    parse = prune_stds.parse_args
    usual = parse([])
    assert (usual.epochs_prune, usual.epochs_finetune, usual.interval, usual.sparsity,
            usual.optimizer, usual.lr, usual.ramp) == (8, 4, 25, 0.9, "sgd", 0.1, "sine")
    assert parse(["--dataset", "cifar100"]).epochs_prune == 200
    names = {parse(given.split()).run_dir for given in (
        "", "--sparsity 0.95", "--dead-zone 0.5", "--optimizer adam", "--ramp linear", "--seed 1",
        "--mode paper", "--mode paper --dead-zone 0")}
    assert len(names) == 8 and "runs/fashion-mini-small-stds-0.9-seed0" in names
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0 and "None" not in capsys.readouterr().out


@pytest.mark.parametrize("given, words", [
    ("--sparsity 90", "For 90 % write 0.9"), ("--sparsity -0.1", "expected a fraction in [0, 1)"),
    ("--sparsity 0.9999", "expected at least one for each of the 5 layers"),
    ("--mode paper --sparsity 0.5", "--sparsity is 0.5, expected none: with --mode paper"),
    ("--as-published cut --sparsity 0.5", "with --as-published cut it is an outcome of --dead-zone. "
                                          "Leave it out\n"),
    ("--dead-zone -1", "--dead-zone is -1, expected a finite number of at least 0"),
    ("--dead-zone nan", "--dead-zone is nan"), ("--dead-zone inf", "--dead-zone is inf"),
    ("--ramp cubic", "invalid choice"), ("--optimizer lion", "invalid choice"),
    ("--optimizer adam --momentum 0.5", "--momentum is 0.5, which --optimizer adam does not use"),
    ("--interval 0", "--interval is 0"), ("--run-dir full", "holds no run")])
def test_wrong_commands(given, words, capsys):
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("text")
    before = sorted(Path().rglob("*"))
    assert words in refused(capsys, run, *given.split())
    assert sorted(Path().rglob("*")) == before


def test_as_published(capsys):
    args = prune_stds.parse_args(["--as-published"])
    assert (args.mode, args.optimizer, args.lr, args.weight_decay, args.schedule, args.loss) == (
        "paper", "adam", 1e-4, 0.0, "constant", "mse")
    assert "-paper" in args.run_dir and "-published" in args.run_dir
    assert args.as_published == ["cut", "optimizer", "loss"]
    args = prune_stds.parse_args(["--as-published", "loss"])
    assert (args.mode, args.loss, args.optimizer) == ("matched", "mse", "sgd")
    assert "published-loss" in args.run_dir
    assert prune_stds.parse_args([]).as_published == []
    error = refused(capsys, run, "--as-published", "loss", "--loss", "ce")
    assert "--loss is ce, but --as-published loss sets it to mse" in error
