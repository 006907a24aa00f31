"""Which files a bundle has, how large they may be, and that they are those which its manifest names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from liplayers.errors import BundleError
from liplayers.text import one_line, printable, strict_json

__all__ = [
    "CARD",
    "CERTIFICATES",
    "CONFIG",
    "FILES",
    "FORMAT",
    "MANIFEST",
    "REPORT",
    "WEIGHTS",
    "check_format",
    "check_manifest",
    "json_object",
]

FORMAT = 1  # README.md is compared with what this format makes of the rest: another text is another format
CONFIG, WEIGHTS, REPORT, CERTIFICATES = "config.json", "model.safetensors", "report.json", "certificates.csv"
CARD, MANIFEST = "README.md", "manifest.json"
# in bytes, at most
FILES = {MANIFEST: 2**12, CONFIG: 2**20, WEIGHTS: 2**31, REPORT: 2**26, CERTIFICATES: 2**28, CARD: 2**20}

_HASH = re.compile(r"[0-9a-f]{64}")


def json_object(where: str, content: bytes) -> dict[str, Any]:
    """The object that a file of JSON holds.

    Args:
        where: the file, for messages.
        content: what it holds.

    Raises:
        BundleError: it is no JSON, or no object.
    """
    try:
        found = strict_json(content)
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except ValueError as error:
        raise BundleError(f"{printable(where)}: is not the JSON of a bundle ({one_line(error)[:100]})") from None


def check_format(place: str, content: bytes) -> dict[str, Any]:
    """The manifest of a bundle, which is of a format that is read here.

    Args:
        place: of the bundle, for messages.
        content: of its manifest.json.

    Raises:
        BundleError: another format, or no manifest at all.
    """
    where = f"{printable(place)}/{MANIFEST}"
    manifest = json_object(where, content)
    version = manifest.get("format")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise BundleError(f"{where}: states format {version!r:.40}; expected a bundle of format {FORMAT}")
    if version > FORMAT:
        raise BundleError(f"{where}: is of format {version}, this liplayers reads {FORMAT}; install a newer one")
    return manifest


def check_manifest(place: str, files: Mapping[str, bytes]) -> None:
    """Raise unless the files are those that the manifest names, byte for byte.

    Args:
        place: of the bundle, for messages.
        files: the content of each, by name.

    Raises:
        BundleError: naming the file.
    """
    where = f"{printable(place)}/{MANIFEST}"
    manifest = check_format(place, files.get(MANIFEST, b""))
    hashes = manifest.get("sha256")
    named = FILES.keys() - {MANIFEST}
    if manifest.keys() != {"format", "sha256"} or not isinstance(hashes, dict) or hashes.keys() != named:
        raise BundleError(f"{where}: names other files than those of a bundle, {', '.join(sorted(named))}")
    for name in sorted(named):
        if not isinstance(hashes[name], str) or not _HASH.fullmatch(hashes[name]):
            raise BundleError(f"{where}: has no sha256 for {name}")
        if hashlib.sha256(files.get(name, b"")).hexdigest() != hashes[name]:
            raise BundleError(
                f"{printable(place)}/{name}: has another sha256 than {MANIFEST} says; the bundle is damaged or was "
                "tampered with: get it again"
            )
