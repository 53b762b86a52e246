"""What became of a sweep's folder on a disk or by copying is found: damaged, stray and foreign part files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from llmsim import sweep
from llmsim.sweep import read_sweep
from llmsim.sweep_outline import outline
from llmsim.sweep_yaml import read_spec

SPEC: dict[str, Any] = {
    "trace": "ten.csv",
    "scenario": {"model": "llama-3.1-8b", "gpu": "h100-sxm", "cost": "constant:0.01"},
    "grid": {"max_num_seqs": [1, 2, 4]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trace, and in `done` a sweep of three runs, a part each."""
    folder = tmp_path_factory.mktemp("sweeps")
    lines = [f"{second},64,11" for second in range(10)]
    (folder / "ten.csv").write_text("\n".join(["arrival_time_s,prompt_tokens,output_tokens", *lines]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sweep(SPEC, out="done")
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in a folder of its own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("done")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_four_bytes_overwritten_anywhere_are_noticed_and_redone(out: Path, share: float) -> None:
    part = out / "part-00001.parquet"
    whole = part.read_bytes()
    at = int(share * (len(whole) - 4))
    part.write_bytes(whole[:at] + bytes(byte ^ 0xFF for byte in whole[at : at + 4]) + whole[at + 4 :])
    with pytest.raises(ValueError, match=r"^done/part-00001\.parquet: damaged \(.*\): delete it, and") as error:
        read_sweep(out)
    assert "\n" not in str(error.value)
    assert [one.done for one in outline(read_spec(SPEC), out)] == [True, False, True]
    done: list[tuple[int, int]] = []
    found = sweep(SPEC, out=out, resume=True, progress=lambda count, total, _: done.append((count, total)))
    assert (found.done, done) == (3, [(3, 3)])
    assert part.read_bytes() == whole


def test_a_part_that_is_none_of_the_sweeps_is_refused_by_name(out: Path) -> None:
    shutil.copy(out / "part-00000.parquet", out / "part-00099.parquet")
    said = r"done/part-00099\.parquet: no part of this sweep, whose 3 runs are part-00000\.parquet to part-00002"
    for use in (lambda: read_sweep(out), lambda: sweep(SPEC, out=out, resume=True)):
        with pytest.raises(ValueError, match=said):
            use()


def test_a_part_under_another_number_is_not_counted_twice(out: Path) -> None:
    whole = (out / "part-00002.parquet").read_bytes()
    shutil.copy(out / "part-00000.parquet", out / "part-00002.parquet")
    with pytest.raises(ValueError, match=r"part-00002\.parquet: holds runs 0 to 0, not 2 to 2 as its name says"):
        read_sweep(out)
    assert sweep(SPEC, out=out, resume=True).frame()["run"].tolist() == [0, 1, 2]
    assert (out / "part-00002.parquet").read_bytes() == whole


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"max_num_seqs": [1, 2, 8]}, r"part-00002\.parquet: its run 2 is of another sweep: take the file away"),
        ({"max_num_batched_tokens": [512, 1024, 2048]}, r"part-00002\.parquet: its columns are not those of this"),
    ],
)
def test_parts_of_another_sweep_are_not_merged(out: Path, grid: dict[str, Any], said: str) -> None:
    sweep(SPEC | {"grid": grid}, out="other")
    shutil.copy("other/part-00002.parquet", out)
    with pytest.raises(ValueError, match=said):
        sweep(SPEC, out=out, resume=True)
    assert (out / "part-00002.parquet").is_file()


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"specification": "x", "runs": 0}', "{"])
def test_damaged_facts_of_a_sweep_are_not_another_specification(out: Path, text: str) -> None:
    (out / "_sweep.json").write_text(text)
    for use in (lambda: read_sweep(out), lambda: sweep(SPEC, out=out, resume=True)):
        with pytest.raises(ValueError, match=r"^done/_sweep\.json: (damaged|cannot be read).*bring it back, or do"):
            use()


def test_a_deleted_specification_is_written_again(out: Path) -> None:
    before = (out / "_sweep.yaml").read_bytes()
    (out / "_sweep.yaml").unlink()
    sweep(SPEC, out=out, resume=True)
    assert (out / "_sweep.yaml").read_bytes() == before
