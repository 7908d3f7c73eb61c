"""Methods `vpt-shallow`, `vpt-deep`, and `vqt`: learned prompt and query tokens.

Prompts (visual prompt tuning, VPT) join the token sequence of a block. Queries (visual query tuning, VQT) only read it,
and their outputs go to the head.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snella_app.methods.method import Batches, Method, Options, check_by, integer, number, one_of
from snella_app.methods.partial import train_head
from snella_lab.methods.parts import attach, block_width, token_blocks


class Prompts(nn.Module):
    """Learned prompt tokens inserted after the prefix tokens.

    [cls, x] -> [cls, p_1 ... p_n, x]

    Prompts are initialized uniformly in ±sqrt(6 / (3 · patch_area + width)), the Glorot range of the patch embedding.

    Args:
        prompts: Number of prompts n.
        width: Token width.
        prefix: Number of prefix tokens, such as the class token and registers.
        patch_area: Pixels per patch.
        dropout: Dropout rate for the prompts, with a separate mask for each image.

    Attributes:
        active: Number of leading prompts in use. None uses all prompts.
    """

    def __init__(
        self, prompts: int, width: int, *, prefix: int = 1, patch_area: int = 256, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(prompts, width))
        self.dropout = nn.Dropout(dropout)
        self.prefix = prefix
        self.active: int | None = None
        bound = math.sqrt(6.0 / (3 * patch_area + width))
        nn.init.uniform_(self.tokens, -bound, bound)

    def insert(self, x: Tensor) -> Tensor:
        """Insert the prompts into `x` `[batch, tokens, width]`."""
        prompts = self.dropout(self.tokens[: self.active].to(x.dtype).expand(len(x), -1, -1))
        return torch.cat([x[:, : self.prefix], prompts, x[:, self.prefix :]], dim=1)

    def remove(self, x: Tensor) -> Tensor:
        """Remove the prompt tokens from `x`."""
        end = self.prefix + len(self.tokens[: self.active])
        return torch.cat([x[:, : self.prefix], x[:, end:]], dim=1)

    def remove_after(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of a later block: remove the prompt tokens from its output."""
        return self.remove(output)


def insert_prompts(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: insert the tokens of the block's child `prompts`."""
    return (module.prompts.insert(inputs[0]), *inputs[1:])  # type: ignore[operator,union-attr]


def remove_prompts(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: remove the tokens of the block's child `prompts` from its output."""
    return module.prompts.remove(output)  # type: ignore[operator,union-attr]


def make_prompts(model: nn.Module, block: nn.Module, prompts: int, dropout: float = 0.0) -> Prompts:
    """Create prompts for a block of a timm ViT."""
    # 16 × 16 is assumed for models that do not declare a patch size
    patch_size: Any = getattr(getattr(model, "patch_embed", None), "patch_size", None) or (16, 16)
    prefix: Any = getattr(model, "num_prefix_tokens", 1)
    width = block_width(block) or 0  # known, because `token_blocks` accepts only blocks with a width
    patch_area = int(patch_size[0] * patch_size[1])
    return Prompts(prompts, width, prefix=int(prefix), patch_area=patch_area, dropout=dropout)


def _deep(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Insert separate prompts before each block and remove them after the block."""
    blocks = token_blocks("vpt-deep", model, head)
    train_head(model, head)
    for _, block in blocks:
        prompts = make_prompts(model, block, options.get("prompts", 10), options.get("dropout", 0.0))
        attach(block, "prompts", prompts, before=insert_prompts, after=remove_prompts)
    return model


def _shallow(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Insert prompts before the first block and remove them after the last block."""
    blocks = token_blocks("vpt-shallow", model, head)
    train_head(model, head)
    first_block = blocks[0][1]
    last_block = blocks[-1][1]
    prompts = make_prompts(model, first_block, options.get("prompts", 10), options.get("dropout", 0.0))
    attach(first_block, "prompts", prompts, before=insert_prompts)
    last_block.register_forward_hook(prompts.remove_after)
    return model


VPT_SHALLOW = Method(
    "prompt tokens before the first block",
    "VPT, Jia et al., arXiv 2203.12119",
    _shallow,
    ("prompts", "dropout"),
    suffix="prompts",
    check=check_by({"prompts": integer(), "dropout": number(0, 1)}),
    unmerged_reason="adds prompt tokens, which are not weights of the backbone",
    defaults={"lr": 5e-3, "head_lr": 1e-3, "weight_decay": 1e-4},
)
VPT_DEEP = dataclasses.replace(VPT_SHALLOW, summary="prompt tokens before each block", build=_deep)


class Queries(nn.Module):
    """Query tokens that summarize the tokens of a block.

    z = p + ls1(proj(softmax(q(norm1(p)) Kᵀ / √d) V));   summary = z + ls2(mlp(norm2(z)))

    The block supplies all weights, which stay frozen. `K` and `V` are its detached keys and values with head width d.
    The formula omits the optional norms inside the attention module. The tokens of the block do not attend to the
    queries.

    Args:
        tokens: Initial queries p, `[queries, width]`.
        dropout: Dropout rate for the queries.

    Attributes:
        summary: Output of the queries in the latest forward pass, `[batch, queries, width]`. None before the first
            forward pass, and after `QueryHead` has read it.
    """

    def __init__(self, tokens: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens)
        self.dropout = nn.Dropout(dropout)
        self.summary: Tensor | None = None

    def summarize(self, block: Any, qkv: Tensor) -> Tensor:
        """Summarize a block of a timm ViT by attention from the queries to its tokens.

        `qkv` is the output of `attn.qkv`, `[batch, tokens, 3 · width]`. The result is `[batch, queries, width]`.
        """
        attn = block.attn
        batch = len(qkv)
        num_heads = attn.num_heads
        width = qkv.shape[-1] // 3
        keys, values = qkv.detach()[..., width:].chunk(2, -1)
        keys = _split_heads(keys, num_heads)
        values = _split_heads(values, num_heads)
        tokens = self.dropout(self.tokens.to(attn.qkv.weight.dtype).expand(batch, -1, -1))
        bias = None if attn.qkv.bias is None else attn.qkv.bias[:width]
        queries = F.linear(block.norm1(tokens), attn.qkv.weight[:width], bias)
        queries = _split_heads(queries, num_heads)
        attended = F.scaled_dot_product_attention(attn.q_norm(queries), attn.k_norm(keys), values)
        projected = attn.proj(attn.norm(attended.transpose(1, 2).flatten(2)))
        z = tokens + block.ls1(projected)
        return z + block.ls2(block.mlp(block.norm2(z)))


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Reshape `[batch, tokens, width]` to `[batch, heads, tokens, width / heads]`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class QueryHead(nn.Linear):
    """Linear head on the backbone's features and the summaries of all blocks.

    y = W [x, s_1, …, s_L] + b

    Args:
        features: Number of backbone features.
        classes: Number of outputs.
        sources: `Queries` of all blocks, which remain children of the blocks.
        normalize: If True, scale x and each summary to unit length.
    """

    def __init__(self, features: int, classes: int, sources: list[Queries], *, normalize: bool = False) -> None:
        super().__init__(features + sum(source.tokens.numel() for source in sources), classes)
        # a plain list does not register the queries, so they are saved only as children of their blocks
        self.sources = sources
        self.normalize = normalize

    def forward(self, input: Tensor) -> Tensor:
        """Compute logits `[batch, classes]` from features `[batch, features]` and the summaries.

        Reading a summary clears it.

        Raises:
            RuntimeError: If the backbone has computed no summaries since the last call.
        """
        head_inputs = [input]
        for source in self.sources:
            if source.summary is None:
                raise RuntimeError(
                    "the head of method 'vqt' requires the summaries of a forward pass, got only features; "
                    "call the model on images"
                )
            head_inputs.append(source.summary.flatten(1).to(input.dtype))
            source.summary = None
        if self.normalize:
            head_inputs = [F.normalize(part, dim=-1) for part in head_inputs]
        return super().forward(torch.cat(head_inputs, dim=-1))


def store_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Forward hook of `attn.qkv`: store its output for the block's queries."""
    module.stored_output = output


def summarize_block(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Forward hook of a block: compute the summary of its child `queries`, without changing the output."""
    module.queries.summary = module.queries.summarize(module, module.attn.qkv.stored_output)
    del module.attn.qkv.stored_output


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Attach queries to each block and replace the head with a `QueryHead`."""
    blocks = token_blocks("vqt", model, head)
    old_head = model.get_submodule(head)
    unsupported = [name for name, block in blocks if not _is_pre_norm_block(block)]
    if unsupported or not isinstance(old_head, nn.Linear):
        reason = f"its head is of class {type(old_head).__name__}"
        if unsupported:
            reason = f"block {unsupported[0]!r} is unsupported"
        raise ValueError(
            f"method 'vqt' cannot be applied to {type(model).__name__}: {reason}; the method requires a linear head "
            "and blocks with a fused attn.qkv, as in timm's VisionTransformer"
        )
    train_head(model, head)
    sources = []
    for _, block in blocks:
        tokens = make_prompts(model, block, options.get("queries", 1)).tokens.detach()
        queries = Queries(tokens, options.get("dropout", 0.0))
        block.attn.qkv.register_forward_hook(store_output)  # type: ignore[union-attr]
        attach(block, "queries", queries, after=summarize_block)
        sources.append(queries)
    new_head = QueryHead(
        old_head.in_features, old_head.out_features, sources, normalize=options.get("normalize", False)
    )
    model.set_submodule(head, new_head.to(old_head.weight.device, old_head.weight.dtype))
    return model


def _is_pre_norm_block(block: Any) -> bool:
    """Return True for the pre-norm block of timm's ViT, which `Queries.summarize` reimplements."""
    attn = block.attn
    if not all(hasattr(block, name) for name in ("norm1", "ls1", "norm2", "ls2", "mlp")):
        return False
    if not all(hasattr(attn, name) for name in ("num_heads", "q_norm", "k_norm", "norm", "proj")):
        return False
    qkv = getattr(attn, "qkv", None)
    if not isinstance(qkv, nn.Linear) or qkv.out_features != 3 * attn.proj.in_features:
        return False
    is_gated = getattr(attn, "gate", None) is not None
    is_differential = hasattr(attn, "sub_norm")
    return not is_gated and not is_differential


VQT = Method(
    "query tokens that summarize each block, and a head on all summaries",
    "VQT, Tu et al., arXiv 2212.03220",
    _build,
    ("queries", "dropout", "normalize"),
    suffix="queries",
    check=check_by({"queries": integer(), "dropout": number(0, 1), "normalize": one_of(True, False)}),
    unmerged_reason="adds query tokens and widens the head",
    unsharded_reason="routes gradients around the block outputs, whose hooks gather the sharded weights",
    defaults={"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-4},
)
