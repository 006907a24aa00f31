"""What the commands print, and what is printed to be pasted."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import liplayers
from liplayers import cli
from liplayers.audit.audit import Audit, RobustAccuracy
from liplayers.audit.report import audit_figure, audit_table
from liplayers.certification import Certificates
from liplayers.certification.report import curve, results_table, units_table
from liplayers.cli import front
from liplayers.commands import audit_command, certify_command, front_command, train_command
from liplayers.commands.entry import run
from liplayers.commands.help import COLUMN, comments, config_folder, heading, help_text
from liplayers.commands.output import ForgivingOutput, console, progress_bar, say
from liplayers.commands.quoting import command, hydra_override
from liplayers.errors import ArgumentError, LipschitzError

CONFIGS = config_folder()
SMALL = ["model.width=8", "model.depth=1", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
SMALL += ["trainer.accelerator=cpu", "trainer.limit_train_batches=1", "data.batch_size=64"]
NASTY = "_[bold]a=b, c :smile: {x} $y$ ü 'd' \n\x1b[31m\udcff"  # as a folder on Linux may be called
SHOWN = "_[bold]a=b, c :smile: {x} $y$ ü 'd' \\n\\x1b[31m\\udcff"

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


# --- what is printed ------------------------------------------------------------------------------------------------


@contextmanager
def terminal(encoding: str) -> Iterator[io.BytesIO]:
    """Standard output in another encoding."""
    written, before = io.BytesIO(), sys.stdout
    sys.stdout = stdout = io.TextIOWrapper(written, encoding=encoding, write_through=True)
    try:
        yield written
    finally:
        sys.stdout = before
        stdout.detach()  # else `written` is closed with it


def started(monkeypatch, name: str, *arguments: str) -> int:
    """The exit status of a command in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    try:
        {"train": train_command, "certify": certify_command, "audit": audit_command}[name]()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def result() -> Certificates:
    label = torch.tensor([0, 1, 1])
    radius = torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64)
    return Certificates(label, torch.tensor([0, 1, 0]), radius, radius)


def attacked() -> Audit:
    return Audit(3, 1.0, (RobustAccuracy(0.5, 0.5, 0.75, 0.75),), 2, 0, 0.9, 5, 3, 0, 5, 1, {0.5: 1.2}, ())


def as_printed(table: Any) -> str:
    """As a console prints it that takes square brackets for markup and `:smile:` for a picture."""
    console = Console(file=io.StringIO(), width=250)
    console.print(table)
    return console.file.getvalue()


def test_names_stand_in_tables_as_they_are():
    unit = [{"name": NASTY, "mean": 0.0, "std": 1.0, "mean_radius_along": 0.5}]
    for table, times in (
        (results_table({NASTY: result()}, [0.5], NASTY, NASTY), 3),
        (units_table(unit, NASTY), 2),
        (audit_table(attacked(), NASTY), 1),
    ):
        assert "".join(as_printed(table).split()).count("".join(SHOWN.split())) == times  # wherever lines are broken


def test_hundreds_of_radii_leave_a_table_that_can_be_read():
    table = results_table({"a": result()}, [i / 100 for i in range(300)], "title", "pixels")
    assert len(table.columns) < 20
    assert "288 more radii are in report.json" in as_printed(table)


@pytest.mark.parametrize("name", [NASTY, "$", "$x^{", "_hidden"])
def test_names_stand_in_plots_as_they_are(name):
    figure = curve({name: result(), "other": result()}, name, name)
    for one in (figure, audit_figure(attacked(), name, name)):
        (axes,) = one.axes
        one.canvas.draw()  # raises where a name is taken for a formula
        shown = SHOWN if name == NASTY else name
        assert axes.get_title() == shown
        assert axes.get_xlabel().endswith(shown)
        assert not axes.title.get_parse_math()
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [text.partition(": ")[2] for text in legend] == [SHOWN if name == NASTY else name, "other"]


def test_front_shows_names_and_settings_as_they_are():
    names = (SHOWN, "[red]*a*|b")
    metrics = {"accuracy": 1.0, "certified_1": 0.5}
    runs = [front.Run(name, {"x": name}, {"certified_1": "1"}, "certified_1", "val", metrics) for name in names]
    found = front.compare(runs, "1")
    printed = as_printed(front.rich_table(found, SHOWN))
    assert printed.count(SHOWN) == 3  # title, setting and name
    assert printed.count("[red]*a*|b") == 2
    assert "\\[red\\]\\*a\\*\\|b" in front.markdown(found, "title")


def test_what_a_terminal_cannot_show_is_an_escape():
    with terminal("ascii") as written:
        say(f"radius ε of {NASTY}")
        console.print(results_table({NASTY: result()}, [0.5], "title", "pixels"))
    assert written.getvalue().decode("ascii").splitlines()[0] == f"radius \\u03b5 of {SHOWN}".replace("ü", "\\xfc")
    with terminal("utf-8") as written:
        say(f"radius ε of {NASTY}")
    assert written.getvalue().decode() == f"radius ε of {SHOWN}\n"


@pytest.mark.parametrize("kind", ["no reader", "full disk"])
def test_output_that_is_lost_costs_nothing_else(kind, monkeypatch, capsys):
    if kind == "no reader":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "argv", ["certify.py", "ckpt=a"])
        done = []

        def task(cfg: DictConfig) -> None:
            for _ in range(3):
                say("a" * 10_000)
                print("b" * 10_000, flush=True)
            done.append(cfg.ckpt)

        run("certify", task)
        assert done == ["a"]
        print("c" * 10_000, flush=True)  # what others still hold
    said = capsys.readouterr().err
    assert said.count("warning: standard output cannot be written (No space left on device)") == (kind != "no reader")


def test_help_that_cannot_be_written_is_no_success(monkeypatch):
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert started(monkeypatch, "train", "--help") == 1
    monkeypatch.setattr(sys, "stdout", None)
    assert started(monkeypatch, "train", "--help") == 0


def test_an_output_below_a_progress_bar_is_written_once():
    written = io.StringIO()
    written.rich_proxied_file = other = io.StringIO()  # type: ignore[attr-defined]
    ForgivingOutput(written).write("a")
    assert (written.getvalue(), other.getvalue()) == ("", "a")


@pytest.mark.parametrize("known", [True, False])
def test_a_progress_bar_shows_how_much_is_done(known, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("liplayers.commands.output.console", terminal)
    with progress_bar("certifying", 4 if known else None) as progress:
        progress(3) if known else progress(3, 4)
    assert re.search("certifying.*3/4", terminal.file.getvalue())
    with progress_bar("certifying", shown=False) as progress:
        progress(2, 4)
    assert "2/4" not in terminal.file.getvalue()


# --- from training to a verified report, in a folder of any name ----------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run, and what training printed on a terminal without UTF-8."""
    folder = tmp_path_factory.mktemp("commands") / "[a] b=c, :smile: $ü"
    with pytest.MonkeyPatch.context() as patch, terminal("ascii") as written:
        assert started(patch, "train", shell(hydra_override("output", folder)), *SMALL) == 0
    return folder, written.getvalue().decode("ascii")


def test_the_printed_command_certifies_and_verifies(trained, tmp_path, monkeypatch):
    printed = trained[1]
    (line,) = [line for line in printed.splitlines() if line.startswith("certify it: ")]
    word = line.removeprefix("certify it: python certify.py ")
    output = tmp_path / "[b]x=1,2"
    with terminal("ascii") as written:
        assert started(monkeypatch, "certify", shell(word), shell(hydra_override("output", output))) == 0
        assert (
            started(monkeypatch, "certify", shell(word), shell(hydra_override("verify", output / "report.json"))) == 0
        )
    lines = written.getvalue().decode("ascii").splitlines()
    assert str(output / "network.pt") in lines
    assert lines[-1].startswith("verified: ")


def test_names_of_checkpoints_may_hold_anything(trained, tmp_path, monkeypatch):
    folder, _ = trained
    named = tmp_path / NASTY / "checkpoints" / "best.ckpt"
    named.parent.mkdir(parents=True)
    named.write_bytes((folder / "checkpoints" / "best.ckpt").read_bytes())
    both = OmegaConf.create([str(named), str(folder / "checkpoints" / "best.ckpt")])
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("certify", ["mode=fast", "eps=[' 0.5']"])
    cfg.ckpt, cfg.output = both, str(tmp_path / "out")
    with terminal("ascii") as written:
        assert set(cli.certify(cfg)) == {NASTY, folder.name}
    assert str(tmp_path / "out" / SHOWN / "report.json").replace("ü", "\\xfc") in written.getvalue().decode("ascii")
    cfg.ckpt, cfg.verify = str(named), str(tmp_path / "out" / NASTY / "report.json")
    assert cli.certify(cfg) == {"verified": 359}


def test_a_report_has_at_least_one_radius(trained, tmp_path, monkeypatch, capsys):
    """Of the command line or, where training was told of none, of the checkpoint."""
    content = torch.load(trained[0] / "checkpoints" / "best.ckpt", weights_only=True)
    content["liplayers"]["config"]["eps"] = []
    torch.save(content, tmp_path / "a.ckpt")
    for eps in ("eps=[]", "eps=null"):
        assert started(monkeypatch, "certify", f"ckpt={tmp_path / 'a.ckpt'}", f"output={tmp_path / 'out'}", eps) == 2
        assert "expected at least one radius" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_hint_to_paste_holds_nothing_but_what_it_says(trained, tmp_path):
    folder, _ = trained
    content = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    content["liplayers"]["config"]["model"]["_target_"] = "x]; touch 'gone wrong' #.y"
    torch.save(content, tmp_path / "a.ckpt")
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("certify", [f"ckpt={tmp_path / 'a.ckpt'}"])
    with pytest.raises(LipschitzError) as caught:
        cli.certify(cfg)
    (word,) = shlex.split(str(caught.value).partition("pass ")[2])
    assert OverridesParser.create().parse_override(word).value() == "x]; touch 'gone wrong' #"


# --- help and mistakes ----------------------------------------------------------------------------------------------


def settings_of(config: Any, prefix: str = "") -> Iterator[str]:
    """The dotted name of every setting in a plain config, lists looked into."""
    if isinstance(config, dict):
        for key, value in config.items():
            if not key.startswith("_") and key not in ("hydra", "defaults"):
                yield f"{prefix}{key}"
                yield from settings_of(value, f"{prefix}{key}.")


def options_of(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
FILES = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "experiment"]


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_setting_has_a_description_beside_it(file):
    described = comments(file)
    missing = [name for name in settings_of(yaml.safe_load(file.read_text("utf-8"))) if not described.get(name)]
    assert not missing
    assert heading(file)


@pytest.mark.parametrize("name", options_of("experiment"))
def test_help_describes_every_setting_of_an_experiment(name):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("train", [f"experiment={name}"]))
    text = help_text("train", [f"experiment={name}"])
    for setting in settings_of(config):
        if setting not in GROUPS and not setting.startswith("epsilon_ramp."):  # described as a whole
            assert re.search(rf"^  {re.escape(setting)}[=:].*( {{2,}}\S|\n {{{COLUMN}}}\S)", text, re.M), setting
    assert heading(CONFIGS / "experiment" / f"{name}.yaml").splitlines()[0] in text


def test_help_lists_every_option_and_shows_the_values_in_force(monkeypatch, capsys):
    assert started(monkeypatch, "train", "-h", "model=lipconvnet", "loss=hkr", "loss.hinge=3") == 0
    text = capsys.readouterr().out
    for group in GROUPS:
        for option in options_of(group):
            assert re.search(rf"^  {option}  +\S", text, re.M)
    assert "loss.hinge=3 " in text
    assert re.search(r"^  model.convs_per_stage=1 +of stride 1", text, re.M)
    for flag in ("-h, --help", "-m, --multirun", "--cfg job"):
        assert flag in text
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, help_text("certify", []).splitlines())) <= 80
    assert started(monkeypatch, "audit", "--help") == 0
    assert re.search(r"^  audit=true  +whether", capsys.readouterr().out, re.M)


def test_comments_beside_below_and_above(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "# heading\n_target_: x\na: '#1'  # one\n         # more\nb:  # two\n  c: [1,\n    2]  # three # four\n"
        "  # five\n  d: 1\n# six\n# seven\ne:\n  - f: 1  # eight\ng: 2\n"
    )
    described = comments(path)
    del described["_target_"]
    assert described == {"a": "one more", "b": "two", "b.c": "three # four", "b.d": "five", "e": "six seven"}
    assert heading(path) == "heading"


START = """
import contextlib, io, runpy, sys
slow = {"torch", "lightning", "pandas", "matplotlib", "sklearn", "torchvision"}
from liplayers.commands import audit_command, bundle_command, certify_command, front_command, train_command
for command in (audit_command, bundle_command, certify_command, front_command, train_command, "train.py", "certify.py"):
    sys.argv = [str(command), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        runpy.run_path(command, run_name="__main__") if isinstance(command, str) else command()
    assert len(text.getvalue()) > 100
assert not slow & set(sys.modules), slow & set(sys.modules)
"""


def test_help_needs_none_of_the_packages_that_take_seconds():
    done = subprocess.run([sys.executable, "-c", START], cwd=CONFIGS.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("train", ["--bogus"], "unrecognized arguments: --bogus; flags come before settings"),
        ("train", ["seed=1", "--cfg", "job", "seed=2"], "flags come before settings"),
        ("train", ["--cfg"], "expected one argument"),
        ("train", ["--help", "modell=mlp"], "did you mean model"),
        ("train", ["--help", "model=nope"], "known: aolnet"),
        ("certify", ["data=mnist", "ckpt=a"], "data: has no options to choose from here"),
        ("certify", ["data=null", "ckpt=a"], "Config group override"),
        ("certify", ["ckpt=a=b[c].ckpt"], "for the shell and for hydra: 'ckpt=\"a=b[c].ckpt\"'"),
    ],
)
def test_mistakes_are_one_line(name, arguments, says, monkeypatch, capsys):
    assert started(monkeypatch, name, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_mistakes_in_the_arguments_of_front_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["liplayers-front", "--bogus"])
    with pytest.raises(SystemExit, match="2"):
        front_command()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_the_flags_of_hydra_work(monkeypatch, capsys):
    assert started(monkeypatch, "train", "--cfg", "job", "seed=7") == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7
    assert started(monkeypatch, "train", "--hydra-help") == 0
    assert "--shell-completion" in capsys.readouterr().out


# --- the names of the package, which are imported when they are asked for -------------------------------------------


def test_the_package_has_its_public_names():
    names: dict[str, Any] = {}
    exec("from liplayers import *", names)
    for name in ("AOLLinear", "BROConv2d", "lipschitz_bound", "freeze", "FAMILIES", "LipschitzError"):
        assert names[name] is getattr(liplayers, name)
        assert name in dir(liplayers)
    assert liplayers.layers is import_module("liplayers.layers")
    with pytest.raises(AttributeError, match="module 'liplayers' has no attribute 'nothing'"):
        _ = liplayers.nothing


@pytest.mark.parametrize(
    "package", ["bounds", "certification", "data", "export", "layers", "linalg", "losses", "models"]
)
def test_a_package_can_be_imported_alone(package):
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "liplayers"}
    for name in ours:
        del sys.modules[name]
    try:
        import_module(f"liplayers.{package}")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "liplayers"]:
            del sys.modules[name]
        sys.modules.update(ours)
