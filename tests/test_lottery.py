"""prune_lottery.py: IMP's rounds and costs, EB's masks and stopping rule, ET's T', against worked
examples and plain loops; then from its command line."""
import copy
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import modelfile
import models
import prune_lottery as lottery
import training
from harness import plots, runfolder, setup
from harness.meters import Meter
from helpers import assert_same_run, lines, refused, stop_after
from masks import Masks

TINY = ["--dataset", "mine.npz", "--width", "0.25", "--batch-size", "25"]  # 8 steps an epoch
EB = [*TINY, "--method", "eb", "--epochs-prune", "3", "--epochs-finetune", "2"]
SHORT = [*TINY, "--epochs-prune", "3", "--epochs-finetune", "2", "--rounds", "2"]  # 1 + 2 + 2
FULL = [*TINY, "--epochs-prune", "4", "--epochs-finetune", "1", "--rounds", "2", "--budget", "full"]
M_VGG16 = 14_715_584  # prunable weights of VGG-16 with 10 classes


@pytest.fixture(scope="session")
def mine(tmp_path_factory):
    images = data.load("fashion-mini", train_limit=200)
    path = tmp_path_factory.mktemp("data") / "mine.npz"
    np.savez(path, x_train=images.x_train[:, 0].numpy(), y_train=images.y_train.numpy(),
             x_test=images.x_test[:100, 0].numpy(), y_test=images.y_test[:100].numpy())
    return path


@pytest.fixture(autouse=True)
def a_small_data_set(mine, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune_lottery.py"])
    monkeypatch.setattr(plots, "draw_curves", lambda rows, path: path.touch())  # it takes long
    shutil.copy(mine, "mine.npz")


def run(*given):
    return lottery.main([*map(str, given)])


def wrong(capsys, *given, code=2):
    return refused(capsys, run, *given, code=code)


def parse(text):
    return lottery.parse_args(text.split())


def small_images():
    return SimpleNamespace(x_train=range(50_000))


# ---- IMP: rates, counts, epochs, costs -----------------------------------------------------------


def test_a_cut_takes_the_integer_part():
    alive = [8]
    for _ in range(6):
        alive.append(lottery.left_after(alive[-1], 0.25))
    assert alive == [8, 6, 5, 4, 3, 3, 3]  # of fewer than 4 none goes


def test_an_exact_quarter_that_comes_out_a_hair_below():
    rate = 1 - 0.421875 ** (1 / 3)
    assert int(4_000_000 * (0.25 - 1e-16 * 4)) == 999_999  # what the plain product would give
    assert lottery.left_after(4_000_000, 0.25 - 4e-16) == 3_000_000
    assert lottery.left_after(4_000_000, rate) == 3_000_000


def test_the_sparsity_list_of_the_published_code():
    every, prunable, alive = [], [], M_VGG16
    for _ in range(14):
        alive = lottery.left_after(alive, 0.25)
        every.append(round(100 * (M_VGG16 - alive) / 14_728_266, 2))
        prunable.append(round(100 * (1 - alive / M_VGG16), 2))
    assert every == [24.98, 43.71, 57.76, 68.30, 76.20, 82.13, 86.58, 89.91, 92.41, 94.29, 95.69,
                     96.75, 97.54, 98.13]
    assert prunable == [25.00, 43.75, 57.81, 68.36, 76.27, 82.20, 86.65, 89.99, 92.49, 94.37, 95.78,
                        96.83, 97.62, 98.22]


@pytest.mark.parametrize("sparsity, rounds, rate", [
    (0.9, 8, 0.250106), (0.95, 11, 0.238404), (0.98, 14, 0.243786)])
def test_the_rate_that_reaches_a_sparsity_in_k_rounds(sparsity, rounds, rate):
    total = 10**9
    alive = lottery.alive_by_round(total, sparsity, rounds)
    assert len(alive) == rounds + 1 and alive[0] == total
    assert 1 - alive[1] / total == pytest.approx(rate, abs=5e-7)
    for before, after in zip(alive, alive[1:-1]):
        assert after == lottery.left_after(before, 1 - (1 - sparsity) ** (1 / rounds))
    assert alive[-1] == total - round(sparsity * total)  # exact, whatever the rounding before


@pytest.mark.parametrize("total", [5, 7, 10, 97, 1001])
def test_each_round_keeps_at_most_as_many_as_the_one_before(total):
    for sparsity in (0.01, 0.3, 0.5, 0.9, 0.98):
        for rounds in (1, 2, 5, 14):
            alive = lottery.alive_by_round(total, sparsity, rounds)
            assert alive == sorted(alive, reverse=True)
            assert alive[-1] == total - round(sparsity * total)


@pytest.mark.parametrize("rounds, epochs, total, search, weighted", [
    (8, 2260, 2540, 1027.9, 1055.9), (11, 3100, 3380, 1092.7, 1104.5)])
def test_epochs_and_theoretical_cost_of_the_full_schedule(rounds, epochs, total, search, weighted):
    args = parse(f"--dataset cifar10 --rounds {rounds} --sparsity {1 - 0.75**rounds}")
    stages = lottery.stages_of(args, small_images())
    lengths = list(stages.by_name.values())
    assert lengths == [300] + [280] * rounds
    assert (sum(lengths[:-1]), sum(lengths)) == (epochs, total)
    alive = lottery.alive_by_round(M_VGG16, args.sparsity, rounds)
    costs = [n * k / M_VGG16 for n, k in zip(lengths, alive, strict=True)]
    assert sum(costs[:-1]) == pytest.approx(search, abs=0.05)
    assert sum(costs) == pytest.approx(weighted, abs=0.05)
    assert stages.steps("round0") / lottery.REWIND == 20 * stages.steps_per_epoch  # 20, and not 21


@pytest.mark.parametrize("prune, finetune, rounds", [(8, 4, 4), (200, 300, 4), (200, 300, 8),
                                                     (1, 1, 1), (6, 4, 4), (7, 6, 3)])
def test_the_matched_budget_is_shared_by_k_plus_1_trainings(prune, finetune, rounds):
    args = parse(f"--epochs-prune {prune} --epochs-finetune {finetune} --rounds {rounds}")
    stages = lottery.stages_of(args, small_images())
    lengths = list(stages.by_name.values())
    assert sum(lengths) == prune + finetune and len(lengths) == rounds + 1
    assert all(abs(n - (prune + finetune) / (rounds + 1)) < 1 for n in lengths)
    assert lengths == sorted(lengths)


def test_epochs_of_early_bird():
    args = parse("--method eb --dataset cifar10 --budget matched")
    for used in (None, 4, 37, 200):
        stages = lottery.stages_of(args, small_images(), used).by_name
        assert stages == dict(search=used or 200, finetune=500 - (used or 200))
    args = parse("--method eb --dataset cifar10")
    assert lottery.stages_of(args, small_images(), 4).by_name == dict(search=4, finetune=300)
    assert lottery.stages_of(args, small_images()).by_name == dict(search=300, finetune=300)


# ---- Early-Bird: the distance of masks and the stopping rule -------------------------------------


def bits(*rows):
    return [torch.tensor([c == "1" for c in row]) for row in rows]


def test_mask_distance_by_hand():
    queue = bits("1100000000", "0011000000", "1010000000", "1001000000", "1000000001")
    # the newest against each of the four: 2, 4, 2, 2 entries of 10. Neighbours differ in 4 at most
    assert lottery.mask_distance(queue) == 0.4
    queue = bits("1100000000", "0000000011", "1100000000", "1100000000", "1100000000")
    assert lottery.mask_distance(queue) == 0.4  # not only the mask before, not the mean
    queue = bits("0000000011", "0000000011", "1100000000", "0000000011", "0000000011")
    assert lottery.mask_distance(queue) == 0.4
    queue = bits("0000000011", "1000000010", "0000000011", "0000000011", "0000000011")
    assert lottery.mask_distance(queue) == 0.2
    queue = bits("1000000010", "0100000010", "0010000010", "0001000010", "0000000011")
    assert lottery.mask_distance(queue) == 0.2  # the older ones are not compared with each other
    for n in range(5):
        assert lottery.mask_distance(queue[:n]) is None  # so that epoch 4 is the first to stop at


def test_the_masks_settle_below_2_percent_and_not_at_it():
    assert lottery.settled(0.0199, 0.1, 0.02) and not lottery.settled(0.02, 0.1, 0.02)
    assert not lottery.settled(None, 0.1, 0.02)
    # as a share of what is kept: 1 - o
    assert not lottery.settled(0.0199, 0.1, 0.02, "kept")
    assert lottery.settled(0.0039, 0.1, 0.02, "kept")
    assert not lottery.settled(0.0041, 0.1, 0.02, "kept")


def test_2_percent_is_loose_at_high_sparsity():
    for sparsity, least in ((0.683, 0.968), (0.8991, 0.901), (0.9569, 0.768), (0.9813, 0.465)):
        assert lottery.overlap(0.02, 1 - sparsity) == pytest.approx(least, abs=5e-4)
    assert lottery.overlap(0.02, 0.01) == pytest.approx(0)  # at 99 % any two masks do
    one, other = bits("1110000000", "0111000000")
    d = float((one ^ other).double().mean())
    assert lottery.overlap(d, 0.3) == pytest.approx(2 / 3)


# ---- Early-Time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kl, found", [
    ([0.9, 0.45, 0.2], 3), ([0.9, 0.8, 0.2], 4), ([0.9, 0.8, 0.7], 5), ([0.2, 0.9, 0.1], 2),
    ([1.0, 0.6, 0.6], 5), ([1.0, 0.6, 0.5999], 4), ([0.0, 0.0, 0.0], 2), ([0.9, 0.4], 3),
    ([0.9, 0.6], 4)])
def test_the_first_time_whose_kl_is_below_lambda(kl, found):
    assert lottery.early_time(kl, 0.6) == found


def test_divergences_against_a_plain_loop():
    logits = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)) * 3
    expected = []
    for t in (2, 3, 4):
        total = 0.0
        for n in range(3):
            p, q = (torch.softmax(logits[:upto, n].double().mean(0), 0) for upto in (5, t))
            total += sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(p, q))
        expected.append(total / 3)
    assert lottery.divergences(logits) == pytest.approx(expected)


def test_measuring_in_eval_mode_changes_nothing():
    args = parse("--method et --width 0.25 --batch-size 64 --device cpu")
    images = data.load("fashion-mini")
    torch.manual_seed(0)
    net = setup.build(args, images)
    for bn in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        bn.running_mean += 0.1  # not what a batch has
    before, seen = lottery.snapshot(net), []
    net.register_forward_hook(lambda module, x, y: seen.append((module.training, x[0], y)))
    run_ = SimpleNamespace(args=args, net=net, images=images, iteration=188,
                           say=lambda line: None, device=torch.device("cpu"))
    found = lottery.measure_time(run_)
    assert found == lottery.measure_time(run_)
    assert net.training and not any(training for training, _, _ in seen)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    half = len(seen) // 2
    shown = torch.cat([x for _, x, _ in seen[:half]])
    assert len(shown) == 1000  # other images than the first thousand, drawn by the seed
    assert not torch.equal(shown, images.x_train[:1000])
    assert torch.equal(shown, torch.cat([x for _, x, _ in seen[half:]]))
    logits = torch.cat([y for _, _, y in seen[:half]], 1)
    assert found == lottery.early_time(lottery.divergences(logits), 0.6)


def test_the_first_steps_of_all_are_those_of_fewer():
    """T' steps are the beginning of T steps: what the measurement takes for granted."""
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 5, [4, 8, 16, 16]).eval()
    x = torch.randn(3, 1, 28, 28) * 2
    with torch.no_grad():
        all_steps = net(x)
        net.time_steps = 3
        assert torch.equal(net(x), all_steps[:3])


# ---- the tickets, against plain loops ------------------------------------------------------------


class Plain:
    """What the plain loops below share: the network, and one training of it, by torch alone."""

    def __init__(self):
        self.images = data.load("mine.npz")
        torch.manual_seed(0)
        self.net = models.build("small", 10, 1, 28, 4, [4, 8, 16, 16]).to(
            memory_format=torch.channels_last)
        self.net.set_normalisation(self.images.mean, self.images.std)
        self.weights = {n: p for n, p in self.net.named_parameters() if p.dim() > 1}
        self.alive = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.weights.items()}
        self.total = sum(w.numel() for w in self.weights.values())
        self.epoch, self.iteration, self.rewind = 0, 0, None
        self.optimizer()

    def optimizer(self):
        self.sgd = torch.optim.SGD(self.net.parameters(), 0.1, 0.9, weight_decay=5e-4)

    def train(self, epochs, first=0, of=None, lr=0.1, rewind_at=None, time_steps=4):
        """Train for some epochs of a cosine over `of`, the first of which is number `first`."""
        self.net.time_steps = time_steps
        step, steps = first * 8, (of or epochs) * 8
        for _ in range(epochs):
            for x, y in data.batches(self.images.x_train, self.images.y_train, 25, 0, self.epoch,
                                     flip=True):
                self.sgd.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
                step, self.iteration = step + 1, self.iteration + 1
                loss = torch.nn.functional.cross_entropy(self.net(x).reshape(-1, 10),
                                                         torch.cat([y] * time_steps))
                self.sgd.zero_grad()
                loss.backward()
                for name, weight in self.weights.items():
                    weight.grad *= self.alive[name]  # as the published code does
                self.sgd.step()
                if self.iteration == rewind_at:
                    self.rewind = copy.deepcopy(self.net.state_dict())
            self.epoch += 1

    def largest(self, keep):
        """The mask of the `keep` largest |w| over all layers, by a sort; dead weights are 0."""
        flat = torch.cat([w.detach().abs().flatten() for w in self.weights.values()])
        threshold = flat.sort(descending=True).values[keep - 1]
        return {n: w.detach().abs() >= threshold for n, w in self.weights.items()}

    def start_again(self, alive):
        self.net.load_state_dict(copy.deepcopy(self.rewind))
        self.alive = alive
        for name, weight in self.weights.items():
            weight.data *= alive[name]
        self.optimizer()

    def assert_is(self, folder):
        packed = modelfile.read(f"{folder}/model.pt")
        for name, tensor in self.net.state_dict().items():
            assert torch.equal(packed["state_dict"][name], tensor), name
        assert all(torch.equal(packed["masks"][name], self.alive[name]) for name in self.alive)


def count(alive):
    return sum(int(mask.sum()) for mask in alive.values())


def test_imp_with_late_rewinding_bit_by_bit():
    """4, 4 and 1 epochs, rewound to iteration 2 of 32; two rewinds, so that aliased ones show."""
    summary = run(*FULL, "--sparsity", 0.7, "--run-dir", "r")
    plain = Plain()
    keep = [round(0.3**0.5 * plain.total + 0.5), plain.total - round(0.7 * plain.total)]
    plain.train(4, rewind_at=2)
    first = plain.largest(keep[0])
    assert count(first) == keep[0]
    plain.net.load_state_dict(plain.rewind)
    rewound = plain.largest(keep[0])  # the order matters: cut first, then rewind
    assert any((rewound[name] != first[name]).any() for name in first)
    plain.start_again(first)
    plain.train(4)
    second = plain.largest(keep[1])
    assert count(second) == keep[1]
    assert not any((second[n] & ~first[n]).any() for n in first)
    plain.start_again(second)
    plain.train(1)
    plain.assert_is("r")
    assert [row["iteration"] for row in lines("r", "updates")] == [32, 64]
    assert summary["training_cost"] == pytest.approx(
        (4 + 4 * keep[0] / plain.total + keep[1] / plain.total) / 9)


def test_early_bird_bit_by_bit():
    """Stops at epoch 4, the first with five masks; the ticket starts from the initial weights."""
    run(*EB, "--sparsity", 0.7, "--epsilon", 0.9, "--epochs-prune", 6, "--run-dir", "r")
    plain = Plain()
    plain.rewind = copy.deepcopy(plain.net.state_dict())
    keep = plain.total - round(0.7 * plain.total)
    plain.train(4, of=6, lr=0.2)
    ticket = plain.largest(keep)
    assert count(ticket) == keep
    plain.start_again(ticket)
    plain.train(4)  # of 6 + 2 epochs; one cosine over them
    plain.assert_is("r")
    rows = lines("r", "metrics")
    assert [row["stage"] for row in rows] == ["search"] * 4 + ["finetune"] * 4
    assert rows[3]["sparsity"] == 0 and rows[4]["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert 0 < rows[6]["lr"] < rows[5]["lr"] < rows[4]["lr"] < 0.1 and rows[7]["lr"] < 1e-3
    assert [(row["iteration"], row["target"]) for row in lines("r", "updates")] == [(32, 0.7)]


def test_early_bird_compares_the_masks_of_the_dense_weights():
    """The rule fires at the first epoch at which a separate count says so, and logs d and o."""
    plain, masks, said = Plain(), [], {}
    keep = plain.total - round(0.5 * plain.total)
    for epoch in range(7):
        masks.append(torch.cat([mask.flatten() for mask in plain.largest(keep).values()]))
        if epoch >= 4:
            said[epoch] = max(float((masks[-1] != m).double().mean()) for m in masks[-5:-1])
        plain.train(1, first=epoch, of=7, lr=0.2)
    assert said[6] < said[5] < said[4]
    epsilon = (said[5] + said[6]) / 2
    summary = run(*EB, "--sparsity", 0.5, "--epsilon", epsilon, "--epochs-prune", 7,
                  "--epochs-finetune", 1, "--run-dir", "r")
    rows = lines("r", "metrics")
    assert [row["stage"] for row in rows] == ["search"] * 6 + ["finetune"] * 2
    assert summary["training_cost"] == pytest.approx((6 + 2 * 0.5) / 8, abs=1e-3)


def test_early_bird_that_never_settles_takes_its_last_mask(capsys):
    summary = run(*EB, "--epsilon", 1e-9, "--epochs-prune", 5, "--epochs-finetune", 1,
                  "--run-dir", "r")
    assert [row["stage"] for row in lines("r", "metrics")] == ["search"] * 5 + ["finetune"]
    assert lines("r", "updates")[0]["iteration"] == 40
    assert summary["sparsity"] == pytest.approx(0.9, abs=1e-3)
    out = capsys.readouterr().out
    assert out.count("masks differ in up to") == 2  # epochs 4 and 5
    assert "epochs                  5 of search + 1 = 6" in out


def test_early_time_searches_with_fewer_steps(monkeypatch, capsys):
    """T' from the third epoch on, all steps for the ticket; the loss divides by T'."""
    monkeypatch.setattr(lottery, "early_time", lambda kl, ratio: 3)
    given = [*SHORT, "--sparsity", 0.7, "--method", "et", "--epochs-prune", 4]
    summary = run(*given, "--run-dir", "r")  # 2 + 2 + 2 epochs
    plain = Plain()
    keep = [round(0.3**0.5 * plain.total + 0.5), plain.total - round(0.7 * plain.total)]
    plain.train(2, rewind_at=1)
    plain.start_again(plain.largest(keep[0]))
    plain.train(2, time_steps=3)
    plain.start_again(plain.largest(keep[1]))
    plain.train(2)
    plain.assert_is("r")
    assert summary["method"] == "et" and summary["time_steps"] == 4
    assert summary["training_cost"] == pytest.approx(
        (2 + 2 * 0.75 * keep[0] / plain.total + 2 * keep[1] / plain.total) / 6)
    assert "T' = 3 of 4 steps" in capsys.readouterr().out


def test_early_time_with_early_bird(monkeypatch):
    monkeypatch.setattr(lottery, "early_time", lambda kl, ratio: 2)
    seen, evaluate = [], training.evaluate

    def watch(forward, net, *rest):
        seen.append(net.time_steps)
        return evaluate(forward, net, *rest)

    monkeypatch.setattr(training, "evaluate", watch)
    summary = run(*EB, "--method", "et", "--search", "eb", "--epsilon", 0.9, "--epochs-prune", 5)
    assert seen == [4, 4, 2, 2, 4, 4, 4]
    assert summary["training_cost"] == pytest.approx((2 + 2 * 0.5 + 3 * 0.1) / 7, abs=1e-3)


def test_each_rewind_is_the_stored_state_times_the_mask(monkeypatch):
    """Biases, BN parameters and statistics too; training never reaches what is stored."""
    taken, stored, take = [], [], lottery.take_ticket

    def watch(run_, chosen, target):
        stored.append({n: t.clone() for n, t in run_.notes["rewind"].items()})
        take(run_, chosen, target)
        net, masks = run_.net, run_.masks
        taken.append({n: t.clone() for n, t in net.state_dict().items()})
        for name, tensor in run_.notes["rewind"].items():
            assert tensor.data_ptr() != net.state_dict()[name].data_ptr()
            alive = masks.alive.get(name, torch.ones_like(tensor, dtype=torch.bool))
            assert torch.equal(taken[-1][name], tensor * alive), name
        assert not run_.optimizer.state  # fresh
        assert masks.n_alive == int(chosen.sum())

    monkeypatch.setattr(lottery, "take_ticket", watch)
    run(*SHORT, "--rounds", 4, "--run-dir", "r")
    assert len(stored) == 4
    for other in stored[1:]:
        assert all(torch.equal(stored[0][name], tensor) for name, tensor in other.items())
    net = models.load("r/model.pt").state_dict()
    assert not any(torch.equal(net[n], t) for n, t in stored[0].items() if n.endswith("bn.bias"))
    assert all(t[n] == 1 for t in taken for n in t if n.endswith("num_batches_tracked"))


def test_a_layer_is_never_emptied():
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 4, [4, 8, 16, 16])
    masks, sgd, logged = Masks(net), torch.optim.SGD(net.parameters(), 0.1), []
    largest = net.convs[0].conv.weight.detach().abs().argmax()
    stored = {n: torch.randn_like(t) if t.is_floating_point() else t.clone()
              for n, t in net.state_dict().items()}
    chosen = masks.flat.clone()
    chosen[:masks.sizes[0]] = False
    run_ = SimpleNamespace(net=net, masks=masks, optimizer=sgd, notes=dict(rewind=stored),
                           log_update=lambda target, change, keep: logged.append((change, keep)))
    lottery.take_ticket(run_, chosen, 0.1)
    assert masks.n_alive == int(chosen.sum())
    assert masks.alive["convs.0.conv.weight"].flatten().nonzero().item() == largest  # as trained
    (change, keep), = logged
    assert change.rescued == ["convs.0.conv.weight"] and keep == int(chosen.sum())
    assert torch.equal(change.pruned, ~chosen) and not change.regenerated.any()
    assert change.between == masks.sparsity


# ---- the command line ----------------------------------------------------------------------------


def test_a_run_and_its_folder(capsys):
    summary = run(*SHORT, "--sparsity", 0.8, "--run-dir", "r")
    assert {path.name for path in Path("r").iterdir()} == {
        "config.json", "metrics.jsonl", "updates.jsonl", "checkpoint.pt", "model.pt", "compact.pt",
        "summary.json", "curves.png"}
    assert list(summary) == runfolder.SUMMARY_KEYS
    assert (summary["script"], summary["method"], summary["epochs"]) == ("prune_lottery", "imp", 5)
    assert summary["pruned_accuracy"] is summary["dense_accuracy"] is summary["regen"] is None
    total = sum(layer["weights"] for layer in summary["layers"])
    alive = sum(layer["alive"] for layer in summary["layers"])
    assert alive == total - round(0.8 * total) and summary["sparsity"] == 1 - alive / total
    assert all(layer["alive"] for layer in summary["layers"])
    rows, updates = lines("r", "metrics"), lines("r", "updates")
    assert summary["test_accuracy"] == rows[-1]["test_accuracy"]
    assert [row["stage"] for row in rows] == ["round0"] + ["round1"] * 2 + ["finetune"] * 2
    by_round = lottery.alive_by_round(total, 0.8, 2)
    assert [sum(layer["alive"] for layer in row["layers"]) for row in updates] == by_round[1:]
    assert [row["pruned"] for row in updates] == [by_round[0] - by_round[1], by_round[1] - alive]
    assert [row["target"] for row in updates] == pytest.approx([1 - 0.2**0.5, 0.8])
    assert [row["iteration"] for row in updates] == [8, 24]
    assert all(set(row) == {"update", "iteration", "target", "before", "sparsity", "pruned",
                            "regenerated", "survived", "survived_plain", "layers"} for row in updates)
    densities = [1 - row["sparsity"] for row in rows]
    assert densities == [1] + [by_round[1] / total] * 2 + [1 - (1 - alive / total)] * 2
    assert summary["training_cost"] == pytest.approx(sum(densities) / 5)
    out = capsys.readouterr().out
    assert "epochs                  3 of search + 2 = 5" in out
    assert f"{sum(densities[:3]):.1f} of search + {sum(densities[3:]):.1f}" in out
    state = torch.load("r/checkpoint.pt", weights_only=True)["parts"]["optimizer"]["state"]
    net, masks = models.load("r/model.pt"), modelfile.read("r/model.pt")["masks"]
    for index, (name, parameter) in enumerate(net.named_parameters()):
        if name in masks:
            assert parameter[~masks[name]].count_nonzero() == 0
            assert state[index]["momentum_buffer"][~masks[name]].count_nonzero() == 0


def test_defaults(capsys):
    args = parse("")
    assert (args.method, args.rounds, args.budget, args.sparsity) == ("imp", 4, "matched", 0.9)
    assert args.epochs_prune + args.epochs_finetune == 12
    assert list(lottery.stages_of(args, small_images()).by_name.values()) == [2, 2, 2, 3, 3]
    full = parse("--dataset cifar100")
    assert (full.budget, full.epochs_prune, full.epochs_finetune, full.rounds, full.lr) == (
        "full", 300, 280, 8, 0.3)
    assert [parse(f"--dataset cifar100 --sparsity {s}").rounds for s in (0.9, 0.95, 0.98)] == [
        8, 11, 14]
    bird = parse("--dataset cifar10 --method eb")
    assert (bird.epochs_prune, bird.epochs_finetune, bird.epsilon, bird.distance) == (
        300, 300, 0.02, "entries")
    matched = parse("--dataset cifar100 --budget matched")
    assert (matched.epochs_prune, matched.epochs_finetune, matched.rounds) == (200, 300, 4)
    assert parse("--method et").kl_ratio == 0.6
    with pytest.raises(SystemExit):
        lottery.main(["--help"])
    assert "None" not in capsys.readouterr().out


def test_names_of_runs():
    names = {given: parse(given).run_dir for given in (
        "", "--method eb", "--method et", "--method et --search eb", "--rounds 2", "--seed 1",
        "--sparsity 0.8", "--method eb --distance kept", "--budget full", "--dataset a/mine.npz")}
    assert len(set(names.values())) == len(names)
    assert names[""] == "runs/fashion-mini-small-imp-0.9-k4-matched-seed0"


@pytest.mark.parametrize("given", ["", "--method eb", "--method et", "--method et --search eb"])
def test_smoke(given):
    summary = run("--smoke", *given.split())
    assert summary["epochs"] == 5 and summary["sparsity"] == 0.9
    assert list(summary) == runfolder.SUMMARY_KEYS


def test_smoke_of_the_paper_s_schedule():
    rng = np.random.default_rng(0)
    Path("data").mkdir()
    x = rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    np.savez("data/cifar100.npz", x_train=x, y_train=np.arange(100), x_test=x[:20],
             y_test=np.arange(20))
    summary = run("--dataset", "cifar100", "--smoke", "--width", 0.1)
    assert summary["model"] == "vgg16" and summary["epochs"] == 4 + 2 * 4
    folder = next(Path("runs").glob("smoke-cifar100-vgg16-imp-0.9-k2-full-*seed0"))
    assert len(lines(folder, "updates")) == 2


def test_from_a_trained_network():
    run(*SHORT, "--run-dir", "r")
    net = models.load("r/model.pt")
    every = {name: torch.ones_like(mask) for name, mask in net.masks.items()}
    torch.save(modelfile.pack(net, every), "dense.pt")
    images = data.load("mine.npz")
    right = net(images.x_test).sum(0).argmax(1) == images.y_test
    summary = run(*EB, "--init", "dense.pt", "--run-dir", "s")
    assert summary["dense_accuracy"] == pytest.approx(right.double().mean().item())
    stored = torch.load("s/checkpoint.pt", weights_only=True)["notes"]["rewind"]
    assert all(torch.equal(stored[name], tensor) for name, tensor in net.state_dict().items())


# ---- stopping and going on -----------------------------------------------------------------------


@pytest.mark.parametrize("given, steps", [
    (SHORT, [1, 8, 9, 20, 24, 33]),  # at the rewind point, at the ends of rounds, within each
    ([*FULL, "--epochs-prune", "2"], [11, 16, 18]),
    ([*EB, "--epsilon", "0.9", "--epochs-prune", "6"], [20, 32, 33, 50]),  # search, found, ticket
    ([*EB, "--budget", "full", "--epsilon", "0.9", "--epochs-prune", "5"], [35]),
    ([*EB, "--epsilon", "1e-9", "--epochs-prune", "5"], [39, 43]),
    ([*SHORT, "--method", "et", "--epochs-prune", "4"], [10, 20, 34]),  # before T' is known, after
    ([*EB, "--method", "et", "--search", "eb", "--epsilon", "0.9", "--epochs-prune", "4"], [20]),
])
def test_a_stopped_run_goes_on_bit_by_bit(given, steps, monkeypatch):
    monkeypatch.setattr(lottery, "early_time", lambda kl, ratio: 3)
    run(*given, "--run-dir", "unbroken")
    for step in steps:
        stop_after(step, monkeypatch, run, *given, "--run-dir", f"r{step}")
        run("--run-dir", f"r{step}", "--resume")  # all other flags come from its config.json
        assert_same_run("unbroken", f"r{step}")


@pytest.mark.parametrize("given, at", [(SHORT, 28), ([*EB, "--epsilon", "0.9"], 35)])
def test_a_cut_after_the_last_checkpoint_is_done_again(given, at, monkeypatch, capsys):
    """Die in the first epoch of a ticket, whose cut no checkpoint knows, without saving."""
    given = [*given, "--epochs-prune", "5" if "eb" in given else "3", "--run-dir"]
    run(*given, "unbroken")
    add = Meter.add

    def die(self, loss, logits, labels, iteration=0):
        add(self, loss, logits, labels, iteration)
        if iteration == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Meter, "add", die)
    assert "interrupted" in wrong(capsys, *given, "r", code=130)
    monkeypatch.setattr(Meter, "add", add)
    logged = lines("r", "updates")
    run("--run-dir", "r", "--resume")
    assert_same_run("unbroken", "r")
    assert lines("r", "updates") == logged  # the cut of the ticket was there already


def test_a_finished_run_is_left_alone(capsys):
    summary = run(*SHORT, "--run-dir", "r")
    assert run(*SHORT, "--run-dir", "r", "--resume") == summary
    assert "r is finished" in capsys.readouterr().out
    assert "--resume, replace it by --overwrite" in wrong(capsys, *SHORT, "--run-dir", "r")
    assert json.loads(Path("r/summary.json").read_text()) == summary


# ---- what a wrong command gets -------------------------------------------------------------------


@pytest.mark.parametrize("given, words", [
    ("--sparsity 90", "expected a number above 0 and below 1. For 90 % write 0.9"),
    ("--sparsity 0", "above 0"), ("--sparsity 1", "below 1"), ("--sparsity nan", "is nan"),
    ("--rounds 0", "--rounds is 0"), ("--rounds 2.5", "--rounds is 2.5"),
    ("--rounds 12", "--rounds is 12, expected at most 11"),
    ("--epochs-prune 0", "--epochs-prune is 0"), ("--epochs-finetune 0", "--epochs-finetune is 0"),
    ("--method lth", "invalid choice: 'lth'"), ("--search all", "invalid choice"),
    ("--budget half", "invalid choice"), ("--distance kl", "invalid choice"),
    ("--method eb --epsilon 0", "--epsilon is 0"), ("--method et --kl-ratio 1", "--kl-ratio is 1"),
    ("--epsilon 0.1", "--epsilon is 0.1, which --method imp does not use"),
    ("--search eb", "--search is eb, which --method imp does not use"),
    ("--kl-ratio 0.5", "--method imp does not use"),
    ("--method eb --rounds 4", "--rounds is 4, which --method eb does not use"),
    ("--method eb --kl-ratio 0.5", "--method eb does not use"),
    ("--method et --search eb --rounds 3", "--method et --search eb does not use"),
    ("--method et --distance kept", "--method et --search imp does not use"),
    ("--method et --time-steps 3", "--time-steps is 3, expected at least 4"),
    ("--method et --rounds 1 --epochs-prune 2 --epochs-finetune 2", "would search for 2 epochs"),
    ("--method et --search eb --epochs-prune 2", "would search for 2 epochs"),
    ("--sparsity 0.9999 --width 0.25", "expected at least one for each of the 5 layers"),
    ("--batch-size 7000", "--batch-size is 7000"), ("--dataset no/such.npz", "no/such.npz"),
    ("--init absent.pt", "absent.pt"),
])
def test_wrong_commands(given, words, capsys):
    assert words in wrong(capsys, *given.split())
    assert [path.name for path in Path().iterdir()] == ["mine.npz"]  # nothing was written
