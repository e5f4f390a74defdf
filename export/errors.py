"""Errors of export: an export is a verified bundle or one of these."""

from bundle.errors import VitrineError


class ExportError(VitrineError):
    """A run cannot become a bundle."""

    code = "export_error"


class ParityError(ExportError):
    """The ONNX graph answers something else than the torch network."""

    code = "parity_error"

    def __init__(self, output: str, *, quantity: str, expected: object, found: object) -> None:
        super().__init__(f"{output}: {quantity} between torch and ONNX: expected {expected}, found {found}")
