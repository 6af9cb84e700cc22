"""The chain hash of a token history: what a recurrent state has consumed, in sixteen bytes.

`digest[n + 1] = BLAKE2b-128(digest[n] || token as 4 little-endian bytes)`, starting from a root that names the
tenant and what the history begins from: the zero state, or a tuned one. The digest depends only on the tokens and their
order, never on how they were cut into turns, prompts or chunks; it can be continued from any digest without the tokens
before it. Two states of one model with equal digests are the same state, so the digest is the identity under which
states are kept, found and verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

DIGEST_BYTES = 16

_NODE = hashlib.blake2b(digest_size=DIGEST_BYTES)


def root_digest(tenant: str = "", initial_state: str = "") -> bytes:
    """Return the digest of the empty history of `tenant`, which begins from the zero state or from a tuned one.

    `initial_state` is the fingerprint of the tuned state's content, in hex, so that histories of equal tokens that
    begin from different states never share a digest.
    """
    salt = bytes.fromhex(initial_state)[: hashlib.blake2b.SALT_SIZE]
    return hashlib.blake2b(tenant.encode(), digest_size=DIGEST_BYTES, salt=salt, person=b"sostenuto-chain").digest()


def extend_digest(digest: bytes, token_ids: Iterable[int]) -> bytes:
    """Return the digest of the history behind `digest` followed by `token_ids` (each in `[0, 2**32)`)."""
    for token_id in token_ids:
        node = _NODE.copy()  # half of what making one costs
        node.update(digest + token_id.to_bytes(4, "little"))
        digest = node.digest()
    return digest
