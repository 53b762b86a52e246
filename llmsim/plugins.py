"""Loading what users plug in: a name of a built-in, or `path/to/file.py:ClassName`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# asked before a user's file is run; what one of them raises is raised. None here: who names a file wants it run
checks: set[Callable[[Path], None]] = set()

USERS = "llmsim_user_"  # how modules made of users' files are called


class PolicyError(Exception):
    """A policy broke a rule: names the policy, the request, the value and the limit."""


def load_plugin(
    spec: str, arguments: dict[str, Any] | None, *, kind: str, builtin: dict[str, str], method: str, signature: str
) -> Any:
    """An instance of a built-in or of a class in a user's file, made with the given keyword arguments.

    `kind` names the plug-in in messages, `method` is what its class must have, written as `signature` in messages.
    Raises ValueError or FileNotFoundError with the fix; any other exception inside the user's file surfaces untouched.
    """
    found = _find_class(spec, kind, builtin, method, signature)
    arguments = arguments or {}
    parameters = inspect.signature(found).parameters.values()
    known = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in known]
    for name in arguments:
        if name not in names:
            valid = ", ".join(names) or "none"
            raise ValueError(f"{kind} {spec}: unknown argument {name!r}. Valid arguments: {valid}.")
    for parameter in known:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise ValueError(f"{kind} {spec}: argument {parameter.name!r} has no default. Give it a value.")
    if spec in builtin:
        _check_types(f"{kind} {spec}", {p.name: p.default for p in known}, arguments)
    return found(**arguments)


def _check_types(what: str, defaults: dict[str, Any], arguments: dict[str, Any]) -> None:
    """A built-in's argument is of the kind of its default: text, number, whole number or switch."""
    words: dict[type, tuple[tuple[type, ...], str]] = {
        bool: ((bool,), "true or false"), int: ((int,), "a whole number"), float: ((int, float), "a number"),
        str: ((str,), "text"),
    }  # fmt: skip
    for name, value in arguments.items():
        types, expected = words.get(type(defaults[name]), ((object,), ""))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types):
            raise ValueError(f"{what}: {name}={value!r} is not {expected}. The default is {defaults[name]!r}.")


def users_line(error: BaseException) -> str:
    """Where in a user's file an error came up, as "file, line N"; empty if it came up elsewhere."""
    found, step = "", error.__traceback__
    while step is not None:
        if str(step.tb_frame.f_globals.get("__name__", "")).startswith(USERS):
            found = f"{step.tb_frame.f_code.co_filename}, line {step.tb_lineno}"
        step = step.tb_next
    return found


def _find_class(spec: str, kind: str, builtin: dict[str, str], method: str, signature: str) -> Any:
    if spec in builtin:
        module_name, class_name = builtin[spec].split(":")
        return getattr(importlib.import_module(module_name), class_name)
    path_text, colon, class_name = spec.rpartition(":")
    if not colon or not path_text.endswith(".py"):
        known = ", ".join(builtin)
        raise ValueError(f"unknown {kind} {spec!r}. Built-in: {known}; your own: path/to/file.py:ClassName.")
    path = Path(path_text)
    if not path.is_file():
        raise FileNotFoundError(f"{kind} {spec!r}: no file {path_text} in {Path.cwd()}. Give your own file's path.")
    for check in checks:
        check(path)
    module_spec = importlib.util.spec_from_file_location(f"{USERS}{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look a class's module up there
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        where = path_text if error.lineno is None else f"{path_text}, line {error.lineno}"
        raise ValueError(f"{kind} {spec!r}: {where}: {error.msg}. Repair the file.") from None
    except SystemExit as error:
        raise ValueError(f"{kind} {spec!r}: {path_text} ends the process when it is read. Repair the file.") from error
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value) and hasattr(value, method)]
        named = ", ".join(classes) or "none"
        raise ValueError(f"{kind} {spec!r}: no class {class_name} in {path_text}. Classes with {method}(): {named}.")
    if not callable(getattr(found, method, None)):
        raise ValueError(f"{kind} {spec!r}: class {class_name} has no method {signature}. Add it.")
    return found
