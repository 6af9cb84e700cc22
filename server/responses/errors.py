"""What can be wrong with a response that is asked for.

ResponseError
├── ResponseNotFound            there is no response of that id
├── PreviousResponseNotFound    nor one to continue
├── PreviousResponseUnfinished  the response to continue has no answer: it is still generated, or has failed
└── ResponseCancelled           somebody asked for its end
"""

from __future__ import annotations


class ResponseError(Exception):
    """Base of what is raised about responses."""


class ResponseNotFound(ResponseError):
    """There is no response of that id."""


class PreviousResponseNotFound(ResponseError):
    """There is no response to continue."""


class PreviousResponseUnfinished(ResponseError):
    """The response to continue has no answer."""


class ResponseCancelled(ResponseError):
    """Somebody asked for the end of the response."""
