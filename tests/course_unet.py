"""The course's face UNet in torch, written from its manifest: the same modules under the same names, of any width."""

import math

import torch
from torch import nn


class Frequencies(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        steps = torch.arange(0, features, 2, dtype=torch.float32)
        self.register_buffer("inv_freq", torch.exp(steps * (-math.log(10_000) / features)))

    def forward(self, t):
        angles = torch.outer(t.float(), self.inv_freq)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time, outputs))
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, embedding):
        hidden = self.conv1(nn.functional.silu(self.norm1(x))) + self.time(embedding)[:, :, None, None]
        hidden = self.conv2(nn.functional.silu(self.norm2(hidden)))
        return hidden + (self.skip(x) if hasattr(self, "skip") else x)


class Attention(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        query, key, value = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = torch.softmax(query.transpose(1, 2) @ key / math.sqrt(x.shape[1]), dim=-1)
        return x + self.out((value @ weights.transpose(1, 2)).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int, groups: int, attends: bool):
        super().__init__()
        self.resblocks = Residual(inputs, outputs, time, groups)
        if attends:
            self.attention = Attention(outputs, groups)

    def forward(self, x, embedding):
        x = self.resblocks(x, embedding)
        return self.attention(x) if hasattr(self, "attention") else x


class CourseUNet(nn.Module):
    """Two residual blocks a level, attention at the level before the lowest, modules numbered as they are called."""

    def __init__(self, widths=(128, 128, 256, 256, 512, 512), groups: int = 32):
        super().__init__()
        base, time, attends = widths[0], 4 * widths[0], len(widths) - 2
        self.time = nn.Sequential(Frequencies(base), nn.Linear(base, time), nn.SiLU(), nn.Linear(time, time))
        down: list[nn.Module] = [nn.Conv2d(3, base, 3, padding=1)]
        skips = [base]
        for level, width in enumerate(widths):
            for _ in range(2):
                down.append(Block(skips[-1], width, time, groups, level == attends))
                skips.append(width)
            if level < len(widths) - 1:
                down.append(nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1)))
                skips.append(width)
        self.mid1 = Block(widths[-1], widths[-1], time, groups, True)
        self.mid2 = Block(widths[-1], widths[-1], time, groups, False)
        up: list[nn.Module] = []
        inputs = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(3):
                up.append(Block(inputs + skips.pop(), width, time, groups, level == attends))
                inputs = width
            if level:
                up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)))
        self.out = nn.Sequential(nn.GroupNorm(groups, base), nn.SiLU(), nn.Conv2d(base, 3, 3, padding=1))
        for name, modules in (("down", down), ("up", up)):
            for number, module in enumerate(modules, start=1):
                self.add_module(f"{name}{number}", module)
        self.order = len(down), len(up)

    def forward(self, x, t):
        embedding = self.time(t)
        skips = []
        for number in range(1, self.order[0] + 1):
            module = getattr(self, f"down{number}")
            x = module(x, embedding) if isinstance(module, Block) else module(x)
            skips.append(x)
        x = self.mid2(self.mid1(x, embedding), embedding)
        for number in range(1, self.order[1] + 1):
            module = getattr(self, f"up{number}")
            x = module(torch.cat([x, skips.pop()], dim=1), embedding) if isinstance(module, Block) else module(x)
        return self.out(x)
