"""Moving a request's cache from the engine that filled it to the engine that decodes with it.

states     the five states of a transfer, its legal moves, what a cancellation may answer
transport  the interface every backend has, and the plain data that passes through it
ledger     what a transport knows of each transfer: parts, acknowledgements, leases, quarantine
local      the backend for engines of one process
faults     what tests make go wrong
checks     the checksum that travels with every part; device: the same, computed where it lies
"""
