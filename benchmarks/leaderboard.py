"""A page of what bundles prove, made by verifying them: `python -m benchmarks.leaderboard --root mnist=DIR`.

Every figure in the table of a data set is computed again: bounds, radii and accuracies, from the weights and the test
samples. They must be those of the bundle. Then the first samples are attacked by APGD. Certified accuracy is a lower
bound of the accuracy under every attack, and accuracy under one attack is an upper bound: they stand in tables apart. A
bundle that cannot be verified here, for want of its data, is listed without figures. What others have published stands
at the end, as published: nobody has verified it here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.report import FOLDER
from liplayers.audit.audit import Audit
from liplayers.bundles import Bundle, load_bundle
from liplayers.bundles.places import shipped
from liplayers.certification import parse_radius
from liplayers.certification.report import environment, text_writer, write_outputs
from liplayers.cli.audit import attacked
from liplayers.cli.proving import Certified
from liplayers.cli.verify import verify
from liplayers.commands.help import config_folder
from liplayers.commands.output import say
from liplayers.errors import ArgumentError, DataNotFoundError, LipschitzError, RefutedError
from liplayers.text import one_line

# CIFAR-10: (what, the paper of the layer or model, certified accuracy in % by radius), as the field quotes them
PUBLISHED = (
    ("BRONet", "Lai et al. 2025, arXiv 2505.15174", {"36/255": "70.6"}),
    ("LiResNet", "Hu et al. 2024, arXiv 2310.02513", {"36/255": "69.8"}),
    ("SOC", "Singla & Feizi 2021, arXiv 2105.11417", {"36/255": "66 – 67"}),
    ("AOL", "Prach & Lampert 2022, arXiv 2208.03160", {"36/255": "64.0", "108/255": "49.0"}),
)


LEAD = (
    "Each row is a bundle that was verified while this page was made: its bounds and radii were proven again from its "
    "weights and the samples, rounding included, and agree with its report and its certificates. In %. *Provable*: "
    "predicted rightly, and proven that every input within l2 distance ε gets the same prediction: a lower bound of "
    "the accuracy under every attack. *Attacked*: still predicted rightly after APGD within ε, on the first samples: "
    "an upper bound, and no proof."
)


@dataclass(frozen=True)
class Entry:
    """A bundle, with what was found when it was verified, or why it could not be."""

    bundle: Bundle
    found: Certified | None
    audit: Audit | None
    why_not: str = ""

    @property
    def eps(self) -> tuple[str, ...]:
        return tuple(entry["eps"] for entry in self.bundle.report["results"]["certified_accuracy"])


def entry(place: str, root: str | None, samples: int) -> Entry:
    """Verify a bundle and attack its first samples, unless `samples` is 0.

    Raises:
        LipschitzError: it was tampered with, a figure of it is wrong, or a certificate fell.
    """
    bundle = load_bundle(place)
    config = OmegaConf.load(config_folder() / "certify.yaml")
    changes: dict[str, Any] = {"bundle": place, "verify": True, "data": {} if root is None else {"root": root}}
    settings = OmegaConf.merge(config, changes)
    try:
        found = verify(settings)  # type: ignore[arg-type]
    except DataNotFoundError as error:
        return Entry(bundle, None, None, one_line(error))
    made = Entry(bundle, found, None)
    if not samples:
        return made
    audit = attacked(found, samples, made.eps)
    if not audit.holds:
        raise RefutedError(f"{place}: attacks refute its certificates; certify.py bundle={place} audit=true says how")
    return replace(made, audit=audit)


def page(entries: Sequence[Entry]) -> str:
    """The page as Markdown."""
    lines = ["# Leaderboard", "", LEAD, ""]
    made = environment()
    lines += [f"Made on {made['created'][:10]} with liplayers {made['liplayers']} and torch {made['torch']}.", ""]
    groups: dict[tuple[str, tuple[str, ...]], list[Entry]] = {}
    for one in entries:
        if one.found is not None:
            groups.setdefault((one.bundle.report["data"]["sha256"], one.eps), []).append(one)
    for (sha256, eps), members in groups.items():
        lines += _group(sha256, eps, members)
    missing = [f"- {one.bundle.name}: {one.why_not}" for one in entries if one.found is None]
    lines += ["## Not verified here", "", *missing, ""] if missing else []
    return "\n".join([*lines, *_published()]) + "\n"


def _group(sha256: str, eps: Sequence[str], members: Sequence[Entry]) -> list[str]:
    """The tables of one data set, the best at the first radius first."""

    def rank(one: Entry) -> float:
        assert one.found is not None
        return -one.found.certificates.accuracy(parse_radius(eps[0]))

    members = sorted(members, key=rank)
    about, report = members[0].bundle.config["about"], members[0].bundle.report
    samples = report["results"]["samples"]
    lines = [
        f"## {report['data']['name']}",
        "",
        f"{about['data']} {samples:,} samples of the split {report['data']['split']}, sha256 `{sha256[:16]}…`; ε in "
        f"the norm of {report['data']['unit']}.",
        "",
        *_table(["provable", "clean", *(f"ε = {e}" for e in eps), "mean R", "trained by"], map(_proven, members)),
    ]
    audits = [one for one in members if one.audit is not None]
    if audits:
        heading = ["attacked", "samples", "clean", *(f"ε = {e}" for e in eps), "certificates fallen"]
        lines += _table(heading, map(_attacked, audits))
    return lines


def _proven(one: Entry) -> list[str]:
    assert one.found is not None
    certificates, config = one.found.certificates, one.bundle.config
    values = [certificates.clean_accuracy, *(certificates.accuracy(parse_radius(e)) for e in one.eps)]
    made = f"`{config['about']['command']}`, seed {config['config'].get('seed')}"
    return [one.bundle.name, *(f"{100 * v:.2f}" for v in values), f"{certificates.mean_radius:.4f}", made]


def _attacked(one: Entry) -> list[str]:
    audit = one.audit
    assert audit is not None
    rows = {row.eps: row.apgd for row in audit.rows}
    values = [audit.clean_accuracy, *(rows[parse_radius(e)] for e in one.eps)]
    fallen = f"{audit.certified_fallen + audit.boundary_fallen} of {audit.certified + audit.boundary_certified:,}"
    return [one.bundle.name, f"{audit.samples:,}", *(f"{100 * v:.2f}" for v in values), fallen]


def _published() -> list[str]:
    radii = sorted({e for _, _, figures in PUBLISHED for e in figures}, key=parse_radius)
    rows = ([what, *(figures.get(e, "–") for e in radii), where] for what, where, figures in PUBLISHED)
    return [
        "## Published by others, not verified",
        "",
        "The best certified accuracies that we know to be published for these, in %, on the original CIFAR-10, which "
        "is not the CIFAR-10 (JPEG q75) that a table above may be about. The paper is that of the layer or model; some "
        "of the figures are of later recipes for it. None of them was verified here.",
        "",
        *_table(["published", *(f"ε = {e}" for e in radii), "paper"], rows),
    ]


def _table(heading: Sequence[str], rows: Any) -> list[str]:
    lines = [heading, ["---", *["--:"] * (len(heading) - 1)], *rows]
    return [*(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in lines), ""]


def _roots(given: Sequence[str]) -> dict[str, str]:
    """NAME=DIR, by the name of a bundle."""
    pairs = [text.partition("=") for text in given]
    for name, equals, folder in pairs:
        if not (name and equals and folder):
            raise ArgumentError(f"--root {name}{equals}{folder}: expected NAME=DIR, the data.root of the bundle NAME")
    return {name: folder for name, _, folder in pairs}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.leaderboard", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("bundles", nargs="*", help="names, folders or addresses; default: all in bundles/")
    parser.add_argument("--root", action="append", default=[], metavar="NAME=DIR", help="where a bundle's data lie")
    parser.add_argument("--samples", type=int, default=200, help="to attack, of each; 0: none")
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder of leaderboard.md")
    options = parser.parse_args(arguments)
    try:
        roots = _roots(options.root)
        places = options.bundles or list(shipped())
        for name in roots.keys() - set(places):
            raise ArgumentError(f"--root {name}=…: not among {', '.join(places)}")
        entries = []
        for place in places:
            say(f"verifying {place}")
            entries.append(entry(place, roots.get(place), options.samples))
        for path in write_outputs(options.output, {"leaderboard.md": text_writer(page(entries))}):
            say(path)
    except LipschitzError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
