"""FastAPI as its tutorial has it: an uploaded file, a plain function, which runs on the thread pool."""

import uvicorn
from fastapi import FastAPI, File
from model import PORT, open_session, read_image, run

app = FastAPI()
session = open_session()


@app.post("/predict")
def predict(image: bytes = File()) -> list:
    """One image."""
    return run(session, [read_image(image)])[0]


uvicorn.run(app, port=PORT, access_log=False)
