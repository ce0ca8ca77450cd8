"""DefiNet: relaxed positions of doped crystals in one step, learned from relaxations."""
