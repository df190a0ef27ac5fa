"""What a TensorRT plan holds, found out without printing anything and without TensorRT."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .targets.tensorrt import Gemm, PlanTensor

PLAN = ".plan"
"""How the names of TensorRT plans end."""


@dataclass(frozen=True)
class ProductDescription:
    """A matrix product of a plan; operands are a type and a shape, such as ``bf16[?, 64]``.

    Attributes:
        layers: names of the ONNX nodes that it computes.
        profile: index of the optimisation profile.
        left: operand.
        right: operand.
        result: of the product.
        alpha: factor of the result.
    """

    layers: list[str]
    profile: int
    left: str
    right: str
    result: str
    alpha: float


@dataclass(frozen=True)
class PlanDescription:
    """A TensorRT plan.

    Attributes:
        path: the file.
        tensorrt: version that built it.
        bytes: its size.
        sm: compute capabilities that it runs on.
        profiles: number of optimisation profiles.
        constants: bytes by type.
        products: every matrix product, in all profiles.
        inputs: type and shape by name.
        outputs: type and shape by name.
    """

    path: Path
    tensorrt: str
    bytes: int
    sm: list[str]
    profiles: int
    constants: Counter[str]
    products: list[ProductDescription]
    inputs: dict[str, str]
    outputs: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return {"plan": str(self.path), "tensorrt": self.tensorrt, "bytes": self.bytes, "sm": self.sm,
                "constants": dict(self.constants), "products": [asdict(product) for product in self.products],
                "inputs": self.inputs, "outputs": self.outputs}


def describe_plan(path: Path) -> PlanDescription:
    """Find out what a TensorRT plan holds.

    Raises:
        HerdError: no such file, not a plan, one that was cut, or another version's.
    """
    from .targets.tensorrt import Plan
    from .targets.tensorrt.plan import VERSION

    plan = Plan.read(path)
    return PlanDescription(
        path, VERSION, plan.bytes, list(plan.targets), len(plan.profiles), plan.constant_bytes(),
        [_product(gemm) for gemm in plan.gemms],
        {name: _tensor(tensor) for name, tensor in plan.inputs.items()},
        {name: _tensor(tensor) for name, tensor in plan.outputs.items()},
    )


def _product(gemm: Gemm) -> ProductDescription:
    return ProductDescription(list(gemm.layers), gemm.profile, _tensor(gemm.a), _tensor(gemm.b), _tensor(gemm.output),
                              gemm.alpha)


def _tensor(tensor: PlanTensor) -> str:
    """Type and shape; sizes that are known when it runs are ``?``."""
    return f"{tensor.dtype}[{', '.join(dim if dim.isdigit() else '?' for dim in tensor.dims)}]"
