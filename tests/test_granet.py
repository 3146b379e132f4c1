"""GraNet: the rate, the swap and its zeroing by hand, exact counts, and the script end to end."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import models
import prune_granet
import training
from harness import runfolder
from helpers import LinearNet, assert_same_run, lines, refused, stop_after
from masks import Masks, seeded
from prune_granet import death_rate, prune_and_swap, swap

SHORT = ["--train-limit", "400", "--epochs-prune", "2", "--epochs-finetune", "1", "--interval", "6",
         "--width", "0.25", "--batch-size", "25"]  # 16 steps an epoch, 5 updates
pytestmark = pytest.mark.usefixtures("few_test_images")


@pytest.fixture(autouse=True)
def the_name_of_the_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune_granet.py"])


def run(*given, short=True):
    return prune_granet.main([*(SHORT if short else []), *map(str, given)])


def generator(seed=0):
    return seeded(seed)


def flat_indices(mask):
    return mask.nonzero().squeeze(1).tolist()


def small_net(seed=0, equal=False):
    torch.manual_seed(seed)
    net = models.build("small", 4, 1, 8, 2, [3, 4, 5, 4])
    if equal:
        for name in models.scored_by(net):
            net.get_parameter(name).data.fill_(0.5)
    return net


# ---- by hand -------------------------------------------------------------------------------------


def test_rate_and_swap_by_hand():
    rates = [death_rate(0.5, step, 100) for step in (0, 25, 50, 75, 100)]
    assert rates == pytest.approx([0.5, 0.4275089, 0.2525, 0.0774911, 0.005], abs=1e-6)
    net = LinearNet(a=[[0.9, -0.5, 0.3, 0.2, 0.0, 0.0]], b=[[1.0]])
    masks = Masks(net)
    masks.flat[4:6] = False
    gradients = torch.tensor([0.1, 0.1, 0.05, 0.7, 0.6, -0.8, 0.0]).abs()
    died, grown = swap(masks, 0.5, masks.magnitudes(), gradients, generator())
    assert flat_indices(died)[:2] == [2, 3] and flat_indices(grown)[:2] == [3, 5]
    assert flat_indices(masks.flat) == [0, 1, 3, 5, 6]
    masks.apply(torch.optim.SGD(net.parameters(), 0.1))
    assert net.a.weight.flatten().tolist() == pytest.approx([0.9, -0.5, 0, 0.2, 0, 0])


def test_the_global_cut_is_zeroed_before_the_layers_regrow():
    """A weight cut by the global step returns at 0;
    one that its layer's death step cut keeps its value."""
    net = LinearNet(a=[[0.9, 0.5, 0.4, 0.1]], b=[[1.0, 0.8]])
    net.a.weight.grad = torch.tensor([[0.0, 0.0, 0.5, 9.0]])  # the one that the global step cuts
    net.b.weight.grad = torch.zeros(1, 2)
    masks = Masks(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    pruned, before, back, *_ = prune_and_swap(masks, optimizer, 1 / 6, 0.34, generator())
    assert flat_indices(pruned) == [1, 2, 3, 5] and flat_indices(back) == [2, 3, 5]
    assert before == pytest.approx(4 / 6)
    masks.apply(optimizer)
    assert net.a.weight.flatten().tolist() == pytest.approx([0.9, 0, 0.4, 0])
    assert net.b.weight.flatten().tolist() == pytest.approx([1.0, 0.8])


def test_the_largest_weight_of_a_layer_that_the_global_cut_would_empty_stays():
    net = LinearNet(a=[[0.01, -0.03, 0.02]], b=[[0.5, 0.6], [0.7, 0.8]])
    for weight in (net.a.weight, net.b.weight):
        weight.grad = torch.zeros_like(weight)
    masks, optimizer = Masks(net), torch.optim.SGD(net.parameters(), 0.1)
    *_, rescued, _ = prune_and_swap(masks, optimizer, 5 / 7, prune_granet.LOWEST_RATE, generator())
    masks.apply(optimizer)
    assert rescued == ["a.weight"] and masks.per_layer(masks.flat) == [1, 1]
    assert net.a.weight.flatten().tolist() == pytest.approx([0, -0.03, 0])
    assert net.b.weight.flatten().tolist() == pytest.approx([0, 0, 0, 0.8])


# ---- exact counts --------------------------------------------------------------------------------


def train_a_little(net, masks, optimizer, seed):
    x = torch.randn(6, 1, 8, 8, generator=generator(seed)) * 3
    optimizer.zero_grad()
    training.loss_over_time(net(x), torch.arange(6) % 4).backward()
    optimizer.step()
    masks.apply(optimizer)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_counts_are_exact(rate, equal):
    net = small_net(equal=equal)
    masks = Masks(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=0.1)
    for update in range(1, 7):
        train_a_little(net, masks, optimizer, update)
        before = masks.flat.clone()
        target = training.sparsity_at(update, 6, 0.9)
        pruned, between, back, rescued, _ = prune_and_swap(
            masks, optimizer, target, rate, generator(update))
        masks.apply(optimizer)
        assert masks.n_alive == masks.total - round(target * masks.total)
        assert all(masks.per_layer(masks.flat))
        assert rescued or not (pruned & ~before).any()
        # each layer: as many die as grow, a share `rate` of what the global cut left
        for alive, grown in zip(masks.per_layer(masks.flat), masks.per_layer(back)):
            assert grown == math.ceil(rate * alive)
        assert between == pytest.approx(1 - (masks.n_alive - int(back.sum())) / masks.total)
        now = masks.magnitudes()
        assert now[~masks.flat].count_nonzero() == 0
        for name, weight in masks.weights.items():
            dead = ~masks.alive[name]
            assert optimizer.state[weight]["momentum_buffer"][dead].count_nonzero() == 0
        assert now[masks.flat & ~before].count_nonzero() == 0  # the long dead come back at 0
        if rate == 0:  # gradual magnitude pruning
            assert not back.any()
            assert rescued or torch.equal(masks.flat, before & ~pruned)
    assert masks.sparsity == pytest.approx(0.9, abs=1 / masks.total)


def test_a_swap_equals_a_plain_sort():
    """Layer by layer, on weights without ties."""
    net = small_net()
    masks = Masks(net)
    masks.prune(masks.keep_at(0.6), masks.magnitudes(), generator())
    gradients = torch.rand(masks.total, generator=generator(1))
    before, magnitudes = masks.flat.clone(), masks.magnitudes()
    died, grown = swap(masks, 0.4, magnitudes, gradients, generator(2))
    start = 0
    for size in masks.sizes:
        places = range(start, start + size)
        alive = sorted((magnitudes[i].item(), i) for i in places if before[i])
        count = math.ceil(0.4 * len(alive))
        dies = {i for _, i in alive[:count]}
        dead = sorted(((gradients[i].item(), i) for i in places if not before[i] or i in dies))
        grows = {i for _, i in dead[len(dead) - count:]}
        assert {i for i in places if died[i]} == dies
        assert {i for i in places if grown[i]} == grows
        assert {i for i in places if masks.flat[i]} == (
            {i for _, i in alive} - dies) | grows
        start += size


# ---- the script ----------------------------------------------------------------------------------


def test_a_run_and_its_folder():
    summary = run("--run-dir", "r", "--sparsity", 0.8, "--death-rate", 0.3)
    assert json.loads(Path("r/summary.json").read_text()) == summary
    assert list(summary) == runfolder.SUMMARY_KEYS
    assert (summary["script"], summary["method"]) == ("prune_granet", "granet")
    total = sum(layer["weights"] for layer in summary["layers"])
    assert sum(layer["alive"] for layer in summary["layers"]) == total - round(0.8 * total)
    assert 0 < summary["survived_by_regeneration"] <= 1
    assert summary["pruned_accuracy"] == lines("r", "metrics")[1]["test_accuracy"]
    updates = lines("r", "updates")
    assert [row["iteration"] for row in updates] == [6, 12, 18, 24, 30]
    for k, row in enumerate(updates, 1):
        assert row["target"] == training.sparsity_at(k, 5, 0.8)
        rate = death_rate(0.3, row["iteration"], 32)  # over the pruning stage
        for layer in row["layers"]:
            assert layer["regenerated"] == math.ceil(rate * layer["alive"])
        assert sum(layer["alive"] for layer in row["layers"]) == (
            total - round(row["target"] * total))
        assert 1 - row["before"] == pytest.approx(
            1 - row["sparsity"] - row["regenerated"] / total)
    config = json.loads(Path("r/config.json").read_text())
    assert (config["death_rate"], config["sparsity"], config["script"]) == (
        0.3, 0.8, "prune_granet")


def test_gradients_are_those_of_the_batch_of_the_update(monkeypatch):
    """No pass over data of its own: the gradient is that of the training step just taken."""
    taken, gradients, backward = [], Masks.gradients, training.backward

    def step(*given, **named):
        result = backward(*given, **named)
        taken.append([weight.grad.abs().flatten().clone()
                      for weight in given[0].masks.weights.values()])
        return result

    def compare(self):
        found = gradients(self)
        assert torch.equal(found, torch.cat(taken[-1]))
        assert len(taken) % 6 == 0
        return found

    monkeypatch.setattr(training, "backward", step)
    monkeypatch.setattr(Masks, "gradients", compare)
    run("--epochs-finetune", 0)
    assert len(taken) == 32


@pytest.mark.parametrize("step", [5, 23])
def test_resume_from_any_step(step, monkeypatch, once):
    """Stop inside an epoch, at an update, at the end of an epoch, in fine-tuning; go on."""
    stop_after(step + 1, monkeypatch, run, "--run-dir", "r")
    prune_granet.main(["--run-dir", "r", "--resume"])
    assert_same_run(once(run), "r")


def test_resume_with_a_smaller_last_batch_and_other_flags(monkeypatch):
    given = ["--no-flip", "--batch-size", "57", "--interval", "3", "--epochs-finetune", "0",
             "--death-rate", "0.2"]
    run("--run-dir", "unbroken", *given)
    stop_after(10, monkeypatch, run, "--run-dir", "r", *given)
    prune_granet.main(["--run-dir", "r", "--resume"])
    assert_same_run("unbroken", "r")


def test_an_older_run_with_a_lower_rate_goes_on(monkeypatch):
    stop_after(10, monkeypatch, run, "--run-dir", "r")
    config = json.loads(Path("r/config.json").read_text())
    Path("r/config.json").write_text(json.dumps(config | dict(death_rate=0.001)))
    state = torch.load("r/checkpoint.pt", weights_only=True)
    state["flags"]["death_rate"] = 0.001
    torch.save(state, "r/checkpoint.pt")
    assert prune_granet.main(["--run-dir", "r", "--resume"])["epochs"] == 3


@pytest.mark.parametrize("given, words", [
    ("--death-rate 0", "--death-rate is 0, expected a number above 0 and below 1"),
    ("--death-rate 0.004", "--death-rate is 0.004, expected at least 0.005, to which it falls"),
    ("--death-rate 1", "--death-rate is 1,"), ("--death-rate nan", "--death-rate is nan"),
    ("--sparsity 0", "--sparsity is 0, expected a number above 0 and below 1"),
    ("--sparsity 90", "--sparsity is 90,"), ("--sparsity 0.9999", "one for each of the 5 layers"),
    ("--interval 33", "no update would ever run: --interval is 33"),
    ("--regen 0.5", "unrecognized arguments: --regen, expected a flag"),
    ("--metric gradient", "unrecognized arguments: --metric, expected a flag"),
    ("--epochs-prune 0", "--epochs-prune is 0"), ("--train-limit 5", "--train-limit is 5"),
])
def test_wrong_commands(given, words, capsys):
    assert words in refused(capsys, run, *given.split())
    assert not list(Path().iterdir())  # nothing was written


def test_names_of_runs():
    names = {given: prune_granet.parse_args(given.split()).run_dir for given in (
        "", "--death-rate 0.3", "--sparsity 0.95", "--seed 1", "--width 0.5", "--smoke",
        "--dataset a/mine.npz", "--model vgg16")}
    assert len(set(names.values())) == len(names)
    assert names[""] == "runs/fashion-mini-small-granet-0.9-d0.5-seed0"
    assert names["--smoke"] == "runs/smoke-fashion-mini-small-granet-0.9-d0.5-seed0"


def test_its_defaults_are_those_of_its_code_and_of_the_protocol():
    args = prune_granet.parse_args(["--dataset", "cifar100"])
    assert (args.death_rate, args.epochs_prune, args.epochs_finetune, args.interval,
            args.model) == (0.5, 200, 300, 2000, "vgg16")
