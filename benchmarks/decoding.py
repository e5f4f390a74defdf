"""Speed and pixel differences of decoding JPEGs at reduced size (`docs/decisions/0016-...`).

    python benchmarks/decoding.py PHOTOGRAPH [...]

Measures each photograph at its own size and downscaled to 500 and 250 pixels, for inputs of 224 and 32 pixels: median
CPU time of this thread from bytes to pixels, at full and reduced size in turns; mean and 99th percentile of the
absolute difference of their pixels, out of 255.
"""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from vitrine.bundle.images import decode, decode_for, to_classification_pixels
from vitrine.bundle.manifest import ClassificationPreprocessing

CHANNELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
MIN_SECONDS = 1.0


def in_turns(calls: list[Callable[[], object]]) -> list[float]:
    """Return the median CPU time of each call, in milliseconds."""
    timings: list[list[float]] = [[] for _ in calls]
    end = time.monotonic() + MIN_SECONDS
    while time.monotonic() < end or len(timings[0]) < 5:
        for call, times in zip(calls, timings, strict=True):
            start = time.thread_time()
            call()
            times.append(1000 * (time.thread_time() - start))
    return [median(times) for times in timings]


def downscaled(data: bytes, edge: int) -> bytes:
    """Return the photograph as a JPEG whose longest edge is `edge`."""
    image, stream = decode(data), io.BytesIO()
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    image.save(stream, "JPEG", quality=92)
    return stream.getvalue()


def main() -> None:
    """Print a table."""
    print(f"{'sent':>12}{'input':>7}{'decoded':>12}{'full':>10}{'reduced':>10}{'mean':>7}{'99%':>6}")
    for name in sys.argv[1:]:
        original = Path(name).read_bytes()
        for data in (original, downscaled(original, 500), downscaled(original, 250)):
            for edge in (224, 32):
                preprocessing = ClassificationPreprocessing(input_size=(edge, edge), crop_pct=0.875, **CHANNELS)

                def full(data: bytes = data, by: ClassificationPreprocessing = preprocessing) -> np.ndarray:
                    return to_classification_pixels(decode(data), by)

                def reduced(data: bytes = data, by: ClassificationPreprocessing = preprocessing) -> np.ndarray:
                    return to_classification_pixels(decode_for(data, by), by)

                image = decode_for(data, preprocessing)
                before, after = in_turns([full, reduced])
                difference = np.abs(full().astype(int) - reduced())
                source = f"{image.width}x{image.height}"
                decoded = "{}x{}".format(*image.image.size)
                print(
                    f"{source:>12}{edge:>7}{decoded:>12}{before:>7.2f} ms{after:>7.2f} ms"
                    f"{difference.mean():>7.2f}{np.quantile(difference, 0.99):>6.0f}"
                )


if __name__ == "__main__":
    main()
