"""Responses: answers with ids of their own, chained, stored, streamed, and picked up again."""
