"""The command `llmsim`: which commands there are, and what becomes of an error.

Exit status: 0 done; 1 `validate` or `rerun` found a difference, or every run of a `sweep` failed; 2 the input is wrong
or a file cannot be read or written (one line on stderr, no traceback); 3 `plan` found nothing that meets the SLOs; 130
interrupted; 141 the reader of the output went away. An exception that is none of these, such as one raised inside a
user's policy, keeps its traceback and ends with 70.

Only click is imported here: a command's own module is loaded when that command runs, so `llmsim --help` stays fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from shlex import join
from typing import IO, Any

import click

from llmsim import __version__

OK, DIFFERS, WRONG_INPUT, INTERNAL, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 70, 130, 141

# name: (module:attribute, the line in `llmsim --help`)
COMMANDS = {
    "replay": ("llmsim.cli_replay:replay", "Replay a trace on a model, a GPU and an engine configuration."),
    "demo": ("llmsim.cli_replay:demo", "Replay the bundled chat trace on an H100: a first look in seconds."),
    "compare": ("llmsim.cli_compare:compare", "Compare schedulers and settings on one trace, paired by request."),
    "report": ("llmsim.cli_report:report", "Write runs as one HTML page with charts, for others to read."),
    "explain": ("llmsim.cli_explain:explain", "Where the time of slow requests went, and what would help most."),
    "plan": ("llmsim.cli_plan:plan", "Fleets for a trace and promises about latency: fewest GPUs, cheapest, fastest."),
    "sweep": ("llmsim.cli_sweep:sweep", "Do every run of a specification: grids, scenarios, rates, traces, seeds."),
    "rerun": ("llmsim.cli_rerun:rerun", "Repeat a run from its manifest and compare the bytes."),
    "phases": ("llmsim.cli_phases:phases", "Compare prefill and decode of a model on a GPU, with its roofline."),
    "whatif": ("llmsim.cli_whatif:whatif", "What each optimisation buys on a trace, and why."),
    "speculation": ("llmsim.cli_speculation:speculation", "At which batch size speculative decoding stops paying."),
    "list": ("llmsim.cli_list:list_", "What llmsim knows: GPUs, models, schedulers, routers, profiles."),
    "from-vllm": ("llmsim.cli_tools:from_vllm", "Translate a 'vllm serve' command line into a scenario."),
    "validate": ("llmsim.cli_tools:validate", "Check llmsim against recordings of a real engine."),
    "trace": ("llmsim.cli_trace:trace", "Describe, convert and synthesise traces."),
    "dashboard": ("llmsim.cli_dashboard:dashboard", "Explore what-ifs in a browser."),
}


class PipeClosedError(Exception):
    """A broken pipe under a name of our own: click would turn it into exit status 1 and swap the streams."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except BrokenPipeError as error:
            raise PipeClosedError from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise PipeClosedError from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            close = get_close_matches(args[0], COMMANDS, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Commands: {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        names = [CompletionItem(name, help=text) for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with: llmsim demo",
)
@click.version_option(__version__, prog_name="llmsim")
@click.option("--debug", is_flag=True, help="Show the traceback of an error; works with every command.")
def cli(debug: bool) -> None:
    """Replay real request traffic on LLM-serving GPUs and engines you do not have."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; never raises for bad input, never exits the process."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that cannot show a character gets its escape, not an error
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:  # started with `>&-`
        return _fail("standard output is closed: redirect it to a file or to /dev/null", WRONG_INPUT, debug)
    try:
        status = _run(args)
        sys.stdout.flush()
    except (PipeClosedError, BrokenPipeError):
        _abandon(sys.stdout)
        return PIPE_CLOSED
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted: nothing was written", INTERRUPTED, debug)
    except click.ClickException as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):  # a command group alone: its help, not a mistake
            print(error.format_message())
            return OK
        return _fail(_usage_line(error), WRONG_INPUT, debug)
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:  # it was standard output that could not be written
            _abandon(sys.stdout)
        return _fail(_os_line(error), WRONG_INPUT, debug)
    except ValueError as error:
        return _fail(str(error), WRONG_INPUT, debug)
    except MemoryError:
        return _fail(_memory_line(args), WRONG_INPUT, debug)
    except Exception as error:
        from llmsim.plugins import PolicyError

        if not isinstance(error, PolicyError):
            raise
        return _fail(str(error), WRONG_INPUT, debug)
    return status


def _run(args: list[str]) -> int:
    try:
        status = cli.main(args=args, prog_name="llmsim", standalone_mode=False, obj=args)
    except SystemExit as error:  # how click ends shell completion
        status = error.code
    return status if isinstance(status, int) else OK


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _usage_line(error: click.ClickException) -> str:
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if isinstance(error, click.NoSuchOption) and context is not None:
        known = [name for param in context.command.get_params(context) for name in (*param.opts, *param.secondary_opts)]
        close = get_close_matches(error.option_name, known, n=1)
        message = (
            f"no option {error.option_name}. Did you mean {close[0]}?" if close else f"no option {error.option_name}"
        )
    if context is None:
        return message
    stop = "" if message.endswith(("?", ".")) else "."
    return f"{message}{stop} See: {context.command_path} --help"


def _os_line(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    if isinstance(error, FileNotFoundError) and error.errno is None:
        return str(error)  # raised by llmsim itself, already a sentence
    reason = error.strerror or str(error)
    return f"{where}{reason}" if where else f"cannot write: {reason}"


def _memory_line(args: list[str]) -> str:
    """The command line, which names the files, and the way to less that its command has."""
    command: click.Command = cli
    for arg in args:
        if isinstance(command, click.Group):
            command = command.get_command(click.Context(command), arg) or command
    limited = any("--limit" in option.opts for option in command.params)
    fix = "read part of the trace with --limit N" if limited else "give it smaller files, fewer of them, or more memory"
    return f"not enough memory on this machine for llmsim {join(args)}: {fix}"


def _abandon(stream: IO[str]) -> None:
    """Point a stream that cannot take its buffered text at the null device: exiting would try to flush it again."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        return  # not a file (a test's buffer): nothing will be flushed at exit


def entry() -> None:
    """The console script."""
    try:
        status = main()
    except Exception:
        import traceback

        traceback.print_exc()
        status = INTERNAL
    sys.exit(status)
