"""Method checks in closed form: Gaussian data, exact scores, the trainer's own functions, float64.

A student `x0 = A z + b` at side r gives `y = U(A z + b)`, Gaussian; teacher and fake score of Gaussians are affine.
Sigma points (as many symmetric points as make mean and covariance exact) turn batch means into exact expectations.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rmd.cascade import Cascade
from rmd.noise_schedule import RectifiedFlow
from rmd.size import Size
from rmd.upsampling import upsample
from training.distill.methods import RMD
from training.distill.methods.base import Matched, Scores, ScoreSample
from training.distill.settings import DistillSettings
from training.runtime.randomness import Randomness

F64 = torch.float64
LOW, FULL = Size(2, 2), Size(4, 4)


class GaussianBackbone:
    """Pixels as latents; every network predicts x0 by itself."""

    def __init__(self) -> None:
        self.schedule = RectifiedFlow()
        self.device = torch.device("cpu")

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return (1, size.height, size.width)

    def predict_x0(
        self, latents: Tensor, t: Tensor, conditioning: dict[str, Tensor], size: Size, denoiser: nn.Module | None = None
    ) -> Tensor:
        assert denoiser is not None
        return denoiser(latents.flatten(1), t).view_as(latents)  # type: ignore[no-any-return]

    def guided_x0(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: dict[str, Tensor],
        uncond: dict[str, Tensor] | None,
        scale: float,
        size: Size,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        assert scale == 1.0
        return self.predict_x0(latents, t, conditioning, size, denoiser)


class NoPrompts:
    def draw(self, random: Randomness, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def conditioning(self, rows: Tensor) -> dict[str, Tensor]:
        return {}

    def unconditional(self, count: int) -> dict[str, Tensor]:
        return {}


class GaussianScore(nn.Module):
    """The exact denoiser of N(mean, covariance): `m + alpha S (alpha^2 S + sigma^2)^-1 (x - alpha m)`."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.mean, self.covariance = mean, covariance

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (1 - t)[:, None], t[:, None]
        noised = alpha[..., None] ** 2 * self.covariance + sigma[..., None] ** 2 * torch.eye(len(self.mean), dtype=F64)
        residual = torch.linalg.solve(noised, x - alpha * self.mean)
        return self.mean + alpha * residual @ self.covariance


class LinearStudent(nn.Module):
    def __init__(self, size: int, seed: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(
            torch.eye(size, dtype=F64) + 0.2 * torch.randn(size, size, generator=generator, dtype=F64)
        )
        self.b = nn.Parameter(torch.randn(size, generator=generator, dtype=F64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x @ self.A.T + self.b


class SigmaPoints(Randomness):
    """Hands out, in turn, the parts of symmetric points over all the noise that one update draws."""

    def __init__(self, sizes: Sequence[int], tau: float) -> None:
        super().__init__(0, dtype=F64)
        total = sum(sizes)
        points = total**0.5 * torch.eye(total, dtype=F64)
        self.points = torch.cat([points, -points]).split(list(sizes), dim=1)
        self.calls, self.tau = 0, tau

    def normal(self, shape: Sequence[int]) -> Tensor:
        part = self.points[self.calls % len(self.points)]
        self.calls += 1
        return part.reshape(tuple(shape))

    def uniform(self, count: int) -> Tensor:
        return torch.full((count,), self.tau, dtype=F64)


def target_distribution(size: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=F64) / size**0.5
    return torch.randn(size, generator=generator, dtype=F64), 0.3 * torch.eye(size, dtype=F64) + root @ root.T


def lift(side: Size) -> Tensor:
    """The matrix of U from `side` to the full side."""
    count = side.width * side.height
    return upsample(torch.eye(count, dtype=F64).view(count, 1, side.height, side.width), (4, 4)).flatten(1).T


def rmd_method(side: Size, points: int, tau: float | None = None, loss: str = "squared") -> RMD:
    cascade = (
        Cascade.from_steps("gauss", [1000], [FULL])
        if side == FULL
        else Cascade.from_steps("gauss", [1000, 500], [LOW, FULL])
    )
    settings = DistillSettings(
        loss=loss, normalise=False, score_noise_intensity=0.0, batch_size=points, fake_weighting="none",
        low_stage_iterations=0,
    )  # fmt: skip
    method = RMD(GaussianBackbone(), cascade, settings, NoPrompts(), 1.0)
    if tau is not None:
        method.intervals[:] = tau
    return method


def matched_and_sample(method: RMD, student: nn.Module, random: Randomness) -> tuple[Matched, ScoreSample]:
    """What the trainer does before the losses, at the first step."""
    rollout = method.rollout(random)
    (matched,) = method.match(rollout.predict(student, method.states(rollout, student, [0])))
    return matched, method.score_sample(matched, random)


def student_moments(student: LinearStudent, U: Tensor) -> tuple[Tensor, Tensor]:
    return U @ student.b, U @ student.A @ student.A.T @ U.T


def kl_divergence(mean: Tensor, covariance: Tensor, target: tuple[Tensor, Tensor], tau: float) -> Tensor:
    """KL(student || teacher), both noised to tau."""
    alpha, sigma, eye = 1 - tau, tau, torch.eye(len(mean), dtype=F64)
    P, Q = alpha**2 * covariance + sigma**2 * eye, alpha**2 * target[1] + sigma**2 * eye
    gap = alpha * (mean - target[0])
    inverse = torch.linalg.inv(Q)
    return 0.5 * (torch.trace(inverse @ P) + gap @ inverse @ gap - len(mean) + torch.logdet(Q) - torch.logdet(P))


@pytest.mark.parametrize("side", [LOW, FULL], ids=["r<R", "r=R"])
@pytest.mark.parametrize("tau", [0.3, 0.8])
def test_the_generator_gradient_is_the_kl_gradient(side: Size, tau: float) -> None:
    pixels = side.width * side.height
    student, U, target = LinearStudent(pixels), lift(side), target_distribution(16)
    random = SigmaPoints([pixels, 16], tau=0.0)
    method = rmd_method(side, 2 * (pixels + 16), tau)
    matched, sample = matched_and_sample(method, student, random)
    fake = GaussianScore(*(moment.detach() for moment in student_moments(student, U)))
    loss, _ = method.generator_loss(matched, method.scores(matched, sample, GaussianScore(*target), fake), random)
    gradients = torch.autograd.grad(loss, [student.A, student.b])
    analytic = torch.autograd.grad(kl_divergence(*student_moments(student, U), target, tau), [student.A, student.b])
    # d = sigma^2/alpha (score_fake - score_real), dx/dy = alpha, and the squared loss divides by the dimension.
    scale = (tau / (1 - tau)) ** 2 / 16
    for gradient, expected in zip(gradients, analytic, strict=True):
        torch.testing.assert_close(gradient, scale * expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("loss", ["pseudo_huber", "squared"])
def test_each_samples_gradient_points_along_the_difference_of_scores(loss: str) -> None:
    student, U, target, tau = LinearStudent(4), lift(LOW), target_distribution(16), 0.6
    method = rmd_method(LOW, 12, tau, loss)
    matched, _ = matched_and_sample(method, student, Randomness(0, dtype=F64))
    y = matched.y.detach().requires_grad_()
    matched = Matched(matched.size, y, matched.eps, matched.steps, matched.rows)
    sample = method.score_sample(matched, Randomness(1, dtype=F64))
    mean, covariance = (moment.detach() for moment in student_moments(student, U))
    scores = method.scores(matched, sample, GaussianScore(*target), GaussianScore(mean, covariance))
    total, _ = method.generator_loss(matched, scores, Randomness(0))
    (gradient,) = torch.autograd.grad(total, y)
    x = sample.x.detach().flatten(1).requires_grad_()
    eye = tau**2 * torch.eye(16, dtype=F64)
    log_ratio = [
        torch.distributions.MultivariateNormal((1 - tau) * m, (1 - tau) ** 2 * s + eye).log_prob(x).sum()
        for m, s in ((mean, covariance), target)
    ]
    (scores,) = torch.autograd.grad(log_ratio[0] - log_ratio[1], x)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(1), scores)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-9, atol=1e-9)


def test_the_fake_scores_loss_is_least_at_the_exact_denoiser() -> None:
    student, U, tau = LinearStudent(4), lift(LOW), 0.4
    method = rmd_method(LOW, 2 * 20, tau)
    random = SigmaPoints([4, 16], tau=0.0)
    matched, sample = matched_and_sample(method, student, random)
    mean, covariance = (moment.detach() for moment in student_moments(student, U))
    gain = (1 - tau) * covariance @ torch.linalg.inv((1 - tau) ** 2 * covariance + tau**2 * torch.eye(16, dtype=F64))
    linear = nn.Linear(16, 16, dtype=F64)
    with torch.no_grad():
        linear.weight.copy_(gain)
        linear.bias.copy_(mean - (1 - tau) * gain @ mean)

    class Affine(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return linear(x)  # type: ignore[no-any-return]

    predicted = method.backbone.predict_x0(sample.x, sample.tau, {}, sample.size, Affine())
    loss = method.critic_loss(matched, None, random, Scores(sample, sample.y, predicted))
    for gradient in torch.autograd.grad(loss, [linear.weight, linear.bias]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def distil(method: RMD, student: LinearStudent, U: Tensor, target: tuple[Tensor, Tensor], updates: int) -> None:
    """Adam with a rate that falls to nothing, and the fake score at its optimum in every update."""
    pixels = student.b.numel()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (1 - n / updates) ** 2)
    draws = torch.Generator().manual_seed(0)
    for _ in range(updates):
        random = SigmaPoints([pixels, 16], tau=float(torch.rand((), generator=draws)))
        matched, sample = matched_and_sample(method, student, random)
        fake = GaussianScore(*(moment.detach() for moment in student_moments(student, U)))
        loss, _ = method.generator_loss(matched, method.scores(matched, sample, GaussianScore(*target), fake), random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def test_a_student_at_the_full_side_reaches_the_teachers_mean_and_covariance() -> None:
    target, student, U = target_distribution(16), LinearStudent(16), lift(FULL)
    method = rmd_method(FULL, 64)
    method.intervals[:] = torch.tensor(
        [0.25, 0.5], dtype=F64
    )  # where a covariance shows; any interval has this optimum
    distil(method, student, U, target, updates=300)
    mean, covariance = student_moments(student, U)
    torch.testing.assert_close(mean, target[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(covariance, target[1], rtol=0, atol=1e-3)


def test_a_low_side_student_reaches_the_minimiser_of_the_projected_kl() -> None:
    tau = 0.5
    target, student, U = target_distribution(16), LinearStudent(4), lift(LOW)
    distil(rmd_method(LOW, 40, tau), student, U, target, updates=300)
    # On the range of U, an orthonormal Q M: mean by weighted least squares, covariance where the precisions agree.
    alpha, sigma = 1 - tau, tau
    precision = torch.linalg.inv(alpha**2 * target[1] + sigma**2 * torch.eye(16, dtype=F64))
    b = torch.linalg.solve(U.T @ precision @ U, U.T @ precision @ target[0])
    Q, M = torch.linalg.qr(U)
    noised = torch.linalg.inv(Q.T @ precision @ Q)
    inverse = torch.linalg.inv(M)
    covariance = inverse @ (noised - sigma**2 * torch.eye(4, dtype=F64)) @ inverse.T / alpha**2
    torch.testing.assert_close(student.b.detach(), b, rtol=0, atol=1e-4)
    torch.testing.assert_close((student.A @ student.A.T).detach(), covariance, rtol=0, atol=1e-4)
