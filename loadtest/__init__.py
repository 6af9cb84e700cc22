"""Conversations under load: many users talking to one server over HTTP, and what their turns felt like.

Knows HTTP, server-sent events and clocks; imports nothing else of this project, so that it measures what any client
would see. Run it with `python -m loadtest --url http://127.0.0.1:8000`.

    options      what to do, from the command line
    workload     who says what, and when: everything that is random, seeded
    sse          bytes to server-sent events
    reply        a streamed reply: its times, its tokens, and whether it keeps the API's promises
    client       one turn over HTTP
    generator    open and closed loop: when each turn begins
    statistics   records of turns to percentiles
    figures      the plots
    report       the files in `--output`
"""
