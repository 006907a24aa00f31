"""What the commands print, and what is printed to be pasted."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from liplayers.commands.quoting import command, hydra_override
from liplayers.errors import ArgumentError

PARTS = ["${", "\\", "\\\\", "${x}", "null", "true", "1e3", "nan", "'", '"', " ", "  ", "$", "{", "ü", "§", "", "???"]
texts = st.lists(
    st.one_of(
        st.sampled_from(PARTS),
        st.sampled_from(list("=,[](){}:#~!*?&;|<>^%@+-.0a/`")),
        st.characters(exclude_characters="\0", exclude_categories=("Cs",)),
    )
).map("".join)


def shell(word: str) -> str:
    """What a shell makes of a word, which must be one and show as one line."""
    assert word.isprintable()
    if not word.startswith('"$(printf'):
        (word,) = shlex.split(word)
        return word
    printed = subprocess.run(["sh", "-c", f"printf '%s\\0' {word}"], capture_output=True).stdout
    (word, rest) = printed.decode("utf-8", "surrogateescape").split("\0")
    assert not rest
    return word


def set_by_hydra(word: str) -> object:
    override = OverridesParser.create().parse_override(shell(word))
    assert not override.is_sweep_override()
    assert override.key_or_group == "a.b"
    config = OmegaConf.create({"a": {"b": None}, "x": "wrong"})
    OmegaConf.update(config, "a.b", override.value())
    return config.a.b


@settings(max_examples=300)
@given(texts.filter(lambda text: text != "???"))
@example('runs/a=b,c [1] {d} (e)/it\'s "best".ckpt')
@example("a\nb\t\x1b[31m%s\\n%%\\")
@example("\udcff/name.ckpt")
@example("\\\\\\${x} \\")
def test_what_is_printed_for_a_setting_sets_it_when_pasted(text):
    value = set_by_hydra(hydra_override("a.b", text))
    assert value == text
    assert isinstance(value, str)


def test_plain_paths_stay_plain_and_what_means_something_else_does_not():
    for text in ("runs/mlp-digits/2026-11-27_10-00-00/checkpoints/best.ckpt", "/data/x_1.y-2", "", "a+b%c@d"):
        assert hydra_override("ckpt", text) == f"ckpt={text}"
    for text in ("2024", "null", "True", "1e3", "inf", "[]", "a,b", "a=b", "${now:}", " a", "a ", "choice(a,b)"):
        assert hydra_override("ckpt", text) != f"ckpt={text}"


@pytest.mark.parametrize("text", ["???", "a\0b", "\ud800"])
def test_what_no_command_line_can_set_is_refused(text):
    with pytest.raises(ArgumentError, match="no command line can set this"):
        hydra_override("ckpt", text)


def test_a_printed_command_runs_on_a_terminal_that_cannot_show_the_name(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    word = hydra_override("a.b", "runs/für [1]/best.ckpt")
    assert word.isascii()
    assert set_by_hydra(word) == "runs/für [1]/best.ckpt"


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        ("train.py", "python certify.py ckpt=a"),
        ("/some where/train.py", "python '/some where/certify.py' ckpt=a"),
        ("/usr/bin/liplayers-train", "liplayers-certify ckpt=a"),
        ("/usr/bin/pytest", "python certify.py ckpt=a"),
    ],
)
def test_a_command_is_printed_as_the_running_one_was_started(running, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [running])
    assert command("certify", hydra_override("ckpt", "a")) == expected
