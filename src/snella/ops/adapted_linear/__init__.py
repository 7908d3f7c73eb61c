"""The adapted layer as one op: entry points, a plain reference and an implementation that keeps little."""

from .api import (
    Implementation,
    adapted_linear,
    adapted_product,
    choose_backend,
    effective_weight_of,
    resolve_implementation,
)
from .graph_op import adapted_product_in_graph
from .products import Conv2dProduct, LinearProduct, Product, WeightItself
from .reference import effective_weight
from .update import Update
from .weight_source import WeightSource

__all__ = [
    "Conv2dProduct",
    "Implementation",
    "LinearProduct",
    "Product",
    "Update",
    "WeightItself",
    "WeightSource",
    "adapted_linear",
    "adapted_product",
    "adapted_product_in_graph",
    "choose_backend",
    "effective_weight",
    "effective_weight_of",
    "resolve_implementation",
]
