"""`vpt-shallow` and `vpt-deep`: learned tokens beside those of the image."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from snella.methods.attaching import attach
from snella.methods.blocks import token_blocks, width_of_block
from snella.methods.method import Batches, Method, Options
from snella.methods.option_checks import check_by, number, whole_number
from snella.methods.own_weights import train_head


class Prompts(nn.Module):
    """Learned tokens that stand behind the class token while a block, or all of them, works.

    [cls, x] -> [cls, p_1 ... p_n, x]

    Each value starts uniform in ±sqrt(6 / (3 · patch_area + width)), Glorot's range for the patch embedding.

    Args:
        prompts: n.
        width: Channels of a token.
        prefix: Tokens of the image's own before its patches (class token, registers).
        patch_area: Pixels of a patch.
        dropout: Rate on the prompts, while training.
    """

    def __init__(
        self, prompts: int, width: int, *, prefix: int = 1, patch_area: int = 256, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(prompts, width))
        self.dropout = nn.Dropout(dropout)
        self.prefix = prefix
        bound = math.sqrt(6.0 / (3 * patch_area + width))
        nn.init.uniform_(self.tokens, -bound, bound)

    def insert(self, x: Tensor) -> Tensor:
        """`x` `[batch, tokens, width]` with the prompts in it."""
        prompts = self.dropout(self.tokens).to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, : self.prefix], prompts, x[:, self.prefix :]], dim=1)

    def remove(self, x: Tensor) -> Tensor:
        """`x` without what became of the prompts."""
        return torch.cat([x[:, : self.prefix], x[:, self.prefix + len(self.tokens) :]], dim=1)


def insert_prompts(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: a block's child `prompts` joins the tokens."""
    return (module.prompts.insert(inputs[0]), *inputs[1:])  # type: ignore[operator,union-attr]


def remove_prompts(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: the prompts of a block leave after it."""
    return module.prompts.remove(output)  # type: ignore[operator,union-attr]


class PromptEnd(nn.Module):
    """Marks the block after which the prompts of the first one leave.

    Args:
        prompts: How many.
        prefix: As for `Prompts`.
    """

    def __init__(self, prompts: int, prefix: int) -> None:
        super().__init__()
        self.count, self.prefix = prompts, prefix


def end_prompts(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: take the prompts of another block out."""
    end: Any = module.prompt_end
    return torch.cat([output[:, : end.prefix], output[:, end.prefix + end.count :]], dim=1)


def make_prompts(model: nn.Module, block: nn.Module, prompts: int, dropout: float = 0.0) -> Prompts:
    """Prompts that fit a block of a timm ViT."""
    patch: Any = getattr(getattr(model, "patch_embed", None), "patch_size", None) or (16, 16)
    prefix: Any = getattr(model, "num_prefix_tokens", 1)
    width = width_of_block(block) or 0
    return Prompts(prompts, width, prefix=int(prefix), patch_area=int(patch[0] * patch[1]), dropout=dropout)


def _deep(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """New prompts at each block; what became of them is dropped after it."""
    blocks = token_blocks("vpt-deep", model, head)
    train_head(model, head)
    for _, block in blocks:
        prompts = make_prompts(model, block, options.get("prompts", 10), options.get("dropout", 0.0))
        attach(block, "prompts", prompts, before=insert_prompts, after=remove_prompts)
    return model


def _shallow(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Prompts at the first block; they pass through all blocks and leave after the last."""
    blocks = token_blocks("vpt-shallow", model, head)
    train_head(model, head)
    first, last = blocks[0][1], blocks[-1][1]
    prompts = make_prompts(model, first, options.get("prompts", 10), options.get("dropout", 0.0))
    attach(first, "prompts", prompts, before=insert_prompts)
    attach(last, "prompt_end", PromptEnd(len(prompts.tokens), prompts.prefix), after=end_prompts)
    return model


_OPTIONS = ("prompts", "dropout")
_CHECK = check_by({"prompts": whole_number(), "dropout": number(0, 1)})
_SOURCE = "VPT, Jia et al., arXiv 2203.12119"
_REASON = "adds tokens to those of the image, which are no weights of the backbone"

VPT_SHALLOW = Method(
    "prompt tokens before the first block",
    _SOURCE,
    _shallow,
    _OPTIONS,
    suffix="prompts",
    check=_CHECK,
    unmerged_reason=_REASON,
)
VPT_DEEP = Method(
    "prompt tokens before each block",
    _SOURCE,
    _deep,
    _OPTIONS,
    suffix="prompts",
    check=_CHECK,
    unmerged_reason=_REASON,
)
