"""What is raised in place of a peer, apart from those that take seconds to import."""


class MissingPeer(RuntimeError):  # noqa: N818, it is no error of the program
    """A peer cannot run here; the message says why."""
