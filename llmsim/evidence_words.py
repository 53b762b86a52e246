"""`llmsim.evidence` in words: cards, tables of text, and what charts show for who cannot see them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsim.cost.profile import Profile
from llmsim.evidence import ALL, COMMAND, RANGES, facts, spread, typical, worst

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.cost import CostModel


def cards(profile: str) -> list[dict[str, str]]:
    """`typical` in four numbers, and the worst load: label, value, help."""
    of = typical(profile)

    def percent(*names: str) -> str:
        sizes = [of[name] for name in names]
        return " / ".join("–" if size is None else f"{100 * size:.1f}" for size in sizes) + " %"

    held = "Median size of errors on what the profile was not fitted to, other models and precisions included"
    told = (
        ("decode steps", percent("decodes only"), "GPU seconds of engine steps."),
        ("steps with prompts", percent("with prompts"), "GPU seconds of engine steps."),
        ("mean TTFT / TPOT / E2EL", percent("TTFT", "TPOT", "E2EL"), "Loads of a real engine, replayed."),
        ("output tokens/s", percent("tokens/s"), "Loads of a real engine, replayed."),
    )
    found = [
        {"label": f"{label}, median", "value": value, "help": f"{held}. {of_what}"} for label, value, of_what in told
    ]
    furthest = worst(profile)
    if furthest is not None:
        error, what = furthest
        found.append({"label": "worst mean latency", "value": f"{100 * error:+.1f} %", "help": f"The {what}."})
    return found


def facts_table(profile: Profile) -> pd.DataFrame:
    """`facts` and the measured range as text, a row each."""
    import pandas as pd

    rows = {name: _text(value) for name, value in facts(profile).items()}
    rows |= {f"most {RANGES[name]}": f"{getattr(profile.measured, name):,}" for name in RANGES}
    return pd.DataFrame({"value": list(rows.values())}, index=pd.Index(rows, name=""))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} in {name}" for name, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def spread_table(profile: Profile) -> pd.DataFrame:
    """`spread` as text, in per cent."""
    table = spread(profile).set_index("between")
    shares = ["decode steps", "steps with prompts", "launches"]
    return table.assign(**{name: [f"{100 * share:.1f} %" for share in table[name]] for name in shares})


def extent_table(table: pd.DataFrame) -> pd.DataFrame:
    """`extent` as text."""
    import pandas as pd

    def texts(name: str, form: str) -> list[str]:
        return ["" if pd.isna(value) else format(value, form) for value in table[name]]

    columns = {
        "largest measured": texts("measured", ",.0f"),
        "largest of the run": texts("run", ",.0f"),
        "GPU time beyond": texts("share", ".1%"),
    }
    return pd.DataFrame(columns, index=pd.Index(table["range"], name=""))


def extent_in_words(table: pd.DataFrame) -> str:
    """Which ranges a run leaves, and for how much of its GPU time."""
    *parts, together = table.to_dict("records")
    beyond = [f"{row['range']} ({100 * row['share']:.1f} %)" for row in parts if row["share"]]
    share = together["share"] or 0.0
    if not share:
        return "All GPU time of the run is inside the measured range."
    told = f", by {'; '.join(beyond)}" if beyond else ": it is not scheduled asynchronously, as all recordings are"
    return f"{100 * share:.1f} % of the run's GPU time is outside the measured range{told}."


def errors_in_words(table: pd.DataFrame) -> str:
    """A chart of errors for who cannot see it: the best and the worst median."""
    ordered = table.sort_values("median")
    best, worst = ordered.iloc[0], ordered.iloc[-1]
    return (
        f"Median error of {len(table)} groups: from {best['median']:.1%} ({best['label']}, {best['kind']}) to "
        f"{worst['median']:.1%} ({worst['label']}, {worst['kind']})"
    )


def checkout() -> str | None:
    """In words, where the raw measurements are if this is no checkout of the repository; else None."""
    if (Path(__file__).parent.parent / "calibration" / "measurements" / "README.md").is_file():
        return None
    return (
        "The raw measurements and recordings are not installed with llmsim: they are in calibration/measurements, "
        "calibration/recordings and tests/data/recordings of its repository."
    )


def models(loads: pd.DataFrame) -> list[str]:
    """All together, then each."""
    return [ALL, *loads["model"].drop_duplicates().sort_values().tolist()]


def panels(table: pd.DataFrame) -> list[str]:
    """Operators or models, those with the most points first."""
    return [str(name) for name in table.groupby("panel")["points"].sum().sort_values(ascending=False).index]


def unit_of(metric: str) -> str:
    """Of `as_points`."""
    return " tokens/s" if metric == "tokens/s" else "s"


def points_in_words(points: pd.DataFrame, unit: str = "s", measured: str = "measured_s") -> str:
    """A parity plot for who cannot see it."""
    within = (points["error"].abs() <= 0.1).mean()
    return (
        f"Predicted against measured ({unit.strip()}): {len(points):,} points from {points[measured].min():.3g} to "
        f"{points[measured].max():.3g}, {within:.0%} of them within 10 % of the diagonal"
    )


def loads_in_words(loads: pd.DataFrame) -> str:
    """Errors of loads for who cannot see them."""
    worst = loads.iloc[int(loads["error"].abs().to_numpy().argmax())]
    return (
        f"Errors of {len(loads)} recorded loads: median size {loads['error'].abs().median():.1%}, largest "
        f"{worst['error']:+.1%} ({worst['label']}, {worst['model']})"
    )


def neighbours_in_words(cost: CostModel) -> str:
    """Which kernels of the model were not timed; empty if all were."""
    names = getattr(cost, "from_neighbours", ())
    return f"Not timed at this size but taken from the nearest that were: {', '.join(names)}." if names else ""


def commands(profile: Profile) -> list[list[str]]:
    """What makes the numbers again, in a checkout."""
    found = [["llmsim", "list", "profiles"]]
    if profile.kernels is not None:
        files = [f"calibration/measurements/{name}" for name in profile.kernels.measurements]
        found.append(["python", "-m", "calibration", "check-kernels", *files, "--gpu", profile.gpu])
    folders = dict.fromkeys(file.partition("/")[0] for file in profile.provenance.recordings)
    found += [["llmsim", "validate", _recording(name), "--cost", profile.name] for name in folders]
    return [*found, COMMAND.split()]


def _recording(name: str) -> str:
    """Where it is in a checkout."""
    root = Path(__file__).parent.parent
    paths = [f"{folder}/{name}" for folder in ("calibration/recordings", "tests/data/recordings")]
    return next((path for path in paths if (root / path).is_dir()), paths[0])
