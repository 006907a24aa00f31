"""The experiments: each composes, has the published size, and trains at reduced size on generated images."""

import math
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import liplayers as lp
from liplayers import cli
from liplayers.bounds.composition import head_splitter
from liplayers.checkpoint import load_checkpoint
from liplayers.cli.configuration import build

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
SMALL = {
    "channels": 8,
    "width": 16,
    "depth": 2,
    "blocks": 1,
    "dense": 1,
    "layers": 1,
    "convs_per_block": 1,
    "conv_blocks": 2,
    "dense_blocks": 2,
    "hidden_channels": 4,
    "hidden_features": 4,
    "patch_features": 2,
}
PUBLISHED = {  # parameters in whole millions
    "bronet_cifar10": 68,
    "liresnet_cifar10": 83,
    "sll_cifar10": 41,
    "convnet_cifar10": 25,
}


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def reduced(cfg: DictConfig) -> list[str]:
    """Overrides that make the model of a config small."""
    return [f"model.{key}={value}" for key, value in SMALL.items() if cfg.model.get(key)]


def images(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 3, 16, 16), np.uint8), np.arange(count) % 3


def as_archives(folder: Path) -> list[str]:
    overrides = ["data=npz"]
    for seed, split in enumerate(("train", "test")):
        pixels, labels = images(seed)
        np.savez(folder / f"{split}.npz", images=pixels, labels=labels)
        overrides.append(f"data.{split}={folder / split}.npz")
    return overrides


def as_folders(folder: Path) -> list[str]:
    for seed, split in enumerate(("train", "test")):
        for i, (pixels, label) in enumerate(zip(*images(seed), strict=True)):
            path = folder / split / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    return [f"data.root={folder}", "data.image_size=[16,16]"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains(experiment: str, tmp_path: Path):
    cfg = compose(f"experiment={experiment}")
    data = as_folders(tmp_path) if "image_size" in cfg.data else as_archives(tmp_path)
    output = tmp_path / "run"
    metrics = cli.train(
        compose(
            f"experiment={experiment}",
            *data,
            *reduced(cfg),
            "data.batch_size=9",
            "trainer.max_steps=2",
            "trainer.accelerator=cpu",
            "trainer.enable_progress_bar=false",
            f"output={output}",
        )
    )
    assert math.isfinite(metrics["train/loss"])
    last = output / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == 2
    checkpoint = load_checkpoint(last)
    model = build(DictConfig(checkpoint.config["model"]), input_shape=(3, 16, 16), num_classes=3)
    checkpoint.load_into(model)
    assert 0.99 < head_splitter(model, (3, 16, 16), estimates=True)().body_bound < 1.001
    assert 0.99 < lp.split_head(model, (3, 16, 16)).body_bound < 1.1


@pytest.mark.parametrize(("experiment", "millions"), PUBLISHED.items())
def test_recipes_have_the_published_number_of_parameters(experiment: str, millions: int):
    with torch.device("meta"):
        model = build(compose(f"experiment={experiment}").model, input_shape=(3, 32, 32), num_classes=10)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1


@pytest.mark.parametrize(
    ("experiment", "decay", "blocks", "depth"),
    [("bronet_cifar10", 4e-5, 0, 12), ("bronet_tiny_imagenet", 4e-5, 0, 6), ("bronet_imagenet", 0.0, 6, 8)],
)
def test_bronets_settings_arrive_where_they_are_used(experiment: str, decay: float, blocks: int, depth: int):
    cfg = compose(f"experiment={experiment}")
    assert (cfg.model.blocks, cfg.model.depth) == (blocks, depth)
    optimizer = build(cfg.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer.inner, torch.optim.NAdam)
    assert [group["weight_decay"] for group in optimizer.inner.param_groups] == [decay]
    augment = [build(part) for part in cfg.data.augment]
    assert [type(part).__name__ for part in augment] == ["RandomShift", "RandomHorizontalFlip", "RandAugment"]
    assert augment[-1].p == 0.5


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_says_how_it_is_run_and_where_it_comes_from(experiment: str):
    head = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().split("defaults:")[0].splitlines()
    assert head[0] == "# @package _global_"
    assert all(line.startswith("# ") for line in head)
    assert "arXiv" in "".join(head) or experiment in ("cifar10_jpeg", "digits", "mnist", "uci_ldlt")


def test_the_speedrun_costs_what_its_epochs_were_derived_from():
    """The counts in its header are those of forward and backward at the real size, maps of the weights apart."""
    cfg = compose("experiment=cifar10_speedrun")
    counts = []
    with torch.device("meta"):
        model = build(cfg.model, input_shape=(3, 32, 32), num_classes=10)
        for batch in (1, 2):
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(batch, 3, 32, 32)).sum().backward()
            counts.append(counter.get_total_flops() / 1e9)
    image = counts[1] - counts[0]
    steps = int(50_000 * (1 - cfg.data.val_fraction)) // cfg.data.batch_size
    head = (CONFIGS / "experiment" / "cifar10_speedrun.yaml").read_text().split("defaults:")[0]
    assert f"{image:.1f} GFLOP an image" in head
    assert f"{counts[0] - image:.0f} GFLOP a step" in head
    assert f"{cfg.trainer.max_epochs} epochs of {steps} steps" in head


def test_the_speedrun_ends_at_its_time_limit(tmp_path: Path):
    cfg = compose("experiment=cifar10_speedrun")
    trainer = build(cfg.trainer, accelerator="cpu", default_root_dir=str(tmp_path), logger=False)
    (timer,) = (callback for callback in trainer.callbacks if isinstance(callback, Timer))
    assert timer.time_remaining() == 25 * 60
