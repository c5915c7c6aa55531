"""The values that a Python file assigns to names, read from its text without running it.

Understood is what settings are written with: constants, lists, tuples, dicts, names, arithmetic, f-strings,
conditional expressions, `if` at the top level and a few harmless functions. Everything else is a problem that is told.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_MOST = 100_000  # characters or items: more is no setting, and could be made without end
_BITS = 512  # of a whole number
_SCALARS = (str, int, float, bool, type(None))
_FORMAT = re.compile(r"[^{}]{0,12}")
_DTYPES = {"float16", "half", "bfloat16", "float32", "float", "tf32"}

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda item, items: item in items, ast.NotIn: lambda item, items: item not in items,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dict": dict, "list": list, "tuple": tuple, "int": int, "float": float, "str": str, "bool": bool, "len": len,
    "min": min, "max": max, "abs": abs, "round": round, "sum": sum,
}  # fmt: skip
_OF_SCALARS = ("str", "min", "max", "sum")  # with more inside, they could take for ever


@dataclass
class Values:
    """What a file assigns."""

    values: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    """Names that other values are made of."""
    problems: list[str] = field(default_factory=list)
    """What can't be read: `ORIGIN:LINE: what it is, and what to do`."""


def read_values(text: str, origin: str) -> Values:
    """Return the values that the text of a Python file assigns, by name, and what can't be known without running it."""
    reader = _Reader(origin)
    try:
        reader.run(ast.parse(text).body)
    except SyntaxError as trouble:
        reader.result.problems.append(f"{origin}:{trouble.lineno}: not Python: {trouble.msg}; correct it")
    except (RecursionError, MemoryError, ValueError) as trouble:
        reason = "brackets too deep" if isinstance(trouble, RecursionError) else str(trouble) or "too large"
        reader.result.problems.append(f"{origin}: can't be read: {reason}")
    return reader.result


class _UnreadableError(Exception):
    """A value can't be known. `told`: a message about its cause is among the problems already."""

    def __init__(self, node: ast.AST, why: str, told: bool = False) -> None:
        super().__init__(why)
        self.line, self.why, self.told = getattr(node, "lineno", 0), why, told


class _Reader:
    """Walks over statements; `result` is what has been found."""

    def __init__(self, origin: str) -> None:
        self.origin, self.result = origin, Values()
        self._opaque: dict[str, str] = {}  # names that stand for no value, and why
        self._unknown: set[str] = set()  # names whose value couldn't be read

    def run(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            try:
                self._statement(statement)
            except _UnreadableError as trouble:
                self._unknown |= set(_assigned(statement))
                for name in _assigned(statement):
                    self.result.values.pop(name, None)
                if not trouble.told:
                    self.result.problems.append(f"{self.origin}:{trouble.line}: {_source(statement)} {trouble.why}")

    def _statement(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=targets, value=value):
                found = self.value(value)
                for target in targets:
                    self._assign(target, found)
            case ast.AnnAssign(target=target, value=value):
                if value is not None:
                    self._assign(target, self.value(value))
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                before = self._name(ast.copy_location(ast.Name(name, ast.Load()), target), name)
                self._assign(target, self._binary(statement, op, before, self.value(value)))
            case ast.If(test=test, body=body, orelse=orelse):
                self.run(body if self.value(test) else orelse)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                for alias in names:
                    if alias.name == "*":
                        raise _UnreadableError(statement, "brings names from another file; write their values here")
                    self._opaque[(alias.asname or alias.name).split(".")[0]] = "comes from an import"
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AsyncFunctionDef(name=name):
                self._opaque[name] = "is code of this file"
            case ast.Pass() | ast.Assert() | ast.Expr(value=ast.Constant()):
                pass
            case _:
                raise _UnreadableError(
                    statement, "is code that would have to run; write what comes out of it as values"
                )

    def _assign(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id=name):
                self.result.values[name] = value
                self._unknown.discard(name)
                self._opaque.pop(name, None)
            case ast.Tuple(elts=targets) | ast.List(elts=targets) if isinstance(value, list | tuple) and len(
                value
            ) == len(targets):
                for inner, item in zip(targets, value, strict=True):
                    self._assign(inner, item)
            case ast.Subscript(value=place, slice=key):
                table, name = self.value(place), self.value(key)
                if not isinstance(table, dict) or not isinstance(name, _SCALARS):
                    raise _UnreadableError(target, "sets an item of something that isn't a dict; write it as a dict")
                table[name] = value
            case _:
                raise _UnreadableError(target, "assigns to more than a name; write `name = value`")

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value) if isinstance(value, _SCALARS):
                return value
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.List(elts=items):
                return list(self._items(items))
            case ast.Tuple(elts=items):
                return tuple(self._items(items))
            case ast.Dict(keys=keys, values=values):
                return self._dict(node, keys, values)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(node, op, self.value(left), self.value(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return self._try(node, _UNARY[type(op)], self.value(operand))
            case ast.BoolOp(op=op, values=values):
                return self._bool(op, values)
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self._compare(node, left, ops, others)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self.value(test) else orelse)
            case ast.JoinedStr(values=values):
                return self._limited(node, "".join(self._piece(piece) for piece in values))
            case ast.Subscript(value=place, slice=key) if not isinstance(key, ast.Slice):
                index = self.value(key)
                if not isinstance(index, _SCALARS):
                    raise _UnreadableError(node, "takes an item by more than a number or text; write the value")
                return self._try(node, operator.getitem, self.value(place), index)
            case ast.Call():
                return self._call(node)
            case ast.Attribute(value=ast.Name(id="torch"), attr=attr) if "torch" in self._opaque and attr in _DTYPES:
                return f"torch.{attr}"
        raise _UnreadableError(node, f"needs `{_source(node)}`, which is known only by running it; {_WRITE}")

    def _name(self, node: ast.AST, name: str) -> Any:
        if name in self.result.values:
            self.result.used.add(name)
            return self.result.values[name]
        if name in self._unknown:
            raise _UnreadableError(node, f"needs {name}", told=True)
        raise _UnreadableError(node, f"needs `{name}`, which {self._opaque.get(name, 'nothing assigns')}; {_WRITE}")

    def _items(self, items: Sequence[ast.expr]) -> Iterator[Any]:
        for item in items:
            if isinstance(item, ast.Starred):
                inner = self.value(item.value)
                if not isinstance(inner, list | tuple):
                    raise _UnreadableError(item, f"spreads what isn't a list; {_WRITE}")
                yield from inner
            else:
                yield self.value(item)

    def _dict(self, node: ast.AST, keys: Sequence[ast.expr | None], values: Sequence[ast.expr]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in zip(keys, values, strict=True):
            inner = self.value(value)
            if key is None:
                if not isinstance(inner, dict):
                    raise _UnreadableError(node, f"spreads what isn't a dict; {_WRITE}")
                found |= inner
                continue
            name = self.value(key)
            if not isinstance(name, _SCALARS):
                raise _UnreadableError(node, f"has a key that is neither text nor a number; {_WRITE}")
            found[name] = inner
        return found

    def _binary(self, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
        whole = isinstance(left, int) and isinstance(right, int)
        both = isinstance(left, int | float) and isinstance(right, int | float)
        sequences = [x for x in (left, right) if isinstance(x, str | list | tuple)]
        size = bits = 0
        match op:
            case ast.Add() if len(sequences) == 2:
                size = len(left) + len(right)
            case ast.Mult() if len(sequences) == 1 and (isinstance(left, int) or isinstance(right, int)):
                size = len(sequences[0]) * max(right if sequences[0] is left else left, 0)
            case ast.Pow() if whole and right > 0:
                bits = left.bit_length() * right
            case ast.LShift() if whole:
                bits = left.bit_length() + right
            case _ if type(op) not in _BINARY or not both:
                raise _UnreadableError(node, f"computes with other than numbers; {_WRITE}")
        if size > _MOST or bits > _BITS:
            raise _UnreadableError(node, f"is too large for a setting; {_WRITE}")
        return self._limited(node, self._try(node, _BINARY[type(op)], left, right))

    def _bool(self, op: ast.boolop, values: Sequence[ast.expr]) -> Any:
        found: Any = None
        for node in values:
            found = self.value(node)
            if bool(found) != isinstance(op, ast.And):
                break
        return found

    def _compare(self, node: ast.AST, left: ast.expr, ops: Sequence[ast.cmpop], others: Sequence[ast.expr]) -> bool:
        before = self.value(left)
        for op, other in zip(ops, others, strict=True):
            after = self.value(other)
            if not isinstance(before, _SCALARS):
                raise _UnreadableError(node, f"compares more than numbers and text; {_WRITE}")
            if not self._try(node, _COMPARE[type(op)], before, after):
                return False
            before = after
        return True

    def _piece(self, node: ast.expr) -> str:
        if not isinstance(node, ast.FormattedValue):
            return str(self.value(node))
        value = self.value(node.value)
        form = self.value(node.format_spec) if node.format_spec else ""
        if not isinstance(value, _SCALARS) or not _FORMAT.fullmatch(form) or re.search(r"\d{4}", form):
            raise _UnreadableError(node, f"formats more than numbers and text; {_WRITE}")
        value = repr(value) if node.conversion == ord("r") else value
        return self._try(node, format, value, form)

    def _call(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in _FUNCTIONS or name in self.result.values or name in self._opaque:
            raise _UnreadableError(node, f"calls `{_source(node.func)}`, which reading doesn't run; {_WRITE}")
        if len({k.arg for k in node.keywords if k.arg}) < sum(k.arg is not None for k in node.keywords):
            raise _UnreadableError(node, "gives an argument twice; correct it")
        given = list(self._items(node.args))
        named = self._dict(
            node,
            [None if k.arg is None else ast.Constant(k.arg) for k in node.keywords],
            [k.value for k in node.keywords],
        )
        inner = [item for x in given for item in (x if isinstance(x, list | tuple) else [x])]
        if name in _OF_SCALARS and not all(isinstance(item, _SCALARS) for item in inner):
            raise _UnreadableError(node, f"calls `{name}` on more than numbers and text; {_WRITE}")
        if name == "dict" and not all(isinstance(x, dict) for x in given):
            raise _UnreadableError(node, f"makes a dict from other than names and dicts; {_WRITE}")
        return self._try(node, _FUNCTIONS[name], *given, **named)

    def _try(self, node: ast.AST, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        try:
            return function(*given, **named)
        except (ArithmeticError, LookupError, TypeError, ValueError) as trouble:
            raise _UnreadableError(node, f"goes wrong when computed ({trouble}); correct it") from trouble

    def _limited(self, node: ast.AST, value: Any) -> Any:
        large = len(value) > _MOST if isinstance(value, str | list | tuple) else False
        if large or (isinstance(value, int) and value.bit_length() > 2 * _BITS) or isinstance(value, complex):
            raise _UnreadableError(node, f"is too large for a setting, or none; {_WRITE}")
        return value


_WRITE = "write the value itself there"


def _source(node: ast.AST) -> str:
    """Return the beginning of a statement or expression in one line."""
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _assigned(statement: ast.AST) -> Iterator[str]:
    """Yield the names to which a statement, or one inside it, assigns."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
