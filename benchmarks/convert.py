"""What `convert` makes of models of others: `python -m benchmarks.convert`, a table of 24.

Models of torchvision and timm, narrow where they have an argument for it, are converted, trained for some steps on
scikit-learn's digits as images of three channels, frozen, certified on test images and exported; or their obstacles are
counted and the first is named. Bound is what is proven of the converted model, certified that of the frozen weights
below the head, after training. Accuracies say that the twin trains, no more: so few steps show nothing of a model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
import torchvision.models as tv
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn

from liplayers import convert, export_program, freeze
from liplayers.certification import CertifiedNetwork
from liplayers.errors import LipschitzError, UnknownBoundError
from liplayers.losses import offset_cross_entropy

ABOUT = (__doc__ or "").partition("\n\n")[2]
FOLDER = Path(__file__).parent / "results"
Make = Callable[[], nn.Module]


def _timm(name: str, **arguments: Any) -> Make:
    def make() -> nn.Module:
        import timm  # not among the extras: pip install timm

        return timm.create_model(name, num_classes=10, **arguments)

    return make


def _timm_class(name: str, *args: Any, **arguments: Any) -> Make:
    def make() -> nn.Module:
        import timm

        return getattr(timm.models, name)(*args, num_classes=10, **arguments)

    return make


def _vgg() -> nn.Module:
    """Without the layers of 4096, as on images of 32 × 32."""
    model = tv.vgg11(num_classes=10)
    model.avgpool, model.classifier = nn.Identity(), nn.Linear(512, 10)  # type: ignore[assignment]
    return model


NARROW = {"channels": (8, 16, 32, 64), "stem_width": 8}
MODELS: dict[str, tuple[Make, int]] = {  # and the side of the image
    "torchvision resnet18": (lambda: tv.resnet18(num_classes=10), 32),
    "torchvision vgg11": (_vgg, 32),
    "torchvision mobilenet_v2 ×0.25": (lambda: tv.mobilenet_v2(num_classes=10, width_mult=0.25), 32),
    "torchvision densenet121, growth 4": (lambda: tv.DenseNet(4, (6, 12, 24, 16), 8, num_classes=10), 32),
    "torchvision convnext_tiny": (lambda: tv.convnext_tiny(num_classes=10), 32),
    "torchvision vit_b_16, width 32": (lambda: tv.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10), 32),
    "timm resnet10t, narrow": (_timm("resnet10t", **NARROW), 32),
    "timm mixer, width 32": (_timm_class("MlpMixer", img_size=32, patch_size=8, num_blocks=2, embed_dim=32), 32),
    "timm convmixer, width 32": (_timm_class("ConvMixer", 32, 4, kernel_size=5, patch_size=4), 32),
    "torchvision squeezenet1_1": (lambda: tv.squeezenet1_1(num_classes=10), 32),
    "torchvision shufflenet_v2_x0_5": (lambda: tv.shufflenet_v2_x0_5(num_classes=10), 32),
    "torchvision mnasnet0_5": (lambda: tv.mnasnet0_5(num_classes=10), 32),
    "torchvision googlenet": (lambda: tv.googlenet(num_classes=10, init_weights=False), 32),
    "torchvision resnext, 4 blocks": (
        lambda: tv.resnet.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], 10, groups=8, width_per_group=4),
        32,
    ),
    "torchvision efficientnet_b0": (lambda: tv.efficientnet_b0(num_classes=10), 32),
    "torchvision swin_t, width 16": (
        lambda: tv.SwinTransformer([2, 2], 16, [1, 1], [2, 2], [2, 2], num_classes=10),
        32,
    ),
    "timm resnet26d, narrow": (_timm("resnet26d", **NARROW), 32),
    "timm resnetv2_18, narrow": (_timm("resnetv2_18", channels=(8, 16, 32, 64), stem_chs=8), 32),
    "timm seresnet18, narrow": (_timm("seresnet18", **NARROW), 32),
    "timm dla46_c": (_timm("dla46_c"), 32),
    "timm cs3darknet_s": (_timm("cs3darknet_s"), 32),
    "timm hrnet_w18_small": (_timm("hrnet_w18_small"), 32),
    "timm mobilenetv3_small_050": (_timm("mobilenetv3_small_050"), 32),
    "timm lcnet_050": (_timm("lcnet_050"), 32),
}


@dataclass
class Row:
    """One model; seconds are of `convert`, of one step of training, and of the certificate network."""

    model: str
    parameters: int
    convert_s: float | None = None
    bound: float | None = None
    step_s: float | None = None
    accuracy: float | None = None
    certified_s: float | None = None
    certified: float | None = None
    radius: float | None = None
    exported: str = ""
    obstacle: str = ""


def _images(side: int) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    images = F.interpolate(images, (side, side), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    return images, torch.tensor(digits.target)


def _row(name: str, steps: int, batch: int, conv: str, linear: str, seconds: float) -> Row:
    """One row; training stops after so many steps or seconds."""
    make, side = MODELS[name]
    torch.manual_seed(0)
    model = make()
    row = Row(name, sum(p.numel() for p in model.parameters()))
    shape = (3, side, side)
    start = time.perf_counter()
    try:
        twin, report = convert(model, shape, conv, linear, weights="fresh")
    except UnknownBoundError as error:
        row.obstacle = _obstacles(error)
        return row
    finally:
        row.convert_s = time.perf_counter() - start
    row.bound = report.bound
    x, y = _images(side)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:-360], order[-64:]
    optimizer = torch.optim.Adam(twin.parameters(), 1e-2)
    start, done = time.perf_counter(), 0
    while done < steps and time.perf_counter() - start < seconds:
        chosen = train[torch.randint(len(train), (batch,))]
        optimizer.zero_grad()
        offset_cross_entropy(twin(x[chosen]), y[chosen], offset=0.5, temperature=0.1).backward()
        optimizer.step()
        done += 1
    row.step_s = (time.perf_counter() - start) / done
    _certify(row, twin.eval(), shape, x[test], y[test])
    row.obstacle = row.obstacle or ("" if done == steps else f"{done} steps in {seconds:.0f} s")
    return row


def _certify(row: Row, twin: nn.Module, shape: tuple[int, ...], x: Tensor, y: Tensor) -> None:
    start = time.perf_counter()
    try:
        network = CertifiedNetwork(twin, shape, num_classes=10)
        logits, radius = network.logits_and_radius(x)
        row.certified_s = time.perf_counter() - start
        right = logits.argmax(1) == y
        row.accuracy = 100 * right.double().mean().item()
        row.certified = network.bounds.split.body_bound
        row.radius = (radius * right).mean().item()
        with tempfile.TemporaryDirectory() as folder:
            export_program(freeze(twin, shape), shape, Path(folder) / "twin.pt2")
        row.exported = "yes"
    except LipschitzError as error:
        row.obstacle = _obstacles(error)


def _obstacles(error: LipschitzError) -> str:
    found = getattr(error, "obstacles", ())
    first = str(found[0] if found else error).splitlines()[0]
    return f"{len(found)}: {first}" if found else first


def _table(rows: Sequence[Row]) -> str:
    frame = pd.DataFrame([asdict(row) for row in rows])
    frame = frame.rename(columns={"convert_s": "convert (s)", "step_s": "step (s)", "certified_s": "certify (s)"})
    frame = frame.rename(columns={"accuracy": "accuracy (%)", "radius": "mean R", "certified": "bound below the head"})
    text = frame.map(lambda v: "" if v is None or v != v else f"{v:.4g}" if isinstance(v, float) else str(v))
    head = f"| {' | '.join(text.columns)} |\n|{' --- |' * len(text.columns)}\n"
    cells = ("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in text.values)
    return head + "".join(cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="by their names in the table; all by default")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--conv", default="aoc")
    parser.add_argument("--linear", default="bjorck")
    parser.add_argument("--seconds", type=float, default=60, help="of training for each model, at most")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    unknown = set(options.models) - MODELS.keys()
    if unknown:
        parser.error(f"--models: {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    rows: list[Row] = []
    for name in track(options.models, description="models"):
        rows.append(_row(name, options.steps, options.batch, options.conv, options.linear, options.seconds))
        settings = f"conv={options.conv}, linear={options.linear}, weights=fresh, torch {torch.__version__}"
        text = f"# Models of others, converted\n\n{ABOUT}\n{settings}\n\n{_table(rows)}"
        (options.folder / "convert.md").write_text(text, encoding="utf-8")
        (options.folder / "convert.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
