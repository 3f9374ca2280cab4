"""Snakemake that asks for the jobs' status every second, not ever more rarely."""

import asyncio
import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

if __name__ == "__main__":
    RemoteExecutor.sleep = lambda self: asyncio.sleep(1)
    sys.exit(main())
