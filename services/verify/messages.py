"""The output of programs on the wire."""

from __future__ import annotations

from fusion.v1 import verify_pb2
from services.base.errors import UnavailableError
from services.verify.sandbox.output_run import ProgramEnd, ProgramOutput

_ENDS: dict[ProgramEnd, verify_pb2.ProgramEnd] = {
    "finished": verify_pb2.PROGRAM_END_FINISHED,
    "failed": verify_pb2.PROGRAM_END_FAILED,
    "late": verify_pb2.PROGRAM_END_LATE,
    "too_long": verify_pb2.PROGRAM_END_TOO_LONG,
}
_NAMES = {number: name for name, number in _ENDS.items()}


def encode_output(found: ProgramOutput) -> verify_pb2.RunProgramResponse:
    """Return the message for an output."""
    return verify_pb2.RunProgramResponse(output=found.output, end=_ENDS[found.end])


def decode_output(message: verify_pb2.RunProgramResponse) -> ProgramOutput:
    """Return the output in a message; raises UnavailableError for an end that is not known here."""
    if message.end not in _NAMES:
        raise UnavailableError(f"the verifier sent an unknown end of a program: {message.end}")
    return ProgramOutput(message.output, _NAMES[message.end])
