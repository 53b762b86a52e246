"""The roofline as a chart: what is on it, and that its files are whole and need no network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from needs import require

require("altair")
require("vl_convert")

from llmsim import cli  # noqa: E402
from llmsim.charts import PHASE_COLOURS, _labels, roofline, save  # noqa: E402
from llmsim.phases import Phases, compare  # noqa: E402
from llmsim.scenario import Scenario  # noqa: E402

ARGUMENTS = ["phases", "--model", "llama-3.1-8b", "--gpu", "h200-sxm", "--cost", "roofline"]


@pytest.fixture(scope="module")
def outcome() -> Phases:
    return compare(Scenario(model="llama-3.1-8b", gpu="h200-sxm", cost="roofline"))


@pytest.fixture(scope="module")
def chart(outcome: Phases) -> Any:
    peaks = {"peak_flops_per_s": outcome.peak_flops_per_s, "peak_bytes_per_s": outcome.peak_bytes_per_s}
    return roofline(outcome.frame(), **peaks, title="a title", subtitle="a subtitle")


def rows(chart: Any) -> list[dict[str, Any]]:
    return [row for values in chart.to_dict()["datasets"].values() for row in values]


def test_points_are_where_the_numbers_are(chart: Any, outcome: Phases) -> None:
    drawn = {(row["phase"], row["size"]): (row["intensity"], row["tflops"]) for row in rows(chart) if "size" in row}
    expected = {(p.phase, p.size): (p.intensity_flops_per_byte, p.flops_per_s / 1e12) for p in outcome.points}
    assert drawn.keys() == expected.keys()
    for name, place in expected.items():
        assert drawn[name] == pytest.approx(place)


def test_the_roof_bends_at_the_ridge_point(chart: Any, outcome: Phases) -> None:
    lines = [row for row in rows(chart) if "phase" not in row and "text" not in row]
    corner = {"intensity": pytest.approx(outcome.ridge_flops_per_byte), "tflops": pytest.approx(989.4)}
    assert lines.count(corner) == 2  # end of the slope, and head of the dashed line below it
    slope = [row for row in lines if row["intensity"] < outcome.ridge_flops_per_byte * 0.99]
    assert all(row["tflops"] == pytest.approx(row["intensity"] * 4.8) for row in slope) and slope
    texts = {row["text"] for row in rows(chart) if "text" in row}
    assert texts >= {"memory: 4.8 TB/s", "compute: 989.4 TFLOP/s", "ridge point: 206 FLOP/byte"}


def test_every_point_is_named_once(chart: Any, outcome: Phases) -> None:
    for phase in PHASE_COLOURS:
        texts = {row["text"] for row in rows(chart) if row.get("phase") == phase and "text" in row}
        named = sorted(int(number.replace(",", "")) for text in texts for number in re.findall(r"[\d,]+\d|\d", text))
        assert named == [point.size for point in outcome.of_phase(phase)]


def test_labels_keep_clear_of_points_and_each_other() -> None:
    places = [("decode", 200, 100.0, 300.0), ("decode", 256, 110.0, 310.0), ("prefill", 128, 120.0, 280.0)]
    points = pd.DataFrame(places, columns=["phase", "size", "intensity", "tflops"])
    labels = _labels(points, 150, 140)
    assert labels["text"].tolist() == ["batch 200", "batch 256", "128 tokens"]
    lines = sorted(-140 * np.log10(labels["tflops"]))  # all begin within a few pixels of each other
    assert min(np.diff(lines)) >= 14
    alone = _labels(points[:1], 150, 140)
    assert alone["tflops"].item() == pytest.approx(300)


def test_axes_are_logarithmic_and_have_units(chart: Any) -> None:
    for layer in chart.to_dict()["layer"]:
        x, y = layer["encoding"]["x"], layer["encoding"]["y"]
        assert x["scale"]["type"] == y["scale"]["type"] == "log"
        assert (x["axis"]["title"], y["axis"]["title"]) == ("Arithmetic intensity (FLOP/byte)", "TFLOP/s of one GPU")


@pytest.mark.parametrize(
    ("suffix", "begins"),
    [(".html", b"<!DOCTYPE html>"), (".svg", b"<svg "), (".png", b"\x89PNG"), (".PNG", b"\x89PNG")],
)
def test_files(suffix: str, begins: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"roofline{suffix}"
    assert cli.main([*ARGUMENTS, "--plot", str(path)]) == 0
    assert "GFLOP per token" in capsys.readouterr().out
    assert path.read_bytes().lstrip().startswith(begins)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_html_needs_no_network(chart: Any, tmp_path: Path) -> None:
    save(chart, tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert len(page) > 100_000  # the libraries are in it
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//[^"' ]*""", page) == []
    assert not re.search(r"jsdelivr|unpkg|cdnjs|@import|import\s*\(\s*[\"']http", page)


def test_a_picture_is_whole_or_not_there(chart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tmp_path / "x.svg"
    before.write_text("the one before")

    def half(self: Any, file: str, **_: Any) -> None:
        Path(file).write_text("half a pict")
        raise OSError(28, "No space left on device", file)

    monkeypatch.setattr(type(chart), "save", half)
    with pytest.raises(OSError, match="No space left"):
        save(chart, before)
    assert [file.name for file in tmp_path.iterdir()] == ["x.svg"]
    assert before.read_text() == "the one before"
