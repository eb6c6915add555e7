"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """A mistake in what the user wrote or pointed at.

    The message is one line: it names the thing, shows what was near it and says what to do. The
    command line prints it without a traceback and exits with 2.
    """
