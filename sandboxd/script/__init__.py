"""Pure: from a plan to a launch script, and the machine that carries it out."""
