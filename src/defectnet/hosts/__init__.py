"""Host crystals: where they come from, which are kept, and the sheet that lists them.

``sheet`` (the contract: one row, one crystal) <- ``crystallography`` (space groups, orbits, cells);
``downloads`` -> ``sources`` -> ``filters`` -> ``select`` make a sheet; ``commands`` is ``defectnet hosts``.
"""
