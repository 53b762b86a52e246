"""Flags that several commands share, each defined once, and what they mean.

A scenario flag is a field of `Scenario` with dashes, under vLLM's name where vLLM has one; no flag has a default of its
own, so that a flag given here overrides a `--scenario` file and everything else is left to `Scenario`. Spellings with
underscores work too, as in vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from itertools import zip_longest
from typing import Any

import click

from llmsim.scenario import (
    ACTIVATION_DTYPES,
    ATTENTION_KERNELS,
    CUDAGRAPHS,
    DTYPES,
    KERNEL_FUSIONS,
    KV_ALLOCATIONS,
    KV_CACHE_DTYPES,
    KV_TIER_WRITES,
    PREEMPTIONS,
    QUANTIZATIONS,
    SCHEDULING_POLICIES,
    Scenario,
)
from llmsim.scenario_file import human_int, read_scenario
from llmsim.scenario_file import value_of as value_of

DRAWS = 32  # of --intervals without a number
CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


class HumanInt(click.ParamType):  # type: ignore[type-arg]  # generic only in click's newest releases
    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return human_int(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Known(click.ParamType):  # type: ignore[type-arg]  # as above
    """Text that the shell can complete from a list; whether it is right is the scenario's business."""

    name = "text"

    def __init__(self, names: Callable[[], list[str]]) -> None:
        self.names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in self.names() if name.startswith(incomplete)]


def _gpus() -> list[str]:
    from llmsim.hardware import gpu_names

    return list(gpu_names())


def _models() -> list[str]:
    from llmsim.hardware import model_names

    return list(model_names())


def builtins_of(module: str) -> Callable[[], list[str]]:
    """The built-in plug-ins of a module with a table `BUILTIN`, for the shell to complete."""

    def names() -> list[str]:
        return list(import_module(module).BUILTIN)

    return names


def engine_names() -> list[str]:
    from llmsim.engines import ENGINES

    return list(ENGINES)


def cost_specs() -> list[str]:
    from llmsim.cost.profile import profile_names

    return ["auto", "roofline", *profile_names()]


def _choice(values: Any) -> Known:
    return Known(lambda: list(values))


def _words(values: Iterable[str], default: str) -> str:
    return f"{', '.join(values)}. [{default}]"


INT, GPU, MODEL = HumanInt(), Known(_gpus), Known(_models)


def _switch(field: str, flag: str, text: str) -> Callable[[Any], Any]:
    return click.option(f"--{flag}/--no-{flag}", field, default=None, help=text)


def plugin_flags(kind: str, module: str, text: str) -> list[Callable[[Any], Any]]:
    """`--KIND NAME` and `--KIND-arg NAME=VALUE`, for the fields KIND and KIND_args of Scenario.

    `module` holds the built-ins in its table `BUILTIN`; a class of the user's own file is written file.py:Class.
    """
    return [
        click.option(f"--{kind}", type=Known(builtins_of(module)), metavar="NAME", help=text),
        click.option(
            f"--{kind}-arg", f"{kind}_args", multiple=True, metavar="NAME=VALUE", help=f"For the {kind}. Repeatable."
        ),
    ]


ENGINE_HELP = "Scheduler, cache and defaults of an engine. [vllm]"
ENGINE_FLAG = click.option("--engine", type=Known(engine_names), metavar="NAME", help=ENGINE_HELP)
SCHEDULER_FLAGS = plugin_flags("scheduler", "llmsim.schedulers", "Policy, or your own file.py:Class. [the engine's]")

# Flags in the order of `--help`. Each is a field of Scenario, except the few that end up in one (scenario_from).
SCENARIO_FLAGS: list[Callable[[Any], Any]] = [
    click.option(
        "--scenario", "scenario_file", metavar="FILE", help="Fields from a .toml or .json file; flags override it."
    ),
    click.option("--model", type=MODEL, metavar="NAME", help="A name of 'llmsim list models', or a config.json."),
    click.option("--gpu", type=GPU, metavar="NAME", help="A name of 'llmsim list gpus'."),
    click.option(
        "--tensor-parallel-size",
        "--tensor-parallel",
        "--tp",
        "-tp",
        "tensor_parallel",
        type=INT,
        help="GPUs of one replica. [1]",
    ),
    click.option("--replicas", type=INT, help="Copies of the engine behind the router. [1]"),
    *plugin_flags("router", "llmsim.routers", "Which replica takes a request, or your file.py:Class. [round_robin]"),
    ENGINE_FLAG,
    *SCHEDULER_FLAGS,
    *plugin_flags("admission", "llmsim.admission", "Which requests are taken, or your file.py:Class. [none]"),
    click.option("--scheduling-policy", type=_choice(SCHEDULING_POLICIES), help="fcfs or priority. [fcfs]"),
    click.option("--max-num-seqs", type=INT, help="Requests running at once. [vLLM's for this GPU]"),
    click.option("--max-num-batched-tokens", type=INT, help="Tokens of one iteration. [vLLM's for this GPU]"),
    click.option(
        "--max-model-len", type=INT, help="Longest prompt plus answer; 32K: 32,768, 32k: 32,000. [the model's]"
    ),
    click.option("--block-size", type=INT, help="Tokens of a KV block. [the engine's: 16]"),
    click.option("--gpu-memory-utilization", type=float, help="Share of the GPU's memory the engine takes. [0.92]"),
    _switch("enable_prefix_caching", "enable-prefix-caching", "Reuse KV blocks of shared prefixes. [on]"),
    *plugin_flags("eviction", "llmsim.eviction", "Which cached content is lost, or your own file.py:Class. [lru]"),
    _switch("enable_chunked_prefill", "enable-chunked-prefill", "Split prompts over iterations. [on]"),
    click.option("--kv-cache-dtype", type=_choice(KV_CACHE_DTYPES), help=_words(KV_CACHE_DTYPES, "auto: as --dtype")),
    click.option("--dtype", type=_choice(DTYPES), help=_words(DTYPES, "bfloat16")),
    click.option("--quantization", "-q", type=_choice(QUANTIZATIONS), help=_words(QUANTIZATIONS, "as published")),
    click.option(
        "--kv-allocation", type=_choice(KV_ALLOCATIONS), help="Blocks on demand, or reserve max, pow2, oracle. [paged]"
    ),
    click.option(
        "--kv-tier",
        "kv_tiers",
        multiple=True,
        metavar="SPEC",
        help="name:capacity:bandwidth:latency below the GPU, e.g. cpu:64GiB:50GB/s:10us. Repeatable, fastest first.",
    ),
    click.option("--kv-tier-write", type=_choice(KV_TIER_WRITES), help=_words(KV_TIER_WRITES, KV_TIER_WRITES[0])),
    _switch("kv_tier_prefetch", "kv-tier-prefetch", "Move lower tiers' content up when a request arrives. [off]"),
    click.option("--preemption", type=_choice(PREEMPTIONS), help=_words(PREEMPTIONS, "recompute")),
    click.option("--kv-compression", metavar="SPEC", help="Drop tokens: window:W, sinks:S+W, budget:B. [none]"),
    click.option("--num-gpu-blocks-override", type=INT, help="KV blocks of a replica. [what fits the GPU]"),
    click.option("--long-prefill-token-threshold", type=INT, help="Cap of one prompt's chunk. [0: none]"),
    click.option("--watermark", type=float, help="Fraction of KV blocks kept free at admission. [0]"),
    click.option("--swap-space-gib", type=float, help="Host memory per GPU for KV that a policy swaps out. [0: none]"),
    _switch("reserve_full_isl", "scheduler-reserve-full-isl", "Admit only if the whole sequence fits. [on]"),
    _switch("async_scheduling", "async-scheduling", "Schedule the next iteration while one runs. [on]"),
    click.option("--cudagraph", type=_choice(CUDAGRAPHS), help=_words(CUDAGRAPHS, CUDAGRAPHS[0])),
    click.option("--enforce-eager", is_flag=True, help="vLLM's name for --cudagraph none."),
    click.option(
        "--cost", type=Known(cost_specs), metavar="SPEC", help="auto, roofline, constant:SECONDS or a profile. [auto]"
    ),
    _switch("launch_jitter", "launch-jitter", "Draw launch times from their measured spread. [on]"),
    click.option("--host-scale", type=float, help="2: a host half as fast as the measured one. [1]"),
    click.option("--concurrency", type=INT, help="Closed loop: this many requests under way, arrival times ignored."),
    click.option("--seed", type=INT, help="Of every random draw. [0]"),
    click.option(
        "--speculative-config",
        "speculative_config",
        metavar="JSON",
        help="Speculative decoding, with its acceptance: docs/policies/speculation.md. [off]",
    ),
    click.option(
        "--attention-kernel", type=_choice(ATTENTION_KERNELS), help="What if: flash, or math (unfused). [flash]"
    ),
    click.option(
        "--kernel-fusion", type=_choice(KERNEL_FUSIONS), help="What if: " + _words(KERNEL_FUSIONS, "compiled")
    ),
    click.option(
        "--activation-dtype", type=_choice(ACTIVATION_DTYPES), help="What if: " + _words(ACTIVATION_DTYPES, "auto")
    ),
]


PLUGIN_ARGUMENTS = [name for name in Scenario.__dataclass_fields__ if name.endswith("_args")]

# Parameters of load_trace, under its own names; `context_tokens` and `seed` come from the scenario.
TRACE_FLAGS: list[Callable[[Any], Any]] = [
    click.option("--format", "format", metavar="NAME", help="Trace format. [recognised by content]"),
    click.option(
        "--columns", metavar="FIELD=COLUMN,…", help="Which column is what, e.g. arrival=ts,prompt=in,output=out."
    ),
    click.option(
        "--time-unit", type=_choice(("s", "ms", "us", "ns")), help="Of the trace's times: s, ms, us, ns. [recognised]"
    ),
    click.option("--rate", type=float, help="Rescale arrivals to this mean rate (requests/s), keeping their shape."),
    click.option("--time-scale", type=float, help="Multiply arrival times: 2 is half the rate."),
    click.option("--start", "start_s", type=float, help="Leave out what arrives before this time (s)."),
    click.option(
        "--duration", "duration_s", type=float, help="Leave out what arrives later than this after --start (s)."
    ),
    click.option("--limit", type=INT, help="First N requests only."),
    click.option("--failed", type=_choice(("drop", "keep")), help="Requests without output: drop or keep. [drop]"),
    click.option(
        "--model-filter", "trace_model", metavar="NAME", help="Only requests the trace marks with this model."
    ),
    click.option("--log-type", metavar="NAME", help="BurstGPT: only requests of this log type."),
    click.option("--spread", type=_choice(("none", "uniform")), help="Simultaneous arrivals: none or uniform. [none]"),
    click.option(
        "--over-context",
        type=_choice(("error", "drop", "truncate")),
        help="Requests longer than the model's context: error, drop or truncate. [error]",
    ),
    click.option("--block-tokens", type=INT, help="Tokens of one prefix hash. [recognised]"),
    click.option("--strict-order", is_flag=True, default=None, help="Fail if arrivals are not in order of time."),
    click.option(
        "--sharegpt-mode",
        type=_choice(("multi-turn", "first-pair")),
        help="ShareGPT: multi-turn or first-pair. [multi-turn]",
    ),
    click.option(
        "--closed-loop", is_flag=True, default=None, help="Later turns wait for the answer, not for their time."
    ),
    click.option("--max-wait", "max_wait_s", type=float, help="Cap of the wait between two turns (s)."),
    click.option("--rank-correlated", is_flag=True, default=None, help="ServeGen: long prompts get long answers."),
    click.option(
        "--assign-classes",
        metavar="SPEC",
        help="Draw classes and tenants: interactive:0.7:ttft=500ms,tpot=50ms;batch:0.3:ttft=10s;tenants:4.",
    ),
    click.option("--predict", metavar="SPEC", help="Predict answer lengths: perfect, sigma=S, tau=T, rank[,tau=T]."),
]


# fmt: off
TRACE_PARAMETERS = frozenset({
    "format", "columns", "time_unit", "rate", "time_scale", "start_s", "duration_s", "limit", "failed", "trace_model",
    "log_type", "spread", "over_context", "block_tokens", "strict_order", "sharegpt_mode", "closed_loop", "max_wait_s",
    "rank_correlated", "assign_classes", "predict",
})
# fmt: on


def trace_arguments(flags: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of load_trace among `flags`: those that were given."""
    given = {name: flags[name] for name in TRACE_PARAMETERS & flags.keys() if flags[name] is not None}
    if "columns" in given:
        given["columns"] = _columns(given["columns"])
    if "trace_model" in given:
        given["model"] = given.pop("trace_model")
    return given


def _columns(text: str) -> dict[str, str]:
    columns: dict[str, str] = {}
    for pair in text.split(","):
        field, sign, column = (part.strip() for part in pair.partition("="))
        if not sign or not field or not column:
            raise ValueError(f"--columns {pair}: write FIELD=COLUMN, e.g. arrival=ts,prompt=in,output=out")
        if field in columns:
            raise ValueError(f"--columns {text}: {field} is given twice: keep one")
        columns[field] = column
    return columns


def tell(lines: Iterable[str]) -> None:
    """What a person should know beside the result: stderr, one line each."""
    for line in lines:
        click.echo(f"note: {line}", err=True)


def apply(flags: list[Callable[[Any], Any]], command: Any) -> Any:
    for flag in reversed(flags):
        command = flag(command)
    return command


def scenario_options(command: Any) -> Any:
    return apply(SCENARIO_FLAGS, command)


def trace_options(command: Any) -> Any:
    return apply(TRACE_FLAGS, command)


def json_option(command: Any) -> Any:
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout and nothing else.")(
        command
    )


def scenario_from(flags: dict[str, Any], defaults: dict[str, Any] | None = None) -> Scenario:
    """Take the scenario flags out of `flags`: a file's fields, overridden by the flags that were given."""
    source = str(flags["scenario_file"] or "flags")
    values = dict(defaults or {}) | scenario_fields(flags)
    for name in ("model", "gpu"):
        if name not in values:
            raise ValueError(f"no {name}: add --{name} NAME (llmsim list {name}s)")
    return Scenario.from_dict(values, source=source)


def scenario_fields(flags: dict[str, Any]) -> dict[str, Any]:
    """The same, as the fields that were given; not yet checked together."""
    path, eager = flags.pop("scenario_file"), flags.pop("enforce_eager")
    values: dict[str, Any] = {}
    if path is not None:
        values |= read_scenario(path)
    pairs = {name: flags.pop(name) for name in PLUGIN_ARGUMENTS}
    given = {name: flags.pop(name) for name in list(flags) if name in Scenario.__dataclass_fields__}
    if eager:
        if given["cudagraph"] not in (None, "none"):
            raise ValueError(f"--enforce-eager contradicts --cudagraph {given['cudagraph']}: give one of them")
        given["cudagraph"] = "none"
    if given["speculative_config"] is not None:
        given["speculative_config"] = _table("--speculative-config", given["speculative_config"])
    given["kv_tiers"] = ",".join(given["kv_tiers"]) or None
    values |= {name: value for name, value in given.items() if value is not None}
    check_engine(values)
    for name, words in pairs.items():
        in_file = values.get(name, {})
        if words and isinstance(in_file, dict):  # anything else is for Scenario to refuse
            values[name] = in_file | dict(_argument(name, word) for word in words)
    return values


def check_engine(values: dict[str, Any]) -> None:
    """A switch that the engine does not have cannot be on."""
    if "engine" in values:
        from llmsim.engines import find_engine

        engine = find_engine(values["engine"])
        for name in engine.lacks:
            if values.get(name):
                raise ValueError(
                    f"{name}={values[name]}: the engine {engine.name} has none: leave it out, or give --scheduler"
                    f" {engine.name} with another engine"
                )


def _table(flag: str, text: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{flag} {text}: not JSON ({error})") from None
    if not isinstance(table, dict):
        raise ValueError(f'{flag} {text}: write a table, e.g. {{"method": "eagle", "num_speculative_tokens": 3}}')
    return table


def _argument(field: str, word: str) -> tuple[str, Any]:
    name, sign, text = word.partition("=")
    if not sign or not name.isidentifier():
        flag = field.removesuffix("s").replace("_", "-")
        raise ValueError(f"--{flag} {word}: write NAME=VALUE, e.g. quantum_s=0.05")
    return name, value_of(text)


class SectionedCommand(click.Command):
    """Help in sections, the engine's flags apart from the trace's and the output's; `--goodput` takes several words
    (`--goodput ttft:500 tpot:50`), as vLLM's does, and `--intervals` a number or none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        taking = False
        for arg, following in zip_longest(args, args[1:], fillvalue=""):
            if arg == "--intervals" and not following[:1].isdigit():  # what comes next is not its number
                spread.append(f"--intervals={DRAWS}")
                continue
            if taking and re.fullmatch(r"\w+:[^/]*", arg):
                if spread[-1] != "--goodput":
                    spread.append("--goodput")
            else:
                taking = arg == "--goodput" or arg.startswith("--goodput=")
            spread.append(arg)
        return super().parse_args(ctx, spread)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        marked = [(_section(option), option.get_help_record(ctx)) for option in options]
        for title in ("Model, GPU and engine", "Trace", "Requests", "Output"):
            records = [record for section, record in marked if section == title and record is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _section(param: click.Parameter) -> str:
    if param.name in Scenario.__dataclass_fields__ or param.name in ("scenario_file", "enforce_eager"):
        return "Model, GPU and engine"
    if param.name in ("schedulers", "engines", "variants"):  # sides of a comparison
        return "Model, GPU and engine"
    if param.name in ("prompt_tokens", "output_tokens", "batches"):
        return "Requests"
    return "Trace" if param.name in TRACE_PARAMETERS else "Output"
