"""Where bundles lie: beside liplayers, in a folder, at an https address, on the Hugging Face hub.

At an address lie the six files themselves, each fetched by its own fixed name, up to its own largest size, and held in
memory. There is no archive, so there are no paths in it to check and nothing to decompress, and nothing is written.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import liplayers
from liplayers.bundles.manifest import FILES, MANIFEST, check_format
from liplayers.errors import BundleError
from liplayers.extras import extra
from liplayers.text import one_line, printable

__all__ = ["hub", "read_files", "shipped"]

_NOT_OF_THE_BUNDLE = {".git", ".gitattributes", ".cache"}  # what git and huggingface_hub leave in a folder; never read
_TIMEOUT = 60.0  # seconds without a byte
_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")


def shipped() -> dict[str, Path]:
    """The folders of the bundles that come with liplayers: with a clone all of them, with a wheel the small ones."""
    package = Path(liplayers.__file__).resolve().parent
    installed, checkout = package / "pretrained", package.parent / "bundles"
    parent = installed if installed.is_dir() else checkout
    return {path.parent.name: path.parent for path in sorted(parent.glob(f"*/{MANIFEST}"))}


def read_files(where: str | os.PathLike[str]) -> dict[str, bytes]:
    """The content of the files of a bundle, by name.

    Args:
        where: a name of `shipped`, a folder, https://HOST/PATH, or hf://OWNER/NAME, with @REVISION after it if need be.

    Raises:
        BundleError: there is none, a file is missing or too large, or there is one that is no part of a bundle.
        MissingPackageError: hf:// without huggingface_hub.
    """
    place = os.fspath(where)
    if not isinstance(place, str) or "\0" in place:
        raise BundleError(f"bundle {place!r}: expected a name, a folder, https://… or hf://OWNER/NAME")
    known = shipped()
    if place in known:
        return _from_folder(str(known[place]))
    if place.startswith("hf://"):
        return _from_hub(place)
    if "://" in place:
        return _from_https(place)
    if not Path(place).is_dir():
        raise BundleError(
            f"bundle {printable(place)}: neither a folder nor one that is here ({', '.join(known) or 'none'}); a clone "
            f"of the repository has more in bundles/, others are fetched by https://… or hf://OWNER/NAME"
        )
    return _from_folder(place)


def _from_folder(place: str) -> dict[str, bytes]:
    try:
        found = _all(place, lambda name: _file(place, name))
        for name in sorted(set(os.listdir(place)) - FILES.keys() - _NOT_OF_THE_BUNDLE):
            raise BundleError(f"{printable(Path(place) / name)}: is no part of a bundle, which has {', '.join(FILES)}")
        return found
    except OSError as error:
        raise BundleError(f"{printable(error.filename or place)}: cannot be read ({error.strerror or error})") from None


def _file(folder: str, name: str) -> bytes:
    path = Path(folder) / name
    if not path.is_file():  # nor a pipe, which has no end
        raise BundleError(f"{printable(path)}: is missing or no file; a bundle has {', '.join(FILES)}")
    with path.open("rb") as file:
        return file.read(FILES[name] + 1)


def _all(place: str, read: Callable[[str], bytes]) -> dict[str, bytes]:
    """Each file, read up to a byte more than it may have; the manifest first, as other formats may have other files."""
    found = {}
    for name, most in FILES.items():
        found[name] = read(name)
        if len(found[name]) > most:
            raise BundleError(f"{printable(place)}/{name}: has more than {most:,} bytes, the most in a bundle")
        if name == MANIFEST:
            check_format(place, found[name])
    return found


class _StaysSecure(HTTPRedirectHandler):
    """Follows to https addresses only."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(url: str) -> None:
    if urlsplit(url).scheme != "https":
        raise BundleError(f"{printable(url)}: is no https address; what comes by another could be changed on the way")


def _from_https(url: str) -> dict[str, bytes]:
    _check_address(url)
    if "?" in url or "#" in url:
        raise BundleError(f"{printable(url)}: expected the address of a folder, which the names of files can follow")
    opener = build_opener(_StaysSecure)

    def read(name: str) -> bytes:
        address = f"{url.rstrip('/')}/{name}"
        try:
            with opener.open(address, timeout=_TIMEOUT) as response:
                return response.read(FILES[name] + 1)
        except BundleError:
            raise
        except (OSError, HTTPException, ValueError) as error:
            raise BundleError(f"{printable(address)}: cannot be fetched ({one_line(error)})") from None

    return _all(url, read)


def hub() -> Any:
    """huggingface_hub, where it is installed."""
    with extra("bundles"):
        return importlib.import_module("huggingface_hub")


def _from_hub(place: str) -> dict[str, bytes]:
    """The files of a repository at one commit; how large they are is known before any is fetched."""
    named = _HUB.fullmatch(place)
    if named is None:
        raise BundleError(f"{printable(place)}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    repository, revision = named.groups()
    client = hub()
    try:
        info = client.HfApi().model_info(repository, revision=revision, files_metadata=True)
        for file in info.siblings:
            if (file.size or 0) > FILES.get(file.rfilename, math.inf):
                raise BundleError(
                    f"{printable(place)}/{file.rfilename}: has {file.size:,} bytes; too many for a bundle"
                )
        folder = client.snapshot_download(repository, revision=info.sha, allow_patterns=list(FILES))
        return _all(place, lambda name: _file(folder, name))
    except BundleError:
        raise
    except Exception as error:  # the hub's client raises anything
        raise BundleError(f"{printable(place)}: cannot be fetched ({one_line(error)})") from None
