"""MLServer with a custom runtime."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

from mlserver import MLModel
from mlserver.codecs import Base64Codec
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from model import PORT, open_session, read_image, run


class Runtime(MLModel):
    """Predict for one image per request."""

    async def load(self) -> bool:
        """Load the model."""
        self.session = open_session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Return the predictions for one base64 image, as JSON."""
        (data,) = Base64Codec.decode_input(payload.inputs[0])
        answer = json.dumps(run(self.session, [read_image(data)])[0])
        output = ResponseOutput(name="answer", shape=[1], datatype="BYTES", data=[answer])
        return InferenceResponse(model_name=self.name, outputs=[output])


if __name__ == "__main__":
    folder = Path(mkdtemp())
    settings = {"host": "127.0.0.1", "http_port": PORT, "grpc_port": PORT + 1, "metrics_port": PORT + 2}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(
        json.dumps({"name": "model", "implementation": "mlserver_server.Runtime"})
    )
    here = Path(__file__).parent
    command = "import sys; sys.path.insert(0, sys.argv.pop(1)); from mlserver.cli.main import main; main()"
    sys.exit(subprocess.call([sys.executable, "-c", command, str(here), "start", str(folder)]))
