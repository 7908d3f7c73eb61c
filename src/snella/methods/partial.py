"""`partial-k`: the last k blocks of the backbone, what follows them, and the head."""

from torch import nn

from snella.methods.blocks import require_blocks
from snella.methods.head import is_inside
from snella.methods.method import Batches, Method, Options, unchanged
from snella.methods.option_checks import check_by, whole_number
from snella.methods.own_weights import train_head


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Train the parameters of the last `blocks` blocks and of every module that comes after them."""
    wanted = options.get("blocks", 1)
    blocks = require_blocks("partial", model, head)
    if wanted > len(blocks):
        raise ValueError(f"method 'partial': blocks must be at most {len(blocks)} for this model, got {wanted}")
    train_head(model, head)
    trained = {name for name, _ in blocks[-wanted:]}
    is_behind = False
    for name, parameter in model.named_parameters():
        in_block = any(is_inside(name, block) for block in trained)
        is_behind = is_behind or in_block
        if in_block or is_inside(name, head) or (is_behind and not any(is_inside(name, block) for block, _ in blocks)):
            parameter.requires_grad_(True)
    return model


PARTIAL = Method(
    "the last blocks, the final norm and the head",
    "Partial-k, Yosinski et al., arXiv 1411.1792; as compared in VPT, Jia et al., arXiv 2203.12119",
    _build,
    ("blocks",),
    suffix="blocks",
    check=check_by({"blocks": whole_number()}),
    merge=unchanged,
)
