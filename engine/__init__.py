"""The engine: token ids in, token ids out.

Knows tokens, recurrent states and batches, and owns the device. Knows nothing of HTTP, conversations or users, and
reads no environment variable. Runs in its own process (`python -m engine`) or, with the same code, in a thread of
another one.

The API process may import only the torch-free modules: `engine.messages`, `engine.errors`, `engine.config`,
`engine.token_chain`, `engine.client`, `engine.launch`, `engine.logs` and `engine.tokenizer`.
"""
