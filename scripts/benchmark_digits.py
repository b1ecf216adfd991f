"""The digits job beside a PyTorch twin: training and guided sampling, in images a second.

The twin is diffusers' `UNet2DModel` of equal depth, width and (within 10 %) parameter count, with the same objective,
optimiser, parameter average, batch and threads, in both of PyTorch's memory formats (and, on request, under
torch.compile); the fastest of its eager candidates is what the ratio is taken against.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from measuring import Settings, Task, matmul_peak, measure

NUM_CLASSES, NUM_DOMAINS = 10, 2


@dataclass(frozen=True)
class Digits(Settings):
    """Time the pixel UNet of the digits job: train steps, and DDIM with classifier-free guidance."""

    preset: Literal["small", "base"] = "small"
    """Preset of jaxdiff.models.unet; tiny has no twin, because diffusers' UNet folds no pixels into channels."""
    image_size: int = 16
    """Height and width in pixels."""
    batch_size: int = 64
    """Images of a training step, and images sampled at once (guidance doubles them)."""
    num_steps: int = 50
    """DDIM steps."""
    train_steps: int = 3
    """Training steps in one measurement."""
    torch_compile: bool = False
    """Also time torch.compile (needs a C++ compiler; adds minutes)."""


class Ours:
    """The preset under the very functions that the commands run."""

    def __init__(self, config: Digits):
        import jax
        import numpy as np

        from jaxdiff.io.datasets import Batch
        from jaxdiff.mesh import make_mesh, put_batch
        from jaxdiff.recipes.conditional import Condition, build_conditional_model
        from jaxdiff.recipes.objective import make_diffusion_loss
        from jaxdiff.recipes.sampling import make_sampler
        from jaxdiff.recipes.training import create_state, make_optimizer, make_train_step
        from jaxdiff.settings import DiffusionSettings, SamplingSettings, TrainingSettings

        self.config, self.jax = config, jax
        mesh, shape = make_mesh(1), (config.image_size, config.image_size, 3)
        diffusion = DiffusionSettings()
        names = tuple(map(str, range(NUM_CLASSES))), tuple(map(str, range(NUM_DOMAINS)))
        model = build_conditional_model(config.preset, "float32", diffusion, shape, *names)
        self.unet = model.network.config
        optimizer, _ = make_optimizer(1e-3, 100, 10_000, 0.01, 1.0)
        self.state = create_state(model.init(jax.random.key(0)), optimizer, jax.random.key(1), mesh)
        loss = make_diffusion_loss(model, diffusion, TrainingSettings())
        self.train_step = make_train_step(loss, optimizer, mesh, ema_decay=0.995)
        draws = np.random.default_rng(0)
        labels = draws.integers(0, NUM_CLASSES, config.batch_size, dtype=np.int32)
        domains = draws.integers(0, NUM_DOMAINS, config.batch_size, dtype=np.int32)
        images = draws.integers(0, 256, (config.batch_size, *shape), dtype=np.uint8)
        self.batch = put_batch(Batch(images, labels, domains), mesh)
        self.condition = put_batch(Condition(labels, domains), mesh)
        sampling = SamplingSettings(num_steps=config.num_steps, guidance_scale=2.0)
        self.sampler = make_sampler(model, sampling, mesh)
        self.keys = put_batch(np.arange(config.batch_size), mesh)
        self.keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(self.keys)

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in self.jax.tree.leaves(self.state.params))

    def train(self) -> None:
        """Take the measured number of training steps."""
        for _ in range(self.config.train_steps):
            self.state, metrics = self.train_step(self.state, self.batch)
        self.jax.block_until_ready((self.state, metrics))

    def sample(self) -> None:
        """Sample one batch with guidance."""
        self.sampler(self.state.ema_params, self.keys, self.condition).block_until_ready()


class Theirs:
    """diffusers' UNet2DModel of the same numbers, trained and sampled as a careful PyTorch user would."""

    def __init__(self, config: Digits, unet, channels_last: bool, compiled: bool):
        import torch
        from diffusers import UNet2DModel

        self.config, self.torch = config, torch
        down = tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in unet.attention)
        torch.manual_seed(0)
        self.model = UNet2DModel(
            sample_size=config.image_size,
            in_channels=unet.in_channels,
            out_channels=unet.out_channels,
            block_out_channels=unet.block_out_channels,
            layers_per_block=unet.layers_per_block,
            down_block_types=down,
            up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
            attention_head_dim=unet.attention_head_dim,
            norm_num_groups=unet.norm_num_groups,
            norm_eps=unet.norm_eps,
            dropout=unet.dropout,
            num_class_embeds=(NUM_CLASSES + 1) * (NUM_DOMAINS + 1),
        )
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = self.model.to(memory_format=self.format)
        self.parameters = list(self.model.parameters())
        self.ema = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, betas=(0.9, 0.99), fused=True)
        angles = (torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2
        alphas_cumprod = (angles[1:].cos() ** 2 / angles[0].cos() ** 2).clamp(1e-5, 1).float()
        self.alphas, self.sigmas = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        self.shape = (config.batch_size, 3, config.image_size, config.image_size)
        self.pixels = torch.randint(0, 256, self.shape, dtype=torch.uint8).to(memory_format=self.format)
        self.labels = torch.randint(0, self.model.config.num_class_embeds - 1, self.shape[:1])
        self.null = torch.full_like(self.labels, self.model.config.num_class_embeds - 1)
        self.network = torch.compile(self.model) if compiled else self.model

    def loss(self):
        """Return the velocity loss of the batch, with its conditions dropped at random."""
        torch, batch = self.torch, self.config.batch_size
        x_0 = self.pixels.float() / 127.5 - 1
        t = torch.randint(0, 1000, (batch,))
        eps = torch.randn(self.shape).to(memory_format=self.format)
        labels = torch.where(torch.rand(batch) < 0.2, self.null, self.labels)
        alpha_t, sigma_t = self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)
        v = self.network(alpha_t * x_0 + sigma_t * eps, t, labels).sample
        return torch.nn.functional.mse_loss(v, alpha_t * eps - sigma_t * x_0)

    def train(self) -> None:
        """Take the measured number of training steps."""
        torch = self.torch
        for _ in range(self.config.train_steps):
            loss = self.loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.parameters, 0.005)
        loss.item()

    def sample(self) -> None:
        """Sample one batch by DDIM, both halves of the guidance in one call of the network."""
        torch = self.torch
        steps = torch.linspace(999, 0, self.config.num_steps).round().long().tolist()
        with torch.inference_mode():
            x_t = torch.randn(self.shape).to(memory_format=self.format)
            labels = torch.cat([self.null, self.labels])
            for t, s in zip(steps, [*steps[1:], None]):
                alpha_t, sigma_t = self.alphas[t], self.sigmas[t]
                v = self.network(torch.cat([x_t, x_t]), torch.full(labels.shape, t), labels).sample
                v_uncond, v_cond = v.chunk(2)
                v = torch.lerp(v_uncond, v_cond, 2.0)
                x_0 = (alpha_t * x_t - sigma_t * v).clamp(-1, 1)
                eps = (x_t - alpha_t * x_0) / sigma_t
                x_t = x_0 if s is None else self.alphas[s] * x_0 + self.sigmas[s] * eps

    def flops(self, call: Callable[[], Any]) -> int:
        """Return what PyTorch's counter adds up: two for each multiply-add of convolutions and matrix products."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()


def compare(config: Digits) -> dict[str, Any]:
    """Run the whole comparison and return its figures under flat names."""
    import torch

    torch.set_num_threads(config.threads)
    ours = Ours(config)
    theirs = {"eager": Theirs(config, ours.unet, channels_last=False, compiled=False)}
    theirs["eager_channels_last"] = Theirs(config, ours.unet, channels_last=True, compiled=False)
    if config.torch_compile:
        theirs["compiled"] = Theirs(config, ours.unet, channels_last=False, compiled=True)
    twin_parameters = sum(parameter.numel() for parameter in theirs["eager"].parameters)
    difference = abs(twin_parameters / ours.parameters - 1)
    print(f"parameters: jaxdiff {ours.parameters:,}, PyTorch twin {twin_parameters:,} ({difference:.1%} apart)")
    if difference > 0.1:
        raise ValueError("the twin's parameter count must be within 10 %: one of the two has another layout")
    peak = matmul_peak(config.repeats)
    results: dict[str, Any] = {
        "parameters.jaxdiff": ours.parameters,
        "parameters.torch": twin_parameters,
        "peak_gflops.torch": peak["torch"],
        "peak_gflops.jax": peak["jax"],
    }
    print(f"matmul peak: torch.mm {peak['torch']:.0f}, jnp.dot {peak['jax']:.0f} GFLOP/s (float32)")
    for job, images in (("train", config.batch_size * config.train_steps), ("sample", config.batch_size)):
        tasks = [Task("jaxdiff", getattr(ours, job), images)]
        tasks += [Task(name, getattr(side, job), images) for name, side in theirs.items()]
        rates = measure(tasks, config.repeats)
        eager = max(rates["eager"], rates["eager_channels_last"])
        flops_per_image = theirs["eager"].flops(getattr(theirs["eager"], job)) / images
        share = rates["jaxdiff"] * flops_per_image / 1e9 / max(peak.values())
        print(f"\n{job}: {flops_per_image / 1e9:.3f} GFLOP an image (PyTorch's counter, for both sides)")
        for name, rate in rates.items():
            print(f"  {name:20s} {rate:8.1f} images/s   jaxdiff is {rates['jaxdiff'] / rate:.2f} times as fast")
            results[f"{job}.images_per_second.{name}"] = rate
        print(f"  jaxdiff / best eager {rates['jaxdiff'] / eager:.2f};  share of the matmul peak {share:.0%}")
        results[f"{job}.ratio_to_eager"] = rates["jaxdiff"] / eager
        results[f"{job}.gflop_per_image"] = flops_per_image / 1e9
        results[f"{job}.share_of_peak"] = share
    return results
