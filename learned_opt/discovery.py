"""Members of a package by name, and one line of text that names a member with its fields:
`small_fc(hidden=8)`.

A member is a class with an instance in its module's `EXAMPLES`; its name is the class name in snake
case. A module may name instances of it, too, in the dict `CONFIGURATIONS`. Nothing is registered: a
new file with `EXAMPLES` is found. A spec is a call with literal or nested-call arguments; it is
parsed, never evaluated.
"""

import ast
import dataclasses
import difflib
import importlib
import math
import pkgutil
import re
from types import ModuleType
from typing import Any


def name_of(cls: type) -> str:
    """`SmallFC` -> `small_fc`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()


def modules(package: ModuleType) -> list[ModuleType]:
    found = pkgutil.iter_modules(package.__path__)
    return [importlib.import_module(f"{package.__name__}.{info.name}") for info in found]


def examples(package: ModuleType) -> list[Any]:
    """All instances in the `EXAMPLES` of the modules of `package`, in module order."""
    return [e for module in modules(package) for e in getattr(module, "EXAMPLES", ())]


def members(package: ModuleType) -> dict[str, Any]:
    """Member classes of `package`, and configured instances, by name."""
    named = {name_of(type(example)): type(example) for example in examples(package)}
    for module in modules(package):
        named |= getattr(module, "CONFIGURATIONS", {})
    return named


def unknown(kind: str, got: str, known: list[str]) -> str:
    """The sentence for a name that is not among `known`, with the nearest one suggested."""
    near = difflib.get_close_matches(got, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return f"unknown {kind} '{got}'{hint} Known: {', '.join(sorted(known))}."


def fields_of(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


def build(kind: str, spec: str, known: dict[str, Any]) -> Any:
    """The member that `spec` names, e.g. `build("rule", "small_fc(hidden=8)",
    members(learned_opt))`.

    Raises:
      ValueError: the spec does not parse, names an unknown member or field (the message lists what
        exists), or its fields do not suit the member.
    """
    try:
        node = ast.parse(spec.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(
            f"`{kind}` '{spec}' does not parse: {error.msg}. Write name(field=value, ...)."
        ) from None
    except (RecursionError, MemoryError):
        raise ValueError(f"`{kind}` is nested too deeply to be parsed") from None
    return _build(kind, node, known)


def _build(kind: str, node: ast.expr, known: dict[str, Any]) -> Any:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise ValueError(
            f"`{kind}` '{ast.unparse(node)}' is not of the form name(field=value, ...)"
        )
    name = call.func.id
    if name not in known:
        raise ValueError(unknown(kind, name, list(known)))
    member = known[name]
    fields = fields_of(member if isinstance(member, type) else type(member))
    if len(call.args) > len(fields):
        raise ValueError(
            f"`{kind}` {name} takes at most {len(fields)} fields, got {len(call.args)}"
        )
    values = dict(zip(fields, call.args, strict=False))
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError(f"`{kind}` {name} must name its fields, got '{ast.unparse(keyword)}'")
        if keyword.arg not in fields:
            raise ValueError(unknown(f"field of {kind} {name}", keyword.arg, fields))
        if keyword.arg in values:
            raise ValueError(f"`{kind}` {name} got the field '{keyword.arg}' twice")
        values[keyword.arg] = keyword.value
    arguments = {field: _value(kind, value, known) for field, value in values.items()}
    try:
        if isinstance(member, type):
            return member(**arguments)
        return dataclasses.replace(member, **arguments)
    except TypeError as error:
        raise ValueError(f"`{kind}` {name} cannot be made of {arguments}: {error}") from None


def _value(kind: str, node: ast.expr, known: dict[str, Any]) -> Any:
    if isinstance(node, ast.Call):
        return _build(kind, node, known)
    if isinstance(node, ast.Name) and node.id == "inf":  # as `repr` writes it
        return math.inf
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(
            f"`{kind}`: '{ast.unparse(node)}' is neither a literal nor name(field=value, ...)"
        ) from None


def spec_of(member: Any) -> str:
    """The text that `build` turns back into `member`, every field written out."""
    # A dataclass declared with repr=False writes its own, e.g. a dataset's name.
    if not dataclasses.is_dataclass(member) or not member.__dataclass_params__.repr:  # pyright: ignore[reportAttributeAccessIssue]
        return repr(member)
    fields = ", ".join(
        f"{name}={spec_of(getattr(member, name))}" for name in fields_of(type(member))
    )
    return f"{name_of(type(member))}({fields})"
