"""Is a plan what its model meant? Compares the matrix products of an ONNX graph with those that TensorRT compiled.

TensorRT-RTX builds some quantised graphs in 16 bits, and some with wrong scales, without a word. So a plan is read
back:

* every product of the model whose operands both come out of FP8 must be, wherever the plan names it, a product of two
  FP8 operands, multiplied by the product of their two scales;
* every collective of the model must be one of the plan, in every profile;
* every graph of the plan must be compiled for every compute capability that was asked for;
* the plan's constants must not be larger than the model's weights, as they are when codes were stored dequantised.

It proves what was compiled, not that it runs: kernels are chosen and compiled on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ....errors import HerdError
from ....files import size
from ...weights.writer import initializers
from .fp8_products import Fp8Product, fp8_product
from .plan import VERSION, Gemm, Plan

_SPARE_BYTES = 1 << 20


@dataclass(frozen=True)
class Row:
    """One matrix product.

    Attributes:
        gemm: name of the ONNX node.
        shape: of its weight in the model.
        intended: operand types that the model asks for, such as ``fp8 x fp8``; empty when it asks for none.
        found: operand types in the plan, ``missing`` when no product of the plan names the node.
        problem: what is wrong, empty when nothing is.
    """

    gemm: str
    shape: tuple[int, ...]
    intended: str
    found: str
    problem: str = ""


@dataclass(frozen=True)
class Check:
    """The verdict on a plan.

    Attributes:
        plan: what was read of it; its file may have been renamed since.
        rows: all matrix products of the model, in its order.
    """

    plan: Plan
    rows: tuple[Row, ...]

    @property
    def fallbacks(self) -> tuple[Row, ...]:
        """Products that are not what they were meant to be."""
        return tuple(row for row in self.rows if row.problem)

    @property
    def intended(self) -> int:
        """How many products the model means to be FP8."""
        return sum(1 for row in self.rows if row.intended)

    @property
    def fp8(self) -> int:
        """How many products are proved to be FP8."""
        return sum(1 for row in self.rows if row.intended and not row.problem)

    def __str__(self) -> str:
        return f"{self.fp8} of {self.intended} FP8 products proved, {len(self.rows)} products in all"


def check_plan(model: ir.Model, plan: Plan, sm: Sequence[str], *, allow_fallback: bool = False) -> Check:
    """Compare a plan with the model that it was built from.

    Args:
        model: the ONNX model as it was given to TensorRT.
        plan: the plan.
        sm: compute capabilities that it must run on, such as ``("89", "120")``.
        allow_fallback: return a check with products that fell back, instead of refusing the plan.

    Raises:
        HerdError: a product fell back, a collective or a compute capability is missing, or weights are stored
            dequantised.
    """
    for problem in _problems(model, plan, sm):
        raise HerdError(f"{plan.path.name}: {problem}")
    check = Check(plan, tuple(_rows(model, plan)))
    if check.fallbacks and not allow_fallback:
        first = check.fallbacks[0]
        raise HerdError(f"{len(check.fallbacks)} of {check.intended} FP8 products of {plan.path.name} are not FP8, the "
                        f"first is {first.gemm}: {first.problem}; keep that part in floating point, or allow fallbacks")
    return check


def _rows(model: ir.Model, plan: Plan) -> Iterator[Row]:
    gemms: dict[str, list[Gemm]] = {}
    for gemm in plan.gemms:
        for layer in gemm.layers:
            gemms.setdefault(layer, []).append(gemm)
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            yield _row(node, gemms.get(str(node.name), []), plan.profiles)


def _row(node: ir.Node, gemms: list[Gemm], profiles: frozenset[int]) -> Row:
    found = ", ".join(sorted({f"{_short(gemm.a.dtype)} x {_short(gemm.b.dtype)}" for gemm in gemms})) or "missing"
    product = fp8_product(node)
    problem = "" if product is None else _mismatch(product, gemms, found, profiles)
    return Row(str(node.name), _weight_shape(node), "" if product is None else "fp8 x fp8", found, problem)


def _mismatch(product: Fp8Product, gemms: list[Gemm], found: str, profiles: frozenset[int]) -> str:
    if {gemm.profile for gemm in gemms} != profiles:
        return "no product of the plan names it" if not gemms else "it is missing in a profile"
    if not all(gemm.is_fp8 for gemm in gemms):
        return f"it runs as {found}"
    scale = product.scale
    wrong = next((gemm.alpha for gemm in gemms if scale and not math.isclose(gemm.alpha, scale, rel_tol=1e-5)), None)
    return "" if wrong is None else f"its sums are scaled by {wrong:.6g} instead of {scale:.6g}"


def _problems(model: ir.Model, plan: Plan, sm: Sequence[str]) -> Iterator[str]:
    compiled = [set(plan.targets), *(set(graph.targets) for graph in plan.graphs if graph.targets)]
    for target in sm:
        if not all(target in targets for targets in compiled):
            yield f"it is not compiled for SM {target}, only for {', '.join(plan.targets) or 'nothing'}: build it again"
    for node in model.graph:
        if node.op_type == "DistCollective" and not all(node.name in plan.meeting(at) for at in plan.profiles):
            yield f"{node.name}, in which ranks meet, is not in the plan: build it again with tensorrt_rtx {VERSION}"
    wanted = sum({id(value.const_value): value.const_value.nbytes for value in initializers(model)
                  if value.const_value is not None}.values())
    stored = plan.constant_bytes().total()
    if stored > 1.05 * wanted + _SPARE_BYTES:
        yield f"its constants are {size(stored)}, the model's weights {size(wanted)}: codes are stored dequantised"


def _weight_shape(node: ir.Node) -> tuple[int, ...]:
    """The shape of a product's weight in the model, () when it is computed."""
    value = node.inputs[1]
    while value is not None and (producer := value.producer()) is not None and producer.inputs:
        value = producer.inputs[0]
    shape = value.shape if value is not None else None
    return tuple(dim for dim in shape if isinstance(dim, int)) if shape is not None else ()


def _short(dtype: str) -> str:
    return {"fp8_e4m3": "fp8", "float": "fp32"}.get(dtype, dtype)
