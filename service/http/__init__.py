"""The image and model routes, and the documents that describe the API."""
