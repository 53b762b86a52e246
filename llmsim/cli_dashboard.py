"""`llmsim dashboard`: start the Streamlit app, wherever this is called from.

The app's own `.streamlit/config.toml` lies beside it and holds its looks; what must not be lost to a setting of the
user's (no other host is called, nobody else is served) is passed as flags, which win over every file and variable.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import click

from llmsim.cli_options import CONTEXT, INT

RUNS_VARIABLE = "LLMSIM_DASHBOARD_RUNS"
NEEDS = ("streamlit", "altair")
FLAGS = {
    "server.address": "127.0.0.1",
    "server.showEmailPrompt": "false",
    "server.fileWatcherType": "none",
    "browser.gatherUsageStats": "false",
    "browser.serverAddress": "127.0.0.1",
    "client.toolbarMode": "minimal",
    "client.showErrorLinks": "false",
}


@click.command(context_settings=CONTEXT)
@click.argument("runs", metavar="[RUN]…", nargs=-1, type=click.Path(path_type=Path))
@click.option("--port", type=INT, default=8501, show_default=True, help="Of 127.0.0.1; no other machine is served.")
@click.option("--browser/--no-browser", default=None, help="Open the page. [on a terminal]")
def dashboard(runs: tuple[Path, ...], port: int, browser: bool | None) -> None:
    """Explore what-ifs in a browser; with run folders, open on them. Ends with Ctrl-C.

    \b
    llmsim dashboard
    llmsim dashboard runs/2026-01-01T12-00-00_1a2b3c
    """
    command = command_of(port, sys.stdout.isatty() if browser is None else browser)
    _check_free(port)
    environment = os.environ | {RUNS_VARIABLE: json.dumps([str(run) for run in checked(runs)])}
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)  # this process becomes the server: one to watch and to stop


def command_of(port: int, browser: bool = False) -> list[str]:
    """The command that serves the app. Raises ValueError if a package or a usable port is missing."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ValueError(
            f'the dashboard needs {" and ".join(missing)}: pip install "llmsim[dashboard]", or in a checkout '
            'pip install -e ".[dashboard]"'
        )
    if not 0 < port < 65536:
        raise ValueError(f"--port {port}: ports go from 1 to 65535: give another one")
    flags = FLAGS | {"server.port": str(port), "server.headless": str(not browser).lower()}
    return [
        *(sys.executable, "-m", "streamlit", "run", str(app())),
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


def _check_free(port: int) -> None:
    """Said here, since the server would only log that it did not start."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: one that has just ended is no one
        try:
            probe.bind((FLAGS["server.address"], port))
        except OSError as error:
            why = error.strerror or str(error)
            raise ValueError(f"--port {port}: {why} on {FLAGS['server.address']}: give another one") from None


def app() -> Path:
    """In an installed package among the modules, in a checkout beside the package."""
    package = Path(str(files("llmsim")))
    for path in (package / "dashboard" / "app.py", package.parent / "app.py"):
        if path.is_file() and (path.parent / "app_pages").is_dir():
            return path
    raise FileNotFoundError(f"the dashboard's app.py is neither in {package}/dashboard nor in {package.parent}")


def checked(runs: tuple[Path, ...]) -> list[Path]:
    """Their full paths, since the server may look from elsewhere."""
    for run in runs:
        if not (run / "manifest.json").is_file():
            raise FileNotFoundError(f"{run}: not a run folder (no manifest.json); give the folder that --out wrote")
    return [run.resolve() for run in runs]
