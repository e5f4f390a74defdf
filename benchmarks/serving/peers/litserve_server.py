"""LitServe with one worker process per core."""

import os

import litserve
from fastapi import UploadFile
from model import PORT, open_session, read_image, run


class Api(litserve.LitAPI):
    """Predict for one image per request."""

    def setup(self, device: str) -> None:
        """Load the model, in each worker."""
        self.session = open_session(threads=1)

    def decode_request(self, request: UploadFile) -> object:
        """Decode the uploaded image."""
        return read_image(request.file.read())

    def predict(self, image: object) -> object:
        """Run the graph."""
        return run(self.session, [image])[0]

    def encode_response(self, output: object) -> object:
        """Return the result unchanged."""
        return {"answer": output}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=os.cpu_count(), timeout=120)
    server.run(port=PORT, host="127.0.0.1", generate_client_file=False, log_level="warning")
