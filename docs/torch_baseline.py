"""What docs/speed.md compares steps on a CPU with: ResNet-20 in PyTorch, one training step on CPU.

    python -m venv torch-env && torch-env/bin/pip install torch==2.13.0 numpy
    torch-env/bin/python docs/torch_baseline.py --batch 64 --runs 10

The same network as `resnet20` here (He et al. 2016, CIFAR form, shortcuts of option A), SGD with Nesterov momentum, in
PyTorch's default layout and in channels-last, of which the quicker counts.

With `--authors CLONE` the step of the paper's authors' network instead, by their code, of a clone at the last commit
whose convolution is the paper's, with the import that it lacks. It needs matplotlib, and takes no channels-last:

    git clone https://github.com/jiyoonkm/ColumnQuant && cd ColumnQuant
    git checkout 2cdd78e && git checkout 3792fc8 utils.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

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


def authors_network(clone: Path, bits: int, cell_bits: int) -> nn.Module:
    """Their `ResNet20_arr` with steps for each column and 3-bit ADCs in arrays of 128 x 128."""
    sys.path.insert(0, str(clone))
    import resnet_quan

    columns = {"w_mode": "Array", "w_per_ch": True, "psum_mode": "Array", "ps_per_ch": True, "psumOpt": True}
    widths = {"a_bit": bits, "w_bit": bits, "split_bit": cell_bits, "ps_bit": 3, "num_sigma": 6, "arr_size": 128}
    return resnet_quan.ResNet20_arr(block=resnet_quan.BasicBlock_arr, isRow=True, expand=1, **widths, **columns)


def times_of_steps(model: nn.Module, batch: int, runs: int, layout: torch.memory_format) -> list[float]:
    """Seconds of each of `runs` steps, after two to warm up."""
    torch.manual_seed(0)
    model = model.to(memory_format=layout)
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
    parser.add_argument("--authors", type=Path, metavar="CLONE", help="time the networks of this clone instead")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {arguments.batch}")
    layouts = {"default": torch.contiguous_format, "channels-last": torch.channels_last}
    networks = {name: (ResNet20(), layout) for name, layout in layouts.items()}
    if arguments.authors:
        widths = {"W3 in 1-bit cells": (3, 1), "W4 in 2-bit cells": (4, 2)}
        networks = {
            name: (authors_network(arguments.authors, *bits), torch.contiguous_format) for name, bits in widths.items()
        }
    for name, (model, layout) in networks.items():
        times = times_of_steps(model, arguments.batch, arguments.runs, layout)
        low, high = 1e3 * min(times), 1e3 * max(times)
        weights = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:17} {1e3 * statistics.median(times):7.1f} ms ({low:.1f}-{high:.1f}), {weights:,} parameters")


if __name__ == "__main__":
    main()
