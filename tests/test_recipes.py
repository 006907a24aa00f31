"""The experiments: each composes, has the published size, and trains at reduced size on generated images."""

import math
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
PUBLISHED = {  # parameters in millions, and the images and classes that they are for
    "bronet_cifar10": (68.8, 32, 10),
    "bronet_tiny_imagenet": (75.6, 64, 200),
    "bronet_imagenet": (86.4, 224, 1000),
    "liresnet_cifar10": (82.9, 32, 10),
    "sll_cifar10": (41.4, 32, 10),
    "convnet_cifar10": (25.1, 32, 10),
    "lbdn_cifar10": (25.7, 32, 10),
}
CIFAR_MEAN, IMAGENET_MEAN = [0.4914, 0.4822, 0.4465], [0.485, 0.456, 0.406]
GATED = {"p": 0.5, "gate": "image", "interpolation": "nearest"}
COLOURS = {"brightness": 0.1, "contrast": [0.5, 2.0], "saturation": [0.3, 2.0], "hue": 0.02}
REFLECTED = [("RandomShift", {"padding": 4, "padding_mode": "reflect"}), ("RandomHorizontalFlip", {"p": 0.5})]
FLIP = ("RandomHorizontalFlip", {"p": 0.5})
AUGMENTED = {  # as the authors' code does it
    **{
        f"{name}_cifar10": [("RandomShift", {"padding": 4}), FLIP, ("RandAugment", GATED)]
        for name in ("bronet", "liresnet")
    },
    **{
        f"{n}_tiny_imagenet": [("RandomShift", {"padding": 8}), FLIP, ("RandAugment", GATED)]
        for n in ("bronet", "liresnet")
    },
    **{
        f"{name}_imagenet": [("RandomShift", {"padding": 16}), FLIP, ("RandAugment", {"interpolation": "nearest"})]
        for name in ("bronet", "liresnet")
    },
    **{
        f"{n}_{data}": [*REFLECTED, ("ColorJitter", COLOURS)]
        for n in ("sll", "lbdn")
        for data in ("cifar10", "tiny_imagenet")
    },
    "aol_cifar10": [
        ("ColorJitter", COLOURS),
        ("RandomAffine", {"degrees": 5, "translate": 0.1, "padding_mode": "reflect"}),
        FLIP,
    ],
    "convnet_cifar10": [("RandomShift", {"padding": 4, "fill": CIFAR_MEAN}), FLIP],
    "convnet_tiny_imagenet": [("RandAugment", {"interpolation": "nearest"})],
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
    estimated = head_splitter(model, (3, 16, 16), estimates=True)()
    assert 0.99 < estimated.body_bound < 1.001
    assert 0.99 < lp.split_head(model, (3, 16, 16)).body_bound / float(estimated.scale) < 1.1


@pytest.mark.parametrize(("experiment", "published"), PUBLISHED.items())
def test_recipes_have_the_published_number_of_parameters(experiment: str, published: tuple[float, int, int]):
    millions, size, classes = published
    model = on_meta(compose(f"experiment={experiment}"), size, classes)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def on_meta(cfg: DictConfig, size: int = 32, classes: int = 10) -> torch.nn.Module:
    with torch.device("meta"):
        return build(cfg.model, input_shape=(3, size, size), num_classes=classes)


@pytest.mark.parametrize("experiment", ["bronet_cifar10", "liresnet_cifar10"])
def test_recipes_start_near_the_identity(experiment: str):
    """As measured on the authors' code, of 64 channels and 256 features: ‖V − I‖_F = 0.068 for BRO, ‖W − I‖ = 0.04."""
    cfg = compose(f"experiment={experiment}", "model.channels=64", "model.width=256")
    torch.manual_seed(0)
    body = build(cfg.model, input_shape=(3, 32, 32), num_classes=10).body
    backbone = [part for part in body if isinstance(part, (lp.BROConv2d, lp.FreeResidualConv2dBlock))]
    first, *dense = [part for part in body if isinstance(part, lp.CholeskyLinear)]
    assert ([part.residual_depth for part in backbone], first.residual_depth) == ([12] * 12, None)
    assert [part.residual_depth for part in dense] == [8] * 8
    columns = backbone[0].raw.shape[1]
    for part in backbone:
        branch = (part.gain * part.raw).norm().item() / 12**0.5
        assert branch == pytest.approx({32: 0.068, 64: 0.096}[columns], rel=0.03)
    for part in dense:
        assert torch.linalg.matrix_norm(part.weight - torch.eye(256), 2).item() == pytest.approx(0.044, rel=0.1)
    plain = build(cfg.model, start="family", input_shape=(3, 32, 32), num_classes=10)
    assert not any(hasattr(part, "gain") and part.gain is not None for part in plain.body)


class Operations(TorchDispatchMode):
    """Counts operations on tensors, without views, allocations, questions of dtype, and what is about no entry."""

    FREE = ("detach", "empty", "empty_like", "_unsafe_view", "view_as_real", "view_as_complex", "promote_types")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = [r for r in func._schema.returns if r.alias_info is not None and not r.alias_info.is_write]
        some = any(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        self.count += some and not views and func._schema.name.removeprefix("aten::") not in self.FREE
        return out


@pytest.mark.parametrize(("experiment", "most"), [("bronet_cifar10", 900), ("liresnet_cifar10", 680)])
def test_equal_layers_of_a_recipe_are_mapped_together(experiment: str, most: int):
    """Operations of forward and backward, the loss apart: with each layer mapped by itself they are 2,600 and 1,500."""
    model = on_meta(compose(f"experiment={experiment}"))
    x = torch.empty(2, 3, 32, 32, device="meta")
    for _ in range(2):
        model.zero_grad()
        with lp.cached(model), Operations() as operations:
            model(x).sum().backward()
    assert operations.count <= most


@pytest.mark.parametrize(("experiment", "expected"), AUGMENTED.items())
def test_recipes_augment_as_published(experiment: str, expected: list[tuple[str, dict]]):
    nodes = OmegaConf.to_container(compose(f"experiment={experiment}").data.augment, resolve=True)
    found = [(node.pop("_target_").removeprefix("liplayers.data."), node) for node in nodes]
    assert found == expected


@pytest.mark.parametrize("experiment", ["bronet_cifar10", "bronet_tiny_imagenet", "liresnet_cifar10"])
def test_lookahead_and_centering_of_the_recipes(experiment: str):
    cfg = compose(f"experiment={experiment}")
    optimizer = build(cfg.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    assert (optimizer.every, optimizer.alpha, optimizer.sync) == (6, 0.5, True)
    body = on_meta(cfg).body
    places = [i for i, part in enumerate(body) if isinstance(part, lp.BatchCentering)]
    assert len(places) == cfg.model.depth
    assert all(isinstance(body[i + 1], lp.MaxMin) and body[i].bias is not None for i in places)
    assert all(body[i - 1].bias is None for i in places)


def test_bronet_decays_in_the_gradient():
    """NAdam's own decay is an l2 penalty: a step along w alone, where the decoupled one divides by nothing."""
    (group,) = build(compose("experiment=bronet_cifar10").optimizer)([torch.nn.Parameter(torch.ones(1))]).param_groups
    assert (group["weight_decay"], group["decoupled_weight_decay"]) == (4e-5, False)


def test_ranks_of_bronet_on_tiny_imagenet():
    body = on_meta(compose("experiment=bronet_tiny_imagenet"), 64, 200).body
    raws = [tuple(part.raw.shape) for part in body if isinstance(part, (lp.BROConv2d, lp.BROLinear))]
    assert raws == [(512, 64, 3, 3)] * 6 + [(8192, 512, 1, 1), (32768, 2048)] + [(2048, 256)] * 4


def test_aol_starts_as_the_identity_and_decays_kernels_alone():
    cfg = compose("experiment=aol_cifar10")
    cfg.model.update(channels=16, depth=2, patch_features=4, dense=2)
    model = build(cfg.model, input_shape=(3, 32, 32), num_classes=10)
    square = [part for part in model.body if isinstance(part, (lp.AOLConv2d, lp.AOLLinear))][1:]
    for part in square:
        matrix = part.weight.detach()
        centre = matrix if matrix.dim() == 2 else matrix[:, :, matrix.shape[2] // 2, matrix.shape[3] // 2]
        assert torch.equal(torch.Tensor(centre), torch.eye(len(centre)))
    assert {part.pairs for part in model.body if isinstance(part, lp.MaxMin)} == {"neighbours"}
    optimizer = build(cfg.optimizer)(model.parameters())
    decays = {p.dim() > 1: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {True: 1e-3, False: 0.0}


@pytest.mark.parametrize(
    ("experiment", "mean"), [("convnet_cifar10", CIFAR_MEAN), ("convnet_tiny_imagenet", IMAGENET_MEAN)]
)
def test_layers_compared_is_circular_on_neighbours(experiment: str, mean: list[float]):
    cfg = compose(f"experiment={experiment}")
    model = on_meta(cfg, 64)
    convs = [part for part in model.body if isinstance(part, lp.AOLConv2d) and part.kernel_size == (3, 3)]
    assert {part.padding_mode for part in convs} == {"circular"}
    assert {part.pairs for part in model.body if isinstance(part, lp.MaxMin)} == {"neighbours"}
    assert (cfg.model.start, cfg.model.mean) == ("identity", mean)


@pytest.mark.parametrize(("name", "mean"), [("cifar10", CIFAR_MEAN), ("tiny_imagenet", IMAGENET_MEAN)])
def test_sll_and_lbdn_as_their_code_has_them(name: str, mean: list[float]):
    assert compose(f"experiment=sll_{name}").model.mean == mean
    cfg = compose(f"experiment=lbdn_{name}")
    assert cfg.model.mean == mean
    blocks = [part for part in on_meta(cfg, 64).body if not isinstance(part, torch.nn.Flatten)]
    assert all(block.bias is None and block.hidden_bias is not None for block in blocks)
    convs = [block for block in blocks if isinstance(block, lp.SandwichConv2dBlock)]
    assert {(block.padding_mode, block.stride, block.taps) for block in convs} == {
        ("circular", 1, 3),
        ("circular", 2, 1),
    }


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
