"""`adalora-r`: PEFT's AdaLoRA and its rank schedule."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from peft import AdaLoraConfig, PeftConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn
from torch.optim import Optimizer

from snella.methods.method import Method, Options
from snella.methods.peft_methods import peft_method

_STATE_KEY = "adalora_ranks"
_WARMUP_SHARE, _FINAL_SHARE = 0.1, 0.5
_OPTIONS = (
    *("r", "init_r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"),
    *("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
)


class RankSchedule:
    """Lets AdaLoRA take ranks away while a model trains: PEFT's `update_and_allocate` after each step of the optimizer.

    The ranks stay at `init_r` for the first `tinit` steps, fall along a cubic to `r` on average, and stay for the last
    `tfinal` steps. Where the configuration names neither, these are a tenth and a half of all steps, as in most of
    the paper's runs. The allocator's state is part of the optimizer's, so that a resumed run continues with it.

    Args:
        model: With an AdaLoRA adapter.
        total_steps: Steps of the optimizer in the whole run.

    Attributes:
        step: Steps taken.

    Raises:
        TypeError: The model has another adapter, or none.
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        if not is_adalora(model):
            raise TypeError(f"ranks are scheduled for AdaLoRA adapters, got {type(model).__name__}")
        self.tuner: AdaLoraModel = model.base_model  # type: ignore[assignment]
        self.config: AdaLoraConfig = self.tuner.peft_config[self.tuner.trainable_adapter_name]  # type: ignore[assignment]
        self.step = 0
        if self.config.tinit == 0 and self.config.tfinal == 0:
            self.config.tinit = min(round(_WARMUP_SHARE * total_steps), total_steps - 1)
            self.config.tfinal = min(max(1, round(_FINAL_SHARE * total_steps)), total_steps - 1 - self.config.tinit)
        self.config.total_step = total_steps
        if self.config.tinit + self.config.tfinal >= total_steps:
            raise ValueError(
                f"tinit + tfinal must be less than the {total_steps} steps of the run, got {self.config.tinit} + "
                f"{self.config.tfinal}; train longer or lower them"
            )

    def attach(self, optimizer: Optimizer) -> Self:
        """Follow an optimizer, wrapped by Accelerate or not; its `state_dict` carries the allocator's from now on."""
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(self._save_into)
        optimizer.register_load_state_dict_post_hook(self._load_from)
        self._load_from(optimizer)
        return self

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        allocator = self.tuner.rankallocator
        return {
            "step": self.step,
            "rank_pattern": self.config.rank_pattern,
            "sensitivity": dict(allocator.exp_avg_ipt),
            "uncertainty": dict(allocator.exp_avg_unc),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        allocator = self.tuner.rankallocator
        self.step = state["step"]
        self.config.rank_pattern = state["rank_pattern"]
        devices = {name: parameter.device for name, parameter in self.tuner.model.named_parameters()}
        allocator.exp_avg_ipt = {name: value.to(devices[name]) for name, value in state["sensitivity"].items()}
        allocator.exp_avg_unc = {name: value.to(devices[name]) for name, value in state["uncertainty"].items()}
        allocator.ipt = {name: torch.zeros_like(value) for name, value in allocator.exp_avg_ipt.items()}

    def _after_step(self, *_: Any) -> None:
        self.tuner.update_and_allocate(self.step)
        self.step += 1

    def _save_into(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0][_STATE_KEY] = self.state_dict()

    def _load_from(self, optimizer: Optimizer) -> None:
        state = optimizer.param_groups[0].pop(_STATE_KEY, None)
        if state is not None:
            self.load_state_dict(state)


def is_adalora(model: nn.Module) -> bool:
    """Whether the model's adapter is PEFT's AdaLoRA."""
    return isinstance(model, PeftModel) and isinstance(model.base_model, AdaLoraModel)


@contextmanager
def all_ranks(config: PeftConfig) -> Iterator[None]:
    """Let PEFT save AdaLoRA's factors whole, those of no rank as zeros, so that they fit the model they came from."""
    pattern = getattr(config, "rank_pattern", None)
    if isinstance(config, AdaLoraConfig):
        config.rank_pattern = None
    try:
        yield
    finally:
        if isinstance(config, AdaLoraConfig):
            config.rank_pattern = pattern


def orthogonality(model: nn.Module) -> Tensor:
    """How far AdaLoRA's factors are from orthogonal, weighted as configured: part of its training loss.

    orth_reg_weight · mean over all factors of ‖P Pᵀ − I‖_F   (Qᵀ Q for the factor of the output side)
    """
    tuner: AdaLoraModel = model.base_model  # type: ignore[assignment]
    adapter = tuner.trainable_adapter_name
    config: AdaLoraConfig = tuner.peft_config[adapter]  # type: ignore[assignment]
    norms = []
    for name, parameter in tuner.model.named_parameters():
        if name.endswith((f"lora_A.{adapter}", f"lora_B.{adapter}")):
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return config.orth_reg_weight * torch.stack(norms).mean()


def _config(head: str, options: Options) -> PeftConfig:
    """W = W0 + (lora_alpha / rank) B diag(E) A; `r` is the rank at the end, on average, `init_r` = 1.5 r at first."""
    r = options.get("r", 8)
    values = {key: value for key, value in options.items() if key != "r"}
    defaults = {"init_r": max(r + 1, round(1.5 * r)), "lora_alpha": r, "total_step": 1}
    return AdaLoraConfig(modules_to_save=[head], target_r=r, **{**defaults, **values})


ADALORA: Method = peft_method(
    "low-rank updates with ranks by competition",
    "AdaLoRA, Zhang et al., arXiv 2303.10512; PEFT's implementation",
    _config,
    _OPTIONS,
    suffix="r",
    penalty=orthogonality,
    schedule=RankSchedule,
    defaults={"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-4, "r": 8},
)
