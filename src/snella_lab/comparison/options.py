"""Options of `snella compare`."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from snella_app.config.train import TrainConfig
from snella_app.settings import Config, Setting


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig(Config):
    """Which runs of a comparison to train, and how.

    Args:
        workers: Number of parallel runs, one process each; 0 runs everything in the current process. With ray, 0 and 1
            use the whole cluster.
        threads: Threads per worker; defaults to an equal share of the CPUs, or to 1 with ray or emit. Ignored with
            workers 0 unless ray or emit is set.
        ray: Run on Ray, on the cluster at RAY_ADDRESS or on this machine.
        gpus: GPUs per run on Ray, e.g. 0.25; defaults to an equal share of the cluster's GPUs, at most 1.
        run_limit: Maximum minutes per run; a longer or hanging run is stopped and counts as failed. Default: no limit.
        emit: Write job scripts for a scheduler (slurm) instead of training.
        emit_to: Folder of the job scripts; default OUT/slurm.
        part: Train one part without a report, e.g. 0/8 for the first of eight parts; used by the job scripts.
        retry_failed: Train failed runs again, except tuning runs that no longer affect a final run.
        draw_only: Only rewrite the tables and the HTML report from existing results.
    """

    workers: int = 1
    threads: int | None = None
    ray: bool = False
    gpus: float | None = None
    run_limit: float | None = None
    emit: Literal["slurm"] | None = None
    emit_to: str | None = None
    part: str | None = None
    retry_failed: bool = False
    draw_only: bool = False

    @property
    def part_and_count(self) -> tuple[int, int] | None:
        """Index of the part, counted from 0, and number of parts.

        The value is None if `part` is not set or is malformed.
        """
        numbers = (self.part or "").split("/")
        is_valid = len(numbers) == 2 and all(map(str.isdecimal, numbers))
        return (int(numbers[0]), int(numbers[1])) if is_valid else None

    @property
    def limit_s(self) -> float:
        """Maximum seconds per run."""
        return math.inf if self.run_limit is None else 60 * self.run_limit

    def errors(self) -> list[str]:
        """Return errors for out-of-range and conflicting settings."""
        workers = self.workers
        threads = self.threads
        gpus = self.gpus
        limit = self.run_limit
        errors = []
        if workers < 0:
            errors.append(f"workers must be at least 0, got {workers}")
        if threads is not None and threads < 1:
            errors.append(f"threads must be at least 1, got {threads}")
        if gpus is not None:
            is_valid = 0 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0)  # false for nan and inf
            if not (self.ray and is_valid):
                errors.append(
                    f"gpus must be in [0, 1] or an integer, and requires ray, got {gpus:g} and ray={self.ray}"
                )
        if limit is not None and (not limit > 0 or not (self.ray or workers)):
            errors.append(f"run_limit must be positive and requires ray or workers, got {limit:g} and {workers=}")
        if self.emit is not None and (self.ray or self.draw_only or self.part is not None):
            errors.append(f"emit={self.emit!r} cannot be combined with ray, part or draw_only")
        if self.emit_to is not None and self.emit is None:
            errors.append(f"emit_to requires emit, got {self.emit_to!r} without emit; set emit to slurm")
        if self.retry_failed and self.draw_only:
            errors.append("retry_failed cannot be combined with draw_only, which trains nothing; leave one of them out")
        part = self.part_and_count
        if self.part is not None and part is None:
            errors.append(f"part must be INDEX/COUNT, e.g. 0/8, got {self.part!r}")
        elif part is not None and (self.draw_only or part[0] >= part[1]):
            errors.append(
                f"part must be INDEX/COUNT with INDEX < COUNT and cannot be combined with draw_only, got {self.part}"
            )
        return errors


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Config):
    """Settings of `snella compare`; None uses the experiment's value.

    Args:
        out: Comparison folder; an existing comparison is resumed.
        experiment: YAML file or name of a bundled experiment; the options below override it.
        methods: Methods to compare, e.g. linear,lora-8,snella-8.
        data: Datasets, e.g. elpv,digits,folder:photos.
        backbone: Pre-trained model, as for snella train.
        seeds: Final runs per method and dataset; default 3.
        tune_seeds: Tuning runs per candidate, each with a different seed; default 1.
        lr_factors: Learning rate grid, as multiples of each method's default, e.g. 0.1,0.3,1,3,10.
        weight_decays: Weight decay grid, tuned at the best learning rate, e.g. 0,0.1; none keeps the defaults.
        extensions: Maximum number of grid extensions while the best value is on the edge of the grid; default 2.
        reference: Reference method for pairwise comparisons; defaults to the first LoRA method, or else the first
            method.
        forgetting: Datasets whose linear-probe accuracy measures forgetting, e.g. stamps,digits; none disables it.
        task: classification, multilabel (compared by mean average precision), ordinal (by quadratic weighted kappa) or
            regression (by R²).
        monitor: Validation metric for epoch selection, as for snella train; also the comparison metric if it is
            balanced_accuracy (classification), macro_f1 (multilabel) or accuracy (ordinal).
        train: Values of the `shared` settings, by name.
        execution: Which runs to train, and how.
    """

    shared: ClassVar[tuple[str, ...]] = (
        *("epochs", "batch_size", "img_size", "train_size", "val_size", "test_size", "augment", "head_init", "ema"),
        *("columns", "channels", "skip_corrupt", "weights", "pretrained", "device", "precision"),
    )
    """Settings of `TrainConfig` that are also options of compare. `workers` is excluded, because in compare it is the
    number of parallel runs."""

    out: str
    experiment: str | None = None
    methods: str | None = None
    data: str | None = None
    backbone: str | None = None
    seeds: int | None = None
    tune_seeds: int | None = None
    lr_factors: str | None = None
    weight_decays: str | None = None
    extensions: int | None = None
    reference: str | None = None
    forgetting: str | None = None
    task: Literal["classification", "multilabel", "ordinal", "regression"] | None = None
    monitor: str | None = None
    train: dict[str, Any] = field(default_factory=dict)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    @classmethod
    def command_options(cls) -> dict[str, Setting]:
        """Return the options: the fields, with the `shared` settings of `TrainConfig` instead of `train`."""
        options: dict[str, Setting] = {}
        train_settings = TrainConfig.settings()
        for name, setting in cls.settings().items():
            if name != "train":
                options[name] = setting
                continue
            for shared_name in cls.shared:
                shared = train_settings[shared_name]
                options[shared_name] = replace(shared, type=shared.type | None, default=None)
        return options

    @classmethod
    def from_flat(cls, **settings: Any) -> Self:
        """Create the settings from options, omitting shared settings that are None."""
        train: dict[str, Any] = {}
        for name in cls.shared:
            value = settings.pop(name, None)
            if value is not None:
                train[name] = value
        return super().from_flat(**settings, train=train)
