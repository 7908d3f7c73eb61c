"""Cost model of a training step of a plain transformer: FLOPs, bytes moved, bytes saved, and communication.

Counts are closed-form functions of shapes. `machines` converts them to seconds. Merging computes a matrix `ΔW` from
SNELLA's factors and adds its largest entries, the update, to the frozen weight `W0`. The sum is the weight `W` of the
step.

Shape letters: `d` width, `h` hidden width of the MLP, `r` rank, `n` inputs of a layer, `m` outputs of a layer.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Literal

Precision = Literal["float32", "autocast", "bfloat16"]
"""Dtypes of a step. `autocast` uses bfloat16 activations with float32 weights. `bfloat16` is autocast with frozen
weights in bfloat16."""
Strategy = Literal["ddp", "fsdp2"]
"""Data parallelism with replicated parameters (DDP) or with sharded ones (FSDP2)."""

_FLOAT32 = 4  # bytes per entry
_HALF = 2  # bytes per entry
_SIZES: dict[Precision, tuple[int, int, int]] = {"float32": (4, 4, 4), "autocast": (2, 4, 4), "bfloat16": (2, 2, 2)}
"""Bytes of an activation, of a frozen weight, and of an entry of the residual stream."""
_INT8 = 17 / 16  # bytes per entry, where 64 entries share a float32 scale
_ADAMW = 28  # bytes per parameter: reads weight, gradient, and two moments; writes weight and moments
_DENSE_FROM = 0.1  # below this density, CPUs compute a weight gradient only for the changed weights


@dataclass(frozen=True)
class Transformer:
    """Shape of a plain vision or language transformer.

    Args:
        width: Width `d` of the residual stream.
        depth: Number of blocks.
        tokens: Tokens per sample, including the class token.
        heads: Attention heads.
        hidden: Hidden width `h` of the MLP.
        patch: Values per patch, which are the inputs of the patch embedding. 0 for a language model.
        image: Values per input image. 0 for a language model.
        outputs: Number of classes, or vocabulary size for a language model.
        kv_width: Output width of the key and value layers in LLaMA. None for `d`.
        is_llama: True for LLaMA's blocks: separate q, k, and v layers, a gated MLP, and no biases.
        has_layer_scale: True if both branches of a block end with a learned scale.
    """

    width: int
    depth: int
    tokens: int
    heads: int
    hidden: int
    patch: int = 0
    image: int = 0
    outputs: int = 100
    kv_width: int | None = None
    is_llama: bool = False
    has_layer_scale: bool = False

    @property
    def layers(self) -> list[tuple[int, int, int]]:
        """Adapted layers of one block, `(m, n, matrices)`. A fused qkv layer consists of three matrices."""
        d = self.width
        h = self.hidden
        kv = self.kv_width or self.width
        if self.is_llama:
            return [(d, d, 1), (kv, d, 1), (kv, d, 1), (d, d, 1), (h, d, 1), (h, d, 1), (d, h, 1)]
        return [(3 * d, d, 3), (d, d, 1), (h, d, 1), (d, h, 1)]

    @property
    def entries(self) -> int:
        """Entries of the adapted matrices of one block."""
        return sum(m * n for m, n, _ in self.layers)

    @property
    def parameters(self) -> int:
        """Number of parameters, excluding adapters."""
        d = self.width
        if self.is_llama:
            return self.depth * (self.entries + 2 * d) + d + 2 * self.outputs * d
        biases = sum(m for m, _, _ in self.layers)
        normalizations = 4 * d
        layer_scales = 2 * d * self.has_layer_scale
        block = self.entries + biases + normalizations + layer_scales
        patch_embedding = (self.patch + 1) * d
        positions_and_class_token = (self.tokens + 1) * d
        last_normalization = 2 * d
        outside_blocks = patch_embedding + positions_and_class_token + last_normalization + self.head_weights
        return self.depth * block + outside_blocks

    @property
    def head_weights(self) -> int:
        """Parameters of the classifier head, which every method trains. 0 for a language model."""
        return 0 if self.is_llama else (self.width + 1) * self.outputs


@dataclass(frozen=True)
class Method:
    """Options of a method that change the cost of a step.

    Args:
        family: Base method that the options modify.
        recompute: Recompute layer inputs in the backward pass.
        compress: Save 8-bit activations.
        sample: Fraction of the tokens that enter the weight gradient.
        half_gradient: Compute the weight gradient in bfloat16.
    """

    family: Literal["frozen", "lora", "dora", "full", "snella"]
    recompute: bool = False
    compress: bool = False
    sample: float = 1.0
    half_gradient: bool = False


METHODS: dict[str, Method] = {
    "frozen": Method("frozen"),
    "lora": Method("lora"),
    "lora-recompute": Method("lora", recompute=True),
    "dora": Method("dora"),
    "full": Method("full"),
    "full-recompute": Method("full", recompute=True),
    "snella": Method("snella", recompute=True),
    "snella-keep-inputs": Method("snella"),
    "snella-bf16-gradient": Method("snella", recompute=True, half_gradient=True),
    "snella-sample": Method("snella", recompute=True, sample=0.5),
    "snella-sample-quarter": Method("snella", recompute=True, sample=0.25),
    "snella-compress": Method("snella", recompute=True, compress=True),
    "snella-compress-sample": Method("snella", recompute=True, compress=True, sample=0.5),
}
"""Methods by their name in `snella bench`. `frozen` trains the head and the class token."""


@dataclass(frozen=True)
class Kernels:
    """Cost of merging per matrix entry, and kernel launches per adapted layer, over the forward and backward passes.

    Args:
        operations: Vector operations per entry at rank 8.
        per_rank: Additional vector operations per entry for each unit of rank above 8.
        merged_bytes: Bytes moved per entry for `ΔW` in float32 and for the weight gradient.
        weight_accesses: Accesses to `W0` and `W` per entry, in the dtype of the weights.
        launches: Kernel launches per layer in both passes. 0 on a CPU.
        dense: True if the weight gradient is dense at every sparsity.
        serial: Instructions that one warp executes per softmax row in both passes. Too few programs run to fill the
            device, so these instructions are not hidden and add to the step time.
    """

    operations: float
    per_rank: float
    merged_bytes: float
    weight_accesses: int
    launches: int
    dense: bool
    serial: float = 0.0


NUMBA = Kernels(operations=180, per_rank=10, merged_bytes=16, weight_accesses=4, launches=0, dense=False)
"""Forward: write `ΔW`, read it twice. Backward: one sweep over the gradient. An entry takes six roots, two
exponentials, and `10r` operations for distances and gradients of the factors."""
TRITON = Kernels(operations=905, per_rank=35, merged_bytes=35, weight_accesses=6, launches=17, dense=True, serial=27.0)
"""Operations are the instructions that the compiled kernels execute per entry for `mix_k`
(`benchmarks/triton_resources.jsonl`, compute capability 9.0): a constant at rank 8, and a slope per rank up to 32.
Bytes are the reads and writes of each launch, with the `3r/8` bytes of partial sums evaluated at r = 8. One program per
16 columns computes softmax statistics, 64 rows per step."""
SDDMM = (0.54, 2.6)
"""Time of a sparse weight gradient (SDDMM) relative to the dense product: intercept and slope over the density.

The line is fitted to measurements of a 3072×768 matrix in `benchmarks/results.jsonl`, at densities from 1 to 10%. Its
error there is at most 9%. At 768×768, the line is 19 to 37% too low, with a median of 28%.
"""


@dataclass(frozen=True)
class StepCount:
    """Work and memory of one training step on one device.

    Args:
        products: FLOPs of matrix products in the dtype of the activations. A multiply-add counts as two.
        half_products: FLOPs of products in bfloat16 while activations are in float32.
        vector: Elementwise operations, excluding merging.
        moved: Bytes read and written, excluding merging.
        launches: Kernel launches, excluding merging.
        merge_vector: Elementwise operations of merging.
        merge_moved: Bytes read and written by merging.
        merge_launches: Kernel launches of merging.
        merge_serial: Instructions on the critical path of merging, executed by one warp.
        saved: Bytes that autograd saves for the backward pass.
        is_full: True if the method trains all parameters of the model.
        adapters: Number of adapter parameters.
        trainable: Number of trainable parameters: adapters plus the trained parameters of the model itself.
        base_weights: Bytes of the parameters, excluding adapters.
        block_weights: Bytes of one block's adapted matrices, excluding adapters.
        temporary: Bytes of temporary tensors in the layer that needs the most.
    """

    products: float
    half_products: float
    vector: float
    moved: float
    launches: float
    merge_vector: float
    merge_moved: float
    merge_launches: float
    merge_serial: float
    saved: float
    is_full: bool
    adapters: int
    trainable: int
    base_weights: float
    block_weights: float
    temporary: float

    @property
    def weights(self) -> float:
        """Bytes of all parameters, with the adapters in float32."""
        return self.base_weights + _FLOAT32 * self.adapters

    @property
    def peak(self) -> float:
        """Peak bytes on one device: weights, AdamW's moments, and the maximum over backward pass and optimizer step."""
        trained = _FLOAT32 * self.trainable
        return self.weights + 2 * trained + max(self.saved + self.temporary, trained)

    def communicated(self, devices: int, strategy: Strategy) -> float:
        """Return the bytes that each of p devices sends in a step: ring all-reduce, all-gather, and reduce-scatter.

        ddp    2·(p − 1)/p · gradients
        fsdp2  2·(p − 1)/p · base weights (gathered in both passes)
               + (p − 1)/p · gradients (reduce-scatter) for full fine-tuning, else 2·(p − 1)/p · gradients (all-reduce)
        """
        share = (devices - 1) / devices
        gradients = _FLOAT32 * self.trainable
        if strategy == "ddp":
            return 2 * share * gradients
        gradient_factor = 1 if self.is_full else 2  # reduce-scatter or all-reduce
        return share * (2 * self.base_weights + gradient_factor * gradients)


def count_adapters(model: Transformer, method: str, r: int = 8) -> int:
    """Count the adapter parameters. Besides its factors, SNELLA has four scalars per matrix."""
    family = METHODS[method].family
    if family in ("full", "frozen"):
        return 0
    if family == "snella":
        block = 0
        for m, n, matrices in model.layers:
            factors = r * (m + matrices * n)  # every matrix of a fused layer has its own A
            scalars = 4 * matrices
            block += factors + scalars
        return model.depth * block
    block = sum(r * (m + n) for m, n, _ in model.layers)
    if family == "dora":
        block += sum(m for m, _, _ in model.layers)  # magnitudes
    return model.depth * block


def count_trainable(model: Transformer, method: str, r: int = 8) -> int:
    """Count the trainable parameters: adapters plus the trained parameters of the model itself."""
    family = METHODS[method].family
    if family == "full":
        return model.parameters
    class_token = model.width if family == "frozen" else 0
    return model.head_weights + class_token + count_adapters(model, method, r)


def count_step(
    model: Transformer,
    method: str,
    batch: int,
    *,
    r: int = 8,
    sparsity: float = 0.7,
    precision: Precision = "float32",
    kernels: Kernels = NUMBA,
    is_checkpointed: bool = False,
) -> StepCount:
    """Count the work and memory of one AdamW training step.

    Args:
        model: Shape of the model.
        method: Key of `METHODS`.
        batch: Samples on one device.
        r: Rank.
        sparsity: Fraction of the adapted weights that SNELLA leaves unchanged.
        precision: Dtypes of activations and frozen weights.
        kernels: Cost of merging with the backend in use.
        is_checkpointed: If True, blocks save only their inputs and repeat the forward pass of the frozen model.
            Repeated merging and repeated adapter products are not counted.
    """
    options = METHODS[method]
    tokens = model.tokens * batch
    activation, weight, _ = _SIZES[precision]
    adapters = count_adapters(model, method, r)
    trainable = count_trainable(model, method, r)
    is_full = options.family == "full"
    base_weight = _FLOAT32 if is_full else weight
    gradient_flops, half_gradient_flops, gradient_bytes = _weight_gradient(
        model, options, tokens, sparsity, precision, kernels
    )
    block = _frozen_block(model, tokens, precision)
    if is_checkpointed:  # repeats the forward pass, a third of the vector operations, bytes, and launches
        products = 2 * tokens * model.entries + 4 * tokens * model.tokens * model.width
        block = block.plus(_Cost(products, block.vector / 3, block.moved / 3, block.launches / 3))
    block = block.plus(_method_cost(model, options, tokens, activation, r))
    block = block.plus(_Cost(products=gradient_flops, moved=gradient_bytes))
    # the patch embedding needs no input gradient, but a language model's head does; full fine-tuning adds weight
    # gradients
    head = model.outputs if model.is_llama else 0
    outside_blocks = 2 * tokens * model.width * (model.patch * (1 + is_full) + head * (2 + is_full))
    temporary = tokens * (model.hidden + model.width) * activation
    merged_entries = 0
    merged_rows = 0
    merge_launches = 0
    if options.family == "snella":
        merged_entries = model.depth * model.entries
        merged_rows = model.depth * sum(m // matrices for m, _, matrices in model.layers)
        merge_launches = model.depth * kernels.launches * len(model.layers)
        largest_layer = max(m * n for m, n, _ in model.layers)
        temporary += largest_layer * (_FLOAT32 + weight)
    return StepCount(
        products=model.depth * block.products + outside_blocks,
        half_products=model.depth * half_gradient_flops,
        vector=model.depth * block.vector,
        moved=model.depth * block.moved + _ADAMW * trainable,
        launches=model.depth * block.launches + 20,  # 20 outside the blocks
        merge_vector=merged_entries * (kernels.operations + kernels.per_rank * (r - 8)),
        merge_moved=merged_entries * (kernels.merged_bytes + kernels.weight_accesses * weight),
        merge_launches=merge_launches,
        merge_serial=kernels.serial * merged_rows,
        saved=_saved_bytes(model, options, tokens, r, precision, is_checkpointed),
        is_full=is_full,
        adapters=adapters,
        trainable=trainable,
        base_weights=model.parameters * base_weight,
        block_weights=model.entries * base_weight,
        temporary=temporary,
    )


@dataclass(frozen=True)
class _Cost:
    """Products, vector operations, bytes moved, and launches of one block in both passes."""

    products: float = 0.0
    vector: float = 0.0
    moved: float = 0.0
    launches: float = 0.0

    def plus(self, other: _Cost) -> _Cost:
        """Add two costs."""
        return _Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def _frozen_block(model: Transformer, tokens: int, precision: Precision) -> _Cost:
    """Count the work of one block of the frozen model."""
    d = model.width
    h = model.hidden
    activation, weight, _ = _SIZES[precision]
    scores = model.heads * model.tokens  # attention scores of one token
    # each layer computes its output and its input gradient; attention has two products forward and five backward
    products = 2 * 2 * tokens * model.entries + 14 * tokens * model.tokens * d
    vector = tokens * (60 * h + 40 * scores)
    accesses = 16 * d + 6 * d  # normalizations, residuals
    accesses += (13 if model.is_llama else 5) * h  # activation, gate
    accesses += 18 * d  # attention and the split of qkv
    accesses += 10 * d if model.has_layer_scale else 0
    accesses += 2 * sum(m + n for m, n, _ in model.layers)
    moved = activation * tokens * accesses + 2 * weight * model.entries
    if precision == "autocast":  # casts the weights to bfloat16
        moved += 2 * (_FLOAT32 + _HALF) * model.entries
    launches = 22 + 4 * (precision != "float32")
    return _Cost(products, vector, moved, launches)


def _method_cost(model: Transformer, options: Method, tokens: int, activation: int, r: int) -> _Cost:
    """Count the cost that a method adds to a frozen block, excluding merging and the weight gradient."""
    inputs = sum(n for _, n, _ in model.layers)
    outputs = sum(m for m, _, _ in model.layers)
    d = model.width
    h = model.hidden
    layers = len(model.layers)
    extra = _Cost()
    if options.recompute:
        extra = _Cost(vector=30 * tokens * h, moved=activation * tokens * (4 * d + 2 * h), launches=3)
    if options.compress:
        encoded = tokens * (5 * d + h * (1 + model.is_llama))  # entries that are saved in 8 bits
        attention_products = 4 * tokens * model.tokens * d  # attention runs again on the decoded inputs
        vector = 20 * tokens * model.heads * model.tokens + 10 * encoded
        extra = extra.plus(_Cost(attention_products, vector, encoded * (2 * activation + 2), 60))
    if options.family == "full":
        moved = activation * tokens * outputs + 2 * _FLOAT32 * model.entries
        extra = extra.plus(_Cost(moved=moved, launches=2 * layers))
    if options.family in ("lora", "dora"):
        # forward: A, B, scale, add; backward: scale, two products each for A and B, sum of input gradients
        moved = activation * tokens * (6 * inputs + 10 * outputs)
        extra = extra.plus(_Cost(products=6 * tokens * r * (inputs + outputs), moved=moved, launches=10 * layers))
    if options.family == "dora":
        # PEFT computes the norms of the merged weight from a product with the identity, and scales both outputs
        identity_products = sum(2 * n * r * (n + m) for m, n, _ in model.layers)
        moved = activation * tokens * 14 * outputs + 40 * model.entries
        extra = extra.plus(_Cost(products=identity_products, moved=moved, launches=30 * layers))
    return extra


def _weight_gradient(
    model: Transformer, options: Method, tokens: int, sparsity: float, precision: Precision, kernels: Kernels
) -> tuple[float, float, float]:
    """Return the FLOPs (activation dtype), FLOPs (bfloat16), and bytes moved for one block's weight gradients."""
    if options.family not in ("full", "snella"):
        return 0.0, 0.0, 0.0  # `_method_cost` includes the gradients of LoRA's factors
    activation, _, _ = _SIZES[precision]
    read = tokens * sum(m + n for m, n, _ in model.layers)
    flop = 2.0 * tokens * model.entries * options.sample
    if options.family == "snella" and not kernels.dense and 1 - sparsity < _DENSE_FROM:
        flop *= SDDMM[0] + SDDMM[1] * (1 - sparsity)
    written = activation * model.entries
    if options.half_gradient and precision == "float32":  # writes and reads bfloat16 copies of the tensors
        return 0.0, flop, (_FLOAT32 + 2 * _HALF) * read + written
    moved = activation * read * options.sample + written
    if options.sample < 1:  # norms of all tokens, then a copy of the sampled ones
        moved += activation * read * (1 + 2 * options.sample)
    return flop, 0.0, moved


def _saved_bytes(
    model: Transformer, options: Method, tokens: int, r: int, precision: Precision, is_checkpointed: bool
) -> float:
    """Count the bytes that the whole model saves for the backward pass."""
    d = model.width
    activation, _, stream = _SIZES[precision]
    block = _saved_by_block(model, options, tokens, r, precision)
    # input and output of the last normalization; under autocast, the head saves a cast copy of its input instead of
    # the output, and SNELLA does not recompute the input of the head
    is_output_saved = precision != "autocast" and (options.family == "snella" or not options.recompute)
    outside_blocks = tokens * d * (stream + activation * is_output_saved)
    if options.family == "full":
        outside_blocks += tokens // model.tokens * model.image * _FLOAT32  # images, for the patch embedding's gradient
    if model.is_llama:
        outside_blocks += 2 * _FLOAT32 * tokens * model.outputs  # logits and log-probabilities
    if is_checkpointed:  # the inputs of all blocks, and the tensors of the block that is being recomputed
        return model.depth * tokens * d * stream + block + outside_blocks
    # without recomputation, the first normalization saves no input, because nothing before it is trained
    starts_frozen = options.family in ("lora", "dora") or options == METHODS["snella-keep-inputs"]
    unsaved = tokens * d * stream if starts_frozen and not options.recompute else 0
    return model.depth * block + outside_blocks - unsaved


def _saved_by_block(model: Transformer, options: Method, tokens: int, r: int, precision: Precision) -> float:
    """Count the bytes that one block saves for the backward pass."""
    d = model.width
    h = model.hidden
    kv = model.kv_width or model.width
    activation, _, stream = _SIZES[precision]
    attention = d + 2 * kv
    hidden_tensors = 1 + model.is_llama
    # inputs of two normalizations; q, k, and v; the output of attention; the input of the activation (and the gate)
    per_token: float = 2 * d * stream + (attention + d + hidden_tensors * h) * activation
    if options.compress:  # in 8 bits, without the output of attention
        per_token = _INT8 * (2 * d + attention + hidden_tensors * h)
    if not options.recompute and options.family != "frozen":  # outputs of the normalizations and the activation
        per_token += (2 * d + hidden_tensors * h) * activation
    statistics = 2 if model.is_llama else 4  # two normalizations save a scale and, except in LLaMA, a mean
    per_token += (model.heads + statistics) * _FLOAT32  # attention saves a logsumexp per head
    fixed = 0.0
    if options.family == "full":
        per_token += 2 * d * stream * model.is_llama
        per_token += 2 * d * activation * model.has_layer_scale  # inputs of the trained scales
    if options.family in ("lora", "dora"):
        per_token += r * len(model.layers) * activation  # outputs of A
        per_token += d * activation if precision != "float32" else 0  # PEFT casts the input of `proj`
    if options.family == "dora":
        per_token += 2 * sum(m for m, _, _ in model.layers) * activation  # both outputs before they are scaled
        fixed += _FLOAT32 * sum(n * n + n * r for _, n, _ in model.layers)  # the identity and its product with A
    if options.family == "snella":
        fixed += 3 * _FLOAT32 * sum(count * n for _, n, count in model.layers)
    elif precision == "autocast":
        fixed += _HALF * model.entries  # cast weights
    return tokens * per_token + fixed
