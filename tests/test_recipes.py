"""The experiments: each composes, has the published size and a stated start, and trains at reduced size."""

import json
import math
import statistics
from dataclasses import dataclass
from functools import cache
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
from benchmarks import recipes
from benchmarks.recipes import RADII, RECIPES, Extent, composed, main
from liplayers import cli
from liplayers.bounds.composition import head_splitter
from liplayers.checkpoint import load_checkpoint
from liplayers.cli.configuration import build
from liplayers.core.weights import ParametrizedModule
from liplayers.data import Split
from liplayers.errors import ArgumentError

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


def operations_of_a_step(model: torch.nn.Module) -> int:
    """Of forward and backward, the loss apart, once the sizes of the grids are known."""
    x = torch.empty(2, 3, 32, 32, device="meta")
    for _ in range(2):
        model.zero_grad()
        with lp.cached(model), Operations() as operations:
            model(x).sum().backward()
    return operations.count


@pytest.mark.parametrize(("experiment", "most"), [("bronet_cifar10", 900), ("liresnet_cifar10", 680)])
def test_equal_layers_of_a_recipe_are_mapped_together(experiment: str, most: int):
    """With each layer mapped by itself they are 2,600 and 1,500."""
    assert operations_of_a_step(on_meta(compose(f"experiment={experiment}"))) <= most


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


# What a recipe starts as ----------------------------------------------------------------------------------------------

Range = tuple[float, float]


@dataclass(frozen=True)
class Start:
    """Figures of a new network at the size of `benchmarks.recipes`; ranges hold what seeds differ by.

    Args:
        parameters: how many.
        kernels: at most so many operations in a forward and backward pass, as `Operations` counts them.
        gradient: ‖∇y_0‖ with respect to the input, the mean over uniform images.
        conv, dense: ‖Wu − u‖/‖u‖ for a Gaussian u, the median over the layers that keep the shape of images or
            vectors: √2 for a random orthogonal W, 0 for the identity.
    """

    parameters: int
    kernels: int
    gradient: Range
    conv: Range | None
    dense: Range | None


STARTS = {
    "bronet": Start(303_530, 620, (0.55, 0.63), (1.38, 1.45), (0.042, 0.047)),
    "liresnet": Start(321_962, 480, (0.55, 0.65), (0.027, 0.0295), (0.041, 0.047)),
    "soc": Start(455_978, 2300, (0.34, 0.42), (0.32, 0.35), None),
    "aol": Start(564_928, 300, (0.999, 1.001), (0.0, 1e-6), (0.0, 1e-6)),
    "convnet": Start(262_144, 590, (0.2, 0.65), (0.0, 1e-6), None),
    "sll": Start(2_125_490, 380, (0.25, 0.36), (0.53, 0.59), (0.66, 0.8)),
    "lbdn": Start(1_388_266, 1350, (0.015, 0.035), None, (1.13, 1.32)),
}


@cache
def small(name: str) -> DictConfig:
    return composed(RECIPES[name], Extent(), 10, 0)


def test_every_recipe_of_the_benchmark_has_a_stated_start():
    assert STARTS.keys() == RECIPES.keys()


@pytest.mark.parametrize(("name", "stated"), STARTS.items())
def test_size_and_kernels_of_a_step(name: str, stated: Start):
    model = on_meta(small(name))
    assert sum(p.numel() for p in model.parameters()) == stated.parameters
    assert 0.5 * stated.kernels < operations_of_a_step(model) <= stated.kernels  # far fewer: state it


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "stated"), STARTS.items())
def test_initial_figures(name: str, stated: Start, seed: int):
    torch.manual_seed(seed)
    model = build(small(name).model, input_shape=(3, 32, 32), num_classes=10)
    layers = [module for module in model.modules() if isinstance(module, ParametrizedModule)]
    shapes: dict[torch.nn.Module, tuple[torch.Size, torch.Size]] = {}
    for layer in layers:
        layer.register_forward_hook(lambda layer, x, y: shapes.update({layer: (x[0].shape, y.shape)}))
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images)[:, 0].sum(), images)
    assert within(gradient.flatten(1).norm(dim=1).mean().item(), stated.gradient)
    kept = [(layer, before) for layer, (before, after) in shapes.items() if before == after]
    for dimensions, expected in ((4, stated.conv), (2, stated.dense)):
        found = [distance(layer, shape) for layer, shape in kept if len(shape) == dimensions]
        assert bool(found) == (expected is not None)
        assert expected is None or within(statistics.median(found), expected)


def within(value: float, stated: Range) -> bool:
    return stated[0] <= value <= stated[1]


@torch.no_grad()
def distance(layer: torch.nn.Module, shape: torch.Size) -> float:
    """‖f(u) − f(0) − u‖/‖u‖."""
    u = torch.randn(shape)
    return ((layer(u) - layer(torch.zeros(shape)) - u).norm() / u.norm()).item()


# The benchmark --------------------------------------------------------------------------------------------------------


def test_a_small_training_is_certified_and_kept(tmp_path: Path, monkeypatch, capsys):
    command = ["--quick", "--only", "aol", "--output", str(tmp_path)]
    assert main(command) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"recipes_quick.{end}") for end in ("md", "json")]
    (row,) = json.loads((tmp_path / "recipes_quick.json").read_text())["results"]
    curve = [row["clean"], *row["certified"].values()]
    assert curve == sorted(curve, reverse=True)
    assert (row["name"], row["steps"], row["seed"], row["parameters"]) == ("aol", 2, 0, STARTS["aol"].parameters)
    assert 0.9 < row["bound"] < 1.0001
    assert f"| AOLNet | ours | 2 | {100 * row['clean']:.1f} |" in (tmp_path / "recipes_quick.md").read_text()
    monkeypatch.setattr(recipes, "train", None)  # what is there is not trained again
    assert main(command) == 0
    (path,) = (tmp_path / "recipes_quick_runs").iterdir()
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))
    assert main(command) == 2
    assert "of another recipe" in capsys.readouterr().err


def test_the_authors_figures_stand_beside_ours():
    figures = {"clean": 0.4, "certified": {str(radius): 0.3 for radius in RADII}, "bound": 1.0}
    shared = {"data": {"name": "x", "train": 5, "test": 5}, "machine": {"cpu": "c", "threads": 1, "torch": "t"}}
    rows = [
        {"name": "liresnet", "steps": 90, "seed": seed, "parameters": 3, "seconds_per_step": 1.0} | figures | shared
        for seed in (0, 1)
    ]
    rows[1]["clean"] = 0.42
    table = recipes.markdown(rows).splitlines()
    assert "| LiResNet | ours | 90 | 41.0 | 30.0 | 30.0 | 30.0 | 2.0 | 1.0000 | 3 | 1.00 |" in table
    assert "| LiResNet | authors, constant divided out | 90 | 38.8 | 32.8 | 27.3 | 21.9 |  |  |  |  |" in table


def test_the_first_images_of_each_class_are_taken():
    split = Split(torch.arange(7)[:, None].float(), torch.tensor([1, 0, 1, 1, 0, 0, 0]))
    assert recipes._first(split, 2).inputs.flatten().tolist() == [0, 1, 2, 4]


def test_small_trainings_that_cannot_be_are_refused(tmp_path: Path, capsys):
    with pytest.raises(ArgumentError, match="steps=15; expected a multiple of 10"):
        composed(RECIPES["aol"], Extent(), 15, 0)
    for arguments, message in (
        (["--only", "aool", "--quick"], "did you mean aol"),
        ([], "--root is missing"),
        (["--root", str(tmp_path), "--seeds", "0"], "seeds=0"),
        (["--root", str(tmp_path), "--steps", "0"], "steps=0"),
    ):
        assert main([*arguments, "--output", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
