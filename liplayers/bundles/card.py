"""The card of a bundle, README.md: made of its config.json and its report.json alone, so that it can be checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["card_text"]

_CARD = """\
---
library_name: liplayers
tags: [certified-robustness, lipschitz]
---
# {name}

A classifier of liplayers {liplayers} with proven l2 radii: {model} for inputs of shape {shape} and {classes} classes,
{parameters:,} numbers.

Data: {data} The {samples:,} samples of the split "{split}" have the sha256 `{sha256}`.

{table}

In %. *ε*: the share of samples that are predicted rightly, and of which it is proven that every input within l2
distance ε, in the norm of {unit}, is predicted as they are. *Mean R*: the mean certified radius, where a wrong
prediction counts 0.

## What "certified" means

{statement}

The weights that this calls those of network.pt are here in `model.safetensors`, with names that begin with `frozen.`.

## Use

```python
import liplayers

network = liplayers.load_pretrained("{name}")  # or this folder: frozen, plain modules
network = liplayers.load_pretrained("{name}", frozen=False)  # with its raw weights, to train on
```

    python certify.py bundle={name} verify=true    # or bundle=FOLDER; {where}
    python certify.py bundle={name} audit=true

The first proves all bounds and radii again from the weights and the data, and compares them with `report.json` and
`certificates.csv`. It needs no trust in whoever made this bundle. What it cannot check is how the network was trained:

- Recipe: {recipe}; all settings are in `config.json`
- Command: `{command}`
- Seed: {seed}; of the epochs, counted from 0, {chosen} chose number {epoch}
- Machine: {machine}
- Notes: {notes}

The Lipschitz bound below the head is {body:.9g}; rounding moves a logit by {logit_error:.1e} at most. The report was
made with torch {torch}.
"""


def card_text(config: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The card of a bundle with this config.json and report.json.

    Raises:
        KeyError, TypeError, ValueError: one of them lacks something.
    """
    trained, about, results = config["config"], config["about"], report["results"]
    parts = {key: str(trained[key]["_target_"]).rpartition(".")[2] for key in ("model", "loss", "optimizer", "data")}
    rounded = {str(entry["eps"]): entry["accuracy"] for entry in results["certified_accuracy"]}
    columns = {"clean": results["clean_accuracy"]} | {f"ε = {eps}": value for eps, value in rounded.items()}
    cells = [*(f"{100 * value:.2f}" for value in columns.values()), f"{results['mean_radius']:.4f}"]
    rows = ([*columns, "mean R"], ["--:"] * len(cells), cells)
    folder = any(key in trained["data"] for key in ("root", "train"))
    return _CARD.format(
        name=config["name"],
        liplayers=config["liplayers"],
        model=parts["model"],
        shape="×".join(map(str, config["input_shape"])),
        classes=len(config["class_names"]),
        parameters=report["network"]["parameters"],
        data=about["data"],
        samples=results["samples"],
        split=report["data"]["split"],
        sha256=report["data"]["sha256"],
        table="\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows),
        unit=report["data"]["unit"],
        statement=report["statement"],
        where="data.root=DIR says where the data lie" if folder else "needs no files",
        recipe=f"{parts['loss']}, {parts['optimizer']}, {_length(trained['trainer'])}",
        command=about["command"],
        seed=trained["seed"],
        chosen="the validation samples" if trained["data"].get("val_fraction") else "the training samples",
        epoch=config["epoch"],
        machine=about["machine"],
        notes=about["notes"] or "none",
        body=report["lipschitz"]["body"],
        logit_error=report["rounding"]["logit_error"],
        torch=report["environment"]["torch"],
    )


def _length(trainer: Mapping[str, Any]) -> str:
    epochs, steps = trainer["max_epochs"], trainer["max_steps"]
    return f"{epochs} epochs" if epochs is not None and epochs > 0 else f"{steps} steps"


def _cell(text: str) -> str:
    return re.sub(r"([|\\])", r"\\\1", text)
