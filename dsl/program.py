"""What a tile-program factory hands to the code generator."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Program:
    """A tile program with what its compilation needs.

    Parameters
    ----------
    func : PrimFunc
        The program. Its parameters, in order, are those of the function that the module exports.
    pass_config : Mapping[str, Any]
        TileLang pass options, such as ``{"tl.enable_fast_math": True}``.
    """

    func: Any
    pass_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
