"""The exceptions a user can catch. All derive from `GradRouteError`, itself a `ValueError`."""


class GradRouteError(ValueError):
    """Something that was asked for cannot be done, or was asked for and did not happen."""


class TargetError(GradRouteError):
    """`target_modules` names modules that do not exist or cannot be adapted."""


class RouteError(GradRouteError):
    """A mask does not fit the batch, or a route was not in force where its gradients were formed."""


class DeadDirectionError(GradRouteError):
    """The two sides of the contrastive pairs have the same features, so there is no direction."""


class RefreshError(GradRouteError):
    """A refresh was due and did not change what it should have changed."""


class FileFormatError(GradRouteError):
    """A file is truncated, of another format, or made for another model."""


class GradRouteWarning(UserWarning):
    """Something happened as asked and is probably not what was meant."""
