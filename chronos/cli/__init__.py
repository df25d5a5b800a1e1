"""The command line: one short function per command, one file per family.

Importing these modules imports no framework; every command imports its room inside its function.
The work itself lives in engine, trainer, common and backends.
"""
