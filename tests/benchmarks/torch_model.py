"""DiT and its loss in PyTorch, from torch.nn layers; parameters carry the published names. For `torch_dit`."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from diffjax.diffusion.gaussian import GaussianDiffusion


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(width, heads), Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, width: int, features: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(modulate(self.norm(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class LabelEmbed(nn.Module):
    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y):
        return self.embedding_table(y)


class TorchDiT(nn.Module):
    """DiT for 32 x 32 x 4 latents, 1000 classes and a null class; x [b, c, h, w] -> [b, 2c, h, w].

    Every weight is drawn at random, so that no part of the gradient is zero (and none is a slow denormal).
    """

    def __init__(self, patch: int, depth: int, width: int, heads: int):
        super().__init__()
        self.patch, self.side = patch, 32 // patch
        self.x_embedder, self.t_embedder = PatchEmbed(patch, 4, width), TimeEmbed(width)
        self.y_embedder = LabelEmbed(1001, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch * patch * 8)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.register_buffer("pos_embed", self.position_table(width))

    def position_table(self, width: int) -> torch.Tensor:
        frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        row, column = torch.meshgrid(*[torch.arange(self.side, dtype=torch.float64)] * 2, indexing="ij")
        angles = [position.reshape(-1, 1) * frequencies for position in (column, row)]
        return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        b, p, s = len(x), self.patch, self.side
        return x.reshape(b, s, s, p, p, 8).permute(0, 5, 1, 3, 2, 4).reshape(b, 8, s * p, s * p)


class TorchLoss:
    """Mean over the batch of squared error plus variational bound, for steps k > 0 (see `diffusion.gaussian`)."""

    def __init__(self, process: GaussianDiffusion):
        self.process = process

    def at(self, table, k):
        return torch.from_numpy(table)[k].float()[:, None, None, None]

    def posterior_mean(self, x0, xt, k):
        process = self.process
        return self.at(process.posterior_mean_coef1, k) * x0 + self.at(process.posterior_mean_coef2, k) * xt

    def __call__(self, model, x0, eps, k, y):
        process, at = self.process, self.at
        xt = at(process.sqrt_alphas_cumprod, k) * x0 + at(process.sqrt_one_minus_alphas_cumprod, k) * eps
        prediction, v = model(xt, k, y).chunk(2, dim=1)
        frozen = prediction.detach()
        x0_hat = at(process.sqrt_recip_alphas_cumprod, k) * xt - at(process.sqrt_recipm1_alphas_cumprod, k) * frozen
        small, large = at(process.posterior_log_variance_clipped, k), torch.log(at(process.betas, k))
        log_variance = (v + 1) / 2 * large + (1 - v) / 2 * small
        difference = self.posterior_mean(x0, xt, k) - self.posterior_mean(x0_hat, xt, k)
        kl = 0.5 * (
            -1.0 + log_variance - small + torch.exp(small - log_variance) + difference**2 * torch.exp(-log_variance)
        )
        return F.mse_loss(prediction, eps) + kl.mean() / math.log(2.0)
