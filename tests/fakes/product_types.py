"""Which types matrix products multiply, as torch runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


class ProductTypes(TorchDispatchMode):
    """Records every product of two matrices that is run while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self._products: list[list[Tensor]] = []

    def types_with(self, size: int) -> list[set[torch.dtype]]:
        """The types of the operands of each product that has a dimension of this size."""
        return [
            {operand.dtype for operand in operands}
            for operands in self._products
            if any(size in operand.shape for operand in operands)
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _PRODUCTS:
            self._products.append([operand.detach() for operand in args if isinstance(operand, Tensor)])
        return func(*args, **(kwargs or {}))
