"""A bundle as read: what each file holds, checked before anything is built from it."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liplayers.bundles.building import build_network, check_network, check_settings, portable
from liplayers.bundles.manifest import CONFIG, REPORT, WEIGHTS, check_manifest, json_object
from liplayers.bundles.places import hub, read_files
from liplayers.bundles.writing import write_folder
from liplayers.certification.network import _load as load_frozen
from liplayers.checkpoint import Checkpoint
from liplayers.core.precision import exact_precision
from liplayers.errors import BundleError, CheckpointError
from liplayers.export.freeze import freeze
from liplayers.extras import extra
from liplayers.text import one_line, printable

__all__ = ["FROZEN", "RAW", "Bundle", "load_bundle", "load_pretrained"]

RAW, FROZEN = "raw.", "frozen."  # what the names of tensors begin with
ABOUT = {"data", "command", "machine", "notes"}  # what is said of the training, which nobody can check
_CONFIG = {"name", "liplayers", "input_shape", "class_names", "epoch", "config", "same", "about"}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"\d{1,4}(\.\d{1,4}){1,2}[\w.+-]{0,40}")


@dataclass(frozen=True)
class Bundle:
    """A trained network, its weights, and what was proven of it. `load_bundle` reads one.

    That a bundle can be read says that it is whole, and that loading it runs no code of its own. Whether its report is
    true says `certify.py bundle=… verify=true`, which computes everything again.

    Args:
        place: where it was read from, for messages.
        files: the content of each file, by name.
        config: of config.json.
        report: of report.json.
        raw: the raw weights, by the names of the network's state.
        frozen: the weights that were certified, by the names of the frozen network's state.

    >>> bundle = load_bundle("digits-mlp")
    >>> bundle.name, bundle.input_shape, len(bundle.class_names)
    ('digits-mlp', (1, 8, 8), 10)
    """

    place: str
    files: Mapping[str, bytes]
    config: dict[str, Any]
    report: dict[str, Any]
    raw: dict[str, Tensor]
    frozen: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.config["input_shape"])

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.config["class_names"])

    @classmethod
    def from_files(cls, place: str, files: Mapping[str, bytes]) -> Bundle:
        """The bundle that these files make.

        Args:
            place: where they are from, for messages.
            files: the content of each, by name.

        Raises:
            BundleError: they are of another format, do not fit the manifest or each other, or hold more than they may;
                the message names the file.
            MissingPackageError: safetensors is not installed.
        """
        check_manifest(place, files)
        config = read_config(f"{place}/{CONFIG}", files[CONFIG])
        raw, frozen = read_weights(f"{place}/{WEIGHTS}", files[WEIGHTS], config["same"])
        shape, classes = tuple(config["input_shape"]), len(config["class_names"])
        check_network(f"{printable(place)}/{CONFIG}", config["config"]["model"], shape, classes, raw)
        return cls(place, dict(files), config, json_object(f"{place}/{REPORT}", files[REPORT]), raw, frozen)

    def checkpoint(self) -> Checkpoint:
        """What `certify.py` takes: as if its raw weights had just been trained."""
        return Checkpoint(
            path=Path(self.name) / WEIGHTS,
            sha256=hashlib.sha256(self.files[WEIGHTS]).hexdigest(),
            version=self.config["liplayers"],
            config=self.config["config"],
            input_shape=self.input_shape,
            class_names=self.class_names,
            epoch=self.config["epoch"],
            global_step=-1,
            state_dict=self.raw,
        )

    def network(self, *, frozen: bool = True) -> nn.Module:
        """The network, on the CPU.

        Args:
            frozen: whether to return the frozen network, in eval mode, of plain modules, with exactly the weights that
                were certified; else the one that was trained, in training mode, to train on.

        Raises:
            BundleError: the settings and the weights do not make one network.
            CheckpointError: its layers had other weights for the same parameters when it was made.
        """
        where, settings = f"{printable(self.place)}/{CONFIG}", self.config["config"]["model"]
        model = build_network(where, settings, self.input_shape, len(self.class_names))
        self.checkpoint().load_into(model)
        if not frozen:
            return model
        with exact_precision(torch.device("cpu")):
            plain = freeze(model.eval(), self.input_shape)
        try:
            load_frozen(plain, self.frozen, model.state_dict())
        except CheckpointError as error:
            raise BundleError(f"{printable(self.place)}/{WEIGHTS}: {FROZEN}{error}") from None
        return plain

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, revision: str | None = None) -> Bundle:
        """As `load_bundle`, by the conventions of huggingface_hub.

        Args:
            name: OWNER/NAME on the hub, unless it is a folder or a shipped bundle.
            revision: of the hub: a branch, a tag or a commit.
        """
        place = os.fspath(name)
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", place) is not None and not Path(place).is_dir()
        if revision is not None and not on_hub:
            raise BundleError(f"revision={revision!r}: {printable(place)} is not OWNER/NAME on the hub")
        if on_hub:
            place = f"hf://{place}" + ("" if revision is None else f"@{revision}")
        return load_bundle(place)

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write its files to a folder, all or none.

        Args:
            folder: made if need be.
            overwrite: whether to replace a bundle that is there.

        Raises:
            OutputError: the folder holds something, or cannot be written.
        """
        write_folder(Path(folder), self.files, overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload its files to the Hugging Face hub in one commit; the address.

        Args:
            repo_id: OWNER/NAME; made if need be.
            private: whether the repository is, if it is made; None: as the owner's default.
            token: of the hub; None: the one that was logged in with.
            revision: the branch; None: main.
            commit_message: None: "Upload NAME".

        Raises:
            MissingPackageError: huggingface_hub is not installed.
            BundleError: the hub refuses it.
        """
        client = hub()
        api = client.HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / self.name
                self.save_pretrained(folder)
                message = commit_message or f"Upload {self.name}"
                done = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
        except Exception as error:  # the hub's client raises anything
            raise BundleError(f"hf://{printable(repo_id)}: cannot be written ({one_line(error)})") from None
        return str(done.commit_url)


def load_bundle(where: str | os.PathLike[str]) -> Bundle:
    """Read a bundle; nothing in it is run.

    Args:
        where: the name of one that comes with liplayers, a folder, the https address of a folder, or hf://OWNER/NAME on
            the Hugging Face hub, with @REVISION after it if need be. A folder with the name of a shipped bundle is
            ./NAME.

    Raises:
        BundleError: there is none, or it is not whole; the message names the file.
        MissingPackageError: safetensors is not installed, or huggingface_hub for hf://.

    >>> load_bundle("digits-mlp").report["mode"]
    'proof'
    """
    return Bundle.from_files(os.fspath(where), read_files(where))


def load_pretrained(name: str | os.PathLike[str], *, frozen: bool = True) -> nn.Module:
    """A trained network.

    Args:
        name: of a bundle that comes with liplayers, or any other place that `load_bundle` takes.
        frozen: whether to return plain modules in eval mode, with exactly the weights that were certified; else the
            network as it was trained, in training mode, to train on.

    Raises:
        BundleError: there is no such bundle, or it is not whole.
        MissingPackageError: safetensors is not installed, or huggingface_hub for hf://.

    >>> network = load_pretrained("digits-mlp")
    >>> network(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    return load_bundle(name).network(frozen=frozen)


def read_config(where: str, content: bytes) -> dict[str, Any]:
    """config.json, with everything of the type that it must be."""
    where = printable(where)
    config = json_object(where, content)
    if config.keys() != _CONFIG:
        raise BundleError(f"{where}: has the entries {', '.join(map(printable, sorted(config)))[:200]}; expected "
                          f"{', '.join(sorted(_CONFIG))}")  # fmt: skip
    shape, classes, trained, about = (config[key] for key in ("input_shape", "class_names", "config", "about"))
    checks = {
        "name": _matches(_NAME, config["name"]),
        "liplayers": _matches(_VERSION, config["liplayers"]),
        "input_shape": isinstance(shape, list) and bool(shape) and all(_is_count(n) and n > 0 for n in shape),
        "class_names": isinstance(classes, list) and all(isinstance(name, str) for name in classes),
        "epoch": _is_count(config["epoch"]),
        "config": isinstance(trained, dict) and all(isinstance(trained.get(key), dict) for key in ("model", "data")),
        "same": isinstance(config["same"], dict) and all(isinstance(raw, str) for raw in config["same"].values()),
        "about": isinstance(about, dict) and about.keys() == ABOUT and all(isinstance(t, str) for t in about.values()),
    }
    for key, holds in checks.items():
        if not holds:
            raise BundleError(
                f"{where}: {key} is {printable(f'{config[key]!r:.60}')}, which a bundle cannot have there"
            )
    check_settings(where, trained)
    if portable(trained) != trained:
        raise BundleError(f"{where}: its settings name places on a machine; expected those of the data by one name")
    return config


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**31


def read_weights(where: str, content: bytes, same: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The raw and the frozen weights of model.safetensors.

    Args:
        where: what messages begin with.
        content: of the file.
        same: by the name of a frozen weight, the raw one that it equals and is not stored beside.
    """
    where = printable(where)
    with extra("bundles"):
        from safetensors import SafetensorError
        from safetensors.torch import load
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise BundleError(f"{where}: is not a file of safetensors ({one_line(error)[:100]})") from None
    parts: dict[str, dict[str, Tensor]] = {RAW: {}, FROZEN: {}}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix is None:
            raise BundleError(
                f"{where}: holds {printable(name)[:60]}; expected names that begin with {RAW} or {FROZEN}"
            )
        if not tensor.isfinite().all():
            raise BundleError(f"{where}: {printable(name)} has an entry that is NaN or infinite")
        parts[prefix][name.removeprefix(prefix)] = tensor
    raw, frozen = parts.values()
    for name, equal in same.items():
        if equal not in raw or name in frozen:
            raise BundleError(f"{where}: {FROZEN}{printable(name)} is not {RAW}{printable(equal)}, as {CONFIG} says")
        frozen[name] = raw[equal].clone()
    return raw, frozen
