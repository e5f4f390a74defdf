"""FastAPI as in its tutorial: an uploaded file and a synchronous endpoint on the thread pool."""

import uvicorn
from fastapi import FastAPI, File
from model import PORT, open_session, read_image, run

app = FastAPI()
session = open_session()


@app.post("/predict")
def predict(image: bytes = File()) -> list:
    """Return the predictions for one image."""
    return run(session, [read_image(image)])[0]


uvicorn.run(app, port=PORT, access_log=False)
