"""Exceptions that a user can act on; the command line prints them without a traceback."""


class DefectnetError(Exception):
    """Base class: the message names the file, the field and the remedy."""


class InputError(DefectnetError):
    """Bad configuration, host sheet, structure or spectrum, found before expensive work starts."""


class PhysicsError(DefectnetError):
    """One structure cannot be computed (exploded, out of vocabulary …); recorded as a failed record."""


class RecordError(DefectnetError):
    """A record or dataset on disk is damaged, truncated or of another schema version."""
