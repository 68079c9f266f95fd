"""The benchmark: decode calls timed beside other implementations and beside what the device can do.

``cases`` says what is timed, ``inputs`` makes its tensors, ``peers`` adapts the implementations, ``timing`` holds the
clock, ``run`` measures, ``record`` is a measurement, ``report`` and ``roofline`` show it. ``cases``, ``record``,
``report`` and ``roofline`` do without torch: they also show what was measured elsewhere.
"""
