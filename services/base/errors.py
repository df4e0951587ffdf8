"""The errors that services raise on purpose, each with the gRPC status that it travels with."""

from __future__ import annotations

from typing import ClassVar

import grpc


class ServiceError(Exception):
    """An error whose message is meant for the caller. Each subclass travels with a status of its own."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL


class SettingError(ValueError):
    """A setting that cannot be honoured; the message is `SETTING: PROBLEM`.

    Attributes:
        setting: the key, below the section of the part that raises it; a caller may put the section in front.
        problem: what is wrong with it, and what is allowed.
    """

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(f"{setting}: {problem}")
        self.setting, self.problem = setting, problem

    def __reduce__(self) -> tuple[type[SettingError], tuple[str, str]]:
        return type(self), (self.setting, self.problem)  # for an error in another process


class RunFailedError(ServiceError):
    """A training run that failed although the user's settings were right."""


class InvalidArgumentError(ServiceError):
    """The input is wrong; the message names the field and what is allowed."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class FailedPreconditionError(ServiceError):
    """The two sides do not fit together: fingerprint, protocol or plan."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class NotFoundError(ServiceError):
    """A name that the service does not know; the message lists those it knows."""

    code = grpc.StatusCode.NOT_FOUND


class ResourceExhaustedError(ServiceError):
    """The request is more than the service holds at once; retry with less."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(ServiceError):
    """The service is starting, draining or short of sources; retry later."""

    code = grpc.StatusCode.UNAVAILABLE


class NotServedError(UnavailableError):
    """No application of that name is served at the address: it is starting, or the name is wrong."""


class DeadlineExceededError(ServiceError):
    """There was no answer in time."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class UnauthenticatedError(ServiceError):
    """The bearer token is missing or wrong."""

    code = grpc.StatusCode.UNAUTHENTICATED
