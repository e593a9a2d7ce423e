"""The one error that is meant for the user."""


class UserError(Exception):
    """Something the user can mend: what was got, what was expected, what to do.

    The command line prints it as one line on stderr and exits with code 2; everything else that goes wrong is
    a fault of ours and exits with code 1.
    """
