"""A program with some of its arguments fixed: what they decide is decided when it is generated."""

import tilelang
from tilelang import tvm

from tilemla.dsl.program import Program


def fix_arguments(program: Program, name: str, **values: int) -> Program:
    """Make a program of another one by giving some of its int32 arguments values.

    Branches that the values rule out are gone, and so are tensors that only those branches used.

    Parameters
    ----------
    program : Program
        The general program.
    name : str
        What the new one is called.
    **values : int
        Arguments by name.

    Returns
    -------
    Program
        Of the arguments that are left, in the same order.

    Raises
    ------
    ValueError
        On a value for what is no int32 argument of the program.
    """
    params = {param.name: param for param in program.func.params}
    for key in values:
        if key not in params or str(params[key].dtype) != "int32":
            raise ValueError(f"{key} must be an int32 argument of the program, which has {', '.join(params)}")
    func = program.func.specialize({params[key]: tvm.tirx.const(value, "int32") for key, value in values.items()})
    func = func.with_attr("global_symbol", name)
    func = tilelang.transform.Simplify()(tvm.IRModule({name: func}))[name]
    used = _used_data(func.body)
    kept = [param for param in func.params if param not in func.buffer_map or func.buffer_map[param].data in used]
    buffers = {param: func.buffer_map[param] for param in kept if param in func.buffer_map}
    func = tvm.tirx.PrimFunc(kept, func.body, func.ret_type, buffers, func.attrs)
    return Program(func, program.pass_config)


def _used_data(body: tvm.tirx.Stmt) -> set[tvm.tirx.Var]:
    """The data pointers of the buffers that a statement reads, writes or passes on."""
    used = set()

    def visit(node: object) -> None:
        if isinstance(node, (tvm.tirx.BufferLoad, tvm.tirx.BufferStore)):
            used.add(node.buffer.data)
        elif isinstance(node, tvm.tirx.Var):
            used.add(node)

    tvm.tirx.stmt_functor.post_order_visit(body, visit)
    return used
