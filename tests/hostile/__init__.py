"""Trials with files and requests of strangers, kills, random inputs and load.

Each is a program that prints counts and ends with status 1 when anything was lost: `make
test-hostile`, `make test-crash`, `make fuzz`, `make soak`. pytest does not run them.
"""
