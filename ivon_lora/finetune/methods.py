"""What a training run does differently for each optimizer: wrapping, loss, step, ranks, state."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ivon_lora.finetune.model import encoder_linears, head_modules, wrap
from ivon_lora.finetune.settings import Settings, as_steps

__all__ = ["SCALING", "AdaLora", "AdamW", "Ivon", "Method", "make_method"]

SCALING = 2  # lora_alpha / rank: the update is B A times this
ORTHOGONALITY = 0.1  # weight of AdaLoRA's penalty, as in its paper (arXiv 2303.10512)


class Method(ABC):
    """A PEFT model and its optimizer. One step is `begin_step`, `loss`, backward, `finish_step`."""

    model: Any
    optimizer: torch.optim.Optimizer
    has_posterior = False
    #: that the schedule rises to; None: that of the settings, which an optimizer may have lowered
    peak_lr: float | None = None

    def begin_step(self) -> None:
        """Before the forward pass."""
        return None

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(what is minimised, mean cross-entropy of the batch in nats)."""
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = nn.functional.cross_entropy(logits.float(), batch["labels"])
        return loss, loss

    def finish_step(self, step: int) -> None:
        """After the backward pass of step number ``step`` (from 1): update, prune."""
        self.optimizer.step()

    @abstractmethod
    def budget(self, step: int) -> int:
        """Ranks, over all adapters, that the schedule allows after ``step`` steps."""

    @abstractmethod
    def kept_ranks(self) -> dict[str, int]:
        """Live ranks by path of the adapted layer."""

    def snr_quantiles(self, probabilities: tuple[float, ...]) -> list[float] | None:
        """Quantiles of |mean| / std over the elements of live ranks; None where there is no posterior."""
        return None

    def sampled_probabilities(self, forward: Callable[[], Tensor], samples: int) -> Tensor | None:
        """Class probabilities averaged over posterior samples; ``forward()`` gives logits. None without a posterior."""
        return None

    def metrics(self) -> dict[str, float]:
        """Numbers about the optimizer's state for the report."""
        return {}

    def state(self) -> dict[str, Any]:
        """What, beside parameters and optimizer state, a resumed run needs: plain values and tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        return None

    def save_adapter(self, folder: Path) -> dict[str, Any]:
        """Write an adapter that PeftModel.from_pretrained loads; returns facts about it for the report."""
        self.model.save_pretrained(folder, save_embedding_layers=False)
        return {}

    def save_posterior(self, path: Path) -> None:
        """Write mean and standard deviation of every trained parameter; only where `has_posterior`."""
        raise NotImplementedError(f"{type(self).__name__} has no posterior")

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def lora_config(base: nn.Module, rank: int) -> Any:
    """Plain LoRA on all linear layers of the encoder, head trained whole."""
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, lora_dropout=0.0, **_targets(base))


def adalora_config(base: nn.Module, settings: Settings) -> Any:
    """PEFT's AdaLoRA with the pruning schedule of the settings."""
    import peft

    return peft.AdaLoraConfig(
        init_r=settings.rank,
        target_r=settings.target_rank,
        lora_alpha=SCALING * settings.rank,
        lora_dropout=0.0,
        total_step=settings.steps,
        tinit=as_steps(settings.warmup, settings.steps),
        tfinal=as_steps(settings.final, settings.steps),
        deltaT=max(1, as_steps(settings.interval, settings.steps)),
        orth_reg_weight=ORTHOGONALITY,
        **_targets(base),
    )


class AdamW(Method):
    """Plain LoRA trained with torch's AdamW."""

    def __init__(self, base: nn.Module, settings: Settings) -> None:
        self.model = wrap(base, lora_config(base, settings.rank), settings.seed)
        self.optimizer = _adamw(self.trainable(), settings)
        self._ranks = dict.fromkeys(encoder_linears_of(self.model), settings.rank)

    def budget(self, step: int) -> int:
        return sum(self._ranks.values())

    def kept_ranks(self) -> dict[str, int]:
        return dict(self._ranks)


class AdaLora(Method):
    """PEFT's AdaLoRA: its sensitivity scores, its allocator, its orthogonality penalty, trained with AdamW."""

    def __init__(self, base: nn.Module, settings: Settings) -> None:
        self.model = wrap(base, adalora_config(base, settings), settings.seed)
        self.optimizer = _adamw(self.trainable(), settings)
        self._tuner = self.model.base_model
        self._config = self.model.peft_config["default"]
        self._initial = dict.fromkeys(encoder_linears_of(self.model), settings.rank)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        # with labels, PEFT adds the penalty to the loss: wanted here, and never asked for in evaluation
        output = self.model(**batch)
        data_loss = nn.functional.cross_entropy(output.logits.detach().float(), batch["labels"])
        return output.loss, data_loss

    def finish_step(self, step: int) -> None:
        self.optimizer.step()
        self._tuner.update_and_allocate(step)  # reads the gradients

    def budget(self, step: int) -> int:
        return int(self._tuner.rankallocator.budget_schedule(step)[0])

    def kept_ranks(self) -> dict[str, int]:
        kept = dict(self._initial)
        for key, mask in (self._config.rank_pattern or {}).items():
            kept[key.split(".lora_E")[0]] = sum(mask)
        return kept

    def save_adapter(self, folder: Path) -> dict[str, Any]:
        with warnings.catch_warnings():
            # PEFT takes the empty tensors of a layer without ranks for a failed gather; it loads them all the same
            warnings.filterwarnings("ignore", message=".*LoRA tensor.s. have invalid shape")
            return super().save_adapter(folder)

    def state(self) -> dict[str, Any]:
        allocator = self._tuner.rankallocator
        scores = {"ipt": allocator.ipt, "avg": allocator.exp_avg_ipt, "unc": allocator.exp_avg_unc}
        return {"scores": scores, "rank_pattern": self._config.rank_pattern}

    def load_state(self, state: dict[str, Any]) -> None:
        allocator = self._tuner.rankallocator
        allocator.ipt, allocator.exp_avg_ipt = state["scores"]["ipt"], state["scores"]["avg"]
        allocator.exp_avg_unc = state["scores"]["unc"]
        self._config.rank_pattern = state["rank_pattern"]


class Ivon(Method):
    """IVON with its pruner: one posterior sample a step, ranks pruned inside the optimizer's step.

    Args:
        examples: texts in the training set.
    """

    has_posterior = True

    def __init__(self, base: nn.Module, settings: Settings, examples: int) -> None:
        from ivon_lora.lora.adapters import find_adapters
        from ivon_lora.lora.rank_pruner import RankPruner
        from ivon_lora.optim.ivon import IVON

        triplets = settings.layers == "adalora"
        config = adalora_config(base, settings) if triplets else lora_config(base, settings.rank)
        self.model = wrap(base, config, settings.seed)
        self.pruner = RankPruner(
            find_adapters(self.model),
            settings.target_rank,
            criterion=settings.criterion,
            total_steps=settings.steps,
            warmup=settings.warmup,
            final=settings.final,
            interval=max(1, as_steps(settings.interval, settings.steps)),
        )
        self.optimizer: IVON
        if settings.recipe == "auto":
            self.optimizer = IVON.from_adamw(
                self.trainable().items(),
                lr=settings.lr,
                num_examples=examples,
                temperature=settings.temperature,
                weight_decay=settings.weight_decay,
                seed=settings.seed,
                pruner=self.pruner,
            )
            self.optimizer.attach(self.model)  # counts the batch
            return
        self.optimizer = IVON(
            self.trainable().items(),
            lr=settings.lr,
            ess=settings.ess,
            hess_init=settings.hess_init,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay or 0.0,
            clip_radius=settings.clip_radius,
            rescale_lr=False,
            seed=settings.seed,
            pruner=self.pruner,
        )

    def begin_step(self) -> None:
        self.optimizer.train()

    def budget(self, step: int) -> int:
        return self.pruner.budget(step)

    def kept_ranks(self) -> dict[str, int]:
        return {base_path(a.name): int(self.pruner.mask(a).sum()) for a in self.pruner.adapters}

    def snr_quantiles(self, probabilities: tuple[float, ...]) -> list[float] | None:
        elements = []
        for adapter in self.pruner.adapters:
            live = self.pruner.mask(adapter).nonzero().flatten()
            for _, tensor, dim in adapter.tensors():
                elements.append(thinned(self.optimizer.snr(tensor).index_select(dim, live).flatten()))
        ordered = torch.cat(elements).double().sort().values
        return [float(ordered[round(q * (len(ordered) - 1))]) for q in probabilities]

    def sampled_probabilities(self, forward: Callable[[], Tensor], samples: int) -> Tensor | None:
        from ivon_lora.posterior.predict import posterior_predict

        return posterior_predict(self.model, self.optimizer, lambda _: forward(), n_samples=samples)

    def metrics(self) -> dict[str, float]:
        return self.optimizer.metrics()

    def save_adapter(self, folder: Path) -> dict[str, Any]:
        from ivon_lora.export.adapter import export_lora

        report = export_lora(self.model, self.optimizer, folder)
        return {"max_abs_error": report.max_abs_error, "max_rank": report.max_rank, "notes": list(report.notes)}

    def save_posterior(self, path: Path) -> None:
        from ivon_lora.posterior.posterior import save_posterior

        save_posterior(self.optimizer, path)


def make_method(base: nn.Module, settings: Settings, examples: int) -> Method:
    """The method that ``settings.optimizer`` names, on ``base``, for a training set of ``examples`` texts."""
    if settings.optimizer == "ivon":
        method: Method = Ivon(base, settings, examples)
    else:
        method = AdamW(base, settings) if settings.optimizer == "adamw" else AdaLora(base, settings)
    method.peak_lr = float(method.optimizer.param_groups[0]["lr"])
    return method


def base_path(name: str) -> str:
    """A layer's path inside the base model, from its path inside the PeftModel."""
    return name.removeprefix("base_model.model.")


def thinned(x: Tensor) -> Tensor:
    """At most about 16384 elements on an even grid: enough for quantiles."""
    return x[:: max(1, x.numel() >> 14)]


def encoder_linears_of(model: Any) -> list[str]:
    """Paths, inside the base model, of the layers that PEFT adapted."""
    from ivon_lora.lora.adapters import find_adapters

    return [base_path(adapter.name) for adapter in find_adapters(model)]


def _targets(base: nn.Module) -> dict[str, Any]:
    return {
        "task_type": "SEQ_CLS",
        "target_modules": encoder_linears(base),
        "modules_to_save": head_modules(base),
    }


def _adamw(trainable: dict[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable.values(), lr=settings.lr, weight_decay=settings.weight_decay or 0.0)
