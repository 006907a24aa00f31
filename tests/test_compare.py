"""The comparison of layers for images: all take part, one recipe, rows kept apart, results that can be resumed."""

from __future__ import annotations

import csv
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import compare
from benchmarks.compare import Method, Recipe, Training, all_methods, generated_images, main
from liplayers import FAMILIES, MaxMin, lipschitz_bound
from liplayers.data import Split
from liplayers.errors import DataError, NonFiniteError
from liplayers.losses import OffsetCrossEntropy
from liplayers.training import warmup_cosine

AOL = Method("aol", "conv")
SMALL = Recipe(steps=6, search_steps=3, batch_size=4, channels=4, image_size=8)


def quick(output: Path, *arguments: str) -> int:
    return main(["--quick", "--output", str(output), *arguments])


def result_files(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "compare_quick_runs").iterdir())


@pytest.fixture(scope="module")
def all_results(tmp_path_factory) -> Path:
    """What a quick run of everything leaves."""
    folder = tmp_path_factory.mktemp("compare")
    assert quick(folder) == 0
    return folder


@pytest.fixture
def results(all_results, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(all_results, tmp_path / "results")


def nothing() -> None:
    """A tick."""


# Networks and training ------------------------------------------------------------------------------------------------


def test_every_family_with_layers_for_images_takes_part():
    expected = {(f.name, "conv") for f in FAMILIES.values() if f.conv}
    expected |= {(f.name, "conv_block") for f in FAMILIES.values() if f.conv_block}
    methods = all_methods()
    assert {(m.family, m.role) for m in methods} == expected
    assert len({m.name for m in methods}) == len(methods)


@pytest.mark.parametrize("method", all_methods(), ids=lambda m: m.name)
def test_networks_differ_in_their_four_layers_alone_and_are_about_1_lipschitz(method):
    network = method.network((3, 8, 8), 5, 4)
    plain = AOL.network((3, 8, 8), 5, 4)
    own = type(method.layers(4)[0])
    assert sum(isinstance(module, own) for module in network) == 4
    kept = [repr(m) for m in network if not isinstance(m, (own, MaxMin))]
    assert kept == [repr(m) for m in plain if not isinstance(m, (type(AOL.layers(4)[0]), MaxMin))]
    assert network(torch.rand(2, 3, 8, 8)).shape == (2, 5)
    # what norms are divided by is an estimate from below
    assert lipschitz_bound(network[:-1].eval(), (3, 8, 8)) <= 1.1


def test_an_activation_follows_what_has_none():
    assert [type(m) for m in Method("liresnet", "conv_block").layers(4)][1:] == [MaxMin]
    assert len(Method("sll", "conv_block").layers(4)) == 1


def test_all_layers_see_the_same_batches_and_every_image_once_an_epoch():
    images = generated_images(8)
    one, other, later = (
        Training(method, images, SMALL, 0.01, 6, seed).batches
        for method, seed in ((AOL, 0), (Method("sll", "conv_block"), 0), (AOL, 1))
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, later)
    assert torch.equal(one[:3].flatten().sort().values, torch.arange(12))


def test_a_training_is_adam_with_the_offset_loss_and_the_schedule():
    images = generated_images(8)
    training = Training(AOL, images, SMALL, 0.01, 6, seed=3)
    torch.manual_seed(3)
    network = AOL.network((3, 8, 8), 3, SMALL.channels)
    optimizer = torch.optim.Adam(network.parameters(), 0.01, (0.9, 0.99))
    schedule = warmup_cosine(optimizer, 6, SMALL.warmup)
    for rows in training.batches:
        optimizer.zero_grad()
        loss = OffsetCrossEntropy(SMALL.offset, SMALL.temperature)
        loss(network(images.train.store[rows]), images.train.labels[rows]).backward()
        optimizer.step()
        schedule.step()
    ticks: list[None] = []
    assert len(training.run(lambda: ticks.append(None))) == len(ticks) == 6
    for p, q in zip(training.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_callers_random_state_is_left_alone():
    state = torch.get_rng_state()
    Training(AOL, generated_images(8), SMALL, 0.01, 6, seed=3).run(nothing)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_rate_is_chosen_on_validation_rows_and_the_network_certified_on_test_rows():
    images = generated_images(8)
    empty = Split(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.long))
    tried = compare.try_rates(AOL, replace(images, test=empty), SMALL, nothing)
    assert tried["scores"][f"{tried['rate']:g}"] == max(tried["scores"].values())
    wrong = replace(images, test=replace(images.test, labels=torch.full((12,), 3)))  # a class that no logit is for
    with pytest.raises(DataError, match="sample 0 has label 3"):
        compare.train_and_certify(AOL, replace(wrong, val=empty), SMALL, 0.1, 0, nothing)


def test_certified_accuracies_are_those_of_margins_over_distances_of_rows():
    images = generated_images(8)
    training = Training(Method("bcop", "conv"), images, SMALL, 0.1, 6, seed=0)
    training.run(nothing)
    certificates = compare.certified(training.network, images, images.test, "proof")
    network = training.network.double().eval()
    with torch.no_grad():
        logits = network(images.test.store.double()).numpy()
        rows = network[-1].weight.numpy()
    first = logits.argmax(1)
    distances = np.linalg.norm(rows[first][:, None] - rows[None], axis=2)
    distances[np.arange(12), first] = np.nan
    radius = np.nanmin((logits.max(1, keepdims=True) - logits) / distances, axis=1)
    assert certificates.prediction.tolist() == first.tolist()
    np.testing.assert_allclose(certificates.radius.numpy(), radius, rtol=1e-3)  # its bounds are 1


@pytest.mark.parametrize(("best", "tried"), [(0.01, 3), (0.0316, 4), (0.001, 5), (1e-9, 5), (10.0, 5)])
def test_the_search_ends_between_two_rates_that_are_no_better_or_at_its_end(best, tried):
    seen = []

    def score(rate: float) -> float:
        seen.append(rate)
        return -abs(math.log(rate / best))

    found = compare.search_rate(0.01, score)
    assert found["rate"] == pytest.approx(min(max(best, 0.01 * 10**-1.5), 0.01 * 10**1.5), rel=0.01)
    assert len(set(seen)) == len(seen) == tried
    assert [float(rate) for rate in found["scores"]] == sorted(seen)


def test_of_equal_rates_the_first_is_taken():
    assert compare.search_rate(0.01, lambda rate: 0.0)["rate"] == 0.01


@pytest.mark.parametrize("error", [NonFiniteError("NaN"), torch.linalg.LinAlgError("singular")])
def test_a_training_that_diverges_counts_nothing_in_the_search_and_is_named_after_it(monkeypatch, error):
    def run(self, tick):
        raise error

    monkeypatch.setattr(Training, "run", run)
    assert compare.validation_score(AOL, generated_images(8), SMALL, 0.1, nothing) == 0
    with pytest.raises(NonFiniteError, match=r"AOLConv2d, seed 0, rate 0\.1: the training diverged"):
        compare.train_and_certify(AOL, generated_images(8), SMALL, 0.1, 0, nothing)


def test_weights_that_are_not_finite_count_nothing(monkeypatch):
    def run(self, tick):
        with torch.no_grad():
            next(self.network.parameters()).fill_(torch.nan)

    monkeypatch.setattr(Training, "run", run)
    assert compare.validation_score(AOL, generated_images(8), SMALL, 0.1, nothing) == 0


# The command ----------------------------------------------------------------------------------------------------------


def test_a_quick_run_leaves_a_table_of_all_layers_and_two_plots(all_results):
    names = ["compare_quick.csv", "compare_quick.md", "compare_quick.png", "compare_quick_time.png"]
    assert sorted(path.name for path in all_results.iterdir() if path.is_file()) == names
    text = (all_results / "compare_quick.md").read_text(encoding="utf-8")
    for method in all_methods():
        assert f"| {method.name} | " in text
    with (all_results / "compare_quick.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [method.name for method in all_methods()]
    for row in rows:
        curve = [float(row[f"c{radius}"]) for radius in compare.RADII]
        assert curve == sorted(curve, reverse=True)
        assert curve[0] <= float(row["clean"])


def test_what_is_there_is_not_trained_again(results, monkeypatch, capsys):
    table = (results / "compare_quick.csv").read_bytes()
    monkeypatch.setattr(compare, "Training", None)
    assert quick(results) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert (results / "compare_quick.csv").read_bytes() == table


def test_an_interrupted_run_goes_on_and_searches_the_rate_once(tmp_path, monkeypatch, capsys):
    searched = []
    search, train = compare.try_rates, compare.train_and_certify

    def counted(method, *arguments, **options):
        searched.append(method.family)
        return search(method, *arguments, **options)

    def interrupted(method, *arguments, **options):
        if method.family == "sll":
            raise KeyboardInterrupt
        return train(method, *arguments, **options)

    monkeypatch.setattr(compare, "try_rates", counted)
    monkeypatch.setattr(compare, "train_and_certify", interrupted)
    assert quick(tmp_path, "--family", "aol", "sll", "--seeds", "2") == 130
    assert "goes on" in capsys.readouterr().err
    assert result_files(tmp_path) == ["aol.conv.0.json", "aol.conv.rates.json", "sll.conv_block.rates.json"]
    monkeypatch.setattr(compare, "train_and_certify", train)
    assert quick(tmp_path, "--family", "aol", "sll", "--seeds", "2") == 0
    assert searched == ["aol", "sll"]
    assert {"aol.conv.1.json", "sll.conv_block.1.json"} < set(result_files(tmp_path))
    assert "Means over 2 seeds" in (tmp_path / "compare_quick.md").read_text(encoding="utf-8")


def test_a_folder_of_images_is_read_and_a_tenth_set_apart(tmp_path):
    generator = np.random.default_rng(0)
    for split, name in ((s, n) for s in ("train", "test") for n in ("cat", "dog")):
        folder = tmp_path / "set" / split / name
        folder.mkdir(parents=True)
        for i in range(20):
            Image.fromarray(generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    images = compare.read_images(tmp_path / "set", 8)
    assert images.input_shape == (3, 8, 8)
    assert images.num_classes == 2
    assert images.record() | {"test_sha256": ""} == {
        "name": "set",
        "train": 36,
        "val": 4,
        "test": 40,
        "test_sha256": "",
    }
    arguments = ["--root", str(tmp_path / "set"), "--family", "lipnext", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--steps", "2", "--channels", "4"]) == 0
    assert main([*arguments, "--steps", "3", "--channels", "4"]) == 2  # results of another recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--root is missing"),
        (["--root", "nowhere"], "no folder nowhere"),
        (["--quick", "--family", "aoll"], "did you mean aol"),
        (["--quick", "--family", "manifold"], "no layer for images"),
        (["--quick", "--seeds", "0"], "seeds=0"),
        (["--root", ".", "--steps", "0"], "steps=0"),
        (["--root", ".", "--channels", "5"], "channels=5; expected a multiple of 2"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:40], "not a result of this benchmark"),
        (lambda content: "[]", "not a result of this benchmark"),
        (lambda content: content.replace('"offset": 1.0', '"offset": 2.0'), "of another recipe"),
        (lambda content: content.replace('"name": "noise"', '"name": "other"'), "saw different data"),
    ],
)
def test_results_that_do_not_belong_together_are_refused(results, capsys, damage, message):
    path = results / "compare_quick_runs" / "bcop.conv.0.json"
    content = path.read_text(encoding="utf-8")
    path.write_text(damage(content), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != content
    assert quick(results) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


# The report -----------------------------------------------------------------------------------------------------------


def result(layer: str, seed: int, accuracy: float, seconds: float) -> dict:
    certified = {str(radius): accuracy * (1 - radius / 200) for radius in compare.RADII}
    row = {"layer": layer, "seed": seed, "rate": 0.1, "clean": accuracy, "certified": certified}
    return row | {"parameters": 5, "seconds_per_1000": seconds, "memory": None}


def test_summaries_are_means_over_seeds_the_best_first():
    rows = [result("a", 0, 0.2, 3.0), result("b", 0, 0.4, 1.0), result("a", 1, 0.4, 2.0), result("b", 1, 0.6, 5.0)]
    best, worst = compare.summaries(rows)
    assert (best.layer, worst.layer, best.seeds) == ("b", "a", 2)
    assert worst.clean == pytest.approx(0.3)
    assert worst.certified[100] == pytest.approx(0.15)
    assert worst.seconds_per_1000 == 2.0


def test_undominated_layers_are_those_that_no_other_beats_in_both():
    generator = random.Random(0)
    for _ in range(50):
        pairs = [(generator.randint(1, 6), generator.randint(1, 6) / 10) for _ in range(8)]
        found = compare.summaries([result(str(i), 0, acc, sec) for i, (sec, acc) in enumerate(pairs)])
        names = {each.layer for each in compare.undominated(found, 36)}
        beaten = {p for p in pairs for q in pairs if q != p and q[0] <= p[0] and q[1] >= p[1]}
        assert {pairs[int(name)] for name in names} == set(pairs) - beaten
