"""The entry points: hydra around a task, and every error that a user can cause as one line."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from liplayers.commands.help import config_folder, help_text
from liplayers.commands.output import forgiving
from liplayers.commands.quoting import hydra_override
from liplayers.errors import ConfigError, LipschitzError, MissingPackageError, UnknownNameError
from liplayers.extras import extra
from liplayers.text import one_line, printable

__all__ = ["front_options", "run"]  # the commands are those of the package


def train_command() -> None:
    """`python train.py` and `liplayers-train`."""
    run("train", _train)


def certify_command() -> None:
    """`python certify.py` and `liplayers-certify`."""
    run("certify", _certify)


def audit_command() -> None:
    """`liplayers-audit`: certify, then attack what was certified."""

    def audit(cfg: DictConfig) -> Any:
        cfg.audit = True
        return _certify(cfg)

    run("certify", audit, fixed=["audit=true"])


def front_command() -> int:
    """`liplayers-front`."""
    with forgiving():
        front_options()  # answers --help, and says what is wrong, before pandas and torch are imported
        try:
            with extra("train"):
                from liplayers.cli.front import main
        except MissingPackageError as error:
            _fail(error)
        return main()


def front_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of `liplayers-front`."""
    parser = argparse.ArgumentParser(
        prog="liplayers-front", description="Clean against certified accuracy of the runs of a sweep."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the output folder of a sweep, or of several")
    parser.add_argument("--eps", help="radius such as 108/255; default: the select_eps of the runs")
    parser.error = lambda message: _fail(ConfigError(f"{message}; --help lists what there is"))  # type: ignore
    return parser.parse_args(arguments)


def _train(cfg: DictConfig) -> Any:
    from liplayers.cli import train

    return train(cfg)


def _certify(cfg: DictConfig) -> Any:
    from liplayers.cli import certify

    return certify(cfg)


def run(config_name: str, task: Callable[[DictConfig], Any], fixed: Sequence[str] = ()) -> None:
    """Run a task under hydra; an error that we or the user's config caused is one line and exit status 2.

    A package that is missing makes it 1.

    Args:
        fixed: overrides that the task makes itself, for `--help`.
    """
    with forgiving() as output:
        worked = _run(config_name, task, fixed)
    if output.lost and not worked:
        sys.exit(1)  # what was asked for, such as --help, was to be printed


def _run(config_name: str, task: Callable[[DictConfig], Any], fixed: Sequence[str]) -> bool:
    """Whether the task was run, rather than something printed by hydra."""
    asked = os.environ.get("HYDRA_FULL_ERROR")
    worked = False

    def guarded(cfg: DictConfig) -> Any:
        nonlocal worked
        worked = True
        # inside hydra: it would print a heading of its own for exceptions, but lets SystemExit through
        try:
            return task(cfg)
        except (LipschitzError, OmegaConfBaseException) as error:
            if asked == "1":
                raise
            if isinstance(error, MissingMandatoryValue):
                error = ConfigError(f"{error.full_key} is required: pass {error.full_key}=…")
            _fail(error)

    guarded.__name__ = config_name
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes hydra raise, so that the message is ours
    try:
        if not _answered(config_name, fixed):
            config_name, added = _chosen(config_name, sys.argv[1:])
            sys.argv += added
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(guarded)()
    except KeyboardInterrupt:
        sys.exit(130)  # as training does, without a traceback
    except LipschitzError as error:
        if asked == "1":
            raise
        _fail(error)
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        if asked == "1" or (worked and isinstance(error, ValueError)):
            raise
        _fail(_config_error(error, config_name))
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if asked is not None:
            os.environ["HYDRA_FULL_ERROR"] = asked
    return worked


def _answered(config_name: str, fixed: Sequence[str]) -> bool:
    """Whether `--help` was asked for, and has been printed; flags that hydra does not know are an error."""
    parser = get_args_parser()
    parser.error = _bad_flags  # type: ignore[method-assign]
    flags = parser.parse_args()
    if not flags.help or flags.config_name or flags.config_path or flags.config_dir:
        return False  # of another config hydra knows more
    print(help_text(config_name, [*fixed, *flags.overrides]), end="")
    return True


def _chosen(config_name: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the config that the arguments change, and arguments to add to them."""
    from liplayers.cli.composing import certify_config, training_config

    return {"train": training_config, "certify": certify_config}[config_name](arguments)


def _bad_flags(message: str) -> NoReturn:
    _fail(ConfigError(f"{message}; flags come before settings, --help lists them"))


def _fail(error: BaseException) -> NoReturn:
    with suppress(OSError):  # nobody may be reading
        several = len(getattr(error, "obstacles", ())) > 1
        text = "\n".join(map(printable, str(error).splitlines())) if several else one_line(error)
        sys.stderr.write(f"error: {text}\n")
    sys.exit(1 if isinstance(error, MissingPackageError) else 2)


def _config_error(error: Exception, config_name: str) -> Exception:
    """What hydra says about a bad command line, in one line with the nearest known names."""
    if isinstance(error, MissingConfigException):  # an OSError, too
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return UnknownNameError.of(f"{group} config", name, error.options or [])
    if isinstance(error, OSError):
        return ConfigError(f"{error.filename or 'a file'}: {error.strerror or error}")
    if isinstance(error, YAMLError):
        return ConfigError(f"not valid YAML: {one_line(error)}")
    if isinstance(error, OverrideParseException):
        key, equals, value = (error.override or "").partition("=")
        example = hydra_override(key, value) if equals and re.fullmatch(r"[\w.]+", key) else "name='value'"
        return ConfigError(
            f"cannot read {error.override!r}: write name=value, and quote a value with special characters for the "
            f"shell and for hydra: {example}"
        )
    bad_key = re.search(r"Could not override '([^']+)'", str(error))
    if bad_key:
        known = _known_keys(config_name)
        if bad_key[1] in known:
            return ConfigError(f"{bad_key[1]}: has no options to choose from here; set single values below it")
        return UnknownNameError.of("setting", bad_key[1], known)
    return ConfigError(one_line(error))


def _known_keys(config_name: str) -> list[str]:
    """The dotted keys of the default config."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else ():
            yield prefix + key
            yield from walk(value, f"{prefix}{key}.")

    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return list(walk(OmegaConf.to_container(hydra.compose(config_name)), ""))
