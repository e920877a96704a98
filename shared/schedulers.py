# SPDX-License-Identifier: Apache-2.0
"""Deterministic samplers for the noise schedules of MONAI core, with timesteps that do not depend on its version."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import torch
from monai.networks.schedulers import Scheduler
from monai.utils import StrEnum

from shared.diffusion import PredictionType


class TimestepSpacing(StrEnum):
    """How ``n`` timesteps are laid out in ``[0, T)``; every spacing starts at ``T - 1`` and ends at ``alpha_bar = 1``.

    ``trailing`` counts down from ``T - 1`` by ``T / n`` (arXiv:2305.08891, table 2): 50 of 1000 are 999, 979, ..., 19.
    ``linspace`` divides ``[0, T - 1]`` into ``n`` equal parts and leaves 0 out: 999, 979, ..., 20.
    ``karras`` places the noise levels ``sigma = sqrt(1 / alpha_bar - 1)`` evenly in ``sigma ** (1 / 7)`` between the
    schedule's largest and smallest (arXiv:2206.00364, equation 5) and takes the timestep nearest to each.
    """

    TRAILING = "trailing"
    LINSPACE = "linspace"
    KARRAS = "karras"


KARRAS_RHO = 7.0  # arXiv:2206.00364, equation 5


def _trailing(num_train_timesteps: int, n: int) -> list[int]:
    return [round(num_train_timesteps * (n - i) / n) - 1 for i in range(n)]


def _check_steps(num_inference_steps: int, num_train_timesteps: int) -> int:
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps: expected 1 to {num_train_timesteps}, the steps of training, "
            f"got {num_inference_steps}."
        )
    return int(num_inference_steps)


def diffusion_timesteps(scheduler: Scheduler, num_inference_steps: int) -> list[int]:
    """Prepare ``scheduler`` for a new sample and return its timesteps, noisiest first.

    A scheduler of this module keeps its own spacing. Any other MONAI scheduler gets the ``trailing`` one: core's
    ``set_timesteps(50)`` gives [980, 960, ..., 0] in 1.4-1.5 and [999, 979, 958, ..., 0] in 1.6, while its ``step``
    always goes down by ``T // n``; only when ``n`` divides ``T`` do both agree, and then ``trailing`` is what they
    agree on: one step is [999] and the last step arrives at ``alpha_bar = 1``.

    Raises:
        ValueError: when ``num_inference_steps`` is outside 1 to ``T``, or does not divide ``T`` for a core scheduler.
    """
    n = _check_steps(num_inference_steps, scheduler.num_train_timesteps)
    scheduler.set_timesteps(n)  # type: ignore[operator]
    if not isinstance(scheduler, DeterministicScheduler):
        total = scheduler.num_train_timesteps
        if total % n:
            raise ValueError(
                f"num_inference_steps: expected a divisor of {total} for {type(scheduler).__name__}, got {n}: "
                "its steps would not end at alpha_bar = 1. Use shared.schedulers.DDIMScheduler, which takes any number."
            )
        scheduler.timesteps = torch.tensor(_trailing(total, n))
    return [int(t) for t in scheduler.timesteps]


class DeterministicScheduler(Scheduler):
    """What DDIM and DPM-Solver++ share: noise levels, their spacing, and the prediction turned into the clean sample.

    ``x_t = alpha_t x_0 + sigma_t eps``, where ``alpha_t = sqrt(alpha_bar_t)`` and ``sigma_t = sqrt(1 - alpha_bar_t)``.
    The coefficients are Python numbers from float64, so that a step never waits for the GPU; the step itself runs in
    float32 at least.

    Args:
        num_train_timesteps: ``T`` of training.
        schedule: name in ``monai.networks.schedulers.NoiseSchedules``.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.
        spacing: a ``TimestepSpacing``.
        schedule_args: arguments of the schedule, such as ``beta_start`` and ``beta_end``.

    Raises:
        ValueError: for an unknown ``prediction_type`` or ``spacing``.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        schedule: str = "linear_beta",
        *,
        prediction_type: str = PredictionType.EPSILON,
        spacing: str = TimestepSpacing.TRAILING,
        **schedule_args: float,
    ) -> None:
        super().__init__(num_train_timesteps, schedule, **schedule_args)
        for name, value, known in (
            ("prediction_type", prediction_type, list(PredictionType)),
            ("spacing", spacing, list(TimestepSpacing)),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}; correct the scheduler.")
        self.prediction_type = PredictionType(prediction_type)
        self.spacing = TimestepSpacing(spacing)
        # Kept apart from alphas_cumprod, which add_noise moves to the dtype of the samples.
        alpha_bar = self.alphas_cumprod.double()
        self._sigma_ratio = torch.sqrt((1.0 - alpha_bar) / alpha_bar).tolist()  # sigma_t / alpha_t, by timestep
        self._log_ratio = [math.log(ratio) for ratio in self._sigma_ratio]
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lay out the timesteps and forget the previous sample; to be called before each sample.

        Raises:
            ValueError: when ``num_inference_steps`` is outside 1 to ``T``.
        """
        n = _check_steps(num_inference_steps, self.num_train_timesteps)
        last = self.num_train_timesteps - 1
        if self.spacing == TimestepSpacing.KARRAS:
            ratios = self._karras_ratios(n)
            timesteps = [self._nearest_timestep(ratio) for ratio in ratios]
        else:
            timesteps = (
                _trailing(self.num_train_timesteps, n)
                if self.spacing == TimestepSpacing.TRAILING
                else [round(last * (n - i) / n) for i in range(n)]
            )
            ratios = [self._sigma_ratio[t] for t in timesteps]
        self.num_inference_steps = n
        self.timesteps = torch.tensor(timesteps, device=device)
        self._plan = timesteps
        # The level after the last step is the clean image: sigma = 0, alpha_bar = 1.
        self._levels = [(1.0 / math.hypot(1.0, ratio), ratio / math.hypot(1.0, ratio)) for ratio in (*ratios, 0.0)]
        self._position = 0

    def start_from(self, clean: torch.Tensor, noise: torch.Tensor, start: float) -> tuple[torch.Tensor, list[int]]:
        """Noise an estimate to a level on the way, to be called after ``set_timesteps`` (arXiv:2112.05146).

        Args:
            clean: estimate of ``x_0``.
            noise: standard normal, same shape.
            start: share of the training timesteps in (0, 1]; the sample begins at the first timestep of the plan below
                ``start * T``; at least one step is left. 1 begins at the noisiest level.

        Returns:
            ``x`` at that level and the timesteps that remain.
        """
        limit = start * self.num_train_timesteps
        skipped = min(sum(timestep >= limit for timestep in self._plan), len(self._plan) - 1)
        self._position = skipped
        alpha, sigma = self._levels[skipped]
        return alpha * clean + sigma * noise, self._plan[skipped:]

    def _karras_ratios(self, n: int) -> list[float]:
        start, stop = (ratio ** (1.0 / KARRAS_RHO) for ratio in (self._sigma_ratio[-1], self._sigma_ratio[0]))
        return [(start + (stop - start) * i / max(n - 1, 1)) ** KARRAS_RHO for i in range(n)]

    def _nearest_timestep(self, ratio: float) -> int:
        """Timestep whose log noise level is nearest, interpolated between the two neighbours and then rounded."""
        logs = self._log_ratio
        target = math.log(ratio)
        upper = min(max(bisect_right(logs, target), 1), len(logs) - 1)
        fraction = (target - logs[upper - 1]) / (logs[upper] - logs[upper - 1])
        return round(upper - 1 + min(max(fraction, 0.0), 1.0))

    def _advance(self, timestep: int | torch.Tensor) -> int:
        """Position of this step in the plan; the solvers use neighbouring levels, so steps must come in order."""
        position = self._position
        expected = self._plan[position] if position < len(self._plan) else None
        if expected != int(timestep):
            raise ValueError(
                f"timestep: expected {'set_timesteps before a new sample' if expected is None else expected}, got "
                f"{int(timestep)}; call set_timesteps once per sample and step through `timesteps` in order."
            )
        self._position = position + 1
        return position

    def _clean_sample(self, model_output: torch.Tensor, sample: torch.Tensor, position: int) -> torch.Tensor:
        """``x_0`` from what the network predicts at this level."""
        alpha, sigma = self._levels[position]
        if self.prediction_type == PredictionType.EPSILON:
            return (sample - sigma * model_output) / alpha
        if self.prediction_type == PredictionType.V_PREDICTION:
            return alpha * sample - sigma * model_output
        return model_output

    def _float32(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


class DDIMScheduler(DeterministicScheduler):
    """Deterministic DDIM (arXiv:2010.02502, equation 12 with eta = 0), for any number of steps.

    ``monai.networks.schedulers.DDIMScheduler`` does not fit: since 1.6 it lays the timesteps out by ``linspace`` but
    still steps down by ``T // n``, so the latent has another noise level than the network is told (at 50 steps
    959 against 958). Fed the true velocity it misses ``x_0`` by 0.1 at 50 steps and 0.5 at 300; here by less than 1e-5.
    Here each step goes to the level of the next timestep.
    """

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Go to the next noise level.

        Args:
            model_output: prediction of the network at ``timestep``, same shape as ``sample``.
            timestep: next entry of ``timesteps``.
            sample: ``x_t``.

        Returns:
            ``x`` at the next level and the predicted clean sample ``x_0``.

        Raises:
            ValueError: when ``timestep`` is not the next one.
        """
        model_output, sample = self._float32((model_output, sample))
        position = self._advance(timestep)
        clean = self._clean_sample(model_output, sample, position)
        (alpha, sigma), (next_alpha, next_sigma) = self._levels[position], self._levels[position + 1]
        # Predicted noise is not recomputed: at the first levels that would amplify the rounding of ``clean``.
        is_noise = self.prediction_type == PredictionType.EPSILON
        noise = model_output if is_noise else (sample - alpha * clean) / sigma
        return next_alpha * clean + next_sigma * noise, clean


class DPMSolverMultistepScheduler(DeterministicScheduler):
    """Second-order multistep DPM-Solver++ (2M), algorithm 2 of arXiv:2211.01095; MONAI core has no such solver.

    With ``lambda = log(alpha / sigma)`` and ``h = lambda_next - lambda``, the clean sample is extrapolated linearly in
    ``lambda`` from the previous step (equation 14) and the exact solution of the linear part applied. The first step
    and the last, where ``lambda`` becomes infinite, are first order, which is DDIM. The remaining options of other
    implementations (order 3, SDE variants, thresholding, a first-order tail for few steps) are left out: with the last
    level at ``sigma = 0`` the last step is first order anyway.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self._previous: torch.Tensor | None = None

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Go to the next noise level.

        Args:
            model_output: prediction of the network at ``timestep``, same shape as ``sample``.
            timestep: next entry of ``timesteps``.
            sample: ``x_t``.

        Returns:
            ``x`` at the next level and the predicted clean sample ``x_0`` of this step.

        Raises:
            ValueError: when ``timestep`` is not the next one: the solver remembers the previous step.
        """
        model_output, sample = self._float32((model_output, sample))
        position = self._advance(timestep)
        clean = self._clean_sample(model_output, sample, position)
        (alpha, sigma), (next_alpha, next_sigma) = self._levels[position], self._levels[position + 1]
        target = clean
        if self._previous is not None and next_sigma > 0.0:
            before_alpha, before_sigma = self._levels[position - 1]
            h = math.log(next_alpha * sigma / (next_sigma * alpha))
            h_before = math.log(alpha * before_sigma / (sigma * before_alpha))
            if h_before > 0.0:  # linspace with as many steps as training has repeats a timestep by rounding
                target = clean + (0.5 * h / h_before) * (clean - self._previous)
        self._previous = clean
        # exp(-h), written so that it is 0 at the last step instead of a difference of infinities.
        decay = alpha * next_sigma / (next_alpha * sigma)
        return (next_sigma / sigma) * sample + next_alpha * (1.0 - decay) * target, clean
