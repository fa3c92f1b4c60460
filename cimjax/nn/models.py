"""Networks by the names that configurations use."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from cimjax.nn.resnet import ResNet
from cimjax.nn.rules import ConvMaker
from cimjax.nn.small import SmallNet
from cimjax.spec.base import nearest
from cimjax.spec.rules import Rules

_LARGE = {"small_images": False, "widths": (64, 128, 256, 512), "shortcut": "projection"}
# A network and the options that its name stands for; options of a configuration come on top.
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "small": (SmallNet, {}),
    "resnet8": (ResNet, {"blocks": (1, 1, 1), "widths": (16, 32, 64)}),
    # CIFAR form: 0.27 M parameters with shortcuts of option A.
    "resnet20": (ResNet, {"blocks": (3, 3, 3), "widths": (16, 32, 64)}),
    # ImageNet form: 11.7 M and 25.6 M parameters with 1,000 classes.
    "resnet18": (ResNet, {"blocks": (2, 2, 2, 2), **_LARGE}),
    "resnet50": (ResNet, {"blocks": (3, 4, 6, 3), "bottleneck": True, **_LARGE}),
}


def build_model(name: str, *, classes: int, conv: ConvMaker, rules: Rules, **options: Any) -> nn.Module:
    """A network by name; `options` are its own fields, such as `width`.

    Raises:
      ValueError: for an unknown name or option, with the nearest valid one, or a refused value.
    """
    if name not in MODELS:
        raise ValueError(
            f"`model.name` is {name!r}{nearest(name, MODELS, otherwise_all=False)}; allowed: {', '.join(MODELS)}."
        )
    kind, preset = MODELS[name]
    fields = set(kind.__dataclass_fields__) - {"parent", "name", "classes", "conv", "rules", "axis_name"}
    for option in options:
        if option not in fields:
            known = ", ".join(sorted(fields))
            raise ValueError(
                f"`model.{option}` is no option of {name!r}{nearest(option, fields, otherwise_all=False)}; "
                f"it has: {known}."
            )
    return kind(classes=classes, conv=conv, rules=rules, **preset | options)
