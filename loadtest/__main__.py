"""`python -m loadtest`: run a load test, write its report, end with one line of JSON."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence

import orjson

from loadtest.client import ServerUnusable
from loadtest.generator import LoadGenerator, LoadRun
from loadtest.options import Options, parse_options
from loadtest.processes import ProcessGroup, ProcessLost
from loadtest.progress import Progress
from loadtest.report import summary_lines, write_report
from loadtest.statistics import summarize


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load test that `arguments` (default: the command line) describe; return the exit status."""
    options = parse_options(arguments)
    try:
        run = asyncio.run(_run(options))
    except (ServerUnusable, ProcessLost) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 1
    summary = summarize(run)
    print("\n".join(summary_lines(summary)))
    if options.output is not None:
        write_report(options.output, run, summary)
        print(f"report: {options.output / 'report.html'}")
    print(orjson.dumps(summary.as_json()).decode())
    return 0 if summary.ok else 1


async def _run(options: Options) -> LoadRun:
    with Progress(options) as progress:
        make = LoadGenerator if options.processes == 1 else ProcessGroup
        generator = make(options, progress.on_turn)
        # The first interrupt ends the run in order, with its report; the handler is gone then, so a second one kills.
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, _interrupt, loop, generator)
        ticking = asyncio.create_task(progress.tick(generator.clock))
        try:
            return await generator.run()
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            ticking.cancel()


def _interrupt(loop: asyncio.AbstractEventLoop, generator: LoadGenerator | ProcessGroup) -> None:
    loop.remove_signal_handler(signal.SIGINT)
    generator.stop()


if __name__ == "__main__":
    sys.exit(main())
