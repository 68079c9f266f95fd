"""The tuner: configurations tried out on a GPU, every trial kept in a log, and a table of what was best.

``candidates`` says what is tried, ``variants`` builds it, ``measure`` takes the time, ``trial`` is one measurement and
its log, ``choose`` is the pure function from a log to a ``table``, ``session`` does one after the other, and ``chosen``
is how a table is found when a module is built or a schedule made. All but ``measure`` and ``session`` do without torch.
"""
