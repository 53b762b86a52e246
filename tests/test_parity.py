"""Parity plots: squares with the same axes, colours that mean one thing everywhere, and files that are whole."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner
from needs import require

require("altair")
require("vl_convert")

from calibration.__main__ import main  # noqa: E402
from llmsim.charts import PALETTE, _ticks, parity, save, smaller  # noqa: E402

RECORDING = Path(__file__).parents[1] / "calibration" / "recordings" / "vllm-0.25.1_h200-sxm_qwen3-8b_bf16"
POINTS = pd.DataFrame(
    [
        ("linear", "bfloat16", 1e-5, 1.1e-5, "n=1"),
        ("linear", "fp8", 1e-3, 0.8e-3, "n=2"),
        ("rope", "bfloat16", 2e-6, 2e-6, "bytes=3"),
    ],
    columns=["panel", "kind", "measured_s", "predicted_s", "what"],
)


@pytest.fixture(scope="module")
def chart() -> Any:
    panels = {"linear": ["2 points: median 15.0%"], "rope": ["1 point"]}
    return parity(POINTS, panels, ["bfloat16", "fp8"], title="a title", subtitle=["two", "lines"], columns=2)


def test_each_panel_is_a_square_with_its_error_in_the_title(chart: Any) -> None:
    squares = chart.to_dict()["concat"]
    assert [(square["title"]["text"], square["title"]["subtitle"]) for square in squares] == [
        ("linear", ["2 points: median 15.0%"]),
        ("rope", ["1 point"]),
    ]
    for square in squares:
        assert square["width"] == square["height"]
        for layer in square["layer"]:
            x, y = layer["encoding"]["x"], layer["encoding"]["y"]
            assert x["scale"] == y["scale"] and x["scale"]["type"] == "log"
            assert (x["axis"]["title"], y["axis"]["title"]) == ("measured", "predicted")


def test_colours_are_the_same_in_all_panels(chart: Any) -> None:
    for square in chart.to_dict()["concat"]:
        assert square["layer"][-1]["encoding"]["color"]["scale"] == {
            "domain": ["bfloat16", "fp8"],
            "range": list(PALETTE[:2]),
        }


def test_the_diagonal_and_ten_per_cent_lines_and_every_point(chart: Any) -> None:
    content = chart.to_dict()
    for square in content["concat"]:
        ratios = []
        for layer in square["layer"][:-1]:
            rows = content["datasets"][layer["data"]["name"]]
            ratios += [row["predicted_s"] / row["measured_s"] for row in rows]
        assert sorted(ratios) == pytest.approx([0.9, 0.9, 1.0, 1.0, 1.1, 1.1])
    drawn = [row for rows in content["datasets"].values() for row in rows if "what" in row]
    assert {(row["what"], round(row["error"], 6)) for row in drawn} == {("n=1", 0.1), ("n=2", -0.2), ("bytes=3", 0.0)}


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (2e-6, 3e-1, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
        (2e-7, 3e-1, [1e-6, 1e-4, 1e-2]),
        (2e-6, 3e-5, [2e-6, 5e-6, 1e-5, 2e-5]),
        (3.5e-5, 7.5e-5, [4e-5, 5e-5, 6e-5, 7e-5]),
    ],
)
def test_two_to_five_ticks_or_all_between_two_decades(low: float, high: float, ticks: list[float]) -> None:
    assert _ticks(low, high) == pytest.approx(ticks)


def test_a_picture_is_recompressed_without_loss(chart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(chart, tmp_path / "small.png")
    monkeypatch.setattr("llmsim.charts.smaller", lambda png: png)
    save(chart, tmp_path / "large.png")
    small, large = ((tmp_path / name).read_bytes() for name in ("small.png", "large.png"))
    assert len(small) < 0.7 * len(large) and smaller(large) == small

    def content(png: bytes) -> tuple[list[bytes], bytes]:
        kinds, data, at = [], b"", 8
        while at < len(png):
            size = int.from_bytes(png[at : at + 4], "big")
            kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
            assert int.from_bytes(png[at + 8 + size : at + 12 + size], "big") == zlib.crc32(kind + body)
            kinds += [kind] if kind not in kinds else []
            data += body if kind == b"IDAT" else b""
            at += size + 12
        return kinds, zlib.decompress(data)

    assert content(small) == content(large)


def test_check_draws_steps_into_one_file_without_network(tmp_path: Path) -> None:
    path = tmp_path / "steps.html"
    args = ["check", "h200-sxm", str(RECORDING), "--scenarios", "poisson_1024_128_q8", "--plot", str(path)]
    shown = CliRunner().invoke(main, args, catch_exceptions=False)
    assert shown.exit_code == 0 and shown.output.endswith(f"{path}\n")
    page = path.read_text(encoding="utf-8")
    assert "held out: qwen3-8b" in page and re.search(r"with prompts: \d+, median \d\.\d%, p90 \d\.\d%", page)
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//[^"' ]*""", page) == []
