"""Errors of export."""

from vitrine.bundle.errors import VitrineError


class ExportError(VitrineError):
    """A run cannot be exported."""

    code = "export_error"


class ParityError(ExportError):
    """The ONNX graph's outputs differ from the torch network's."""

    code = "parity_error"

    def __init__(self, output: str, *, quantity: str, expected: object, found: object, begins: str = "") -> None:
        where = f"; {begins}" if begins else ""
        super().__init__(f"{output}: {quantity} between torch and ONNX: expected {expected}, found {found}{where}")


class AccuracyError(ExportError):
    """A variant of the graph is less accurate than allowed."""

    code = "accuracy_error"

    def __init__(self, variant: str, *, metric: str, limit: float, found: float) -> None:
        super().__init__(f"{variant}: {metric}: expected at most {limit} points below fp32, found {found:.2f}")
