"""The result files: `<folder>/jobs/<set>.<method>.json`, all of one configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.uci.jobs import Result
from benchmarks.uci.methods import method_order
from liplayers.certification.report import json_writer, write_outputs
from liplayers.errors import DataError

FIELDS = ("set", "method", "samples", "width", "parameters", "torch", "cores", "seconds", "models")


def result_path(folder: Path, name: str, method: str) -> Path:
    return folder / "jobs" / f"{name}.{method}.json"


def write_result(folder: Path, result: Result) -> None:
    """Under a temporary name first; OutputError where the folder cannot be written."""
    path = result_path(folder, result["set"], result["method"])
    write_outputs(path.parent, {path.name: json_writer(result)})


def read_results(folder: Path) -> list[Result]:
    """All results in `folder`, by set and method.

    Raises:
        DataError: a file that is not a result, or results of more than one configuration.
    """
    results: list[Result] = []
    for path in sorted((folder / "jobs").glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            _flat(result["configuration"])
            results.append({key: result[key] for key in FIELDS} | result)
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{path}: not a result of this benchmark; delete it") from None
    for result in results:
        check_same(folder, result["configuration"], results[0]["configuration"])
    return sorted(results, key=lambda result: (result["set"], method_order(result["method"])))


def check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise DataError, naming the differences, unless both configurations are the same."""
    one, other = _flat(found), _flat(wanted)
    keys = [key for key in one | other if one.get(key) != other.get(key)]
    if keys:
        differences = "; ".join(f"{key} {one.get(key)}, not {other.get(key)}" for key in keys)
        raise DataError(
            f"{folder}/jobs holds results of another configuration ({differences}); give another --output, or delete "
            "them"
        )


def _flat(configuration: dict[str, Any]) -> dict[str, Any]:
    return {**configuration["recipe"], **{key: value for key, value in configuration.items() if key != "recipe"}}
