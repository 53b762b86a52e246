"""Make the numbers printed in README.md and docs again: `python -m benchmarks.refresh`, after a new fit.

The README's replay is run as it stands there (its trace has to be in ../shared/traces), and so are its comparison of
the phases, the intervals of docs/uncertainty.md and the what-ifs of docs/policies; the tables of accuracy are those of
`benchmarks.accuracy`, `repeats`, `touch_up` and `coverage`, the data that the dashboard's page on calibration shows
that of `benchmarks.evidence`. Excerpts and figures in sentences are left alone, and so is the table of speed, which
depends on the machine.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile

import click

from benchmarks import capacity, coverage, evidence, pages, repeats, touch_up
from benchmarks.accuracy import FOLDERS, METRICS, ROOT, Load, cells, judged, recordings, table, update

WHOLE_LINES = 5  # of output; fewer are an excerpt
POLICIES = ROOT / "docs" / "policies"
README, ACCURACY, UNCERTAINTY = ROOT / "README.md", ROOT / "docs" / "accuracy.md", ROOT / "docs" / "uncertainty.md"
PLOT = "speculation.png"
PLANNING = ROOT / "docs" / "planning.md"
SECOND = FOLDERS[0] / "vllm-0.25.1_h100-sxm_llama-3.1-8b_bf16_second-machine"


def replay_block(page: str) -> str:
    """The page with the output of the replay that it shows first."""
    command, shown = _shown(page, "replay")
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        results = re.search(r"^Results: .*$", shown, flags=re.MULTILINE)
        assert results is not None, "the output ends with the run folder"
        return page.replace(shown, _printed(command, "--out", run).replace(f"Results: {run}", results[0]))


def intervals_block(page: str) -> str:
    """The page with the replay with intervals that it shows, but for the lines that say where and how fast."""
    command, shown = _shown(page, "replay")
    printed = [line for line in _printed(command).splitlines() if not line.startswith("Simulated ")]
    return page.replace(shown, "\n".join(printed))


def phases_block(page: str) -> str:
    """The page with the comparison of the phases that it shows."""
    command, shown = _shown(page, "phases")
    return page.replace(shown, _printed(command))


def whatif_blocks(page: str) -> str:
    """The page with what `llmsim whatif` and `llmsim speculation` print, where it shows the whole of it."""

    def again(block: re.Match[str]) -> str:
        printed = _printed(block[1]) if len(block[2].splitlines()) >= WHOLE_LINES else block[2]
        return block[0].replace(block[2], printed)

    shown = r"^(llmsim (?:whatif|speculation) [^\n]*)\n```\n```text\n(.*?)\n```$"
    return re.sub(shown, again, page, flags=re.DOTALL | re.MULTILINE)


def plan_blocks(page: str) -> str:
    """The page with what each `llmsim plan` on it prints."""

    def again(block: re.Match[str]) -> str:
        return block[0].replace(block[2], _printed(block[1]))

    shown = r"^(llmsim plan [^\n]*)\n```\n```text\n(.*?)\n```$"
    return re.sub(shown, again, page, flags=re.DOTALL | re.MULTILINE)


def _shown(page: str, name: str) -> tuple[str, str]:
    """The first command of that name whose output the page shows, and the output."""
    shown = re.search(rf"^(llmsim {name} [^\n]*)\n```\n```text\n(.*?)\n```$", page, flags=re.DOTALL | re.MULTILINE)
    assert shown is not None, f"README.md shows llmsim {name} and its output"
    return shown[1], shown[2]


def _printed(command: str, *more: str) -> str:
    arguments = [sys.executable, "-m", "llmsim", *shlex.split(command)[1:], *more]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout.strip()


def host_scale_rows(page: str) -> str:
    """The page with the second machine's errors at the profile's host speed and at its own."""

    def row(label: str, load: Load) -> str:
        return f"| {label} | {' | '.join(cells(load, metric) for metric in list(METRICS)[:4])} |"

    def again(found: re.Match[str]) -> str:
        scale = found[2]
        plain, scaled = (next(judged(SECOND, "auto", factor)) for factor in (1.0, float(scale)))
        return f"{row('as shipped', plain)}\n{row(f'`--host-scale {scale}`', scaled)}"

    return re.sub(r"^\| as shipped \|(.*)\n\| `--host-scale ([\d.]+)` \|.*$", again, page, flags=re.MULTILINE)


@click.command()
def main() -> None:
    """Make the numbers printed in README.md and docs again, after a new fit or recording."""
    evidence.main([], standalone_mode=False)
    loads = [load for folder in recordings() for load in judged(folder, "auto", 1.0)]
    update(ACCURACY, table(loads))
    update(ACCURACY, repeats.report(loads, repeats.repeated(recordings())), (repeats.START, repeats.END))
    update(ACCURACY, touch_up.table(touch_up.judge_all()), (touch_up.START, touch_up.END))
    update(ACCURACY, coverage.table(coverage.judge_all()), (coverage.START, coverage.END))
    update(ACCURACY, coverage.spread_table(), coverage.SPREAD)
    update(ACCURACY, capacity.report(recordings()), capacity.MARKS)
    UNCERTAINTY.write_text(intervals_block(UNCERTAINTY.read_text(encoding="utf-8")), encoding="utf-8")
    update(README, table([load for load in loads if (FOLDERS[0] / load.folder).is_dir()]))
    README.write_text(plan_blocks(phases_block(replay_block(README.read_text(encoding="utf-8")))), encoding="utf-8")
    PLANNING.write_text(plan_blocks(PLANNING.read_text(encoding="utf-8")), encoding="utf-8")
    for page in sorted(POLICIES.glob("*.md")):
        page.write_text(whatif_blocks(page.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / PLOT).replace(POLICIES / PLOT)  # where a command of that page draws it
    ACCURACY.write_text(host_scale_rows(ACCURACY.read_text(encoding="utf-8")), encoding="utf-8")
    pages.main()


if __name__ == "__main__":
    main()
