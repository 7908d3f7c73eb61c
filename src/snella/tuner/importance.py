"""How much each adapted matrix matters to the loss, smoothed over steps (eqs. 7–11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .matrices import AdaptedMatrix


class ImportanceTracker:
    """Moving averages of the importance of every factor entry, and of its uncertainty.

        I = |∇X ⊙ X|                                     for X ∈ {A, B}; `magnitude`: |X|
        Ī ← β1·Ī + (1 − β1)·I                            Ī(0) = I(0)
        U ← β2·U + (1 − β2)·|Ī − I|                      U(0) = 0
        p = mean(Ī_A ⊙ U_A) + mean(Ī_B ⊙ U_B)            one number a matrix

    `delta_magnitude` smooths the mean of `|S|` itself, one number a matrix, in the same way.

    Args:
        matrices: The competitors.
        metric: `sensitivity`, `magnitude` or `delta_magnitude`.
        beta1: Decay of Ī.
        beta2: Decay of U.
        zero_start: Start Ī at 0 instead, as the authors' code does.
    """

    def __init__(
        self,
        matrices: Sequence[AdaptedMatrix],
        *,
        metric: str = "sensitivity",
        beta1: float = 0.85,
        beta2: float = 0.85,
        zero_start: bool = False,
    ) -> None:
        self.matrices = list(matrices)
        self.metric, self.beta1, self.beta2, self.zero_start = metric, beta1, beta2, zero_start
        self._averages: dict[str, Tensor] = {}
        self._uncertainties: dict[str, Tensor] = {}
        self.without_gradient: list[str] = []
        self._sparse_updates: dict[int, list[Tensor]] = {}
        self._gradient_scale = 1.0

    @torch.no_grad()
    def update(self, gradient_scale: float = 1.0) -> None:
        """Take the gradients and parameters as they are now into the averages.

        Args:
            gradient_scale: What the gradients are multiplied by at present, by a gradient scaler.
        """
        self._gradient_scale = gradient_scale
        self.without_gradient = []
        self._sparse_updates = {}
        for matrix in self.matrices:
            for key, value in self._instant_importance(matrix).items():
                self._smooth(f"{matrix.name}/{key}", value)
        self._sparse_updates = {}

    @torch.no_grad()
    def scores(self) -> list[float]:
        """Return `p` of every matrix; 0 before the first update."""
        scores = []
        for matrix in self.matrices:
            keys = [f"{matrix.name}/{key}" for key in ("A", "B", "S") if f"{matrix.name}/{key}" in self._averages]
            parts = [(self._averages[key] * self._uncertainties[key]).mean(dtype=torch.float64) for key in keys]
            scores.append(torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64))
        # one transfer for all matrices
        return torch.stack([score.cpu() for score in scores]).tolist() if scores else []

    def _instant_importance(self, matrix: AdaptedMatrix) -> dict[str, Tensor]:
        """`I` of one matrix, by the name of what it is the importance of."""
        if self.metric == "delta_magnitude":
            # a fused layer is merged once for all of its matrices
            whole = self._sparse_updates.setdefault(id(matrix.layer), [])
            whole.extend(matrix.layer.sparse_updates(matrix.adapter_name) if not whole else [])
            return {"S": whole[matrix.group].abs().mean()}
        factors = dict(zip("AB", matrix.factors, strict=True))
        if self.metric == "magnitude":
            return {key: factor.detach().abs().float() for key, factor in factors.items()}
        layer, name = matrix.layer, matrix.adapter_name
        grad_A, grad_B = layer.snella_A[name].grad, layer.snella_B[name].grad
        if grad_A is None or grad_B is None:
            self.without_gradient.append(matrix.name)
            return {key: torch.zeros_like(factor, dtype=torch.float32) for key, factor in factors.items()}
        gradients = dict(zip("AB", matrix.parts(grad_A, grad_B), strict=True))
        scale = 1 / self._gradient_scale
        return {
            key: (gradients[key].float() * scale * factor.detach().float()).abs() for key, factor in factors.items()
        }

    def _smooth(self, key: str, value: Tensor) -> None:
        """One step of both moving averages; an entry that is not finite leaves its average as it is.

        A moving average never gets rid of an infinity, and one overflow of a half-precision gradient is no news.
        """
        is_finite = torch.isfinite(value)
        if key not in self._averages:
            first = torch.where(is_finite, value, 0)
            self._averages[key] = torch.zeros_like(value) if self.zero_start else first
            self._uncertainties[key] = torch.zeros_like(value)
            if not self.zero_start:
                return
        average, uncertainty = self._averages[key], self._uncertainties[key]
        value = torch.where(is_finite, value, average.to(value.device)).to(average.device)
        average.lerp_(value, 1 - self.beta1)
        uncertainty.lerp_((average - value).abs_(), 1 - self.beta2)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, tensors and plain values only."""
        return {"averages": dict(self._averages), "uncertainties": dict(self._uncertainties)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the averages.

        Raises:
            ValueError: The state is of other matrices; the first that differs is named.
        """
        known = {matrix.name: matrix for matrix in self.matrices}
        for key in state["averages"]:
            name = key.rpartition("/")[0]
            if name not in known:
                raise ValueError(
                    f"the allocator's state has the matrix {name!r}, which this model does not adapt; "
                    f"it adapts e.g. {list(known)[:3]}"
                )
        self._averages, self._uncertainties = (
            {key: value.clone().to(known[key.rpartition("/")[0]].factors[0].device) for key, value in part.items()}
            for part in (state["averages"], state["uncertainties"])
        )
