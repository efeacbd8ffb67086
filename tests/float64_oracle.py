"""The equations of the paper in float64 numpy, spelled as published: an oracle that shares no code with the package."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Ivon64:
    """One tensor under IVON (arXiv:2402.17641, Algorithm 1), Hessian line as published: not factored.

    With "fisher" the curvature is batch_size ghat^2, the Hessian line an exponential moving average, and the step
    Adam's (arXiv:1412.6980) with the second moment h / batch_size and a bounded pull of the prior, times prior_weight.
    """

    mean: np.ndarray
    lr: float
    ess: float
    hess_init: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99999
    weight_decay: float = 1e-4
    hess_approx: str = "price"
    clip_radius: float = np.inf
    debias: bool = True
    rescale_lr: bool = True
    batch_size: float = 1.0
    prior_weight: float = 1.0
    momentum: np.ndarray = field(init=False)
    hess: np.ndarray = field(init=False)
    t: int = 0

    def __post_init__(self) -> None:
        self.mean = np.asarray(self.mean, np.float64).copy()
        self.momentum = np.zeros_like(self.mean)
        self.hess = np.full_like(self.mean, self.hess_init)

    @property
    def sigma(self) -> np.ndarray:
        return 1 / np.sqrt(self.ess * (self.hess + self.weight_decay))

    def sample(self, eps: np.ndarray) -> np.ndarray:
        return self.mean + self.sigma * eps

    def step(self, grads: list[np.ndarray], epses: list[np.ndarray] | None) -> None:
        """One step from the gradients at the samples of ``epses``; None: at the mean, where the Hessian stays."""
        self.t += 1
        grad = np.mean(grads, axis=0)
        if epses is None:
            f = self.hess
        elif self.hess_approx == "price":
            f = np.mean([g * e / self.sigma for g, e in zip(grads, epses, strict=True)], axis=0)
        else:
            scale = self.ess if self.hess_approx == "gradsq" else self.batch_size
            f = scale * np.mean([g * g for g in grads], axis=0)
        rho = 1 - self.beta2
        self.momentum = self.beta1 * self.momentum + (1 - self.beta1) * grad
        correction = 0.0 if self.hess_approx == "fisher" else (self.hess - f) ** 2 / (self.hess + self.weight_decay)
        self.hess = self.beta2 * self.hess + rho * f + rho**2 / 2 * correction
        momentum = self.momentum / (1 - self.beta1**self.t) if self.debias else self.momentum
        if self.hess_approx == "fisher":
            divisor = np.sqrt(self.hess / self.batch_size) + 1e-8
            pull = self.prior_weight * np.minimum(self.weight_decay / divisor, 1.0)
            direction = momentum / divisor + pull * self.mean
        else:
            direction = (momentum + self.weight_decay * self.mean) / (self.hess + self.weight_decay)
        lr = self.lr * (self.hess_init + self.weight_decay) if self.rescale_lr else self.lr
        self.mean = self.mean - lr * np.clip(direction, -self.clip_radius, self.clip_radius)
