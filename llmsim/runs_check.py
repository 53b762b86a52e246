"""What a run folder holds is what its run wrote: the manifest's form, and every other file by the manifest's SHA-256.

A file that is damaged, or that was copied in from another run, would be reported under the wrong settings. The digest
of a file costs about half a millisecond a megabyte, less than reading the tables in it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

KINDS: dict[str, tuple[type, ...]] = {
    "versions": (dict,), "scenario": (dict,), "seed": (int,), "kv_blocks": (int,), "date": (str,), "files": (dict,),
}  # fmt: skip
ADDED: dict[str, tuple[type, ...]] = {  # by llmsim.runs_origin
    "trace": (dict,), "goodput": (dict, type(None)), "written": (dict,), "inputs": (dict,),
}  # fmt: skip
TRACE: dict[str, tuple[type, ...]] = {
    "name": (str,), "sha256": (str,), "requests": (int,), "path": (str, type(None)), "folder": (str,),
    "options": (dict,),
}  # fmt: skip
SCENARIO: dict[str, tuple[type, ...]] = {
    "model": (str,), "gpu": (str,), "engine": (str,), "replicas": (int,), "tensor_parallel": (int,), "seed": (int,),
}  # fmt: skip
FILES = ("summary.json", "requests.parquet", "iterations.parquet")
INSTEAD = "bring the file back, or make the run again"


def read_manifest(folder: Path) -> dict[str, Any]:
    """FileNotFoundError if there is none, ValueError that names what is wrong in it."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{folder}: not a run folder (no manifest.json): give one that 'llmsim replay' wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}): {INSTEAD}") from None
    if not isinstance(manifest, dict) or not {"scenario", "files"} <= manifest.keys():
        raise ValueError(f"{path}: not the manifest of a replay: give a folder that 'llmsim replay' wrote")
    _check_kinds(path, manifest, KINDS)
    _check_kinds(path, manifest, {name: kinds for name, kinds in ADDED.items() if name in manifest})
    _check_kinds(path, manifest["scenario"], SCENARIO, "scenario: ")
    trace = manifest.get("trace", {})
    _check_kinds(path, trace, {name: kinds for name, kinds in TRACE.items() if name in trace}, "trace: ")
    for name in FILES:
        facts = manifest["files"].get(name)
        if not (isinstance(facts, dict) and isinstance(facts.get("sha256"), str)):
            raise ValueError(f"{path}: files: has no sha256 of {name}: {INSTEAD}")
    return manifest


def _check_kinds(path: Path, found: dict[str, Any], kinds: dict[str, tuple[type, ...]], where: str = "") -> None:
    for name, allowed in kinds.items():
        if name not in found:
            raise ValueError(f"{path}: {where}has no {name!r}: {INSTEAD}")
        if not isinstance(found[name], allowed):
            raise ValueError(f"{path}: {where}{name} is {found[name]!r}, which no run writes: {INSTEAD}")


def checked(folder: Path, name: str, manifest: dict[str, Any]) -> Path:
    """Where one of FILES is. ValueError if it cannot be read, or is not what the manifest says the run wrote."""
    path = Path(folder) / name
    try:
        with open(path, "rb") as file:
            now = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): {INSTEAD}") from None
    then = manifest["files"][name]["sha256"]
    if now != then:
        raise ValueError(
            f"{path}: not the file that this run wrote (SHA-256 {now[:12]}…, in manifest.json {then[:12]}…), so damaged"
            f" or of another run: {INSTEAD}"
        )
    return path
