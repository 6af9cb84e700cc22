"""Conversations: the turn protocol and the ledger it rests on."""
