"""`sostenuto chat`: a conversation in a terminal. Knows HTTP and terminals; of our code, the reader of events."""
