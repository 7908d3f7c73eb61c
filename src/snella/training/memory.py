"""How much memory training will take, estimated from what one forward pass keeps for the backward pass."""

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps after a forward pass in training mode, parameters and buffers apart.

    Args:
        model: Left as it was: mode, buffers and the random state are restored.
        images: `[batch, channels, height, width]` on the model's device.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}
    keep_alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        parts = [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else [tensor]
        for storage in (part.untyped_storage() for part in parts):
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
                keep_alive.append(tensor)
        return tensor

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()
        model(images)
    model.train(was_training)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return sum(sizes.values())


def estimate_bytes(model: nn.Module, image_shape: tuple[int, int, int], batch_size: int) -> int:
    """Memory of training: parameters and buffers, gradients, AdamW's two moments, and what a batch keeps.

    total = weights + 3 · trainable + base + batch_size · per_image, the last two from forward passes of 2 and 3 images.
    Libraries, the allocator's rounding and temporary tensors come on top.

    Args:
        model: From `build_method`, on the device where it will train.
        image_shape: `(channels, height, width)`.
        batch_size: Images per step.
    """
    first = next(model.parameters())
    with torch.random.fork_rng([first.device] if first.is_cuda else []):
        images = torch.randn(3, *image_shape, device=first.device)
    two, three = saved_bytes(model, images[:2].contiguous()), saved_bytes(model, images)
    per_image = max(three - two, 0)
    base = max(two - 2 * per_image, 0)
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return held + 3 * trained + base + batch_size * per_image
