"""The full-precision step that the README's table is compared with: ResNet-20 in PyTorch, one training step on CPU.

    python -m venv torch-env && torch-env/bin/pip install torch==2.13.0 numpy
    torch-env/bin/python docs/torch_baseline.py --batch 64 --runs 10

The same network as `resnet20` here (He et al. 2016, CIFAR form, shortcuts of option A), SGD with Nesterov momentum, in
PyTorch's default layout and in channels-last, of which the quicker counts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride, self.missing = stride, width - channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.missing:
            half = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.missing - half))
        return F.relu(y + x)


class ResNet20(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        blocks, channels = [], 16
        for stage, width in enumerate((16, 32, 64)):
            for index in range(3):
                blocks.append(Block(channels, width, 2 if stage and not index else 1))
                channels = width
        self.blocks, self.classifier = nn.Sequential(*blocks), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def median_step(batch: int, runs: int, layout: torch.memory_format) -> list[float]:
    """Seconds of each of `runs` steps, after two to warm up."""
    torch.manual_seed(0)
    model = ResNet20().to(memory_format=layout)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=layout)
    labels = torch.randint(0, 10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    seconds = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {arguments.batch}")
    for name, layout in (("default", torch.contiguous_format), ("channels-last", torch.channels_last)):
        times = median_step(arguments.batch, arguments.runs, layout)
        low, high = 1e3 * min(times), 1e3 * max(times)
        print(f"{name:14} {1e3 * statistics.median(times):7.1f} ms ({low:.1f}-{high:.1f})")


if __name__ == "__main__":
    main()
