"""The entry points: hydra around a task, and every error that a user can cause as one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from liplayers.cli.certify import certify
from liplayers.cli.composing import certify_config, training_config
from liplayers.cli.configuration import config_folder, one_line
from liplayers.cli.train import train
from liplayers.errors import ConfigError, LipschitzError, UnknownNameError


def train_command() -> None:
    """`python train.py` and `liplayers-train`."""
    run("train", train, training_config)


def certify_command() -> None:
    """`python certify.py` and `liplayers-certify`."""
    run("certify", certify, certify_config)


def audit_command() -> None:
    """`liplayers-audit`: certify, then attack what was certified."""
    sys.argv.insert(1, "audit=true")
    certify_command()


def run(
    config_name: str,
    task: Callable[[DictConfig], Any],
    choose: Callable[[Sequence[str]], tuple[str, list[str]]],
) -> None:
    """Run a task under hydra; an error that we or the user's config caused is one line and exit status 2.

    Args:
        choose: the arguments → the name of the config that they change, and arguments to add.
    """
    asked = os.environ.get("HYDRA_FULL_ERROR")

    def guarded(cfg: DictConfig) -> Any:
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
        config_name, added = choose(sys.argv[1:])
        sys.argv += added
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(guarded)()
    except KeyboardInterrupt:
        sys.exit(130)  # as training does, without a traceback
    except LipschitzError as error:
        if asked == "1":
            raise
        _fail(error)
    except (HydraException, OmegaConfBaseException, YAMLError, OSError) as error:
        if asked == "1":
            raise
        _fail(_config_error(error, config_name))
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if asked is not None:
            os.environ["HYDRA_FULL_ERROR"] = asked


def _fail(error: BaseException) -> None:
    sys.stderr.write(f"error: {one_line(error)}\n")
    sys.exit(2)


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
        return ConfigError(
            f"cannot read {error.override!r}: write name=value without spaces, and quote a value with special "
            f"characters twice: \"name='value'\""
        )
    bad_key = re.search(r"Could not override '([^']+)'", str(error))
    if bad_key:
        return UnknownNameError.of("setting", bad_key[1], _known_keys(config_name))
    return ConfigError(one_line(error))


def _known_keys(config_name: str) -> list[str]:
    """The dotted keys of the default config."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else ():
            yield prefix + key
            yield from walk(value, f"{prefix}{key}.")

    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return list(walk(OmegaConf.to_container(hydra.compose(config_name)), ""))
