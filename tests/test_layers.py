"""Rooms are stacked: a module imports only from floors below its own room's, and libraries stay in their rooms."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "llmsim"

FLOORS = {  # imports must go down; imports for type checkers only are exempt, those inside functions are not
    **dict.fromkeys(("model", "model_config"), -1),  # the cellar
    **dict.fromkeys(
        (
            "request",
            "hardware",
            "plugins",
            "scenario_file",
            "vllm_flags",
            "kept",
            "drafting",
            "text",
            "progress",
            "parquet",
        ),
        0,
    ),
    **dict.fromkeys(("cost", "memory", "batch", "kvcache", "queue", "rowlog", "trace", "prices"), 1),
    **dict.fromkeys(
        ("schedulers", "routers", "engine", "engines", "macrostep", "metrics", "recording", "synth", "compression"), 2
    ),
    **dict.fromkeys(("replica", "scenario"), 3),
    "runs": 3.5,
    **dict.fromkeys(("simulate", "flags"), 4),
    "uncertainty": 4.5,  # plan and compare build on it
    **dict.fromkeys(("sweep", "testing", "validate", "oracle", "report", "fromvllm", "phases", "charts"), 5),
    "reuse": 4.5,
    **dict.fromkeys(("whatif", "speculation"), 5),
    "compare": 5,
    "explain": 5.2,  # tries changes of what-ifs
    "evidence": 5,
    **dict.fromkeys(("choice", "jobs"), 5.5),
    "views": 5.6,  # explains requests, also of a choice of a trace
    "plan": 5.7,  # says what it found as reports do, and writes a folder as runs do
    "cli": 6,
    "__main__": 7,
}
ROOMS = {  # modules that share a room may import each other, as may the files of a package and `room_*` modules
    **dict.fromkeys(("readers", "classes", "predictions", "rescale"), "trace"),
    **dict.fromkeys(("radixcache", "content", "contiguous", "evicting", "eviction", "tiers", "tips"), "kvcache"),
    **dict.fromkeys(("caches",), "simulate"),
    "admission": "schedulers",  # both plan with schedulers/estimate.py
    **dict.fromkeys(("gaps", "rates", "utilisation", "timeline", "groups", "slo"), "metrics"),
    **dict.fromkeys(("aside",), "engine"),
    "observed": "replica",
    **dict.fromkeys(("recorded", "benchmark_result"), "recording"),
    **dict.fromkeys(("cli_options", "command_line"), "flags"),
    "html_report": "views",
    "comparing": "compare",
    "rerun": "sweep",  # a run of a sweep can be repeated too
}
FORBIDDEN = {"torch", "streamlit"}
ALTAIR_ROOMS = {"charts"}
VLLM_ROOMS = {"schedulers"}
SIMPY_ROOMS = {"replica", "simulate"}


def imports(source):
    """(dotted module, whether importing the file imports it) for all but TYPE_CHECKING blocks."""

    def visit(node, at_once):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, at_once)
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dotted = "." * node.level + (node.module or "")
            yield from ((f"{dotted}.{a.name}" if dotted == "llmsim" else dotted, at_once) for a in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_once and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    return visit(ast.parse(source), True)


def room(module):
    name = ROOMS.get(module, module)
    return name if name in FLOORS else name.partition("_")[0]


def complaints(module, source):
    """What `source`, as the file or package `module` of llmsim, imports and may not."""
    here = room(module)
    if here not in FLOORS:
        return [f"{module} has no floor: give it one in tests/test_layers.py"]
    found = []
    for dotted, at_once in imports(source):
        top, _, rest = dotted.partition(".")
        there = room(rest.partition(".")[0])
        if dotted.startswith("."):
            found.append(f"{module} imports {dotted}: write the full name")
        rooms = {"simpy": SIMPY_ROOMS, "altair": ALTAIR_ROOMS, "vllm": VLLM_ROOMS}.get(top, {here})
        if top in FORBIDDEN or here not in rooms:
            found.append(f"{module} imports {top}")
        elif top in ("pandas", "altair", "vllm") and at_once:
            found.append(f"{module} imports {top} on import: import it in the function that needs it")
        if top == "llmsim" and there in FLOORS and there != here and FLOORS[there] >= FLOORS[here]:
            found.append(f"{here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})")
    return found


def test_every_module_imports_only_from_floors_below():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if module != "__init__":  # the public names, loaded on first use, from every floor
            found += complaints(module, path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_the_rule_sees_what_it_forbids():
    assert complaints("cost", "from llmsim.replica import Replica") == ["cost (floor 1) imports replica (floor 3)"]
    assert complaints("cost", "def f():\n    from llmsim import replica") == [
        "cost (floor 1) imports replica (floor 3)"
    ]
    assert complaints("batch", "import llmsim.kvcache") == ["batch (floor 1) imports kvcache (floor 1)"]
    assert complaints("cost", "import torch.nn") == ["cost imports torch"]
    assert complaints("routers", "import simpy") == ["routers imports simpy"]
    assert complaints("metrics", "import pandas as pd") == [
        "metrics imports pandas on import: import it in the function that needs it"
    ]
    assert complaints("report", "def f():\n    import altair") == ["report imports altair"]
    assert complaints("charts", "import altair") == [
        "charts imports altair on import: import it in the function that needs it"
    ]
    assert complaints("schedulers", "import vllm.config") == [
        "schedulers imports vllm on import: import it in the function that needs it"
    ]
    assert complaints("engine", "def f():\n    import vllm") == ["engine imports vllm"]
    assert complaints("attic", "") == ["attic has no floor: give it one in tests/test_layers.py"]


def test_the_rule_allows_what_it_should():
    assert complaints("replica", "import simpy\nfrom llmsim.cost import Ramp") == []
    assert complaints("metrics", "def f():\n    import pandas") == []
    assert complaints("charts", "def f():\n    import altair") == []
    assert complaints("routers", "if TYPE_CHECKING:\n    from llmsim.replica import Replica") == []
    assert complaints("cli_replay", "from llmsim.cli_options import Known") == []
