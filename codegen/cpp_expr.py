"""Print TVM integer expressions as C++ over 64-bit integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tilelang import tvm

from tilemla.codegen.errors import BuildError

tirx = tvm.tirx

_INFIX: dict[type, str] = {
    tirx.Add: "+",
    tirx.Sub: "-",
    tirx.Mul: "*",
    tirx.Div: "/",
    tirx.Mod: "%",
    tirx.EQ: "==",
    tirx.NE: "!=",
    tirx.LT: "<",
    tirx.LE: "<=",
    tirx.GT: ">",
    tirx.GE: ">=",
    tirx.And: "&&",
    tirx.Or: "||",
}
_FUNCTIONS: dict[type, str] = {
    tirx.FloorDiv: "tilemla::floor_div",
    tirx.FloorMod: "tilemla::floor_mod",
    tirx.Min: "tilemla::min",
    tirx.Max: "tilemla::max",
}
_INFIX_CALLS = {
    "tirx.shift_right": ">>",
    "tirx.shift_left": "<<",
    "tirx.bitwise_and": "&",
    "tirx.bitwise_or": "|",
}


def free_vars(expr: Any) -> set[str]:
    """Names of the variables of an expression."""
    names: set[str] = set()
    if isinstance(expr, tvm.ir.PrimExpr):
        tirx.stmt_functor.post_order_visit(
            expr, lambda node: names.add(node.name) if isinstance(node, tirx.Var) else None
        )
    return names


def print_cpp(expr: Any, lookup: Callable[[Any], str]) -> str:
    """Print an integer expression as C++ over ``int64_t``.

    Parameters
    ----------
    expr : PrimExpr or int
        The expression; integer casts disappear because every operand has 64 bits.
    lookup : callable
        Gives the C++ text of a variable.

    Returns
    -------
    str
        C++ source, parenthesised wherever that can matter.

    Raises
    ------
    BuildError
        On an expression that has no C++ form here.
    """

    def show(node: Any) -> str:
        if isinstance(node, (int, tirx.IntImm)):
            return f"INT64_C({int(node)})"
        if isinstance(node, tirx.Var):
            return lookup(node)
        if isinstance(node, tirx.Cast) and "int" in str(node.dtype):
            return show(node.value)
        if type(node) in _INFIX:
            return f"({show(node.a)} {_INFIX[type(node)]} {show(node.b)})"
        if type(node) in _FUNCTIONS:
            return f"{_FUNCTIONS[type(node)]}({show(node.a)}, {show(node.b)})"
        if isinstance(node, tirx.Not):
            return f"!({show(node.a)})"
        if isinstance(node, tirx.Select):
            return f"({show(node.condition)} ? {show(node.true_value)} : {show(node.false_value)})"
        if isinstance(node, tirx.Call):
            name = str(node.op.name)
            if name == "tirx.if_then_else":
                condition, then, otherwise = map(show, node.args)
                return f"({condition} ? {then} : {otherwise})"
            if name in _INFIX_CALLS:
                return f"({show(node.args[0])} {_INFIX_CALLS[name]} {show(node.args[1])})"
        raise BuildError(f"no C++ form for the host expression {node} ({type(node).__name__})")

    return show(expr)
