"""Data that lies or is unlucky: certified is what is in the file, and no file makes a command do more than read."""

from __future__ import annotations

import csv
import io
import math
import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from benchmarks.uci.data import read_uci
from liplayers import AOLLinear
from liplayers.certification import Certificates, CertifiedNetwork, certified_accuracy, certified_radius, certify
from liplayers.checkpoint import KEY, load_checkpoint
from liplayers.cli import proving
from liplayers.cli.composing import training_config
from liplayers.cli.configuration import build_data, unasked
from liplayers.cli.front import read_run
from liplayers.commands.help import config_folder
from liplayers.data import MNIST, DataModule, ImageFolder, Npz, Scaling, Table
from liplayers.data import folder as folder_module
from liplayers.errors import ArgumentError, CheckpointError, DataError, LipschitzError, ShapeError, UnknownNameError


def fails(kind: type[Exception], call: Callable[[], object], *parts: object) -> None:
    """`call` raises `kind` with one line that has every part."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, f"{part!r} not in {message!r}"


# --- B4: what is certified is what is in the file --------------------------------------------------------------------


def affine(slope: list[float], at: float) -> CertifiedNetwork:
    """Class 0 where slope·z > at, of Lipschitz constant ‖slope‖ for the difference of the logits."""
    head = nn.Linear(len(slope), 2).double()
    head.weight.data = torch.tensor([slope, [0.0] * len(slope)], dtype=torch.float64)
    head.bias.data = torch.tensor([0.0, at], dtype=torch.float64)
    return CertifiedNetwork(head, (len(slope),), 2)


def table(folder: Path, train: list[str], test: list[str]) -> DataModule:
    """A table of one feature x and alternating labels."""
    for name, rows in (("train", train), ("test", test)):
        lines = [f"{x},{'ab'[row % 2]}\n" for row, x in enumerate(rows)]
        (folder / f"{name}.csv").write_text("x,y\n" + "".join(lines))
    return DataModule(Table(folder / "train.csv", "y", folder / "test.csv"), val_fraction=0)


def own_radii(network: CertifiedNetwork, data: DataModule) -> Tensor:
    assert data.scaling is not None
    radius = certify(network, data.eval_loader("test"), input_range=None).radius
    return data.scaling.radius(radius, data.split("test").inputs)


def test_a_feature_of_2_to_the_24_is_certified_in_its_own_unit(tmp_path: Path) -> None:
    """Mean 0 and std 1; in float32 the test row would be 16777216, and its distance to the boundary 2 in place of 1."""
    data = table(tmp_path, ["-1", "1"], ["16777217", "16777217"])
    assert (data.scaling and data.scaling.mean, data.scaling and data.scaling.std) == ((0.0,), (1.0,))
    assert data.split("test").inputs.tolist() == [[16777217.0]] * 2
    radius = own_radii(affine([1.0], 16777218.0), data)
    assert 1 - 1e-6 < radius[0] < 1
    (batch, _) = next(iter(data.test_dataloader()))
    assert batch.dtype == torch.float32  # what a network in training takes


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e18, 1e18), min_size=3, max_size=3),
    st.lists(st.floats(-1e18, 1e18), min_size=3, max_size=3),
    st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3),
    st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    st.floats(1e-12, 1e6),
)
def test_radius_left_by_rounding_holds_in_exact_arithmetic(
    x: list[float], mean: list[float], std: list[float], direction: list[float], certified: float
) -> None:
    """Of a row moved by the radius in its own unit, what the network gets has moved by no more than the certified."""
    scaling = Scaling(("a", "b", "c"), tuple(mean), tuple(std))

    def standardised(row: list[Fraction]) -> np.ndarray:
        return (np.array([float(value) for value in row]) - mean) / np.array(std)

    begin = standardised([Fraction(value) for value in x])
    left = scaling.radius(torch.tensor([certified], dtype=torch.float64), torch.from_numpy(begin)[None]).item()
    assert 0 <= left < certified
    norm = math.hypot(*direction)
    assume(norm > 1e-6)
    for row in ([d / norm for d in direction], [1.0, 0.0, 0.0]):
        moved = [
            Fraction(value) + Fraction(left) * Fraction(s) * Fraction(d) / Fraction(1 + 2.0**-50)
            for value, s, d in zip(x, std, row, strict=True)
        ]
        end = standardised(moved)
        exact = sum((Fraction(b) - Fraction(a)) ** 2 for a, b in zip(begin.tolist(), end.tolist(), strict=True))
        assert left == 0 or exact <= Fraction(certified) ** 2


def test_radii_of_the_command_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The radius of a row far out is less than that of its standardised features, by what Scaling.radius takes off."""
    data = table(tmp_path, ["-1", "1"], ["1e15", "1e15"])
    module = nn.Linear(1, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0], [0.0]]))
        module.bias.zero_()
    path = tmp_path / "a.ckpt"
    config = {"model": {"_target_": "x"}, "data": {"_target_": "y"}}
    save(path, config, names=["a", "b"], shape=[1], state={f"model.{k}": v for k, v in module.state_dict().items()})
    monkeypatch.setattr(proving, "check_config", lambda *_: None)
    monkeypatch.setattr(proving, "build_data", lambda _: data)
    monkeypatch.setattr(proving, "build", lambda *_, **__: module)
    cfg: Any = OmegaConf.create({"mode": "proof", "device": "cpu", "data": {"split": "test"}, "allow": []})
    one = proving.certify_one(load_checkpoint(path), cfg, [0.5])
    plain = one.network.radius(data.split("test").inputs)
    assert (one.certificates.radius < plain).all()
    assert data.scaling is not None
    assert torch.equal(one.certificates.radius, data.scaling.radius(plain, data.split("test").inputs))


def test_float64_images_are_certified_as_they_are(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((8, 1, 2, 2))
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(8) % 2)
    data = DataModule(Npz(tmp_path / "train.npz", tmp_path / "test.npz"), val_fraction=0)
    data.setup()
    ((batch, _),) = data.eval_loader("test")
    assert np.array_equal(batch.numpy(), images)
    assert next(iter(data.train_dataloader()))[0].dtype == torch.float32


def test_uci_features_are_those_of_the_file(tmp_path: Path) -> None:
    uci(tmp_path, features="0.1 -2.0000000001 3", labels="0 1 1")
    assert read_uci(tmp_path, "toy").features.flatten().tolist() == [0.1, -2.0000000001, 3.0]
    uci(tmp_path, features="1_0 2 3", labels="0 1 1")
    fails(DataError, partial(read_uci, tmp_path, "toy"), "row 1", "'1_0' is not a number")


def uci(root: Path, features: str, labels: str) -> None:
    folder = root / "toy"
    folder.mkdir(exist_ok=True)
    tables = {"toy": features, "labels": labels, "folds": "1 0 0", "validation_folds": "0 0 1"}
    for key, rows in tables.items():
        (folder / f"{key}_py.dat").write_text(rows.replace(" ", "\n"))


# --- images ----------------------------------------------------------------------------------------------------------


def folder(root: Path) -> DataModule:
    return DataModule(ImageFolder(root), val_fraction=0)


def images(root: Path, count: int = 2) -> Path:
    """Two classes of two splits, grey images of a value of their own."""
    for number, path in enumerate((split, kind) for split in ("train", "test") for kind in ("cat", "dog")):
        where = root.joinpath(*path)
        where.mkdir(parents=True)
        for image in range(count):
            Image.new("L", (4, 4), 10 * number + image).save(where / f"{image}.png")
    return root


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(bits: int, colour: int, channels: int) -> bytes:
    """A PNG of 4 × 4 pixels, written by hand."""
    rows = (b"\0" + bytes(4 * channels * bits // 8)) * 4
    header = struct.pack(">IIBBBBB", 4, 4, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(bits: int, channels: int) -> bytes:
    """A TIFF of 4 × 4 pixels, written by hand."""
    pixels = bytes(16 * channels * bits // 8)
    size = 2 + 12 * 9 + 4
    at = 8 + size + len(pixels)
    tags = [
        (256, 3, 1, 4), (257, 3, 1, 4), (258, 3, channels, bits if channels == 1 else at), (259, 3, 1, 1),
        (262, 3, 1, 1 if channels == 1 else 2), (273, 4, 1, 8 + size), (277, 3, 1, channels), (278, 3, 1, 4),
        (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    ending = struct.pack(f"<{channels}H", *[bits] * channels)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels + ending


def encoded(kind: str, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (4, 4), 7).save(stream, kind)
    return stream.getvalue()


FOREIGN = {
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n",
    "gif": encoded("GIF", "L"),
    "ico": encoded("ICO"),
    "pcx": encoded("PCX", "L"),
    "empty": b"",
    "zeros": bytes(99),
}


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "bmp", "webp", "ppm"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_only_formats_of_the_known_endings_are_opened(tmp_path: Path, kind: str, ending: str, monkeypatch: Any) -> None:
    for name in ("EPS", "GIF", "ICO", "PCX"):  # Pillow knows them, but none of their code may run
        monkeypatch.setitem(Image.OPEN, name, (partial(pytest.fail, name), None))
    path = images(tmp_path) / "train" / "cat" / f"x.{ending}"
    path.write_bytes(FOREIGN[kind])
    fails(DataError, folder(tmp_path).setup, path, "none of BMP, JPEG, PNG, PPM, TIFF, WEBP")


def test_a_known_format_may_have_the_ending_of_another(tmp_path: Path) -> None:
    (images(tmp_path) / "train" / "cat" / "0.png").write_bytes(encoded("JPEG", "L"))
    folder(tmp_path).setup()


SIXTEEN = {
    "grey.png": png(16, 0, 1),
    "grey and alpha.png": png(16, 4, 2),
    "rgb.png": png(16, 2, 3),
    "rgba.png": png(16, 6, 4),
    "grey.tif": tiff(16, 1),
    "rgb.tif": tiff(16, 3),
    "grey.pgm": b"P5 4 4 65535\n" + bytes(32),
    "rgb.ppm": b"P6 4 4 65535\n" + bytes(96),
    "ten.ppm": b"P6 4 4 1023\n" + bytes(96),
    "text.ppm": b"P3 4 4 1023\n" + b"1000 " * 48,
}


@pytest.mark.parametrize("name", SIXTEEN)
def test_more_than_eight_bits_are_never_cut(tmp_path: Path, name: str) -> None:
    path = images(tmp_path) / "test" / "dog" / name
    path.write_bytes(SIXTEEN[name])
    with Image.open(path) as image:
        image.load()  # Pillow takes it
    fails(DataError, folder(tmp_path).setup, path, "has pixels of", "convert it to 8 bits a channel")


@pytest.mark.parametrize(
    "content",
    [png(8, 2, 3), png(8, 0, 1), png(8, 6, 4), tiff(8, 3), tiff(8, 1), b"P6 4 4 15\n" + bytes(48), encoded("BMP", "P")],
    ids=["rgb.png", "grey.png", "rgba.png", "rgb.tif", "grey.tif", "four.ppm", "palette.bmp"],
)
def test_up_to_eight_bits_are_read(tmp_path: Path, content: bytes) -> None:
    (images(tmp_path) / "test" / "dog" / "x.png").write_bytes(content)
    folder(tmp_path).setup()


def test_damaged_images_are_named_whatever_their_decoder_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = images(tmp_path) / "train" / "cat" / "0.png"
    for error in (struct.error("unpack"), KeyError(3), ZeroDivisionError(), TypeError("x"), MemoryError()):

        def broken(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(folder_module.Image, "open", broken)
        fails(DataError, folder(tmp_path).setup, "cannot read image", path)
    monkeypatch.undo()
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    fails(DataError, folder(tmp_path).setup, path, "decompression bomb")


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "/", "../dog", "sub"])
def test_links_that_lead_to_a_folder_again_are_refused(tmp_path: Path, target: str) -> None:
    root = images(tmp_path / "data")
    (root / "train" / "cat" / "sub").mkdir()
    (root / "train" / "cat" / "sub" / "9.png").symlink_to("../0.png")
    link = root / "train" / "cat" / "again"
    link.symlink_to(target)
    fails(DataError, folder(root).setup, "is a link to", "remove the link")
    link.unlink()
    data = folder(root)
    data.setup()
    assert len(data.split("train")) == 5


def test_links_that_meet_in_a_circle_and_classes_that_are_one_are_refused(tmp_path: Path) -> None:
    root = images(tmp_path / "data")
    for one, other in (("a", "b"), ("b", "a")):
        (root / "train" / "cat" / one).mkdir()
        (root / "train" / "cat" / one / "to").symlink_to(f"../{other}")
    fails(DataError, folder(root).setup, "is a link to")
    root = images(tmp_path / "other")
    for split in ("train", "test"):
        (root / split / "kitten").symlink_to("cat")
    fails(DataError, folder(root).setup, "kitten", "cat")


def test_links_to_folders_elsewhere_and_hard_links_count(tmp_path: Path) -> None:
    root = images(tmp_path / "data")
    more = tmp_path / "more"
    more.mkdir()
    os.link(root / "train" / "cat" / "0.png", more / "0.png")
    (root / "train" / "cat" / "more").symlink_to(more)
    (root / "test").rename(tmp_path / "elsewhere")
    (root / "test").symlink_to(tmp_path / "elsewhere")
    data = folder(root)
    data.setup()
    assert (len(data.split("train")), len(data.split("test"))) == (5, 4)


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints", ".hidden", "@eaDir", "@EADIR", "__MACOSX", "#recycle", "$RECYCLE.BIN"]
)
def test_tool_folders_are_neither_samples_nor_classes(tmp_path: Path, name: str) -> None:
    plain = folder(images(tmp_path / "plain"))
    root = images(tmp_path / "data")
    data = folder(root)
    for where in (root / "train" / "cat", root / "train"):
        (where / name / "deep").mkdir(parents=True)
        for file in ("0.png", "deep/0.png"):
            Image.new("L", (9, 9)).save(where / name / file)
    (root / "train" / "dog" / "._0.png").write_bytes(b"AppleDouble")
    (root / "train" / "dog" / "Thumbs.db").write_bytes(b"")
    plain.setup(), data.setup()
    assert data.class_names == ("cat", "dog")
    assert data.split("train").sources == plain.split("train").sources


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = images(tmp_path) / "train" / "dog" / "x.png"
    os.mkfifo(path)
    fails(DataError, folder(tmp_path).setup, path, "no regular file")
    path.unlink()
    for target in ("x.png", "nowhere"):
        path.symlink_to(target)
        fails(DataError, folder(tmp_path).setup, "cannot read image", path)
        path.unlink()


# --- archives --------------------------------------------------------------------------------------------------------


def npy(shape: tuple[int, ...], content: bytes, descr: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + content


def archive(path: Path, images: bytes, labels: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("images.npy", images)
        file.writestr("labels.npy", labels)
    return path


SMALL = npy((4, 1, 2, 2), bytes(16)), npy((4,), bytes(range(4)))
CLAIMS = {
    "three terabytes": (npy((3 * 10**12, 1, 1, 1), b""), SMALL[1]),
    "labels": (SMALL[0], npy((10**13,), b"\0" * 4)),
    "more than int64": (npy((2**33, 2**33, 1, 1), b""), SMALL[1]),
    "one too many": (npy((5, 1, 2, 2), bytes(16)), SMALL[1]),
    "wide": (npy((4, 1, 2, 2), bytes(16), "<f8"), SMALL[1]),
    "too few": (npy((4, 1, 2, 2), bytes(17)), SMALL[1]),
}


def test_a_shape_that_is_none_is_one_line(tmp_path: Path) -> None:
    bad, good = (
        archive(tmp_path / "a.npz", npy((True, 1, 4, 4), bytes(16)), SMALL[1]),
        archive(tmp_path / "b.npz", *SMALL),
    )
    fails(DataError, DataModule(Npz(bad, good)).setup, bad)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", CLAIMS)
def test_archives_claim_no_more_than_they_hold(tmp_path: Path, name: str, compression: int) -> None:
    bad, good = archive(tmp_path / "a.npz", *CLAIMS[name], compression), archive(tmp_path / "b.npz", *SMALL)
    tracemalloc.start()
    fails(DataError, DataModule(Npz(bad, good)).setup, bad, "claims an array", "but holds")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
    DataModule(Npz(good, good), val_fraction=0).setup()


def test_an_archive_that_grows_without_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liplayers.data.npz._LARGE", 2**16)
    content = npy((2**12, 1, 8, 8), bytes(2**18)), npy((2**12,), bytes(2**12))
    bomb = archive(tmp_path / "a.npz", *content)
    fails(DataError, DataModule(Npz(bomb, bomb)).setup, bomb, "would grow", "np.savez")
    plain = archive(tmp_path / "b.npz", *content, zipfile.ZIP_STORED)
    DataModule(Npz(plain, plain), val_fraction=0).setup()


def test_data_beyond_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = archive(tmp_path / "b.npz", *SMALL)
    monkeypatch.setattr("liplayers.data.npz._read_split", lambda _: np.empty(2**62, np.uint8))
    fails(DataError, DataModule(Npz(good, good)).setup, "b: the data do not fit into memory")


# --- tables ----------------------------------------------------------------------------------------------------------


def csv_data(path: Path, content: str | bytes, target: str = "y") -> DataModule:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return DataModule(Table(path, target, path), val_fraction=0)


ROWS = "x{0}z{0}y\n1{0}2{0}a\n3{0}5{0}b\n"


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (" ", "spaces")])
@pytest.mark.parametrize("decimal", [".", ","])
@pytest.mark.parametrize("header", ["plain", "quoted", "BOM", "commas"])
def test_another_separator_is_named(tmp_path: Path, separator: str, name: str, decimal: str, header: str) -> None:
    content = ROWS.format(separator).replace("2", f"2{decimal}5")
    changes = {
        "plain": content,
        "quoted": content.replace("x", '"x"').replace("y", '"y"', 1),
        "BOM": "\ufeff" + content,
        "commas": content.replace("z", '"z,in,m"', 1),
    }
    fails(
        DataError, csv_data(tmp_path / "a.csv", changes[header]).setup, "a.csv separates its columns by", name, "commas"
    )


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("x,y\n1,5,a\n2,5,b\n", ("row 1 has more columns", "3, not 2", "decimals with a point")),
        ("x,y\n1.5,a\n2,5,b\n", ("row 2 has more columns", "decimals with a point")),
        ('x,y\n"1,5",a\n"2,5",b\n', ("'x' holds", "'1,5' in row 1", "1234.5, with a point")),
        ('x,y\n15,a\n"1,250",b\n', ("'1,250' in row 2", "nothing between thousands")),
        ("x,y\n15,a\n1 250,b\n", ("'1 250' in row 2", "nothing between thousands")),
        ("x,y\n15,a\n1'250.5,b\n", ("nothing between thousands",)),
        ("x,y\nred,a\nblue,b\n", ("'red' in row 1", "one-hot encode")),
        ("x,y\n1,a\n2\n", ("'y' is missing in row 2",)),
        (ROWS.format(",").encode("utf-16"), ("cannot be read as text in UTF-8",)),
        (ROWS.format(",").encode("utf-16-le"), ("cannot be read as text in UTF-8",)),
        (ROWS.format(",").replace("x", "ü").encode("latin-1"), ("cannot be read as text in UTF-8",)),
        (b"PK\x03\x04\xff\xfe", ("cannot be read as text in UTF-8",)),
        ("x" * 200_000 + ";y\n1;a\n", ("cannot be read", "field larger")),
        ("sep=;\nx;y\n1;a\n", ("semicolons",)),
        (f"x,y\n{'9' * 400},a\n1,b\n", ("a whole number beyond float64",)),
    ],
)
def test_the_right_mend_is_named(tmp_path: Path, content: str | bytes, parts: tuple[str, ...]) -> None:
    fails(DataError, csv_data(tmp_path / "a.csv", content).setup, "a.csv", *parts)


@pytest.mark.parametrize("content", ["\ufeffx,y\n1,a\n2,b\n", '"x","y"\n"1","a"\n"2","b"\n', "x,y\r\n1,a\r\n2,b\r\n"])
def test_what_pandas_and_spreadsheets_write_is_read(tmp_path: Path, content: str) -> None:
    data = csv_data(tmp_path / "a.csv", content)
    data.setup()
    assert (data.class_names, data.split("train").inputs.flatten().tolist()) == (("a", "b"), [-1.0, 1.0])


def test_a_target_that_is_no_column_is_still_named(tmp_path: Path) -> None:
    fails(UnknownNameError, csv_data(tmp_path / "b.csv", "my x\n1\n").setup, "'y'", "known: my x")
    fails(
        UnknownNameError,
        csv_data(tmp_path / "a.csv", "x,kind\n1,a\n2,b\n", "kinds").setup,
        "'kinds'",
        "did you mean kind",
    )


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["01", "1"], None),
        (["1", "1.0"], None),
        (["1", "1e0"], None),
        (["1", "+1"], None),
        ([" 1", "1"], None),
        (["cat ", "cat"], None),
        (["True", "true"], None),
        (["0", "-0"], None),
        (["9007199254740993.0", "9007199254740992.0"], None),
        (["1", "nan"], None),
        (["1", ""], None),
        (["a", "NA"], None),
        (["01", "1", "x"], ("01", "1", "x")),
        (["True", "1"], ("1", "True")),
        (["01", "02"], ("1", "2")),
        (['"1"', "2"], ("1", "2")),
        (["Cat", "cat"], ("Cat", "cat")),
    ],
)
def test_labels_written_in_two_ways_never_become_one_class(
    tmp_path: Path, labels: list[str], classes: tuple[str, ...] | None
) -> None:
    rows = [*labels, "2"] if classes is None and labels[0].strip()[0].isdigit() else labels
    data = csv_data(tmp_path / "a.csv", "x,y\n" + "".join(f"{row},{label}\n" for row, label in enumerate(rows)))
    if classes is None:
        fails(DataError, data.setup, "a.csv", "'y'", "in row")
    else:
        data.setup()
        assert data.class_names == classes
        texts = [row["y"] for row in csv.DictReader((tmp_path / "a.csv").open())]
        assert len(set(data.split("train").labels.tolist())) == len(set(texts))


def test_labels_of_two_files_are_compared_as_written(tmp_path: Path) -> None:
    train = tmp_path / "a.csv"
    train.write_text("x,y\n1,0\n2,1\n")
    for label in ("01", "1.0", "True", " 1"):
        test = tmp_path / "b.csv"
        test.write_text(f"x,y\n1,{label}\n")
        fails(DataError, DataModule(Table(train, "y", test), val_fraction=0).setup, "b.csv", repr(label))
    pd.DataFrame({"x": [1.0], "y": [True]}).to_parquet(tmp_path / "b.parquet")
    data = DataModule(Table(train, "y", tmp_path / "b.parquet"), val_fraction=0)
    fails(DataError, data.setup, "b.parquet", "'True'", "'1'")


def test_uci_labels_written_in_two_ways_are_refused(tmp_path: Path) -> None:
    uci(tmp_path, features="1 2 3", labels="01 0 1")
    fails(DataError, partial(read_uci, tmp_path, "toy"), "labels_py.dat", "'01'", "'1'", "one way")


@pytest.mark.parametrize(
    "labels",
    [
        np.array([[0], [1], [2], [3]]),
        np.eye(4, dtype=int),
        np.arange(4.0),
        np.array([True] * 4),
        np.array(list("abcd")),
    ],
)
def test_labels_of_archives_are_class_numbers(tmp_path: Path, labels: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 1, 2, 2), np.uint8), labels=labels)
    fails(DataError, DataModule(Npz(tmp_path / "a.npz", tmp_path / "a.npz")).setup, "labels")


def test_a_parquet_file_cannot_claim_what_it_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"x": np.zeros(10**5), "y": ["a"] * 10**5}).to_parquet(path)
    monkeypatch.setattr("liplayers.data.tabular._CELLS", 1000)
    monkeypatch.setattr("liplayers.data.tabular._CELLS_OF_A_BYTE", 1)
    fails(DataError, DataModule(Table(path, "y")).setup, path, "200,000 cells")


# --- labels given to certify -----------------------------------------------------------------------------------------

LABELS: dict[str, tuple[Any, str]] = {
    "one-hot": (torch.eye(3, dtype=torch.long), "(3, 3)"),
    "column": (torch.tensor([[0], [1], [2]]), "(3, 1)"),
    "scalar": (torch.tensor(0), "()"),
    "floats": (torch.tensor([0.0, 1.0, 2.0]), "torch.float32"),
    "complex": (torch.tensor([0j, 1, 2]), "torch.complex64"),
    "booleans": (torch.tensor([True, False, True]), "torch.bool"),
    "no values": (torch.arange(3, device="meta"), "on meta"),
    "list": ([0, 1, 2], "list"),
    "short": (torch.arange(2), "3 inputs but 2 labels"),
    "long": (torch.arange(4) % 3, "3 inputs but 4 labels"),
    "negative": (torch.tensor([0, -1, 2]), "sample 4 has label -1; expected 0 … 2"),
    "another task": (torch.tensor([0, 1, 3]), "sample 5 has label 3; expected 0 … 2"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_no_classes_are_refused_by_certify(name: str) -> None:
    labels, part = LABELS[name]
    network, inputs = CertifiedNetwork(AOLLinear(2, 3), (2,), 3), torch.rand(3, 2)
    batches = [(inputs, torch.arange(3, dtype=torch.uint8)), (inputs, labels)]
    fails(DataError, partial(certify, network, batches), part)


def test_what_has_not_one_number_for_each_sample_is_never_compared() -> None:
    ones, right = torch.ones(3), torch.tensor([True, False, True])
    assert certified_accuracy(ones, right, 0.5) == pytest.approx(2 / 3)
    for radius, correct in ((ones, right[:, None]), (ones[:, None], right), (ones, right[:1]), (ones, right.float())):
        fails(ShapeError, partial(certified_accuracy, radius, correct, 0.5), "certified_accuracy", tuple(correct.shape))
    fails(ShapeError, partial(Certificates, ones[:, None], ones, ones, ones), "'label': (3, 1)")
    logits, constants = torch.rand(3, 2), torch.ones(2, 2)
    for error in (ones, ones[:, None], torch.ones(2)):
        fails(ShapeError, partial(certified_radius, logits, constants, error), "logit_error")
    fails(ArgumentError, partial(certified_radius, logits.long(), constants), "torch.int64")
    network = CertifiedNetwork(AOLLinear(2, 2), (2,), 2)
    complex_inputs = [(torch.rand(1, 2).to(torch.complex64), torch.tensor([0]))]
    fails(DataError, partial(certify, network, complex_inputs, input_range=None), "complex64")


# --- checkpoints of others -------------------------------------------------------------------------------------------


def save(
    path: Path,
    config: Any,
    *,
    names: Any = ("0",),
    shape: Any = (1,),
    version: Any = "0",
    state: Any = None,
    **more: Any,
) -> Path:
    entry = {"version": version, "config": config, "input_shape": list(shape), "class_names": names}
    torch.save({KEY: entry, "state_dict": state or {}, "epoch": 0, "global_step": 0, **more}, path)
    return path


def doubled(leaf: Any = "x", times: int = 40) -> list[Any]:
    """Lists that stand for 2^40 leaves; and are some hundred bytes in a file."""
    value = [leaf]
    for _ in range(times):
        value = [value, value]
    return value


def circle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


CONFIG = {"model": {"_target_": "liplayers.models.mlp"}, "data": {"_target_": "liplayers.data.Digits"}}
HUGE = {
    "config": {"config": CONFIG | {"eps": doubled()}},
    "22 times": {"config": CONFIG | {"eps": doubled(times=22)}},
    "in the model": {"config": CONFIG | {"model": {"mean": doubled()}}},
    "a dict of dicts": {"config": CONFIG | {"eps": {"a": doubled({"b": 1})}}},
    "text": {"config": CONFIG | {"eps": doubled("x" * 10**5, times=12)}},
    "class names": {"config": CONFIG, "names": doubled()},
    "version": {"config": CONFIG, "version": doubled()},
    "optimizer": {"config": CONFIG, "optimizer_states": doubled()},
    "circle": {"config": CONFIG | {"eps": circle()}},
    "deep": {"config": CONFIG | {"eps": eval("[" * 60 + "]" * 60)}},
}


@pytest.mark.parametrize("name", HUGE)
def test_a_small_checkpoint_never_stands_for_a_huge_one(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "a.ckpt", **HUGE[name])
    assert path.stat().st_size < 200_000
    fails(CheckpointError, partial(load_checkpoint, path), path, "parts")


def test_a_small_config_of_a_run_never_stands_for_a_huge_one(tmp_path: Path) -> None:
    levels = "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    (tmp_path / "config.yaml").write_text(f"select_eps: 1\neps: 1\nresume: null\na0: &a0 x\n{levels}")
    fails(DataError, partial(read_run, tmp_path, "run"), tmp_path, "parts")


def test_a_checkpoint_of_many_classes_and_tensors_is_read(tmp_path: Path) -> None:
    names = [f"species number {n}" for n in range(20_000)]
    states = [{"state": {n: {"step": torch.tensor(1.0)} for n in range(2000)}}]
    path = save(tmp_path / "a.ckpt", CONFIG, names=names, optimizer_states=states)
    assert load_checkpoint(path).class_names == tuple(names)


def test_a_checkpoint_does_not_grow_by_decompression(tmp_path: Path) -> None:
    path, bomb = save(tmp_path / "a.ckpt", CONFIG, state={"model.w": torch.zeros(10**6)}), tmp_path / "b.ckpt"
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as other:
        for name in file.namelist():
            other.writestr(name, file.read(name))
    assert bomb.stat().st_size < path.stat().st_size / 100
    fails(CheckpointError, partial(load_checkpoint, bomb), bomb, "compressed")


def resumed(path: Path, *overrides: str) -> Any:
    """The config that `resume` takes from a checkpoint."""
    arguments = [f"resume='{path}'", *overrides]
    name, added = training_config(arguments)
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose(name, [*arguments, *added])


def test_a_checkpoint_makes_no_command_fetch_or_write(tmp_path: Path) -> None:
    root, cache = images(tmp_path / "data"), tmp_path / "cache"
    own = {"_target_": "liplayers.data.ImageFolderData", "root": str(root), "cache": str(cache), "val_fraction": 0}
    extra = own | {"cache": str(tmp_path / "other")}
    path = save(tmp_path / "a.ckpt", CONFIG | {"data": own, "extra": {"data": extra, "share": 0.5}})
    before = sorted(tmp_path.rglob("*"))
    cfg = resumed(path)
    for node in (cfg.data, cfg.extra.data):
        build_data(node).setup()
    certifying = proving._data_config(load_checkpoint(path), OmegaConf.create({"data": {"split": "test"}}))
    build_data(OmegaConf.create(certifying)).setup()
    assert sorted(tmp_path.rglob("*")) == before
    asked = resumed(path, f"data.cache={cache}")
    build_data(asked.data).setup()
    assert len(list(cache.glob("*.npy"))) == 2


def test_a_checkpoint_does_not_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNIST, "_fetch", partial(pytest.fail, "downloads"))
    data = {"_target_": "liplayers.data.MNIST", "root": str(tmp_path), "download": True}
    path = save(tmp_path / "a.ckpt", CONFIG | {"data": data, "extra": {"data": data}})
    cfg = resumed(path)
    for node in (cfg.data, cfg.extra.data):
        fails(DataError, build_data(node).setup, "no train-images")


@pytest.mark.parametrize("where", ["data", "extra"])
def test_arguments_without_names_get_around_nothing(tmp_path: Path, where: str) -> None:
    data = {"_target_": "liplayers.data.MNIST", "_args_": [str(tmp_path), True]}
    config = CONFIG | {where: data if where == "data" else {"data": data}}
    path = save(tmp_path / "a.ckpt", config)
    fails(LipschitzError, partial(resumed, path), path, "without names")
    fails(LipschitzError, partial(unasked, SimpleNamespace(path=path), [{"a": data}]), path, "without names")
