"""How processes start, fail, stop and are watched."""
