"""`noah`: a searched combination of prompts, low-rank updates and adapters, a size of its own in each block."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from snella.methods.adapter import Adapter, apply_adapter
from snella.methods.attaching import attach
from snella.methods.blocks import token_blocks, width_of_block
from snella.methods.method import Batches, Method, Options
from snella.methods.noah_search import Subnet, SubnetSpace, search_subnet
from snella.methods.noah_supernet import accuracy_of, build_supernet, train_supernet
from snella.methods.option_checks import check_by, number, whole_number
from snella.methods.own_weights import train_head
from snella.methods.restoring import restoring
from snella.methods.selection_data import selection_data
from snella.methods.spt import budget_of
from snella.methods.spt_lora import LowRank, add_low_rank
from snella.methods.vpt import insert_prompts, make_prompts, remove_prompts

_SIZES = (5, 10, 50, 100)


def qkv_layers(model: nn.Module, head: str) -> list[tuple[str, nn.Module, nn.Linear]]:
    """The blocks of a plain ViT with the fused query-key-value layer of each, as `(name, block, qkv)`.

    Raises:
        ValueError: The model is no plain ViT, or a block has no `attn.qkv`.
    """
    found = []
    for name, block in token_blocks("noah", model, head):
        qkv = getattr(getattr(block, "attn", None), "qkv", None)
        if not isinstance(qkv, nn.Linear):
            raise ValueError(
                f"method 'noah' cannot be applied to {type(model).__name__}: {name}.attn.qkv is no linear layer, "
                f"got {type(qkv).__name__}"
            )
        found.append((name, block, qkv))
    return found


def space_of(model: nn.Module, head: str, options: Options) -> SubnetSpace:
    """The candidates for a model."""
    layers = qkv_layers(model, head)
    smallest = SubnetSpace(
        tuple(width_of_block(block) or 0 for _, block, _ in layers),
        tuple(qkv.in_features + qkv.out_features for _, _, qkv in layers),
        tuple(sorted(options.get("sizes", _SIZES))),
        budget=0,
    )
    least = smallest.count(smallest.least())
    budget = budget_of(options, model, head, on_vit_b=0.64)
    if "budget" in options and budget < least:
        raise ValueError(
            f"budget must be at least {least / 1e6:g} million parameters, those of the smallest combination of "
            f"sizes={list(smallest.sizes)}, got {options['budget']}"
        )
    return smallest.with_budget(max(budget, least))


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Train the supernet on a copy, search it, and put the best subnet into the model."""
    data, space = selection_data(batches), space_of(model, head, options)
    if data.validation is None:
        raise ValueError(
            "method 'noah' searches on validation images, got none; "
            "pass batches=SelectionData(train=..., validation=...)"
        )
    supernet = build_supernet(model, head, space.sizes[-1])
    draw = train_supernet(
        supernet,
        space,
        data,
        epochs=options.get("supernet_epochs", 10),
        lr=options.get("supernet_lr", 5e-4),
        weight_decay=1e-4,
    )
    best = search_subnet(
        space,
        lambda subnet: accuracy_of(supernet, subnet, data),
        draw,
        population=options.get("population", 20),
        generations=options.get("generations", 5),
        report=data.report,
    )
    return _apply(model, head, best)


def _apply(model: nn.Module, head: str, subnet: Subnet) -> nn.Module:
    """Fresh modules of the found sizes; a size of 0 adds none."""
    train_head(model, head)
    for (_, block, qkv), prompts, rank, width in zip(qkv_layers(model, head), *subnet, strict=True):
        if prompts:
            attach(block, "prompts", make_prompts(model, block, prompts), before=insert_prompts, after=remove_prompts)
        if rank:
            attach(qkv, "low_rank", LowRank(qkv.out_features, qkv.in_features, rank), after=add_low_rank)
        if width:
            adapter = Adapter(width_of_block(block) or 0, width)
            attach(cast(nn.Module, block.mlp), "adapter", adapter, after=apply_adapter)
    return model


def _restore(model: nn.Module, head: str, options: Options, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The sizes are the shapes of the stored tensors."""
    with restoring(model):
        names = [name for name, _, _ in qkv_layers(model, head)]
        parts = ("prompts.tokens", "attn.qkv.low_rank.A", "mlp.adapter.down.weight")
        sizes = [tuple(len(tensors.get(f"{name}.{part}", ())) for name in names) for part in parts]
        return _apply(model, head, Subnet(*sizes))


def _check(options: Options) -> list[str]:
    """Rules for numbers, and `sizes`."""
    sizes = options.get("sizes", _SIZES)
    is_list = isinstance(sizes, list | tuple) and len(sizes) > 0
    faults = _CHECK_NUMBERS(options)
    if not is_list or not all(isinstance(size, int) and size >= 1 for size in sizes):
        faults.append(f"sizes must be a list of whole numbers of at least 1, got {sizes!r}")
    return faults


_CHECK_NUMBERS = check_by(
    {
        "budget": number(1e-6),
        "supernet_epochs": whole_number(),
        "supernet_lr": number(),
        "population": whole_number(2),
        "generations": whole_number(0),
    }
)

NOAH = Method(
    "prompts, low-rank updates of qkv and adapters, of searched sizes in each block",
    "Neural Prompt Search, Zhang et al., arXiv 2206.04673",
    _build,
    ("budget", "sizes", "supernet_epochs", "supernet_lr", "population", "generations"),
    check=_check,
    needs_batches=True,
    needs_validation=True,
    restore=_restore,
    unmerged_reason="adds prompt tokens and nonlinear bottlenecks, which are no weights of the backbone",
)
"""Three steps. (1) A supernet with the largest size of everything in every block is trained with AdamW, each batch on a
random combination: a kind fills the first quarter, half, three quarters or all of the blocks, with a random one of
`sizes` in each; smaller sizes share the first rows of larger ones. (2) Evolution over combinations of at most `budget`
million parameters, ranked by the supernet's accuracy on validation. (3) The best combination is put in anew and trained
as any method is; the supernet is thrown away.

The paper's sizes (5, 10, 50, 100) and budget (0.64 on a ViT-B/16; elsewhere in proportion to the adapted weights, at
least the smallest combination) are the defaults. Its effort is not: it trains the supernet for 500 epochs and evolves
50 candidates; `supernet_epochs=500, population=50, generations=20` gives that. Its adapters start at random values,
ours at the identity. Parameters of a block of width d: p·d for prompts, 4·d·r for the low-rank update of a fused qkv,
2·d·a + a + d for the adapter.
"""
