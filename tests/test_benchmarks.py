"""The benchmark runs over whatever is registered, compares like with like, and leaves whole files behind."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liplayers as lp
from benchmarks import gain, layers, timing
from benchmarks.peers import PEERS
from benchmarks.plain import multiply_adds, plain_block
from benchmarks.sizes import QUICK_SIZES, SIZES, build
from liplayers import FAMILIES
from liplayers.core.registry import ROLES, Family
from liplayers.errors import ArgumentError, UnknownNameError

CPU = torch.device("cpu")


@pytest.fixture
def family(monkeypatch):
    """Registers a family for one test."""

    def make(**roles: Any) -> str:
        monkeypatch.setitem(FAMILIES, "fake", Family("fake", **roles))
        return "fake"

    return make


def test_ratios_are_finite_and_positive():
    rows = layers.run(families=["aol", "sll"], quick=True, repeats=1)
    assert {row["role"] for row in rows} == {r for r in ROLES for f in ("aol", "sll") if getattr(FAMILIES[f], r)}
    assert not any(row["refused"] for row in rows)
    for row in rows:
        for name in ("train_ratio", "eval_ratio", "memory_ratio", "train_ms", "eval_against_ms"):
            assert math.isfinite(row[name]), name
            assert row[name] > 0, name
        low, high = row["train_ratio_quartiles"]
        assert low <= row["train_ratio"] <= high


def test_every_role_has_sizes_and_every_peer_a_role():
    assert set(ROLES) <= set(SIZES)
    assert set(SIZES) == set(QUICK_SIZES)
    assert {role for _, role in PEERS} <= set(SIZES)


def test_a_new_family_is_measured_and_may_refuse(family):
    class Picky(lp.AOLConv2d):
        def __init__(self, *args: Any, stride: int = 1, **options: Any) -> None:
            if stride != 1:
                raise ArgumentError(f"Picky: stride={stride}; expected 1")
            super().__init__(*args, **options)

    rows = layers.run([family(conv=Picky)], quick=True, repeats=1)
    assert [bool(row["refused"]) for row in rows] == [False, False, True]
    assert rows[-1]["refused"] == "Picky: stride=2; expected 1"
    assert rows[-1]["train_ratio"] is None


def test_transposed_convolutions_have_torchs_for_a_peer(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, "fake", type("Fake", (), {"conv_transpose": nn.ConvTranspose2d}))
    for size in QUICK_SIZES["conv_transpose"]:
        contest = layers.Contest("conv_transpose", size, CPU)
        contest.enter("fake", ())
        (row,) = contest.run(1, lambda: None)
        assert row["against"] == "nn.ConvTranspose2d"
        assert row["memory_ratio"] == pytest.approx(1)


def test_a_block_without_padding_mode_is_left_out_where_it_is_circular(family):
    name = family(conv_block=lambda channels: lp.SLLConv2dBlock(channels))
    rows = layers.run([name], ["conv_block"], quick=True, repeats=1)
    assert [bool(row["refused"]) for row in rows] == [False, True]


# The plain block ------------------------------------------------------------------------------------------------------


class _Shifted(nn.Module):
    """Two 1×1 products with a shift between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("oc,nchw->nohw", self.W, x).roll(1, -1)
        return torch.einsum("oc,nchw->nohw", self.W, y).abs()


def test_the_plain_block_runs_as_many_multiply_adds():
    image, vector = torch.randn(2, 6, 8, 10), torch.randn(4, 12)
    cases = [
        (lp.SLLConv2dBlock(6), image, "x − W₂σ(W₁x), 3×3 zeros"),
        (lp.SLLConv2dBlock(6, padding_mode="circular"), image, "x − W₂σ(W₁x), 3×3 circular"),
        (lp.SLLConv2dBlock(6, hidden_channels=9), image, "x − W₂σ(W₁x), 9 hidden, 3×3 zeros"),
        (lp.AOLConv2d(6, 6, 3, padding=1), image, "x + Wx, 3×3 zeros"),
        (_Shifted(6), image, "x − W₂σ(W₁x), 1×1 zeros"),
        (lp.SLLBlock(12), vector, "x − W₂σ(W₁x)"),
        (lp.SLLBlock(12, hidden_features=30), vector, "x − W₂σ(W₁x), 30 hidden"),
        (lp.AOLLinear(12, 12), vector, "x + Wx"),
    ]
    for layer, x, expected in cases:
        mode = getattr(layer, "padding_mode", "zeros")
        plain = plain_block(layer, x, mode)
        assert plain.describe() == expected
        if mode == "zeros":
            assert multiply_adds(plain, x) == multiply_adds(layer, x)
        assert plain(x).shape == x.shape


def test_a_block_in_the_fourier_domain_stands_beside_a_kernel():
    layer, x = lp.CayleyConv2d(6, 6, 3, padding=1), torch.randn(2, 6, 8, 10)
    assert multiply_adds(layer, x)[1]
    assert plain_block(layer, x, "zeros").describe() == "x + Wx, 3×3 zeros"
    twice = nn.Sequential(layer, lp.BROConv2d(6, 6, 3, padding=1))
    assert plain_block(twice, x, "zeros").describe() == "x − W₂σ(W₁x), 3×3 zeros"


# What is timed --------------------------------------------------------------------------------------------------------


def test_the_parameters_leave_their_initial_state():
    layer = build("aol", "linear", QUICK_SIZES["linear"][0])
    before = layer.raw.detach().clone()
    layers.perturb_(layer)
    assert (layer.raw.detach() - before).norm().item() == pytest.approx(0.1 * before.norm().item(), rel=1e-4)


def test_a_step_needs_the_weight_in_training_and_finds_it_cached_in_evaluation():
    computed = []

    class Counting(lp.AOLLinear):
        def map_weight(self, raw: Tensor) -> Tensor:
            computed.append(1)
            return super().map_weight(raw)

    contender = layers.Contender(Counting(4, 4), torch.randn(2, 4, requires_grad=True))
    computed.clear()
    contender.train_step()
    assert len(computed) == 1
    contender.layer.eval()
    contender.eval_step()
    computed.clear()
    contender.eval_step()
    assert not computed


def test_rounds_run_the_steps_in_turn():
    order: list[str] = []
    slow = 2 * timing.LEAST_SECONDS
    steps = [lambda n=n: (order.append(n), timing.time.sleep(slow)) for n in "ab"]
    times = timing.interleaved(steps, 2, CPU)
    assert "".join(order) == "aabb" + "abab"
    assert all(len(row) == 2 and min(row) >= 1000 * slow for row in times)


def test_peak_memory_counts_what_is_held_at_a_time():
    def step() -> Tensor:
        a = torch.empty(100_000)
        b = torch.empty(200_000)
        del a
        return torch.empty(50_000) + b[0]

    assert timing.peak_memory(step, CPU) == pytest.approx(4 * 300_000, rel=1e-3)


# The command ----------------------------------------------------------------------------------------------------------


def command(output: Path, *arguments: str) -> int:
    return layers.main(["--device", "cpu", "--quick", "--repeats", "1", "--output", str(output), *arguments])


def test_the_files_are_whole_and_survive_a_failed_run(tmp_path, family):
    arguments = ["--family", "aol", "--role", "linear"]
    assert command(tmp_path, *arguments) == 0
    stem = "layers_cpu_quick_part"
    assert {p.name for p in tmp_path.iterdir()} == {f"{stem}.{kind}" for kind in ("json", "md", "png")}
    content = json.loads((tmp_path / f"{stem}.json").read_text())
    assert {"cpu", "cores", "threads", "torch", "device", "created"} <= set(content["machine"])
    assert len(content["rows"]) == len(QUICK_SIZES["linear"])
    assert "| aol | nn.Linear |" in (tmp_path / f"{stem}.md").read_text()
    assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")

    def broken(*args: Any) -> nn.Module:
        raise RuntimeError("broken")

    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    name = family(linear=broken)
    with pytest.raises(RuntimeError, match="broken"):
        command(tmp_path, "--family", "aol", name, "--role", "linear")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_whole_and_a_part_have_different_names(tmp_path, monkeypatch):
    rows = layers.run(["aol"], ["linear"], quick=True, repeats=1)
    monkeypatch.setattr(layers, "run", lambda *args, **options: rows)
    assert layers.main(["--device", "cpu", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "layers_cpu.json").exists()


def test_unknown_names_are_one_line(tmp_path, capsys):
    with pytest.raises(UnknownNameError, match="unknown family 'aoll': did you mean aol"):
        layers.run(["aoll"], quick=True)
    assert command(tmp_path, "--family", "aoll") == 2
    assert command(tmp_path, "--role", "convs") == 2
    assert command(tmp_path, "--family", "sll", "--role", "linear") == 2
    error = capsys.readouterr().err
    assert error.splitlines() == [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(error.splitlines()) == 3
    assert not list(tmp_path.iterdir())


def test_a_peer_that_is_not_installed_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(layers.sys.modules, "orthogonium", None)
    monkeypatch.setitem(layers.sys.modules, "deel.torchlip", None)
    assert command(tmp_path, "--peers", "--family", "aol", "--role", "linear") == 0
    captured = capsys.readouterr()
    assert "pip install orthogonium" in captured.err
    assert "pip install deel-torchlip" in captured.err


def test_what_cannot_work_is_said_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layers, "Contest", None)
    (tmp_path / "file").touch()
    assert command(tmp_path / "file" / "folder") == 2
    assert layers.main(["--quick", "--repeats", "0", "--output", str(tmp_path)]) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert layers.main(["--quick", "--device", "cuda", "--output", str(tmp_path)]) == 2
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 3
    assert all(message.startswith("error: ") for message in messages)


def test_the_gain_study_covers_every_dense_family_and_measures_what_it_says(tmp_path, monkeypatch, capsys):
    dense = {f.name for f in FAMILIES.values() if f.linear or f.dense_block}
    assert dense <= {name.split(",")[0] for name in gain.networks()}
    halves = partial(gain._blocks, lambda width: lp.Scale(0.5))
    assert gain.gain(halves, width=4, depth=3) == pytest.approx(1 / 8)
    monkeypatch.setattr(gain, "DEPTHS", (1, 2))
    assert gain.main(["--width", "6", "--output", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gain.csv", "gain.md", "gain.png"]
    assert gain.main(["--width", "0"]) == 2
    assert "width=0" in capsys.readouterr().err
