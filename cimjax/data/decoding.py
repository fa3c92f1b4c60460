"""From the bytes of an image file to the square of pixels that a network is given: random crops, and the central one.

Nothing is read from disk here, and nothing is normalised: pixels stay uint8 until they are on the device.
"""

from __future__ import annotations

import dataclasses
import io
import math
import threading
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# What is tried on an image: other formats of pillow are no photographs, and some of them run other programs.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
# The shorter side after resizing over that of the central crop, 256 over 224 (He et al., CVPR 2016, section 4.1).
_MARGIN = 256 / 224
# Width over height of random crops (Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6).
_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10
_one_at_a_time = threading.Lock()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What of a stored image a network is given: a square of `size` pixels.

    size: its side in pixels, > 0.
    smallest_crop: of the area of an image, the smallest part that a random crop takes; above 0, at most 1.
    """

    size: int = 224
    smallest_crop: float = 0.08

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return self.size, self.size, 3


class Decoded(NamedTuple):
    """One image.

    pixels: (size, size, 3) uint8, red, green and blue.
    whole: False of a truncated file, of which what is there was decoded; the rest is grey.
    """

    pixels: npt.NDArray[np.uint8]
    whole: bool


class Box(NamedTuple):
    """A part of an image, in its pixels: from (left, top) up to (right, bottom)."""

    left: float
    top: float
    right: float
    bottom: float


class UndecodableError(Exception):
    """The bytes are no image that can be decoded, not even in part; the message says why, without a name."""


def random_crop(encoded: bytes, view: View, rng: np.random.Generator) -> Decoded:
    """A random part of an image, `random_box`, resized to the view's square with bilinear filters that do not alias.

    Raises:
      UndecodableError: for what is no image.
    """
    return _decoded(encoded, view, lambda width, height: random_box(width, height, view.smallest_crop, rng))


def centre_crop(encoded: bytes, view: View) -> Decoded:
    """The middle of an image whose shorter side was resized to 256/224 of the view's size; resized as by `random_crop`.

    The part is cut out first, so that an image of one pixel's width does not become one of many millions.

    Raises:
      UndecodableError: for what is no image.
    """
    return _decoded(encoded, view, central_box)


def random_box(width: int, height: int, smallest: float, rng: np.random.Generator) -> Box:
    """A part of an image of `width` x `height`, uniform in area from `smallest` to 1 of the image's, uniform in the
    logarithm of width over height from 3/4 to 4/3, and uniform in place.

    Szegedy et al. (CVPR 2015, section 6), drawn as torchvision's `RandomResizedCrop` draws it: what does not fit is
    drawn again, up to 10 times; then the largest central part of an allowed shape is taken.
    """
    area, (low, high) = width * height, np.log(_RATIOS)
    for _ in range(_TRIES):
        target, ratio = area * rng.uniform(smallest, 1), math.exp(rng.uniform(low, high))
        wide, tall = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1))
            return Box(left, top, left + wide, top + tall)
    wide, tall = min(width, max(1, round(height * _RATIOS[1]))), min(height, max(1, round(width / _RATIOS[0])))
    left, top = (width - wide) // 2, (height - tall) // 2
    return Box(left, top, left + wide, top + tall)


def central_box(width: int, height: int) -> Box:
    """The central square of an image of `width` x `height` whose side is 224/256 of the shorter one's."""
    side = min(width, height) / _MARGIN
    left, top = (width - side) / 2, (height - side) / 2
    return Box(left, top, left + side, top + side)


def _decoded(encoded: bytes, view: View, box_of: Any) -> Decoded:
    from PIL import Image

    image = _opened(encoded)
    width, height = image.size
    box = box_of(width, height)
    # A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size where the view has still fewer pixels: much faster.
    needed = view.size / min(box.right - box.left, box.bottom - box.top)
    if needed < 0.5:
        image.draft(image.mode, (math.ceil(width * needed), math.ceil(height * needed)))
    whole = True
    try:
        image.load()
    except Exception as error:
        # Whatever pillow's decoders raise over what is broken: OSError, SyntaxError, ValueError, struct.error, ...
        image, whole = _what_is_there(encoded, error), False
    scales = image.width / width, image.height / height
    scaled = (box.left * scales[0], box.top * scales[1], box.right * scales[0], box.bottom * scales[1])
    pixels = _in_colour(image).resize((view.size, view.size), Image.Resampling.BILINEAR, box=scaled)
    return Decoded(np.asarray(pixels), whole)


def _opened(encoded: bytes) -> Any:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Exception as error:
        reason = "it is empty" if not encoded else "it is no image of a known format"
        if not isinstance(error, Image.UnidentifiedImageError):
            reason = str(error) or type(error).__name__
        raise UndecodableError(reason) from error
    return image


def _what_is_there(encoded: bytes, error: Exception) -> Any:
    """A truncated image decoded as far as it goes.

    Raises:
      UndecodableError: for `error`, where nothing can be decoded.
    """
    from PIL import ImageFile

    image = _opened(encoded)
    # The setting is the process's own, and decoders read it while they work.
    with _one_at_a_time:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            image.load()
        except Exception:
            raise UndecodableError(str(error) or type(error).__name__) from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
    return image


def _in_colour(image: Any) -> Any:
    """Red, green and blue of any image: grey ones, CMYK, palettes, 16 bits and transparent ones, whose colour stays."""
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # 16 bits, which pillow would clip at 255 instead of scaling.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
