"""Every error that a user can cause or meet, as one tree.

    SpecDecodeError
    ├── UserError (ValueError)      something the user can fix; the message says what, where and what was expected
    │   ├── ConfigError             a configuration file or a command line
    │   ├── ModelError              a model that does not exist, does not load, or does not fit the other one
    │   ├── HubError                the Hugging Face Hub, which is not reached or refuses
    │   ├── RequestError            a prompt or a sampling parameter
    │   └── TrainingError           a training that has failed and can go on, such as for want of space
    └── OverloadedError             the queue is full; trying again later helps

The command line turns a `UserError` into one line and exit status 2; the server turns a `RequestError` into a 4xx and an
`OverloadedError` into 429.
"""


class SpecDecodeError(Exception):
    """The root: catches everything that SpecDecode raises on purpose."""


class UserError(SpecDecodeError, ValueError):
    """Something that the user can fix."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the file, the key, the value and what was expected."""


class ModelError(UserError):
    """A model that does not exist, does not load, or does not fit the model that it is paired with."""


class HubError(UserError):
    """The Hugging Face Hub is not reached, or refuses what is sent."""


class RequestError(UserError):
    """A prompt or parameter that cannot be served; `param` is the name of the offending field, if there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type["RequestError"], tuple[str, str | None]]:
        return type(self), (str(self), self.param)


class TrainingError(UserError):
    """A training that has failed; what it has reached is there, and it can go on when the cause is mended."""


class OverloadedError(SpecDecodeError):
    """No room in the queue; nothing was started."""
