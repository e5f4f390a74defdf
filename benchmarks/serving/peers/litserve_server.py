"""LitServe with a worker process for each core."""

import os

import litserve
from fastapi import UploadFile
from model import PORT, open_session, read_image, run


class Api(litserve.LitAPI):
    """One image."""

    def setup(self, device: str) -> None:
        """In each worker."""
        self.session = open_session(threads=1)

    def decode_request(self, request: UploadFile) -> object:
        """Multipart to pixels."""
        return read_image(request.file.read())

    def predict(self, image: object) -> object:
        """Run the graph."""
        return run(self.session, [image])[0]

    def encode_response(self, output: object) -> object:
        """As it is."""
        return {"answer": output}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=os.cpu_count(), timeout=120)
    server.run(port=PORT, host="127.0.0.1", generate_client_file=False, log_level="warning")
