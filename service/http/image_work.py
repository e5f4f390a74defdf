"""The work on one encoded image of a request, over HTTP or gRPC."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrine.bundle.images import EncodedImage, decode
from vitrine.bundle.predictors import Predictor, PreparedImage, Row
from vitrine.service.http import schemas
from vitrine.service.http.json_body import LongText
from vitrine.service.http.requests import image_bytes
from vitrine.service.observability.request_record import RequestRecord

_SECONDS_PER_DRAWN_PIXEL = 80e-9  # to decode a picture in full and to encode it again


@dataclass(eq=False)
class ImageWork:
    """The work on an encoded image (`scheduler.Work`)."""

    image: object  # see `requests.image_bytes`
    max_pixels: int
    record: RequestRecord
    predictor: Predictor
    to_result: "Callable[[ImageWork, Row], Any]"
    draws: bool = False  # `to_result` needs the image
    explains: bool = False
    encoded: EncodedImage | None = field(init=False, default=None)  # after `cost`
    decoded: Image.Image = field(init=False)  # only with `draws`
    shape: schemas.Image = field(init=False)  # width and height
    prepared: NDArray[np.uint8] | PreparedImage = field(init=False)

    @property
    def size(self) -> int:
        return len(self.image) if isinstance(self.image, (bytes, str, memoryview, LongText)) else 0

    @property
    def limited(self) -> bool:
        return self.draws or self.explains

    def cost(self) -> float:
        self.image = image_bytes(self.image)
        self.encoded = EncodedImage(self.image, max_pixels=self.max_pixels)
        return self.encoded.decode_seconds + self.draws * self.encoded.pixels * _SECONDS_PER_DRAWN_PIXEL

    def prepare(self) -> NDArray[np.uint8] | PreparedImage:
        with self.record.stage("decode"):
            data = image_bytes(self.image)
            encoded = self.encoded or EncodedImage(data, max_pixels=self.max_pixels)
            image = encoded.decode(self.predictor.preprocessing)
            self.record.add_image(image.width * image.height)
            self.shape = schemas.Image(image.width, image.height)
            if self.draws:
                self.decoded = image.image if image.is_whole else decode(data, max_pixels=self.max_pixels)
            self.prepared = self.predictor.prepare(image)
        return self.prepared

    def postprocess(self, row: Row) -> Any:
        return self.to_result(self, row)
