"""The specification of a sweep: a YAML file (or a dict of the same shape) that says which runs there are.

    trace: traces/chat.csv            # or {path: traces/chat.csv, limit: 500, rate: 8}; "-" cannot be read twice
    scenario: {model: llama-3.1-8b, gpu: h100-sxm}   # what all runs have; or a scenario file (.toml, .json)
    goodput: {ttft: 500, tpot: 50}    # ms, as in --goodput
    scenarios:                        # alternatives, each some fields; `name` if they should be called something
      - {name: small chunks, max_num_batched_tokens: 512}
      - {engine: sglang}
    linked:                           # lists of one length, taken together
      - {gpu: [h100-sxm, h200-sxm], max_num_seqs: [256, 512]}
    grid:                             # every combination
      trace: [traces/chat.csv, traces/bursty.csv]
      rate: [4, 8, 16]
      scheduler.headroom: [0.01, 0.05]
    seeds: 3                          # 0, 1, 2; or a list

A name is a field of Scenario, an argument of a plug-in as `KIND.NAME` (scheduler, router, admission, eviction), an
option of load_trace, or `trace`. The runs are the product of the axes in the order scenarios, linked, grid, seeds, the
last one changing fastest; what an axis sets replaces what `scenario` and `trace` say. Nothing may be set by two axes.

Paths are relative to the folder that the sweep is run in, as on the command line. Every mistake is one ValueError that
names file, line, value and fix; a value that only a simulation can refuse becomes the error of its run instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from math import isfinite, isnan
from pathlib import Path
from typing import Any

from llmsim.metrics import TARGETS
from llmsim.runs_origin import PLUGINS
from llmsim.scenario import Scenario
from llmsim.scenario_file import human_int, read_scenario
from llmsim.sweep_nodes import Nodes
from llmsim.sweep_spec import KINDS, TRACE_OPTIONS, Axis, Point, Spec

AXES = ("scenarios", "linked", "grid", "seeds")
SECTIONS = ("trace", "scenario", "goodput", *AXES)
WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "dict[str, Any]": "a table",
}
MOST_RUNS = 10_000_000


def read_spec(given: str | Path | Mapping[str, Any]) -> Spec:
    """The specification in a YAML file, or in a dict of the same shape."""
    import yaml

    if isinstance(given, Mapping):
        try:
            text = yaml.safe_dump(dict(given), sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as error:
            raise ValueError(f"spec: {error}: give plain numbers, text, lists and dicts") from None
        return _Reader("spec", text, lines=False).spec()
    path = Path(given)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file: give the YAML file that says which runs there are") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
    return _Reader(str(path), text, lines=True).spec()


class _Reader(Nodes):
    """Walks the sections of a specification."""

    # --------------------------------------------------------------------------------------------------- sections

    def spec(self) -> Spec:
        import yaml

        try:
            root = yaml.compose(self.text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f", line {mark.line + 1}" if mark is not None and self.lines else ""
            raise ValueError(f"{self.source}{where}: not valid YAML: {error.problem or error.context}") from None
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{self.source}: not valid YAML: {str(error).splitlines()[0]}") from None
        if root is None:
            raise ValueError(f"{self.source}: is empty: give trace, scenario and at least one of {', '.join(AXES)}")
        sections = self.table(root, "a specification")
        for name, node in sections.items():
            if name not in SECTIONS:
                raise self.fail(node, f"unknown key {name!r}.{_near(name, SECTIONS)}", name=True)
        settings = self._scenario(sections["scenario"]) if "scenario" in sections else {}
        if "trace" in sections:
            settings |= self._trace(sections["trace"])
        spec = Spec(self.source, settings, self._axes(sections), self._goodput(sections.get("goodput")), self.text)
        self._check_whole(spec)
        return spec

    def _scenario(self, node: Any) -> dict[str, Any]:
        import yaml

        if isinstance(node, yaml.ScalarNode):
            path, given = str(node.value), {}
            if not isinstance(self.value(node), str):
                raise self.fail(node, f"scenario: {path} is neither a table of fields nor a file of them")
            try:
                given = read_scenario(path)
            except (ValueError, OSError) as error:
                reason = f"{path}: no such file" if isinstance(error, FileNotFoundError) else str(error)
                raise self.fail(node, f"scenario: {reason}: give fields, or a .toml or .json file of them") from None
            for name in given:
                if name not in Scenario.__dataclass_fields__:
                    raise self.fail(node, f"scenario {path}: unknown field {name!r}.{_near(name, KINDS)}")
            return _dotted(given)
        return self._settings(node, "scenario")

    def _settings(self, node: Any, what: str) -> dict[str, Any]:
        given = self.table(node, what)
        return _dotted({name: self.setting(name, one, what) for name, one in given.items() if name != "name"})

    def setting(self, name: str, node: Any, what: str) -> Any:
        """The checked value of one name."""
        self.check_name(name, node, what)
        if name == "trace":
            raise self.fail(node, f"{what}: trace has a place of its own: write trace: PATH, or a list of them in grid")
        value = self.value(node)
        if isinstance(value, float) and not isfinite(value) and not (name == "rate" and value > 0.0):
            raise self.fail(
                node, f"{what}: {name}: {value} is not {'a number' if isnan(value) else 'finite'}: give one"
            )
        if "." in name:
            return value
        return self._typed(name, value, node, what)

    def check_name(self, name: str, node: Any, what: str) -> None:
        kind, dot, argument = name.partition(".")
        if dot and kind in PLUGINS and argument:
            return
        if name not in KINDS and name != "trace":
            known = [*KINDS, "trace"]
            hint = _near(name, known) if not dot else f" Arguments are written KIND.NAME, with {', '.join(PLUGINS)}"
            raise self.fail(node, f"{what}: unknown field {name!r}.{hint}", name=True)

    def _typed(self, name: str, value: Any, node: Any, what: str) -> Any:
        """As the field has it: 32k is a number where one is wanted, and so is 1e-3, which YAML takes for text."""
        kind = KINDS[name]
        if value is None:
            return None
        try:
            if kind == "int" and isinstance(value, str):
                return human_int(value)
            if kind == "float" and isinstance(value, str):
                return float(value)
        except ValueError:
            raise self.fail(node, f"{what}: {name}: {value!r} is not {WORDS[kind]}") from None
        if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        fits = {"str": str, "int": int, "float": float, "bool": bool, "dict[str, Any]": dict}[kind]
        if not isinstance(value, fits) or (isinstance(value, bool) and kind != "bool"):
            raise self.fail(node, f"{what}: {name}: {value!r} is not {WORDS[kind]}")
        return value

    def _trace(self, node: Any) -> dict[str, Any]:
        """The settings of a trace: its path, and options of load_trace."""
        import yaml

        if isinstance(node, yaml.ScalarNode):
            return {"trace": self._path(node)}
        given = self.table(node, "trace")
        if "path" not in given:
            raise self.fail(node, "trace: no path: write trace: PATH, or {path: PATH, limit: 500}")
        settings = {"trace": self._path(given.pop("path"))}
        for name, one in given.items():
            if name not in TRACE_OPTIONS:
                hint = _near(name, ["path", *TRACE_OPTIONS])
                raise self.fail(one, f"trace: unknown option {name!r}.{hint}", name=True)
            settings[name] = self.setting(name, one, "trace")
        return settings

    def _path(self, node: Any) -> str:
        path = self.value(node)
        if not isinstance(path, str) or not path.strip():
            raise self.fail(node, f"trace: {path!r} is not a path")
        if path == "-":
            raise self.fail(node, "trace: standard input cannot be read once for each run: save it to a file")
        return path

    def _goodput(self, node: Any) -> dict[str, float] | None:
        if node is None:
            return None
        targets: dict[str, float] = {}
        for name, one in self.table(node, "goodput").items():
            value = self.value(one)
            if name not in TARGETS:
                hint = _near(name, TARGETS)
                raise self.fail(one, f"goodput: {name!r} is not one of {', '.join(TARGETS)}.{hint}", name=True)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise self.fail(one, f"goodput: {name}: {value!r} is not milliseconds: write {name}: 500")
            targets[name] = float(value)
        return targets

    # ------------------------------------------------------------------------------------------------------- axes

    def _axes(self, sections: dict[str, Any]) -> tuple[Axis, ...]:
        axes: list[Axis] = []
        if "scenarios" in sections:
            axes.append(self._scenarios(sections["scenarios"]))
        if "linked" in sections:
            axes += [self._linked(one) for one in self.items(sections["linked"], "linked")]
        if "grid" in sections:
            for name, node in self.table(sections["grid"], "grid").items():
                axes.append(self._grid(name, node))
        if "seeds" in sections:
            axes.append(self._seeds(sections["seeds"]))
        return tuple(axes)

    def _points(self, name: str, node: Any, what: str) -> list[Point]:
        """The values of one name, each once."""
        self.check_name(name, node, what)
        points: list[Point] = []
        for one in self.items(node, f"{what}: {name}"):
            if name == "trace":
                settings = self._trace(one)
                options = " ".join(f"{key}={value}" for key, value in settings.items() if key != "trace")
                points.append(Point((f"{settings['trace']} {options}".strip(),), settings))
            else:
                value = self.setting(name, one, what)
                points.append(Point((value,), _dotted({name: value})))
        return points

    def _once(self, points: list[Point], node: Any, what: str) -> tuple[Point, ...]:
        seen: list[str] = []
        for point in points:
            key = json.dumps([point.labels, point.settings], sort_keys=True, default=str)
            if key in seen:
                raise self.fail(node, f"{what}: {', '.join(map(str, point.labels))} is given twice: leave one out")
            seen.append(key)
        return tuple(points)

    def _grid(self, name: str, node: Any) -> Axis:
        if name == "seed":
            raise self.fail(node, "grid: seeds have a place of their own: write seeds: [0, 1, 2]")
        return Axis((_column(name),), self._once(self._points(name, node, "grid"), node, f"grid: {name}"))

    def _linked(self, node: Any) -> Axis:
        columns = {name: self._points(name, one, "linked") for name, one in self.table(node, "linked").items()}
        if len(columns) < 2:
            raise self.fail(node, "linked: fewer than two names: one alone belongs into grid")
        lengths = {name: len(points) for name, points in columns.items()}
        if len(set(lengths.values())) > 1:
            counted = ", ".join(f"{name} has {count}" for name, count in lengths.items())
            raise self.fail(node, f"linked: lists of one length are taken together, and {counted} values")
        points = []
        for together in zip(*columns.values(), strict=True):
            settings: dict[str, Any] = {}
            for point in together:
                settings |= point.settings
            points.append(Point(tuple(label for point in together for label in point.labels), settings))
        return Axis(tuple(map(_column, columns)), self._once(points, node, "linked"))

    def _scenarios(self, node: Any) -> Axis:
        points: list[Point] = []
        for one in self.items(node, "scenarios"):
            given = self.table(one, "scenarios")
            settings = self._settings(one, "scenarios")
            plain = {name: self.value(child) for name, child in given.items() if name != "name"}
            name = ", ".join(f"{key}={value}" for key, value in plain.items()) or "as given"
            if "name" in given:
                name = self.value(given["name"])
            if not isinstance(name, str) or not name.strip():
                raise self.fail(given["name"], f"scenarios: name: {name!r} is not text")
            if name in [point.labels[0] for point in points]:
                raise self.fail(one, f"scenarios: {name} is given twice: give them names of their own")
            points.append(Point((name,), settings))
        return Axis(("scenario",), tuple(points))

    def _seeds(self, node: Any) -> Axis:
        value = self.value(node)
        if isinstance(value, int) and not isinstance(value, bool):
            if not 1 <= value <= MOST_RUNS:
                raise self.fail(node, f"seeds: {value}: give how many, 1 to {MOST_RUNS}, or a list of them")
            value = list(range(value))
        if not isinstance(value, list) or not value:
            raise self.fail(node, f"seeds: {value!r}: give how many, or a list such as [0, 1, 2]")
        for one in value:
            if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < 2**63:
                raise self.fail(node, f"seeds: {one!r} is not a whole number of 0 or more")
        if len(set(value)) < len(value):
            raise self.fail(node, f"seeds: {next(s for s in value if value.count(s) > 1)} is given twice: keep one")
        return Axis(("seed",), tuple(Point((seed,), {"seed": seed}) for seed in value))

    def _check_whole(self, spec: Spec) -> None:
        setters: dict[str, str] = {}
        for axis in spec.axes:
            place = axis.columns[0] if len(axis.columns) == 1 else " with ".join(axis.columns)
            for name in sorted({name for point in axis.points for name in point.settings}):
                if name in setters:
                    raise self.fail(None, f"{name} is set by {setters[name]} and by {place}: leave one of them out")
                setters[name] = place
        for name in ("trace", "model", "gpu"):
            if name in spec.settings:
                continue
            without = [axis for axis in spec.axes if all(name in point.settings for point in axis.points)]
            if not without:
                where = "trace: PATH" if name == "trace" else f"scenario: {{{name}: NAME}}"
                raise self.fail(None, f"no {name} for every run: add {where}")
        if spec.runs > MOST_RUNS:
            raise self.fail(None, f"{spec.runs} runs are more than {MOST_RUNS}: leave values out")


def _dotted(settings: dict[str, Any]) -> dict[str, Any]:
    """scheduler_args: {a: 1} as scheduler.a: 1, so that an argument is one setting like any other."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        kind = name.removesuffix("_args")
        if kind != name and kind in PLUGINS and isinstance(value, dict):
            flat |= {f"{kind}.{argument}": one for argument, one in value.items()}
        else:
            flat[name] = value
    return flat


def _column(name: str) -> str:
    """`failed` is a metric too: requests without an answer."""
    return "trace_failed" if name == "failed" else name


def _near(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}"
