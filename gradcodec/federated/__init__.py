"""Federated learning with a codec in both directions, framework-free.

envelope   what surrounds payloads in a message: round, client, sample count
replica    one participant's copy of the global state, moved on by payloads
server     aggregates replies, broadcasts increments, catches late clients up
loop       the plain loop: sampling, training, accounting, checkpoints
"""
